"""Faults in a campaign, which is then resumed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.doubles.fault_injector import read_journal
from tests.faults.points import Moment, Point, points_of
from tests.faults.sandbox import Outcome, Sandbox, Setting
from tests.faults.scenarios import Scenario, Tools
from tests.faults.trials import Trial, try_each
from tests.faults.verdict import Verdict


class CampaignFailed(RuntimeError):
    """What is to be disturbed fails by itself."""


Case = Callable[[Sandbox], Verdict]


def enumerate_points(
    folder: Path, tools: Tools, scenario: Scenario, *, is_warm: bool = False
) -> tuple[tuple[Point, ...], float]:
    """The points of an undisturbed campaign in their order, and the seconds it took."""
    scenario.build()
    sandbox = Sandbox(folder, tools, scenario)
    begin = time.monotonic()
    code = sandbox.start(scenario.opening, fault=sandbox.fault(), is_warm=is_warm).wait()
    elapsed_s = time.monotonic() - begin
    outcome = sandbox.look()
    if code != 0 or _incomplete(outcome, scenario) or sandbox.processes_left():
        output = sandbox.output.read_text(encoding="utf-8", errors="replace")
        raise CampaignFailed(f"the undisturbed campaign fails with {code}, {outcome.statuses}:\n{output[-4000:]}")
    return points_of(read_journal(sandbox.journal)), elapsed_s


def try_point(point: Point, action: str, scenario: Scenario, sandbox: Sandbox) -> Verdict:
    begin = time.monotonic()
    code = sandbox.run(scenario.opening, fault=sandbox.fault(point.process, point.event, point.nth, action))
    has_happened = any(entry.action for entry in read_journal(sandbox.journal))
    what = f"{scenario.name}, {point.process}: {action}"
    # A clock that steps back is no reason not to go on.
    is_over = action == "clock"
    return _resume_and_judge(
        sandbox, scenario, what, point.case(action), code, begin, has_happened=has_happened, is_over=is_over
    )


def try_moment(moment: Moment, scenario: Scenario, sandbox: Sandbox) -> Verdict:
    """What SIGKILL at that moment cost; a process that is not there yet is waited for."""
    begin = time.monotonic()
    started = sandbox.start(scenario.opening, is_warm=False)  # victims are known by their command lines
    deadline = begin + moment.after_s
    victim = None
    while not started.has_ended_within(max(0.002, deadline - time.monotonic())):
        victim = started.process.pid if moment.process == "host" else sandbox.processes().get(moment.process)
        if victim is not None:
            break
    has_happened = victim is not None and _kill(victim)
    code = started.wait()
    case = f"SIGKILL to {moment.process} after {moment.after_s:.3f} s"
    what = f"{scenario.name}, {moment.process}: kill at random"
    return _resume_and_judge(sandbox, scenario, what, case, code, begin, has_happened=has_happened)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _resume_and_judge(
    sandbox: Sandbox,
    scenario: Scenario,
    what: str,
    case: str,
    code: int,
    begin: float,
    *,
    has_happened: bool,
    is_over: bool = False,
) -> Verdict:
    """What is left after the fault and after a resume; `is_over` when there should be nothing to resume."""
    left = sandbox.processes_left()
    sandbox.make_writable()
    before = sandbox.look()
    resumed = sandbox.run("--resume")
    elapsed_s = time.monotonic() - begin
    left += sandbox.processes_left()
    after = sandbox.look()
    status = sandbox.start_lem("status", "faults").wait()
    return Verdict(
        what,
        case,
        has_happened,
        **after.costs_since(before),
        incomplete=_incomplete(after, scenario) + (_incomplete(before, scenario) if is_over else 0) + (status != 0),
        wrong_times=sum(not 0 <= seconds <= elapsed_s for seconds in after.durations_s),
        wrong_ends=sandbox.bugs + (code == 0 and _incomplete(before, scenario) > 0),
        processes_left=left,
        notes=f"exit codes {code}, {resumed}, status {status}; in {sandbox.folder.parent}",
    )


def _incomplete(outcome: Outcome, scenario: Scenario) -> int:
    experiments = {Path(name).parent.parent for name in outcome.results}
    return scenario.experiments - min(len(experiments), outcome.statuses.count("completed"))


def try_all(cases: Sequence[Case], folder: Path, tools: Tools, setting: Setting, *, jobs: int) -> list[Verdict]:
    """The verdict of each case, in a sandbox of its own."""
    return try_each(
        {str(number): in_sandbox(case, tools, setting) for number, case in enumerate(cases)}, folder, jobs=jobs
    )


def in_sandbox(case: Case, tools: Tools, setting: Setting) -> Trial:
    def trial(place: Path) -> Verdict:
        return case(Sandbox(place, tools, setting))

    return trial
