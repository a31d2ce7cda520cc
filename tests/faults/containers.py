"""The same faults on a campaign in containers, on the lab: the host at every transition, any process at random moments.

    python -m tests.faults.containers [--moments 8] [--every-point]

Beside what the local driver counts, no worker may be left in a container once its host is gone, and no container after
the campaign that went on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.record_codec import RecordError, read_record
from tests.campaign_rig import Running
from tests.container_rig import VARIABLE as RIG_VARIABLE
from tests.container_rig import ContainerRig, container_campaign
from tests.doubles.fault_injector import VARIABLE, Fault, process_of, read_journal
from tests.faults.driver import show
from tests.faults.points import Moment, Point, points_of, random_moments
from tests.faults.verdict import Verdict
from tests.processes import PATIENCE_S

__all__ = ["main", "try_in_containers"]

OUTPUTS, CYCLES = (4, 8), 2
EXPERIMENTS = len(OUTPUTS) * CYCLES
_PROCESSES = ("host", "supervisor", "engine")


@dataclass(frozen=True)
class _Left:
    """What a campaign left on disk."""

    results: dict[str, bytes]
    partial: int
    duplicates: int


def main() -> int:
    """0 when no fault cost anything, 1 otherwise; the table on stdout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--moments", type=int, default=8, help="random moments of SIGKILL (%(default)s)")
    parser.add_argument("--every-point", action="store_true", help="every write too, not the transitions alone")
    parser.add_argument("--seed", type=int, default=42, help="of the random moments (%(default)s)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lem-faults-"))
    points, elapsed_s = _enumerate(folder / "undisturbed")
    chosen = [point for point in points if args.every_point or point.event == "lem.transition"]
    print(f"{len(chosen)} of {len(points)} points of the host, {elapsed_s:.1f} s undisturbed", flush=True)
    faults: list[Point | Moment] = [
        *chosen,
        *random_moments(_PROCESSES, args.moments, elapsed_s, random.Random(args.seed)),
    ]
    verdicts = [try_in_containers(folder / f"{number:04d}", fault) for number, fault in enumerate(faults)]
    is_good = show(verdicts)
    if is_good:
        shutil.rmtree(folder)
    return 0 if is_good else 1


def _enumerate(folder: Path) -> tuple[tuple[Point, ...], float]:
    with _rig(folder) as rig:
        fault = Fault(str(folder / "journal"))
        begin = time.monotonic()
        ended = rig.run("--yes", "--fresh", **_variables(fault))
        elapsed_s = time.monotonic() - begin
        if ended.code != 0:
            raise RuntimeError(f"the undisturbed campaign fails with {ended.code}:\n{ended.err}")
        return points_of(read_journal(folder / "journal")), elapsed_s


def try_in_containers(folder: Path, fault: Point | Moment) -> Verdict:
    """What SIGKILL there cost."""
    with _rig(folder) as rig:
        if isinstance(fault, Point):
            has_happened, case = _kill_at(rig, fault), f"kill at {fault.event} {fault.nth} ({fault.detail})"
            what = f"containers, {fault.process}: kill"
        else:
            has_happened, case = _kill_after(rig, fault), f"SIGKILL to {fault.process} after {fault.after_s:.3f} s"
            what = f"containers, {fault.process}: kill at random"
        left = _processes_left(rig)
        before = _look(rig)
        resumed = rig.run("--resume")
        after = _look(rig)
        return Verdict(
            what,
            case,
            has_happened,
            lost=sum(after.results.get(name) != data for name, data in before.results.items()),
            partial=before.partial + after.partial,
            duplicates=after.duplicates,
            incomplete=EXPERIMENTS - rig.statuses().count("completed"),
            processes_left=left + _processes_left(rig) + len(rig.containers(is_all=True)),
            notes=f"resumed with {resumed.code} {resumed.err[-300:] if resumed.code else ''}",
        )


@contextlib.contextmanager
def _rig(folder: Path) -> Iterator[ContainerRig]:
    folder.mkdir(parents=True)
    with ContainerRig(folder, container_campaign(outputs=OUTPUTS, cycles=CYCLES)).cleaned() as rig:
        yield rig


def _variables(fault: Fault) -> dict[str, Any]:
    return {VARIABLE: fault.to_json()}


def _kill_at(rig: ContainerRig, point: Point) -> bool:
    journal = rig.folder / "journal"
    fault = Fault(str(journal), point.process, point.event, point.nth, "kill")
    rig.run("--yes", "--fresh", **_variables(fault))
    return any(entry.action for entry in read_journal(journal))


def _kill_after(rig: ContainerRig, moment: Moment) -> bool:
    deadline = time.monotonic() + moment.after_s
    running = rig.start("--yes", "--fresh")
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


def _inside(rig: ContainerRig) -> dict[str, int]:
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


def _processes_left(rig: ContainerRig) -> int:
    """How many processes of lem are alive, here and inside, once they had the time to end by themselves."""
    return len(rig.marker.survivors()) + len(rig.workers_left_inside(PATIENCE_S))


def _look(rig: ContainerRig) -> _Left:
    paths = sorted((rig.folder / "results").rglob("result.json"))
    names = [name for name in map(_experiment_of, paths) if name is not None]
    results = {str(path): path.read_bytes() for path in paths}
    return _Left(results, len(paths) - len(names), sum(count > 1 for count in Counter(names).values()))


def _experiment_of(path: Path) -> str | None:
    """The experiment of a result; None where it is not whole."""
    try:
        return read_record(path).identity.experiment_id
    except RecordError:
        return None


if __name__ == "__main__":
    sys.exit(main())
