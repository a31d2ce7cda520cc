"""The texts of UTC times."""

from datetime import datetime, timedelta, timezone

import pytest

from lem.base.clock import parse_time, seconds_between, utc_stamp, utc_text

MOMENT = datetime(2026, 7, 14, 12, 0, 0, 123456, timezone(timedelta(hours=2)))


def test_a_time_is_written_in_utc() -> None:
    assert utc_text(MOMENT) == "2026-07-14T10:00:00.123456Z"
    assert utc_text(MOMENT, "milliseconds") == "2026-07-14T10:00:00.123Z"
    assert utc_stamp(MOMENT) == "20260714T100000Z"


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [
        ("2026-07-14T10:00:00Z", 0),
        ("2026-07-14T10:00:00.5z", 500_000),
        ("2026-07-14T10:00:00.123456789Z", 123_456),
        (" 2026-07-14 12:00:00+02:00 ", 0),
    ],
)
def test_an_iso_time_is_read_with_its_zone(text: str, microseconds: int) -> None:
    assert parse_time(text) == datetime(2026, 7, 14, 10, 0, 0, microseconds, timezone.utc)


def test_a_time_without_a_zone_gets_none() -> None:
    assert parse_time("2026-07-14T10:00:00") == datetime(2026, 7, 14, 10)  # noqa: DTZ001 - it is about one without


@pytest.mark.parametrize("text", ["", "noon", "2026-13-01T00:00:00Z", "10"])
def test_another_text_is_no_time(text: str) -> None:
    assert parse_time(text) is None


def test_stamps_are_nanoseconds() -> None:
    assert seconds_between(1_000_000_000, 3_500_000_000) == 2.5
