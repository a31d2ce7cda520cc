"""The protocol around the window, with a GPU whose true energy is known and a clock that only moves when told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lem.base import durable, measurement
from lem.base.errors import EngineError, MeterRefused
from lem.base.measurement import EnergySource
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import Completion, EngineReport, OnProgress, TokenRequest, say_nothing
from lem.meters.samples import (
    FINISHED_FILENAME,
    PART_FILENAME,
    CpuLoad,
    ProcessesSeen,
    Row,
    encode_header,
    encode_row,
    read_finished,
)
from lem.record import Record, encode_record
from lem.worker.channel import RunRequest
from lem.worker.harness import ResidentEngine, run_experiment
from lem.worker.metering import Metering
from lem.worker.prompts import write_prompts
from tests.doubles.nvml.traces import Counter, GpuProcess, GpuTrace, Load, Trace, simulate_log
from tests.records import codes
from tests.unit.worker.test_harness import PROMPTS, Listener
from tests.unit.worker.timed_backend import SteppedClock, TimedBackend
from tests.worker_rig import IDENTITY

UUID = "GPU-11111111-2222-3333-4444-555555555555"


IDLE_W, BUSY_W = 90.0, 410.0


ENGINE_PID = 4711
QUICK = {"min_window_sec": 3.0}
NEW_YEAR_S = 1767225600  # 2026-01-01T00:00:00Z, when simulated logs begin
SHORT_IDLE = {"duration_sec": 5.0}


@dataclass
class Engine(TimedBackend):
    states: list[str] = field(default_factory=list)

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        self.states.append(f"{self.clock.monotonic_ns()} 1")
        found = super().generate(requests, observe_tokens=observe_tokens, on_progress=on_progress)
        self.states.append(f"{self.clock.monotonic_ns()} 0")
        return found


class SampledClock(SteppedClock):
    """Has the sampler's file brought up to date whenever somebody waits."""

    def __init__(self) -> None:
        super().__init__(start_ns=1_000_000_000_000)
        self.write = lambda: None

    def sleep(self, duration_s: float) -> None:
        super().sleep(duration_s)
        self.write()


def gpu_trace(counter: Counter | None = Counter(period_s=0.1), **options: Any) -> GpuTrace:  # noqa: B008
    return GpuTrace(uuid=UUID, load=Load("", IDLE_W, BUSY_W), counter=counter, **options)


