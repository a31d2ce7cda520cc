"""Faults where something is written: after a resume each experiment is completed exactly once, nothing is left behind.

Every run kills at one point of each kind; `make test-long` tries the first and the last point of each kind with one or
two of the faults, and `python -m tests.faults` every point with all of them.
"""

from __future__ import annotations

import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.doubles.fault_injector import DURABLE_EVENTS, START
from tests.faults.campaigns import Case, enumerate_points, try_all, try_moment, try_point
from tests.faults.commands import COMMANDS, Command, command_points, try_command
from tests.faults.points import VARYING, Point, random_moments, spread, thin
from tests.faults.sandbox import Setting, copy_program
from tests.faults.scenarios import JOURNALED, METERED, PLAIN, STEPPING, TOPPED_UP, Scenario, Tools
from tests.faults.verdict import Verdict, format_table

# Hundreds of campaigns, about a second of CPU time each.
pytestmark = [pytest.mark.timeout(1500), pytest.mark.needs("gcc")]

JOBS = min(8, os.cpu_count() or 2)
MOMENTS = 12
SEED = 42
# KILL is tried everywhere.
OTHERS = ("enospc", "term", "eacces", "clock", "readonly", "eio", "vanish")


@dataclass
class Lab:
    """The program to try, where to try it, and what undisturbed campaigns pass through in how many seconds."""

    folder: Path
    tools: Tools
    known: dict[str, tuple[tuple[Point, ...], float]] = field(default_factory=dict)

    def enumerated(self, scenario: Scenario) -> tuple[tuple[Point, ...], float]:
        if scenario.name not in self.known:
            folder = self.folder / f"{scenario.name}-undisturbed"
            self.known[scenario.name] = enumerate_points(folder, self.tools, scenario)
        return self.known[scenario.name]

    def points(self, scenario: Scenario) -> tuple[Point, ...]:
        return self.enumerated(scenario)[0]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("faults")
    return Lab(folder, copy_program(folder / "program"))


