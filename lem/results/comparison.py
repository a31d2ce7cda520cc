"""A comparison in words and tables: for a terminal, as Markdown for a pull request, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lem.base.doc import NAME_WIDTH, NAMES_SHOWN, Doc, markdown_escaped, markdown_table, text_width, wrapped
from lem.base.log import WIDTH
from lem.base.measurement import Measured
from lem.base.reasons import Reason
from lem.base.units import ABSENT, hash_label, plain, plural, some_of
from lem.results.aggregation import row_document
from lem.results.agreement import NOTE as AGREEMENT_NOTE
from lem.results.agreement import Agreement
from lem.results.along import Pooled
from lem.results.axes import shared_settings
from lem.results.bootstrap import coverage_notes
from lem.results.compare import NO_ANCHOR, Along, Comparison, Pair, Row
from lem.results.metrics import Metric
from lem.results.run import Configuration, Run, carbon_basis
from lem.results.stats import CONFIDENCE, Judgement, Verdict
from lem.results.student import MOST_CYCLES_PLANNED
from lem.results.trends import SAME_ORDER, autocorrelation_notes, is_same_order
from lem.results.uncertainty import COMBINED_NOTE, why_unknown
from lem.results.views import (
    ComparisonTables,
    bounds_text,
    decimals_of,
    equal_text,
    percent_text,
    ratio_text,
    verdict_text,
)

SCHEMA_VERSION = 1

_CONFIDENCE = f"{100 * CONFIDENCE:g} %"

_RATIO_NOTE = "ratio: to the baseline, within each cycle; t interval: Student t on its logs"
_ANCHORED_RATIO_NOTE = (
    "ratio over anchor: how much the ratio to the anchor changed; t interval: Student t on logs, the variances of "
    "both runs added (Welch)"
)

_FIRM = "␠"  # in the place of a space at which no line may end: before a unit

# What a row says of a configuration.
_SIDES = ("better", "worse", "not distinguishable", "without a verdict")

_BY_NUMBER = "configuration "

# Settings that need no label.
_PLAIN_SETTINGS = ("backend", "model", "precision", "traffic", "engine", "GPU")


def render_text(
    comparison: Comparison, *, has_budget: bool = False, is_colour: bool = False, width: int = WIDTH
) -> str:
    content = _Content(comparison)
    doc = Doc(width, is_colour=is_colour)

    def hanging(texts: Iterable[str], style: str = "") -> None:
        for text in texts:
            doc.lines(_wrapped(text, doc.width, "  "), style)

    hanging(content.obstacles(), "red")
    doc.block()
    doc.lines(_wrapped(content.headline(), doc.width), "bold")
    hanging(content.answers())
    hanging(content.gates())
    hanging(content.reasons(), "yellow")
    doc.block()
    for line in filter(None, content.title()):
        doc.text(line, "dim")
    tables = [*content.tables.tables(doc.width), *content.tables.agreements()]
    for table in (*tables, *(content.tables.budgets() if has_budget else ())):
        doc.block()
        doc.table(table)
    doc.block()
    hanging(content.notes(), "dim")
    return doc.render()


def render_markdown(comparison: Comparison) -> str:
    content = _Content(comparison)
    title, shared = map(markdown_escaped, content.title())
    blocks = [
        [f"**{markdown_escaped(content.headline())}**"],
        [
            *(
                f"- **{markdown_escaped(text)}**"
                for text in (*content.obstacles(), *content.answers(), *content.gates())
            ),
            *(f"- {markdown_escaped(text)}" for text in content.reasons()),
        ],
        [f"{title}  ", shared],
        *map(markdown_table, (*content.tables.tables(), *content.tables.agreements())),
        [f"- {markdown_escaped(text)}" for text in content.notes()],
    ]
    return "\n".join("\n".join(block) + "\n" for block in blocks if block)


def headline_of(comparison: Comparison) -> str:
    return _Content(comparison).headline()


def sentence_of(comparison: Comparison, pair: Pair, row: Row) -> str:
    """The answer of one row, with the verdict of its gate."""
    text = f"{row.reason}." if row.effect is None else _Content(comparison).sentence(pair, row)
    if (judged := row.judgement) is None:
        return text
    return f"{text} Gate: {verdict_text(judged.gate, judged.verdict)}{_further(judged)}."


def remarks_of(comparison: Comparison) -> list[str]:
    content = _Content(comparison)
    return [*content.obstacles(), *content.answers(), *content.reasons(), *content.left_out()]


def ratio_notes_of(comparison: Comparison) -> list[str]:
    return [*_Content(comparison).ratio_notes()]


def best_of(comparison: Comparison, metric: Metric) -> Configuration | None:
    rows = comparison.rows(metric)
    if rows and all(_side(row) == "worse" for _, row in rows):
        return comparison.pairs[0].baseline
    better = [(pair, row) for pair, row in rows if _side(row) == "better"]
    return max(better, key=lambda item: _goodness(item[1]))[0].other if better else None


def comparison_document(comparison: Comparison) -> dict[str, Any]:
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
        "along": _along_document(comparison.along),
        "pairs": [
            {
                "baseline": _configuration_document(pair.baseline),
                "other": _configuration_document(pair.other),
                "obstacles": [item.document for item in pair.obstacles],
                "metrics": {row.metric.name: row_document(row) for row in pair.rows},
                "agreement": _agreement_document(pair.agreement),
            }
            for pair in comparison.pairs
        ],
        "missing": list(comparison.missing),
        "removed": [item.name for run in comparison.runs for item in run.removed],
    }


def _agreement_document(found: Measured[Agreement] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        **(found.value.document if found.value else {}),
        "null_reason": found.null_reason and found.null_reason.text,
    }


def _along_document(along: Along | None) -> dict[str, Any] | None:
    if along is None:
        return None
    facts = {"held_equal": along.held, "with_it": along.with_it, "left_out": along.alone}
    return {"axis": along.axis, **{name: list(texts) for name, texts in facts.items()}}


def _configuration_document(item: Configuration) -> dict[str, Any]:
    counts = {name: getattr(item, name) for name in ("run_id", "n_cycles", "n_invalid", "n_failed")}
    facts = {"config_hash": hash_label(item.config_hash), **counts}
    which = {"members": [it.number for it in item.members]} if isinstance(item, Pooled) else {"number": item.number}
    return {"config_name": item.name, **which, **facts, "settings": dict(item.settings)}


class _Content:
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
        labels, items = [label for label, _ in self._labelled], [item for _, item in self._labelled]
        self.tables = ComparisonTables(comparison, labels, items)
        self._is_by_number = max((text_width(item.name) for _, item in self._labelled), default=0) > NAME_WIDTH

    def title(self) -> tuple[str, str]:
        comparison = self._comparison
        runs = " against ".join(f"{run.campaign_name} · run {run.run_id}" for run in reversed(comparison.runs))
        count = plural(len(self._pairs) + (self._anchor is None), "value" if comparison.along else "configuration")
        n_cycles = self.tables.n_cycles
        cycles = f" · {plural(n_cycles, 'cycle')}" if n_cycles else ""
        shared = shared_settings(item.settings for _, item in self._labelled)
        settings = [value if label in _PLAIN_SETTINGS else f"{label} {value}" for label, value in shared.items()]
        if (along := comparison.along) is not None:
            with_it = f" with {', '.join(along.with_it)}" if along.with_it else ""
            settings.insert(0, f"along {along.axis}{with_it}, held equal: {', '.join(along.held) or 'everything else'}")
        return f"{runs} · {count}{cycles}", " · ".join(settings)

    def _name(self, item: Configuration) -> str:
        if self._anchor is not None or isinstance(item, Pooled):
            return item.name
        return str(item.number) if self._is_by_number else f"{item.number} {item.name}"

    def headline(self) -> str:
        if self._lead is None:
            texts = "; ".join(reason.text for reason in dict.fromkeys(row.reason for row in self._rows) if reason)
            alone = "there is only the baseline" if self._anchor is None else "the runs have no configuration in common"
            return f"Nothing can be compared: {texts or alone}."
        rows = [(pair, row) for pair, row in self._comparison.rows(self._lead) if row.effect]
        answer = self.sentence(*rows[0]) if len(self._pairs) == 1 else self._of_many(self._lead, rows)
        return f"C{answer[1:]}" if answer.startswith(_BY_NUMBER) else answer

    def obstacles(self) -> Iterable[str]:
        besides = "confounded" if self._anchor is None else "different"
        leads = ("not comparable", besides, "different, but shared with the anchor")
        found: dict[tuple[str, Reason], list[str]] = {}
        for pair in self._pairs:
            for item in pair.obstacles:
                lead = leads[0 if item.is_blocking else 1 if item.is_confounder else 2]
                found.setdefault((lead, item.reason), []).append(self._name(pair.other))
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
                    found.setdefault(key, []).append((self._name(pair.other), row.metric))
        for (what, reason), whom in found.items():
            names, metrics = (list(dict.fromkeys(column)) for column in zip(*whom, strict=True))
            is_all = len(metrics) == len(self._metrics)
            about = "" if is_all else f" in {', '.join(metric.lower_label for metric in metrics)}"
            yield f"{what}{about}{self._whom(names)}: {reason}"

    def answers(self) -> Iterable[str]:
        """Beside the verdict, since a configuration that answers differently does not do the same work."""
        found: dict[str | Reason, list[tuple[str, Agreement | None]]] = {}
        for pair in self._pairs:
            if (item := pair.agreement) is not None:
                is_equal = item.value is not None and item.value.equal_ratio == 1
                key = item.null_reason or ("answers agree" if is_equal else "answers differ")
                found.setdefault(key, []).append((self._name(pair.other), item.value))
        for key, items in found.items():
            whom = self._whom([name for name, _ in items])
            known = [item for _, item in items if item is not None]
            yield (
                f"answers not compared{whom}: {key}" if isinstance(key, Reason) else f"{key}{whom}: {equal_text(known)}"
            )

    def gates(self) -> Iterable[str]:
        for gate in self._comparison.gates:
            found: dict[Verdict, list[str]] = {}
            for pair, row in self._comparison.rows(gate.metric):
                if row.judgement is not None:
                    whom = self._name(pair.other) + _further(row.judgement)
                    found.setdefault(row.judgement.verdict, []).append(whom)
            order = (Verdict.WORSE, Verdict.INCONCLUSIVE, Verdict.WITHIN, Verdict.BETTER)
            parts = [
                f"{verdict_text(gate, item)}: {some_of(found[item], NAMES_SHOWN)}" for item in order if item in found
            ]
            yield f"gate {gate.metric.name}={percent_text(gate)}: {'; '.join(parts) or 'nothing to judge'}"

    def notes(self) -> Iterable[str]:
        yield from self.ratio_notes()
        if any(row.effect and row.effect.std_error is not None for row in self._rows):
            yield from coverage_notes(record.window for _, item in self._labelled for record in item.used)
        combined = [row.combined for row in self._rows if row.effect]
        if any(found and found.value for found in combined):
            yield COMBINED_NOTE
        if why := why_unknown(combined):
            yield f"Combined uncertainty of the ratio of energies not known: {'; '.join(why)}."
        yield from self.tables.notes()
        if any(pair.agreement and pair.agreement.value for pair in self._pairs):
            yield f"{AGREEMENT_NOTE}."
        yield from self._over_all_attempts()
        yield from self._energy_notes()
        for run in self._comparison.runs:
            if run.stopping is not None:
                of = f" in {self._run_label(run)}" if len(self._comparison.runs) > 1 else ""
                yield f"Cycles were added{of} {run.stopping.describe()}: {run.stopping.correction}."
        yield from self.left_out()

    def ratio_notes(self) -> Iterable[str]:
        comparison = self._comparison
        if any(row.effect and row.effect.std_error is not None for row in self._rows):
            yield f"{_RATIO_NOTE if self._anchor is None else _ANCHORED_RATIO_NOTE}; {comparison.coverage}"
        rows = comparison.rows(self._lead) if self._lead else []
        effects = ((self._name(pair.other), row.effect) for pair, row in rows if row.effect)
        yield from autocorrelation_notes([(name, it.autocorrelation) for name, it in effects if it.autocorrelation])
        if comparison.n_compared:
            marks = "; ?: no verdict" if any(row.effect and row.p_adjusted is None for row in self._rows) else ""
            yield f"p: Holm over {plural(comparison.n_compared, 'comparison')}; ~: no difference found{marks}."
            if comparison.gates:
                yield "verdict: where the whole interval lies, widened so that all verdicts hold together."
            if any(map(is_same_order, comparison.runs)):
                yield f"{SAME_ORDER.text.capitalize()}."
        if self._anchor is not None and self._anchor.name:
            labels = {metric.name: metric.lower_label for metric in self._metrics}
            moved = ", ".join(f"{ratio:.3f} × in {labels[name]}" for name, ratio in self._anchor.ratios.items())
            most = f"{100 * self._anchor.tolerance:g} %"
            yield f"anchor: {self._anchor.name}, itself {moved}; a change of more than {most} would rule out a verdict."

    def left_out(self) -> Iterable[str]:
        runs, along = self._comparison.runs, self._comparison.along
        compared = {item.name for pair in self._pairs for item in (pair.baseline, pair.other)}
        if removed := [it.name for run in runs for it in run.removed if it.name not in compared]:
            yield f"Removed from the campaign, so not compared: {some_of(removed, NAMES_SHOWN)}."
        yield from along.alone if along else ()
        yield from self._comparison.missing

    def _energy_notes(self) -> Iterable[str]:
        if any(metric.section == "carbon" for metric in self._metrics):
            yield f"CO₂e and cost: of the {carbon_basis(item for _, item in self._labelled)}."
        is_energy = self._anchor is None and any(metric.group == "energy" for metric in self._metrics)
        if is_energy and any(item.is_by_board_sensors for _, item in self._labelled):
            yield "Energy: board sensors are off by up to ±5 %, which cancels out on one card."

    def _over_all_attempts(self) -> Iterable[str]:
        for metric in self._metrics:
            rows = [(pair, row.all_attempts_ratio) for pair, row in self._comparison.rows(metric)]
            every = [f"{self._name(pair.other)} {plain(ratio, '.3g')}" for pair, ratio in rows if ratio is not None]
            if every:
                found = some_of(every, NAMES_SHOWN)
                yield f"Ratio over all attempts, invalid ones too, in {metric.lower_label}: {found}."

    def sentence(self, pair: Pair, row: Row) -> str:
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
        found = [item.reason.text for item in pair.obstacles if item.is_confounder and self._anchor is None]
        return f"; confounded by {', '.join(found)}" if found else ""

    def _of_many(self, metric: Metric, rows: Sequence[tuple[Pair, Row]]) -> str:
        sides: dict[str, list[tuple[Pair, Row]]] = {side: [] for side in _SIDES}
        for pair, row in rows:
            sides[_side(row)].append((pair, row))
        against = "the earlier run" if self._anchor else self._labels(self._pairs[0])[0]
        n_open = len(sides["without a verdict"])
        judged = len(rows) - n_open
        if not judged:
            return f"No verdict on {metric.lower_label} for any of {len(rows)} configurations against {against}."
        # The best, if any is better; else the worst, so that bad news is not left to the table.
        side, best = ("better", max) if sides["better"] else ("worse", min)
        if not sides[side]:
            left = f": {judged} not distinguishable, {n_open} without a verdict" if n_open else ""
            return f"No configuration was found to differ from {against} in {metric.lower_label}{left}."
        pair, row = best(sides[side], key=lambda item: _goodness(item[1]))
        counts = ", ".join(f"{len(found)} {words}" for words, found in sides.items() if found)
        others = f" Of {len(rows)}: {counts}." if len(rows) > 1 else ""
        return f"{self._answer(pair, row)}.{others}"

    def _labels(self, pair: Pair) -> tuple[str, str]:
        sides = pair.baseline, pair.other
        if self._comparison.along is not None:
            return sides[0].name, sides[1].name
        if self._anchor is None:
            if self._is_by_number:
                return str(sides[0].number), f"{_BY_NUMBER}{sides[1].number}"
            return f"{sides[0].name} ({sides[0].number})", f"{sides[1].name} ({sides[1].number})"
        before, after = map(self._run_label, self._comparison.runs)
        return f"{pair.baseline.name} in {before}", f"{pair.other.name} in {after}"

    def _run_label(self, run: Run) -> str:
        runs = self._comparison.runs
        return run.campaign_name if len({item.campaign_name for item in runs}) == len(runs) else run.run_id

    def _whom(self, names: Sequence[str]) -> str:
        if len(self._pairs) in (1, len(names)):
            return ""
        if self._is_by_number and len(names) > NAMES_SHOWN:
            return f" ({len(names)} of {len(self._pairs)})"
        return f" ({some_of(names, NAMES_SHOWN)})"


def _side(row: Row) -> str:
    better, worse, close, unknown = _SIDES
    if row.p_adjusted is None:
        return unknown
    return close if not row.is_found else better if _goodness(row) > 0 else worse


def _goodness(row: Row) -> float:
    log_ratio = row.effect.log_ratio if row.effect else 0.0
    return log_ratio if row.metric.is_higher_better else -log_ratio


def _in_words(row: Row) -> tuple[str, str]:
    if row.effect is None:
        return ABSENT, ""
    decimals, interval = decimals_of(row), row.interval
    within = "" if interval is None else f", {_CONFIDENCE} {bounds_text(interval, decimals)}"
    counts = " and ".join(map(str, row.effect.n_cycles))
    cycles = "cycle" if row.effect.n_cycles == (1,) else "cycles"
    return f"{ratio_text(row.effect.ratio, decimals)} ×", f"{within}, {counts} {cycles}"


def _further(judgement: Judgement) -> str:
    if judgement.verdict is not Verdict.INCONCLUSIVE:
        return ""
    if judgement.reason:
        return " (no verdict)"
    more = judgement.further_cycles
    if more is None:
        return f" (at the threshold: more than {MOST_CYCLES_PLANNED} cycles)"
    return f" (about {plural(more, 'more cycle')} would settle it)"


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    firm = text.replace(" %", f"{_FIRM}%").replace(" ×", f"{_FIRM}×")
    return [line.replace(_FIRM, " ") for line in wrapped(firm, width, indent=indent)]
