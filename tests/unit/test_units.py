"""Quantities as people read and write them."""

from __future__ import annotations

import pytest

from lem.base import units


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (59.94, "59.9 s"),
        (59.96, "1m 00s"),
        (245, "4m 05s"),
        (3599.4, "59m 59s"),
        (3599.6, "1h 00m"),
        (7380, "2h 03m"),
        (86399, "1d 00h"),
        (100800, "1d 04h"),
        (-5, "-5.0 s"),
    ],
)
def test_durations_carry_over_at_every_boundary(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.5678, "1235"), (123456.0, "123456"), (0.00012346, "0.0001235"), (-2.5, "-2.5")],
)
def test_quantities_have_four_digits_and_plain_thousands(value: float, text: str) -> None:
    assert units.format_quantity(value) == text


def test_what_was_not_measured_is_a_dash_and_never_zero() -> None:
    assert units.format_quantity(None, "J") == "–"
    assert units.format_energy(None) == "–"
    assert units.format_power(None) == "–"
    assert units.format_rate(None) == "–"
    assert units.format_latency(None) == "–"
    assert units.format_bytes(None) == "–"


def test_energy_turns_to_watt_hours_at_ten_kilojoules() -> None:
    assert units.format_energy(9999) == "9999 J"
    assert units.format_energy(36_000) == "10 Wh"


@pytest.mark.parametrize(
    ("latency_s", "text"),
    [
        (1.2, "1.200 s"),
        (12345.0, "12345 s"),
        (0.0123, "12.30 ms"),
        (0.00035, "350.0 µs"),
        (0.0, "0 µs"),
        (1.0, "1.000 s"),
    ],
)
def test_latencies_have_the_unit_that_fits(latency_s: float, text: str) -> None:
    assert units.format_latency(latency_s) == text


@pytest.mark.parametrize(("size_b", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 50, "1024.0 TiB")])
def test_bytes_have_binary_prefixes(size_b: float, text: str) -> None:
    assert units.format_bytes(size_b) == text


def test_rates_and_power_carry_their_unit() -> None:
    assert units.format_rate(12.346) == "12.35 tok/s"
    assert units.format_power(250) == "250 W"


@pytest.mark.parametrize(
    ("share", "text"), [(0.12, "12 %"), (0.0124, "1.2 %"), (0.00034, "0.034 %"), (-0.05, "-5 %"), (0.0, "0 %")]
)
def test_a_share_below_a_tenth_has_two_digits(share: float, text: str) -> None:
    assert units.percent(share) == text


@pytest.mark.parametrize(
    ("texts", "shown"), [((), ""), (("a",), "a"), (("a", "b"), "a, b"), (("a", "b", "c", "d"), "a, b and 2 more")]
)
def test_a_long_list_says_how_many_it_leaves_out(texts: tuple[str, ...], shown: str) -> None:
    assert units.some_of(texts, 2) == shown


@pytest.mark.parametrize(("decimals", "text"), [(None, "1234"), (0, "1234"), (2, "1234.50")])
def test_a_value_has_the_decimals_of_its_column(decimals: int | None, text: str) -> None:
    assert units.with_decimals(1234.5, decimals) == text
