from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.base.measurement import EnergySource
from lem.base.reasons import Reason
from lem.config.experiment import ExperimentConfig
from lem.meters.samples import GpuHeader, GpuSample, SampleHeader, SampleLog
from lem.meters.sources import Baselines
from lem.orchestration import host_meters
from lem.orchestration.host_meters import BARE, Attendance, BaselineBook, HostMeters, Reference, has_recovered
from lem.orchestration.status import Event
from lem.record import Idle, Record
from lem.worker.channel import RunRequest
from tests.records import make_record

KEY, GPUS = "key-1", ("GPU-a",)
NO_POST = {"idle_loaded_post_power_w": Reason.of("post_not_measured")}


def record(*, reused: bool = False, source: str | None = "nvml_counter", **idle: Any) -> Record:
    """A record of that power at rest; what is not given was not measured."""
    base = make_record()
    fields = [item.name for item in dataclasses.fields(Idle) if item.name != "null_reasons"]
    reasons = {name: Reason.of("post_not_measured") for name in fields if idle.get(name) is None}
    return dataclasses.replace(
        base,
        idle=Idle(**idle, null_reasons=reasons),
        energy=dataclasses.replace(base.energy, energy_source=source),
        environment=dataclasses.replace(base.environment, gpu_uuids=GPUS),
        validity=dataclasses.replace(base.validity, engine_reused=reused),
    )


MEASURED = record(
    idle_bare_power_w=70.0,
    idle_bare_temp_c=35.0,
    idle_loaded_power_w=95.0,
    idle_loaded_temp_c=41.0,
    baseline_age_s=0.0,
)


def test_what_was_measured_is_known_until_it_is_too_old():
    book = BaselineBook()
    book.note(MEASURED, KEY, now_s=100.0)
    assert book.known(GPUS, KEY, ttl_s=60, now_s=130.0) == {EnergySource.COUNTER: Baselines(70.0, 95.0, 30.0)}
    assert book.known(GPUS, KEY, ttl_s=60, now_s=161.0) == {}


def test_another_engine_has_the_bare_baseline_alone():
    book = BaselineBook()
    book.note(MEASURED, KEY, now_s=100.0)
    assert book.known(GPUS, "key-2", ttl_s=60, now_s=100.0) == {EnergySource.COUNTER: Baselines(bare_power_w=70.0)}
    assert book.known(("GPU-b",), KEY, ttl_s=60, now_s=100.0) == {}


def test_a_baseline_that_was_handed_on_does_not_become_young_again():
    book = BaselineBook()
    book.note(MEASURED, KEY, now_s=100.0)
    book.note(record(idle_bare_power_w=70.0, idle_loaded_power_w=95.0, baseline_age_s=50.0), KEY, now_s=150.0)
    assert book.known(GPUS, KEY, ttl_s=60, now_s=170.0) == {}


def test_what_one_meter_told_is_not_known_of_another():
    book = BaselineBook()
    book.note(MEASURED, KEY, now_s=100.0)
    book.note(record(source="rapl", idle_loaded_power_w=40.0, baseline_age_s=0.0), KEY, now_s=110.0)
    known = book.known(GPUS, KEY, ttl_s=60, now_s=110.0)
    assert known == {EnergySource.COUNTER: Baselines(70.0, 95.0, 10.0), "rapl": Baselines(None, 40.0, 0.0)}


def test_what_a_cpu_takes_is_no_reference_for_gpus():
    book = BaselineBook()
    book.note(dataclasses.replace(MEASURED, energy=record(source="rapl").energy), KEY, now_s=100.0)
    assert book.reference(GPUS, KEY) is None


def test_nothing_is_learned_where_nothing_was_measured():
    book = BaselineBook()
    book.note(record(source=None), KEY, now_s=0.0)
    assert book.known(GPUS, KEY, ttl_s=60, now_s=0.0) == {}


def test_the_reference_is_the_first_baseline_of_a_state():
    book = BaselineBook()
    book.note(MEASURED, KEY, now_s=100.0)
    warmer = dataclasses.replace(MEASURED.idle, idle_loaded_temp_c=55.0, idle_loaded_power_w=110.0)
    book.note(dataclasses.replace(MEASURED, idle=warmer), KEY, now_s=200.0)
    assert book.reference(GPUS, KEY) == Reference(95.0, 41.0)
    assert book.reference(GPUS, BARE) == Reference(70.0, 35.0)
    assert book.reference(GPUS, "key-2") is None


