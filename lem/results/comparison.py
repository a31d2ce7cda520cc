"""A comparison in words and tables: for a terminal, as Markdown for a pull request, and as JSON."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lem.base import units
from lem.base.doc import NAMES_SHOWN, Column, Doc, Table, markdown_escaped, markdown_table, text_width, wrapped
from lem.base.log import WIDTH, bounded_width
from lem.base.reasons import Reason
from lem.base.units import ABSENT, plural, some_of
from lem.results.compare import SIGNIFICANCE, Comparison, Pair, Row
from lem.results.metrics import Metric, differing_settings, shared_settings
from lem.results.run import Configuration, Run, estimate_note
from lem.results.stats import CONFIDENCE, MOST_FURTHER_CYCLES, Gate, Judgement, Verdict
from lem.results.store import UNACCOUNTED

SCHEMA_VERSION = 1

_CONFIDENCE = f"{100 * CONFIDENCE:g} %"
_DECIMALS = (2, 4)
# Names are below the heading and need the rest of the 80 columns.
_HEADING_WIDTH = 20
_NAME_ROOM = 24

_RATIO_NOTE = (
    "ratio: geometric mean of the ratios to the baseline within each cycle; t interval: Student t on their logs, "
    f"it covers {_CONFIDENCE} at any n."
)
_ANCHORED_RATIO_NOTE = (
    "ratio over anchor: how much the ratio to the anchor changed; t interval: Student t on logs, the variances of "
    f"both runs added (Welch), {_CONFIDENCE}."
)

# Takes the place of a space at which no line may end: before a unit.
_FIRM = "␠"

# What a row says of a configuration.
_SIDES = ("better", "worse", "not distinguishable", "without a verdict")

# Settings that need no label.
_PLAIN_SETTINGS = ("backend", "model", "precision", "traffic", "engine", "GPU")


def render_text(comparison: Comparison, *, is_colour: bool = False, width: int = WIDTH) -> str:
    """The comparison as text that ends in a newline: obstacles, the answer, tables, notes."""
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
    for table in [*_narrow(content.settings_table(), doc.width), *map(content.metric_table, comparison.metrics)]:
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
        *(
            markdown_table(table)
            for table in [*content.settings_table(), *map(content.metric_table, comparison.metrics)]
        ),
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
        "n_compared": comparison.n_compared,
        "runs": [{"campaign_name": run.campaign_name, "run_id": run.run_id} for run in comparison.runs],
        "anchor": anchor
        and {
            "name": anchor.name,
            "ratios": dict(anchor.ratios),
            "tolerance": anchor.tolerance,
            "reason": str(anchor.reason or ""),
        },
        "pairs": [
            {
                "baseline": _configuration_document(pair.baseline),
                "other": _configuration_document(pair.other),
                "obstacles": [{"text": item.reason.text, "is_blocking": item.is_blocking} for item in pair.obstacles],
                "metrics": {row.metric.name: _row_document(row) for row in pair.rows},
            }
            for pair in comparison.pairs
        ],
        "missing": list(comparison.missing),
    }


def _configuration_document(item: Configuration) -> dict[str, Any]:
    facts = {name: getattr(item, name) for name in ("config_hash", "run_id", "n_cycles", "n_invalid", "n_failed")}
    return {"config_name": item.name, **facts, "settings": dict(item.settings)}


def _row_document(row: Row) -> dict[str, Any]:
    effect, judgement = row.effect, row.judgement
    low, high = (effect.interval() if effect else None) or (None, None)
    return {
        "unit": row.metric.unit,
        "baseline": row.means[0],
        "other": row.means[1],
        "ratio": effect.ratio if effect else None,
        "ci_lower": low,
        "ci_upper": high,
        "df": effect.df if effect else None,
        "n_cycles": list(effect.n_cycles) if effect else [],
        "p_value": effect.p_value if effect else None,
        "p_holm": row.p_adjusted,
        "raw_ratio": row.raw_ratio,
        "all_attempts_ratio": row.all_attempts_ratio,
        "reason": row.reason and row.reason.text,
        "gate": judgement
        and {
            "threshold": judgement.gate.threshold,
            "verdict": judgement.verdict.value,
            "reason": judgement.reason and judgement.reason.text,
            "further_cycles": judgement.further_cycles,
        },
    }


@dataclass(frozen=True)
class _Content:
    """The parts of a comparison in words and tables."""

    comparison: Comparison

    def title(self) -> tuple[str, str]:
        """What was compared, and the settings that all configurations have."""
        comparison = self.comparison
        runs = " against ".join(f"{run.campaign_name} · run {run.run_id}" for run in reversed(comparison.runs))
        count = len(comparison.pairs) + (comparison.anchor is None)
        shared = shared_settings(item.settings for _, item in self._labelled())
        settings = (value if label in _PLAIN_SETTINGS else f"{label} {value}" for label, value in shared.items())
        return f"{runs} · {plural(count, 'configuration')}", " · ".join(settings)

    def headline(self) -> str:
        """The answer in one sentence, in the first metric that can be compared."""
        lead = self._lead()
        if lead is None:
            reasons = dict.fromkeys(row.reason for pair in self.comparison.pairs for row in pair.rows)
            texts = "; ".join(reason.text for reason in reasons if reason)
            return f"Nothing can be compared: {texts or 'there is only the baseline'}."
        rows = [(pair, row) for pair, row in self.comparison.rows(lead) if row.effect]
        return self._of_one(*rows[0]) if len(self.comparison.pairs) == 1 else self._of_many(lead, rows)

    def obstacles(self) -> Iterable[str]:
        """What is not comparable."""
        for is_blocking, lead in ((True, "not comparable"), (False, "different, but shared with the anchor")):
            found: dict[Reason, list[str]] = {}
            for pair in self.comparison.pairs:
                for obstacle in pair.obstacles:
                    if obstacle.is_blocking == is_blocking:
                        found.setdefault(obstacle.reason, []).append(pair.other.name)
            for reason, names in found.items():
                yield f"{lead}{self._whom(names)}: {reason}"

    def reasons(self) -> Iterable[str]:
        """Why there is no verdict, or no interval; each reason once, unless obstacles or headline name it."""
        named = {item.reason for pair in self.comparison.pairs for item in pair.obstacles} | self._in_headline()
        names: dict[tuple[str, Reason], dict[str, None]] = {}
        metrics: dict[tuple[str, Reason], dict[Metric, None]] = {}
        for pair in self.comparison.pairs:
            for row in pair.rows:
                if row.reason and row.reason not in named:
                    key = ("no verdict" if row.effect else "not compared", row.reason)
                    names.setdefault(key, {})[pair.other.name] = None
                    metrics.setdefault(key, {})[row.metric] = None
        for (what, reason), found in metrics.items():
            is_all = len(found) == len(self.comparison.metrics)
            about = "" if is_all else f" in {', '.join(metric.lower_label for metric in found)}"
            yield f"{what}{about}{self._whom(list(names[what, reason]))}: {reason}"

    def gates(self) -> Iterable[str]:
        """A line for each gate."""
        for gate in self.comparison.gates:
            found: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}
            for pair, row in self.comparison.rows(gate.metric):
                if row.judgement is not None:
                    found[row.judgement.verdict].append(pair.other.name + _further(row.judgement))
            words = {Verdict.WITHIN: f"within {_percent(gate)}"}
            order = (Verdict.WORSE, Verdict.INCONCLUSIVE, Verdict.WITHIN, Verdict.BETTER)
            parts = [
                f"{words.get(item, item.value)}: {some_of(found[item], NAMES_SHOWN)}" for item in order if found[item]
            ]
            yield f"gate {gate.metric.name}={_percent(gate)}: {'; '.join(parts) or 'nothing to judge'}"

    def settings_table(self) -> list[Table]:
        """In what the configurations differ; no table where they do not."""
        labelled = self._labelled()
        differing = differing_settings([item.settings for _, item in labelled])
        table = [Column(label, tuple(value or ABSENT for value in values)) for label, values in differing.items()]
        names = tuple(name for name, _ in labelled)
        return [Table("Differing settings", names, tuple(table))] if table else []

    def notes(self) -> Iterable[str]:
        """What the numbers are."""
        comparison = self.comparison
        rows = [row for pair in comparison.pairs for row in pair.rows]
        if any(row.effect and row.effect.std_error is not None for row in rows):
            yield _RATIO_NOTE if comparison.anchor is None else _ANCHORED_RATIO_NOTE
        if comparison.n_compared:
            count = "the one comparison" if comparison.n_compared == 1 else f"the {comparison.n_compared} comparisons"
            yield f"p: of no difference, adjusted by Holm over {count}; ~: no difference found."
        if comparison.gates and comparison.n_compared:
            yield "verdict: where the whole interval lies, widened so that all verdicts hold together."
        if any(row.all_attempts_ratio is not None for row in rows):
            yield "over all attempts: including invalid ones, as far as they were measured."
        yield from self._notes_on_anchor_and_meters()
        for run in comparison.runs:
            if run.stopping is not None:
                of = f" in {self._run_label(run)}" if len(comparison.runs) > 1 else ""
                yield f"Cycles were added{of} {run.stopping.describe()}: {UNACCOUNTED}."
        yield from comparison.missing

    def _notes_on_anchor_and_meters(self) -> Iterable[str]:
        anchor, metrics = self.comparison.anchor, self.comparison.metrics
        if anchor is not None and anchor.name:
            labels = {metric.name: metric.lower_label for metric in metrics}
            moved = ", ".join(f"{ratio:.3f} × in {labels[name]}" for name, ratio in anchor.ratios.items())
            most = f"{100 * anchor.tolerance:g} %"
            yield f"anchor: {anchor.name}, itself {moved}; a change of more than {most} would rule out a verdict."
        is_energy = anchor is None and any(metric.group == "energy" for metric in metrics)
        if is_energy and any(item.is_by_board_sensors for _, item in self._labelled()):
            yield "Energy: board sensors are off by up to ±5 % per card, which cancels out on one card."

    def _lead(self) -> Metric | None:
        """The first metric that can be compared."""
        metrics = self.comparison.metrics
        return next((item for item in metrics if any(row.effect for _, row in self.comparison.rows(item))), None)

    def _in_headline(self) -> set[Reason | None]:
        """The reasons that the headline names."""
        lead = self._lead()
        if lead is None:
            return {row.reason for pair in self.comparison.pairs for row in pair.rows}
        if len(self.comparison.pairs) > 1:
            return set()
        return {row.reason for _, row in self.comparison.rows(lead) if row.effect and row.p_adjusted is None}

    def _of_one(self, pair: Pair, row: Row) -> str:
        anchor, (baseline, other) = self.comparison.anchor, self._labels(pair)
        over = f", over the anchor {anchor.name}" if anchor and anchor.name else ""
        if row.p_adjusted is not None and not row.is_found:
            label = row.metric.lower_label
            return (
                f"No difference in {label} between {other} and {baseline} was found: {_times(row)}{_within(row)}{over}."
            )
        text = f"{other} {row.metric.relation.format(_times(row))} {baseline}{_within(row)}{over}"
        return f"{text}; no verdict: {row.reason}." if row.p_adjusted is None else f"{text}."

    def _of_many(self, metric: Metric, rows: Sequence[tuple[Pair, Row]]) -> str:
        sides: dict[str, list[tuple[Pair, Row]]] = {side: [] for side in _SIDES}
        for pair, row in rows:
            sides[_side(row)].append((pair, row))
        against = "the earlier run" if self.comparison.anchor else self.comparison.pairs[0].baseline.name
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
        baseline, other = self._labels(pair)
        counts = ", ".join(f"{len(found)} {words}" for words, found in sides.items() if found)
        answer = f"{other} {metric.relation.format(_times(row))} {baseline}{_within(row)}"
        return f"{answer}; of {len(rows)} configurations {counts}."

    def metric_table(self, metric: Metric) -> Table:
        """The numbers of one metric."""
        comparison = self.comparison
        rows = comparison.rows(metric)
        decimals = max((known for _, row in rows if (known := _decimals(row)) is not None), default=None)
        heading = f"{metric.label}, {metric.unit}" if metric.group != "latency" else metric.label
        heading = "\n".join(textwrap.wrap(heading, _HEADING_WIDTH, break_on_hyphens=False))
        note = estimate_note(item for _, item in self._labelled())
        if note and metric.group == "energy":
            heading += f"\n{note}"
        interval = f"{_CONFIDENCE}\nt interval"
        if comparison.anchor is None:
            heads = ["n", "geom.\nmean", "ratio", interval, "p", "verdict"]
            lines = list(self._lines_within(rows, metric, decimals))
        else:
            ratio = "ratio over\nanchor" if comparison.anchor.name else "ratio"
            heads = ["before", "after", ratio, interval, "p", "verdict"]
            lines = [_line_across(pair, row, decimals) for pair, row in rows]
        names, *cells = zip(*lines, strict=True)
        table = [Column(head, tuple(column)) for head, column in zip(heads, cells, strict=True)]
        return Table(heading, tuple(names), tuple(table if comparison.gates else table[:-1]))

    def _lines_within(
        self, rows: Sequence[tuple[Pair, Row]], metric: Metric, decimals: int | None
    ) -> Iterable[tuple[str, ...]]:
        baseline = self.comparison.pairs[0].baseline
        estimate = baseline.estimate(metric)
        reference = ("1", "baseline") if estimate.value is not None else (ABSENT, "")
        yield baseline.name, str(estimate.n), _mean(metric, estimate.value), *reference, "", ""
        for pair, row in rows:
            n = pair.other.estimate(metric).n
            yield pair.other.name, str(n), _mean(metric, row.means[1]), *_effect_cells(row, decimals)
            if row.all_attempts_ratio is not None:
                yield "· over all attempts", "", "", _ratio(row.all_attempts_ratio, decimals), "", "", ""

    def _labelled(self) -> list[tuple[str, Configuration]]:
        """Every configuration with its label."""
        pairs = self.comparison.pairs
        if self.comparison.anchor is None:
            return [(item.name, item) for item in (*(pair.baseline for pair in pairs[:1]), *(it.other for it in pairs))]
        return [item for pair in pairs for item in zip(self._labels(pair), (pair.baseline, pair.other), strict=True)]

    def _labels(self, pair: Pair) -> tuple[str, str]:
        if self.comparison.anchor is None:
            return pair.baseline.name, pair.other.name
        before, after = map(self._run_label, self.comparison.runs)
        return f"{pair.baseline.name} in {before}", f"{pair.other.name} in {after}"

    def _run_label(self, run: Run) -> str:
        """The name of one of two runs: its campaign, if the two differ, else its ID."""
        names = {item.campaign_name for item in self.comparison.runs}
        return run.campaign_name if len(names) == len(self.comparison.runs) else run.run_id

    def _whom(self, names: Sequence[str]) -> str:
        """Which configurations a line concerns; empty when it is all."""
        is_all = len(self.comparison.pairs) in (1, len(names))
        return "" if is_all else f" ({some_of(names, NAMES_SHOWN)})"


def _side(row: Row) -> str:
    better, worse, close, unknown = _SIDES
    if row.p_adjusted is None:
        return unknown
    return close if not row.is_found else better if _goodness(row) > 0 else worse


def _goodness(row: Row) -> float:
    """How much better, on logs."""
    log_ratio = row.effect.log_ratio if row.effect else 0.0
    return log_ratio if row.metric.is_higher_better else -log_ratio


def _times(row: Row) -> str:
    """`0.41 ×`."""
    return ABSENT if row.effect is None else f"{_ratio(row.effect.ratio, _decimals(row))} ×"


def _within(row: Row) -> str:
    """`, 95 % 0.39–0.43, 5 cycles`."""
    if row.effect is None:
        return ""
    counts = " and ".join(map(str, row.effect.n_cycles))
    cycles = f", {counts} {'cycle' if row.effect.n_cycles == (1,) else 'cycles'}"
    interval = row.effect.interval()
    return cycles if interval is None else f", {_CONFIDENCE} {_bounds(interval, _decimals(row))}{cycles}"


def _line_across(pair: Pair, row: Row, decimals: int | None) -> tuple[str, ...]:
    name = pair.other.name if pair.other.name == pair.baseline.name else f"{pair.baseline.name} → {pair.other.name}"
    return name, _mean(row.metric, row.means[0]), _mean(row.metric, row.means[1]), *_effect_cells(row, decimals)


def _effect_cells(row: Row, decimals: int | None) -> tuple[str, str, str, str]:
    """Ratio, interval, p and verdict."""
    verdict = ""
    if row.judgement is not None:
        is_within = row.judgement.verdict is Verdict.WITHIN
        verdict = f"within {_percent(row.judgement.gate)}" if is_within else str(row.judgement.verdict.value)
    if row.effect is None:
        return ABSENT, ABSENT, ABSENT, verdict
    interval = row.effect.interval()
    shown = ABSENT if interval is None else _bounds(interval, decimals)
    return _ratio(row.effect.ratio, decimals), shown, _p(row.p_adjusted), verdict


def _p(value: float | None) -> str:
    if value is None:
        return ABSENT
    return "<0.001" if value < 0.001 else f"{'' if value < SIGNIFICANCE else '~ '}{value:.3f}"


def _mean(metric: Metric, value: float | None) -> str:
    return units.format_latency(value) if metric.group == "latency" else units.format_quantity(value)


def _ratio(value: float, decimals: int | None) -> str:
    return f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}"


def _bounds(interval: tuple[float, float], decimals: int | None) -> str:
    return "–".join(_ratio(bound, decimals) for bound in interval)


def _decimals(row: Row) -> int | None:
    """Enough that the width of the interval shows; None without an interval."""
    interval = row.effect.interval() if row.effect else None
    if interval is None:
        return None
    width, (least, most) = interval[1] - interval[0], _DECIMALS
    return min(max(math.ceil(-math.log10(width)), least), most) if width > 0 else most


def _further(judgement: Judgement) -> str:
    if judgement.verdict is not Verdict.INCONCLUSIVE:
        return ""
    if judgement.reason:
        return " (no verdict)"
    more = judgement.further_cycles
    if more is None:
        return f" (at the threshold: more than {MOST_FURTHER_CYCLES} further cycles)"
    return f" (about {more} more {'cycle' if more == 1 else 'cycles'} would settle it)"


def _percent(gate: Gate) -> str:
    return f"{100 * gate.threshold:g}%"


def _wrapped(text: str, width: int) -> list[str]:
    firm = text.replace(" %", f"{_FIRM}%").replace(" ×", f"{_FIRM}×")
    return [line.replace(_FIRM, " ") for line in wrapped(firm, width)]


def _narrow(tables: Sequence[Table], width: int) -> list[Table]:
    """The tables, each in as many as the width requires."""
    found = []
    for table in tables:
        parts: list[list[Column]] = [[]]
        room = width - _NAME_ROOM
        for column in table.columns:
            needed = 2 + max(map(text_width, (column.heading, *column.cells)))
            if parts[-1] and needed > room:
                parts.append([])
                room = width - _NAME_ROOM
            parts[-1].append(column)
            room -= needed
        found += [Table(table.heading, table.names, tuple(part)) for part in parts]
    return found
