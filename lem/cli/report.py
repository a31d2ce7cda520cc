"""`lem report`: one campaign as one HTML file that needs nothing beside itself."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lem.cli.selection import SelectedRun, problem_documents, resolve_run, tell_problems, write_file
from lem.cli.streams import write_json
from lem.errors import ExitCode, UserError

if TYPE_CHECKING:
    from lem.record import Record
    from lem.results.report.content import Report, TraceNote
    from lem.results.report.trace import Trace
    from lem.results.repository import Scan, StoredResult

__all__ = ["add_arguments", "run"]

_FILENAME = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `lem report` takes."""
    parser.description = __doc__
    parser.add_argument("campaign", metavar="CAMPAIGN", help="a campaign (its last run), or a run")
    parser.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        help=f"where to write it, - for stdout (default: {_FILENAME} in the campaign's folder)",
    )
    parser.add_argument("--results-dir", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    parser.add_argument("--json", action="store_true", help="what was written as one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    """The exit code; 0 also where results are damaged, which the page and stderr tell."""
    from lem.results.report.page import render_report

    if args.json and args.output == "-":
        raise UserError("--json and --output - both want stdout", "name a file for the page")
    chosen = resolve_run(args.results_dir, args.campaign)
    campaign, run_id = chosen.campaign, chosen.run_id
    scan = chosen.scan()
    report = _compose(scan, chosen)
    text = render_report(report)
    damaged = [problem for problem in scan.problems if problem.kind != "missing"]
    tell_problems(err, damaged, lead="left out: ", rest="the page names them")
    if args.output == "-":
        out.write(text)
        return int(ExitCode.OK)
    path = Path(args.output) if args.output else args.results_dir / campaign / _FILENAME
    write_file(path, text)
    if args.json:
        document = {
            "path": str(path),
            "bytes": len(text.encode("utf-8")),
            "campaign": campaign,
            "run_id": run_id,
            "problems": problem_documents(scan.problems),
        }
        write_json(out, document)
    else:
        out.write(f"{path}\n")
    return int(ExitCode.OK)


def _compose(scan: Scan, chosen: SelectedRun) -> Report:
    from lem.results.precision import read_stopping_rule
    from lem.results.report.content import compose
    from lem.results.report.loading import failed_settings, select_traced
    from lem.results.repository import count_failed

    report = compose(
        [item.record for item in scan.results],
        problems=scan.problems,
        failed=count_failed(scan),
        failed_settings=failed_settings(scan),
        stopping=read_stopping_rule(chosen.folder),
        campaign_name=chosen.campaign,
        run_id=chosen.run_id,
    )
    logs = _with_log(scan.results)
    traces, notes = _traces(select_traced(report.entries, logs))
    return dataclasses.replace(report, traces=tuple(traces), trace_notes=tuple(notes), n_logs=len(logs))


def _with_log(results: Sequence[StoredResult]) -> tuple[StoredResult, ...]:
    from lem.meters.samples import FINISHED_FILENAME

    return tuple(item for item in results if (item.path.parent / FINISHED_FILENAME).is_file())


def _traces(results: Sequence[StoredResult]) -> tuple[list[tuple[Record, Trace]], list[TraceNote]]:
    """What the logs show; a log that cannot be used is named and left out."""
    from lem.cli.report_traces import trace_of
    from lem.meters.samples import FINISHED_FILENAME, SampleLogError, read_finished
    from lem.results.report.content import TraceNote

    traces, notes = [], []
    for item in results:
        path = item.path.parent / FINISHED_FILENAME
        try:
            log, marks = read_finished(path)
        except (SampleLogError, OSError) as error:
            message = str(error).removeprefix(f"{path}: ")
            notes.append(TraceNote("/".join(path.parts[-4:]), message))
            continue
        traces.append((item.record, trace_of(log, marks)))
    return traces, notes
