"""Configurations of one run against a baseline, or of two runs over an anchor: ratios, and what may be said of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lem.base.errors import ExitCode
from lem.base.reasons import Reason, alike
from lem.record import Record
from lem.results.aggregation import NO_INTERVAL, ConfigAggregate, aggregate_config
from lem.results.bootstrap import CONFIDENCE
from lem.results.effect import Effect, Gate, Judgement, Verdict, judge, paired_effect
from lem.results.metrics import (
    METRICS,
    Cycles,
    Metric,
    Obstacle,
    blocking_reason,
    by_cycle,
    cycle_values,
    distinct,
    find_obstacles,
    used_cycles,
)
from lem.results.precision import StoppingRule
from lem.results.run import settings_of
from lem.results.stats import holm

# A finding is told as one below this, after Holm.
SIGNIFICANCE = 0.05

_DEFAULT_METRICS = ("energy_per_output_tok_j", "output_tok_per_s", "ttft_p50_s", "e2e_p50_s")
_SHOWN_CAUSES = 2


@dataclass(frozen=True)
class Subject:
    """One configuration in one run.

    Attributes:
        name, config_hash: of the configuration.
        run_id: of the run.
        cycles: the records its figures stand on.
        aggregate: its figures.
        settings: by label, as `settings_of`.
    """

    name: str
    config_hash: str
    run_id: str
    cycles: Cycles
    aggregate: ConfigAggregate
    settings: Mapping[str, str]

    @property
    def used(self) -> tuple[Record, ...]:
        """The records its figures stand on, cycle by cycle."""
        return tuple(record for members in self.cycles.values() for record in members)

    @property
    def n_excluded(self) -> int:
        """Attempts that were invalid and experiments that gave no result."""
        return self.aggregate.n_invalid + self.aggregate.n_failed

    def mean(self, metric: Metric) -> float | None:
        """The geometric mean over the cycles."""
        t_log = self.aggregate.metrics[metric.name].t_log
        return t_log.geometric_mean if t_log else None


@dataclass(frozen=True)
class RunResults:
    """The configurations of one run, in the order in which they ran first.

    Attributes:
        failed: those without any result, and how many experiments of each failed.
        stopping: by which rule cycles were added; None where their number was fixed.
    """

    campaign_name: str
    run_id: str
    subjects: tuple[Subject, ...]
    failed: Mapping[str, int] = field(default_factory=dict)
    stopping: StoppingRule | None = None

    def find(self, name: str) -> Subject | None:
        """The configuration of that name."""
        return next((item for item in self.subjects if item.name == name), None)


@dataclass(frozen=True)
class Row:
    """Two configurations in one metric.

    Attributes:
        means: geometric means of baseline and other.
        effect: other over baseline; None with `reason`.
        raw_ratio: ratio of the means, where `effect` is taken over an anchor.
        all_attempts_ratio: over every attempt, invalid ones too, where it differs.
        reason: why there is no effect, no interval, or no verdict.
        p_adjusted: two-sided, of no difference, after Holm over the whole comparison.
    """

    metric: Metric
    means: tuple[float | None, float | None]
    effect: Effect | None
    raw_ratio: float | None = None
    all_attempts_ratio: float | None = None
    reason: Reason | None = None
    p_adjusted: float | None = None
    judgement: Judgement | None = None

    @property
    def is_found(self) -> bool:
        """A difference was found."""
        return self.p_adjusted is not None and self.p_adjusted < SIGNIFICANCE


@dataclass(frozen=True)
class Pair:
    """Two configurations: `other` is set against `baseline`."""

    baseline: Subject
    other: Subject
    obstacles: tuple[Obstacle, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class AnchorFinding:
    """The configuration that two runs have in common, and what became of it from one to the other.

    Attributes:
        name: empty where there is none.
        ratios: by metric name, later over earlier.
        tolerance: the largest change of it that is taken for one between days.
        reason: why there is none.
    """

    name: str
    ratios: Mapping[str, float]
    tolerance: float
    reason: Reason | None = None


@dataclass(frozen=True)
class Comparison:
    """Everything that `lem compare` shows.

    Attributes:
        runs: one, or two of which the second is set against the first.
        anchor: of two runs; None for one.
        pairs: the first's baseline is that of all when there is one run.
        metrics: in the order in which they are shown.
        n_compared: how many p values Holm adjusted together.
        missing: what could not be compared: configurations without a result or a counterpart.
    """

    runs: tuple[RunResults, ...]
    pairs: tuple[Pair, ...]
    metrics: tuple[Metric, ...]
    gates: tuple[Gate, ...]
    confidence: float
    anchor: AnchorFinding | None = None
    n_compared: int = 0
    missing: tuple[str, ...] = ()


def gate_code(comparison: Comparison, *, is_strict: bool) -> ExitCode:
    """What the gates end with: a confirmed regression, something undecided where that counts, or fine."""
    verdicts = [row.judgement.verdict for pair in comparison.pairs for row in pair.rows if row.judgement]
    if Verdict.WORSE in verdicts:
        return ExitCode.REGRESSION
    is_open = Verdict.INCONCLUSIVE in verdicts or not verdicts or bool(comparison.missing)
    return ExitCode.INCONCLUSIVE if comparison.gates and is_strict and is_open else ExitCode.OK


def gather(
    records: Iterable[Record],
    failed: Mapping[str, int] | None = None,
    *,
    confidence: float = CONFIDENCE,
    metrics: Sequence[Metric] = METRICS,
    stopping: StoppingRule | None = None,
) -> RunResults:
    """The configurations of one run.

    Args:
        records: all its whole results, valid or not, of all attempts.
        failed: per configuration name, how many experiments gave no result.
        metrics: those that will be compared; of thousands of experiments all of them take seconds.
        stopping: as `precision.read_stopping_rule` finds it beside the results.

    Raises:
        ValueError: no records.
    """
    kept = sorted(distinct(records), key=lambda record: (record.identity.order_index, record.identity.cycle_index))
    if not kept:
        raise ValueError("no records: there is nothing to compare")
    by_name: dict[str, list[Record]] = {}
    for record in kept:
        by_name.setdefault(record.identity.config_name, []).append(record)
    subjects = tuple(
        Subject(
            name=name,
            config_hash=members[0].identity.config_hash,
            run_id=members[0].identity.run_id,
            cycles=used_cycles(by_cycle(members)),
            aggregate=aggregate_config(name, members, confidence, (failed or {}).get(name, 0), metrics),
            settings=settings_of(members[0]),
        )
        for name, members in by_name.items()
    )
    lost = {name: count for name, count in (failed or {}).items() if name not in by_name}
    return RunResults(kept[0].identity.campaign_name, kept[0].identity.run_id, subjects, lost, stopping)


def compare_configurations(
    run: RunResults,
    baseline: Subject,
    others: Sequence[Subject],
    *,
    metrics: Sequence[Metric] = (),
    gates: Sequence[Gate] = (),
    confidence: float = CONFIDENCE,
) -> Comparison:
    """Each of `others` against `baseline`, paired within cycles.

    Args:
        metrics: what to compare; none takes those of the gates, and without gates what people look at first.
    """
    chosen = metrics_to_show(metrics, gates, [baseline, *others])
    pairs = [_pair(baseline, other, chosen) for other in others]
    return finished(Comparison((run,), tuple(pairs), chosen, tuple(gates), confidence, missing=without_result(run)))


def without_result(*runs: RunResults) -> tuple[str, ...]:
    """A line for each configuration of which there is no result at all."""
    return tuple(
        f"no result at all: {name} in {run.run_id} ({count} failed)"
        for run in runs
        for name, count in run.failed.items()
    )


def metrics_to_show(
    metrics: Sequence[Metric], gates: Sequence[Gate], subjects: Sequence[Subject]
) -> tuple[Metric, ...]:
    """What was asked for and what is gated; without either what people look at first, as far as it was measured."""
    candidates = candidate_metrics(metrics, gates)
    if metrics or gates:
        return candidates
    measured = tuple(item for item in candidates if sum(subject.mean(item) is not None for subject in subjects) > 1)
    return measured or candidates[:1]


def candidate_metrics(metrics: Sequence[Metric], gates: Sequence[Gate]) -> tuple[Metric, ...]:
    """What was asked for and what is gated; without either what people look at first."""
    asked = tuple(dict.fromkeys((*(gate.metric for gate in gates), *metrics)))
    return asked or tuple(metric for metric in METRICS if metric.name in _DEFAULT_METRICS)


def find_effect(metric: Metric, baseline: Subject, other: Subject) -> tuple[Effect | None, Reason | None]:
    """The ratio of two configurations of one run, and why it or its error is missing; None when neither is."""
    below, above = (cycle_values(metric, item.cycles) for item in (baseline, other))
    shared = [cycle for cycle in below if cycle in above]
    if not shared:
        return None, _no_pairs(metric, baseline, other)
    if min(*below.values(), *above.values()) <= 0:
        return None, Reason.of("no_ratio")
    effect = paired_effect([above[cycle] for cycle in shared], [below[cycle] for cycle in shared])
    if len(shared) > 1 and (baseline.aggregate.is_load_shared or other.aggregate.is_load_shared):
        return effect.without_error(), NO_INTERVAL
    return effect, Reason.of("one_cycle") if len(shared) == 1 else None


def exclusion_reason(*subjects: Subject) -> Reason | None:
    """Why no verdict can be given between configurations of which unequally much was excluded; else None.

    What throttles or fails is a finding about a configuration: what is left of it is not what the other is.
    """
    if len({item.n_excluded for item in subjects}) < 2:
        return None
    causes = "; ".join(f"{item.n_excluded} of {item.name}{_causes(item)}" for item in subjects)
    return Reason.of("unequal_exclusions", causes=causes)


def finished(comparison: Comparison) -> Comparison:
    """The comparison with p values adjusted over all of its rows, and the judgements of its gates."""
    open_rows = [
        (pair_index, row_index, row.effect.p_value)
        for pair_index, pair in enumerate(comparison.pairs)
        for row_index, row in enumerate(pair.rows)
        if not row.reason and row.effect is not None and row.effect.p_value is not None
    ]
    adjusted = holm([p_value for *_, p_value in open_rows])
    p_of = {(pair, row): value for (pair, row, _), value in zip(open_rows, adjusted, strict=True)}
    judged = _judgements(comparison)
    pairs = tuple(
        dataclasses.replace(
            pair,
            rows=tuple(
                dataclasses.replace(row, p_adjusted=p_of.get((index, place)), judgement=judged.get((index, place)))
                for place, row in enumerate(pair.rows)
            ),
        )
        for index, pair in enumerate(comparison.pairs)
    )
    return dataclasses.replace(comparison, pairs=pairs, n_compared=len(open_rows))


def _judgements(comparison: Comparison) -> dict[tuple[int, int], Judgement]:
    gates = {gate.metric: gate for gate in comparison.gates}
    asked = [
        ((pair_index, row_index), (gates[row.metric], row.effect, row.reason))
        for pair_index, pair in enumerate(comparison.pairs)
        for row_index, row in enumerate(pair.rows)
        if row.metric in gates
    ]
    found = judge([question for _, question in asked], confidence=comparison.confidence)
    return {place: judgement for (place, _), judgement in zip(asked, found, strict=True)}


def _pair(baseline: Subject, other: Subject, metrics: Sequence[Metric]) -> Pair:
    obstacles = find_obstacles(baseline.used, other.used)
    excluded = exclusion_reason(baseline, other)
    rows = []
    for metric in metrics:
        effect, reason = find_effect(metric, baseline, other)
        blocking = blocking_reason(obstacles, metric.group)
        rows.append(
            Row(
                metric=metric,
                means=(baseline.mean(metric), other.mean(metric)),
                effect=effect,
                all_attempts_ratio=_all_attempts_ratio(metric, baseline, other),
                reason=(reason if effect is None else None) or blocking or excluded or reason,
            )
        )
    return Pair(baseline, other, obstacles, tuple(rows))


def _all_attempts_ratio(metric: Metric, baseline: Subject, other: Subject) -> float | None:
    """The ratio of the means over all attempts; None where all attempts are those that count."""
    estimates = [item.aggregate.metrics[metric.name] for item in (baseline, other)]
    if not any(estimate.all_attempts for estimate in estimates):
        return None
    means = [
        estimate.all_attempts.geometric_mean
        if estimate.all_attempts
        else estimate.t_log.geometric_mean
        if estimate.t_log
        else None
        for estimate in estimates
    ]
    return means[1] / means[0] if means[0] and means[1] else None


def _no_pairs(metric: Metric, baseline: Subject, other: Subject) -> Reason:
    for subject in (baseline, other):
        estimate = subject.aggregate.metrics[metric.name]
        if estimate.null_reason:
            return Reason.of("not_measured", name=subject.name, why=estimate.null_reason)
    return Reason.of("no_common_cycle")


def _causes(subject: Subject) -> str:
    groups = alike(subject.aggregate.invalid_reasons.items())
    causes = [f"{found[0][0]} × {sum(count for _, count in found)}" for found in groups]
    if subject.aggregate.n_failed:
        causes.append(f"no result × {subject.aggregate.n_failed}")
    more = len(causes) - _SHOWN_CAUSES
    text = "; ".join(causes[:_SHOWN_CAUSES]) + (f" and {more} more" if more > 0 else "")
    return f" ({text})" if text else ""
