"""Settings of a GPU through a campaign: held during an attempt, restored whatever is killed; on the double's log."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lem.record import Record, read_record
from tests.campaign_rig import CampaignRig, Running
from tests.doubles.nvml.library import NvmlDouble
from tests.doubles.nvml.traces import Counter, GpuTrace, Load, Trace
from tests.processes import wait_for

pytestmark = pytest.mark.needs("gcc")

UUID = "GPU-11111111-2222-3333-4444-555555555555"
FORMER_MW, WANTED_MW, CLOCK_MHZ = 650_000, 250_000, 1005
FORMER = (FORMER_MW, 0)
DELAY_S = 0.3  # of every setting, so that a process can be killed in it


@dataclass(frozen=True)
class Line:
    """A line of the double's log."""

    at_ns: int
    pid: int
    when: str  # asked, did
    what: str  # power, lock, unlock
    value: int

    @property
    def text(self) -> str:
        return f"{self.when} {self.what} {self.value}"


@dataclass
class Settings:
    """A campaign whose one experiment sets a GPU of the double."""

    rig: CampaignRig

    @property
    def log(self) -> list[Line]:
        words = (line.split() for line in self._path.read_text(encoding="ascii").splitlines())
        return [Line(int(it[0]), int(it[1]), it[3], it[4], int(it[5]) if len(it) > 5 else 0) for it in words]

    @property
    def notes(self) -> list[Path]:
        return sorted((self.rig.folder / "locks").glob("*.settings"))

    @property
    def _path(self) -> Path:
        return self.rig.folder / "settings"

    def start(self, *options: str, delay_s: float = 0.0, more: Sequence[str] = (), **gpu: Any) -> Running:
        self.rig.write(campaign(gpu or {"power_limit_w": WANTED_MW / 1000, "lock_clock_mhz": CLOCK_MHZ}))
        return Running(self.rig.command("--yes", *options), self.rig.folder, self.environ(delay_s, more))

    def environ(self, delay_s: float = 0.0, more: Sequence[str] = ()) -> dict[str, str]:
        load, double = self.rig.folder / "load", NvmlDouble(self.rig.folder / "nvml")
        load.touch()
        self._path.touch()
        lines = [f"power_limit {FORMER_MW / 1000}", "limit_range 100 700", "clock_range 210 1980"]
        lines += [f"settings {self._path}"]
        for function in ("SetPowerManagementLimit", "SetGpuLockedClocks", "ResetGpuLockedClocks"):
            lines += [f"delay nvmlDevice{function} {delay_s}"] if delay_s else []
        gpu = GpuTrace(UUID, load=Load(str(load), 80.0, 200.0), counter=Counter(period_s=0.02), more=(*lines, *more))
        double.say(*Trace(1, (gpu,)).lines())
        script = {"gpus": [UUID], "load_log": str(load), "token_s": 0.01}
        return {**self.rig.environ(), **double.variables(), "LEMTEST_ENGINE_SCRIPT": json.dumps(script)}

    def records(self) -> list[Record]:
        return [read_record(path) for path in sorted((self.rig.folder / "results").rglob("result.json"))]

    def pid(self, name: str) -> int:
        """The process of that name, once it is there."""
        return wait_for(lambda: next(iter(self._pids(name)), None))

    def _pids(self, name: str) -> Iterator[int]:
        roles = {"--hold": "holder", "--engine": "engine", "--sampler": "sampler", "worker": "supervisor"}
        for pid in self.rig.marker.pids():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if next((role for word, role in roles.items() if word in words), "host") == name:
                yield pid


def campaign(gpu: dict[str, Any]) -> str:
    experiment = {
        "backend": "pytorch",
        "gpus": ["0"],
        "gpu": gpu,
        "measurement": {"min_window_sec": 1.5, "max_wait_pct": None, "max_foreign_pct": None, "energy": "none"},
        "prompts": {"type": "synthetic", "input_tokens": 3, "sample_size": 4},
        "max_output_tokens": 8,
        "warmup": {"enabled": False},
        "baseline": {"enabled": False},
    }
    execution = {"cycles": 1, "config_gap_seconds": 0, "cycle_gap_seconds": 0}
    parts = {"campaign_name": "demo", "model": "none", "experiments": [experiment], "execution": execution}
    return json.dumps(parts)


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    with CampaignRig(tmp_path).cleaned() as rig:
        yield Settings(rig)


