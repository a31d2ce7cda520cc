"""`lem results`: list, show, export, recompute."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from lem.base.doc import Column, columns, printable, screen_of, terminal_width, write_json
from lem.base.errors import ExitCode
from lem.base.units import plural
from lem.cli import options, selection
from lem.cli.verify import Outcome, recompute_result, shown
from lem.record import encode_record
from lem.results.aggregation import run_document
from lem.results.detail import render_record
from lem.results.export import render
from lem.results.rows import make_table, summary_columns, with_columns, with_values
from lem.results.run import Run
from lem.results.store import Problem, Scan, StoredResult
from lem.results.table import render_run

_FORMAT_OF_SUFFIX = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".md": "markdown"}


def add_results_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "`lem results`: list, show, export and recompute results, from the result files alone."
    parser.epilog = selection.CONFIGURATION
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list every run in the results folder")
    listing.set_defaults(run=_list)
    showing = actions.add_parser("show", help="show a run as a table, or an experiment in full")
    named = "a run, RUN/EXPERIMENT, an experiment, RUN/CONFIGURATION, or a campaign (its last run)"
    showing.add_argument("id", metavar="ID", help=named)
    options.add_budget(showing)
    selection.add_rates(showing)
    showing.set_defaults(run=_show)
    again = actions.add_parser("recompute", help="recompute every figure from the samples and requests")
    again.add_argument("id", metavar="ID", help="as for show; exit code 1 if a figure differs or a result is damaged")
    again.set_defaults(run=_recompute)
    exporting = actions.add_parser("export", help="export records as CSV, JSON or Markdown, one row per experiment")
    exporting.add_argument("ids", nargs="*", metavar="ID", help=f"{named}; default: everything")
    text = "default: by the suffix of --output, else csv; json and jsonl give the reason for a missing value"
    exporting.add_argument("--format", choices=("csv", "json", "jsonl", "markdown"), help=text)
    exporting.add_argument("--output", "-o", type=Path, metavar="FILE", help="default: stdout")
    text = "used: one row per experiment, its last valid attempt or else its last; all: one row per attempt"
    exporting.add_argument("--attempts", choices=("used", "all"), default="used", help=text)
    text = "only these columns (default: markdown: a selection, csv: those with a value, json: all)"
    exporting.add_argument("--columns", metavar="A,B,…", help=text)
    selection.add_rates(exporting)
    options.add_results_dir(exporting)
    exporting.set_defaults(run=_export)
    for action in (listing, showing, again):
        options.add_results_dir(action)
        options.add_json(action)
    for action in (listing, showing):
        options.add_state_dir(action)


def _list(args: argparse.Namespace, out: TextIO, err: TextIO) -> None:
    found = [(item, item.read(args.state_dir)) for item in selection.list_runs(args.results_dir)]
    counts = [_counts(run) for _, run in found]
    if args.json:
        documents = [
            {"campaign": item.campaign, "run_id": item.run_id, **count}
            | {"problems": selection.problem_documents(run.problems)}
            for (item, run), count in zip(found, counts, strict=True)
        ]
        write_json(out, documents)
    elif found:
        table = [Column("run", tuple(item.run_id for item, _ in found))]
        table += [Column(label, tuple(str(count[label]) for count in counts)) for label in counts[0]]
        lines = columns("campaign", [item.campaign for item, _ in found], table, terminal_width(out))
        out.writelines(f"{line}\n" for line in lines)
        selection.list_problems(err, selection.damaged(problem for _, run in found for problem in run.problems))
    else:
        err.write(f"no results in {args.results_dir}\n")


def _show(args: argparse.Namespace, out: TextIO, err: TextIO) -> None:
    item, exp_ids = selection.resolve_experiments(args.results_dir, args.id)
    if exp_ids is not None:
        _show_experiments(args, item.scan(args.state_dir, reading=selection.reading_of(args)), exp_ids, out, err)
        return
    found = item.read(args.state_dir, reading=selection.reading_of(args))
    if args.json:
        write_json(out, {**run_document(found), "problems": selection.problem_documents(found.problems)})
    else:
        out.write(render_run(found, has_budget=args.budget, **screen_of(out)))
        args.next = ["check", args.id, *options.folder_options(args.results_dir, args.state_dir)]
        selection.list_problems(err, found.problems)


def _export(args: argparse.Namespace, out: TextIO, err: TextIO) -> None:
    found, problems = _found(args)
    whole = {(it.record.identity.run_id, it.record.identity.experiment_id) for it in found.values()}
    parts = _rendered(args, found)
    if args.output is None:
        out.writelines(parts)
    else:
        options.write_file(args.output, parts)
    selection.list_problems(err, selection.damaged(problems.values()))
    without = {(it.run_id, it.exp_id) for it in problems.values()} - whole
    if without:
        err.write(f"left out, no complete result: {len(without)} of {len(without) + len(whole)} experiments\n")


def _found(args: argparse.Namespace) -> tuple[dict[Path, StoredResult], dict[Path, Problem]]:
    wanted = [selection.resolve_experiments(args.results_dir, name) for name in args.ids]
    if not args.ids:
        wanted = [(item, None) for item in selection.list_runs(args.results_dir)]
    found: dict[Path, StoredResult] = {}
    problems: dict[Path, Problem] = {}
    for item, exp_ids in wanted:
        results, others = _chosen(item.scan(reading=selection.reading_of(args)), exp_ids)
        found |= {it.path: it for it in results}
        problems |= {it.path: it for it in others}
    return found, problems


def _rendered(args: argparse.Namespace, found: dict[Path, StoredResult]) -> Iterator[str]:
    """The parts of the text; `found` is emptied, so that each result can go when its row is made."""
    form = args.format or (_FORMAT_OF_SUFFIX.get(args.output.suffix.lower()) if args.output else None) or "csv"
    summary = summary_columns(found.values()) if form == "markdown" and args.columns is None else ()
    results = (found.popitem()[1] for _ in range(len(found)))
    table = make_table(results, base=args.results_dir, is_every_attempt=args.attempts == "all")
    if args.columns is not None:
        table = with_columns(table, [name.strip() for name in args.columns.split(",") if name.strip()])
    elif form == "markdown":
        table = with_columns(table, summary)
    elif form == "csv":
        table = with_values(table)
    return render(table, form)


def _chosen(scan: Scan, exp_ids: frozenset[str] | None) -> tuple[list[StoredResult], list[Problem]]:
    results = [it for it in scan.results if exp_ids is None or it.record.identity.experiment_id in exp_ids]
    return results, [it for it in scan.problems if exp_ids is None or it.exp_id in exp_ids]


def _show_experiments(args: argparse.Namespace, scan: Scan, exp_ids: frozenset[str], out: TextIO, err: TextIO) -> None:
    results, problems = _chosen(scan, exp_ids)
    named = ", ".join(sorted(exp_ids))
    if args.json:
        attempts = [{"path": str(result.path), "record": encode_record(result.record)} for result in results]
        write_json(out, {"exp_id": named, "attempts": attempts, "problems": selection.problem_documents(problems)})
        return
    texts = [f"{render_record(item.record, **screen_of(out))}\n{item.path}\n" for item in results]
    out.write("\n".join(texts) if texts else f"{named}: no complete result\n")
    selection.list_problems(err, problems)


def _recompute(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    item, exp_ids = selection.resolve_experiments(args.results_dir, args.id)
    results, problems = _chosen(item.scan(), exp_ids)
    outcomes = [recompute_result(result) for result in results]
    if args.json:
        documents = [{**outcome.which, **outcome.document} for outcome in outcomes]
        write_json(out, {"results": documents, "problems": selection.problem_documents(problems)})
    else:
        _write_outcomes(out, outcomes)
        selection.list_problems(err, problems)
    is_good = all(outcome.is_good for outcome in outcomes) and not selection.damaged(problems)
    return ExitCode.OK if is_good else ExitCode.EXPERIMENT_FAILED


def _counts(run: Run) -> dict[str, int]:
    valid = sum(record.validity.valid for record in run.records)
    return {
        "configurations": len({record.identity.config_name for record in run.records} | {*run.failed} | {*run.left}),
        "valid": valid,
        "invalid": len(run.records) - valid,
        "failed": sum(run.failed.values()),
        "left": sum(run.left.values()),
    }


def _write_outcomes(out: TextIO, outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        identity, found = outcome.result.record.identity, outcome.recomputed
        name = f"{identity.experiment_id} attempt {identity.attempt} ({identity.config_name})"
        text = f"{outcome.status}, {found.compared} figures" if found else outcome.status
        message = f": {outcome.message}" if outcome.message else ""
        out.write(printable(f"{name}: {text}{message}") + "\n")
        for item in outcome.differences:
            was, now = shown(item.recorded), shown(item.recomputed)
            out.write(printable(f"  {item.field}: recorded {was}, recomputed {now}") + "\n")
    good, figures = sum(it.status == "agrees" for it in outcomes), sum(it.compared for it in outcomes)
    out.write(f"{good} of {len(outcomes)} results agree with their raw data ({plural(figures, 'figure')} recomputed)\n")
