"""A gate: whether something became worse by more than a threshold, as surely as the cycles allow to say."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lem.config.problems import did_you_mean
from lem.errors import UserError
from lem.reasons import Reason
from lem.results.bootstrap import CONFIDENCE
from lem.results.effect import Effect
from lem.results.metrics import METRICS, Metric
from lem.results.statistics import student_t_quantile
from lem.units import parse_percentage

__all__ = [
    "MOST_FURTHER_CYCLES",
    "Gate",
    "Judgement",
    "Verdict",
    "cycles_to_settle",
    "judge",
    "parse_gate",
    "parse_metric",
]

# What is asked for beyond is no plan: the effect lies on the threshold, as far as can be told.
MOST_FURTHER_CYCLES = 1000

# Short names of what people compare most.
_ALIASES = {
    "energy": "energy_per_output_tok_j",
    "throughput": "output_tok_per_s",
    "ttft": "ttft_p50_s",
    "tpot": "tpot_p50_s",
    "itl": "itl_p50_s",
    "e2e": "e2e_p50_s",
}


class Verdict(enum.Enum):
    """What a gate says of one comparison."""

    BETTER = "better"
    WORSE = "worse"
    WITHIN = "within"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Gate:
    """A metric and the change of it that matters.

    Attributes:
        metric: has a better direction.
        threshold: 0.03 for 3 %: a ratio of more than 1.03 to the worse side is a regression.
    """

    metric: Metric
    threshold: float

    @property
    def bound(self) -> float:
        """The threshold on logs; the same to both sides."""
        return math.log1p(self.threshold)

    def worsening(self, effect: Effect) -> Effect:
        """The effect counted so that more is worse."""
        return dataclasses.replace(effect, log_ratio=-effect.log_ratio) if self.metric.is_higher_better else effect


@dataclass(frozen=True)
class Judgement:
    """What a gate says of one comparison.

    Attributes:
        reason: why it is inconclusive for another cause than too few cycles; None otherwise.
        further_cycles: how many more would settle it if the effect and its spread are as they look; None when it is
            settled, when cycles do not help, and beyond `MOST_FURTHER_CYCLES`.
    """

    gate: Gate
    verdict: Verdict
    reason: Reason | None = None
    further_cycles: int | None = None


def parse_metric(text: str, *, is_for_gate: bool = False) -> Metric:
    """The metric of that name, or of a short one: energy, throughput, ttft, tpot, itl, e2e.

    Raises:
        UserError: there is none, or it has no better direction that a gate could watch.
    """
    known = {metric.name: metric for metric in METRICS if not is_for_gate or metric.is_higher_better is not None}
    name = text.strip()
    metric = known.get(_ALIASES.get(name, name))
    if metric is not None:
        return metric
    if any(metric.name == name for metric in METRICS):
        raise UserError(f"metric {name!r} is neither better high nor better low, so no gate can watch it")
    names = [*_ALIASES, *known]
    raise UserError(f"no metric {name!r}{did_you_mean(name, names)}", f"known: {', '.join(names)}")


def parse_gate(text: str) -> Gate:
    """The gate in `METRIC=3%`.

    Raises:
        UserError: anything else, an unknown metric, a threshold outside 0 to 100 %.
    """
    metric, is_written, percentage = text.strip().partition("=")
    hint = "for example --gate energy_per_output_tok_j=3%"
    if not is_written or not metric:
        raise UserError(f"--gate {text!r} is not METRIC=PERCENT%", hint)
    try:
        threshold = parse_percentage(percentage)
    except ValueError as error:
        raise UserError(f"--gate {text!r}: {error}", hint) from error
    if not 0 < threshold <= 1:
        raise UserError(f"--gate {text!r}: expected more than 0% and at most 100%, got {percentage!r}", hint)
    return Gate(parse_metric(metric, is_for_gate=True), threshold)


def judge(
    questions: Sequence[tuple[Gate, Effect | None, Reason | None]], *, confidence: float = CONFIDENCE
) -> tuple[Judgement, ...]:
    """What the gates say, each of one comparison, so that all verdicts hold together with `confidence`.

    Each claims the one of three regions (worse than the threshold, within it, better than it) that holds its whole t
    interval; the intervals are widened step by step as Holm does, most certain claim first.

    Args:
        questions: gate, effect (None where there is none) and what stands against any verdict, None for nothing.
    """
    alpha = 1 - confidence
    claims = [_claim(gate, effect) if effect is not None and not reason else None for gate, effect, reason in questions]
    order = sorted((index for index, claim in enumerate(claims) if claim), key=lambda index: _p_of(claims[index]))
    settled: dict[int, Verdict] = {}
    for rank, index in enumerate(order):
        verdict, p_value = claims[index] or (Verdict.INCONCLUSIVE, 1.0)
        # Two-sided: the claim excludes one side of a bound, and the other side could have been claimed as well.
        if 2 * p_value * (len(order) - rank) > alpha:
            break
        settled[index] = verdict
    strictest = 1 - alpha / max(len(order), 1)
    return tuple(
        Judgement(gate, settled[index]) if index in settled else _unsettled(gate, effect, reason, strictest)
        for index, (gate, effect, reason) in enumerate(questions)
    )


def cycles_to_settle(effect: Effect, bound: float, confidence: float = CONFIDENCE) -> int | None:
    """How many more cycles would place the whole interval on one side of each bound, if nothing else changes.

    Args:
        effect: with a standard error; of two campaigns each needs the cycles.
        bound: on logs, on both sides of 0.

    Returns:
        None beyond `MOST_FURTHER_CYCLES`.
    """
    if effect.std_error is None or effect.df is None:
        return None
    n = min(effect.n_cycles)
    distance = min(abs(effect.log_ratio - bound), abs(effect.log_ratio + bound))

    def is_enough(further: int) -> bool:
        df = (effect.df or 1) * (n + further - 1) / max(n - 1, 1)
        error = (effect.std_error or 0) * math.sqrt(n / (n + further))
        return student_t_quantile((1 + confidence) / 2, df) * error < distance

    if not is_enough(MOST_FURTHER_CYCLES):
        return None
    low, high = 0, MOST_FURTHER_CYCLES
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _claim(gate: Gate, effect: Effect) -> tuple[Verdict, float] | None:
    """The likeliest of the three claims, and its one-sided p value; None where the error is not known."""
    effect = gate.worsening(effect)
    above, not_below = effect.p_above(gate.bound), effect.p_above(-gate.bound)
    below, not_above = effect.p_below(-gate.bound), effect.p_below(gate.bound)
    if above is None or below is None or not_below is None or not_above is None:
        return None
    claims = (
        (Verdict.WORSE, above),
        (Verdict.BETTER, below),
        (Verdict.WITHIN, max(not_below, not_above)),
    )
    return min(claims, key=lambda claim: claim[1])


def _p_of(claim: tuple[Verdict, float] | None) -> float:
    return claim[1] if claim else 1.0


def _unsettled(gate: Gate, effect: Effect | None, reason: Reason | None, confidence: float) -> Judgement:
    if reason or effect is None:
        return Judgement(gate, Verdict.INCONCLUSIVE, reason or Reason.of("nothing_to_compare"))
    if effect.std_error is None:
        return Judgement(gate, Verdict.INCONCLUSIVE, Reason.of("one_cycle"))
    return Judgement(gate, Verdict.INCONCLUSIVE, None, cycles_to_settle(effect, gate.bound, confidence))
