from __future__ import annotations

from collections.abc import Iterator

import pytest

from lem.orchestration import host_meters


class FakeClock:
    """Time that passes only while something waits; a stop may be asked for at a given second."""

    def __init__(self, stop_at_s: float = float("inf")) -> None:
        self.now_s = 100.0
        self.waits: list[float] = []
        self._stop_at_s = 100.0 + stop_at_s

    def monotonic(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now_s = min(self.now_s + seconds, max(self._stop_at_s, self.now_s))
        return self.now_s >= self._stop_at_s


class FakeSensors:
    """Answers one after the other, the last one for ever."""

    def __init__(self, *answers: bool | None) -> None:
        self._answers: Iterator[bool | None] = iter(answers)
        self._last: bool | None = None
        self.asked = 0

    def __call__(self) -> bool | None:
        self.asked += 1
        self._last = next(self._answers, self._last)
        return self._last


def keep(cap_s: float, sensors: FakeSensors | None, clock: FakeClock) -> host_meters.GapOutcome:
    return host_meters.keep_gap(cap_s, is_recovered=sensors, monotonic=clock.monotonic, wait=clock.wait)


def test_without_sensors_the_whole_gap_is_kept_in_one_wait() -> None:
    clock = FakeClock()
    assert keep(60.0, None, clock) == (60.0, host_meters.NO_SENSORS)
    assert clock.waits == [60.0]


def test_a_device_already_back_ends_the_gap_at_once() -> None:
    clock = FakeClock()
    assert keep(60.0, FakeSensors(True), clock) == (0.0, host_meters.RECOVERED)
    assert clock.waits == []


def test_gap_ends_when_the_device_is_back() -> None:
    clock, sensors = FakeClock(), FakeSensors(False, False, False, True)
    assert keep(60.0, sensors, clock) == (3.0, host_meters.RECOVERED)
    assert sensors.asked == 4


def test_a_device_that_stays_warm_ends_the_gap_at_its_cap() -> None:
    clock = FakeClock()
    assert keep(2.5, FakeSensors(False), clock) == (2.5, host_meters.CAP_REACHED)
    assert clock.waits == [1.0, 1.0, 0.5]


def test_sensors_that_never_answer_are_no_sensors() -> None:
    assert keep(5.0, FakeSensors(None), FakeClock()) == (5.0, host_meters.NO_SENSORS)


def test_sensors_that_answer_late_still_end_the_gap() -> None:
    assert keep(5.0, FakeSensors(None, None, True), FakeClock()) == (2.0, host_meters.RECOVERED)


@pytest.mark.parametrize("sensors", [None, FakeSensors(False)])
def test_a_stop_ends_the_gap_when_it_is_asked_for(sensors: FakeSensors | None) -> None:
    gap_s, reason = keep(60.0, sensors, FakeClock(stop_at_s=7.5))
    assert gap_s == pytest.approx(7.5)
    assert reason == host_meters.INTERRUPTED


def test_no_gap_asks_nobody_and_waits_for_nothing() -> None:
    clock, sensors = FakeClock(), FakeSensors(False)
    assert keep(0.0, sensors, clock) == (0.0, host_meters.NO_GAP)
    assert sensors.asked == 0
    assert clock.waits == []
