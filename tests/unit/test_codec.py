"""Dataclasses to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from lem.base.codec import DecodeError, decode, decode_row, encode, pack, unpack
from lem.base.dataclass import dataclass, field
from lem.base.reasons import Reason


@dataclass(frozen=True)
class Reading:
    name: str
    at_ns: int
    power_w: float | None
    is_good: bool
    pids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Log:
    first: Reading
    rest: list[Reading]
    by_name: Mapping[str, Reading | None]
    anything: Any

    def __post_init__(self) -> None:
        if len(self.rest) > 2:
            raise ValueError("too many readings")


READING = Reading("a", 3, 1.5, True, (1, 2))
OBJECT: dict[str, Any] = {"name": "a", "at_ns": 3, "power_w": 1.5, "is_good": True, "pids": [1, 2]}
LOG = Log(READING, [READING], {"x": READING, "y": None}, {"a": [1, None]})
DOCUMENT: dict[str, Any] = {
    "first": OBJECT,
    "rest": [OBJECT],
    "by_name": {"x": OBJECT, "y": None},
    "anything": {"a": [1, None]},
}
GOOD: list[Any] = ["a", 3, 1.5, True, [1, 2]]


def test_a_dataclass_is_an_object_of_its_fields() -> None:
    assert encode(LOG, "log") == DOCUMENT
    assert decode(Log, DOCUMENT, "log") == LOG


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [object()]}, r"it\.a\[0\]: object has no form in JSON"),
        (Reading("a", 3, float("nan"), True), r"it\.power_w: expected a finite number, got nan"),
    ],
)
def test_what_json_does_not_have_is_not_written(value: Any, where: str) -> None:
    with pytest.raises(DecodeError, match=where):
        encode(value, "it")


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"first": {**OBJECT, "at_ns": "x"}}, r"log\.first\.at_ns: expected an integer, got 'x'"),
        ({"first": {**OBJECT, "power_w": 10**400}}, r"log\.first\.power_w: expected a number, got 10000"),
        ({"first": None}, r"log\.first: expected an object, got None"),
        ({"rest": [OBJECT, {}]}, r"log\.rest\[1\]: missing at_ns, is_good, name, pids, power_w"),
        ({"rest": {}}, r"log\.rest: expected a list, got {}"),
        ({"rest": [OBJECT] * 3}, "log: too many readings"),
        ({"by_name": {"x": {**OBJECT, "pids": [1, True]}}}, r"log\.by_name\.x\.pids\[1\]: expected an integer"),
        ({"anything": [float("inf")]}, r"log\.anything\[0\]: expected a finite number"),
        ({"x" * 500: 1}, "log: unknown '.{78}…$"),
    ],
)
def test_what_is_of_another_type_is_named_by_its_place(changed: dict[str, Any], problem: str) -> None:
    with pytest.raises(DecodeError, match=problem):
        decode(Log, {**DOCUMENT, **changed}, "log")


def test_a_whole_number_is_read_as_a_float_where_one_is_declared() -> None:
    assert isinstance(decode(Reading, {**OBJECT, "power_w": 3}, "it").power_w, float)


def test_a_row_has_the_values_in_their_order() -> None:
    for _ in range(2):  # its types are known the second time
        assert decode_row(Reading, GOOD) == READING
        assert decode_row(Reading, ["a", 3, 2, True, []]).power_w == 2


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (0, None, r"Reading\.name: expected text, got None"),
        (1, 3.0, r"Reading\.at_ns: expected an integer, got 3\.0"),
        (1, True, r"Reading\.at_ns: expected an integer, got True"),
        (1, 10**400, "out of range"),
        (2, "1", r"Reading\.power_w: expected a number, got '1'"),
        (2, float("nan"), "nan"),
        (3, 1, r"Reading\.is_good: expected true or false, got 1"),
        (4, {}, r"Reading\.pids: expected a list, got {}"),
    ],
)
def test_another_type_or_size_is_refused_also_after_a_good_row(place: int, value: Any, problem: str) -> None:
    decode_row(Reading, GOOD)
    with pytest.raises(DecodeError, match=problem):
        decode_row(Reading, [*GOOD[:place], value, *GOOD[place + 1 :]])
    for values in ([], GOOD[:4], [*GOOD, 1]):
        with pytest.raises(DecodeError, match=f"Reading: expected 5 values, got {len(values)}"):
            decode_row(Reading, values)


@dataclass(frozen=True)
class Figures:
    power_w: float | None
    why: Reason | None
    notes: tuple[Reason, ...]
    null_reasons: Mapping[str, Reason] = field(default_factory=dict)


FIGURES = Figures(None, Reason.of("no_output"), (Reason.of("verbatim", text="hot"),), {"power_w": Reason.of("no_dram")})
FIGURES_DOCUMENT: dict[str, Any] = {
    "power_w": None,
    "power_w_null_reason": "the kernel shows no energy counter of the memory",
    "power_w_null_reason_coded": {"code": "no_dram", "data": {}},
    "why": "the engine made no output tokens",
    "why_coded": {"code": "no_output", "data": {}},
    "notes": ["hot"],
    "notes_coded": [{"code": "verbatim", "data": {"text": "hot"}}],
}


def test_a_section_has_reasons_beside_nulls_and_codes_beside_texts() -> None:
    assert encode(FIGURES, "it") == FIGURES_DOCUMENT
    assert decode(Figures, FIGURES_DOCUMENT, "it") == FIGURES


REASON = Reason.of("needs_gpus", needed=2)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "needs_gpus",
        [],
        {},
        {"code": "needs_gpus"},
        {"code": ["needs_gpus"], "data": {"needed": 2}},
        {"code": "needs_gpus", "data": [2]},
        {"code": "needs_gpus", "data": {"needed": [2]}},
        {"code": "needs_gpus", "data": {"needed": None}},
        {"code": "needs_gpus", "data": {"needed": "2"}},
        {"code": "needs_gpus", "data": {}},
        {"code": "unheard_of", "data": {}},
    ],
)
def test_only_a_packed_reason_is_unpacked_as_one(value: Any) -> None:
    assert unpack(Reason, pack(REASON)) == REASON
    with pytest.raises(DecodeError, match="expected a reason"):
        unpack(Reason, value)