@dataclass
class Meter:
    folder: Path
    gpu: GpuTrace = field(default_factory=gpu_trace)
    baselines: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    keep_engine: bool = True
    clock: SampledClock = field(default_factory=SampledClock)
    listener: Listener = field(default_factory=Listener)
    is_sampling: bool = True
    server: Mapping[str, Any] = field(default_factory=dict)  # more of the request, for a server that runs already
    written_ns: int = -1

    def __post_init__(self) -> None:
        report = EngineReport("timed", "1", {}, "cuda", (UUID,), model_parameters=10, embedding_parameters=1)
        self.engine = Engine(self.clock, report=report)
        self.resident = ResidentEngine(self.load, self.clock)
        self.begun_ns = self.clock.monotonic_ns()
        self.clock.write = self.write
        write_prompts(self.folder, PROMPTS)

    def load(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> TimedBackend:
        return self.engine.load(config, secrets)

    @property
    def trace(self) -> Trace:
        whole = Trace(self.begun_ns, (self.gpu,))
        return whole.after_load({0: "\n".join(self.engine.states)})

    def write(self) -> None:
        """Add what a sampler has read since; what it reads once a second is read at whole seconds alone."""
        if not self.is_sampling:
            return
        now_ns = self.clock.monotonic_ns()
        log = simulate_log(self.trace, self.begun_ns, now_ns)
        rows = [row for row in log.rows() if row.at_ns > self.written_ns and self.is_time_for(row)]
        lines = [encode_row(row) for row in rows]
        if self.written_ns < 0:
            lines.insert(0, encode_header(log.header))
        self.written_ns = now_ns
        with (self.folder / PART_FILENAME).open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def is_time_for(self, row: Row) -> bool:
        is_slow = isinstance(row, (CpuLoad, ProcessesSeen))
        return not is_slow or (row.at_ns - self.begun_ns) % 1_000_000_000 < 20_000_000

    def run(self, **options: Any) -> Record:
        config = ExperimentConfig.from_dict(
            {"model": "any", "warmup": {"enabled": False}, "measurement": QUICK, "baseline": SHORT_IDLE, **options}
        )
        durable.write_json(self.folder / "config.json", {"requested": {"model": "any"}})
        (self.folder / PART_FILENAME).unlink(missing_ok=True)
        self.written_ns = -1
        self.write()
        request = RunRequest(
            config=config.to_dict(),
            identity=IDENTITY,
            result_dir=str(self.folder),
            engine_key=config.engine_key(),
            keep_engine=self.keep_engine,
            samples_path=str(self.folder / PART_FILENAME),
            sampled_gpus=(UUID,),
            baselines=self.baselines,
            **self.server,
        )
        record = run_experiment(request, self.resident, self.listener, self.clock)
        encode_record(record)  # refuses a null without a reason
        return record

    def marked(self) -> dict[str, tuple[int, int]]:
        return {
            mark.name: (mark.opened_ns, mark.closed_ns) for mark in read_finished(self.folder / FINISHED_FILENAME)[1]
        }

    def lasted_s(self, name: str) -> float:
        opened_ns, closed_ns = self.marked()[name]
        return (closed_ns - opened_ns) / 1e9

    def true_j(self, name: str = measurement.WINDOW) -> float:
        return self.trace.energy_j(*self.marked()[name])


@pytest.fixture
def meter(tmp_path: Path) -> Meter:
    return Meter(tmp_path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Meter, Record]:
    meter = Meter(tmp_path_factory.mktemp("measured"))
    return meter, meter.run()


def test_the_energy_of_the_window_is_that_which_was_drawn(measured: tuple[Meter, Record]) -> None:
    meter, record = measured
    energy, drawn_j, rest_j = record.energy, meter.true_j(), IDLE_W * record.window.window_s
    assert energy.energy_source == "nvml_counter"
    assert energy.gpu_energy_j == pytest.approx(drawn_j, rel=0.002)
    assert energy.gpu_energy_net_j == pytest.approx(drawn_j - rest_j, rel=0.005)
    assert energy.load_energy_j == pytest.approx(meter.true_j(measurement.LOAD), rel=0.01)
    per_tok_j = drawn_j / (record.work.output_tok or 1)
    assert record.efficiency.energy_per_output_tok_j == pytest.approx(per_tok_j, rel=0.002)
    assert record.validity.valid, record.validity.invalid_reasons


def test_power_at_rest_is_measured_bare_loaded_and_afterwards(measured: tuple[Meter, Record]) -> None:
    meter, record = measured
    idle, spans = record.idle, meter.marked()
    for power_w in (idle.idle_bare_power_w, idle.idle_loaded_power_w, idle.idle_loaded_post_power_w):
        assert power_w == pytest.approx(IDLE_W, rel=0.01)
    assert (idle.idle_bare_temp_c, idle.idle_loaded_temp_c, idle.baseline_age_s) == (40, 40, 0)
    in_order = (measurement.IDLE_BARE, measurement.LOAD, measurement.IDLE_LOADED, measurement.GUARD_BEFORE)
    edges = [edge for name in in_order for edge in spans[name]]
    assert edges == sorted(edges)
    for name in (measurement.IDLE_BARE, measurement.IDLE_LOADED, measurement.IDLE_POST):
        assert meter.lasted_s(name) == pytest.approx(5, rel=0.01), name
    told = [text for _, _, text in meter.listener.told]
    rests = ("s idle without an engine", "s settling", "s idle after the window")
    assert sorted(rests, key=told.index) == list(rests), "each second of rest is told"


def test_the_loaded_baseline_waits_until_power_has_settled(tmp_path: Path) -> None:
    load = Load("", IDLE_W, BUSY_W, fall_tau_s=12.0)
    meter = Meter(tmp_path, GpuTrace(uuid=UUID, load=load))
    begun = f"{meter.begun_ns} 1"
    meter.engine.states += [begun, f"{meter.begun_ns + 8_000_000_000} 0"]  # the load, which ends 8 s in, warms it up
    idle = meter.run().idle
    assert idle.idle_loaded_power_w == pytest.approx(IDLE_W, rel=0.03)


def test_a_power_that_never_settles_is_waited_for_a_minute(meter: Meter) -> None:
    load_s = 3
    meter.engine.states += [
        f"{meter.begun_ns + round(second * 1e9)} {second / 100}" for second in range(5 + load_s, 200, 4)
    ]
    meter.run(baseline={"duration_sec": 5.0})
    spans = meter.marked()
    waited_s = (spans[measurement.IDLE_LOADED][1] - spans[measurement.LOAD][1]) / 1e9
    assert waited_s == pytest.approx(60, abs=2)


@pytest.mark.parametrize(("source", "is_known"), [("nvml_counter", True), ("rapl", False)])
def test_baselines_of_the_same_meter_that_the_host_knows_are_not_measured_again(
    tmp_path: Path, source: str, is_known: bool
) -> None:
    known = {"bare_power_w": 70.0, "loaded_power_w": 91.0, "age_s": 120.0}
    meter = Meter(tmp_path, baselines={source: known})
    idle = meter.run().idle
    found = (idle.idle_bare_power_w, idle.idle_loaded_power_w, idle.baseline_age_s)
    assert found == pytest.approx((70, 91, 120) if is_known else (IDLE_W, IDLE_W, 0), rel=0.01)
    assert {measurement.IDLE_BARE, measurement.IDLE_LOADED}.isdisjoint(meter.marked()) is is_known


def test_no_baseline_is_measured_where_none_is_wanted(meter: Meter) -> None:
    record = meter.run(baseline={"enabled": False}, timeseries={"enabled": False})
    assert not {measurement.IDLE_BARE, measurement.IDLE_LOADED, measurement.IDLE_POST} & set(meter.marked())
    assert record.energy.energy_source == "nvml_counter"
    assert "clocks_unwatched" in codes(record.validity.warnings), "there is no time series"
    assert record.energy.gpu_energy_j == pytest.approx(meter.true_j(), rel=0.002)
    assert record.energy.gpu_energy_net_j is None
    assert record.energy.null_reasons["gpu_energy_net_j"].code == "rest_not_measured"


def test_an_engine_that_leaves_is_not_measured_at_rest_afterwards_nor_are_samples_kept(tmp_path: Path) -> None:
    meter = Meter(tmp_path, keep_engine=False)
    record = meter.run(timeseries={"save": False})
    assert record.idle.idle_loaded_post_power_w is None
    assert record.energy.gpu_energy_j is not None
    assert not (meter.folder / FINISHED_FILENAME).exists()


def test_guards_hold_two_updates_of_the_counter_as_the_warm_up_found_it(tmp_path: Path) -> None:
    meter = Meter(tmp_path, gpu_trace(counter=Counter(period_s=0.25)))
    record = meter.run(warmup={"enabled": True, "timeout_seconds": 5.0})
    for name in (measurement.GUARD_BEFORE, measurement.GUARD_AFTER):
        assert meter.lasted_s(name) == pytest.approx(0.5, rel=0.1)
    assert record.energy.counter_update_period_s == pytest.approx(0.25, rel=0.02)
    assert record.window.window_s >= 25 * 0.95, "a hundred updates"
    assert record.window.window_repeats > 1
    assert record.idle.idle_loaded_power_w == pytest.approx(IDLE_W, rel=0.001), "nothing of the work that follows"


def test_energy_by_phases_comes_from_a_run_of_the_prefill_alone(tmp_path: Path) -> None:
    meter = Meter(tmp_path)
    record = meter.run(measurement={**QUICK, "phases": True}, warmup={"enabled": True, "timeout_seconds": 5.0})
    prefill_share = 4 * 10.0 / (4 * 138.0)  # four turns of a prefill of 10 ms and 128 steps of 1 ms
    assert record.energy.prefill_energy_j is not None
    # The run for prefill alone makes the first token too: 11 ms of each turn.
    assert record.energy.prefill_energy_j / meter.true_j() == pytest.approx(prefill_share * 1.1, rel=0.03)
    assert record.energy.decode_energy_j == pytest.approx(meter.true_j() - record.energy.prefill_energy_j, rel=0.01)
    assert all(request.max_output_tokens == 1 for request in meter.engine.batches[-1])


def test_a_foreign_process_before_the_load_leaves_energy_null_or_refuses_what_demands_it(tmp_path: Path) -> None:
    meter = Meter(tmp_path, gpu_trace(processes=(GpuProcess(77),)))
    with pytest.raises(MeterRefused, match="process 77"):
        meter.run(measurement={**QUICK, "energy": "nvml"})
    assert "load" not in meter.engine.calls
    record = meter.run(baseline={"enabled": False})
    assert record.energy.gpu_energy_j is None
    assert record.energy.null_reasons["gpu_energy_j"].data["pids"] == "77"
    assert record.environment.other_gpu_processes == (f"process 77 on {UUID}",)


def test_the_engine_s_own_process_is_none_of_others(tmp_path: Path) -> None:
    meter = Meter(tmp_path, gpu_trace(processes=(GpuProcess(ENGINE_PID, from_s=9.0),)))
    first = meter.run()
    assert first.validity.valid, first.validity.invalid_reasons
    assert meter.resident.own_pids == frozenset({ENGINE_PID})
    second = meter.run()
    assert second.validity.engine_reused
    assert second.validity.valid, second.validity.invalid_reasons
    assert second.environment.other_gpu_processes == ()
    assert second.energy.gpu_energy_j == pytest.approx(meter.true_j(), rel=0.002)


SERVED: dict[str, Any] = {
    "backend": "server",
    "decoder": {"preset": "deterministic"},
    "server": {"url": "http://127.0.0.1:1"},
}


def test_a_server_that_runs_already_is_measured_without_a_bare_idle_or_a_load(tmp_path: Path) -> None:
    meter = Meter(tmp_path, gpu_trace(processes=(GpuProcess(77),)), server={"server_pids": (77,)})
    meter.engine.report = dataclasses.replace(meter.engine.report, load_id="running")
    for _ in range(2):
        record = meter.run(**SERVED)
        assert record.validity.valid, record.validity.invalid_reasons
        assert record.validity.engine_load_id == "running"
        assert not meter.marked().keys() & {measurement.IDLE_BARE, measurement.LOAD}
        assert record.environment.other_gpu_processes == ()
        assert record.energy.gpu_energy_j == pytest.approx(meter.true_j(), rel=0.002)


def test_the_energy_of_this_machine_is_not_that_of_a_server_elsewhere(tmp_path: Path) -> None:
    why = "the server runs on another machine (far)"
    meter = Meter(tmp_path, server={"meter_errors": {"server": why}})
    meter.engine.report = dataclasses.replace(meter.engine.report, gpu_uuids=(), device="cpu", load_id="far")
    record = meter.run(**SERVED)
    assert record.energy.total_j is None
    assert why in record.energy.null_reasons["cpu_package_energy_j"].text
    with pytest.raises(MeterRefused, match=r"another machine \(far\)"):
        meter.run(**SERVED, measurement={**QUICK, "energy": "tdp_estimate"})


@pytest.mark.parametrize(
    ("process", "waited_ms", "own_pids"),
    [
        # The load ends at 4.01 s, just after the look at 4 s.
        (GpuProcess(ENGINE_PID, from_s=4.005), 310, {ENGINE_PID}),
        (GpuProcess(76, to_s=0.4), 300, set()),
    ],
    ids=["an engine that was loaded between two looks", "one that ends as the experiment begins"],
)
def test_a_process_is_not_taken_for_a_foreign_one(
    tmp_path: Path, process: GpuProcess, waited_ms: int, own_pids: set[int]
) -> None:
    meter = Meter(tmp_path, gpu_trace(processes=(process,)))
    meter.clock.advance_ms(waited_ms)
    record = meter.run(measurement={**QUICK, "energy": "nvml"}, baseline={"enabled": False})
    assert (meter.resident.own_pids or set()) == own_pids
    assert record.validity.valid, record.validity.invalid_reasons
    assert record.energy.gpu_energy_j == pytest.approx(meter.true_j(), rel=0.002)


def test_a_process_that_comes_while_prompts_are_fetched_is_a_foreign_one(meter: Meter) -> None:
    meter.gpu = dataclasses.replace(meter.gpu, processes=(GpuProcess(77, from_s=20.0),))
    config = ExperimentConfig.from_dict({"model": "any", "baseline": {"enabled": False}})
    meter.write()
    path = meter.folder / PART_FILENAME
    metering = Metering(path, simulate_log(meter.trace, 0, 1).header, config, {}, meter.clock, meter.listener)
    metering.choose([UUID])
    assert metering.sources.gpu_method == EnergySource.COUNTER
    meter.clock.advance_ms(60_000)
    metering.rest_bare()
    assert metering.foreign == {UUID: (77,)}
    assert metering.sources.reasons["gpu"].data["pids"] == "77"


def test_an_engine_that_nobody_could_look_at_is_no_foreign_one_in_the_next_experiment(tmp_path: Path) -> None:
    meter = Meter(tmp_path, gpu_trace(processes=(GpuProcess(ENGINE_PID, from_s=2.0),)))
    begin = meter.engine.load

    def load_without_sampler(config: ExperimentConfig, secrets: Mapping[str, str]) -> TimedBackend:
        meter.is_sampling = False
        return begin(config, secrets)

    meter.engine.load = load_without_sampler  # type: ignore[method-assign]
    first = meter.run(baseline={"enabled": False})
    assert first.energy.gpu_energy_j is None
    assert meter.resident.own_pids is None
    meter.is_sampling = True
    second = meter.run(baseline={"enabled": False})
    assert second.validity.engine_reused
    assert second.validity.valid, second.validity.invalid_reasons
    assert second.environment.other_gpu_processes == ()
    assert meter.resident.own_pids == frozenset({ENGINE_PID})


def test_a_process_that_comes_in_the_window_makes_it_invalid(measured: tuple[Meter, Record], tmp_path: Path) -> None:
    opened_s = (measured[0].marked()[measurement.WINDOW][0] - measured[0].begun_ns) / 1e9
    record = Meter(tmp_path, gpu_trace(processes=(GpuProcess(99, from_s=opened_s + 1),))).run()
    assert not record.validity.valid
    assert [reason.data["pids"] for reason in record.validity.invalid_reasons] == ["99"]


@pytest.mark.parametrize(("interval_ms", "guard_s", "window_s"), [(100, 0.4, 10), (200, 0.6, 20)])
def test_guards_and_window_of_integrated_power_outlast_its_sensor(
    tmp_path: Path, interval_ms: int, guard_s: float, window_s: float
) -> None:
    meter = Meter(tmp_path, gpu_trace(counter=None))
    record = meter.run(timeseries={"sample_interval_ms": interval_ms}, baseline={"enabled": False})
    assert record.energy.energy_source == "power_instant_integral"
    assert meter.lasted_s(measurement.GUARD_BEFORE) == pytest.approx(guard_s, rel=0.05)
    # A sensor that is brought up to date every 100 ms sees each edge of the window to that; so it lasts 10 s at least.
    assert record.window.window_s >= window_s
    assert record.energy.gpu_energy_j == pytest.approx(meter.true_j(), rel=0.01)


def test_a_sampler_that_never_writes_is_an_error_with_its_file(meter: Meter) -> None:
    meter.is_sampling = False
    with pytest.raises(EngineError, match=PART_FILENAME) as caught:
        meter.run()
    assert caught.value.kind == "meter"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"energy": "nvml"}, "energy counter"),
        ({"energy": "rapl"}, "rapl"),
        ({"energy": "tdp_estimate"}, "design power"),
        ({"phases": True}, "phases"),
        ({"external_csv": "nowhere.csv"}, "external_csv"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_load(meter: Meter, options: dict[str, Any], words: str) -> None:
    meter.gpu = dataclasses.replace(meter.gpu, counter=None, instant=None, average=None)
    with pytest.raises(MeterRefused, match=words):
        meter.run(measurement={**QUICK, **options})
    meter.gpu = dataclasses.replace(gpu_trace(counter=None))
    with pytest.raises(MeterRefused, match=r"timeseries\.enabled: false"):
        meter.run(timeseries={"enabled": False}, measurement={**QUICK, "energy": "nvml"})
    assert "load" not in meter.engine.calls


PLUG_W = 500.0


@pytest.mark.parametrize(
    ("stops_at_s", "garbage", "why"),
    [
        (None, None, None),  # it writes four seconds late, and is waited for
        (4, None, "before the window closed"),
        (4, "time,watts\nnow,much\n", "'now' is not a UTC time"),
    ],
)
def test_a_meter_at_the_plug_is_waited_for_and_costs_its_own_figure_alone(
    meter: Meter, stops_at_s: int | None, garbage: str | None, why: str | None
) -> None:
    path = meter.folder / "plug.csv"

    def write(until_s: float) -> None:
        """One reading a second, from before the begin of a log of 2026 on."""
        lines = (f"{NEW_YEAR_S + second},{PLUG_W}\n" for second in range(-20, round(until_s)))
        path.write_text("time,watts\n" + "".join(lines))

    def go_on() -> None:
        Meter.write(meter)
        if stops_at_s is None:
            write((meter.clock.monotonic_ns() - meter.begun_ns) / 1e9 - 4)
        elif garbage is not None:
            path.write_text(garbage)

    write(stops_at_s or 3)
    meter.clock.write = go_on
    record = meter.run(measurement={**QUICK, "external_csv": str(path)}, baseline={"enabled": False})
    assert record.energy.gpu_energy_j is not None
    if why is None:
        assert record.energy.external_energy_j == pytest.approx(PLUG_W * record.window.window_s, rel=0.001)
    else:
        assert record.energy.external_energy_j is None
        assert why in record.energy.null_reasons["external_energy_j"].text
