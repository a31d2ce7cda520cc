"""A comparison as text for a terminal, as Markdown for a pull request, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from lem.base.doc import Column, columns, paint, printable, text_width, wrapped
from lem.base.log import WIDTH, bounded_width
from lem.results.compare import AnchorFinding, Comparison, Pair, Row, Subject
from lem.results.comparison import Content, Table, content_of, headline

SCHEMA_VERSION = 1

# Stands for a blank at which no line may end: before a unit.
_FIRM = "␠"

_NAME_ROOM = 24


def render_text(comparison: Comparison, *, is_colour: bool = False, width: int = WIDTH) -> str:
    """The comparison as text that ends in a newline: what is not comparable, the answer, tables, notes."""
    content = content_of(comparison)
    width = bounded_width(width)

    def painted(lines: Iterable[str], style: str) -> list[str]:
        return [paint(line, style, is_colour=is_colour) for line in lines]

    def said(texts: Iterable[str], style: str = "") -> list[str]:
        lines = [line for text in texts for line in _hanging(text, width)]
        return painted(lines, style) if style else lines

    blocks = [
        said(content.obstacles, "red"),
        painted(_wrapped(content.headline, width), "bold") + said(content.gates) + said(content.reasons, "yellow"),
        painted([*wrapped(content.title, width), *(wrapped(content.shared, width) if content.shared else ())], "dim"),
        *(_text_table(table, width, painted) for table in _narrow_tables(content, width)),
        said(content.notes, "dim"),
    ]
    return "\n".join("\n".join(block) + "\n" for block in blocks if block)


def render_markdown(comparison: Comparison) -> str:
    """The comparison for a comment on a pull request."""
    content = content_of(comparison)
    tables = [*([content.settings] if content.settings else ()), *content.tables]
    alerts = [f"- **{_escaped(text)}**" for text in (*content.obstacles, *content.gates)]
    alerts += [f"- {_escaped(text)}" for text in content.reasons]
    blocks = [
        [f"**{_escaped(content.headline)}**"],
        alerts,
        [f"{_escaped(content.title)}  ", _escaped(content.shared)],
        *(_markdown_table(table) for table in tables),
        [f"- {_escaped(text)}" for text in content.notes],
    ]
    return "\n".join("\n".join(block) + "\n" for block in blocks if block)


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values."""
    anchor = comparison.anchor
    return {
        "schema_version": SCHEMA_VERSION,
        "sentence": headline(comparison),
        "confidence": comparison.confidence,
        "n_compared": comparison.n_compared,
        "runs": [{"campaign_name": run.campaign_name, "run_id": run.run_id} for run in comparison.runs],
        "anchor": None if anchor is None else _anchor_document(anchor),
        "pairs": [_pair_document(pair, comparison.confidence) for pair in comparison.pairs],
        "missing": list(comparison.missing),
    }


def _anchor_document(anchor: AnchorFinding) -> dict[str, Any]:
    found = {item.name: getattr(anchor, item.name) for item in dataclasses.fields(anchor)}
    return {**found, "ratios": dict(anchor.ratios), "reason": str(anchor.reason or "")}


def _pair_document(pair: Pair, confidence: float) -> dict[str, Any]:
    return {
        "baseline": _subject_document(pair.baseline),
        "other": _subject_document(pair.other),
        "obstacles": [{"text": item.text, "is_blocking": item.is_blocking} for item in pair.obstacles],
        "metrics": {row.metric.name: _row_document(row, confidence) for row in pair.rows},
    }


def _subject_document(subject: Subject) -> dict[str, Any]:
    return {
        "config_name": subject.name,
        "config_hash": subject.config_hash,
        "run_id": subject.run_id,
        "n_cycles": subject.aggregate.n_cycles,
        "n_invalid": subject.aggregate.n_invalid,
        "n_failed": subject.aggregate.n_failed,
        "settings": dict(subject.settings),
    }


def _row_document(row: Row, confidence: float) -> dict[str, Any]:
    effect, judgement = row.effect, row.judgement
    interval = effect.interval(confidence) if effect else None
    return {
        "unit": row.metric.unit,
        "baseline": row.means[0],
        "other": row.means[1],
        "ratio": effect.ratio if effect else None,
        "ci_lower": interval[0] if interval else None,
        "ci_upper": interval[1] if interval else None,
        "df": effect.df if effect else None,
        "n_cycles": list(effect.n_cycles) if effect else [],
        "p_value": effect.p_value if effect else None,
        "p_holm": row.p_adjusted,
        "raw_ratio": row.raw_ratio,
        "all_attempts_ratio": row.all_attempts_ratio,
        "reason": row.reason and row.reason.text,
        "gate": None
        if judgement is None
        else {
            "threshold": judgement.gate.threshold,
            "verdict": judgement.verdict.value,
            "reason": judgement.reason and judgement.reason.text,
            "further_cycles": judgement.further_cycles,
        },
    }


def _wrapped(text: str, width: int) -> list[str]:
    firm = text.replace(" %", f"{_FIRM}%").replace(" ×", f"{_FIRM}×")
    return [line.replace(_FIRM, " ") for line in wrapped(firm, width)]


def _hanging(text: str, width: int) -> list[str]:
    """The text wrapped, what it is about at the left."""
    first, *rest = _wrapped(text, width - 2)
    return [first, *(f"  {line}" for line in rest)]


def _narrow_tables(content: Content, width: int) -> list[Table]:
    """The tables, settings in as many as the width asks for."""
    if content.settings is None:
        return list(content.tables)
    parts: list[list[Column]] = [[]]
    room = width - _NAME_ROOM
    for column in content.settings.columns:
        needed = 2 + max(map(text_width, (column.heading, *column.cells)))
        if parts[-1] and needed > room:
            parts.append([])
            room = width - _NAME_ROOM
        parts[-1].append(column)
        room -= needed
    settings = [Table(content.settings.heading, content.settings.names, tuple(part)) for part in parts]
    return [*settings, *content.tables]


def _text_table(table: Table, width: int, painted: Callable[[Iterable[str], str], list[str]]) -> list[str]:
    lines = columns(table.heading, [printable(name) for name in table.names], table.columns, width)
    n_heads = max(text.count("\n") + 1 for text in (table.heading, *(column.heading for column in table.columns)))
    return [*painted(lines[:n_heads], "bold"), *lines[n_heads:]]


def _markdown_table(table: Table) -> list[str]:
    heads = [table.heading, *(column.heading for column in table.columns)]
    lines = [
        "| " + " | ".join(_escaped(head.replace("\n", " ")) for head in heads) + " |",
        "|" + "|".join([":---"] + ["---:"] * len(table.columns)) + "|",
    ]
    for index, name in enumerate(table.names):
        cells = [name, *(column.cells[index] for column in table.columns)]
        lines.append("| " + " | ".join(_escaped(cell) for cell in cells) + " |")
    return lines


def _escaped(text: str) -> str:
    """`text` so that Markdown shows it as it is: names come from files, and `_`, `*`, `<` and `|` mean something."""
    out = printable(text)
    for character in "\\`*_{}[]<>|~#":
        out = out.replace(character, f"\\{character}")
    return out
