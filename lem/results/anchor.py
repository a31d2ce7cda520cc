"""Two runs against each other. They share no cycles, so whatever separates their days looks like a difference.

Simulated with 1 % between days, a naive test of two runs of five cycles is wrong in 58 % of cases. A configuration
that both measured, and that nothing was changed about, went through the same two days: ratios to it are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from lem.base.errors import UserError
from lem.base.reasons import Reason
from lem.record import Record
from lem.results.bootstrap import CONFIDENCE
from lem.results.compare import (
    AnchorFinding,
    Comparison,
    Pair,
    Row,
    RunResults,
    Subject,
    exclusion_reason,
    find_effect,
    finished,
    metrics_to_show,
    without_result,
)
from lem.results.effect import Effect, Gate, anchored_effect
from lem.results.metrics import Metric, blocking_reason, find_obstacles

# Between days an unchanged configuration moves by about 1 %; what moves it by more is no day.
_TOLERANCE = 0.05

_OWN_ANCHOR = Reason.of("own_anchor")
_NO_ANCHOR = Reason.of("no_anchor")


def compare_runs(
    before: RunResults,
    after: RunResults,
    *,
    chosen: tuple[Subject, Subject] | None = None,
    anchor: str = "",
    tolerance: float = _TOLERANCE,
    metrics: Sequence[Metric] = (),
    gates: Sequence[Gate] = (),
    confidence: float = CONFIDENCE,
) -> Comparison:
    """The configurations of `after` against their counterparts in `before`.

    Args:
        chosen: the one pair to compare; None takes every configuration that has a counterpart.
        anchor: the name of the common configuration to set both against; empty takes the first that is unchanged.
        tolerance: the largest change of the anchor itself that a verdict may stand on.

    Raises:
        UserError: no such anchor, or it is not the same configuration in both.
    """
    anchors = _find_anchor(before, after, anchor, chosen)
    matched, notes = ([chosen], []) if chosen else _match(before, after, anchors)
    shown = metrics_to_show(metrics, gates, [subject for pair in matched for subject in pair])
    pairs = tuple(_pair(pair, anchors, shown, tolerance) for pair in matched)
    finding = _finding(anchors, shown, tolerance)
    runs = (before, after)
    missing = (*notes, *(() if chosen else without_result(before, after)))
    return finished(Comparison(runs, pairs, shown, tuple(gates), confidence, finding, missing=missing))


_Anchors = tuple[Subject, Subject] | None


def _find_anchor(before: RunResults, after: RunResults, name: str, chosen: tuple[Subject, Subject] | None) -> _Anchors:
    common = _common(before, after)
    if name:
        named = next((pair for pair in common if name in (pair[0].name, pair[1].name)), None)
        if named is None:
            known = ", ".join(pair[0].name for pair in common) or "none"
            raise UserError(f"no configuration {name!r} is the same in both runs", f"common to both: {known}")
        return named
    taken = {item.config_hash for item in chosen or ()}
    unchanged = [pair for pair in common if _software(pair[0].used) == _software(pair[1].used) and pair[0].used]
    return next((pair for pair in unchanged if pair[0].config_hash not in taken), None)


def _common(before: RunResults, after: RunResults) -> list[tuple[Subject, Subject]]:
    by_hash = {item.config_hash: item for item in after.subjects}
    return [(item, by_hash[item.config_hash]) for item in before.subjects if item.config_hash in by_hash]


def _software(records: Iterable[Record]) -> set[tuple[object, ...]]:
    """What an unchanged configuration runs on; the driver is the machine's, so both sides of a ratio have it."""
    return {
        (
            item.environment.image,
            item.environment.weights_sha256,
            item.environment.model_revision,
            tuple(sorted((name, text) for name, text in item.environment.versions.items() if name != "driver")),
        )
        for item in records
    }


