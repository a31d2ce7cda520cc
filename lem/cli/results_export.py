"""`lem results export`: the records as rows for other programs."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lem.cli.selection import write_file

if TYPE_CHECKING:
    from lem.results.repository import StoredResult

__all__ = ["add_arguments", "export"]

_FORMAT_OF_SUFFIX = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".md": "markdown"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `results export`."""
    parser.add_argument(
        "ids",
        nargs="*",
        metavar="ID",
        help="a run, RUN/EXPERIMENT, an experiment, or a campaign (its last run); default: everything",
    )
    parser.add_argument(
        "--format",
        choices=("csv", "json", "jsonl", "markdown"),
        help="default: as the name after --output ends, else csv; json and jsonl say why a value is missing",
    )
    parser.add_argument("--output", "-o", type=Path, metavar="FILE", help="default: stdout")
    parser.add_argument(
        "--attempts",
        choices=("used", "all"),
        default="used",
        help="used: one row an experiment, its last valid attempt or else its last; all: one row an attempt",
    )
    parser.add_argument("--columns", metavar="A,B,…", help="these columns alone; markdown shows a few without it")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), metavar="DIR", help="default: results")


def export(args: argparse.Namespace, results: Iterable[StoredResult], out: TextIO) -> None:
    """Write the results as the arguments say.

    Raises:
        UserError: no such column, or the file cannot be written.
    """
    from lem.results.export import Exported, make_table, render, summary_columns, with_columns

    form = args.format or (_FORMAT_OF_SUFFIX.get(args.output.suffix.lower()) if args.output else None) or "csv"
    found = [Exported(item.path.relative_to(args.results_dir).as_posix(), item.record) for item in results]
    table = make_table(found, is_every_attempt=args.attempts == "all")
    if args.columns is not None:
        table = with_columns(table, [name.strip() for name in args.columns.split(",") if name.strip()])
    elif form == "markdown":
        table = with_columns(table, summary_columns(found))
    text = render(table, form)
    if args.output is None:
        out.write(text)
    else:
        write_file(args.output, text)
