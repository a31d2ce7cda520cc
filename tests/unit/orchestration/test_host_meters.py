from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from lem.base.clock import Clock
from lem.base.measurement import EnergySource
from lem.base.process import identify
from lem.base.reasons import Reason
from lem.config.experiment import ExperimentConfig
from lem.meters.attempt import Baselines
from lem.meters.samples import GpuHeader, GpuSample, PartReader, SampleHeader, SampleLog
from lem.orchestration.dispatch import Worker
from lem.orchestration.host_meters import (
    BARE,
    Attendance,
    BaselineBook,
    HostMeters,
    Reference,
    has_recovered,
    keep_gap,
)
from lem.orchestration.status import Event
from lem.record import Idle, Record
from lem.worker.channel import RunRequest
from lem.worker.children import wait_until_ready
from tests.campaign_doubles import FakeClock, FakeStop
from tests.processes import wait_for
from tests.records import make_record

KEY, GPUS = "key-1", ("GPU-a",)


def record(source: str | None = "nvml_counter", gpus: tuple[str, ...] = GPUS, **idle: Any) -> Record:
    """A record of that power at rest; what is not given was not measured."""
    base = make_record()
    fields = [item.name for item in dataclasses.fields(Idle) if item.name != "null_reasons"]
    reasons = {name: Reason.of("post_not_measured") for name in fields if idle.get(name) is None}
    return dataclasses.replace(
        base,
        idle=Idle(**idle, null_reasons=reasons),
        energy=dataclasses.replace(base.energy, energy_source=source),
        environment=dataclasses.replace(base.environment, gpu_uuids=gpus),
    )


AT_REST: dict[str, Any] = {
    "idle_bare_power_w": 70.0,
    "idle_bare_temp_c": 35.0,
    "idle_loaded_power_w": 95.0,
    "idle_loaded_temp_c": 41.0,
    "baseline_age_s": 0.0,
}
MEASURED = record(**AT_REST)
COUNTER = EnergySource.COUNTER
HANDED_ON = record(idle_bare_power_w=70.0, idle_loaded_power_w=95.0, baseline_age_s=50.0)
OF_THE_CPU = record(source="rapl", idle_loaded_power_w=40.0, baseline_age_s=0.0)


@pytest.mark.parametrize(
    ("records", "gpus", "key", "now_s", "known"),
    [
        ([(MEASURED, 100.0)], GPUS, KEY, 130.0, {COUNTER: Baselines(70.0, 95.0, 30.0)}),
        ([(MEASURED, 100.0)], GPUS, KEY, 161.0, {}),  # too old
        # Another engine has the bare baseline alone, and other devices have none.
        ([(MEASURED, 100.0)], GPUS, "key-2", 100.0, {COUNTER: Baselines(bare_power_w=70.0)}),
        ([(MEASURED, 100.0)], ("GPU-b",), KEY, 100.0, {}),
        # One that was handed on does not become young again.
        ([(MEASURED, 100.0), (HANDED_ON, 150.0)], GPUS, KEY, 170.0, {}),
        # What one meter measured is not known of another.
        (
            [(MEASURED, 100.0), (OF_THE_CPU, 110.0)],
            GPUS,
            KEY,
            110.0,
            {COUNTER: Baselines(70.0, 95.0, 10.0), "rapl": Baselines(None, 40.0, 0.0)},
        ),
        ([(record(source=None), 0.0)], GPUS, KEY, 0.0, {}),  # nothing was measured
    ],
)
def test_baselines_are_known_of_their_devices_engine_and_meter_until_they_are_too_old(
    records: list[tuple[Record, float]], gpus: tuple[str, ...], key: str, now_s: float, known: dict[str, Baselines]
) -> None:
    book = BaselineBook()
    for item, at_s in records:
        book.note(item, KEY, at_s)
    assert book.known(gpus, key, ttl_s=60, now_s=now_s) == known


def test_a_baseline_at_a_locked_clock_is_not_taken_for_another_clock() -> None:
    book = BaselineBook()
    book.note(MEASURED, KEY, 100.0, 1005)
    assert book.known(GPUS, KEY, ttl_s=60, now_s=110.0) == {}
    assert book.known(GPUS, KEY, 1200, ttl_s=60, now_s=110.0) == {}
    assert book.known(GPUS, KEY, 1005, ttl_s=60, now_s=110.0) == {COUNTER: Baselines(70.0, 95.0, 10.0)}
    assert (GPUS, KEY) not in book.references, "gaps are kept without the lock"