class FakeClock:
    """Time that passes only while something waits; a stop may be asked for at a given second."""

    def __init__(self, stop_at_s: float = float("inf")) -> None:
        self.now_s = 100.0
        self.waits: list[float] = []
        self._stop_at_s = 100.0 + stop_at_s

    def monotonic(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now_s = min(self.now_s + seconds, max(self._stop_at_s, self.now_s))
        return self.now_s >= self._stop_at_s


class FakeSensors:
    """Answers one after the other, the last one for ever."""

    def __init__(self, *answers: bool | None) -> None:
        self._answers: Iterator[bool | None] = iter(answers)
        self._last: bool | None = None
        self.asked = 0

    def __call__(self) -> bool | None:
        self.asked += 1
        self._last = next(self._answers, self._last)
        return self._last


def keep(cap_s: float, sensors: FakeSensors | None, clock: FakeClock) -> host_meters.GapOutcome:
    return host_meters.keep_gap(cap_s, is_recovered=sensors, monotonic=clock.monotonic, wait=clock.wait)


def test_without_sensors_the_whole_gap_is_kept_in_one_wait() -> None:
    clock = FakeClock()
    assert keep(60.0, None, clock) == (60.0, "gap_no_sensors")
    assert clock.waits == [60.0]


def test_a_device_already_back_ends_the_gap_at_once() -> None:
    clock = FakeClock()
    assert keep(60.0, FakeSensors(True), clock) == (0.0, "gap_recovered")
    assert clock.waits == []


def test_gap_ends_when_the_device_is_back() -> None:
    clock, sensors = FakeClock(), FakeSensors(False, False, False, True)
    assert keep(60.0, sensors, clock) == (3.0, "gap_recovered")
    assert sensors.asked == 4


def test_a_device_that_stays_warm_ends_the_gap_at_its_cap() -> None:
    clock = FakeClock()
    assert keep(2.5, FakeSensors(False), clock) == (2.5, "gap_cap_reached")
    assert clock.waits == [1.0, 1.0, 0.5]


def test_sensors_that_never_answer_are_no_sensors() -> None:
    assert keep(5.0, FakeSensors(None), FakeClock()) == (5.0, "gap_no_sensors")


def test_sensors_that_answer_late_still_end_the_gap() -> None:
    assert keep(5.0, FakeSensors(None, None, True), FakeClock()) == (2.0, "gap_recovered")


@pytest.mark.parametrize("sensors", [None, FakeSensors(False)])
def test_a_stop_ends_the_gap_when_it_is_asked_for(sensors: FakeSensors | None) -> None:
    gap_s, reason = keep(60.0, sensors, FakeClock(stop_at_s=7.5))
    assert gap_s == pytest.approx(7.5)
    assert reason == "gap_interrupted"


def test_no_gap_asks_nobody_and_waits_for_nothing() -> None:
    clock, sensors = FakeClock(), FakeSensors(False)
    assert keep(0.0, sensors, clock) == (0.0, "gap_none")
    assert sensors.asked == 0
    assert clock.waits == []


REFERENCE = Reference(power_w=100.0, temp_c=40.0)
S = 1_000_000_000


def log(*samples: tuple[float, float | None, float | None], gpus: int = 1) -> SampleLog:
    """A log of (second, watts, degrees), the same for every GPU."""
    header = SampleHeader(0, "", "", 100, tuple(GpuHeader(n, f"GPU-{n}", "", "") for n in range(gpus)))
    rows = (
        GpuSample(gpu, round(at_s * S), power_w, temp_c) for at_s, power_w, temp_c in samples for gpu in range(gpus)
    )
    return SampleLog(header, samples=tuple(rows))


def steadily(power_w: float | None, temp_c: float | None, gpus: int = 1) -> SampleLog:
    return log(*((second / 2, power_w, temp_c) for second in range(10)), gpus=gpus)


@pytest.mark.parametrize(
    ("power_w", "temp_c", "answer"),
    [
        (100.0, 40.0, True),
        (104.9, 43.0, True),
        (105.5, 40.0, False),
        (100.0, 43.5, False),
        (60.0, 20.0, True),  # no gap would bring that up again
        (None, 40.0, None),
        (100.0, None, None),
    ],
)
def test_a_device_is_back_within_three_degrees_and_five_percent(
    power_w: float | None, temp_c: float | None, answer: bool | None
) -> None:
    assert has_recovered(steadily(power_w, temp_c), REFERENCE) is answer


def test_a_device_is_back_when_it_has_been_so_for_some_seconds() -> None:
    assert has_recovered(log((0.0, 100.0, 40.0), (1.0, 100.0, 40.0)), REFERENCE) is None
    hot = log((0.0, 100.0, 40.0), (2.0, 300.0, 60.0), (3.0, 100.0, 40.0), (4.0, 100.0, 40.0))
    assert has_recovered(hot, REFERENCE) is False


def test_power_of_several_gpus_counts_together_and_the_hottest_for_all() -> None:
    assert has_recovered(steadily(50.0, 40.0, gpus=2), REFERENCE) is True
    assert has_recovered(steadily(60.0, 40.0, gpus=2), REFERENCE) is False


def test_the_hottest_of_several_gpus_has_to_recover() -> None:
    header = SampleHeader(0, "", "", 100, tuple(GpuHeader(n, f"GPU-{n}", "", "") for n in range(2)))
    rows = [GpuSample(gpu, half * S // 2, 50.0, 40.0 + 10 * gpu) for half in range(10) for gpu in range(2)]
    assert has_recovered(SampleLog(header, samples=tuple(rows)), REFERENCE) is False


def test_without_a_sensor_of_temperature_at_the_reference_power_decides() -> None:
    assert has_recovered(steadily(100.0, None), Reference(100.0, None)) is True


def request(folder: Path, config: ExperimentConfig, executor: str) -> RunRequest:
    identity = {"experiment_id": "e"}
    return RunRequest(config.to_dict(), identity, str(folder), "key", keep_engine=True, executor=executor)


def attend(folder: Path, executor: str, **options: Any) -> Attendance:
    """An attempt on a host that can read nothing."""
    meters = HostMeters(gpu_error="no driver", rapl_error="no powercap", command=("false",))
    config = ExperimentConfig.from_dict({"model": "any", **options})
    with meters.attending(config, request(folder, config, executor)) as attendance:
        return attendance


def test_where_nothing_can_be_read_no_sampler_runs_and_the_worker_is_told_why(tmp_path: Path) -> None:
    attendance = attend(tmp_path, "local")
    assert attendance.sampler is None
    assert (attendance.request.samples_path, attendance.request.is_worker_sampling) == (None, False)
    assert attendance.request.meter_errors == {"gpu": "no driver", "rapl": "no powercap"}


def test_a_worker_in_a_container_samples_what_the_host_may_not_see(tmp_path: Path) -> None:
    asked = attend(tmp_path, "docker").request
    assert asked.is_worker_sampling
    assert asked.samples_path == str(tmp_path / "samples.part")


def test_a_container_that_computes_on_the_cpu_has_nothing_more_to_see(tmp_path: Path) -> None:
    assert not attend(tmp_path, "docker", gpus=[]).request.is_worker_sampling


def test_nothing_is_sampled_where_nothing_is_wanted(tmp_path: Path) -> None:
    options = {"measurement": {"energy": "none"}, "timeseries": {"enabled": False}}
    asked = attend(tmp_path, "docker", **options).request
    assert not asked.is_worker_sampling
    assert set(asked.meter_errors) == {"gpu", "rapl"}


def test_what_the_host_learned_is_told_to_the_worker(tmp_path: Path) -> None:
    clock = iter((100.0, 160.0))
    meters = HostMeters("no driver", "no powercap", command=("false",), monotonic=lambda: next(clock))
    config = ExperimentConfig.from_dict({"model": "any"})
    asked = request(tmp_path, config, "local")
    base = make_record()
    idle = Idle(70.0, 95.0, None, 35.0, 41.0, 0.0, null_reasons=NO_POST)
    energy = dataclasses.replace(base.energy, energy_source="rapl")
    environment = dataclasses.replace(base.environment, gpu_uuids=())
    meters.note(dataclasses.replace(base, idle=idle, energy=energy, environment=environment), asked)
    with meters.attending(config, asked) as attendance:
        assert attendance.request.baselines == {"rapl": {"bare_power_w": 70.0, "loaded_power_w": 95.0, "age_s": 60.0}}


def test_an_event_passes_unchanged_where_nobody_samples(tmp_path: Path) -> None:
    event = Event("progress", data={"exp_id": "e", "phase_done": 1})
    assert attend(tmp_path, "local").follow(event) == event


def test_what_a_worker_sampled_goes_with_its_attempt_also_when_that_is_broken_off(tmp_path: Path) -> None:
    meters = HostMeters(gpu_error="no driver", rapl_error="no powercap", command=("false",))
    config = ExperimentConfig.from_dict({"model": "any"})
    with (
        contextlib.suppress(KeyboardInterrupt),
        meters.attending(config, request(tmp_path, config, "docker")) as attendance,
    ):
        Path(str(attendance.request.samples_path)).touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_room", [True, False])
def test_a_gap_that_cannot_be_watched_is_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_room: bool
) -> None:
    meters = HostMeters(gpu_error=None, rapl_error=None, command=("/nowhere/lem",))
    base = make_record()
    idle = Idle(70.0, 95.0, None, 35.0, 41.0, 0.0, null_reasons=NO_POST)
    energy = dataclasses.replace(base.energy, energy_source="nvml_counter")
    environment = dataclasses.replace(base.environment, gpu_uuids=("GPU-1",))
    asked = request(tmp_path, ExperimentConfig.from_dict({"model": "any"}), "local")
    meters.note(dataclasses.replace(base, idle=idle, energy=energy, environment=environment), asked)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path if is_room else tmp_path / "gone"))
    with meters.watching() as probe:
        assert probe is None
    assert not list(tmp_path.iterdir())


def test_a_gap_is_not_watched_before_anything_was_measured() -> None:
    with HostMeters(gpu_error=None, rapl_error=None, command=("false",)).watching() as probe:
        assert probe is None
