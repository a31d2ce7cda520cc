"""Configurations that differ only in the load that is offered to them, and the knee: the highest that keeps the SLO."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from lem.base.doc import Column, Table
from lem.base.reasons import Reason
from lem.base.units import ABSENT, format_quantity, percent, plain
from lem.config.experiment import SLO_LIMITS, SloConfig, TrafficConfig
from lem.config.option import declared
from lem.record import Record
from lem.results.axes import find_axes
from lem.results.configurations import group_of, slo_of
from lem.results.metrics import METRIC_BY_NAME, Cycle
from lem.results.run import ENERGY, Configuration
from lem.results.stats import CONFIDENCE

GOOD_SHARE: Final = METRIC_BY_NAME["good_requests_ratio"]
KNEE_NOTE: Final = (
    "Knee: in each cycle, the highest load up to which every load that was tried kept the SLO; shown is the median of "
    "the cycles. The interval ends at loads that were tried, and contains the true median in at least that share of "
    "campaigns (“covers”). A load at which the queue grows throughout the window does not keep the SLO."
)
# Reasons that the load is the cause of; a result that is invalid for others says nothing about it.
_OVERLOADED: Final = frozenset({"queue_grew", "requests_failed"})
_TRAFFIC = "traffic_simulation"

Bracket = tuple[float, float]
"""The highest load that kept the SLO (0 if none did), and the lowest that did not (inf if all did)."""


@dataclass(frozen=True)
class Knee:
    brackets: tuple[Bracket, ...]  # of each cycle that shows anything; at least one
    is_independent: bool = True  # whether the cycles are replicates

    @property
    def load(self) -> float | None:
        """The median over the cycles, of an even number the lower one, which was tried; None if it is below all."""
        return statistics.median_low([low for low, _ in self.brackets]) or None

    @property
    def coverage(self) -> float | None:
        """In which share of campaigns the interval contains the median knee, at least; None if there is no interval."""
        n = len(self.brackets)
        return _coverage(_rank(n), n) if self.is_independent and n > 1 else None

    @property
    def interval(self) -> Bracket | None:
        """0 is below every load that was tried, inf beyond; between the two ends nothing was tried or decided."""
        # The order statistics of a rank from either end contain the median of any distribution (David and Nagaraja,
        # "Order Statistics", 2003, section 7.1). The knee of a cycle is known between two loads, which only widens it.
        if self.coverage is None:
            return None
        lows, highs = (sorted(ends) for ends in zip(*self.brackets, strict=True))
        rank = _rank(len(self.brackets))
        return lows[rank - 1], highs[-rank]

    @property
    def censored(self) -> Reason | None:
        """Why the knee is no number between two loads that were tried."""
        if self.load is None:
            return Reason.of("knee_below", load=self._first_broken)
        return Reason.of("knee_beyond", load=self.load) if self._first_broken == math.inf else None

    @property
    def _first_broken(self) -> float:
        return statistics.median_low([high for _, high in self.brackets])

    @property
    def text(self) -> str:
        if self.load is None:
            return f"< {plain(self._first_broken, '.4g')}"
        return f"{'≥ ' if self.censored else ''}{plain(self.load, '.4g')}"

    @property
    def interval_text(self) -> str:
        low, high = self.interval or (0.0, math.inf)
        if low and high < math.inf:
            return f"{plain(low, '.4g')} – {plain(high, '.4g')}"
        return f"≥ {plain(low, '.4g')}" if low else f"< {plain(high, '.4g')}" if high < math.inf else "–"


def _rank(n: int) -> int:
    """The largest rank whose interval covers enough; 1 where none does."""
    return max((rank for rank in range(1, n // 2 + 1) if _coverage(rank, n) >= CONFIDENCE), default=1)


def _coverage(rank: int, n: int) -> float:
    return 1 - sum(math.comb(n, below) for below in range(rank)) / float(2 ** (n - 1))


@dataclass(frozen=True)
class Series:
    option: str  # `target_qps` or `concurrency`
    label: str  # what tells it from the other series of its run; empty if there is no other
    levels: tuple[tuple[float, Configuration], ...]  # by load

    @property
    def unit(self) -> str:
        return declared(TrafficConfig)[self.option].unit or ""

    @property
    def loads(self) -> tuple[float, ...]:
        return tuple(load for load, _ in self.levels)

    @cached_property
    def slo(self) -> SloConfig | None:
        """The service levels that its good requests were counted by; None where there are none, or several."""
        found = {slo_of(record) for _, item in self.levels for record in item.records}
        only = found.pop() if len(found) == 1 else None
        return only if only is not None and only.limits_ms else None

    @cached_property
    def knee(self) -> Knee | None:
        """None without service levels, or where no cycle shows whether a load kept them."""
        if self.slo is None:
            return None
        cycles = sorted({cycle for _, item in self.levels for cycle in item.attempts})
        found = [bracket for cycle in cycles if (bracket := self._bracket(cycle, self.slo)) is not None]
        is_shared = any(item.is_load_shared for _, item in self.levels)
        return Knee(tuple(found), not is_shared) if found else None

    def _bracket(self, cycle: Cycle, slo: SloConfig) -> Bracket | None:
        known = {load: kept for load, item in self.levels if (kept := _keeps(item, cycle, slo)) is not None}
        high = min((load for load, kept in known.items() if not kept), default=math.inf)
        return (max((load for load in known if load < high), default=0.0), high) if known else None

    @property
    def at_knee(self) -> Configuration | None:
        """The configuration that ran at the knee."""
        load = self.knee.load if self.knee else None
        return next((item for each, item in self.levels if each == load), None)


def _keeps(item: Configuration, cycle: Cycle, slo: SloConfig) -> bool | None:
    """Whether enough requests were good, and the queue did not grow; None where no result of the cycle shows it."""
    least = slo.attainment_pct / 100
    used = item.cycles.get(cycle, ())
    if any(reason.code == "load_too_high" for record in used for reason in record.validity.warnings):
        return False
    shares = [GOOD_SHARE.read(record)[0] for record in used]
    known = [share for share in shares if share is not None]
    if known and len(known) == len(shares):
        return statistics.fmean(known) >= least
    return False if not used and any(_is_overloaded(it, least) for it in item.attempts.get(cycle, ())) else None


def _is_overloaded(record: Record, least: float) -> bool:
    codes, share = {reason.code for reason in record.validity.invalid_reasons}, GOOD_SHARE.read(record)[0]
    return codes <= _OVERLOADED and ("queue_grew" in codes or (share is not None and share < least))


def slo_text(slo: SloConfig) -> str:
    """`99 % of requests have TTFT ≤ 200 ms and TPOT ≤ 50 ms`."""
    limits = [f"{name[:-3].upper().replace('E2E', 'end-to-end')} ≤ {slo.limits_ms[name]:g} ms" for name in SLO_LIMITS
              if name in slo.limits_ms]  # fmt: skip
    return f"{slo.attainment_pct:g} % of requests have {' and '.join(limits)}"


def share_text(share: float) -> str:
    """Rounded down, since 99.96 % is not all."""
    return f"{math.floor(1000 * share + 1e-9) / 10:g} %"


def find_series(configurations: Iterable[Configuration]) -> tuple[Series, ...]:
    """The configurations with results under traffic that are equal but for their load, where there are several."""
    groups: dict[tuple[Any, ...], dict[float, Configuration]] = {}
    for item in configurations:
        if not item.records:
            continue
        option = "concurrency" if item.records[0].window.traffic_mode == "closed" else "target_qps"
        load = _load_of(item.records[0], option)
        if load is not None:
            key = option, group_of(item.records[0].identity)[1], frozenset(_others(item, option).items())
            groups.setdefault(key, {})[load] = item
    found = [(key[0], sorted(levels.items())) for key, levels in groups.items() if len(levels) > 1]
    labels = _labels([(option, levels[0][1]) for option, levels in found])
    return tuple(Series(option, label, tuple(it)) for (option, it), label in zip(found, labels, strict=True))


def _load_of(record: Record, option: str) -> float | None:
    if record.window.traffic_mode == "closed_batch":
        return None
    traffic = record.requested.get(_TRAFFIC)
    load: Any = traffic.get(option, declared(TrafficConfig)[option].default) if isinstance(traffic, dict) else None
    is_number = isinstance(load, (int, float)) and not isinstance(load, bool)  # and not `${VAR}`
    return float(load) if is_number and load > 0 else None


def _others(item: Configuration, option: str) -> dict[str, str]:
    return {label: value for label, value in item.settings.items() if label != f"{_TRAFFIC}.{option}"}


def _labels(firsts: Sequence[tuple[str, Configuration]]) -> list[str]:
    if len(firsts) < 2:
        return [""] * len(firsts)
    axes = find_axes([_others(item, option) for option, item in firsts])
    return [", ".join(axis.of(place) for axis in axes) or item.name for place, (_, item) in enumerate(firsts)]


def knee_tables(found: Iterable[Series]) -> Iterator[Table]:
    """A table of knees for each kind of load and service levels."""
    by_title: dict[str, list[tuple[Series, Knee]]] = {}
    for item in found:
        if item.knee is not None and item.slo is not None:
            title = f"Knee: highest {item.option} ({item.unit}) at which {slo_text(item.slo)}"
            by_title.setdefault(title, []).append((item, item.knee))
    for title, members in by_title.items():
        knees, at_knee = [knee for _, knee in members], [item.at_knee for item, _ in members]
        energies = [None if item is None else item.estimate(ENERGY).value for item in at_knee]
        table = [
            Column("knee", tuple(knee.text for knee in knees)),
            Column("interval", tuple(knee.interval_text for knee in knees)),
            Column("covers", tuple(f"≥ {percent(it)}" if (it := knee.coverage) else ABSENT for knee in knees)),
            Column("cycles", tuple(str(len(knee.brackets)) for knee in knees)),
            Column("#", tuple(ABSENT if item is None else str(item.number) for item in at_knee)),
            Column("J/tok", tuple(map(format_quantity, energies))),
        ]
        yield Table("configurations", tuple(item.label or "all" for item, _ in members), tuple(table), title)


def knee_notes(found: Sequence[Series]) -> Iterator[str]:
    if any(item.knee for item in found):
        yield KNEE_NOTE
    for item in found:
        if item.knee is not None and (why := item.knee.censored) is not None:
            yield f"Knee{f' of {item.label}' if item.label else ''}: {why}."


def series_document(series: Series) -> dict[str, Any]:
    """The series as JSON values."""
    knee, slo = series.knee, series.slo
    low, high = (knee.interval if knee else None) or (0.0, math.inf)
    return {
        "option": f"{_TRAFFIC}.{series.option}",
        "unit": series.unit,
        "label": series.label,
        "loads": list(series.loads),
        "numbers": [item.number for _, item in series.levels],
        "slo": slo and {**slo.limits_ms, "attainment_pct": slo.attainment_pct},
        "knee": knee
        and {
            "load": knee.load,
            "number": series.at_knee.number if series.at_knee else None,
            "censored": knee.censored and knee.censored.text,
            "censored_code": knee.censored and knee.censored.code,
            "ci_lower": low or None,
            "ci_upper": high if high < math.inf else None,
            "least_coverage": knee.coverage,
            "method": "order statistics of the knees of the cycles",
            "cycles": [{"kept": kept or None, "broken": broken if broken < math.inf else None}
                       for kept, broken in knee.brackets],
        },
    }  # fmt: skip
