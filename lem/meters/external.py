"""A meter of the user's own, at the machine's plug for instance: a CSV of UTC times and watts."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timezone
from itertools import pairwise
from pathlib import Path

from lem.base import durable
from lem.base.clock import parse_time
from lem.base.errors import MeterRefused
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.meters.curve import HOLE_PERIODS, NotMeasured, Span, trapezoids
from lem.meters.samples import SampleLog

_FORM = "expected two columns: UTC time (2026-07-14T10:00:00Z, or seconds since 1970) and watts"

# Seconds since 1970 of the years 2001 and 2286; numbers beyond are milliseconds, or no times at all.
_EPOCH_S = (1e9, 1e10)


@dataclass(frozen=True)
class ExternalReadings:
    source: str  # the file, as messages name it
    at_utc_s: tuple[float, ...] = ()  # seconds since 1970, in order
    power_w: tuple[float, ...] = ()
    error: str = ""  # why the file could not be read


def read_external(path: Path) -> ExternalReadings:
    """The readings in a CSV file of UTC time and watts; a header line is skipped.

    A time is ISO 8601 (UTC if it has no zone) or seconds since 1970. Further columns are ignored, and so is a last line
    that is still being written: one that is no reading and has no end. Raises MeterRefused: it cannot be read, or
    names the line that is no reading.
    """
    try:
        with durable.open_text(path.expanduser()) as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not text in UTF-8"
        text = f"measurement.external_csv: {path}: {reason}"
        raise MeterRefused(text, "name a CSV file of UTC time, watts") from error
    return _parse(text, str(path))


def external_energy_j(readings: ExternalReadings | None, log: SampleLog, span: Span) -> float:
    """The energy of the span by trapezoids, aligned by the log's nearest pair of clocks; raises NotMeasured."""
    if readings is None:
        raise NotMeasured("external_empty")
    if readings.error:
        raise NotMeasured("external_unreadable", error=readings.error)
    known_ns, known_s = _nearest_pair(log, span)
    at_ns = [known_ns + round((at_s - known_s) * NS_PER_S) for at_s in readings.at_utc_s]
    if len(at_ns) < 2 or at_ns[0] > span.opened_ns or at_ns[-1] < span.closed_ns:
        raise NotMeasured("external_short", source=readings.source, how=_coverage(at_ns, span))
    usual_s = statistics.median(after - before for before, after in pairwise(at_ns)) / NS_PER_S

    def why(gap_s: float) -> Reason:
        return Reason.of("external_hole", source=readings.source, gap_s=gap_s)

    rows = list(zip(at_ns, readings.power_w, strict=True))
    return trapezoids(readings.source, rows, HOLE_PERIODS * usual_s, why).between_j(span)


def is_short_of(readings: ExternalReadings, log: SampleLog, span: Span) -> bool:
    """Whether the readings end before the span does: their meter may still report it."""
    try:
        known_ns, known_s = _nearest_pair(log, span)
    except NotMeasured:
        return False
    return not readings.at_utc_s or known_ns + (readings.at_utc_s[-1] - known_s) * NS_PER_S < span.closed_ns


def _parse(text: str, source: str) -> ExternalReadings:
    times: list[float] = []
    powers: list[float] = []
    delimiter = ";" if ";" in text and "," not in text.partition("\n")[0] else ","
    lines = text.splitlines()
    for number, cells in _rows(lines, delimiter, source):
        where = f"measurement.external_csv: {source}:{number}"
        is_header = number == 1 and all(_number(cell) is None and _time(cell) is None for cell in cells[:2])
        if is_header or not any(cell.strip() for cell in cells):
            continue
        try:
            at_s, power_w = _reading(cells, where)
        except MeterRefused:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise
        if times and at_s <= times[-1]:
            message = f"{where}: {cells[0].strip()!r:.80} is not later than the line before"
            raise MeterRefused(message, "sort it by time")
        times.append(at_s)
        powers.append(power_w)
    return ExternalReadings(source, tuple(times), tuple(powers))


def _rows(lines: Sequence[str], delimiter: str, source: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:  # a cell of more than 128 KiB; before Python 3.11 also a NUL
        raise MeterRefused(f"measurement.external_csv: {source}:{reader.line_num}: {error}", _FORM) from error


def _reading(cells: list[str], where: str) -> tuple[float, float]:
    if len(cells) < 2:
        raise MeterRefused(f"{where}: {','.join(cells)!r:.80} has one column", _FORM)
    at_s, power_w = _time(cells[0]), _number(cells[1])
    if at_s is None:
        raise MeterRefused(f"{where}: {cells[0].strip()!r:.80} is not a UTC time", _FORM)
    if power_w is None or power_w < 0:
        raise MeterRefused(f"{where}: {cells[1].strip()!r:.80} is not a power in watts", _FORM)
    return at_s, power_w


def _time(cell: str) -> float | None:
    number = _number(cell)
    if number is not None:
        return number if _EPOCH_S[0] <= number < _EPOCH_S[1] else None
    moment = parse_time(cell)
    if moment is None:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _nearest_pair(log: SampleLog, span: Span) -> tuple[int, float]:
    """CLOCK_MONOTONIC in ns and UTC in seconds at one moment, the nearest to the span: UTC may have been set since."""
    pairs = [(log.header.started_ns, log.header.started_utc), *((pair.at_ns, pair.utc) for pair in log.clocks)]
    at_ns, utc = min(pairs, key=lambda pair: abs(pair[0] - span.opened_ns))
    known_s = _time(utc)
    if known_s is None:
        raise NotMeasured("no_utc", utc=utc)
    return at_ns, known_s


def _coverage(at_ns: list[int], span: Span) -> str:
    if not at_ns:
        return "it has no reading"
    late_s, early_s = (at_ns[0] - span.opened_ns) / NS_PER_S, (span.closed_ns - at_ns[-1]) / NS_PER_S
    parts = [f"it begins {late_s:.1f} s after the window opened"] * (late_s > 0)
    parts += [f"it ends {early_s:.1f} s before the window closed"] * (early_s > 0)
    return " and ".join(parts) or "it has one reading"
