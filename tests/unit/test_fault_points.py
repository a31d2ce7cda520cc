"""Which faults are tried where, and in which sitting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.doubles.fault_injector import ACTIONS, Entry
from tests.faults.points import Point, points_of, spread, thin
from tests.faults.trials import Sitting
from tests.faults.verdict import Verdict

WRITES = tuple(Point("host", "lem.write", nth, f"run/{nth}/result.json") for nth in range(1, 6))
CHANGES = ("e-c1 pending running", "e-c1 running completed", "e-c2 pending running", "e-c2 running completed")
TRANSITIONS = tuple(Point("host", "lem.transition", nth, detail) for nth, detail in enumerate(CHANGES, 1))
STARTS = (Point("supervisor", "start", 1, "launch.py worker"),)
POINTS = (*STARTS, *WRITES[:2], *TRANSITIONS, *WRITES[2:])


def test_as_many_passes_as_actions_try_each_once_at_every_point() -> None:
    pairs = spread(POINTS, ACTIONS, len(ACTIONS))
    expected = {(point, action) for point in WRITES for action in ACTIONS}
    expected |= {(point, action) for point in TRANSITIONS for action in ("kill", "term", "clock", "vanish")}
    expected |= {(point, action) for point in STARTS for action in ("kill", "term")}
    assert len(pairs) == len(expected)
    assert set(pairs) == expected


def test_another_sitting_tries_what_was_not_tried_or_had_a_cost(tmp_path: Path) -> None:
    path, good = tmp_path / "sweep.jsonl", Verdict("plain, host: kill", "kill", True)
    first = Sitting(path)
    assert first.left(["a", "b", "c"]) == ["a", "b", "c"]
    first.add("a", good)
    first.add("b", replace(good, lost=1))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"name": "c", "prog')  # stopped while it was written
    second = Sitting(path)
    assert second.left(["a", "b", "c"]) == ["b", "c"]
    second.add("b", good)
    assert Sitting(path).verdicts == [good, good]


def test_of_each_kind_the_first_and_the_last_are_kept() -> None:
    assert thin(POINTS) == (*STARTS, WRITES[0], *TRANSITIONS, WRITES[4])


def test_steps_of_a_temporary_file_are_counted_and_not_tried_twice() -> None:
    temporary = Entry("host", "open", 1, "run/.lem-tmp-a1b2c3d4")
    plain = Entry("host", "open", 1, "run/log.txt")
    assert points_of([temporary, plain]) == (Point("host", "open", 2, "run/log.txt"),)
