"""A comparison in words and cells: one sentence, tables, notes; how they are laid out is `compare_view`'s."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lem.base import units
from lem.base.doc import NAMES_SHOWN, Column
from lem.base.reasons import Reason
from lem.base.units import ABSENT, some_of
from lem.results.aggregation import estimate_note
from lem.results.compare import SIGNIFICANCE, Comparison, Pair, Row, RunResults, Subject
from lem.results.effect import MOST_FURTHER_CYCLES, Gate, Judgement, Verdict
from lem.results.metrics import Metric
from lem.results.precision import UNACCOUNTED
from lem.results.run import differing_settings, shared_settings

_DECIMALS = (2, 4)
# Names stand under the heading and want the rest of the 80 columns.
_HEADING_WIDTH = 20


@dataclass(frozen=True)
class Table:
    """A table: its heading, the names of its rows, its columns."""

    heading: str
    names: tuple[str, ...]
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Content:
    """Everything shown, in order.

    Attributes:
        obstacles: what is not comparable.
        headline: the answer in one sentence.
        gates: a line a gate.
        reasons: why there is no verdict, or no interval.
        title, shared: what was compared, and the settings that all have.
        settings, tables: in what they differ; a table a metric.
        notes: what the numbers are.
    """

    obstacles: tuple[str, ...]
    headline: str
    gates: tuple[str, ...]
    reasons: tuple[str, ...]
    title: str
    shared: str
    settings: Table | None
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def content_of(comparison: Comparison) -> Content:
    """The comparison as it is shown."""
    subjects = _labelled_subjects(comparison)
    settings = [subject.settings for _, subject in subjects]
    shared = shared_settings(settings)
    return Content(
        obstacles=tuple(_obstacles(comparison)),
        headline=headline(comparison),
        gates=tuple(_gate_line(comparison, gate) for gate in comparison.gates),
        reasons=tuple(_reasons(comparison)),
        title=_title(comparison),
        shared=" · ".join(_setting(label, value) for label, value in shared.items()),
        settings=_settings_table(subjects),
        tables=tuple(_metric_table(comparison, metric) for metric in comparison.metrics),
        notes=tuple(_notes(comparison)),
    )


def headline(comparison: Comparison) -> str:
    """The answer in one sentence, in the first metric that can be compared."""
    lead = _lead(comparison)
    if lead is None:
        reasons = dict.fromkeys(row.reason for pair in comparison.pairs for row in pair.rows)
        said = "; ".join(reason.text for reason in reasons if reason)
        return f"Nothing can be compared: {said or 'there is only the baseline'}."
    rows = [(pair, row) for pair, row in _rows(comparison, lead) if row.effect]
    if len(comparison.pairs) == 1:
        return _sentence(comparison, *rows[0])
    return _sentence_of_many(comparison, lead, rows)


def _lead(comparison: Comparison) -> Metric | None:
    """The first metric that can be compared."""
    return next(
        (metric for metric in comparison.metrics if any(row.effect for _, row in _rows(comparison, metric))), None
    )


def _told_by_headline(comparison: Comparison) -> set[Reason | None]:
    """The reasons that the headline names."""
    lead = _lead(comparison)
    if lead is None:
        return {row.reason for pair in comparison.pairs for row in pair.rows}
    if len(comparison.pairs) > 1:
        return set()
    return {row.reason for _, row in _rows(comparison, lead) if row.effect and row.p_adjusted is None}


def _run_label(comparison: Comparison, run: RunResults) -> str:
    """What a run is called beside the other one: by its campaign where that tells them apart."""
    names = {item.campaign_name for item in comparison.runs}
    return run.campaign_name if len(names) == len(comparison.runs) else run.run_id


def _sentence(comparison: Comparison, pair: Pair, row: Row) -> str:
    baseline, other = _labels(comparison, pair)
    over = f", over the anchor {comparison.anchor.name}" if comparison.anchor and comparison.anchor.name else ""
    if row.p_adjusted is not None and not row.is_found:
        measured = f"{_times(comparison, row)}{_interval_words(comparison, row)}"
        label = row.metric.lower_label
        return f"No difference in {label} between {other} and {baseline} was found: {measured}{over}."
    relation = row.metric.relation.format(_times(comparison, row))
    text = f"{other} {relation} {baseline}{_interval_words(comparison, row)}{over}"
    if row.p_adjusted is None:
        return f"{text}; no verdict: {row.reason}."
    return text + "."


def _sentence_of_many(comparison: Comparison, metric: Metric, rows: Sequence[tuple[Pair, Row]]) -> str:
    label = metric.lower_label
    sides: dict[str, list[tuple[Pair, Row]]] = {
        "better": [],
        "worse": [],
        "not told apart": [],
        "without a verdict": [],
    }
    for pair, row in rows:
        sides[_side(metric, row)].append((pair, row))
    against = "the run before" if comparison.anchor else comparison.pairs[0].baseline.name
    judged = len(rows) - len(sides["without a verdict"])
    if not judged:
        return f"No verdict on {label} for any of {len(rows)} configurations against {against}."
    # The best, as far as it is better; else the worst, so that bad news is not left to the table.
    side = "better" if sides["better"] else "worse"
    if not sides[side]:
        left = f", {len(rows) - judged} without a verdict" if judged < len(rows) else ""
        return f"None of {judged} configurations was found to differ from {against} in {label}{left}."
    pair, row = min(sides[side], key=lambda item: _goodness(metric, item[1]) * (-1 if side == "better" else 1))
    baseline, other = _labels(comparison, pair)
    answer = f"{other} {metric.relation.format(_times(comparison, row))} {baseline}{_interval_words(comparison, row)}"
    counts = ", ".join(f"{len(found)} {words}" for words, found in sides.items() if found)
    return f"{answer}; of {len(rows)} configurations {counts}."


def _side(metric: Metric, row: Row) -> str:
    if row.p_adjusted is None:
        return "without a verdict"
    if not row.is_found:
        return "not told apart"
    return "better" if _goodness(metric, row) > 0 else "worse"


def _goodness(metric: Metric, row: Row) -> float:
    """How much better, on logs."""
    log_ratio = row.effect.log_ratio if row.effect else 0.0
    return log_ratio if metric.is_higher_better else -log_ratio


def _times(comparison: Comparison, row: Row) -> str:
    """`0.41 ×`."""
    if row.effect is None:
        return ABSENT
    return f"{_ratio(row.effect.ratio, _own_decimals(comparison, row))} ×"


def _interval_words(comparison: Comparison, row: Row) -> str:
    """`, 95 % 0.39–0.43, 5 cycles`."""
    if row.effect is None:
        return ""
    counts = " and ".join(map(str, row.effect.n_cycles))
    cycles = f", {counts} {'cycle' if row.effect.n_cycles == (1,) else 'cycles'}"
    interval = row.effect.interval(comparison.confidence)
    if interval is None:
        return cycles
    return f", {100 * comparison.confidence:g} % {_bounds(interval, _own_decimals(comparison, row))}{cycles}"


def _metric_table(comparison: Comparison, metric: Metric) -> Table:
    rows = list(_rows(comparison, metric))
    known = [decimals for _, row in rows if (decimals := _own_decimals(comparison, row)) is not None]
    decimals = max(known, default=None)
    heading = f"{metric.label}, {metric.unit}" if metric.group != "latency" else metric.label
    heading = "\n".join(textwrap.wrap(heading, _HEADING_WIDTH, break_on_hyphens=False))
    note = estimate_note(subject.aggregate for _, subject in _labelled_subjects(comparison))
    if note and metric.group == "energy":
        heading += f"\n{note}"
    lines = _within_lines if comparison.anchor is None else _across_lines
    names, cells = zip(*lines(comparison, rows, metric, decimals), strict=True)
    return Table(heading, tuple(names), tuple(_columns(comparison, cells)))


_Line = tuple[str, tuple[str, ...]]


def _within_lines(
    comparison: Comparison, rows: Sequence[tuple[Pair, Row]], metric: Metric, decimals: int | None
) -> Iterable[_Line]:
    baseline = comparison.pairs[0].baseline
    estimate = baseline.aggregate.metrics[metric.name]
    mean = baseline.mean(metric)
    reference = ("1", "baseline") if mean is not None else (ABSENT, "")
    yield baseline.name, (str(len(estimate.values)), _mean(metric, mean), *reference, "", "")
    for pair, row in rows:
        n = len(pair.other.aggregate.metrics[metric.name].values)
        yield pair.other.name, (str(n), _mean(metric, row.means[1]), *_effect_cells(comparison, row, decimals))
        if row.all_attempts_ratio is not None:
            yield "· over all attempts", ("", "", _ratio(row.all_attempts_ratio, decimals), "", "", "")


def _across_lines(
    comparison: Comparison, rows: Sequence[tuple[Pair, Row]], metric: Metric, decimals: int | None
) -> Iterable[_Line]:
    for pair, row in rows:
        name = pair.other.name if pair.other.name == pair.baseline.name else f"{pair.baseline.name} → {pair.other.name}"
        yield (
            name,
            (_mean(metric, row.means[0]), _mean(metric, row.means[1]), *_effect_cells(comparison, row, decimals)),
        )


def _columns(comparison: Comparison, cells: Sequence[Sequence[str]]) -> Iterable[Column]:
    percent = f"{100 * comparison.confidence:g} %\nt interval"
    if comparison.anchor is None:
        headings = ["n", "geom.\nmean", "ratio", percent, "p", "verdict"]
    else:
        headings = ["before", "after", "ratio" if not comparison.anchor.name else "ratio over\nanchor", percent, "p"]
        headings.append("verdict")
    for index, heading in enumerate(headings):
        if heading != "verdict" or comparison.gates:
            yield Column(heading, tuple(row[index] for row in cells))


def _effect_cells(comparison: Comparison, row: Row, decimals: int | None) -> tuple[str, ...]:
    if row.effect is None:
        return (ABSENT, ABSENT, ABSENT, _verdict(row.judgement))
    interval = row.effect.interval(comparison.confidence)
    shown = ABSENT if interval is None else _bounds(interval, decimals)
    return (_ratio(row.effect.ratio, decimals), shown, _p(row.p_adjusted), _verdict(row.judgement))


def _verdict(judgement: Judgement | None) -> str:
    if judgement is None:
        return ""
    if judgement.verdict is Verdict.WITHIN:
        return f"within {_percent(judgement.gate)}"
    return str(judgement.verdict.value)


def _p(value: float | None) -> str:
    if value is None:
        return ABSENT
    text = "<0.001" if value < 0.001 else f"{value:.3f}"
    return text if value < SIGNIFICANCE else f"~ {text}"


def _mean(metric: Metric, value: float | None) -> str:
    return units.format_latency(value) if metric.group == "latency" else units.format_quantity(value)


def _ratio(value: float, decimals: int | None) -> str:
    return f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}"


def _bounds(interval: tuple[float, float], decimals: int | None) -> str:
    return f"{_ratio(interval[0], decimals)}–{_ratio(interval[1], decimals)}"


def _own_decimals(comparison: Comparison, row: Row) -> int | None:
    """So many that the width of the interval shows; None without an interval."""
    interval = row.effect.interval(comparison.confidence) if row.effect else None
    if interval is None:
        return None
    width = interval[1] - interval[0]
    needed = math.ceil(-math.log10(width)) if width > 0 else _DECIMALS[1]
    return min(max(needed, _DECIMALS[0]), _DECIMALS[1])


def _settings_table(subjects: Sequence[tuple[str, Subject]]) -> Table | None:
    differing = differing_settings([subject.settings for _, subject in subjects])
    if not differing:
        return None
    table = [Column(label, tuple(value or ABSENT for value in values)) for label, values in differing.items()]
    return Table("Differing settings", tuple(name for name, _ in subjects), tuple(table))


def _labelled_subjects(comparison: Comparison) -> list[tuple[str, Subject]]:
    if comparison.anchor is None:
        first = [comparison.pairs[0].baseline] if comparison.pairs else []
        return [(item.name, item) for item in (*first, *(pair.other for pair in comparison.pairs))]
    found = []
    for pair in comparison.pairs:
        found += list(zip(_labels(comparison, pair), (pair.baseline, pair.other), strict=True))
    return found


def _labels(comparison: Comparison, pair: Pair) -> tuple[str, str]:
    if comparison.anchor is None:
        return pair.baseline.name, pair.other.name
    before, after = (_run_label(comparison, run) for run in comparison.runs)
    return f"{pair.baseline.name} in {before}", f"{pair.other.name} in {after}"


def _title(comparison: Comparison) -> str:
    runs = " against ".join(f"{run.campaign_name} · run {run.run_id}" for run in reversed(comparison.runs))
    count = len(comparison.pairs) + (comparison.anchor is None)
    return f"{runs} · {count} {'configuration' if count == 1 else 'configurations'}"


def _setting(label: str, value: str) -> str:
    return value if label in ("backend", "model", "precision", "traffic", "engine", "GPU") else f"{label} {value}"


def _obstacles(comparison: Comparison) -> Iterable[str]:
    for is_blocking, lead in ((True, "not comparable"), (False, "not the same, but shared with the anchor")):
        found: dict[Reason, list[str]] = {}
        for pair in comparison.pairs:
            for obstacle in pair.obstacles:
                if obstacle.is_blocking == is_blocking:
                    found.setdefault(obstacle.reason, []).append(pair.other.name)
        for reason, names in found.items():
            yield f"{lead}{_of(comparison, names)}: {reason}"


def _reasons(comparison: Comparison) -> Iterable[str]:
    told = {item.reason for pair in comparison.pairs for item in pair.obstacles} | _told_by_headline(comparison)
    names: dict[tuple[str, Reason], dict[str, None]] = {}
    metrics: dict[tuple[str, Reason], dict[Metric, None]] = {}
    for pair in comparison.pairs:
        for row in pair.rows:
            if row.reason and row.reason not in told:
                key = ("no verdict" if row.effect else "not compared", row.reason)
                names.setdefault(key, {})[pair.other.name] = None
                metrics.setdefault(key, {})[row.metric] = None
    for key, found in metrics.items():
        labels = ", ".join(metric.lower_label for metric in found) if len(found) < len(comparison.metrics) else ""
        what, reason = key
        about = f" in {labels}" if labels else ""
        yield f"{what}{about}{_of(comparison, list(names[key]))}: {reason}"


def _gate_line(comparison: Comparison, gate: Gate) -> str:
    found: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}
    for pair, row in _rows(comparison, gate.metric):
        if row.judgement is not None:
            found[row.judgement.verdict].append(pair.other.name + _further(row.judgement))
    words = {Verdict.WITHIN: f"within {_percent(gate)}"}
    order = (Verdict.WORSE, Verdict.INCONCLUSIVE, Verdict.WITHIN, Verdict.BETTER)
    said = [f"{words.get(item, item.value)}: {some_of(found[item], NAMES_SHOWN)}" for item in order if found[item]]
    return f"gate {gate.metric.name}={_percent(gate)}: {'; '.join(said) or 'nothing to judge'}"


def _further(judgement: Judgement) -> str:
    if judgement.verdict is not Verdict.INCONCLUSIVE:
        return ""
    if judgement.reason:
        return " (no verdict)"
    if judgement.further_cycles is None:
        return f" (at the threshold: over {MOST_FURTHER_CYCLES} more cycles)"
    more = judgement.further_cycles
    return f" (about {more} more {'cycle' if more == 1 else 'cycles'} would settle it)"


def _notes(comparison: Comparison) -> Iterable[str]:
    effects = [row.effect for pair in comparison.pairs for row in pair.rows if row.effect]
    if any(effect.std_error is not None for effect in effects):
        percent = f"{100 * comparison.confidence:g} %"
        if comparison.anchor is None:
            yield (
                "ratio: geometric mean of the ratios to the baseline within each cycle; t interval: Student t on "
                f"their logs, it covers {percent} at any n."
            )
        else:
            yield (
                "ratio over anchor: how much the ratio to the anchor changed; t interval: Student t on logs, the "
                f"variances of both runs added (Welch), {percent}."
            )
    if comparison.n_compared:
        yield f"p: of no difference, by Holm over {_comparisons(comparison.n_compared)}; ~: none found."
    if comparison.gates and comparison.n_compared:
        yield "verdict: the whole interval lies there, widened so that all verdicts hold together."
    if any(row.all_attempts_ratio is not None for pair in comparison.pairs for row in pair.rows):
        yield "over all attempts: invalid ones too, as far as they were measured."
    if comparison.anchor is not None:
        yield from _anchor_notes(comparison)
    elif any(metric.group == "energy" for metric in comparison.metrics) and any(
        subject.aggregate.is_by_board_sensors for _, subject in _labelled_subjects(comparison)
    ):
        yield "Energy: board sensors carry ±5 % per card, which divides out on one card."
    for run in comparison.runs:
        if run.stopping is not None:
            of = f" in {_run_label(comparison, run)}" if len(comparison.runs) > 1 else ""
            yield f"Cycles were added{of} {run.stopping.describe()}: {UNACCOUNTED}."
    yield from comparison.missing


def _anchor_notes(comparison: Comparison) -> Iterable[str]:
    anchor = comparison.anchor
    if anchor is None or not anchor.name:
        return
    labels = {metric.name: metric.lower_label for metric in comparison.metrics}
    moved = ", ".join(f"{ratio:.3f} × in {labels[name]}" for name, ratio in anchor.ratios.items())
    yield f"anchor: {anchor.name}, itself {moved}; more than {100 * anchor.tolerance:g} % would allow no verdict."


def _rows(comparison: Comparison, metric: Metric) -> Iterable[tuple[Pair, Row]]:
    return ((pair, row) for pair in comparison.pairs for row in pair.rows if row.metric is metric)


def _of(comparison: Comparison, names: Sequence[str]) -> str:
    return (
        "" if len(comparison.pairs) == 1 or len(names) == len(comparison.pairs) else f" ({some_of(names, NAMES_SHOWN)})"
    )


def _percent(gate: Gate) -> str:
    return f"{100 * gate.threshold:g}%"


def _comparisons(count: int) -> str:
    return "the one comparison" if count == 1 else f"the {count} comparisons"
