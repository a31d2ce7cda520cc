from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import MeterRefused
from lem.base.measurement import EnergySource
from lem.base.reasons import Reason
from lem.meters.attempt import without_still_counters
from lem.meters.capabilities import PULSE_S, Capabilities, GpuCapability, find_capabilities
from lem.meters.curve import NotMeasured, Span
from lem.meters.machine import keep_lag, kept_lag_s
from lem.meters.samples import GpuHeader, RaplZone, SampleHeader, SampleLog
from lem.meters.sources import choose_sources
from lem.meters.usage import Roots
from tests.doubles.nvml.traces import Counter, GpuTrace, Level, PowerSignal, Trace
from tests.doubles.powercap import Powercap
from tests.scripted_attempt import config
from tests.unit.meters.nvml_stand_in import FakeClock, FakeNvml

NO_RIGHTS = "root alone may read it: sudo chmod a+r /sys/class/powercap/*/energy_uj"
COUNTER, INSTANT_POWER, AVERAGE_POWER, RAPL, TDP_ESTIMATE, EXTERNAL, *_ = EnergySource
NOWHERE = Roots(sys=Path("/nowhere"), powercap=Path("/nowhere"))
PACKAGE, DRAM, CORE = RaplZone("package-0", "package", 10**9), RaplZone("dram", "dram", 10**9), RaplZone("c", "core", 9)


def gpu(place: int = 0, **changes: Any) -> GpuHeader:
    known = GpuHeader(place, f"GPU-{place}", "H200", "580", power_limit_w=700.0, mig_mode=False, power_source="instant")
    return dataclasses.replace(known, **changes)


def header(*gpus: GpuHeader, zones: tuple[RaplZone, ...] = (), **changes: Any) -> SampleHeader:
    errors = {"rapl_error": None if zones else NO_RIGHTS, "gpu_error": None if gpus else "no driver", **changes}
    return SampleHeader(0, "2026-07-14T10:00:00Z", "lab1", 100, gpus, zones=zones, **errors)


def choose(found: SampleHeader, *uuids: str, foreign: Any = None, **options: Any) -> Any:
    return choose_sources(config(**options), found, uuids, foreign=foreign)


def deaf(place: int = 0) -> GpuHeader:
    return gpu(place, counter_error="No Permission", power_error="No Permission", power_source=None)


OWN, ESTIMATE, FOREIGN = {"external_csv": "plug.csv"}, {"energy": "tdp_estimate"}, {"GPU-0": (4711,), "GPU-1": (1,)}
NO_COUNTER = gpu(counter_error="Not Supported")


@pytest.mark.parametrize(
    ("found", "uuids", "measurement", "primary", "scope", "why"),
    [
        (header(gpu(), zones=(PACKAGE, DRAM)), "0", {}, COUNTER, "gpu", None),
        (header(gpu(energy_scope="module")), "0", {}, COUNTER, "module", None),
        (header(gpu(0), gpu(1, counter_error="lost")), "0", {}, COUNTER, "gpu", None),  # another GPU of the host
        (header(gpu()), "0", OWN, COUNTER, "gpu", None),
        (header(NO_COUNTER), "0", {}, INSTANT_POWER, "gpu", None),
        (header(gpu(0), gpu(1, counter_error="Not Supported")), "10", {}, INSTANT_POWER, "gpu", None),
        (header(gpu(counter_error="x", power_source="average")), "0", {}, AVERAGE_POWER, "gpu", None),
        (header(gpu(counter_error="x", power_source=None)), "0", {}, None, None, "gpu_unreadable"),
        (header(gpu(0), deaf(1)), "01", {}, None, None, "gpu_unreadable"),
        (header(deaf(), zones=(PACKAGE,)), "0", {}, None, None, "gpu_unreadable"),  # RAPL never stands for a GPU
        (header(gpu(0), gpu_error="nvml: no permission"), "9", {}, None, None, "meter_unreadable"),
        (header(gpu(mig_mode=True)), "0", {}, None, None, "mig_board"),
        (header(gpu(mig_mode=True)), "77", {}, None, None, "mig_instance"),
        (header(gpu(), zones=(PACKAGE,)), "0", {"energy": "none"}, None, None, "energy_off"),
        (header(zones=(PACKAGE, CORE)), "", {}, RAPL, "cpu_package", "on_cpu"),
        (header(gpu(), zones=(PACKAGE,)), "0", {"energy": "rapl"}, RAPL, "cpu_package", "other_meter_set"),
        (header(), "", {}, None, None, "on_cpu"),
        (header(), "", OWN, EXTERNAL, "machine", "on_cpu"),
        (header(cpu_tdp_w=205.0), "", {}, None, None, "on_cpu"),
        (header(cpu_tdp_w=205.0), "", ESTIMATE, TDP_ESTIMATE, "cpu_package", "on_cpu"),
    ],
)
def test_which_meter_counts(
    found: SampleHeader, uuids: str, measurement: Any, primary: Any, scope: str | None, why: str | None
) -> None:
    names = ("GPU-77",) if uuids == "77" else tuple(f"GPU-{place}" for place in uuids)
    sources = choose(found, *names, measurement=measurement)
    assert (sources.primary, sources.scope) == (primary, scope)
    assert (sources.reasons["gpu"].code if "gpu" in sources.reasons else None) == why
    assert sources.missing_uuids == (names if why in ("meter_unreadable", "mig_instance") else ())
    if primary is None:
        assert sources.reasons["primary"] == sources.reasons["gpu" if names else "cpu"]
    assert sources.is_external == ("external_csv" in measurement)


