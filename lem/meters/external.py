"""A meter of the user's own, at the machine's plug for instance: a CSV of UTC times and power.

Its clock is another one, and what it writes may be the mean of some seconds before. Both are found by comparing its
readings with a meter of this machine, which saw the same work.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from datetime import timezone
from itertools import pairwise
from pathlib import Path

from lem.base import durable
from lem.base.clock import parse_time
from lem.base.dataclass import dataclass
from lem.base.errors import MeterRefused
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.meters.curve import Curve, NotMeasured, Span, trapezoids
from lem.meters.samples import HOLE_PERIODS, SampleLog

_FORM = "expected two columns: UTC time (2026-07-14T10:00:00Z, or seconds since 1970) and power"
_UNIT_HINT = "name it in the first line (time,power_w) or set measurement.external_unit to W, kW or mW"
_UNITS = {"w": "W", "watt": "W", "watts": "W", "kw": "kW", "kilowatt": "kW", "kilowatts": "kW"}
_UNITS |= {"mw": "mW", "milliwatt": "mW", "milliwatts": "mW"}
_WATTS = {"W": 1.0, "kW": 1000.0, "mW": 0.001}

LEAST_READINGS = 60  # in a window: with fewer, its edges matter, and a short dip is missed
LONGEST_WINDOW_S = 600.0  # to which a window is lengthened for them

# How far its clock may be from this machine's, and over how long it may average.
_MOST_AHEAD_S = 10.0
_MEANS_S = (0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0)
_MATTERS = 0.01  # a clock that can change the energy by less need not be found
_LEAST_R2 = 0.5  # of the readings' variance that the other meter must explain
_FINE_S = 0.05
_MOST_COMPARED = 600

# Seconds since 1970 of the years 2001 and 2286; numbers beyond are milliseconds, or no times at all.
_EPOCH_S = (1e9, 1e10)


@dataclass(frozen=True)
class ExternalReadings:
    source: str  # the file, as messages name it
    at_utc_s: tuple[float, ...] = ()  # seconds since 1970, in order
    power_w: tuple[float, ...] = ()
    error: str = ""  # why the file could not be read

    @property
    def period_s(self) -> float | None:
        spacings_s = [after - before for before, after in pairwise(self.at_utc_s)]
        return statistics.median(spacings_s) if len(spacings_s) > 1 else None


@dataclass(frozen=True)
class External:
    source: str  # the file
    energy_j: float
    ahead_s: float = 0.0  # of its clock
    mean_s: float = 0.0  # each reading is the mean of so long before it


def read_external(path: Path, unit: str | None = None) -> ExternalReadings:
    """The readings in a CSV file of UTC time and power, whose first line, or `unit`, states the unit; MeterRefused."""
    # A time is ISO 8601 (UTC if it has no zone) or seconds since 1970. A last line that is still being written is
    # ignored.
    try:
        with durable.open_text(durable.in_home(path)) as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not text in UTF-8"
        text = f"measurement.external_csv: {path}: {reason}"
        raise MeterRefused(text, "name a CSV file of UTC time, watts") from error
    return _parse(text, str(path), unit)


def measure_external(
    readings: ExternalReadings | None, log: SampleLog, span: Span, reference: Sequence[Curve]
) -> External:
    """The energy of the span, on the clock of the log; raises NotMeasured."""
    # `reference` are the curves of meters of this machine, whose sum rose and fell with the work. Where it matters, the
    # readings are compared with it: by which offset of the clock, and as means of how long, they follow it best. What
    # they say beyond it is integrated over the span; for the rest the edges of the reference are used, which are sharp.
    if readings is None:
        raise NotMeasured("external_empty")
    if readings.error:
        raise NotMeasured("external_unreadable", error=readings.error)
    known_ns, known_s = _nearest_pair(log, span)
    at_ns = [known_ns + round((at_s - known_s) * NS_PER_S) for at_s in readings.at_utc_s]
    plain = list(zip(at_ns, readings.power_w, strict=True))
    fit = _Fit() if _is_level(readings, plain, span) else _align(readings, plain, span, reference)
    if not fit.slope:
        return External(readings.source, _integral_j(readings, plain, span))
    grid, ahead_ns, half_ns = _Grid(reference), round(fit.ahead_s * NS_PER_S), round(fit.mean_s / 2 * NS_PER_S)
    means = ((at_ns - ahead_ns, power_w, grid.mean_w(at_ns - ahead_ns, fit.mean_s)) for at_ns, power_w in plain)
    beyond = [(at_ns - half_ns, power_w - fit.slope * mean_w) for at_ns, power_w, mean_w in means if mean_w is not None]
    energy_j = fit.slope * sum(curve.between_j(span) for curve in reference)
    energy_j += _integral_j(readings, beyond, span)
    return External(readings.source, energy_j, fit.ahead_s, fit.mean_s)


def is_short_of(readings: ExternalReadings, log: SampleLog, span: Span, reference: Sequence[Curve]) -> bool:
    if not readings.at_utc_s:
        return True
    try:
        known_ns, known_s = _nearest_pair(log, span)
        if known_ns + (readings.at_utc_s[0] - known_s - _MOST_AHEAD_S) * NS_PER_S > span.opened_ns:
            return False  # what it did not see will not come
        measure_external(readings, log, span, reference)
    except NotMeasured as error:
        return error.reason.code == "external_short"
    return False


def _integral_j(readings: ExternalReadings, rows: Sequence[tuple[int, float]], span: Span) -> float:
    times = [at_ns for at_ns, _ in rows]
    if len(times) < 2 or times[0] > span.opened_ns or times[-1] < span.closed_ns:
        raise NotMeasured("external_short", source=readings.source, how=_coverage(times, span))
    usual_s = statistics.median(after - before for before, after in pairwise(times)) / NS_PER_S

    def why(gap_s: float) -> Reason:
        return Reason.of("external_hole", source=readings.source, gap_s=gap_s)

    found_j = trapezoids(readings.source, rows, HOLE_PERIODS * usual_s, why).between_j(span)
    inside = sum(span.opened_ns <= at_ns <= span.closed_ns for at_ns in times)
    if inside < LEAST_READINGS:
        raise NotMeasured("external_few", source=readings.source, n=inside, needed=LEAST_READINGS)
    return found_j


def _is_level(readings: ExternalReadings, rows: Sequence[tuple[int, float]], span: Span) -> bool:
    found_j = [_integral_j(readings, rows, span)]
    most_ns = round(_MOST_AHEAD_S * NS_PER_S)
    near_w = [power_w for at_ns, power_w in rows if span.opened_ns - most_ns <= at_ns <= span.closed_ns + most_ns]
    if (max(near_w) - min(near_w)) * _MOST_AHEAD_S <= _MATTERS * found_j[0]:
        return True
    for ahead_s in (-_MOST_AHEAD_S, -_MOST_AHEAD_S / 2, _MOST_AHEAD_S / 2, _MOST_AHEAD_S):
        shifted = [(at_ns - round(ahead_s * NS_PER_S), power_w) for at_ns, power_w in rows]
        try:
            found_j.append(_integral_j(readings, shifted, span))
        except NotMeasured:  # no readings there, by which to see what it would be
            return False
    return max(found_j) - min(found_j) <= _MATTERS * abs(found_j[0])


@dataclass(frozen=True)
class _Fit:
    ahead_s: float = 0.0
    mean_s: float = 0.0
    slope: float = 0.0  # W for a W of the reference; 0: without it
    r2: float = 0.0  # the share of the variance that is explained


class _Grid:
    def __init__(self, curves: Sequence[Curve]) -> None:
        self.first_ns = max(math.ceil(curve.at_ns[0]) for curve in curves)
        self.last_ns = last_ns = min(math.floor(curve.at_ns[-1]) for curve in curves)
        self._step_ns = round(_FINE_S * NS_PER_S)
        moments = range(self.first_ns, last_ns, self._step_ns)
        self._energy_j = [sum(curve.value_j(at_ns) for curve in curves) for at_ns in moments]

    def mean_w(self, end_ns: int, mean_s: float) -> float | None:
        after, before = self._at(end_ns), self._at(end_ns - round(mean_s * NS_PER_S))
        return None if after is None or before is None else (after - before) / mean_s

    def _at(self, at_ns: int) -> float | None:
        place, rest = divmod(at_ns - self.first_ns, self._step_ns)
        if not 0 <= place < len(self._energy_j) - 1:
            return None
        here = self._energy_j[place]
        return here + (self._energy_j[place + 1] - here) * rest / self._step_ns


def _align(
    readings: ExternalReadings, rows: Sequence[tuple[int, float]], span: Span, reference: Sequence[Curve]
) -> _Fit:
    if not reference:
        raise NotMeasured("external_unaligned", source=readings.source)
    grid = _Grid(reference)
    # The edges of the window, with what came before and after it, tell most.
    margin_ns = round(6 * _MOST_AHEAD_S * NS_PER_S)
    known = [row for row in rows if grid.first_ns <= row[0] <= grid.last_ns]
    near = [row for row in known if min(abs(row[0] - span.opened_ns), abs(row[0] - span.closed_ns)) < margin_ns]
    near = near[:: 1 + len(near) // _MOST_COMPARED]
    spread = statistics.pvariance([power_w for _, power_w in near]) * len(near) if near else 0.0
    step_s = max(_FINE_S, min(0.5, (readings.period_s or 1.0) / 4))
    count = round(_MOST_AHEAD_S / step_s)
    coarse = [place * step_s for place in range(-count, count + 1)]
    best = max(
        (_fit(near, spread, grid, ahead_s, mean_s) for mean_s in _MEANS_S for ahead_s in coarse), key=lambda it: it.r2
    )
    fine = [best.ahead_s + place * _FINE_S for place in range(-round(step_s / _FINE_S), round(step_s / _FINE_S) + 1)]
    means = [max(_MEANS_S[0], best.mean_s * factor) for factor in (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4)]
    best = max(
        (_fit(near, spread, grid, ahead_s, mean_s) for mean_s in means for ahead_s in fine), key=lambda it: it.r2
    )
    if best.r2 < _LEAST_R2 or best.slope <= 0:
        raise NotMeasured("external_unaligned", source=readings.source)
    if abs(best.ahead_s) >= _MOST_AHEAD_S:
        raise NotMeasured("external_clock", source=readings.source, most_s=_MOST_AHEAD_S)
    return best


def _fit(rows: Sequence[tuple[int, float]], spread: float, grid: _Grid, ahead_s: float, mean_s: float) -> _Fit:
    ahead_ns = round(ahead_s * NS_PER_S)
    means = ((grid.mean_w(at_ns - ahead_ns, mean_s), power_w) for at_ns, power_w in rows)
    pairs = [(mean_w, power_w) for mean_w, power_w in means if mean_w is not None]
    if len(pairs) < LEAST_READINGS // 2:
        return _Fit()
    middle_x = math.fsum(x for x, _ in pairs) / len(pairs)
    middle_y = math.fsum(y for _, y in pairs) / len(pairs)
    xx = math.fsum((x - middle_x) ** 2 for x, _ in pairs)
    xy = math.fsum((x - middle_x) * (y - middle_y) for x, y in pairs)
    if xx <= 0 or spread <= 0:
        return _Fit()
    return _Fit(ahead_s, mean_s, xy / xx, xy * xy / (xx * spread))


def _parse(text: str, source: str, unit: str | None) -> ExternalReadings:
    times: list[float] = []
    powers: list[float] = []
    delimiter = ";" if ";" in text and "," not in text.partition("\n")[0] else ","
    lines = text.splitlines()
    for number, cells in _rows(lines, delimiter, source):
        where = f"measurement.external_csv: {source}:{number}"
        is_header = number == 1 and all(_number(cell) is None and _time(cell) is None for cell in cells[:2])
        if is_header:
            unit = _stated_unit(cells, unit, where)
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
    if unit is None:
        raise MeterRefused(f"measurement.external_csv: {source}: the unit of power is not stated", _UNIT_HINT)
    return ExternalReadings(source, tuple(times), tuple(power * _WATTS[unit] for power in powers))


def _stated_unit(cells: Sequence[str], given: str | None, where: str) -> str | None:
    words = re.findall(r"[A-Za-z]+", cells[1]) if len(cells) > 1 else []
    stated = next((_UNITS[word.lower()] for word in words if word.lower() in _UNITS and word != "MW"), None)
    if stated and given and stated != given:
        text = f"{where}: {cells[1].strip()!r:.80} is in {stated}, and measurement.external_unit is {given}"
        raise MeterRefused(text, "correct one of the two")
    return stated or given


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
        raise MeterRefused(f"{where}: {cells[1].strip()!r:.80} is not a power", _FORM)
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
