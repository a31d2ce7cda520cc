"""`lem trend`: the configurations of a campaign over its runs, with change points and the versions that changed."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TextIO

from lem.base.doc import NAME_WIDTH, Column, Doc, NameShortener, Table, screen_of, write_json
from lem.base.errors import UserError
from lem.base.log import WIDTH
from lem.base.units import ABSENT, percent, plain, plural
from lem.cli import options, selection
from lem.results.history import (
    NOTHING_ELSE,
    Change,
    History,
    Series,
    anchor_note,
    chance_text,
    change_text,
    history_document,
    make_history,
    notes,
    started,
    versions_text,
)
from lem.results.metrics import parse_comparable
from lem.results.report.trend import render_trend
from lem.results.trends import FALSE_ALARMS


def add_trend_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.epilog = (
        "The anchor is a configuration whose software did not change; ratios to it are free of what a day does to the "
        f"machine. At most {100 * FALSE_ALARMS:g} % of campaigns in which nothing changes show a change point, if "
        "their runs vary independently."
    )
    parser.add_argument("campaign", metavar="CAMPAIGN", help="a campaign with several runs")
    text = "the configuration, by name or number, that the others are relative to (default: the first with the same "
    parser.add_argument("--anchor", default="", metavar="NAME", help=f"{text}software in all runs)")
    options.add_repeated(parser, "--metric", "NAME", "show this metric (default: energy and throughput)")
    parser.add_argument("--last", type=int, metavar="N", help="only the last N runs (default: all)")
    parser.add_argument("--output", "-o", metavar="FILE", help="also write all of it as an HTML page")
    options.add_results_dir(parser)
    options.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> None:
    if args.last is not None and args.last < 1:
        raise UserError(f"--last: expected at least 1, got {args.last}")
    known = selection.list_runs(args.results_dir)
    chosen = [item for item in known if item.campaign == args.campaign][-(args.last or 0) :]
    if not chosen:
        if (found := selection.find_run(known, args.campaign)) is not None:
            raise UserError(f"{args.campaign} is one run", f"name its campaign: lem trend {found.campaign}")
        raise selection.no_such_name(args.campaign, known, args.results_dir)
    runs = [item.read() for item in chosen]
    problems = [problem for item in runs for problem in item.problems]
    selection.list_problems(err, selection.damaged(problems))
    history = make_history(runs, [parse_comparable(text) for text in args.metric], args.anchor)
    if args.output:
        options.write_file(Path(args.output), render_trend(history))
    if args.json:
        write_json(out, {**history_document(history), "problems": selection.problem_documents(problems)})
        return
    out.write(render_history(history, **screen_of(out)))
    if args.output:
        out.write(f"\n{args.output}\n")
    else:
        args.next = [*options.typed_again(args), "--output", "trend.html"]


def render_history(history: History, *, is_colour: bool = False, width: int = WIDTH) -> str:
    doc = Doc(width, is_colour=is_colour)
    first, last = started(history.run_ids[0]), started(history.run_ids[-1])
    doc.text(f"{history.campaign_name} · {plural(len(history.run_ids), 'run')} · {first} – {last}", "bold")
    doc.text(anchor_note(history))
    shortener = NameShortener([item.name for item in history.series], NAME_WIDTH)
    if shortener.explanation:
        doc.text(shortener.explanation)
    for metric in history.metrics:
        doc.block()
        doc.table(_table([item for item in history.series if item.metric is metric], shortener))
    together: dict[tuple[str, tuple[str, ...]], list[tuple[Series, Change]]] = {}
    for series, change in history.changes:
        together.setdefault((change.run_id, change.versions), []).append((series, change))
    for (run_id, versions), found in together.items():
        doc.block()
        doc.text(f"Since run {run_id}, with it: {versions_text(versions) or NOTHING_ELSE}", "bold")
        for series, change in found:
            of = "" if len(history.metrics) == 1 else f", {series.metric.lower_label}"
            text = f"{_label(series, shortener)}{of} (p {chance_text(change.p_value)})"
            doc.labelled(f"{change_text(change.ratio)}  ", text, "yellow")
    doc.block()
    if not history.changes:
        doc.text("No change point was found.")
    doc.block()
    for text in notes(history):
        doc.text(text)
    return doc.render()


def _table(series: list[Series], shortener: NameShortener) -> Table:
    metric = series[0].metric
    cells: list[tuple[str, ...]] = []
    for item in series:
        value = metric.shown(item.points[-1].value) if item.points else ABSENT
        level = f"{plain(math.exp(item.levels[-1]), '.4g')}×" if item.is_relative and item.points else ABSENT
        spread = ABSENT if item.spread is None else percent(item.spread)
        last = item.changes[-1] if item.changes else None
        change = (change_text(last.ratio), started(last.run_id)) if last else (ABSENT, ABSENT)
        cells.append((str(len(item.points)), value, level, spread, *change))
    heads = ("runs", "last", "× anchor", "spread", "change", "since")
    columns = tuple(map(Column, heads, zip(*cells, strict=True)))
    heading = max((item.heading for item in series), key=len)  # of the one that says most
    return Table("#", tuple(_label(item, shortener) for item in series), columns, heading)


def _label(series: Series, shortener: NameShortener) -> str:
    return f"{ABSENT if series.number is None else series.number} {shortener(series.name)}"
