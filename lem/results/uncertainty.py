"""The combined uncertainty of an energy, or of a ratio of two (GUM): the spread of cycles and what the meter adds.

An error that differs from window to window is in the spread of the cycles already, so it is not counted again [GUM
4.3.10]; one that all windows share does not show there, and does not average out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lem.base.dataclass import dataclass
from lem.base.doc import Column, Table
from lem.base.measurement import EDGES, SENSOR, Measured, known, parts_of_source
from lem.base.reasons import Reason
from lem.base.units import ABSENT, fmean, percent, plain
from lem.record import Energy, Record
from lem.results.metrics import Metric
from lem.results.stats import CONFIDENCE, Effect, paired_effect
from lem.results.student import student_t_quantile

CYCLES = "cycles"  # the cause beside those of `Energy.uncertainty_budget_j`
# The lag of one counter is the same in all windows, so only the difference of what it costs matters to a ratio.
_LAG = "lag"
_NET = "gpu_energy_net_j"  # the field of a metric that has a budget of its own
_NO_METER: Measured[Any] = Measured(None, Reason.of("no_meter_uncertainty"))
# Where there is no interval over the cycles either, which says why.
_EVIDENT = frozenset({"no_meter_uncertainty", "one_cycle", "no_interval", "no_ratio", "nothing_to_compare"})
_MOST_DF = 1e6  # beyond it, Student's t is the normal distribution

COMBINED_NOTE = (
    "combined: 95 % uncertainty of the geometric mean or ratio from the spread of cycles and all errors of the meter "
    "that cycles share (GUM); --budget lists them."
)

Causes = Mapping[str, float]
"""Relative standard uncertainties (k = 1) by cause, which add up as squares."""


@dataclass(frozen=True)
class Combined:
    centre: float  # the geometric mean, or the ratio
    budget: Causes  # `cycles` among them
    df: float  # effective degrees of freedom
    confidence: float = CONFIDENCE

    @property
    def standard(self) -> float:
        return math.hypot(*self.budget.values())

    @property
    def factor(self) -> float:
        return student_t_quantile((1 + self.confidence) / 2, self.df)

    @property
    def expanded(self) -> float:
        """How far the upper end lies above the centre, over the centre."""
        return math.expm1(min(self.factor * self.standard, 700.0))

    @property
    def interval(self) -> tuple[float, float]:
        return self.centre / (1 + self.expanded), self.centre * (1 + self.expanded)

    @property
    def text(self) -> str:
        return f"±{percent(self.expanded)}"


def combine(effect: Effect, causes: Causes, confidence: float = CONFIDENCE) -> Combined:
    """The uncertainty over cycles with common causes; degrees of freedom by Welch and Satterthwaite. [GUM G.4.1]"""
    spread = effect.std_error or 0.0
    budget = {CYCLES: spread, **causes}
    df = (effect.df or 1) * (math.hypot(*budget.values()) / spread) ** 4 if spread else _MOST_DF
    return Combined(effect.ratio, budget, min(df, _MOST_DF), confidence)


def uncertainty_of(
    metric: Metric, records: Sequence[Record], values: Sequence[float], confidence: float, no_interval: Reason | None
) -> Measured[Combined]:
    if metric.group != "energy":
        return _NO_METER
    if len(values) == 1:
        return known(None, "one_cycle")
    if not values or min(values) <= 0:
        return known(None, "no_ratio" if values else "nothing_to_compare")
    if no_interval is not None:
        return known(None, no_interval)
    causes = common_causes(metric, records)
    if causes.value is None:
        return Measured(None, causes.null_reason)
    return of_effect(paired_effect(values, [1.0] * len(values)), causes, None, confidence)


def common_causes(metric: Metric, records: Sequence[Record]) -> Measured[Causes]:
    """What every window of these records shares, on average; absent as soon as it is unknown for one of them."""
    if metric.group != "energy":
        return _NO_METER
    found = []
    for record in records:
        if metric.read(record)[0] is None:
            continue
        budget = _budget_of(metric, record.energy)
        if budget.value is None:
            return Measured(None, budget.null_reason)
        energy_j = record.energy.gpu_energy_net_j if metric.field == _NET else record.energy.primary_j.value
        if energy_j is None or energy_j <= 0:
            return known(None, "no_ratio")
        found.append({cause: part_j / energy_j for cause, part_j in budget.value.items() if cause != EDGES})
    names = dict.fromkeys(cause for causes in found for cause in causes)
    return Measured({name: fmean(causes.get(name, 0.0) for causes in found) for name in names})


def _budget_of(metric: Metric, energy: Energy) -> Measured[Mapping[str, float]]:
    if metric.field == _NET:
        return energy.measured("net_uncertainty_budget_j")
    parts = ("total_j", *parts_of_source(energy.energy_source or ""))
    if metric.section == "energy" and metric.field not in parts:
        return known(None, "accuracy_unknown")
    return energy.measured("uncertainty_budget_j")


def ratio_causes(below: Measured[Causes], above: Measured[Causes], *, is_on_same_cards: bool) -> Measured[Causes]:
    """What is common to all cycles of a ratio of two configurations."""
    # The error of the sensors divides out if both were measured on the same cards.
    if below.value is None or above.value is None:
        return below if below.value is None else above
    found = _added(below.value, above.value)
    if is_on_same_cards:
        found.pop(SENSOR, None)
        if _LAG in found:
            found[_LAG] = abs(below.value.get(_LAG, 0.0) - above.value.get(_LAG, 0.0))
    return Measured(found)


def over_anchor(*ratios: Measured[Causes]) -> Measured[Causes]:
    """What is common to all cycles of one ratio over another, which were measured at different times."""
    unknown = next((ratio for ratio in ratios if ratio.value is None), None)
    return unknown or Measured(_added(*(ratio.value for ratio in ratios if ratio.value is not None)))


def _added(*each: Causes) -> dict[str, float]:
    names = dict.fromkeys(name for causes in each for name in causes)
    return {name: math.hypot(*(causes.get(name, 0.0) for causes in each)) for name in names}


def of_effect(
    effect: Effect | None, causes: Measured[Causes], reason: Reason | None, confidence: float = CONFIDENCE
) -> Measured[Combined]:
    if effect is None or effect.std_error is None:
        return known(None, reason or "nothing_to_compare")
    if causes.value is None:
        return Measured(None, causes.null_reason)
    return Measured(combine(effect, causes.value, confidence))


def combined_document(found: Measured[Combined] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    if found.value is None:
        return {"null_reason": found.null_reason and found.null_reason.text}
    low, high = found.value.interval
    facts = {"standard_ratio": found.value.standard, "coverage_factor": found.value.factor, "df": found.value.df}
    return {"ci_lower": low, "ci_upper": high, **facts, "budget": dict(found.value.budget)}


def budget_table(named: Sequence[tuple[str, Measured[Combined] | None]], heading: str) -> Table | None:
    rows = [(name, found.value) for name, found in named if found is not None and found.value is not None]
    causes = dict.fromkeys(cause for _, found in rows for cause in found.budget)
    shares = {cause: tuple(_share(found.budget.get(cause)) for _, found in rows) for cause in causes}
    columns = [
        *(Column(cause.replace("_", "\n"), cells) for cause, cells in shares.items()),
        Column("all", tuple(_share(found.standard) for _, found in rows)),
        Column("k", tuple(f"{found.factor:.2f}" for _, found in rows)),
        Column("combined", tuple(found.text for _, found in rows)),
    ]
    return Table("#", tuple(name for name, _ in rows), tuple(columns), heading) if rows else None


def why_unknown(found: Iterable[Measured[Combined] | None]) -> list[str]:
    reasons = (item.null_reason for item in found if item is not None and item.null_reason is not None)
    return list(dict.fromkeys(reason.text for reason in reasons if reason.code not in _EVIDENT))


def _share(share: float | None) -> str:
    return ABSENT if share is None else plain(100 * share, ".2g")
