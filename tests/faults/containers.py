"""The same faults on a campaign in containers, on the lab.

Beside what is counted elsewhere, no worker may be left in a container once its host is gone, and no container after the
campaign that went on. A folder that becomes read-only is so for lem on the host alone: in a container root may write
everywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lem.orchestration.manifest import CampaignManifest
from tests.campaign_rig import Ended, Running
from tests.container_rig import VARIABLE as RIG_VARIABLE
from tests.container_rig import ContainerRig, container_campaign
from tests.doubles import wall_clock
from tests.doubles.fault_injector import VARIABLE, Fault, process_of, read_journal
from tests.faults.campaigns import CampaignFailed
from tests.faults.points import Moment, Point, points_of, random_moments
from tests.faults.sandbox import AS_OTHERS, look_at
from tests.faults.scenarios import Tools
from tests.faults.trials import Trial
from tests.faults.verdict import Verdict
from tests.processes import PATIENCE_S

OUTPUTS, CYCLES = (4, 8), 2
EXPERIMENTS = len(OUTPUTS) * CYCLES
_PROCESSES = ("host", "supervisor", "engine")


class _FaultRig(ContainerRig):
    """A campaign in containers with the fault in every process of it, here and inside, and one program for all."""

    def __init__(self, folder: Path, tools: Tools) -> None:
        folder.mkdir(parents=True)
        # The project of the containers is named after it, and others are tried at the same time.
        self.campaign = f"faults-{secrets.token_hex(4)}"
        super().__init__(folder, container_campaign(self.campaign, outputs=OUTPUTS, cycles=CYCLES))
        self._prefix: tuple[str, ...] = ()
        # At the same path inside, where a journal is written too, and one clock steps for all.
        self._shared = folder / "shared"
        self._shared.mkdir()
        self.journal = self._shared / "journal"
        clock = wall_clock.prepare(tools.clock, self._shared / "clock")
        self._variables = {
            "PYTHONPATH": os.pathsep.join([str(tools.program), str(tools.program / "doubles")]),
            **clock,
        }
        compose = folder / "docker-compose.yml"
        project = json.loads(compose.read_text(encoding="utf-8"))
        for service in project["services"].values():
            service["environment"] |= {VARIABLE: f"${{{VARIABLE}:-}}", **clock}
            service["volumes"] += [
                {"type": "bind", "source": str(path), "target": str(path)} for path in (self._shared, tools.clock)
            ]
        self.write(json.dumps(project), compose.name)

    def command(self, *options: str, file: str = "c.yaml") -> list[str]:
        """`lem campaign` in containers, without root's right to write everywhere where that matters."""
        return [*self._prefix, *super().command(*options, file=file)]

    def environ(self, rules: Sequence[Mapping[str, Any]] = (), **more: str) -> dict[str, str]:
        return {**super().environ(rules), **self._variables, **more}

    def manifest(self, campaign: str = "") -> CampaignManifest:
        return super().manifest(campaign or self.campaign)

    def begin(self, point: Point | None = None, action: str = "") -> Running:
        """The campaign, started anew, with that fault, or with a journal alone."""
        fault = Fault(str(self.journal), root=str(self.folder))
        if point is not None:
            fault = replace(fault, process=point.process, event=point.event, nth=point.nth, action=action)
        self._prefix = AS_OTHERS if action == "readonly" and os.geteuid() == 0 else ()
        return self.start("--yes", "--fresh", LEMTEST_FAULT=fault.to_json())

    def resume(self) -> Ended:
        self._prefix = ()
        return self.run("--resume")


def container_points(folder: Path, tools: Tools) -> tuple[tuple[Point, ...], float]:
    """The points of an undisturbed campaign in containers, and the seconds it took."""
    with _rig(folder, tools) as rig:
        begin = time.monotonic()
        ended = rig.begin().wait()
        elapsed_s = time.monotonic() - begin
        if ended.code != 0:
            raise CampaignFailed(f"the undisturbed campaign in containers fails with {ended.code}:\n{ended.err}")
        return points_of(read_journal(rig.journal)), elapsed_s


def container_moments(count: int, elapsed_s: float, rng: random.Random, tools: Tools) -> list[Trial]:
    """SIGKILL at random moments to each kind of process, here and inside."""
    moments = random_moments(_PROCESSES, count, elapsed_s, rng)
    return [partial(kill_in_containers, moment, tools=tools) for moment in moments]


def try_in_containers(point: Point, action: str, folder: Path, *, tools: Tools) -> Verdict:
    with _rig(folder, tools) as rig:
        ended = rig.begin(point, action).wait()
        has_happened = any(entry.action for entry in read_journal(rig.journal))
        return _resume_and_judge(
            rig, f"containers, {point.process}: {action}", point.case(action), has_happened, str(ended.code)
        )


def kill_in_containers(moment: Moment, folder: Path, *, tools: Tools) -> Verdict:
    case = f"SIGKILL to {moment.process} after {moment.after_s:.3f} s"
    with _rig(folder, tools) as rig:
        has_happened = _kill_after(rig, moment)
        return _resume_and_judge(rig, f"containers, {moment.process}: kill at random", case, has_happened, "")


def _resume_and_judge(rig: _FaultRig, what: str, case: str, has_happened: bool, code: str) -> Verdict:
    left = _processes_left(rig)
    for folder, _, _ in os.walk(rig.folder):
        Path(folder).chmod(0o755)
    before = look_at(rig.folder, rig.campaign)
    resumed = rig.resume()
    after = look_at(rig.folder, rig.campaign)
    return Verdict(
        what,
        case,
        has_happened,
        **after.costs_since(before),
        incomplete=EXPERIMENTS - after.statuses.count("completed"),
        processes_left=left + _processes_left(rig) + len(rig.containers(is_all=True)),
        notes=f"exit codes {code}, {resumed.code} in {rig.folder} {resumed.err[-300:] if resumed.code else ''}",
    )


@contextlib.contextmanager
def _rig(folder: Path, tools: Tools) -> Iterator[_FaultRig]:
    rig = _FaultRig(folder, tools)
    with rig.cleaned():
        yield rig


def _kill_after(rig: _FaultRig, moment: Moment) -> bool:
    deadline = time.monotonic() + moment.after_s
    running = rig.begin()
    victim = None
    while victim is None or time.monotonic() < deadline:
        if _has_ended(running, max(0.005, deadline - time.monotonic())):
            return False
        victim = running.process.pid if moment.process == "host" else _inside(rig).get(moment.process)
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    running.wait()
    return True


def _has_ended(running: Running, within_s: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.process.wait(within_s)
    return running.process.returncode is not None


def _inside(rig: _FaultRig) -> dict[str, int]:
    """Pids of the worker's processes in containers, as this machine sees them."""
    mine = f"{RIG_VARIABLE}={rig.name}".encode()
    found: dict[str, int] = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and mine in (folder / "environ").read_bytes().split(b"\0"):
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if "worker" in words:
                    found[process_of(words[words.index("worker") - 1 :])] = int(folder.name)
    return found


def _processes_left(rig: _FaultRig) -> int:
    return len(rig.marker.survivors()) + len(rig.workers_left_inside(PATIENCE_S))
