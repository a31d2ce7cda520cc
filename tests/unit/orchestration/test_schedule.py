from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone, tzinfo

import pytest

from lem.config.campaign_config import CampaignScheduleConfig
from lem.orchestration.schedule import next_start, waiting_text


class CentralEurope(tzinfo):
    """UTC+1, and +2 from 2026-03-29 02:00 (02:00 → 03:00) to 2026-10-25 03:00 (03:00 → 02:00), as PEP 495 wants it."""

    _BEGIN = datetime.fromisoformat("2026-03-29T02:00")
    _END = datetime.fromisoformat("2026-10-25T03:00")

    def utcoffset(self, moment: datetime | None) -> timedelta:
        return timedelta(hours=1) + self.dst(moment)

    def dst(self, moment: datetime | None) -> timedelta:
        assert moment is not None
        naive = moment.replace(tzinfo=None, fold=0)
        hour = timedelta(hours=1)
        if self._BEGIN <= naive < self._BEGIN + hour:  # does not exist
            return hour * moment.fold
        if self._END - hour <= naive < self._END:  # comes twice
            return hour * (1 - moment.fold)
        return hour if self._BEGIN <= naive < self._END else timedelta(0)

    def tzname(self, moment: datetime | None) -> str:
        return "CEST" if self.dst(moment) else "CET"

    def fromutc(self, moment: datetime) -> datetime:
        naive = moment.replace(tzinfo=None)
        hour = timedelta(hours=1)
        begin, end = self._BEGIN - hour, self._END - 2 * hour
        is_summer = begin <= naive < end
        is_second = end <= naive < end + hour
        return (moment + hour * (2 if is_summer else 1)).replace(fold=int(is_second))


ZONE = CentralEurope()


def local(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=ZONE)


@pytest.mark.parametrize(
    ("now", "at", "start"),
    [
        ("2026-07-14T10:00", "22:00", "2026-07-14T20:00"),
        ("2026-07-14T22:00", "22:00", "2026-07-14T20:00"),
        ("2026-07-14T22:00:01", "22:00", "2026-07-15T20:00"),
        ("2026-07-14T23:59", "00:00", "2026-07-14T22:00"),
        ("2026-12-31T23:30", "08:05", "2027-01-01T07:05"),
    ],
)
def test_the_next_time_of_day_is_today_or_tomorrow(now: str, at: str, start: str) -> None:
    expected = datetime.fromisoformat(start).replace(tzinfo=timezone.utc)
    assert next_start(local(now), at, zone=ZONE) == expected


@pytest.mark.parametrize(
    ("days", "date"),
    [
        (("tue",), "2026-07-14"),
        (("mon",), "2026-07-20"),
        (("weekends",), "2026-07-18"),
        (("weekdays",), "2026-07-14"),
        (("sun", "thu"), "2026-07-16"),
        (None, "2026-07-14"),
    ],
)
def test_the_next_day_allowed(days: tuple[str, ...] | None, date: str) -> None:
    schedule = CampaignScheduleConfig(at="22:00", days=days)
    tuesday = local("2026-07-14T10:00")
    assert schedule.at is not None
    assert next_start(tuesday, schedule.at, schedule.weekdays, zone=ZONE) == local(f"{date}T22:00")


def test_today_next_week_when_today_is_the_only_day_and_its_time_is_over() -> None:
    assert next_start(local("2026-07-14T22:01"), "22:00", {1}, zone=ZONE) == local("2026-07-21T22:00")


def test_the_day_is_that_of_the_zone_not_of_utc() -> None:
    # In UTC it is still Monday.
    now = datetime(2026, 7, 13, 22, 30, tzinfo=timezone.utc)
    assert next_start(now, "01:00", {1}, zone=ZONE) == local("2026-07-14T01:00")


def test_a_time_that_does_not_exist_in_spring_is_not_missed() -> None:
    start = next_start(local("2026-03-29T00:00"), "02:30", zone=ZONE)
    assert start == local("2026-03-29T03:30")


def test_a_time_that_comes_twice_in_autumn_is_met_once() -> None:
    first = next_start(local("2026-10-25T00:00"), "02:30", zone=ZONE)
    assert first == datetime(2026, 10, 25, 0, 30, tzinfo=timezone.utc)
    again = next_start(first + timedelta(seconds=1), "02:30", zone=ZONE)
    assert again == local("2026-10-26T02:30")


def test_the_day_of_a_change_has_the_new_offset_by_evening() -> None:
    assert next_start(local("2026-03-29T00:00"), "22:00", zone=ZONE) == datetime(2026, 3, 29, 20, tzinfo=timezone.utc)
    assert next_start(local("2026-10-25T00:00"), "22:00", zone=ZONE) == datetime(2026, 10, 25, 21, tzinfo=timezone.utc)


@pytest.fixture
def host_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host's own zone, for the time of a test, is Central Europe by the rule that needs no database of zones."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("host_zone")
@pytest.mark.parametrize(
    ("now", "at", "start"),
    [
        ("2026-07-14T10:00+02:00", "22:00", "2026-07-14T22:00+02:00"),
        ("2026-03-29T00:00+01:00", "02:30", "2026-03-29T03:30+02:00"),
        ("2026-10-25T00:00+02:00", "02:30", "2026-10-25T02:30+02:00"),
        ("2026-10-25T02:30:01+02:00", "02:30", "2026-10-26T02:30+01:00"),
    ],
)
def test_the_hosts_own_zone_is_the_one_without_a_name(now: str, at: str, start: str) -> None:
    assert next_start(datetime.fromisoformat(now), at) == datetime.fromisoformat(start)


@pytest.mark.parametrize("at", ["25:00", "noon", ""])
def test_no_time_of_day(at: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        next_start(local("2026-07-14T10:00"), at, zone=ZONE)


def test_no_day() -> None:
    with pytest.raises(ValueError, match="day"):
        next_start(local("2026-07-14T10:00"), "22:00", (), zone=ZONE)


def test_waiting_text_has_the_time_and_the_day_when_it_is_another() -> None:
    now = local("2026-07-14T10:00")
    text = "Daemon: waiting until 22:00 to start campaign"
    assert waiting_text(local("2026-07-14T22:00"), now, is_daemon=True, zone=ZONE) == text
    later = waiting_text(local("2026-07-18T22:00"), now, is_daemon=False, zone=ZONE)
    assert later == "Schedule: waiting until 22:00 to start campaign (Sat 2026-07-18)"
