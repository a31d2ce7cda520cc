"""No bit that flips in a file changes a value: a smaller number of `python -m tests.fuzz.flips`."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.flips import FILES, REFUSED, Place, flip, judge


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("flips"))
    place.write()
    return place


@pytest.mark.parametrize("name", FILES)
def test_no_flip_is_accepted_with_a_wrong_value(place: Place, name: str) -> None:
    counts = flip(place, name, 40, random.Random(name))
    assert sum(counts.values()) == 40
    assert counts["wrong"] == counts["tracebacks"] == 0


@pytest.mark.parametrize("name", ["result.json", "manifest", "config.json", "samples.jsonl.gz"])
def test_flips_are_noticed(place: Place, name: str) -> None:
    assert flip(place, name, 20, random.Random(name))[REFUSED] >= 18


def test_a_value_that_is_not_the_one_before_is_wrong() -> None:
    before = {"a": 1, "b": 2}
    assert judge(before, before) == "without effect"
    assert judge(before, {"a": 1, "b": REFUSED}) == REFUSED
    assert judge(before, {"a": 1}) == REFUSED
    assert judge(before, {"a": 3, "b": REFUSED}) == "wrong"
    assert judge(before, {**before, "c": 1}) == "wrong"
