"""Tries every fault on a small campaign and counts what it cost.

    python -m tests.faults.driver [--actions kill,enospc] [--moments 20] [--jobs 2]

First the campaign runs once and writes down each write, fsync, rename and transition it passes through, in the host,
the supervisor and the engine. Then, for each of these points, a new campaign is stopped or made to fail there, and
resumed. Afterwards every experiment must be completed exactly once, no result partial or lost, and no process left.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.doubles.fault_injector import ACTIONS, SIGNALS, Fault, read_journal
from tests.faults.sandbox import EXPERIMENTS, Outcome, Sandbox, copy_program

__all__ = [
    "Moment",
    "Point",
    "Verdict",
    "enumerate_points",
    "format_table",
    "spread",
    "try_all",
    "try_moment",
    "try_point",
]

# Of the faults that cost something, this many are shown with their folder.
SHOWN = 10


@dataclass(frozen=True)
class Point:
    """The nth event of a kind in a kind of process."""

    process: str
    event: str
    nth: int
    detail: str


@dataclass(frozen=True)
class Moment:
    """SIGKILL to a process, some seconds after the start of the campaign."""

    process: str
    after_s: float


@dataclass(frozen=True)
class Verdict:
    """What one fault cost.

    Attributes:
        what: the fault, for the table: process and action.
        case: the fault, exactly.
        has_happened: it struck before the campaign was over.
        lost: results that were whole after the fault and are not there, or not the same, after the resume.
        partial: results or manifest that are there and not whole, after the fault or after the resume.
        duplicates: experiments with more than one result at the end.
        incomplete: experiments without a result, or not marked completed, at the end.
        processes_left: processes alive after the fault or after the resume.
        notes: exit codes, and what else a person needs who looks into it.
    """

    what: str
    case: str
    has_happened: bool
    lost: int
    partial: int
    duplicates: int
    incomplete: int
    processes_left: int
    notes: str

    @property
    def is_good(self) -> bool:
        """Nothing was lost, doubled, cut off or left behind."""
        return not (self.lost or self.partial or self.duplicates or self.incomplete or self.processes_left)


Case = Callable[[Sandbox], Verdict]


def enumerate_points(folder: Path, program: Path) -> tuple[tuple[Point, ...], float]:
    """The points of an undisturbed campaign in their order, and the seconds it took.

    Raises:
        RuntimeError: the undisturbed campaign fails.
    """
    sandbox = Sandbox(folder, program)
    begin = time.monotonic()
    code = sandbox.run("--fresh", fault=Fault(str(sandbox.journal)))
    elapsed_s = time.monotonic() - begin
    outcome = sandbox.look()
    if code != 0 or outcome.statuses != ("completed",) * EXPERIMENTS or sandbox.processes_left():
        output = (folder / "output").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the undisturbed campaign fails with {code}, {outcome.statuses}:\n{output[-4000:]}")
    counts: Counter[tuple[str, str]] = Counter()
    points = []
    for entry in read_journal(sandbox.journal):
        counts[entry.process, entry.event] += 1
        points.append(Point(entry.process, entry.event, counts[entry.process, entry.event], entry.detail))
    return tuple(points), elapsed_s


def try_point(point: Point, action: str, sandbox: Sandbox) -> Verdict:
    """What the fault cost at that point."""
    fault = Fault(str(sandbox.journal), point.process, point.event, point.nth, action)
    code = sandbox.run("--fresh", fault=fault)
    has_happened = any(entry.action for entry in read_journal(sandbox.journal))
    case = f"{action} at {point.process} {point.event} {point.nth} ({point.detail})"
    return _resume_and_judge(sandbox, f"{point.process} {action}", case, code, has_happened)


def try_moment(moment: Moment, sandbox: Sandbox) -> Verdict:
    """What SIGKILL at that moment cost; a process that is not there yet is waited for."""
    started = sandbox.start("--fresh")
    deadline = time.monotonic() + moment.after_s
    victim = None
    while not started.has_ended_within(max(0.002, deadline - time.monotonic())):
        victim = started.process.pid if moment.process == "host" else sandbox.processes().get(moment.process)
        if victim is not None:
            break
    has_happened = victim is not None and _kill(victim)
    code = started.wait()
    case = f"SIGKILL to {moment.process} after {moment.after_s:.3f} s"
    return _resume_and_judge(sandbox, f"{moment.process} SIGKILL at random", case, code, has_happened)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _resume_and_judge(sandbox: Sandbox, what: str, case: str, code: int, has_happened: bool) -> Verdict:
    left = sandbox.processes_left()
    before = sandbox.look()
    resumed = sandbox.run("--resume")
    left += sandbox.processes_left()
    after = sandbox.look()
    lost = sum(after.results.get(name) != data for name, data in before.results.items())
    return Verdict(
        what,
        case,
        has_happened,
        lost=lost,
        partial=len(before.partial) + len(after.partial),
        duplicates=len(after.duplicates),
        incomplete=_incomplete(after),
        processes_left=left,
        notes=f"exit codes {code}, {resumed}; in {sandbox.folder}",
    )


def _incomplete(outcome: Outcome) -> int:
    experiments = {Path(name).parent.parent for name in outcome.results}
    return EXPERIMENTS - min(len(experiments), outcome.statuses.count("completed"))


def try_all(cases: Sequence[Case], folder: Path, program: Path, *, jobs: int) -> list[Verdict]:
    """The verdict of each case, each in a folder of its own; folders of good ones are removed."""

    def work(numbered: tuple[int, Case]) -> Verdict:
        number, case = numbered
        sandbox = Sandbox(folder / f"{number:04d}", program)
        verdict = case(sandbox)
        if verdict.is_good:
            shutil.rmtree(sandbox.folder)
        return verdict

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(work, enumerate(cases)))


def spread(points: Iterable[Point], actions: Sequence[str]) -> list[tuple[Point, str]]:
    """Each point with one of the actions in turn; a transition is no call that could fail, so it is only stopped at."""
    signals, turns = [action for action in actions if action in SIGNALS], itertools.cycle(actions)
    stops = itertools.cycle(signals)
    pairs = []
    for point in points:
        is_call = point.event != "lem.transition"
        if is_call or signals:
            pairs.append((point, next(turns) if is_call else next(stops)))
    return pairs


def format_table(verdicts: Iterable[Verdict]) -> str:
    """One line a kind of fault: how many were tried, and what they cost together."""
    kinds: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        kinds.setdefault(verdict.what, []).append(verdict)
    columns = ("tried", "struck", "results lost", "partial", "duplicates", "incomplete", "processes left")
    lines = [f"{'fault':<28}" + "".join(f"{name:>{len(name) + 3}}" for name in columns)]
    for what, group in sorted(kinds.items()):
        sums = (
            len(group),
            sum(item.has_happened for item in group),
            sum(item.lost for item in group),
            sum(item.partial for item in group),
            sum(item.duplicates for item in group),
            sum(item.incomplete for item in group),
            sum(item.processes_left for item in group),
        )
        cells = (f"{value:>{len(name) + 3}}" for name, value in zip(columns, sums, strict=True))
        lines.append(f"{what:<28}" + "".join(cells))
    return "\n".join(lines)


def main() -> int:
    """0 when no fault cost anything, 1 otherwise; the table on stdout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--actions", default="kill,term,enospc,eacces,eio", help="tried at every point (%(default)s)")
    parser.add_argument("--moments", type=int, default=20, help="random moments of SIGKILL (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="campaigns at a time (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the random moments (%(default)s)")
    args = parser.parse_args()
    actions = args.actions.split(",")
    if not set(actions) <= set(ACTIONS):
        parser.error(f"--actions: some of {', '.join(ACTIONS)}")
    folder = Path(tempfile.mkdtemp(prefix="lem-faults-"))
    program = copy_program(folder / "program")
    points, elapsed_s = enumerate_points(folder / "undisturbed", program)
    print(f"{len(points)} points in a campaign of {EXPERIMENTS} experiments, {elapsed_s:.1f} s undisturbed", flush=True)
    cases = [partial(try_point, point, action) for name in actions for point, action in spread(points, [name])]
    moments = random_moments(args.moments, elapsed_s, random.Random(args.seed))
    verdicts = try_all([*cases, *(partial(try_moment, moment) for moment in moments)], folder, program, jobs=args.jobs)
    print(format_table(verdicts))
    bad = [verdict for verdict in verdicts if not verdict.is_good]
    for verdict in bad[:SHOWN]:
        print(verdict)
    if not bad:
        shutil.rmtree(folder)
    return 1 if bad else 0


def random_moments(count: int, elapsed_s: float, rng: random.Random) -> list[Moment]:
    """Moments spread over the time a campaign takes, the processes in turn."""
    processes = itertools.cycle(("host", "supervisor", "guardian", "engine"))
    return [Moment(next(processes), rng.uniform(0.0, elapsed_s)) for _ in range(count)]


if __name__ == "__main__":
    sys.exit(main())
