"""`lem results`: what was measured, read from the result files alone."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lem.cli.results_export import add_arguments as add_export_arguments
from lem.errors import ExitCode, UserError
from lem.log import is_colour_wanted

if TYPE_CHECKING:
    from lem.results.repository import Problem, Scan, StoredResult

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_parser", "run"]

_WIDTH = 80
_PROBLEMS_SHOWN = 10


def add_parser(subparsers: Subparsers) -> None:
    """Add the actions of `lem results` to the command line."""
    parser = subparsers.add_parser("results", help="list, show and export what was measured", description=__doc__)
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


@dataclass(frozen=True)
class _Run:
    campaign: str
    run_id: str


def _list(args: argparse.Namespace, out: TextIO, err: TextIO) -> None:
    found = [(item, _scan(args.results_dir, item)) for item in _runs(args.results_dir)]
    if args.json:
        _write_json(out, [_run_document(item, scan) for item, scan in found])
    elif found:
        out.write(_run_table(found))
        damaged = [problem for _, scan in found for problem in scan.problems if problem.kind != "missing"]
        _tell(err, damaged)
    else:
        err.write(f"no results in {args.results_dir}\n")


def _show(args: argparse.Namespace, out: TextIO, err: TextIO) -> None:
    item, exp_id = _resolve(args.results_dir, args.id)
    scan = _scan(args.results_dir, item)
    if exp_id is None:
        _show_run(args, item, scan, out, err)
    else:
        _show_experiment(args, scan, exp_id, out, err)


def _export(args: argparse.Namespace, out: TextIO, err: TextIO) -> None:
    from lem.cli.results_export import export

    wanted = [_resolve(args.results_dir, name) for name in args.ids]
    if not args.ids:
        wanted = [(item, None) for item in _runs(args.results_dir)]
    found: dict[Path, StoredResult] = {}
    problems: dict[Path, Problem] = {}
    for item, exp_id in wanted:
        scan = _scan(args.results_dir, item)
        found |= {it.path: it for it in scan.results if exp_id in (None, it.record.identity.experiment_id)}
        problems |= {it.path: it for it in scan.problems if exp_id in (None, it.exp_id)}
    export(args, found.values(), out)
    _tell(err, [problem for problem in problems.values() if problem.kind != "missing"])
    whole = {(it.record.identity.run_id, it.record.identity.experiment_id) for it in found.values()}
    without = {(it.run_id, it.exp_id) for it in problems.values()} - whole
    if without:
        err.write(
            f"left out, since there is no whole result: {len(without)} of {len(without) + len(whole)} experiments\n"
        )


def _show_run(args: argparse.Namespace, item: _Run, scan: Scan, out: TextIO, err: TextIO) -> None:
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
        stopping=read_stopping_rule(args.results_dir / item.campaign / item.run_id),
    )
    if args.json:
        _write_json(out, {**summary_document(summary), "problems": _problem_documents(scan.problems)})
        return
    out.write(render_summary(summary, is_colour=is_colour_wanted(out), width=_width(out)))
    _tell(err, scan.problems)


def _show_experiment(args: argparse.Namespace, scan: Scan, exp_id: str, out: TextIO, err: TextIO) -> None:
    from lem.record import encode_record
    from lem.results.detail import render_record

    results = [result for result in scan.results if result.record.identity.experiment_id == exp_id]
    problems = [problem for problem in scan.problems if problem.exp_id == exp_id]
    if args.json:
        attempts = [{"path": str(result.path), "record": encode_record(result.record)} for result in results]
        _write_json(out, {"exp_id": exp_id, "attempts": attempts, "problems": _problem_documents(problems)})
        return
    texts = [
        _with_path(render_record(item.record, is_colour=is_colour_wanted(out), width=_width(out)), item)
        for item in results
    ]
    out.write("\n".join(texts) if texts else f"{exp_id}: no whole result\n")
    _tell(err, problems)


def _recompute(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    from lem.cli.recompute import document_of, recompute_result, write_outcomes

    item, exp_id = _resolve(args.results_dir, args.id)
    scan = _scan(args.results_dir, item)
    results = [result for result in scan.results if exp_id in (None, result.record.identity.experiment_id)]
    problems = [problem for problem in scan.problems if exp_id in (None, problem.exp_id)]
    outcomes = [recompute_result(result) for result in results]
    if args.json:
        documents = [document_of(outcome) for outcome in outcomes]
        _write_json(out, {"results": documents, "problems": _problem_documents(problems)})
    else:
        write_outcomes(out, outcomes)
        _tell(err, problems)
    return int(ExitCode.OK if all(outcome.is_good for outcome in outcomes) else ExitCode.EXPERIMENT_FAILED)


def _with_path(text: str, result: StoredResult) -> str:
    return f"{text}\n{result.path}\n"


def _resolve(results_dir: Path, wanted: str) -> tuple[_Run, str | None]:
    """The run that an ID means, and the experiment in it; None for the whole run.

    Raises:
        UserError: nothing has that name, or several have.
    """
    runs = list(_runs(results_dir))
    campaign_runs = [item for item in runs if item.campaign == wanted]
    if campaign_runs:
        return campaign_runs[-1], None
    candidates: list[tuple[str, _Run, str | None]] = []
    for item in runs:
        candidates.append((item.run_id, item, None))
        for exp_id in _experiment_ids(results_dir, item):
            candidates += [(exp_id, item, exp_id), (f"{item.run_id}/{exp_id}", item, exp_id)]
    found = [candidate for candidate in candidates if candidate[0] == wanted]
    found = found or [candidate for candidate in candidates if wanted and candidate[0].startswith(wanted)]
    # `RUN/` begins the name of each of its experiments, as `RUN` does: the shorter meaning is meant.
    runs_found = [candidate for candidate in found if candidate[2] is None]
    distinct = {(item, exp_id) for _, item, exp_id in (runs_found or found)}
    if len(distinct) == 1:
        return distinct.pop()
    if not distinct:
        raise UserError(f"no run or experiment {wanted!r} in {results_dir}", "lem results list shows what is there")
    names = sorted(item.run_id if exp_id is None else f"{item.run_id}/{exp_id}" for item, exp_id in distinct)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    raise UserError(f"{wanted!r} can mean {', '.join(names[:5])}{more}", "name one of them in full")


def _runs(results_dir: Path) -> Iterable[_Run]:
    from lem.results.repository import Repository, list_campaigns

    for campaign in list_campaigns(results_dir):
        for run_id in Repository(results_dir, campaign).run_ids():
            yield _Run(campaign, run_id)


def _experiment_ids(results_dir: Path, item: _Run) -> tuple[str, ...]:
    from lem.results.repository import Repository

    return Repository(results_dir, item.campaign).experiment_ids(item.run_id)


def _scan(results_dir: Path, item: _Run) -> Scan:
    from lem.results.repository import Repository

    return Repository(results_dir, item.campaign).scan(item.run_id)


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


def _run_table(found: Sequence[tuple[_Run, Scan]]) -> str:
    from lem.results.layout import Column, columns

    counts = [_counts(scan) for _, scan in found]
    table = [Column("run", tuple(item.run_id for item, _ in found))]
    table += [Column(label, tuple(str(count[label]) for count in counts)) for label in counts[0]]
    return "\n".join(columns("campaign", [item.campaign for item, _ in found], table, _WIDTH)) + "\n"


def _run_document(item: _Run, scan: Scan) -> dict[str, Any]:
    return {
        "campaign": item.campaign,
        "run_id": item.run_id,
        **_counts(scan),
        "problems": _problem_documents(scan.problems),
    }


def _problem_documents(problems: Iterable[Problem]) -> list[dict[str, str]]:
    return [{"path": str(item.path), "kind": item.kind, "message": item.message} for item in problems]


def _tell(err: TextIO, problems: Sequence[Problem]) -> None:
    from lem.results.layout import printable

    texts = (f"{problem.kind}: {problem.path}: {problem.message}" for problem in problems[:_PROBLEMS_SHOWN])
    err.writelines(printable(text) + "\n" for text in texts)
    if len(problems) > _PROBLEMS_SHOWN:
        err.write(f"and {len(problems) - _PROBLEMS_SHOWN} more: --json lists all\n")


def _write_json(out: TextIO, document: Any) -> None:
    out.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _width(out: TextIO) -> int:
    return max(_WIDTH, shutil.get_terminal_size().columns) if out.isatty() else _WIDTH
