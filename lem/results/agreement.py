"""How far the answers of two configurations agree: output ids of greedy runs, request by request.

Two answers are compared if they answer the same request (ids of the prompt, bounds of the output, and whether it goes
on past the end of a text) in the same cycle. A request that several cycles repeat counts once, by the mean over them:
greedy answers hardly vary, so repeats would only make intervals too narrow. The intervals say what other requests of
this kind would give.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.base.answers import OUTPUT_IDS_FILE, Answer, AnswersError, read_answers
from lem.base.dataclass import dataclass
from lem.base.durable import reason_of
from lem.base.measurement import Measured, known
from lem.base.reasons import Reason
from lem.base.units import fmean
from lem.record import Record
from lem.results.bootstrap import bootstrap_ci
from lem.results.run import Configuration
from lem.results.stats import CONFIDENCE
from lem.results.student import regularized_incomplete_beta, student_t_quantile

NOTE = (
    "equal ids: share of requests with the same output ids, with its exact binomial interval (Clopper and Pearson); "
    "common prefix: mean number of tokens before the first difference, with a bootstrap interval. Each different "
    "request counts once, by its mean over cycles; each interval alone covers other requests of this kind with 95 %"
)
_MANY = 1000  # values, above which a bootstrap takes seconds and gives the t interval

_Bounds = tuple[float, float]
# Answers by cycle, prompt and request.
_Key = tuple[int, int, str]
_Answers = Mapping[_Key, tuple[int, ...]]


@dataclass(frozen=True)
class Agreement:
    """Of the answers of a configuration with those of a baseline."""

    requests: int  # different ones that both answered
    answers: int  # of each side, over all cycles
    equal_ratio: float  # share of the requests with equal output ids
    equal_interval: _Bounds
    prefix_tok: float  # mean number of equal tokens at the start
    prefix_interval: Measured[_Bounds]
    output_tok: float  # mean length of the longer answer of each pair

    @property
    def document(self) -> dict[str, Any]:
        low, high = self.prefix_interval.value or (None, None)
        why = self.prefix_interval.null_reason
        return {
            "requests": self.requests,
            "answers": self.answers,
            "equal_ratio": self.equal_ratio,
            "equal_ci_lower": self.equal_interval[0],
            "equal_ci_upper": self.equal_interval[1],
            "prefix_tok": self.prefix_tok,
            "prefix_ci_lower": low,
            "prefix_ci_upper": high,
            "prefix_ci_null_reason": why and why.text,
            "output_tok": self.output_tok,
        }


def agreement_of(baseline: Configuration, other: Configuration) -> Measured[Agreement] | None:
    """None if neither side was to keep its answers."""
    # Of pooled configurations, each member is compared with its counterpart.
    pairs = list(zip(_members(baseline), _members(other), strict=True))
    if not any(item.are_answers_asked for pair in pairs for item in pair):
        return None
    found = []
    for pair in pairs:
        left, right = map(_read, pair)
        if isinstance(left, Reason):
            return known(None, left)
        if isinstance(right, Reason):
            return known(None, right)
        found.append((left, right))
    return _agreement(found)


def repeatability_of(item: Configuration) -> Measured[Agreement] | None:
    """The agreement of its answers in each cycle with those in the next; None if no two cycles have a request."""
    found = []
    for side in map(_read, _members(item)):
        if isinstance(side, Reason):
            return None
        cycles = sorted({cycle for cycle, *_ in side})
        after = dict(zip(cycles[1:], cycles, strict=False))
        found.append((side, {(after[key[0]], *key[1:]): ids for key, ids in side.items() if key[0] in after}))
    agreement = _agreement(found)
    return agreement if agreement.value is not None else None


def _members(item: Configuration) -> Sequence[Configuration]:
    return getattr(item, "members", ()) or (item,)


def _read(item: Configuration) -> _Answers | Reason:
    found: dict[_Key, tuple[int, ...]] = {}
    missing = [record for record in item.used if record.work.output_ids_sha256 is None]
    if missing or not item.used:
        why = missing[0].work.why_none("output_ids_sha256") if missing else Reason.of("no_results")
        return Reason.of("answers_missing", name=item.name, why=why)
    for record in item.used:
        path = Path(item.paths[record.identity.key]).with_name(OUTPUT_IDS_FILE)
        try:
            answers = read_answers(path, str(record.work.output_ids_sha256))
        except (OSError, AnswersError) as error:
            text = str(error) if isinstance(error, AnswersError) else f"{path}: {reason_of(error)}"
            return Reason.of("answers_unread", error=text)
        found |= {_key(record, answer): answer.output_ids for answer in answers}
    return found


def _key(record: Record, answer: Answer) -> _Key:
    is_endless = record.requested.get("ignore_eos") is True
    return record.identity.cycle_index, answer.prompt, f"{answer.request}{' ignore_eos' if is_endless else ''}"


def _agreement(pairs: Iterable[tuple[_Answers, _Answers]]) -> Measured[Agreement]:
    found: dict[str, list[tuple[bool, int, int]]] = {}
    for left, right in pairs:
        for key in left.keys() & right.keys():
            found.setdefault(key[2], []).append(_compared(left[key], right[key]))
    if not found:
        return known(None, "no_same_request")
    # Sorted, since sets have no order, on which a bootstrap depends.
    means = [[fmean(column) for column in zip(*found[request], strict=True)] for request in sorted(found)]
    (equal, prefixes, lengths), n = zip(*means, strict=True), len(found)
    return Measured(
        Agreement(
            requests=n,
            answers=sum(map(len, found.values())),
            equal_ratio=fmean(equal),
            equal_interval=binomial_interval(sum(equal), n),
            prefix_tok=fmean(prefixes),
            prefix_interval=_mean_interval(prefixes),
            output_tok=fmean(lengths),
        )
    )


def _compared(left: Sequence[int], right: Sequence[int]) -> tuple[bool, int, int]:
    same = itertools.takewhile(lambda ids: ids[0] == ids[1], zip(left, right, strict=False))
    return left == right, sum(1 for _ in same), max(len(left), len(right))


def _mean_interval(values: Sequence[float]) -> Measured[_Bounds]:
    if min(values) == max(values):
        return known(None, "no_spread" if len(values) > 1 else "one_request")
    n, mean = len(values), fmean(values)
    if n > _MANY:
        import statistics  # imported here to keep the start-up fast

        margin = student_t_quantile((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(values, mean) / math.sqrt(n)
        return Measured((mean - margin, mean + margin))
    found = bootstrap_ci(values)
    return Measured((found.ci_lower or 0.0, found.ci_upper or 0.0))


def binomial_interval(successes: float, n: int, confidence: float = CONFIDENCE) -> _Bounds:
    """The exact interval of a share, which at 0 of n and n of n has a width, as a bootstrap has not."""
    # [Clopper and Pearson 1934] Its ends are quantiles of beta distributions, which take the mean over repeats too.
    tail = (1 - confidence) / 2
    low = _beta_quantile(tail, successes, n - successes + 1) if successes > 0 else 0.0
    high = _beta_quantile(1 - tail, successes + 1, n - successes) if successes < n else 1.0
    return low, high


def _beta_quantile(probability: float, a: float, b: float) -> float:
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        if regularized_incomplete_beta(a, b, middle, 1 - middle) < probability:
            low = middle
        else:
            high = middle
    return high
