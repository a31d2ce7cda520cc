"""Which run the words of a command line mean, and what commands that read results have in common."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lem.errors import UserError

if TYPE_CHECKING:
    from lem.results.repository import Problem, Scan

__all__ = ["SelectedRun", "find_run", "list_runs", "resolve_run", "tell_problems", "terminal_width", "write_json"]

_WIDTH = 80
_PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class SelectedRun:
    """A run of a campaign in a results folder."""

    results_dir: Path
    campaign: str
    run_id: str

    def scan(self) -> Scan:
        """What lies in its folder."""
        from lem.results.repository import Repository

        return Repository(self.results_dir, self.campaign).scan(self.run_id)


def list_runs(results_dir: Path) -> tuple[SelectedRun, ...]:
    """Every run, by campaign, oldest first.

    Raises:
        UserError: the folder cannot be read.
    """
    from lem.results.repository import Repository, list_campaigns

    return tuple(
        SelectedRun(results_dir, campaign, run_id)
        for campaign in list_campaigns(results_dir)
        for run_id in Repository(results_dir, campaign).run_ids()
    )


def find_run(runs: Sequence[SelectedRun], wanted: str) -> SelectedRun | None:
    """The last run of the campaign of that name, or the one run whose ID begins so; None when there is none.

    Raises:
        UserError: several IDs begin so.
    """
    of_campaign = [item for item in runs if item.campaign == wanted]
    if of_campaign:
        return of_campaign[-1]
    found = [item for item in runs if item.run_id == wanted]
    found = found or [item for item in runs if wanted and item.run_id.startswith(wanted)]
    if len(found) > 1:
        names = ", ".join(item.run_id for item in found[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(f"{wanted!r} can mean {names}{more}", "name one of them in full")
    return found[0] if found else None


def resolve_run(results_dir: Path, wanted: str) -> SelectedRun:
    """The run that a word means, as `find_run`.

    Raises:
        UserError: nothing has that name, or several have.
    """
    found = find_run(list_runs(results_dir), wanted)
    if found is None:
        raise UserError(f"no campaign or run {wanted!r} in {results_dir}", "lem results list shows what is there")
    return found


def tell_problems(err: TextIO, problems: Sequence[Problem]) -> None:
    """Name what could not be used, a line each."""
    from lem.results.layout import printable

    texts = (f"{problem.kind}: {problem.path}: {problem.message}" for problem in problems[:_PROBLEMS_SHOWN])
    err.writelines(printable(text) + "\n" for text in texts)
    if len(problems) > _PROBLEMS_SHOWN:
        err.write(f"and {len(problems) - _PROBLEMS_SHOWN} more: lem results show --json lists all\n")


def write_json(out: TextIO, document: Any) -> None:
    """One JSON document on a stream."""
    out.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def terminal_width(out: TextIO) -> int:
    """The columns of a terminal, 80 for anything else."""
    return max(_WIDTH, shutil.get_terminal_size().columns) if out.isatty() else _WIDTH