def _match(before: RunResults, after: RunResults, anchors: _Anchors) -> tuple[list[tuple[Subject, Subject]], list[str]]:
    """The pairs to compare: same configuration, else same name, else the only ones left; and who has no counterpart."""
    left = [item for item in before.subjects if not anchors or item is not anchors[0]]
    right = [item for item in after.subjects if not anchors or item is not anchors[1]]
    matched: list[tuple[Subject, Subject]] = []
    keys: tuple[Callable[[Subject], str], ...] = (lambda item: item.config_hash, lambda item: item.name)
    for key in keys:
        for one in list(left):
            other = next((item for item in right if key(item) == key(one)), None)
            if other is not None:
                matched.append((one, other))
                left.remove(one)
                right.remove(other)
    if len(left) == len(right) == 1:
        matched.append((left.pop(), right.pop()))
    if not matched and anchors:
        matched.append(anchors)
    return matched, [
        f"only in {run.run_id}: {', '.join(item.name for item in rest)}"
        for run, rest in ((before, left), (after, right))
        if rest
    ]


def _pair(subjects: tuple[Subject, Subject], anchors: _Anchors, metrics: Sequence[Metric], tolerance: float) -> Pair:
    before, after = subjects
    is_anchored = anchors is not None and anchors != subjects
    obstacles = find_obstacles(before.used, after.used, is_anchored=is_anchored)
    rows = []
    for metric in metrics:
        raw = _raw(metric, before, after)
        if anchors is not None and is_anchored:
            effect, reason = _over_anchor(metric, subjects, anchors, tolerance)
            blocking = blocking_reason(obstacles, metric.group) or exclusion_reason(before, after, *anchors)
        else:
            effect = None if raw is None else Effect(raw, None, None, _counts(subjects))
            reason, blocking = (_OWN_ANCHOR if anchors else _NO_ANCHOR), None
        rows.append(
            Row(
                metric=metric,
                means=(before.mean(metric), after.mean(metric)),
                effect=effect,
                raw_ratio=None if raw is None else math.exp(raw),
                reason=(reason if effect is None else None) or blocking or reason,
            )
        )
    return Pair(before, after, obstacles, tuple(rows))


def _over_anchor(
    metric: Metric, subjects: tuple[Subject, Subject], anchors: tuple[Subject, Subject], tolerance: float
) -> tuple[Effect | None, Reason | None]:
    ratios = []
    for subject, anchor in zip(subjects, anchors, strict=True):
        effect, reason = find_effect(metric, anchor, subject)
        if effect is None:
            return None, reason
        ratios.append((effect, reason))
    (earlier, why_earlier), (later, why_later) = ratios
    return anchored_effect(later, earlier), why_earlier or why_later or _moved(metric, anchors, tolerance)


def _moved(metric: Metric, anchors: tuple[Subject, Subject], tolerance: float) -> Reason | None:
    raw = _raw(metric, *anchors)
    if raw is None or abs(raw) <= math.log1p(tolerance):
        return None
    return Reason.of("anchor_moved", name=anchors[0].name, ratio=math.exp(raw), most_percent=100 * tolerance)


def _finding(anchors: _Anchors, metrics: Sequence[Metric], tolerance: float) -> AnchorFinding:
    if anchors is None:
        return AnchorFinding("", {}, tolerance, _NO_ANCHOR)
    logs = {metric.name: _raw(metric, *anchors) for metric in metrics}
    ratios = {name: math.exp(value) for name, value in logs.items() if value is not None}
    return AnchorFinding(anchors[0].name, ratios, tolerance)


def _raw(metric: Metric, before: Subject, after: Subject) -> float | None:
    """The log of the ratio of the two geometric means; None where one is missing."""
    means = (before.mean(metric), after.mean(metric))
    return math.log(means[1] / means[0]) if means[0] and means[1] else None


def _counts(subjects: tuple[Subject, Subject]) -> tuple[int, ...]:
    return tuple(item.aggregate.n_cycles for item in subjects)
