"""`lem results`: what was measured, read from the result files alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lem.cli.results_export import add_arguments as add_export_arguments
from lem.cli.selection import SelectedRun, list_runs, problem_documents, resolve_experiment, tell_problems
from lem.cli.streams import terminal_width, write_json
from lem.errors import ExitCode
from lem.log import is_colour_wanted

if TYPE_CHECKING:
    from lem.results.repository import Problem, Scan, StoredResult

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `lem results` takes."""
    parser.description = __doc__
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="every run in the results folder")
    listing.set_defaults(run=run, action=_list)
    showing = actions.add_parser("show", help="one run as a table, or one experiment in full")
    showing.add_argument("id", metavar="ID", help="a run, RUN/EXPERIMENT, an experiment, or a campaign (its last run)")
    showing.set_defaults(run=run, action=_show)
    again = actions.add_parser("recompute", help="work every energy figure out again from the samples")
    again.add_argument("id", metavar="ID", help="as for show; 1 is the exit code when a figure does not agree")
    again.set_defaults(run=run, action=_recompute)
    exporting = actions.add_parser("export", help="the records as CSV, JSON or Markdown, one row an experiment")
    add_export_arguments(exporting)
    exporting.set_defaults(run=run, action=_export)
    for action in (listing, showing, again):
        action.add_argument(
            "--results-dir", "-o", type=Path, default=Path("results"), metavar="DIR", help="default: results"
        )
        action.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    """The exit code; 0 also where results are damaged, which is told."""
    return int(args.action(args, out, err) or ExitCode.OK)


def _list(args: argparse.Namespace, out: TextIO, err: TextIO) -> None:
    found = [(item, item.scan()) for item in list_runs(args.results_dir)]
    if args.json:
        write_json(out, [_run_document(item, scan) for item, scan in found])
    elif found:
        out.write(_run_table(found, terminal_width(out)))
        damaged = [problem for _, scan in found for problem in scan.problems if problem.kind != "missing"]
        tell_problems(err, damaged)
    else:
        err.write(f"no results in {args.results_dir}\n")


def _show(args: argparse.Namespace, out: TextIO, err: TextIO) -> None:
    item, exp_id = resolve_experiment(args.results_dir, args.id)
    scan = item.scan()
    if exp_id is None:
        _show_run(args, item, scan, out, err)
    else:
        _show_experiment(args, scan, exp_id, out, err)


def _export(args: argparse.Namespace, out: TextIO, err: TextIO) -> None:
    from lem.cli.results_export import export

    wanted = [resolve_experiment(args.results_dir, name) for name in args.ids]
    if not args.ids:
        wanted = [(item, None) for item in list_runs(args.results_dir)]
    found: dict[Path, StoredResult] = {}
    problems: dict[Path, Problem] = {}
    for item, exp_id in wanted:
        scan = item.scan()
        found |= {it.path: it for it in scan.results if exp_id in (None, it.record.identity.experiment_id)}
        problems |= {it.path: it for it in scan.problems if exp_id in (None, it.exp_id)}
    export(args, found.values(), out)
    tell_problems(err, [problem for problem in problems.values() if problem.kind != "missing"])
    whole = {(it.record.identity.run_id, it.record.identity.experiment_id) for it in found.values()}
    without = {(it.run_id, it.exp_id) for it in problems.values()} - whole
    if without:
        err.write(
            f"left out, since there is no whole result: {len(without)} of {len(without) + len(whole)} experiments\n"
        )


def _show_run(args: argparse.Namespace, item: SelectedRun, scan: Scan, out: TextIO, err: TextIO) -> None:
    from lem.results.precision import read_stopping_rule
    from lem.results.repository import count_failed
    from lem.results.summary import summarise, summary_document
    from lem.results.table import render_summary

    records = (result.record for result in scan.results)
    summary = summarise(
        records,
        failed=count_failed(scan),
        campaign_name=item.campaign,
        run_id=item.run_id,
        stopping=read_stopping_rule(item.folder),
    )
    if args.json:
        write_json(out, {**summary_document(summary), "problems": problem_documents(scan.problems)})
        return
    out.write(render_summary(summary, is_colour=is_colour_wanted(out), width=terminal_width(out)))
    tell_problems(err, scan.problems)


def _show_experiment(args: argparse.Namespace, scan: Scan, exp_id: str, out: TextIO, err: TextIO) -> None:
    from lem.record_codec import encode_record
    from lem.results.detail import render_record

    results = [result for result in scan.results if result.record.identity.experiment_id == exp_id]
    problems = [problem for problem in scan.problems if problem.exp_id == exp_id]
    if args.json:
        attempts = [{"path": str(result.path), "record": encode_record(result.record)} for result in results]
        write_json(out, {"exp_id": exp_id, "attempts": attempts, "problems": problem_documents(problems)})
        return
    texts = [
        _with_path(render_record(item.record, is_colour=is_colour_wanted(out), width=terminal_width(out)), item)
        for item in results
    ]
    out.write("\n".join(texts) if texts else f"{exp_id}: no whole result\n")
    tell_problems(err, problems)


def _recompute(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    from lem.cli.recompute import document_of, recompute_result, write_outcomes

    item, exp_id = resolve_experiment(args.results_dir, args.id)
    scan = item.scan()
    results = [result for result in scan.results if exp_id in (None, result.record.identity.experiment_id)]
    problems = [problem for problem in scan.problems if exp_id in (None, problem.exp_id)]
    outcomes = [recompute_result(result) for result in results]
    if args.json:
        documents = [document_of(outcome) for outcome in outcomes]
        write_json(out, {"results": documents, "problems": problem_documents(problems)})
    else:
        write_outcomes(out, outcomes)
        tell_problems(err, problems)
    return int(ExitCode.OK if all(outcome.is_good for outcome in outcomes) else ExitCode.EXPERIMENT_FAILED)


def _with_path(text: str, result: StoredResult) -> str:
    return f"{text}\n{result.path}\n"


def _counts(scan: Scan) -> dict[str, int]:
    from lem.results.repository import count_failed

    valid = sum(result.record.validity.valid for result in scan.results)
    names = {result.record.identity.config_name for result in scan.results}
    failed = count_failed(scan)
    return {
        "configurations": len(names | set(failed)),
        "valid": valid,
        "invalid": len(scan.results) - valid,
        "failed": sum(failed.values()),
    }


def _run_table(found: Sequence[tuple[SelectedRun, Scan]], width: int) -> str:
    from lem.results.layout import Column, columns

    counts = [_counts(scan) for _, scan in found]
    table = [Column("run", tuple(item.run_id for item, _ in found))]
    table += [Column(label, tuple(str(count[label]) for count in counts)) for label in counts[0]]
    return "\n".join(columns("campaign", [item.campaign for item, _ in found], table, width)) + "\n"


def _run_document(item: SelectedRun, scan: Scan) -> dict[str, Any]:
    return {
        "campaign": item.campaign,
        "run_id": item.run_id,
        **_counts(scan),
        "problems": problem_documents(scan.problems),
    }
