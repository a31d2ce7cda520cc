from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from lem.base.errors import MeterRefused
from lem.base.units import NS_PER_S
from lem.meters.curve import Curve, NotMeasured, Span, exact
from lem.meters.external import ExternalReadings, is_short_of, measure_external, read_external
from lem.meters.samples import ClockPair, SampleHeader, SampleLog

STARTED_NS = 77 * NS_PER_S
LOG = SampleLog(SampleHeader(STARTED_NS, "2026-07-14T10:00:00.000Z", "lab1", 100))
EPOCH_S = 1784023200  # 2026-07-14T10:00:00Z


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "plug.csv"


def window(opened_s: float, closed_s: float) -> Span:
    """Seconds after the log was begun."""
    return Span(STARTED_NS + round(opened_s * NS_PER_S), STARTED_NS + round(closed_s * NS_PER_S))


def lines(count: int = 300, step: int = 1) -> str:
    """Ten readings a second of a power that is level, or nearly."""
    return "".join(f"2026-07-14T10:00:{place / 10:04.1f}Z,{100 + place % 2}\n" for place in range(0, count, step))


def energy_j(file: Path, span: Span, log: SampleLog = LOG, unit: str | None = "W") -> float:
    return measure_external(read_external(file, unit), log, span, ()).energy_j


def test_the_readings_are_integrated_over_the_window_on_the_logs_clock(file: Path) -> None:
    file.write_text(lines())
    assert energy_j(file, window(11, 19)) == pytest.approx(8 * 100.5, rel=1e-4)
    assert energy_j(file, window(11.5, 19.5)) == pytest.approx(8 * 100.5, rel=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "time,watts\n" + lines(),
        "\ufeff" + lines(),
        lines().replace("Z", ""),
        lines().replace("Z", "00000000Z"),
        lines().replace("Z", "+00:00"),
        lines().replace("T10", "T12").replace("Z", "+02:00"),
        lines().replace("T", " ").replace(",", ", "),
        lines().replace(",", ";"),
        lines().replace("\n", ",230.1,more\n"),
        "\n" + lines().replace("\n", "\n\n"),
        "".join(f"{EPOCH_S + place / 10:.1f},{100 + place % 2}\n" for place in range(300)),
    ],
)
def test_forms_of_the_same_readings(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    assert energy_j(file, window(11, 19)) == pytest.approx(8 * 100.5, rel=1e-4)


@pytest.mark.parametrize(
    ("header", "unit", "watts"),
    [
        ("time,power_w", None, 1),
        ("time,Power (kW)", None, 1000),
        ("UTC,power [mW]", None, 0.001),
        ("time,watts", "W", 1),
        ("", "kW", 1000),
        ("time,power", "mW", 0.001),
    ],
)
def test_the_unit_is_stated_by_the_first_line_or_by_the_option(
    file: Path, header: str, unit: str | None, watts: float
) -> None:
    file.write_text(f"{header}\n{lines()}")
    assert read_external(file, unit).power_w[:2] == pytest.approx((100 * watts, 101 * watts))


@pytest.mark.parametrize(
    ("header", "unit", "said"),
    [
        ("", None, "the unit of power is not stated"),
        ("time,power", None, "the unit of power is not stated"),
        ("time,power_MW", None, "the unit of power is not stated"),
        ("time,power_kw", "W", "is in kW, and measurement.external_unit is W"),
    ],
)
def test_a_unit_that_is_not_clear_is_refused(file: Path, header: str, unit: str | None, said: str) -> None:
    file.write_text(f"{header}\n{lines()}")
    with pytest.raises(MeterRefused, match=said):
        read_external(file, unit)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("time,watts\n2026-07-14T10:00:00Z,100\nyesterday,100\n", 3, "'yesterday' is not a UTC time"),
        ("2026-07-14T10:00:00Z,100\n2026-07-14T10:00:01Z,lots\n", 2, "'lots' is not a power"),
        ("2026-07-14T10:00:00Z,100\n2026-07-14T10:00:01Z,nan\n", 2, "'nan' is not a power"),
        ("2026-07-14T10:00:00Z,-1\n", 1, "'-1' is not a power"),
        ("2026-07-14T10:00:00Z,100\n2026-07-14T10:00:01Z\n", 2, "one column"),
        ("2026-07-14T10:00:01Z,100\n2026-07-14T10:00:01Z,100\n", 2, "not later than the line before"),
        (f"{EPOCH_S * 1000},100\n", 1, "is not a UTC time"),
        ("time,watts\ntime,watts\n", 2, "'time' is not a UTC time"),
    ],
)
def test_a_line_that_is_no_reading_is_named(file: Path, text: str, line: int, said: str) -> None:
    file.write_text(text)
    with pytest.raises(MeterRefused) as caught:
        read_external(file, "W")
    assert f"{file}:{line}: " in caught.value.message
    assert said in caught.value.message
    assert caught.value.hint


def test_a_file_that_is_no_text_is_refused(file: Path) -> None:
    with pytest.raises(MeterRefused, match=r"plug\.csv: No such file"):
        read_external(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MeterRefused, match="not text in UTF-8"):
        read_external(file)