@pytest.fixture
def tried(lab: Lab, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Iterator[Trial]:
    trial = Trial(lab, re.sub(r"\W", "-", request.node.name))
    yield trial
    with capsys.disabled():
        print(f"\n\n{format_table(trial.verdicts)}")


@dataclass
class Trial:
    """The cases of a test, and what they cost."""

    lab: Lab
    name: str
    verdicts: list[Verdict] = field(default_factory=list)

    def run(self, cases: Sequence[Case], setting: Setting) -> None:
        folder = self.lab.folder / f"{self.name}-{setting.name}"
        self.verdicts += try_all(cases, folder, self.lab.tools, setting, jobs=JOBS)

    def assert_good(self, count: int) -> None:
        assert [verdict for verdict in self.verdicts if not verdict.is_good or not verdict.has_happened] == []
        assert len(self.verdicts) == count


def test_a_campaign_passes_through_every_kind_of_event_on_both_sides(lab: Lab) -> None:
    points = lab.points(PLAIN)
    assert {point.event for point in points if point.process == "host"} >= set(DURABLE_EVENTS)
    assert {point.event for point in points if point.process == "engine"} == {START, *DURABLE_EVENTS} - {
        "lem.transition"
    }


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 starts every worker as a Python of its own")
@pytest.mark.parametrize("scenario", [PLAIN, METERED], ids=lambda scenario: scenario.name)
def test_a_campaign_of_forks_passes_the_points_of_one_of_programs(lab: Lab, scenario: Scenario) -> None:
    folder = lab.folder / f"{scenario.name}-warm"
    forked, _ = enumerate_points(folder, lab.tools, scenario, is_warm=True)
    assert _alike(forked) == _alike(lab.points(scenario))


def test_between_them_the_campaigns_write_every_file_there_is(lab: Lab) -> None:
    names = {point.kind[2] for scenario in (PLAIN, TOPPED_UP, METERED, JOURNALED) for point in lab.points(scenario)}
    assert names >= {
        "campaign_manifest.json",
        "campaign_manifest.journal",
        ".lem-tmp-campaign.activity",
        "campaign.lock",
        "config.json",
        "prompts.jsonl",
        "log.txt",
        "samples.part",
        "samples.jsonl.gz",
        "outputs.jsonl",
        "result.json",
        "configurations.json",
        "stopping.json",
    }


def test_a_long_campaign_compacts_its_journal_while_it_runs(lab: Lab) -> None:
    points = lab.points(JOURNALED)
    appended = [point.detail for point in points if point.event == "lem.write" and "manifest" in point.detail]
    names = [Path(name).suffix for name in appended]
    assert names.index(".json", names.index(".journal")) < len(names) - 1 - names[::-1].index(".journal")
    removals = [point for point in points if point.event == "os.remove" and point.detail.endswith(".journal")]
    assert len(removals) == 2  # then, and at the end


def test_kill_at_every_kind_of_event_costs_nothing(lab: Lab, tried: Trial) -> None:
    points = {point.kind: point for point in reversed(lab.points(PLAIN))}.values()
    tried.run([partial(try_point, point, "kill", PLAIN) for point in points], PLAIN)
    tried.assert_good(len(points))


@pytest.mark.parametrize("process", ["supervisor", "engine"])
def test_a_process_that_dies_before_it_says_a_word_costs_nothing(lab: Lab, tried: Trial, process: str) -> None:
    points = [point for point in lab.points(PLAIN) if (point.process, point.event) == (process, START)]
    tried.run([partial(try_point, points[0], "kill", PLAIN)], PLAIN)
    tried.assert_good(1)
    assert "exit codes 0, 0" in tried.verdicts[0].notes  # the campaign went on by itself


def test_results_that_vanish_before_the_end_are_no_success(lab: Lab, tried: Trial) -> None:
    (last,) = [point for point in lab.points(PLAIN) if point.detail.endswith(" completed")][-1:]
    tried.run([partial(try_point, last, "vanish", PLAIN)], PLAIN)
    tried.assert_good(1)
    assert "exit codes 1, 0" in tried.verdicts[0].notes


@pytest.mark.long
@pytest.mark.parametrize("actions", [("kill",), OTHERS], ids=["kill", "others"])
def test_a_fault_at_every_kind_of_event_costs_nothing(lab: Lab, tried: Trial, actions: tuple[str, ...]) -> None:
    points = thin(lab.points(PLAIN))
    tried.run([partial(try_point, *pair, PLAIN) for pair in spread(points, actions)], PLAIN)
    tried.assert_good(len(points))


@pytest.mark.long
@pytest.mark.parametrize("scenario", [TOPPED_UP, METERED, JOURNALED], ids=lambda scenario: scenario.name)
def test_faults_where_only_other_campaigns_write_cost_nothing(lab: Lab, tried: Trial, scenario: Scenario) -> None:
    known = {point.kind[1:] for point in lab.points(PLAIN)}
    points = [point for point in thin(lab.points(scenario)) if point.kind[1:] not in known]
    tried.run([partial(try_point, *pair, scenario) for pair in spread(points, ("kill", *OTHERS))], scenario)
    tried.assert_good(len(points))


@pytest.mark.parametrize(
    "command",
    [pytest.param(item, id=item.name, marks=() if item.name == "export" else pytest.mark.long) for item in COMMANDS],
)
def test_faults_in_a_command_that_writes_files_leave_them_whole_or_not_there(
    lab: Lab, tried: Trial, command: Command
) -> None:
    points, due = command_points(lab.folder / f"{command.name}-undisturbed", lab.tools, command)
    points = thin(points)
    pairs = spread(points, ("kill", "enospc", "eio"))
    tried.run([partial(try_command, *pair, command, due) for pair in pairs], command)
    tried.assert_good(len(points))


@pytest.mark.long
def test_kill_of_any_process_at_random_moments_costs_nothing(lab: Lab, tried: Trial) -> None:
    for scenario in (PLAIN, METERED):
        elapsed_s = lab.enumerated(scenario)[1]
        moments = random_moments(scenario.processes, MOMENTS // 2, elapsed_s, random.Random(SEED))
        tried.run([partial(try_moment, moment, scenario) for moment in moments], scenario)
    assert [verdict for verdict in tried.verdicts if not verdict.is_good] == []
    assert any(verdict.has_happened for verdict in tried.verdicts)


def test_program_that_writes_in_place_is_found_out(lab: Lab, tmp_path: Path) -> None:
    """The judge itself: with results written in place a kill leaves a part of one, and the table must say so."""
    tools = copy_program(tmp_path / "program")
    atomic, in_place = (
        'sys.audit("lem.fsync", str(path))',
        'path.write_bytes(data[:50]); sys.audit("lem.fsync", str(path))',
    )
    _edit(tools.program / "lem" / "base" / "durable.py", atomic, in_place)
    renames = [point for point in lab.points(PLAIN) if (point.process, point.event) == ("engine", "lem.rename")]
    points = [point for point in renames if point.detail.endswith("result.json")]
    verdicts = try_all([partial(try_point, points[0], "kill", PLAIN)], tmp_path, tools, PLAIN, jobs=1)
    assert [verdict.partial > 0 for verdict in verdicts] == [True]


def test_a_wall_clock_that_goes_back_within_a_window_changes_no_duration(lab: Lab, tmp_path: Path) -> None:
    moments = random_moments(("host",), 1, 0.0, random.Random(SEED))
    verdicts = try_all([partial(try_moment, moments[0], STEPPING)], tmp_path, lab.tools, STEPPING, jobs=1)
    assert [verdict.is_good for verdict in verdicts] == [True]


def _alike(points: Sequence[Point]) -> Counter[tuple[str, str, str]]:
    """How many there are of each kind; how often samples and activity are written depends on the time."""
    return Counter(point.kind for point in points if not point.detail.endswith(VARYING))


def _edit(module: Path, before: str, after: str) -> None:
    source = module.read_text(encoding="utf-8")
    assert before in source
    module.write_text(source.replace(before, after), encoding="utf-8")