def test_the_reference_is_the_first_baseline_of_a_state():
    book = BaselineBook()
    book.note(MEASURED, KEY, now_s=100.0)
    warmer = dataclasses.replace(MEASURED.idle, idle_loaded_temp_c=55.0, idle_loaded_power_w=110.0)
    book.note(dataclasses.replace(MEASURED, idle=warmer), KEY, now_s=200.0)
    assert book.references[GPUS, KEY] == Reference(95.0, 41.0)
    assert book.references[GPUS, BARE] == Reference(70.0, 35.0)
    assert (GPUS, "key-2") not in book.references
    book.note(OF_THE_CPU, "key-3", now_s=200.0)  # no reference for GPUs
    assert (GPUS, "key-3") not in book.references


@pytest.mark.parametrize(
    ("cap_s", "answers", "stop_at_s", "gap_s", "code", "waits"),
    [
        (60.0, None, None, 60.0, "gap_no_sensors", [60.0]),  # in one wait
        (60.0, [True], None, 0.0, "gap_recovered", []),
        (60.0, [False, False, False, True], None, 3.0, "gap_recovered", [1.0, 1.0, 1.0]),
        (2.5, [False], None, 2.5, "gap_cap_reached", [1.0, 1.0, 0.5]),
        (2.0, [None], None, 2.0, "gap_no_sensors", [1.0, 1.0]),  # they never answer
        (5.0, [None, None, True], None, 2.0, "gap_recovered", [1.0, 1.0]),
        (60.0, None, 7.5, 7.5, "gap_interrupted", [60.0]),
        (60.0, [False], 1.5, 1.5, "gap_interrupted", [1.0, 1.0]),
        (0.0, [False], None, 0.0, "gap_none", []),
    ],
)
def test_a_gap_lasts_until_the_device_is_back_or_its_cap(
    cap_s: float,
    answers: list[bool | None] | None,
    stop_at_s: float | None,
    gap_s: float,
    code: str,
    waits: list[float],
) -> None:
    clock = FakeClock()
    stop = FakeStop(clock, float("inf") if stop_at_s is None else stop_at_s)
    told = itertools.chain(answers or (), itertools.repeat(answers[-1] if answers else None))
    sensors = None if answers is None else lambda: next(told)
    assert keep_gap(cap_s, is_recovered=sensors, monotonic=clock.monotonic, wait=stop.wait) == (gap_s, code)
    assert stop.waits == waits


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