def state_after(lines: Sequence[Line]) -> tuple[int, int]:
    """Power limit and locked clock (0: unlocked)."""
    limit_mw, clock_mhz = FORMER
    for line in lines:
        if line.when == "did":
            limit_mw, clock_mhz = (line.value, clock_mhz) if line.what == "power" else (limit_mw, line.value)
    return limit_mw, clock_mhz


def test_settings_are_in_force_during_the_experiment_and_recorded(settings: Settings) -> None:
    ended = settings.start().wait()
    assert ended.code == 0, ended.err
    (record,) = settings.records()
    assert record.validity.valid, record.validity.invalid_reasons
    (gpu,) = record.gpus
    assert (gpu.power_limit_set_w, gpu.power_limit_w) == (WANTED_MW / 1000, WANTED_MW / 1000)
    assert gpu.sm_clock_mean_hz == pytest.approx(CLOCK_MHZ * 1e6)
    assert record.requested["gpu"] == {"power_limit_w": WANTED_MW / 1000, "lock_clock_mhz": CLOCK_MHZ}
    done = [line.text for line in settings.log if line.when == "did"]
    # The first one, of the preflight, sets what is set.
    assert done == [
        f"did power {FORMER_MW}",
        f"did power {WANTED_MW}",
        f"did lock {CLOCK_MHZ}",
        f"did power {FORMER_MW}",
        "did unlock 0",
    ]
    assert settings.notes == []
    settings.rig.assert_no_process_left()


@pytest.mark.parametrize(
    ("gpu", "more", "message", "hint"),
    [
        ({"power_limit_w": 50}, (), "50 W", "nvidia-smi"),
        ({"power_limit_w": 800}, (), "expected between 100 and 700 W", "nvidia-smi"),
        ({"lock_clock_mhz": 1000}, (), "1000 MHz is not a clock", "990 or 1005"),
        ({"power_limit_w": 250}, ("limit_range 0 0",), "Not Supported", "remove the option"),
        ({"lock_clock_mhz": 1005}, ("clock_range 0 0",), "Not Supported", "remove the option"),
        ({"power_limit_w": 250}, ("fail nvmlDeviceSetPowerManagementLimit 4",), "Permissions", "CAP_SYS_ADMIN"),
        ({"lock_clock_mhz": 1005}, ("fail nvmlDeviceSetPowerManagementLimit 4",), "Permissions", "CAP_SYS_ADMIN"),
    ],
)
def test_what_cannot_be_set_is_refused_before_the_run(
    settings: Settings, gpu: dict[str, Any], more: Sequence[str], message: str, hint: str
) -> None:
    ended = settings.start(more=more, **gpu).wait()
    assert ended.code == 2
    assert message in ended.err
    assert hint in ended.err
    assert settings.records() == []
    assert state_after(settings.log) == FORMER
    assert settings.notes == []


def test_a_limit_that_another_program_changes_in_the_window_makes_it_invalid(settings: Settings) -> None:
    running = settings.start("--json", power_limit_w=WANTED_MW / 1000)
    running.wait_for_event("phase", phase="window")
    with (settings.rig.folder / "settings").open("a") as log:  # as if set by the same library
        log.write(f"{time.monotonic_ns()} 1 0 did power 300000\n")
    ended = running.wait()
    assert ended.code == 0, ended.err
    first, second = sorted(settings.records(), key=lambda record: record.identity.attempt)
    (reason,) = first.validity.invalid_reasons
    assert reason.code == "limit_changed"
    assert reason.data == {"uuid": UUID, "before_w": 250.0, "after_w": 300.0}
    assert second.validity.valid, second.validity.invalid_reasons
    assert state_after(settings.log) == FORMER


