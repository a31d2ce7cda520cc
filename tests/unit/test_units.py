"""Quantities as people read and write them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lem.base import units

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("6h", 21600), ("2d", 172800), ("1h30m", 5400), ("1.5h", 5400), (" 10S ", 10)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "10", "h", "1 h 30", "-5m", "5m!", "0s", "0h0m", "1w", "five minutes", "36501d", f"{10**400}h"]
)
def test_what_is_no_duration_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=repr(text).replace("(", r"\(")):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "fraction"),
    [("5%", 0.05), (" 0.5 % ", 0.005), (".5%", 0.005), ("+5%", 0.05), ("0%", 0.0), ("1e1%", 0.1), ("150%", 1.5)],
)
def test_percentages_are_read_as_fractions(text: str, fraction: float) -> None:
    assert units.parse_percentage(text) == pytest.approx(fraction)


@pytest.mark.parametrize("text", ["5", "0.05", " 3 "])
def test_a_percentage_without_its_sign_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(ValueError, match=f"{text!r}; add the % sign"):
        units.parse_percentage(text)


@pytest.mark.parametrize(
    "text", ["", "%", "-1%", "much", "5%%", "nan%", "inf%", "1_0%", "1e999%", "\N{ARABIC-INDIC DIGIT FIVE}%"]
)
def test_what_is_no_percentage_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=f"got {text!r}$"):
        units.parse_percentage(text)


SHOWN = (
    # carried over at every boundary
    *((units.format_duration, *pair) for pair in ((0, "0.0 s"), (0.44, "0.4 s"), (59.94, "59.9 s"), (-5, "-5.0 s"))),
    *((units.format_duration, *pair) for pair in ((59.96, "1m 00s"), (245, "4m 05s"), (3599.4, "59m 59s"))),
    *((units.format_duration, *pair) for pair in ((3599.6, "1h 00m"), (7380, "2h 03m"))),
    *((units.format_duration, *pair) for pair in ((86399, "1d 00h"), (100800, "1d 04h"))),
    # four digits, and plain thousands
    *((units.format_quantity, *pair) for pair in ((0.0, "0"), (1234.5678, "1235"), (123456.0, "123456"))),
    *((units.format_quantity, *pair) for pair in ((0.00012346, "0.0001235"), (-2.5, "-2.5"))),
    *((units.format_energy, *pair) for pair in ((9999, "9999 J"), (36_000, "10 Wh"))),
    *((units.format_latency, *pair) for pair in ((1.2, "1.200 s"), (12345.0, "12345 s"), (1.0, "1.000 s"))),
    *((units.format_latency, *pair) for pair in ((0.0123, "12.30 ms"), (0.00035, "350.0 µs"), (0.0, "0 µs"))),
    *((units.format_bytes, *pair) for pair in ((0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"))),
    (units.format_bytes, 1 << 50, "1024.0 TiB"),
    (units.format_rate, 12.346, "12.35 tok/s"),
    (units.format_power, 250, "250 W"),
    # below a tenth, a share has two digits
    *((units.percent, *pair) for pair in ((0.12, "12 %"), (0.0124, "1.2 %"), (0.00034, "0.034 %"))),
    *((units.percent, *pair) for pair in ((-0.05, "-5 %"), (0.0, "0 %"))),
    # what was not measured is never zero
    *((units.format_quantity, None, "–"), (units.format_energy, None, "–"), (units.format_power, None, "–")),
    *((units.format_rate, None, "–"), (units.format_latency, None, "–"), (units.format_bytes, None, "–")),
)


@pytest.mark.parametrize(("show", "value", "text"), SHOWN)
def test_a_number_is_shown_with_digits_and_a_unit_that_fit(show: Callable[[Any], str], value: Any, text: str) -> None:
    assert show(value) == text


@pytest.mark.parametrize(
    ("texts", "shown"), [((), ""), (("a",), "a"), (("a", "b"), "a, b"), (("a", "b", "c", "d"), "a, b and 2 more")]
)
def test_a_long_list_says_how_many_it_leaves_out(texts: tuple[str, ...], shown: str) -> None:
    assert units.some_of(texts, 2) == shown


@pytest.mark.parametrize(("decimals", "text"), [(None, "1234"), (0, "1234"), (2, "1234.50")])
def test_a_value_has_the_decimals_of_its_column(decimals: int | None, text: str) -> None:
    assert units.with_decimals(1234.5, decimals) == text


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (130.4, "+.2g", "+130"),
        (-130.4, "+.2g", "-130"),
        (12345.6, ".4g", "12346"),
        (1e-5, ".2g", "0.00001"),
        (-1.3e-5, "+.2g", "-0.000013"),
        (0.0, ".2g", "0"),
        (2.346, ".3g", "2.35"),
    ],
)
def test_plain_numbers_have_no_exponent(value: float, spec: str, text: str) -> None:
    assert units.plain(value, spec) == text


def test_percentages_have_no_exponent() -> None:
    assert [units.percent(share) for share in (1.304, 99.96, 0.0996, 1e-7)] == ["130 %", "9996 %", "10 %", "0.00001 %"]


def test_numbers_of_few_digits_are_formatted_without_an_exponent_everywhere() -> None:
    """A format such as `.2g` writes 130 as 1.3e+02; `lem.base.units.plain` does not."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "lem").rglob("*.py"))
        if "_vendor" not in path.parts and path.name != "units.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FormattedValue) and isinstance(node.format_spec, ast.JoinedStr)
        for part in node.format_spec.values
        if isinstance(part, ast.Constant) and re.fullmatch(r"[+]?[.][0-6]g", str(part.value))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("value", "decimals", "ratio", "quantity"),
    [
        (1.5, 2, "1.50", "1.50"),
        (99_999.0, 2, "99999.00", "99999.00"),
        (154_321.05, 2, "1.5e+05", "154321.05"),
        (2.4484e82, 2, "2.4e+82", "2.4e+82"),
        (-3e7, 1, "-3.0e+07", "-30000000.0"),
        (1e9, 0, "1.0e+09", "1.0e+09"),
        (0.0, 2, "0.00", "0.00"),
    ],
)
def test_a_bound_that_is_far_too_large_for_its_decimals_is_short(
    value: float, decimals: int, ratio: str, quantity: str
) -> None:
    assert units.fixed(value, decimals) == ratio
    assert units.with_decimals(value, decimals) == quantity
