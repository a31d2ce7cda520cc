"""Configurations of one run against a baseline, or of two runs over an anchor: ratios and verdicts.

Two runs share no cycles, so whatever separates their days looks like a difference: simulated with 1 % between days, a
naive test of two runs of five cycles is wrong in 58 % of cases. A configuration that both measured and that did not
change went through the same two days: ratios to this anchor are compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

from lem.base.dataclass import dataclass, field, replace
from lem.base.errors import ExitCode, UserError
from lem.base.measurement import Measured
from lem.base.reasons import Reason, alike
from lem.base.units import plain, some_of
from lem.record import Record
from lem.results import stats
from lem.results.agreement import Agreement, agreement_of
from lem.results.comparability import Obstacle, blocking_reason, find_obstacles, obstacles_to
from lem.results.metrics import METRICS, Metric
from lem.results.run import Configuration, Run, make_run
from lem.results.trends import BLOCKS, ran_apart
from lem.results.uncertainty import Causes, Combined, of_effect, over_anchor, ratio_causes

# A difference is found when its p value is below this, after Holm.
SIGNIFICANCE = 0.05

_SHOWN_CAUSES = 2

_OWN_ANCHOR = Reason.of("own_anchor")
NO_ANCHOR = Reason.of("no_anchor")
_NOT_ASKED = Reason.of("not_asked")

_Sides = tuple[Configuration, Configuration]
_Found = tuple[stats.Effect | None, Reason | None]


@dataclass(frozen=True)
class Row:
    metric: Metric
    means: tuple[float | None, float | None]  # geometric means of baseline and other
    effect: stats.Effect | None  # other over baseline; None with `reason`
    interval: tuple[float, float] | None = None  # of the ratio: all of the comparison hold together with 95 %
    raw_ratio: float | None = None  # of the means, where `effect` is taken over an anchor
    all_attempts_ratio: float | None = None  # over every attempt, invalid ones too, where it differs
    reason: Reason | None = None  # why there is no effect, no interval, or no verdict
    p_adjusted: float | None = None  # two-sided, of no difference, after Holm and for the tests before
    judgement: stats.Judgement | None = None
    combined: Measured[Combined] | None = None  # of an energy's ratio: the spread of cycles and the meter together

    @property
    def is_found(self) -> bool:  # a difference
        return self.p_adjusted is not None and self.p_adjusted < SIGNIFICANCE


@dataclass(frozen=True)
class Pair:
    baseline: Configuration
    other: Configuration
    obstacles: tuple[Obstacle, ...]
    rows: tuple[Row, ...]

    @cached_property
    def agreement(self) -> Measured[Agreement] | None:
        """How far the answers agree, read when it is asked for; None without `measurement.agreement`."""
        return agreement_of(self.baseline, self.other)


@dataclass(frozen=True)
class Anchor:
    name: str = ""  # as a wish: empty for the first unchanged one; as what was found: empty where there is none
    # The largest change of the anchor itself that allows a verdict. Between days an unchanged configuration moves by
    # about 1 %; a larger change has another cause.
    tolerance: float = 0.05
    ratios: Mapping[str, float] = field(default_factory=dict)  # found, by metric name: later over earlier


_DEFAULT_ANCHOR = Anchor()


@dataclass(frozen=True)
class Along:
    axis: str
    held: tuple[str, ...]  # the other axes
    with_it: tuple[str, ...] = ()  # options of one value alone, which cannot be held equal
    alone: tuple[str, ...] = ()  # what has no counterpart and was left out


@dataclass(frozen=True)
class Comparison:
    runs: tuple[Run, ...]  # one, or two of which the second is compared with the first
    pairs: tuple[Pair, ...]  # all with the same baseline when there is one run
    metrics: tuple[Metric, ...]  # in the order in which they are shown
    gates: tuple[stats.Gate, ...]
    anchor: Anchor | None = None  # of two runs; None for one
    along: Along | None = None  # then the sides of each pair are `Pooled`
    missing: tuple[str, ...] = ()  # what could not be compared: configurations without a result or a counterpart

    @property
    def n_compared(self) -> int:  # how many p values Holm adjusted together
        return sum(row.p_adjusted is not None for pair in self.pairs for row in pair.rows)

    @cached_property
    def alpha(self) -> float:
        """What all intervals, p values and verdicts together may err: what earlier tests of the runs have left."""
        sides = (item for pair in self.pairs for item in (pair.baseline, pair.other))
        return SIGNIFICANCE * min((item.share for item in sides), default=1)

    @cached_property
    def n_intervals(self) -> int:  # of all that is shown, those without a verdict too
        effects = (row.effect for pair in self.pairs for row in pair.rows if row.metric in self.metrics)
        return sum(effect is not None and effect.std_error is not None for effect in effects)

    @property
    def interval_confidence(self) -> float:
        """Of each interval, so that all of them hold together with 95 % (Bonferroni); Holm has no such intervals."""
        return 1 - self.alpha / max(self.n_intervals, 1)

    @property
    def coverage(self) -> str:
        n, each = self.n_intervals, f"each {plain(100 * self.interval_confidence, '.4g')} %"
        return f"all {n} hold together with 95 % ({each})." if n > 1 else "it covers 95 % at any n."

    def rows(self, metric: Metric) -> list[tuple[Pair, Row]]:
        return [(pair, row) for pair in self.pairs for row in pair.rows if row.metric is metric]


def unmeasured(comparison: Comparison) -> list[Row]:
    rows = (row for pair in comparison.pairs for row in pair.rows if row.judgement)
    return [row for row in rows if row.reason and row.reason.code == "not_measured"]


def gate_code(comparison: Comparison, *, is_lenient: bool = False) -> ExitCode:
    """The exit code of the gates: a confirmed regression, else a metric that was not measured, else undecided."""
    verdicts = {row.judgement.verdict for pair in comparison.pairs for row in pair.rows if row.judgement}
    if stats.Verdict.WORSE in verdicts:
        return ExitCode.REGRESSION
    if unmeasured(comparison):
        return ExitCode.USAGE
    is_open = stats.Verdict.INCONCLUSIVE in verdicts or not verdicts or comparison.missing
    return ExitCode.INCONCLUSIVE if comparison.gates and is_open and not is_lenient else ExitCode.OK


def compare_configurations(
    run: Run,
    baseline: Configuration,
    others: Sequence[Configuration],
    *,
    metrics: Sequence[Metric] = (),
    gates: Sequence[stats.Gate] = (),
    is_whole: bool = False,
) -> Comparison:
    """Each of `others` against `baseline`, within cycles; `is_whole` adds all comparable metrics, without verdicts."""
    chosen, further = metrics_to_show(metrics, gates, [baseline, *others], is_whole=is_whole)
    find = obstacles_to(baseline.used)
    pairs = tuple(
        pair_within(baseline, other, (*chosen, *further), find(other.used, other.conditions)) for other in others
    )
    return finished(Comparison((run,), pairs, chosen, tuple(gates), missing=tuple(without_result(run))))


def compare_runs(
    before: Run,
    after: Run,
    *,
    chosen: _Sides | None = None,
    anchor: Anchor = _DEFAULT_ANCHOR,
    metrics: Sequence[Metric] = (),
    gates: Sequence[stats.Gate] = (),
    is_whole: bool = False,
) -> Comparison:
    """The configurations of two runs over an anchor, or the `chosen` pair; UserError if there is no common anchor."""
    anchors = _find_anchor(before, after, anchor.name, chosen)
    matched, missing = ([chosen], []) if chosen else _match(before, after, anchors)
    shown, further = metrics_to_show(metrics, gates, [item for pair in matched for item in pair], is_whole=is_whole)
    pairs = tuple(_pair_across(pair, anchors, (*shown, *further), anchor.tolerance) for pair in matched)
    found = replace(anchor, name="")
    if anchors is not None:
        ratios = {it.name: stats.ratio_of(value) for it in shown if (value := _raw(it, *anchors)) is not None}
        found = Anchor(anchors[0].name, anchor.tolerance, ratios)
    missing += [] if chosen else without_result(before, after)
    return finished(Comparison((before, after), pairs, shown, tuple(gates), found, missing=tuple(missing)))


def compare(a: Run | Configuration, b: Run | Configuration) -> Comparison:
    """`b` against `a`: two configurations, paired within cycles if of one run; or two runs over an anchor; LemError."""
    if isinstance(a, Run) and isinstance(b, Run):
        if not a.records or not b.records:
            raise UserError("a run without results cannot be compared")
        if a.run_id == b.run_id:
            raise UserError("both are the same run", "compare two of its configurations")
        return compare_runs(a, b)
    if isinstance(a, Run) or isinstance(b, Run):
        raise UserError("a run cannot be compared with a configuration", "compare two runs, or two configurations")
    if not a.records or not b.records:
        raise UserError("a configuration without results cannot be compared")
    if a.run_id != b.run_id:
        raise UserError("configurations of different runs share no cycles", "compare the runs over an anchor")
    return compare_configurations(make_run(a.records, {a.name: a.n_failed}, paths=a.paths), a, [b])


def find_effect(metric: Metric, baseline: Configuration, other: Configuration) -> _Found:
    """The ratio of two configurations of one run, and why it or its error is missing; None when neither is."""
    below, above = baseline.values(metric), other.values(metric)
    shared = [cycle for cycle in below if cycle in above]
    if not shared:
        return None, _why_unmeasured(metric, baseline, other) or Reason.of("no_common_cycle")
    usable = [cycle for cycle in shared if min(below[cycle], above[cycle]) > 0]
    if not usable:
        return None, Reason.of("no_ratio")
    effect = stats.paired_effect([above[cycle] for cycle in usable], [below[cycle] for cycle in usable])
    if not effect.is_representable():
        return None, Reason.of("out_of_range")
    no_interval = baseline.no_interval or other.no_interval
    if len(usable) > 1 and no_interval is not None:
        return replace(effect, std_error=None, df=None), no_interval
    # Zero and less are no accident, so cycles left out for them make the rest a selection: it gets no verdict.
    if dropped := [cycle for cycle in shared if cycle not in usable]:
        cycles = f"{'cycles' if len(dropped) > 1 else 'cycle'} {', '.join(str(number + 1) for *_, number in dropped)}"
        return effect, Reason.of("ratios_dropped", count=len(dropped), total=len(shared), cycles=cycles)
    return effect, Reason.of("one_cycle") if len(usable) == 1 else None


def _why_unmeasured(metric: Metric, *configurations: Configuration) -> Reason | None:
    for item in configurations:
        if why := item.estimate(metric).null_reason:
            return Reason.of("not_measured" if item.used else "never_valid", name=item.name, why=why)
    return None


def exclusion_reason(*configurations: Configuration) -> Reason | None:
    """Why configurations that lost different shares of their cycles get no verdict: the rest is not representative."""
    if len({item.lost_ratio for item in configurations}) < 2:
        return None
    lost = []
    for item in configurations:
        without = {cycle: members for cycle, members in item.attempts.items() if cycle not in item.cycles}
        reasons = (
            (why, cycle) for cycle, them in without.items() for it in them for why in it.validity.invalid_reasons
        )
        causes = [f"{found[0][0]} × {len({cycle for _, cycle in found})}" for found in alike(reasons)]
        causes += [f"no result × {item.n_failed}"] if item.n_failed else []
        text = some_of(causes, _SHOWN_CAUSES, "; ")
        lost.append(f"{item.n_lost} of {item.name}" + (f" ({text})" if text else ""))
    return Reason.of("unequal_exclusions", causes="; ".join(lost))


def without_result(*runs: Run) -> list[str]:
    return [
        f"no results: {item.name} in {run.run_id} ({item.n_failed} failed)"
        for run in runs
        for item in run.configurations
        if not item.records
    ]


def metrics_to_show(
    metrics: Sequence[Metric], gates: Sequence[stats.Gate], configurations: Sequence[Configuration], *, is_whole: bool
) -> tuple[tuple[Metric, ...], tuple[Metric, ...]]:
    asked = tuple(dict.fromkeys((*(gate.metric for gate in gates), *metrics)))
    usual = tuple(metric for metric in METRICS if metric.is_headline)

    chosen = asked or _in_two(usual, configurations) or usual[:1]
    further = [it for it in METRICS if is_whole and it.is_comparable and it not in chosen]
    return chosen, _in_two(further, configurations)


def _in_two(metrics: Iterable[Metric], configurations: Iterable[Configuration]) -> tuple[Metric, ...]:
    """Those of the metrics that two configurations or more measured."""
    counts = dict.fromkeys(metrics, 0)
    for item in configurations:
        if not (rare := [metric for metric, count in counts.items() if count < 2]):
            break
        for metric in rare:
            counts[metric] += bool(item.values(metric))
    return tuple(metric for metric, count in counts.items() if count > 1)


def pair_within(
    baseline: Configuration, other: Configuration, metrics: Sequence[Metric], obstacles: tuple[Obstacle, ...]
) -> Pair:
    sides = baseline, other
    unpaired = exclusion_reason(*sides) or (BLOCKS if ran_apart(baseline, other) else None)
    rows = []
    for metric in metrics:
        estimates = [item.estimate(metric) for item in sides]
        below, above = (item.all_attempts.geometric_mean if item.all_attempts else item.value for item in estimates)
        ratio = above / below if below and above and any(item.all_attempts for item in estimates) else None
        found, blocking = find_effect(metric, *sides), blocking_reason(obstacles, metric.group) or unpaired
        row = _row(metric, sides, found, blocking, causes=_ratio_causes(metric, *sides))
        rows.append(row if ratio is None else replace(row, all_attempts_ratio=ratio))
    return Pair(baseline, other, obstacles, tuple(rows))


def _row(
    metric: Metric, sides: _Sides, found: _Found, blocking: Reason | None = None, causes: Measured[Causes] | None = None
) -> Row:
    effect, reason = found
    means = (sides[0].estimate(metric).value, sides[1].estimate(metric).value)
    combined = None if causes is None else of_effect(effect, causes, reason)
    why = (reason if effect is None else None) or blocking or reason
    return Row(metric, means, effect, reason=why, combined=combined)


def _ratio_causes(metric: Metric, below: Configuration, above: Configuration) -> Measured[Causes]:
    is_on_same_cards = len(below.cards | above.cards) == 1
    return ratio_causes(below.common_causes(metric), above.common_causes(metric), is_on_same_cards=is_on_same_cards)


def _pair_across(sides: _Sides, anchors: _Sides | None, metrics: Sequence[Metric], tolerance: float) -> Pair:
    before, after = sides
    others = anchors if anchors != sides else None
    obstacles = find_obstacles(before.used, after.used, others and (others[0].used, others[1].used))
    rows = []
    for metric in metrics:
        raw = _raw(metric, before, after)
        if others is not None:
            pairs = [*zip(sides, others, strict=True)]
            is_apart = any(ran_apart(*pair) for pair in pairs)
            blocking = blocking_reason(obstacles, metric.group) or exclusion_reason(before, after, *others)
            blocking = blocking or (BLOCKS if is_apart else None)
            causes = over_anchor(*(_ratio_causes(metric, anchor, item) for item, anchor in pairs))
            row = _row(metric, sides, _over_anchor(metric, sides, others, tolerance), blocking, causes=causes)
        else:
            effect = None if raw is None else stats.Effect(raw, None, None, (before.n_cycles, after.n_cycles))
            why = _why_unmeasured(metric, *sides) or (_OWN_ANCHOR if anchors else NO_ANCHOR)
            row = _row(metric, sides, (effect, why))
        rows.append(replace(row, raw_ratio=None if raw is None else stats.ratio_of(raw)))
    return Pair(before, after, obstacles, tuple(rows))


def _over_anchor(metric: Metric, sides: _Sides, anchors: _Sides, tolerance: float) -> _Found:
    (earlier, why_earlier), (later, why_later) = (
        find_effect(metric, anchor, item) for item, anchor in zip(sides, anchors, strict=True)
    )
    if earlier is None or later is None:
        return None, why_earlier if earlier is None else why_later
    raw, moved = _raw(metric, *anchors), None
    if raw is not None and abs(raw) > math.log1p(tolerance):
        moved = Reason.of("anchor_moved", name=anchors[0].name, ratio=math.exp(raw), most_percent=100 * tolerance)
    return stats.anchored_effect(later, earlier), why_earlier or why_later or moved


def _find_anchor(before: Run, after: Run, name: str, chosen: _Sides | None) -> _Sides | None:
    by_hash = {item.config_hash: item for item in after.with_results}
    common = [(item, by_hash[item.config_hash]) for item in before.with_results if item.config_hash in by_hash]
    if name:
        named = next((pair for pair in common if name in (pair[0].name, pair[1].name)), None)
        if named is None:
            known = ", ".join(pair[0].name for pair in common) or "none"
            raise UserError(f"no configuration {name!r} is the same in both runs", f"common to both: {known}")
        return named
    taken = {item.config_hash for item in chosen or ()}
    unchanged = (pair for pair in common if software_of(pair[0].used) == software_of(pair[1].used) and pair[0].used)
    return next((pair for pair in unchanged if pair[0].config_hash not in taken), None)


def software_of(records: Iterable[Record]) -> set[tuple[object, ...]]:
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


def _match(before: Run, after: Run, anchors: _Sides | None) -> tuple[list[_Sides], list[str]]:
    left = [item for item in before.with_results if not anchors or item is not anchors[0]]
    right = [item for item in after.with_results if not anchors or item is not anchors[1]]
    matched: list[_Sides] = []
    keys: tuple[Callable[[Configuration], str], ...] = (lambda item: item.config_hash, lambda item: item.name)
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
    rests = ((before, left), (after, right))
    return matched, [f"only in {run.run_id}: {', '.join(it.name for it in rest)}" for run, rest in rests if rest]


def _raw(metric: Metric, before: Configuration, after: Configuration) -> float | None:
    below, above = before.estimate(metric).value, after.estimate(metric).value
    return stats.log_ratio(above, below) if below and above else None


def finished(comparison: Comparison) -> Comparison:
    rows = [
        row if row.metric in comparison.metrics else replace(row, reason=row.reason or _NOT_ASKED)
        for pair in comparison.pairs
        for row in pair.rows
    ]
    gates = {gate.metric.name: gate for gate in comparison.gates}
    found = ((index, row.effect.p_value) for index, row in enumerate(rows) if row.effect and not row.reason)
    p_values = {index: p_value for index, p_value in found if p_value is not None}
    holms = stats.holm(list(p_values.values()))
    scale = SIGNIFICANCE / comparison.alpha  # so that a p value below `SIGNIFICANCE` is one below what is left
    adjusted = {index: min(1.0, scale * p_value) for index, p_value in zip(p_values, holms, strict=True)}
    questions = [(gates[row.metric.name], row.effect, row.reason) for row in rows if row.metric.name in gates]
    judged = iter(stats.judge(questions, confidence=1 - comparison.alpha))
    confidence = comparison.interval_confidence  # it counts the intervals of all pairs
    done = (
        Row(
            *(row.metric, row.means, row.effect, row.effect.interval(confidence) if row.effect else None),
            *(row.raw_ratio, row.all_attempts_ratio, row.reason, adjusted.get(index)),
            next(judged) if row.metric.name in gates else None,
            row.combined,
        )
        for index, row in enumerate(rows)
    )
    pairs = tuple(replace(pair, rows=tuple(itertools.islice(done, len(pair.rows)))) for pair in comparison.pairs)
    return replace(comparison, pairs=pairs)