def warming() -> SampleLog:
    """Two GPUs, of which one is ten degrees warmer."""
    rows = [GpuSample(gpu, half * S // 2, 50.0, 40.0 + 10 * gpu) for half in range(10) for gpu in range(2)]
    return SampleLog(steadily(50.0, 40.0, gpus=2).header, samples=tuple(rows))


@pytest.mark.parametrize(
    ("samples", "answer"),
    [
        # Within three degrees and five percent.
        (steadily(100.0, 40.0), True),
        (steadily(104.9, 43.0), True),
        (steadily(105.5, 40.0), False),
        (steadily(100.0, 43.5), False),
        (steadily(60.0, 20.0), True),  # no gap would bring that up again
        (steadily(None, 40.0), None),
        (steadily(100.0, None), None),
        # For some seconds.
        (log((0.0, 100.0, 40.0), (1.0, 100.0, 40.0)), None),
        (log((0.0, 100.0, 40.0), (2.0, 300.0, 60.0), (3.0, 100.0, 40.0), (4.0, 100.0, 40.0)), False),
        # Power of several GPUs counts together, and the hottest for all.
        (steadily(50.0, 40.0, gpus=2), True),
        (steadily(60.0, 40.0, gpus=2), False),
        (warming(), False),
    ],
)
def test_a_device_is_back_when_it_has_been_near_its_reference_for_some_seconds(
    samples: SampleLog, answer: bool | None
) -> None:
    assert has_recovered(samples, REFERENCE) is answer


def test_without_a_sensor_of_temperature_at_the_reference_power_decides() -> None:
    assert has_recovered(steadily(100.0, None), Reference(100.0, None)) is True


def request(folder: Path, config: ExperimentConfig, executor: str) -> RunRequest:
    identity = {"experiment_id": "e"}
    return RunRequest(config.to_dict(), identity, str(folder), "key", keep_engine=True, executor=executor)


def attend(folder: Path, executor: str, **options: Any) -> Attendance:
    """An attempt on a host that can read nothing."""
    meters = HostMeters("no driver", "no powercap", "no /proc", command=("false",))
    config = ExperimentConfig.from_dict({"model": "any", **options})
    with meters.attending(config, request(folder, config, executor)) as attendance:
        return attendance


@pytest.mark.parametrize(
    ("options", "is_sampling"),
    [
        ({}, True),  # what the host may not see
        ({"gpus": []}, False),
        ({"measurement": {"energy": "none"}, "timeseries": {"enabled": False}}, False),
    ],
)
def test_a_worker_in_a_container_samples_what_is_wanted(
    tmp_path: Path, options: dict[str, Any], is_sampling: bool
) -> None:
    asked = attend(tmp_path, "docker", **options).request
    assert asked.is_worker_sampling is is_sampling
    assert asked.samples_path == (str(tmp_path / "samples.part") if is_sampling else None)
    assert set(asked.meter_errors) == {"gpu", "rapl"}


def test_a_host_without_meters_still_watches_who_uses_the_cpus(tmp_path: Path) -> None:
    meters = HostMeters(gpu_error="no driver", rapl_error="no powercap")
    config = ExperimentConfig.from_dict({"model": "any", "gpus": []})
    clock, path = Clock(), tmp_path / "samples.part"
    with meters.attending(config, request(tmp_path, config, "local")) as attendance:
        assert attendance.request.samples_path == str(path)
        assert attendance.request.meter_errors == {"gpu": "no driver", "rapl": "no powercap"}
        assert wait_until_ready(path, clock.monotonic_ns() + 60 * S, clock)
        before = Event("progress", data={})
        phase = Event("phase", data={"phase": "prepare"})
        worker = Worker(())
        worker.engine = identify(os.getpid())
        assert attendance.follow(phase, worker) is phase
        deadline_s = time.monotonic() + 60
        while (seen := attendance.follow(before, worker).data)["wait_pct"] is None:
            assert time.monotonic() < deadline_s
            clock.sleep(0.05)
        assert seen.keys() == {"power_w", "wait_pct", "foreign_pct"}
        assert 0 <= seen["foreign_pct"] <= 100
        rows = PartReader(path).read().usage
        assert rows[-1].run_s is not None
        assert rows[-1].run_s > 0
    assert not path.exists()


BUSY = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    pass
"""


class InContainer(Worker):
    def __init__(self, pid: int) -> None:
        super().__init__(())
        self.pid = pid

    def server_pids(self) -> tuple[int, ...]:
        return (self.pid,)


@pytest.mark.parametrize("is_running_already", [False, True])
def test_a_server_that_is_not_below_the_engine_process_counts_as_the_engine(
    tmp_path: Path, is_running_already: bool
) -> None:
    def started(*command: str) -> subprocess.Popen[bytes]:
        child = stack.enter_context(subprocess.Popen(command, stdout=-1, start_new_session=True))
        stack.callback(child.kill)
        return child

    with contextlib.ExitStack() as stack:
        engine, server = started("sleep", "1000"), started(sys.executable, "-c", BUSY)
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        worker = Worker(()) if is_running_already else InContainer(server.pid)
        worker.engine = identify(engine.pid)
        served = {"url": url} if is_running_already else {"service": "llm"}
        options = {"backend": "server", "server": served, "decoder": {"preset": "deterministic"}}
        config = ExperimentConfig.from_dict({"model": "any", "gpus": [], **options})
        meters = HostMeters(gpu_error="no driver", rapl_error="no powercap")
        attendance = stack.enter_context(meters.attending(config, request(tmp_path, config, "local")))
        assert attendance.request.server_pids == ((server.pid,) if is_running_already else ())
        clock, path = Clock(), tmp_path / "samples.part"
        assert wait_until_ready(path, clock.monotonic_ns() + 60 * S, clock)
        for phase in ("prepare", "idle"):
            attendance.follow(Event("phase", data={"phase": phase}), worker)
        wait_for(lambda: (PartReader(path).read().usage[-1].run_s or 0.0) > 0.2 or None)


def test_what_the_host_learned_is_told_to_the_worker(tmp_path: Path) -> None:
    clock = iter((100.0, 160.0))
    meters = HostMeters("no driver", "no powercap", command=("false",), monotonic=lambda: next(clock))
    config = ExperimentConfig.from_dict({"model": "any"})
    asked = request(tmp_path, config, "local")
    meters.note(record("rapl", (), **AT_REST), asked)
    with meters.attending(config, asked) as attendance:
        assert attendance.request.baselines == {"rapl": {"bare_power_w": 70.0, "loaded_power_w": 95.0, "age_s": 60.0}}


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
    with meters.watching() as probe:
        assert probe is None  # nothing was measured
    meters.note(MEASURED, request(tmp_path, ExperimentConfig.from_dict({"model": "any"}), "local"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path if is_room else tmp_path / "gone"))
    with meters.watching() as probe:
        assert probe is None
    assert not list(tmp_path.iterdir())
