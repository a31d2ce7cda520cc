"""`lem datasets`: the data sets that have a short name, and which of them are on this machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TextIO

from lem.cli.streams import write_json
from lem.errors import EngineError, ExitCode

if TYPE_CHECKING:
    from lem.experiment.datasets import DatasetChoice

__all__ = ["add_arguments", "run"]

EPILOG = (
    "LEM_DATASETS_DIR names a folder that is looked in first: ALIAS.jsonl (or .json, .csv, .txt, .parquet), or a "
    "folder ALIAS with one file for each split. What is not there comes from the hub, through the Python package "
    "`datasets`."
)


@dataclass(frozen=True)
class _Line:
    """A data set with a short name. `place` is folder, cache, hub (not on this machine) or unusable."""

    alias: str
    name: str
    subset: str | None
    split: str
    column: str
    place: str
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `lem datasets` takes."""
    parser.description = __doc__
    parser.epilog = EPILOG
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO, environ: Mapping[str, str] = os.environ) -> int:
    """The exit code; 0 also where nothing is found."""
    lines = _find_all(environ)
    if args.json:
        write_json(out, [asdict(line) for line in lines])
    else:
        out.write(_table(lines))
    if any(line.place == "hub" for line in lines) and not args.json:
        err.write("hub: not on this machine; downloaded when first used\n")
    return int(ExitCode.OK)


def _find_all(environ: Mapping[str, str]) -> list[_Line]:
    # Not at the top: the other commands do not pay for this import.
    from lem.config.experiment_config import DATASET_ALIASES
    from lem.experiment.datasets import choice_of_name

    return [_find(choice_of_name(alias), environ) for alias in DATASET_ALIASES]


def _find(choice: DatasetChoice, environ: Mapping[str, str]) -> _Line:
    place, detail = _place_of(choice, environ)
    return _Line(
        choice.name, choice.hub_name, choice.subset, choice.split, choice.column or "", place=place, detail=detail
    )


def _place_of(choice: DatasetChoice, environ: Mapping[str, str]) -> tuple[str, str]:
    from lem.experiment.datasets import find_files, is_in_hub_cache

    try:
        files = find_files(choice, environ)
    except EngineError as error:
        return "unusable", error.message
    if files:
        return "folder", str(files[0] if len(files) == 1 else files[0].parent)
    return ("cache", "") if is_in_hub_cache(choice, environ) else ("hub", "")


def _table(lines: list[_Line]) -> str:
    rows = [("alias", "data set", "split", "prompts in", "found")]
    rows += [
        (
            line.alias,
            f"{line.name} ({line.subset})" if line.subset else line.name,
            line.split,
            line.column,
            f"{line.place}: {line.detail}" if line.detail else line.place,
        )
        for line in lines
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"{row}\n" for row in padded)
