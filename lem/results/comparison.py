"""A comparison in words and tables: for a terminal, as Markdown for a pull request, and as JSON."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from lem.base import units
from lem.base.doc import NAMES_SHOWN, Column, Doc, Table, markdown_escaped, markdown_table, text_width, wrapped
from lem.base.log import WIDTH, bounded_width
from lem.base.reasons import Reason
from lem.base.units import ABSENT, plural, some_of
from lem.results.aggregation import row_document
from lem.results.compare import NO_ANCHOR, Comparison, Pair, Row
from lem.results.metrics import Metric, differing_settings, shared_settings
from lem.results.run import Configuration, Run, carbon_basis, coverage_notes, estimate_note
from lem.results.stats import CONFIDENCE, Gate, Judgement, Verdict
from lem.results.student import MOST_CYCLES_PLANNED
from lem.results.trends import SAME_ORDER, autocorrelation_notes, is_same_order
from lem.results.uncertainty import COMBINED_NOTE, budget_table, why_unknown

SCHEMA_VERSION = 1

_CONFIDENCE = f"{100 * CONFIDENCE:g} %"
_LEAST_DECIMALS, _MOST_DECIMALS = 2, 4
_HEADING_WIDTH = 20
_NAME_ROOM = 24  # columns of the table that its names need

_RATIO_NOTE = (
    "ratio: geometric mean of the ratios to the baseline within each cycle; t interval: Student t on their logs"
)
_ANCHORED_RATIO_NOTE = (
    "ratio over anchor: how much the ratio to the anchor changed; t interval: Student t on logs, the variances of "
    "both runs added (Welch)"
)

_FIRM = "␠"  # in the place of a space at which no line may end: before a unit

# What a row says of a configuration.
_SIDES = ("better", "worse", "not distinguishable", "without a verdict")

# Settings that need no label.
_PLAIN_SETTINGS = ("backend", "model", "precision", "traffic", "engine", "GPU")


def render_text(
    comparison: Comparison, *, has_budget: bool = False, is_colour: bool = False, width: int = WIDTH
) -> str:
    """The comparison as text that ends in a newline: obstacles, the answer, tables, notes.

    With `has_budget`, also what the uncertainty of each ratio of energies consists of.
    """
    content = _Content(comparison)
    doc = Doc(bounded_width(width), is_colour=is_colour)

    def hanging(texts: Iterable[str], style: str = "") -> None:
        for text in texts:
            first, *rest = _wrapped(text, doc.width - 2)
            doc.lines([first, *(f"  {line}" for line in rest)], style)

    hanging(content.obstacles(), "red")
    doc.block()
    doc.lines(_wrapped(content.headline(), doc.width), "bold")
    hanging(content.gates())
    hanging(content.reasons(), "yellow")
    doc.block()
    for line in filter(None, content.title()):
        doc.text(line, "dim")
    for table in (*content.tables(doc.width), *(content.budgets() if has_budget else ())):
        doc.block()
        doc.table(table)
    doc.block()
    hanging(content.notes(), "dim")
    return doc.render()


def render_markdown(comparison: Comparison) -> str:
    """The comparison for a comment on a pull request."""
    content = _Content(comparison)
    title, shared = map(markdown_escaped, content.title())
    blocks = [
        [f"**{markdown_escaped(content.headline())}**"],
        [
            *(f"- **{markdown_escaped(text)}**" for text in (*content.obstacles(), *content.gates())),
            *(f"- {markdown_escaped(text)}" for text in content.reasons()),
        ],
        [f"{title}  ", shared],
        *map(markdown_table, content.tables()),
        [f"- {markdown_escaped(text)}" for text in content.notes()],
    ]
    return "\n".join("\n".join(block) + "\n" for block in blocks if block)


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values."""
    anchor = comparison.anchor
    return {
        "schema_version": SCHEMA_VERSION,
        "sentence": _Content(comparison).headline(),
        "confidence": CONFIDENCE,
        "interval_confidence": comparison.interval_confidence,
        "n_compared": comparison.n_compared,
        "is_same_order": any(map(is_same_order, comparison.runs)),
        "runs": [{"campaign_name": run.campaign_name, "run_id": run.run_id} for run in comparison.runs],
        "anchor": anchor
        and {
            "name": anchor.name,
            "ratios": dict(anchor.ratios),
            "tolerance": anchor.tolerance,
            "reason": "" if anchor.name else NO_ANCHOR.text,
        },
        "pairs": [
            {
                "baseline": _configuration_document(pair.baseline),
                "other": _configuration_document(pair.other),
                "obstacles": [item.document for item in pair.obstacles],
                "metrics": {row.metric.name: row_document(row) for row in pair.rows},
            }
            for pair in comparison.pairs
        ],
        "missing": list(comparison.missing),
        "removed": [item.name for run in comparison.runs for item in run.removed],
    }


