"""What a weather cost: judged after it has passed and the campaign was resumed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.campaign_rig import Ended
from tests.weather.rig import WeatherRig

# The output tokens by which the experiment in the middle is known, which the weather strikes.
VICTIM = 8
COMPLETED = "completed"
UMOUNT_TIMEOUT_S = 30


@dataclass(frozen=True)
class Verdict:
    """One row."""

    weather: str
    said: str  # what lem said of the weather
    code: int  # exit code of the campaign that the weather struck
    others: tuple[int, int]  # of the experiments that it did not strike, how many were completed then, and of how many
    resumed: tuple[int, int]  # how many experiments are completed after the resume, and of how many
    left: int  # processes of lem that were there ten seconds after it ended, and again after the resume
    problems: tuple[str, ...] = ()  # what is not as it should be; () for a good one


@dataclass(frozen=True)
class Case:
    """A weather."""

    name: str
    strike: Callable[[WeatherRig], Ended]  # runs the campaign in it, and gives how that ended
    says: str  # a regular expression of what lem has to say of it, then or at the resume
    code: int  # the exit code that it has to have
    # How the experiment in the middle has to end: `completed` (by a retry), `failed`, `pending`; None: none can begin.
    victim: str | None
    stops: bool = False  # the experiments behind the one struck stay pending
    clear: Callable[[WeatherRig], None] = lambda _rig: None  # ends the weather; for containers it is a new day anyway
    top: str = ""  # of the campaign, as `execution`
    execution: Mapping[str, Any] = field(default_factory=dict)


def judge_all(cases: Sequence[Case], folder: Path, *, jobs: int) -> list[Verdict]:
    """The verdict of each case, each in a folder of its own; one that breaks off is a bad one."""

    def work(case: Case) -> Verdict:
        place = folder / re.sub(r"\W+", "-", case.name)
        try:
            return judge(case, place)
        except (AssertionError, OSError, TimeoutError, ValueError, subprocess.SubprocessError) as error:
            return Verdict(case.name, "-", -1, (0, 0), (0, 0), 0, (f"{type(error).__name__}: {error}",))
        finally:
            results = place / "results"
            if os.path.ismount(results):
                subprocess.run(["umount", "--lazy", str(results)], timeout=UMOUNT_TIMEOUT_S, check=False)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(work, cases))


def judge(case: Case, folder: Path) -> Verdict:
    rig = WeatherRig(folder, top=case.top, **case.execution)
    with rig.cleaned():
        ended = case.strike(rig)
        left = list(rig.workers_left())
        before = _statuses(rig)
        problems = list(find_wrongs(case, ended, before))
        case.clear(rig)
        rig.variables.clear()
        rig.options.clear()
        rig.be()
        again = rig.run("--yes" if before is None else "--resume", "--yes")
        left += rig.workers_left()
        said = what_it_said(case, ended) or what_it_said(case, again)
        if said is None:
            problems.append(f"nothing like {case.says!r} in: {ended.err[-3000:]} {list(_told(ended))}")
        after = _statuses(rig) or {}
        completed = sum(status == COMPLETED for status in after.values())
        if again.code != 0 or completed != len(after) or len(after) == 0:
            problems.append(f"the resume ends with {again.code}, {after}: {again.err[-3000:]}")
        if left:
            problems.append(f"left: {left}")
        if containers := rig.containers():
            problems.append(f"containers left: {containers}")
    others = [status for name, status in (before or {}).items() if name != _victim()]
    return Verdict(
        case.name,
        said or "-",
        ended.code,
        (others.count(COMPLETED), len(others)),
        (completed, len(after)),
        len(left),
        tuple(problems),
    )


def _victim() -> str:
    return f"pytorch-max_output_tokens={VICTIM}"


def _statuses(rig: WeatherRig) -> dict[str, str] | None:
    if not rig.has_manifest():
        return None
    return {entry.config_name: entry.status for entry in rig.manifest().experiments}


def find_wrongs(case: Case, ended: Ended, statuses: Mapping[str, str] | None) -> Iterator[str]:
    """What is not as the case wants it when the struck campaign has ended; the statuses are by configuration."""
    if ended.code != case.code:
        yield f"exit code {ended.code} where {case.code} is due: {ended.err[-3000:]}"
    if "Traceback" in ended.err:
        yield f"a traceback: {ended.err[-3000:]}"
    if case.victim is None:
        if statuses is not None:
            yield f"it began: {statuses}"
        return
    if statuses is None:
        yield f"it did not begin: {ended.err[-3000:]}"
        return
    if statuses[_victim()] != case.victim:
        yield f"the experiment struck is {statuses[_victim()]}: {ended.err[-3000:]}"
    if not case.stops and any(status != COMPLETED for name, status in statuses.items() if name != _victim()):
        yield f"others suffered: {statuses}"


def what_it_said(case: Case, ended: Ended) -> str | None:
    """The line that explains the weather; None when there is none."""
    for line in (*_told(ended), *ended.err.splitlines()):
        if re.search(case.says, line):
            return line.strip()
    return None


def _told(ended: Ended) -> Iterator[str]:
    """The texts of events that tell of a trouble."""
    for line in ended.out.splitlines():
        if not line.startswith("{"):
            continue
        event = json.loads(line)
        if event["event"] in ("experiment_retried", "experiment_failed", "experiment_interrupted"):
            yield str(event.get("error") or event.get("reason"))
        elif event["event"] == "experiment_completed" and event["invalid_codes"]:
            yield "; ".join(event["invalid_codes"])
        elif event["event"] == "note":
            yield str(event["text"])


def format_table(verdicts: Iterable[Verdict], width: int = 70) -> str:
    rows = [("weather", "lem said", "exit", "others", "resumed", "left")]
    for item in verdicts:
        others = "-" if item.others[1] == 0 else f"{item.others[0]}/{item.others[1]}"
        resumed = f"{item.resumed[0]}/{item.resumed[1]}"
        said = textwrap.shorten(item.said, width, placeholder=" …")
        name = item.weather if not item.problems else f"{item.weather} !"
        rows.append((name, said, str(item.code), others, resumed, str(item.left)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip() for row in rows
    )