def test_reasons_name_what_is_in_the_way() -> None:
    sources = choose(header(gpu()), "GPU-0", foreign=FOREIGN)
    assert (sources.primary, sources.reasons["gpu"].data["pids"]) == (None, "4711")
    assert choose(header(gpu()), "GPU-0", foreign={"GPU-1": (1,)}).primary == COUNTER
    assert choose(header()).reasons["cpu"] == Reason.of("sampler_reports", error=NO_RIGHTS)
    assert choose(header(zones=(PACKAGE,))).reasons["dram"].code == "no_dram"
    estimated = choose(header(cpu_tdp_w=205.0), measurement={**ESTIMATE, "cpu_tdp_w": 280})
    assert (estimated.cpu_tdp_w, estimated.reasons["dram"].code) == (280.0, "dram_not_estimated")


@pytest.mark.parametrize(
    ("found", "uuids", "options", "said"),
    [
        (header(zones=(PACKAGE,)), (), {"energy": "nvml"}, "nvml: the experiment runs on the CPU"),
        (header(deaf()), ("GPU-0",), {"energy": "nvml"}, "No Permission"),
        (header(NO_COUNTER), ("GPU-0",), {"energy": "nvml"}, "Not Supported"),
        (header(gpu(mig_mode=True)), ("GPU-0",), {"energy": "nvml"}, "MIG"),
        (header(gpu()), ("GPU-0",), {"energy": "rapl"}, NO_RIGHTS),
        (header(), (), {"energy": "rapl"}, NO_RIGHTS),
        (header(), (), {"energy": "tdp_estimate"}, "design power of this CPU is unknown"),
        (header(), (), {"phases": True}, NO_RIGHTS),
        (header(), (), {"phases": True, "external_csv": "plug.csv"}, "only measurement.external_csv"),
    ],
)
def test_a_demand_that_cannot_be_met_is_refused_for_good(
    found: SampleHeader, uuids: tuple[str, ...], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(MeterRefused) as caught:
        choose(found, *uuids, measurement=options)
    assert said in caught.value.message
    assert (caught.value.kind, caught.value.is_permanent) == ("meter", True)
    assert caught.value.hint
    with pytest.raises(MeterRefused, match="process 4711"):
        choose(header(gpu()), "GPU-0", foreign=FOREIGN, measurement={"energy": "nvml"})


def test_a_baseline_that_nothing_can_measure_is_refused() -> None:
    with pytest.raises(MeterRefused, match=r"baseline\.required: true"):
        choose(header(), baseline={"required": True})
    assert choose(header(gpu()), "GPU-0", baseline={"required": True}).primary == COUNTER


def test_guards_outlast_the_lag_of_a_power_sensor() -> None:
    assert choose(header(gpu()), "GPU-0").least_guard_s == 0.0
    assert choose(header(NO_COUNTER), "GPU-0").least_guard_s == pytest.approx(0.4)
    average = dataclasses.replace(NO_COUNTER, power_source="average")
    assert choose(header(average), "GPU-0").least_guard_s == pytest.approx(1.3)


COUNT, USAGE = "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"
INSTANT = {(186, 0): (1, 100_000.0)}
NS_PER_S = 1_000_000_000


def counting(clock: FakeClock, periods_s: dict[str, float]) -> FakeNvml:
    """GPUs whose counters are brought up to date so often."""
    nvml = FakeNvml(uuids=tuple(periods_s), fields=INSTANT)
    nvml.answers[COUNT] = lambda uuid: clock.now_ns // round(periods_s[uuid] * NS_PER_S)
    return nvml


def find(nvml: FakeNvml | str, clock: FakeClock | None = None, probe_s: float = 0.0, enough: int = 6) -> Capabilities:
    return find_capabilities(nvml, clock or FakeClock(), probe_s=probe_s, enough=enough, roots=NOWHERE)


def only(found: Capabilities) -> GpuCapability:
    (gpu,) = found.gpus
    return gpu


def test_a_counter_that_stands_still_is_told_and_not_waited_for_without_end() -> None:
    clock = FakeClock(now_ns=0)
    nvml = counting(clock, {"GPU-a": 0.1, "GPU-b": 1000.0})
    first, second = find(nvml, clock, probe_s=3.0).gpus
    assert first.counter_update_period_s == pytest.approx(0.1, rel=0.05)
    assert second.counter_update_period_s is None
    assert second.describe()[0] == "energy counter; the counter changed fewer than three times in the window"
    assert clock.now_ns < 3.1 * NS_PER_S
    clock.now_ns = 0
    find(counting(clock, {"GPU-a": 0.02, "GPU-b": 0.1}), clock, probe_s=60.0, enough=10)
    assert 1.0 <= clock.now_ns / NS_PER_S < 1.2  # enough was seen of both


def test_without_a_probe_nobody_waits() -> None:
    clock = FakeClock()
    before_ns = clock.now_ns
    gpu = only(find(counting(clock, {"GPU-a": 0.1}), clock))
    assert clock.now_ns == before_ns
    assert (gpu.counter_update_period_s, gpu.source) == (None, "nvml_counter")
    assert gpu.describe() == ("energy counter", "power: instantaneous, limit 700 W")


class ScriptedWork(Future[Sequence[Span]]):
    """A GPU whose counter follows pulses of work, which begin when they are asked for."""

    def __init__(self, counter: Counter, rise_w: float = 300.0, error: NotMeasured | None = None) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.spans: tuple[Span, ...] = ()
        self._counter, self._rise_w, self._error = counter, rise_w, error

    def start(self, _uuid: str) -> ScriptedWork:
        if self._error is not None:
            raise self._error
        length_ns = round(PULSE_S * NS_PER_S)
        edges = [self.clock.now_ns + (2 * number + 1) * length_ns + 777_000 for number in range(3)]
        self.spans = tuple(Span(edge_ns, edge_ns + length_ns) for edge_ns in edges)
        return self

    def done(self) -> bool:
        return self.clock.now_ns >= 2 * self.spans[-1].closed_ns - self.spans[-1].opened_ns

    def result(self, timeout: float | None = None) -> tuple[Span, ...]:
        return self.spans

    def nvml(self) -> FakeNvml:
        nvml = FakeNvml(fields=INSTANT)
        nvml.answers[COUNT] = lambda _: self._trace().counter_mj(self.clock.now_ns)
        return nvml

    def _trace(self) -> Trace:
        edges = [
            pair
            for it in self.spans
            for pair in ((it.opened_ns, 80.0 + self._rise_w, 0.004), (it.closed_ns, 80.0, 0.004))
        ]
        levels = tuple(Level(at_ns / NS_PER_S, power_w, tau_s) for at_ns, power_w, tau_s in ((0, 80.0, 0.0), *edges))
        return Trace(0, (GpuTrace(signal=PowerSignal(levels=levels), counter=self._counter),))


@pytest.mark.parametrize("lag_s", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("period_s", [0.02, 0.1, 0.5])
def test_work_with_known_edges_shows_how_late_a_counter_is(lag_s: float, period_s: float) -> None:
    work = ScriptedWork(Counter(period_s=period_s, jitter_s=0.002, phase_s=0.013, lag_s=lag_s))
    found = find_capabilities(work.nvml(), work.clock, probe_s=5.0, start=work.start, roots=NOWHERE)
    assert only(found).counter_lag_s == pytest.approx(lag_s, abs=0.01)
    (document,) = found.to_dict()["gpus"]
    assert document["counter_lag_s"] == only(found).counter_lag_s
    assert f"{1e3 * document['counter_lag_s']:.0f} ms late" in only(found).describe()[0]


@pytest.mark.parametrize(
    ("work", "counter_error", "code"),
    [
        (ScriptedWork(Counter(), rise_w=0.0), 0, "lag_unseen"),
        (ScriptedWork(Counter(period_s=1e9)), 0, "counter_slow"),
        (ScriptedWork(Counter()), 3, "counter_absent"),
        (ScriptedWork(Counter(), error=NotMeasured("not_probed")), 0, "not_probed"),
    ],
)
def test_a_lag_that_is_not_seen_is_absent_with_its_reason(work: ScriptedWork, counter_error: int, code: str) -> None:
    nvml = work.nvml()
    nvml.failures.update({COUNT: counter_error} if counter_error else {})
    found = find_capabilities(nvml, work.clock, probe_s=2.0, start=work.start, roots=NOWHERE)
    assert only(found).counter_lag_s is None
    (document,) = found.to_dict()["gpus"]
    assert document["counter_lag_s_null_reason_coded"]["code"] == code


def test_a_probed_lag_is_kept_for_its_gpu_and_driver(tmp_path: Path) -> None:
    environ = {"LEM_CACHE_DIR": str(tmp_path)}
    keep_lag("GPU-a/../b", "580.1", 0.098, environ)
    keep_lag("GPU-c", "580.1", 0.02, environ)
    assert kept_lag_s("GPU-a/../b", "580.1", environ) == 0.098
    assert kept_lag_s("GPU-c", "580.1", environ) == 0.02
    assert kept_lag_s("GPU-c", "581.0", environ) is None
    assert kept_lag_s("GPU-d", "580.1", environ) is None
    keep_lag("GPU-c", "580.1", 7.0, environ)
    assert kept_lag_s("GPU-c", "580.1", environ) is None
    for text in ("{", "[]", '{"uuid": "GPU-c", "driver": "580.1", "counter_lag_s": "0.1"}'):
        (tmp_path / "counters" / "GPU-c.json").write_text(text, encoding="ascii")
        assert kept_lag_s("GPU-c", "580.1", environ) is None


@pytest.mark.parametrize(
    ("nvml", "source", "words"),
    [
        (FakeNvml(fields=INSTANT, failures={COUNT: 3}), "power_instant_integral", "power is integrated instead"),
        (FakeNvml(failures={COUNT: 4}), "power_average_integral", "run lem as root"),
        (FakeNvml(failures={COUNT: 3, USAGE: 3}), None, "does not support it"),
        (FakeNvml(answers={"nvmlDeviceGetMigMode": [1, 1]}), None, "whole board"),
    ],
)
def test_what_stands_in_for_a_counter_is_named(nvml: FakeNvml, source: str | None, words: str) -> None:
    gpu = only(find(nvml, probe_s=1.0))
    assert gpu.source == source
    assert words in " ".join(gpu.describe())
    assert gpu.why_none("counter_update_period_s").code == "counter_absent"


def test_a_module_and_lacking_persistence_are_told() -> None:
    module = {(186, 1): (1, 400_000.0), (191, 1): (3, 5.0)}
    nvml = FakeNvml(failures={COUNT: 3, USAGE: 3}, fields=module, answers={"nvmlDeviceGetPersistenceMode": 0})
    lines = only(find(nvml)).describe()
    assert any("CPU included" in line for line in lines)
    assert any("nvidia-smi -pm 1" in line for line in lines)


def test_a_gpu_that_does_not_answer_is_listed_in_its_place() -> None:
    found = find(FakeNvml(uuids=("GPU-a", "GPU-b", "GPU-c"), lost={"GPU-b": 15}))
    assert [gpu.meter.index for gpu in found.gpus] == [0, 1, 2]
    assert [gpu.source for gpu in found.gpus] == ["nvml_counter", None, "nvml_counter"]
    document = found.to_dict()
    assert [gpu["energy_source"] for gpu in document["gpus"]] == ["nvml_counter", None, "nvml_counter"]
    assert [gpu["uuid"] for gpu in document["gpus"]] == ["GPU-a", "unknown", "GPU-c"]
    assert document["cpu"]["rapl_error"]
    assert "dmesg" in found.gpus[1].describe()[0]


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [("Driver Not Loaded", "NVML is not available: Driver Not Loaded"), (FakeNvml(uuids=()), "no GPU")],
)
def test_why_there_is_no_gpu_is_told(nvml: FakeNvml | str, reason: str) -> None:
    found = find(nvml)
    assert found.gpus == ()
    assert reason in (found.gpu_error or "")


def test_the_cpu_is_looked_at_without_a_gpu(tmp_path: Path) -> None:
    tree = Powercap.server(tmp_path)
    tree.make(0)
    tree.take_away(["intel-rapl:2"])
    cpu = find_capabilities("no driver", FakeClock(), roots=Roots(sys=tmp_path, powercap=tmp_path)).cpu
    assert cpu.zones[:2] == ("package-0", "package-0/core")
    assert cpu.missing == ("psys: No such file or directory",)
    assert (cpu.rapl_error, cpu.tdp_w) == (None, 410.0)


def test_a_log_whose_counters_were_not_read_yet_has_none_that_stands_still() -> None:
    """The sampler writes the header before the first reading."""
    log = SampleLog(header(gpu()))
    assert without_still_counters(log) == log
