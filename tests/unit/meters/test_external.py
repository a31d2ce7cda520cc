from __future__ import annotations

from pathlib import Path

import pytest

from lem.base.errors import MeterRefused
from lem.base.units import NS_PER_S
from lem.meters.curve import NotMeasured, Span
from lem.meters.external import ExternalReadings, external_energy_j, is_short_of, read_external
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


def lines(count: int = 30, step_s: int = 1) -> str:
    return "".join(f"2026-07-14T10:00:{second:02d}Z,{100 + second}\n" for second in range(0, count, step_s))


def test_the_readings_are_integrated_over_the_window_on_the_logs_clock(file: Path) -> None:
    file.write_text(lines())
    assert external_energy_j(read_external(file), LOG, window(5, 15)) == pytest.approx(1100)
    assert external_energy_j(read_external(file), LOG, window(5.5, 15.5)) == pytest.approx(1105)


@pytest.mark.parametrize(
    "text",
    [
        "time,watts\n" + lines(),
        "\ufeff" + lines(),
        lines().replace("Z", ""),
        lines().replace("Z", ".000000000Z"),
        lines().replace("Z", "+00:00"),
        lines().replace("T10", "T12").replace("Z", "+02:00"),
        lines().replace("T", " ").replace(",", ", "),
        lines().replace(",", ";"),
        lines().replace("\n", ",230.1,more\n"),
        "\n" + lines().replace("\n", "\n\n"),
        "".join(f"{EPOCH_S + second}.0,{100 + second}\n" for second in range(30)),
    ],
)
def test_forms_of_the_same_readings(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    assert external_energy_j(read_external(file), LOG, window(5, 15)) == pytest.approx(1100)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("time,watts\n2026-07-14T10:00:00Z,100\nyesterday,100\n", 3, "'yesterday' is not a UTC time"),
        ("2026-07-14T10:00:00Z,100\n2026-07-14T10:00:01Z,lots\n", 2, "'lots' is not a power in watts"),
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
        read_external(file)
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
        ((20, 40), r"ends 11\.0 s before the window closed"),
        ((-1, 31), "begins .* and it ends"),
    ],
)
def test_readings_that_do_not_cover_the_window_give_nothing(file: Path, edges: tuple[float, float], said: str) -> None:
    file.write_text("time,watts\n")
    with pytest.raises(NotMeasured, match="it has no reading"):
        external_energy_j(read_external(file), LOG, window(*edges))
    file.write_text(lines())
    with pytest.raises(NotMeasured, match=said):
        external_energy_j(read_external(file), LOG, window(*edges))


@pytest.mark.parametrize("begun", ["2026-07-14T10:00:3", "2026-07-14T10:00:30Z", "2026-07-14T10:00:30Z,"])
def test_a_last_line_that_is_still_being_written_is_not_looked_at(file: Path, begun: str) -> None:
    file.write_text(lines() + begun)
    assert len(read_external(file).at_utc_s) == 30
    file.write_text(lines() + begun + "\n")
    with pytest.raises(MeterRefused, match=f"{file.name}:31"):
        read_external(file)


def test_readings_that_end_before_the_window_may_yet_come(file: Path) -> None:
    file.write_text(lines())
    readings = read_external(file)
    assert [is_short_of(readings, LOG, window(1, closed_s)) for closed_s in (28, 29, 29.5)] == [False, False, True]
    assert is_short_of(ExternalReadings("plug.csv"), LOG, window(1, 2))


def test_a_file_that_could_not_be_read_gives_nothing_and_says_why() -> None:
    with pytest.raises(NotMeasured, match="no such file"):
        external_energy_j(ExternalReadings("plug.csv", error="no such file"), LOG, window(1, 2))


def test_a_hole_in_the_readings_gives_nothing(file: Path) -> None:
    file.write_text("".join(line for line in lines().splitlines(True) if not 5 < int(line[17:19]) < 12))
    with pytest.raises(NotMeasured, match=r"hole of 7\.0 s"):
        external_energy_j(read_external(file), LOG, window(2, 20))
    assert external_energy_j(read_external(file), LOG, window(13, 20)) > 0


def test_the_pair_of_clocks_nearest_to_the_window_aligns_the_readings(file: Path) -> None:
    file.write_text(lines())
    # UTC was set back by 2 s after the log was begun: second 12 of the log is second 10 of the day.
    later = SampleLog(LOG.header, clocks=(ClockPair(STARTED_NS + 12 * NS_PER_S, "2026-07-14T10:00:10Z"),))
    assert external_energy_j(read_external(file), later, window(12, 22)) == pytest.approx(1150)
