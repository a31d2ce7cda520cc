"""`lem merge`: results of several hosts as one campaign."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lem.cli.selection import problem_documents, tell_problems
from lem.cli.streams import terminal_width, write_json
from lem.errors import ExitCode, UserError
from lem.units import parse_percentage, plural, some_of

if TYPE_CHECKING:
    from lem.results.fleet_plan import FleetPlan
    from lem.results.merge import AnchorCheck, Gathered, Matrix

__all__ = ["add_arguments", "run"]

_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `lem merge` takes."""
    parser.description = (
        "Copy the results of several hosts into one folder: identical ones once, conflicts refused. A host "
        "is a block, so nothing is pooled over hosts. Exit code 1 when planned results are lacking."
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="results folder of a host, or a folder that holds it"
    )
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="results folder to merge into")
    parser.add_argument("--campaign", metavar="NAME", help="which campaign, where the folders hold several")
    parser.add_argument("--plan", type=Path, metavar="PLAN", help="the stored plan: its run alone, and what is lacking")
    parser.add_argument(
        "--anchor-tolerance",
        type=_percentage,
        default=0.05,
        metavar="PERCENT%",
        help="how far apart hosts may be in the anchor of the plan (default: 5%%)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def _percentage(text: str) -> float:
    try:
        return parse_percentage(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    """The exit code: 1 when planned results are lacking."""
    from lem.results.fleet_plan import SHARD, read_plan
    from lem.results.merge import check_anchor, completeness, gather, write_merged

    plan = None if args.plan is None else read_plan(args.plan)
    # What was merged before is one more source: it is kept, and must not contradict what comes now.
    known = [args.output] if args.output.is_dir() else []
    gathered = gather([*known, *args.folders], campaign=args.campaign, plan=plan)
    if not gathered.results:
        raise UserError(
            f"no whole result of campaign {gathered.campaign} in these folders; nothing was merged",
            "lem results list --results-dir DIR shows what a folder holds",
        )
    anchor_hash = plan.anchor if plan is not None and plan.mode == SHARD else None
    anchor = check_anchor(gathered.results, anchor_hash, args.anchor_tolerance)
    matrix = completeness(gathered, plan)
    new = write_merged(gathered, args.output)
    if args.json:
        write_json(out, _document(gathered, matrix, anchor, new))
    else:
        lines = [*_table(matrix, terminal_width(out)), "", *_lines(gathered, matrix, anchor, new, args.output, plan)]
        out.write("\n".join(lines) + "\n")
        tell_problems(err, gathered.problems, lead="left out: ")
    return int(ExitCode.EXPERIMENT_FAILED if matrix.lacking else ExitCode.OK)


def _document(gathered: Gathered, matrix: Matrix, anchor: AnchorCheck, new: int) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "campaign": gathered.campaign,
        "results": len(gathered.results),
        "new": new,
        "hosts": list(matrix.hosts),
        "configurations": {
            name: {
                host: dataclasses.asdict(cell)
                for host, cell in zip(matrix.hosts, cells, strict=True)
                if cell.planned or cell.present
            }
            for name, cells in matrix.rows.items()
        },
        "lacking": [{"host": host, "exp_id": exp_id} for host, exp_id in matrix.lacking],
        "anchor": dataclasses.asdict(anchor),
        "problems": problem_documents(gathered.problems),
        "foreign_runs": list(gathered.foreign_runs),
    }


def _table(matrix: Matrix, width: int) -> list[str]:
    from lem.results.layout import Column, columns, printable

    hosts = [
        Column(printable(host), tuple(cells[index].text for cells in matrix.rows.values()))
        for index, host in enumerate(matrix.hosts)
    ]
    return columns("configuration", list(matrix.rows), hosts, width)


def _lines(
    gathered: Gathered, matrix: Matrix, anchor: AnchorCheck, new: int, output: Path, plan: FleetPlan | None
) -> list[str]:
    lines = []
    if plan is not None and plan.anchor is not None:
        lines.append(_anchor_line(anchor))
    if gathered.foreign_runs:
        lines.append(f"left out, since they are of other runs than the plan: {', '.join(gathered.foreign_runs)}")
    if matrix.lacking:
        lacking = [f"{exp_id} ({host})" for host, exp_id in matrix.lacking]
        lines.append(f"lacking: {some_of(lacking, _SHOWN)}")
    results, hosts = plural(len(gathered.results), "result"), plural(len(matrix.hosts), "host")
    return [*lines, f"{results} of {hosts} in {output}, {new} of them new"]


def _anchor_line(anchor: AnchorCheck) -> str:
    if anchor.spread is None:
        return "anchor: fewer than two hosts have a valid result of it, so nobody knows whether the hosts are alike"
    values = ", ".join(f"{host} {value:.4g} {anchor.unit}" for host, value in anchor.by_host.items())
    return f"anchor: hosts are within {100 * anchor.spread:.1f} % in {anchor.metric} ({values})"
