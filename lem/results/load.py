"""Configurations that differ only in the load that is offered to them, and the knee: the highest that keeps the SLO."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Final

from lem.base.dataclass import dataclass
from lem.base.doc import Column, Table
from lem.base.reasons import Reason
from lem.base.units import ABSENT, fmean, format_quantity, percent, plural
from lem.config.option import declared
from lem.config.sections import SloConfig, TrafficConfig
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
_LIMITS: Final = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2e_ms": "end-to-end latency"}

LOADS: Final = {"poisson": "target_qps", "constant": "target_qps", "closed": "concurrency"}  # by `traffic_mode`

Bracket = tuple[float, float]
"""The highest load that kept the SLO (0 if none did), and the lowest that did not (inf if all did)."""


@dataclass(frozen=True)
class Knee:
    brackets: tuple[Bracket, ...]  # of each cycle that shows anything; at least one
    is_independent: bool = True  # whether the cycles are replicates

    @property
    def median(self) -> Bracket:
        """Of an even number of cycles the lower one, which was measured."""
        middle = (len(self.brackets) - 1) // 2
        low, high = (sorted(ends)[middle] for ends in zip(*self.brackets, strict=True))
        return low, high

    @property
    def load(self) -> float | None:
        """None if it is not between two loads that were tried: see `censored`."""
        return self.median[0] if self.censored is None else None

    @property
    def coverage(self) -> float | None:
        """In which share of campaigns the interval contains the median knee, at least; None if there is no interval."""
        n = len(self.brackets)
        return _coverage(_rank(n), n) if self.is_independent and n > 1 else None

    @property
    def interval(self) -> Bracket | None:
        # The order statistics of a rank from either end contain the median of any distribution (David and Nagaraja,
        # "Order Statistics", 2003, section 7.1). The knee of a cycle is known between two loads, which only widens it.
        if self.coverage is None:
            return None
        (lows, highs), rank = (sorted(ends) for ends in zip(*self.brackets, strict=True)), _rank(len(self.brackets))
        return lows[rank - 1], highs[-rank]

    @property
    def censored(self) -> Reason | None:
        """Why the knee is not between two loads that were tried."""
        low, high = self.median
        if not low:
            return Reason.of("knee_below", load=high)
        return Reason.of("knee_beyond", load=low) if high == math.inf else None

    @property
    def text(self) -> str:
        return span_text(self.median) if self.load is None else f"{self.load:g}"


def span_text(span: Bracket | None) -> str:
    low, high = span or (0.0, math.inf)
    if high == math.inf:
        return f"≥ {low:g}" if low else ABSENT
    return f"{low:g} – {high:g}" if low else f"< {high:g}"


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

    @cached_property
    def slo(self) -> SloConfig | None:
        """The service levels that its good requests were counted by; None where there are none, or several."""
        found = {slo_of(record) for _, item in self.levels for record in item.records}
        only = found.pop() if len(found) == 1 else None
        return only if only is not None and only.limits_ms else None

    @cached_property
    def knee(self) -> Knee | None:
        """None without service levels, or where no cycle shows whether a load kept them."""
        cycles = sorted({cycle for _, item in self.levels for cycle in item.attempts}) if self.slo else []
        found = tuple(bracket for cycle in cycles if (bracket := self._bracket(cycle)) is not None)
        return Knee(found, not any(item.no_interval for _, item in self.levels)) if found else None

    def _bracket(self, cycle: Cycle) -> Bracket | None:
        least = self.slo.attainment_pct / 100 if self.slo else 1.0
        known = {load: kept for load, item in self.levels if (kept := _keeps(item, cycle, least)) is not None}
        # Where a load keeps it, the window is long enough: only its load leaves a higher one without complete requests.
        lowest = min((load for load, kept in known.items() if kept), default=math.inf)
        known |= {load: False for load, item in self.levels if load > lowest and _is_stuck(item, cycle)}
        high = min((load for load, kept in known.items() if not kept), default=math.inf)
        return (max((load for load in known if load < high), default=0.0), high) if known else None

    @property
    def at_knee(self) -> Configuration | None:
        load = self.knee.load if self.knee else None
        return next((item for each, item in self.levels if each == load), None)


def _keeps(item: Configuration, cycle: Cycle, least: float) -> bool | None:
    """Whether enough requests were good, and the queue did not grow; None where no result of the cycle shows it."""
    used = item.cycles.get(cycle, ())
    if not used:
        return False if any(_is_overloaded(record, least) for record in item.attempts.get(cycle, ())) else None
    if any(reason.code == "load_too_high" for record in used for reason in record.validity.warnings):
        return False
    shares = [share for record in used if (share := GOOD_SHARE.read(record)[0]) is not None]
    return _is_enough(fmean(shares), least) if len(shares) == len(used) else None


def _is_enough(share: float, least: float) -> bool:
    return share > least - 1e-9  # 99.9 / 100 is above 999 / 1000


def _is_stuck(item: Configuration, cycle: Cycle) -> bool:
    found = [{reason.code for reason in it.validity.invalid_reasons} for it in item.attempts.get(cycle, ())]
    return bool(found) and all(codes == {"none_completed"} for codes in found)


def _is_overloaded(record: Record, least: float) -> bool:
    codes, share = {reason.code for reason in record.validity.invalid_reasons}, GOOD_SHARE.read(record)[0]
    return codes <= _OVERLOADED and ("queue_grew" in codes or (share is not None and not _is_enough(share, least)))


def find_series(configurations: Iterable[Configuration]) -> tuple[Series, ...]:
    """The configurations with results under traffic that are equal but for their load, where there are several."""
    # Machines that measured the same have series of their own, also of a load that only one of them has come to.
    known = [(at, it) for it in configurations if it.records and (at := _load_of(it.records[0])) is not None]
    is_replicated = any(group_of(item.records[0].identity)[1] for _, item in known)
    groups: dict[tuple[Any, ...], tuple[dict[str, str], dict[float, Configuration]]] = {}
    for (option, load), item in known:
        others = {label: it for label, it in item.settings.items() if label != f"traffic_simulation.{option}"}
        others |= {"machine": item.records[0].identity.machine} if is_replicated else {}
        groups.setdefault((option, frozenset(others.items())), (others, {}))[1][load] = item
    found = [(key[0], *of) for key, of in groups.items() if len(of[1]) > 1]
    axes = find_axes([others for _, others, _ in found])
    return tuple(
        Series(option, ", ".join(axis.of(place) for axis in axes), tuple(sorted(levels.items())))
        for place, (option, _, levels) in enumerate(found)
    )


def _load_of(record: Record) -> tuple[str, float] | None:
    traffic, option = record.requested.get("traffic_simulation"), LOADS.get(record.window.traffic_mode)
    if option is None or not isinstance(traffic, dict):
        return None
    load: Any = traffic.get(option, declared(TrafficConfig)[option].default)
    is_number = isinstance(load, (int, float)) and not isinstance(load, bool)  # and not `${VAR}`
    return (option, float(load)) if is_number and load > 0 else None


def share_text(share: float) -> str:
    """Rounded down, since 99.96 % is not all."""
    return f"{math.floor(1000 * share + 1e-9) / 10:g} %"


def knee_tables(found: Iterable[Series]) -> Iterator[Table]:
    """A table of knees for each kind of load and service levels."""
    by_title: dict[str, list[tuple[str, ...]]] = {}
    for item in found:
        if (knee := item.knee) is None or item.slo is None:
            continue
        limits = " and ".join(f"{_LIMITS[name]} ≤ {limit:g} ms" for name, limit in item.slo.limits_ms.items())
        levels = f"{item.slo.attainment_pct:g} % of requests have {limits}"
        at_knee, covers = item.at_knee, f"≥ {percent(knee.coverage)}" if knee.coverage else ABSENT
        place = (ABSENT, ABSENT)
        if at_knee is not None:
            place = str(at_knee.number), format_quantity(at_knee.estimate(ENERGY).value)
        row = (item.label or "all", knee.text, span_text(knee.interval), covers, str(len(knee.brackets)), *place)
        by_title.setdefault(f"Knee: highest {item.option} ({item.unit}) at which {levels}", []).append(row)
    for title, rows in by_title.items():
        names, *cells = zip(*rows, strict=True)
        heads = ("knee", "interval", "covers", "cycles", "#", "J/tok")
        yield Table("configurations", names, tuple(map(Column, heads, cells)), title)


def knee_notes(found: Sequence[Series]) -> Iterator[str]:
    if any(item.knee for item in found):
        yield KNEE_NOTE
    for item in found:
        if item.knee is not None and (why := item.knee.censored) is not None:
            yield f"Knee{f' of {item.label}' if item.label else ''}: {why}."
    known = [item for item in found if item.knee is not None and item.slo is not None]
    # Requests of which one may be bad.
    needed = max(
        (100 / (100 - it.slo.attainment_pct) for it in known if it.slo and it.slo.attainment_pct < 100), default=0
    )
    tried = [it.work.tried for each in known for _, item in each.levels for it in item.used]
    if tried and (fewest := min(tried)) < round(needed):
        yield (
            f"Windows have as few as {plural(fewest, 'request')}: with fewer than {needed:.0f}, a single bad one "
            "breaks the SLO. Raise measurement.min_window_sec."
        )


def series_document(series: Series) -> dict[str, Any]:
    knee, slo, document = series.knee, series.slo, None
    if knee is not None:
        low, high = knee.interval or (0.0, math.inf)
        document = {
            "load": knee.load,
            "at_least": knee.censored and (knee.median[0] or None),
            "below": knee.censored and (knee.median[1] if knee.median[1] < math.inf else None),
            "number": series.at_knee.number if series.at_knee else None,
            "censored": knee.censored and knee.censored.text,
            "censored_code": knee.censored and knee.censored.code,
            "ci_lower": low or None,
            "ci_upper": high if high < math.inf else None,
            "least_coverage": knee.coverage,
            "method": "order statistics of the knees of the cycles",
            "cycles": [{"kept": it or None, "broken": end if end < math.inf else None} for it, end in knee.brackets],
        }
    return {
        "option": f"traffic_simulation.{series.option}",
        "unit": series.unit,
        "label": series.label,
        "loads": [load for load, _ in series.levels],
        "numbers": [item.number for _, item in series.levels],
        "slo": slo and {**slo.limits_ms, "attainment_pct": slo.attainment_pct},
        "knee": document,
    }
