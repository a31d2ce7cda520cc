"""Dataclasses from JSON of unknown origin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from lem.base.codec import build, build_from, typed_fields


@dataclass(frozen=True)
class Reading:
    name: str
    at_ns: int
    power_w: float | None
    is_good: bool
    pids: tuple[int, ...] = ()


GOOD: list[Any] = ["a", 3, 1.5, True, []]


@pytest.mark.parametrize("values", [GOOD, ["a", 3, 1, True, []], ["", -3, None, False, (1, 2)]])
def test_values_of_the_declared_types_are_taken(values: list[Any]) -> None:
    assert build(Reading, values) == Reading(*values)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, None, "Reading.name: None has the wrong type"),
        (1, 3.0, r"Reading.at_ns: 3.0 has the wrong type"),
        (1, True, "Reading.at_ns: True has the wrong type"),
        (2, "1", "Reading.power_w: '1' has the wrong type"),
        (2, float("inf"), "inf is more than anything measures"),
        (2, float("nan"), "nan is more than anything measures"),
        (1, 10**400, "is more than anything measures"),
        (3, 1, "Reading.is_good: 1 has the wrong type"),
        (4, {}, "Reading.pids: {} has the wrong type"),
        (0, ["x" * 500], r"Reading.name: .{80} has the wrong type"),
    ],
)
def test_another_type_or_size_is_refused_also_after_good_ones(place: int, value: Any, said: str) -> None:
    build(Reading, GOOD)
    with pytest.raises(ValueError, match=said):
        build(Reading, [*GOOD[:place], value, *GOOD[place + 1 :]])


@pytest.mark.parametrize("values", [[], GOOD[:4], [*GOOD, 1]])
def test_too_few_or_too_many_values_are_refused(values: list[Any]) -> None:
    with pytest.raises(ValueError, match=f"Reading: 5 values are due, got {len(values)}"):
        build(Reading, values)


def test_an_object_has_exactly_the_fields_in_any_order() -> None:
    document = {"pids": [], "name": "a", "at_ns": 3, "is_good": True, "power_w": 1.5}
    assert build_from(Reading, document, "it") == Reading("a", 3, 1.5, True, [])  # type: ignore[arg-type]
    assert list(typed_fields(Reading, document, "it")) == ["name", "at_ns", "power_w", "is_good", "pids"]
    others: tuple[Any, ...] = ({**document, "x": 1}, {"name": "a"}, [], None, "a")
    for other in others:
        with pytest.raises(ValueError, match="it: an object with the fields name, at_ns, power_w, is_good, pids is"):
            build_from(Reading, other, "it")
    with pytest.raises(ValueError, match=r"it\.at_ns: 'x' has the wrong type"):
        typed_fields(Reading, {**document, "at_ns": "x"}, "it")