@pytest.mark.parametrize(
    ("edges", "said"),
    [
        ((-3, 5), r"begins 3\.0 s after the window opened"),
        ((20, 40), r"ends 10\.1 s before the window closed"),
        ((-1, 31), "begins .* and it ends"),
    ],
)
def test_readings_that_do_not_cover_the_window_give_nothing(file: Path, edges: tuple[float, float], said: str) -> None:
    file.write_text("time,watts\n")
    with pytest.raises(NotMeasured, match="it has no reading"):
        energy_j(file, window(*edges))
    file.write_text(lines())
    with pytest.raises(NotMeasured, match=said):
        energy_j(file, window(*edges))


@pytest.mark.parametrize("begun", ["2026-07-14T10:00:3", "2026-07-14T10:00:30Z", "2026-07-14T10:00:30Z,"])
def test_a_last_line_that_is_still_being_written_is_not_looked_at(file: Path, begun: str) -> None:
    file.write_text(lines() + begun)
    assert len(read_external(file, "W").at_utc_s) == 300
    file.write_text(lines() + begun + "\n")
    with pytest.raises(MeterRefused, match=f"{file.name}:301"):
        read_external(file, "W")


def test_readings_that_end_before_the_window_may_yet_come(file: Path) -> None:
    file.write_text(lines())
    readings = read_external(file, "W")
    found = [is_short_of(readings, LOG, window(11, closed_s), ()) for closed_s in (19, 29.9, 30.1)]
    assert found == [False, False, True]
    assert is_short_of(ExternalReadings("plug.csv"), LOG, window(1, 2), ())
    assert not is_short_of(readings, LOG, window(-11, 31), ()), "what it did not see will not come"


def test_a_file_that_could_not_be_read_gives_nothing_and_says_why() -> None:
    with pytest.raises(NotMeasured, match="no such file"):
        measure_external(ExternalReadings("plug.csv", error="no such file"), LOG, window(1, 2), ())


def test_a_hole_in_the_readings_gives_nothing(file: Path) -> None:
    file.write_text("".join(line for line in lines().splitlines(True) if not 5 < float(line[17:21]) < 12))
    with pytest.raises(NotMeasured, match=r"hole of 7\.0 s"):
        energy_j(file, window(2, 20))


def test_too_few_readings_give_nothing(file: Path) -> None:
    file.write_text(lines(step=2))
    with pytest.raises(NotMeasured, match="has 41 readings in the window, 60 are needed"):
        energy_j(file, window(11, 19.1))


def stepping(from_s: float, to_s: float, low_w: float, high_w: float, ahead_s: float = 0.0, mean_s: float = 0.0) -> str:
    """As `lines`, of a load from one second to another, by a clock that is ahead, as means over the time before."""

    def mean_w(at_s: float) -> float:
        if not mean_s:
            return high_w if from_s < at_s <= to_s else low_w
        busy_s = max(0.0, min(at_s, to_s) - max(at_s - mean_s, from_s))
        return low_w + (high_w - low_w) * busy_s / mean_s

    rows = ((place / 10 + ahead_s, mean_w(place / 10)) for place in range(600))
    return "".join(f"{EPOCH_S + at_s:.2f},{power_w}\n" for at_s, power_w in rows)


def seen(from_s: float, to_s: float) -> Curve:
    """What a meter of this machine saw of it, each 50 ms."""
    edges = [(place / 20, 300.0 if from_s < place / 20 <= to_s else 80.0) for place in range(1200)]
    at_ns = [STARTED_NS + round(at_s * NS_PER_S) for at_s, _ in edges]
    return exact("gpu", at_ns, list(itertools.accumulate(power_w / 20 for _, power_w in edges)), [])


@pytest.mark.parametrize(("ahead_s", "mean_s"), [(0, 0), (2, 0), (-4, 0), (0, 5), (1.5, 3)])
def test_the_clock_of_the_meter_and_what_it_averages_are_found(file: Path, ahead_s: float, mean_s: float) -> None:
    file.write_text(stepping(20, 32, 150, 450, ahead_s, mean_s))
    found = measure_external(read_external(file, "W"), LOG, window(20, 32), (seen(20, 32),))
    assert found.energy_j == pytest.approx(12 * 450, rel=0.01)
    assert found.ahead_s == pytest.approx(ahead_s, abs=0.2)
    assert found.mean_s == pytest.approx(mean_s, abs=0.5)


def test_a_meter_that_follows_nothing_here_gives_nothing(file: Path) -> None:
    file.write_text(stepping(20, 32, 150, 450))
    for reference in ((), (seen(0, 60),)):
        with pytest.raises(NotMeasured, match="do not follow the work"):
            measure_external(read_external(file, "W"), LOG, window(20, 32), reference)


def test_the_pair_of_clocks_nearest_to_the_window_aligns_the_readings(file: Path) -> None:
    # UTC was set back by 2 s after the log was begun: second 22 of the log is second 20 of the day.
    later = SampleLog(LOG.header, clocks=(ClockPair(STARTED_NS + 22 * NS_PER_S, "2026-07-14T10:00:20Z"),))
    file.write_text(stepping(20, 32, 150, 450))
    found = measure_external(read_external(file, "W"), later, window(22, 34), (seen(22, 34),))
    assert found.ahead_s == pytest.approx(0, abs=0.2)