# --- what is killed, and when

MOMENTS: dict[str, Callable[[list[str]], bool]] = {
    "before the first setting": lambda seen: seen[-1:] == [f"asked power {WANTED_MW}"],
    "between two settings": lambda seen: seen[-1:] == [f"asked lock {CLOCK_MHZ}"],
    "while the engine loads": lambda seen: seen[-1:] == [f"did lock {CLOCK_MHZ}"],
    "in the window": lambda seen: seen[-1:] == [f"did lock {CLOCK_MHZ}"],
    "before the first is restored": lambda seen: (
        f"did lock {CLOCK_MHZ}" in seen and seen[-1] == f"asked power {FORMER_MW}"
    ),
    "before the second is restored": lambda seen: seen[-1:] == ["asked unlock 0"],
}
POINTS = [
    *((moment, who, signal.SIGKILL) for moment in MOMENTS for who in (["host"], ["holder"], ["host", "holder"])),
    ("in the window", ["host"], signal.SIGTERM),
    ("while the engine loads", ["host"], signal.SIGINT),
    ("in the window", ["holder"], signal.SIGTERM),
    ("in the window", ["supervisor"], signal.SIGKILL),
    ("in the window", ["engine"], signal.SIGKILL),
    ("in the window", ["sampler"], signal.SIGKILL),
]
FEW = (0, 4, 11, 18)


NAMES = [f"{' and '.join(who)}, {signal.Signals(number).name}, {moment}" for moment, who, number in POINTS]


def kill_and_check(settings: Settings, point: tuple[str, list[str], int], *, is_by_doctor: bool) -> str:
    """Kill these processes then; how long it took until the former settings were back."""
    moment, who, number = point
    running = settings.start("--json", delay_s=DELAY_S)
    if moment == "in the window":
        running.wait_for_event("phase", phase="window")
    wait_for(lambda: MOMENTS[moment]([line.text for line in settings.log]) or None)
    pids = [settings.pid(name) for name in who]
    killed_ns = time.monotonic_ns()
    for pid in pids:
        os.kill(pid, number)
    running.wait()
    settings.rig.assert_no_process_left()
    if len(who) > 1:
        restore_later(settings, is_by_doctor=is_by_doctor)
    assert state_after(settings.log) == FORMER
    assert settings.notes == []
    for line in settings.log:  # where the run went on, it set nothing before the former settings were back
        if line.text == f"asked power {WANTED_MW}":
            assert state_after([it for it in settings.log if it.at_ns < line.at_ns]) == FORMER
    times = [killed_ns, *(line.at_ns for line in settings.log if line.at_ns > killed_ns)]
    back_ns = next(at for at in times if state_after([it for it in settings.log if it.at_ns <= at]) == FORMER)
    return f"{(back_ns - killed_ns) / 1e9:.2f} s"


def restore_later(settings: Settings, *, is_by_doctor: bool) -> None:
    assert settings.notes, "all that could restore is gone, and there is no note"
    command = [sys.executable, "-m", "lem", "doctor", "--restore"] if is_by_doctor else settings.rig.command("--resume")
    ended = Running(command, settings.rig.folder, settings.environ()).wait()
    assert ended.code == 0, ended.err
    assert f"{UUID}: power limit 650 W, clock unlocked" in ended.out + ended.err


@pytest.mark.parametrize("point", [POINTS[n] for n in FEW], ids=[NAMES[n] for n in FEW])
def test_settings_are_restored_when_a_process_is_killed(settings: Settings, point: tuple[str, list[str], int]) -> None:
    kill_and_check(settings, point, is_by_doctor=True)


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(POINTS)), ids=NAMES)
def test_settings_are_restored_at_every_kill_point(settings: Settings, number: int) -> None:
    print(f"{NAMES[number]}: restored after {kill_and_check(settings, POINTS[number], is_by_doctor=number % 2 == 0)}")
