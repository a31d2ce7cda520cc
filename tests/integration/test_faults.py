"""Every fault on a small campaign: after a resume each experiment is completed exactly once, nothing is left behind."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.doubles.fault_injector import EVENTS
from tests.faults.driver import (
    Case,
    Point,
    Verdict,
    enumerate_points,
    format_table,
    random_moments,
    spread,
    try_all,
    try_moment,
    try_point,
)
from tests.faults.sandbox import copy_program

# Hundreds of campaigns, about a second of CPU time each.
pytestmark = pytest.mark.timeout(1500)

JOBS = min(8, os.cpu_count() or 2)
MOMENTS = 20
SEED = 42


@dataclass(frozen=True)
class Lab:
    """The program to try, where to try it, and what an undisturbed campaign passes through."""

    folder: Path
    program: Path
    points: tuple[Point, ...]
    elapsed_s: float


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("faults")
    program = copy_program(folder / "program")
    return Lab(folder, program, *enumerate_points(folder / "undisturbed", program))


def try_and_show(cases: Sequence[Case], lab: Lab, name: str, capsys: pytest.CaptureFixture[str]) -> list[Verdict]:
    verdicts = try_all(cases, lab.folder / name, lab.program, jobs=JOBS)
    with capsys.disabled():
        print(f"\n\n{format_table(verdicts)}")
    return verdicts


def test_a_campaign_passes_through_every_kind_of_event_on_both_sides(lab: Lab) -> None:
    assert {point.event for point in lab.points if point.process == "host"} == set(EVENTS)
    assert {point.event for point in lab.points if point.process == "engine"} == set(EVENTS) - {"lem.transition"}


def test_kill_at_every_event_costs_nothing(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [partial(try_point, point, action) for point, action in spread(lab.points, ["kill"])]
    verdicts = try_and_show(cases, lab, "kill", capsys)
    assert [verdict for verdict in verdicts if not verdict.is_good or not verdict.has_happened] == []
    assert len(verdicts) == len(lab.points)


def test_failing_call_or_stop_at_every_event_costs_nothing(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    actions = ["enospc", "term", "eacces", "eio"]
    cases = [partial(try_point, point, action) for point, action in spread(lab.points, actions)]
    verdicts = try_and_show(cases, lab, "fail", capsys)
    assert [verdict for verdict in verdicts if not verdict.is_good or not verdict.has_happened] == []
    assert len(verdicts) == len(lab.points)


def test_kill_of_any_process_at_random_moments_costs_nothing(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    moments = random_moments(MOMENTS, lab.elapsed_s, random.Random(SEED))
    verdicts = try_and_show([partial(try_moment, moment) for moment in moments], lab, "moments", capsys)
    assert [verdict for verdict in verdicts if not verdict.is_good] == []
    assert any(verdict.has_happened for verdict in verdicts)


def test_program_that_writes_in_place_is_found_out(lab: Lab, tmp_path: Path) -> None:
    """The judge itself: with results written in place a kill leaves a part of one, and the table must say so."""
    program = copy_program(tmp_path / "program")
    module = program / "lem" / "durable.py"
    atomic, in_place = (
        'sys.audit("lem.fsync", str(path))',
        'path.write_bytes(data[:50]); sys.audit("lem.fsync", str(path))',
    )
    source = module.read_text(encoding="utf-8")
    assert atomic in source
    module.write_text(source.replace(atomic, in_place), encoding="utf-8")
    points = [point for point in lab.points if (point.process, point.event) == ("engine", "lem.rename")]
    verdicts = try_all([partial(try_point, points[0], "kill")], tmp_path, program, jobs=1)
    assert [verdict.partial > 0 for verdict in verdicts] == [True]
