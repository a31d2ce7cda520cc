"""The tables of a comparison: a row for each metric of one pair, else a row for each configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Final

from lem.base.doc import Column, Table
from lem.base.measurement import Measured
from lem.base.units import ABSENT, fixed, plain
from lem.results.agreement import Agreement, repeatability_of
from lem.results.along import Pooled
from lem.results.axes import Key
from lem.results.compare import Comparison, Pair, Row
from lem.results.metrics import Metric, short_label
from lem.results.run import Configuration, estimate_note
from lem.results.stats import CONFIDENCE, Gate, Verdict
from lem.results.uncertainty import budget_table

ESTIMATED: Final = "(est.)"
_INTERVAL: Final = f"{100 * CONFIDENCE:g} %\nt interval"
_INTERVAL_OF_ONE: Final = f"{100 * CONFIDENCE:g} %"
_TRAILING = ("combined", "p", "verdict")
_LEAST_DECIMALS, _MOST_DECIMALS = 2, 4


class ComparisonTables:
    def __init__(self, comparison: Comparison, labels: Sequence[str], items: Sequence[Configuration]) -> None:
        """`items` are all configurations with their `labels`: of one run the baseline first, of two both of a pair."""
        self._comparison, self._pairs, self._metrics = comparison, comparison.pairs, comparison.metrics
        self._labels, self._items, self._anchor = labels, items, comparison.anchor

    @cached_property
    def n_cycles(self) -> int | None:
        counts = {item.estimate(metric).n for item in self._items for metric in self._metrics} - {0}
        return counts.pop() if len(counts) == 1 else None

    def notes(self) -> Iterator[str]:
        if self._estimate_note:
            yield f"{ESTIMATED}: {self._estimate_note.strip('()')}, not a measurement."
        if self.key.explanation:
            yield self.key.explanation

    @cached_property
    def _estimate_note(self) -> str:
        return estimate_note(self._items) if any(metric.group == "energy" for metric in self._metrics) else ""

    @cached_property
    def key(self) -> Key:
        along, numbers = self._comparison.along, [_number(item) for item in self._items]
        if along is not None:
            return Key(numbers, (), heading=along.axis.replace("_", "_\n"))
        if self._anchor is not None:
            return Key([*map(self._row_name, self._pairs)], (), heading="configuration")
        return Key(numbers, [item.settings for item in self._items], self._labels)

    def tables(self, width: int | None = None) -> Iterator[Table]:
        if not self._pairs:
            return
        key = self.key
        if self._anchor is not None:
            settings = [item.settings for item in self._items]
            yield from Key(self._labels, settings, heading="differing settings").axis_tables(width)
        if len(self._pairs) == 1:
            yield from key.axis_tables(width) if self._anchor is None else ()
            yield self._pair_table(self._pairs[0])
        elif width is not None:
            yield from self._overview(key, width)
        else:
            for metric in self._metrics:
                yield from key.tables(self._columns(metric, is_lead=True), None, metric.heading)

    def budgets(self) -> Iterator[Table]:
        for metric in self._metrics:
            named = [(self._row_name(pair), row.combined) for pair, row in self._comparison.rows(metric)]
            table = budget_table(named, f"Uncertainty of the ratio, {metric.lower_label}, % (k = 1)")
            if table is not None:
                yield table

    def agreements(self) -> Iterator[Table]:
        """How far the answers agree with those of the baseline, and those of the baseline from cycle to cycle."""
        found = [(self._row_name(pair), pair.agreement) for pair in self._pairs if pair.agreement is not None]
        if not any(item.value for _, item in found):
            return
        if self._anchor is None and (itself := repeatability_of(self._pairs[0].baseline)) is not None:
            found.insert(0, (f"{_number(self._pairs[0].baseline)}, in the next cycle", itself))
        cells = [agreement_cells(item) for _, item in found]
        heads = ("requests", "equal\nids, %", _INTERVAL_OF_ONE, "common\nprefix, tok", _INTERVAL_OF_ONE, "of tok")
        columns = (Column(head, column) for head, column in zip(heads, zip(*cells, strict=True), strict=True))
        names = tuple(name for name, _ in found)
        yield Table("answers of", names, tuple(columns), "Agreement of answers with the baseline")

    def _pair_table(self, pair: Pair) -> Table:
        before, after = ("before", "after")
        if self._anchor is None:
            before, after = f"{_number(pair.baseline)}\nbaseline", _number(pair.other)
        ratio = "ratio over\nanchor" if self._anchor and self._anchor.name else "ratio"
        heads = ("n", before, after, ratio, _INTERVAL, "combined", "p", "verdict")
        rows = [row for row in pair.rows if row.metric in self._metrics]
        cells = [
            (
                str(pair.baseline.estimate(row.metric).n),
                *(row.metric.shown(mean) for mean in row.means),
                *effect_cells(row, decimals_of(row)),
            )
            for row in rows
        ]
        hidden = {"n"} if self.n_cycles else set()
        hidden |= set() if self._comparison.gates else {"verdict"}
        hidden |= set() if any(_has_combined(row) for row in rows) else {"combined"}
        found = [Column(head, tuple(column)) for head, column in zip(heads, zip(*cells, strict=True), strict=True)]
        names = (f"{row.metric.heading} {self._mark(row.metric)}".rstrip() for row in rows)
        return Table("metric", tuple(names), tuple(column for column in found if column.heading not in hidden))

    def _overview(self, key: Key, width: int) -> Iterator[Table]:
        left, whole = list(self._metrics), key
        while left:
            columns = self._columns(left.pop(0), is_lead=key is whole)
            while left:
                more = [*columns, *self._columns(left[0])]
                if key.n_above(_required(more), width) is None:
                    break
                columns = more
                left.pop(0)
            shown = _required(columns)
            n_above = key.n_above(shown, width)
            for column in sorted(columns, key=lambda column: column.rank):
                wider = [it for it in columns if it in shown or it is column]
                if n_above is not None and key.n_above(wider, width) == n_above:
                    shown = wider
            yield from key.tables(shown, width)
            key = key.without_axes()

    def _columns(self, metric: Metric, *, is_lead: bool = False) -> list[Column]:
        rows = self._comparison.rows(metric)
        decimals = max((known for _, row in rows if (known := decimals_of(row)) is not None), default=None)
        cells = [(*(metric.shown(mean) for mean in row.means), *effect_cells(row, decimals)) for _, row in rows]
        counts = [str(pair.other.estimate(metric).n) for pair, _ in rows]
        if self._anchor is None:
            estimate = self._pairs[0].baseline.estimate(metric)
            reference = ("1", "baseline") if estimate.value is not None else (ABSENT, "")
            cells.insert(0, ("", metric.shown(estimate.value), *reference, "", "", ""))
            counts.insert(0, str(estimate.n))
        before, after, ratio, interval, combined, p_value, verdict = (
            tuple(column) for column in zip(*cells, strict=True)
        )
        label = f"{short_label(metric)} {self._mark(metric)}".rstrip()
        is_anchored = self._anchor is not None and self._anchor.name
        combined_head, p_head, verdict_head = (head if is_lead else f"{label}\n{head}" for head in _TRAILING)
        found = [
            Column("n", tuple(counts), rank=0 if is_lead else 7),
            Column(f"{label}\nbefore", before, rank=0 if is_lead else 5),
            Column(f"{label}\n{'after' if self._anchor else 'mean'}", after, rank=0 if is_lead else 5),
            Column(f"{label}\n{'over anchor' if is_anchored else 'ratio'}", ratio),
            Column(_INTERVAL if is_lead else f"{label} {_INTERVAL}", interval, rank=0 if is_lead else 4),
            Column(combined_head, combined, rank=1 if is_lead else 6),
            Column(p_head, p_value, rank=2 if is_lead else 3),
            Column(verdict_head, verdict),
        ]
        hidden = {"n"} if self.n_cycles or self._anchor else set()
        hidden |= set() if self._anchor else {f"{label}\nbefore"}
        hidden |= set() if any(_has_combined(row) for _, row in rows) else {combined_head}
        hidden |= set() if any(row.p_adjusted is not None for _, row in rows) else {p_head}
        hidden |= set() if any(gate.metric is metric for gate in self._comparison.gates) else {verdict_head}
        return [column for column in found if column.heading not in hidden]

    def _mark(self, metric: Metric) -> str:
        return ESTIMATED if metric.group == "energy" and self._estimate_note else ""

    def _row_name(self, pair: Pair) -> str:
        if self._anchor is None:
            return _number(pair.other)
        return " → ".join(dict.fromkeys((pair.baseline.name, pair.other.name)))


def _required(columns: Iterable[Column]) -> list[Column]:
    return [column for column in columns if not column.rank]


def _number(item: Configuration) -> str:
    return item.name.partition("=")[2] if isinstance(item, Pooled) else str(item.number)


def _has_combined(row: Row) -> bool:
    return row.combined is not None and row.combined.value is not None


def effect_cells(row: Row, decimals: int | None) -> tuple[str, str, str, str, str]:
    verdict = "" if row.judgement is None else verdict_text(row.judgement.gate, row.judgement.verdict)
    if row.effect is None:
        return ABSENT, ABSENT, ABSENT, ABSENT, verdict
    interval, p_value = row.interval, row.p_adjusted
    shown = ABSENT if interval is None else bounds_text(interval, decimals)
    p_text = ABSENT if p_value is None else "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
    combined = ABSENT if row.combined is None or row.combined.value is None else row.combined.value.text
    mark = "" if row.is_found else "? " if p_value is None else "~ "
    return f"{mark}{ratio_text(row.effect.ratio, decimals)}", shown, combined, p_text, verdict


def agreement_cells(item: Measured[Agreement]) -> tuple[str, ...]:
    found = item.value
    if found is None:
        return (ABSENT,) * 6
    prefix = found.prefix_interval.value
    within = ABSENT if prefix is None else "–".join(f"{bound:.1f}" for bound in prefix)
    shares = share_text(found.equal_ratio), "–".join(map(share_text, found.equal_interval))
    return (str(found.requests), *shares, f"{found.prefix_tok:.1f}", within, f"{found.output_tok:.1f}")


def equal_text(found: Sequence[Agreement]) -> str:
    requests = sorted({item.requests for item in found})
    shares = sorted(item.equal_ratio for item in found)
    of = f"{'–'.join(map(str, dict.fromkeys((requests[0], requests[-1]))))} requests"
    share = "–".join(dict.fromkeys(map(share_text, (shares[0], shares[-1]))))
    bounds = "–".join(map(share_text, found[0].equal_interval))
    within = f" (95 %: {bounds} %)" if len(found) == 1 else ""
    return f"equal output ids for {share} % of {of}{within}"


def share_text(share: float) -> str:
    """In percent; only all and nothing read as such."""
    shown = round(100 * share, 1)
    return f"{shown if share in (0, 1) else min(max(shown, 0.1), 99.9):.1f}"


def ratio_text(value: float, decimals: int | None) -> str:
    return plain(value, ".3g") if decimals is None else fixed(value, decimals)


def bounds_text(interval: tuple[float, float], decimals: int | None) -> str:
    return "–".join(ratio_text(bound, decimals) for bound in interval)


def decimals_of(row: Row) -> int | None:
    if row.interval is None:
        return None
    width = row.interval[1] - row.interval[0]
    needed = math.ceil(-math.log10(width)) if width > 0 else _MOST_DECIMALS
    return min(max(needed, _LEAST_DECIMALS), _MOST_DECIMALS)


def verdict_text(gate: Gate, verdict: Verdict) -> str:
    return f"within {percent_text(gate)}" if verdict is Verdict.WITHIN else verdict.value


def percent_text(gate: Gate) -> str:
    return f"{100 * gate.threshold:g}%"