def _configuration_document(item: Configuration) -> dict[str, Any]:
    facts = {name: getattr(item, name) for name in ("config_hash", "run_id", "n_cycles", "n_invalid", "n_failed")}
    return {"config_name": item.name, **facts, "settings": dict(item.settings)}


class _Content:
    """The parts of a comparison in words and tables."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison
        self._pairs, self._metrics, self._anchor = comparison.pairs, comparison.metrics, comparison.anchor
        self._rows = [row for pair in self._pairs for row in pair.rows if row.metric in self._metrics]
        comparable = {row.metric for row in self._rows if row.effect}
        self._lead = next((metric for metric in self._metrics if metric in comparable), None)
        if self._anchor is None:
            first = [pair.baseline for pair in self._pairs[:1]]
            self._labelled = [(item.name, item) for item in (*first, *(pair.other for pair in self._pairs))]
        else:
            sides = ((self._labels(pair), (pair.baseline, pair.other)) for pair in self._pairs)
            self._labelled = [labelled for labels, items in sides for labelled in zip(labels, items, strict=True)]

    def title(self) -> tuple[str, str]:
        runs = " against ".join(f"{run.campaign_name} · run {run.run_id}" for run in reversed(self._comparison.runs))
        count = len(self._pairs) + (self._anchor is None)
        shared = shared_settings(item.settings for _, item in self._labelled)
        settings = (value if label in _PLAIN_SETTINGS else f"{label} {value}" for label, value in shared.items())
        return f"{runs} · {plural(count, 'configuration')}", " · ".join(settings)

    def headline(self) -> str:
        """The answer in one sentence, in the first metric that can be compared."""
        if self._lead is None:
            texts = "; ".join(reason.text for reason in dict.fromkeys(row.reason for row in self._rows) if reason)
            alone = "there is only the baseline" if self._anchor is None else "the runs have no configuration in common"
            return f"Nothing can be compared: {texts or alone}."
        rows = [(pair, row) for pair, row in self._comparison.rows(self._lead) if row.effect]
        return self._of_one(*rows[0]) if len(self._pairs) == 1 else self._of_many(self._lead, rows)

    def obstacles(self) -> Iterable[str]:
        """What is not comparable, and what a difference may be due to."""
        besides = "confounded" if self._anchor is None else "different"
        leads = ("not comparable", besides, "different, but shared with the anchor")
        found: dict[tuple[str, Reason], list[str]] = {}
        for pair in self._pairs:
            for item in pair.obstacles:
                lead = leads[0 if item.is_blocking else 1 if item.is_confounder else 2]
                found.setdefault((lead, item.reason), []).append(pair.other.name)
        for (lead, reason), names in sorted(found.items(), key=lambda entry: leads.index(entry[0][0])):
            yield f"{lead}{self._whom(names)}: {reason}"

    def reasons(self) -> Iterable[str]:
        """Why there is no verdict, or no interval; each reason once, unless obstacles or headline name it."""
        named: set[Reason | None] = {item.reason for pair in self._pairs for item in pair.obstacles}
        if self._lead is None:
            return
        if len(self._pairs) == 1:
            lead = [row for row in self._rows if row.metric is self._lead]
            named |= {row.reason for row in lead if row.effect and row.p_adjusted is None}
        found: dict[tuple[str, Reason], list[tuple[str, Metric]]] = {}
        for pair in self._pairs:
            for row in pair.rows:
                if row.reason and row.reason not in named:
                    key = ("no verdict" if row.effect else "not compared", row.reason)
                    found.setdefault(key, []).append((pair.other.name, row.metric))
        for (what, reason), whom in found.items():
            names, metrics = (list(dict.fromkeys(column)) for column in zip(*whom, strict=True))
            is_all = len(metrics) == len(self._metrics)
            about = "" if is_all else f" in {', '.join(metric.lower_label for metric in metrics)}"
            yield f"{what}{about}{self._whom(names)}: {reason}"

    def gates(self) -> Iterable[str]:
        for gate in self._comparison.gates:
            found: dict[Verdict, list[str]] = {}
            for pair, row in self._comparison.rows(gate.metric):
                if row.judgement is not None:
                    found.setdefault(row.judgement.verdict, []).append(pair.other.name + _further(row.judgement))
            order = (Verdict.WORSE, Verdict.INCONCLUSIVE, Verdict.WITHIN, Verdict.BETTER)
            parts = [f"{_verdict(gate, item)}: {some_of(found[item], NAMES_SHOWN)}" for item in order if item in found]
            yield f"gate {gate.metric.name}={_percent(gate)}: {'; '.join(parts) or 'nothing to judge'}"

    def tables(self, width: int | None = None) -> list[Table]:
        """In what the configurations differ, in as many tables as the width requires, and a table for each metric."""
        differing = differing_settings([item.settings for _, item in self._labelled])
        settings = [Column(label, tuple(value or ABSENT for value in values)) for label, values in differing.items()]
        names = tuple(name for name, _ in self._labelled)
        parts: list[list[Column]] = [settings] if width is None else _split(settings, width - _NAME_ROOM)
        return [
            *(Table("Differing settings", names, tuple(part)) for part in parts if part),
            *(self._metric_table(it) for it in self._metrics if self._anchor is None or self._comparison.rows(it)),
        ]

    def budgets(self) -> Iterable[Table]:
        """For each energy, what the uncertainty of its ratios consists of."""
        for metric in self._metrics:
            named = [(pair.other.name, row.combined) for pair, row in self._comparison.rows(metric)]
            heading = "\n".join(textwrap.wrap(f"Uncertainty of the ratio, {metric.lower_label}", _HEADING_WIDTH))
            table = budget_table(named, f"{heading},\n% (k = 1)")
            if table is not None:
                yield table

    def notes(self) -> Iterable[str]:
        comparison = self._comparison
        if any(row.effect and row.effect.std_error is not None for row in self._rows):
            yield f"{_RATIO_NOTE if self._anchor is None else _ANCHORED_RATIO_NOTE}; {comparison.coverage}"
            yield from coverage_notes(item for _, item in self._labelled)
        combined = [row.combined for row in self._rows if row.effect]
        if any(found and found.value for found in combined):
            yield COMBINED_NOTE
        if why := why_unknown(combined):
            yield f"Combined uncertainty of the ratio of energies not known: {'; '.join(why)}."
        rows = comparison.rows(self._lead) if self._lead else []
        effects = ((pair.other.name, row.effect) for pair, row in rows if row.effect)
        yield from autocorrelation_notes([(name, it.autocorrelation) for name, it in effects if it.autocorrelation])
        if comparison.n_compared:
            count = "the one comparison" if comparison.n_compared == 1 else f"the {comparison.n_compared} comparisons"
            yield f"p: of no difference, adjusted by Holm over {count}; ~: no difference found."
        if comparison.gates and comparison.n_compared:
            yield "verdict: where the whole interval lies, widened so that all verdicts hold together."
        if any(row.all_attempts_ratio is not None for row in self._rows):
            yield "over all attempts: including invalid ones, as far as they were measured."
        if self._anchor is not None and self._anchor.name:
            labels = {metric.name: metric.lower_label for metric in self._metrics}
            moved = ", ".join(f"{ratio:.3f} × in {labels[name]}" for name, ratio in self._anchor.ratios.items())
            most = f"{100 * self._anchor.tolerance:g} %"
            yield f"anchor: {self._anchor.name}, itself {moved}; a change of more than {most} would rule out a verdict."
        yield from self._energy_notes()
        if any(map(is_same_order, comparison.runs)) and comparison.n_compared:
            yield f"{SAME_ORDER.text.capitalize()}."
        for run in comparison.runs:
            if run.stopping is not None:
                of = f" in {self._run_label(run)}" if len(comparison.runs) > 1 else ""
                yield f"Cycles were added{of} {run.stopping.describe()}: {run.stopping.correction}."
        compared = {item.name for pair in self._pairs for item in (pair.baseline, pair.other)}
        if removed := [it.name for run in comparison.runs for it in run.removed if it.name not in compared]:
            yield f"Removed from the campaign, so not compared: {some_of(removed, NAMES_SHOWN)}."
        yield from comparison.missing

    def _energy_notes(self) -> Iterable[str]:
        if any(metric.section == "carbon" for metric in self._metrics):
            yield f"CO₂e and cost: of the {carbon_basis(item for _, item in self._labelled)}."
        is_energy = self._anchor is None and any(metric.group == "energy" for metric in self._metrics)
        if is_energy and any(item.is_by_board_sensors for _, item in self._labelled):
            yield "Energy: board sensors are off by up to ±5 % per card, which cancels out on one card."

    def _of_one(self, pair: Pair, row: Row) -> str:
        over = f", over the anchor {self._anchor.name}" if self._anchor and self._anchor.name else ""
        if row.p_adjusted is not None and not row.is_found:
            baseline, other = self._labels(pair)
            names = f"{row.metric.lower_label} between {other} and {baseline}"
            return f"No difference in {names} was found: {''.join(_in_words(row))}{over}{self._confounded(pair)}."
        answer = f"{self._answer(pair, row)}{over}"
        return f"{answer}; no verdict: {row.reason}." if row.p_adjusted is None else f"{answer}."

    def _answer(self, pair: Pair, row: Row) -> str:
        baseline, other = self._labels(pair)
        times, within = _in_words(row)
        return f"{other} {row.metric.relation.format(times)} {baseline}{within}{self._confounded(pair)}"

    def _confounded(self, pair: Pair) -> str:
        """What else a difference within a run may be due to."""
        found = [item.reason.text for item in pair.obstacles if item.is_confounder and self._anchor is None]
        return f"; confounded by {', '.join(found)}" if found else ""

    def _of_many(self, metric: Metric, rows: Sequence[tuple[Pair, Row]]) -> str:
        sides = {side: [(pair, row) for pair, row in rows if _side(row) == side] for side in _SIDES}
        against = "the earlier run" if self._anchor else self._pairs[0].baseline.name
        n_open = len(sides["without a verdict"])
        judged = len(rows) - n_open
        if not judged:
            return f"No verdict on {metric.lower_label} for any of {len(rows)} configurations against {against}."
        # The best, if any is better; else the worst, so that bad news is not left to the table.
        side, best = ("better", max) if sides["better"] else ("worse", min)
        if not sides[side]:
            left = f", {n_open} without a verdict" if n_open else ""
            return f"None of {judged} configurations was found to differ from {against} in {metric.lower_label}{left}."
        pair, row = best(sides[side], key=lambda item: _goodness(item[1]))
        counts = ", ".join(f"{len(found)} {words}" for words, found in sides.items() if found)
        return f"{self._answer(pair, row)}; of {len(rows)} configurations {counts}."

    def _metric_table(self, metric: Metric) -> Table:
        rows = self._comparison.rows(metric)
        decimals = max((known for _, row in rows if (known := _decimals(row)) is not None), default=None)
        heading = metric.heading if metric.group != "latency" else metric.label
        heading = "\n".join(textwrap.wrap(heading, _HEADING_WIDTH, break_on_hyphens=False))
        note = estimate_note(item for _, item in self._labelled)
        if note and metric.group == "energy":
            heading += f"\n{note}"
        interval = f"{_CONFIDENCE}\nt interval"
        lines: list[tuple[str, ...]] = []
        if self._anchor is None:
            heads = ["n", "geom.\nmean", "ratio", interval, "combined", "p", "verdict"]
            baseline = self._pairs[0].baseline
            estimate = baseline.estimate(metric)
            reference = ("1", "baseline") if estimate.value is not None else (ABSENT, "")
            lines.append((baseline.name, str(estimate.n), _mean(metric, estimate.value), *reference, "", "", ""))
            for pair, row in rows:
                counted = (str(pair.other.estimate(metric).n), _mean(metric, row.means[1]))
                lines.append((pair.other.name, *counted, *_effect_cells(row, decimals)))
                if row.all_attempts_ratio is not None:
                    ratio = _ratio(row.all_attempts_ratio, decimals)
                    lines.append(("· over all attempts", "", "", ratio, "", "", "", ""))
        else:
            ratio_head = "ratio over\nanchor" if self._anchor.name else "ratio"
            heads = ["before", "after", ratio_head, interval, "combined", "p", "verdict"]
            for pair, row in rows:
                names = dict.fromkeys((pair.baseline.name, pair.other.name))
                means = (_mean(metric, mean) for mean in row.means)
                lines.append((" → ".join(names), *means, *_effect_cells(row, decimals)))
        labels, *cells = zip(*lines, strict=True)
        table = [Column(head, tuple(column)) for head, column in zip(heads, cells, strict=True)]
        hidden = set() if self._comparison.gates else {"verdict"}
        hidden |= set() if any(row.combined and row.combined.value for _, row in rows) else {"combined"}
        return Table(heading, tuple(labels), tuple(column for column in table if column.heading not in hidden))

    def _labels(self, pair: Pair) -> tuple[str, str]:
        if self._anchor is None:
            return pair.baseline.name, pair.other.name
        before, after = map(self._run_label, self._comparison.runs)
        return f"{pair.baseline.name} in {before}", f"{pair.other.name} in {after}"

    def _run_label(self, run: Run) -> str:
        """The name of one of two runs: its campaign, if the two differ, else its ID."""
        runs = self._comparison.runs
        return run.campaign_name if len({item.campaign_name for item in runs}) == len(runs) else run.run_id

    def _whom(self, names: Sequence[str]) -> str:
        return "" if len(self._pairs) in (1, len(names)) else f" ({some_of(names, NAMES_SHOWN)})"


def _side(row: Row) -> str:
    better, worse, close, unknown = _SIDES
    if row.p_adjusted is None:
        return unknown
    return close if not row.is_found else better if _goodness(row) > 0 else worse


def _goodness(row: Row) -> float:
    """How much better, on logs."""
    log_ratio = row.effect.log_ratio if row.effect else 0.0
    return log_ratio if row.metric.is_higher_better else -log_ratio


def _in_words(row: Row) -> tuple[str, str]:
    """`0.41 ×` and `, 95 % 0.39–0.43, 5 cycles`."""
    if row.effect is None:
        return ABSENT, ""
    decimals, interval = _decimals(row), row.interval
    within = "" if interval is None else f", {_CONFIDENCE} {_bounds(interval, decimals)}"
    counts = " and ".join(map(str, row.effect.n_cycles))
    cycles = "cycle" if row.effect.n_cycles == (1,) else "cycles"
    return f"{_ratio(row.effect.ratio, decimals)} ×", f"{within}, {counts} {cycles}"


def _effect_cells(row: Row, decimals: int | None) -> tuple[str, str, str, str, str]:
    verdict = "" if row.judgement is None else _verdict(row.judgement.gate, row.judgement.verdict)
    if row.effect is None:
        return ABSENT, ABSENT, ABSENT, ABSENT, verdict
    interval, p_value = row.interval, row.p_adjusted
    shown = ABSENT if interval is None else _bounds(interval, decimals)
    p_text = ABSENT if p_value is None else f"{'' if row.is_found else '~ '}{p_value:.3f}"
    p_text = "<0.001" if p_value is not None and p_value < 0.001 else p_text
    combined = ABSENT if row.combined is None or row.combined.value is None else row.combined.value.text
    return _ratio(row.effect.ratio, decimals), shown, combined, p_text, verdict


def _mean(metric: Metric, value: float | None) -> str:
    return units.format_latency(value) if metric.group == "latency" else units.format_quantity(value)


def _ratio(value: float, decimals: int | None) -> str:
    return f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}"


def _bounds(interval: tuple[float, float], decimals: int | None) -> str:
    return "–".join(_ratio(bound, decimals) for bound in interval)


def _decimals(row: Row) -> int | None:
    """Enough that the width of the interval shows; None without an interval."""
    interval = row.interval
    if interval is None:
        return None
    width = interval[1] - interval[0]
    needed = math.ceil(-math.log10(width)) if width > 0 else _MOST_DECIMALS
    return min(max(needed, _LEAST_DECIMALS), _MOST_DECIMALS)


def _further(judgement: Judgement) -> str:
    if judgement.verdict is not Verdict.INCONCLUSIVE:
        return ""
    if judgement.reason:
        return " (no verdict)"
    more = judgement.further_cycles
    if more is None:
        return f" (at the threshold: more than {MOST_CYCLES_PLANNED} cycles)"
    return f" (about {plural(more, 'more cycle')} would settle it)"


def _verdict(gate: Gate, verdict: Verdict) -> str:
    return f"within {_percent(gate)}" if verdict is Verdict.WITHIN else verdict.value


def _percent(gate: Gate) -> str:
    return f"{100 * gate.threshold:g}%"


def _wrapped(text: str, width: int) -> list[str]:
    firm = text.replace(" %", f"{_FIRM}%").replace(" ×", f"{_FIRM}×")
    return [line.replace(_FIRM, " ") for line in wrapped(firm, width)]


def _split(settings: Sequence[Column], width: int) -> list[list[Column]]:
    parts: list[list[Column]] = [[]]
    room = width
    for column in settings:
        needed = 2 + max(map(text_width, (column.heading, *column.cells)))
        if parts[-1] and needed > room:
            parts.append([])
            room = width
        parts[-1].append(column)
        room -= needed
    return parts
