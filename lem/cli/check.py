"""`lem check`: what weakens the numbers of a campaign, each with what to do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lem.base.doc import terminal_width, write_json
from lem.base.errors import ExitCode
from lem.base.log import WIDEST, WIDTH, is_colour_wanted
from lem.base.units import plural, some_of
from lem.cli.selection import resolve_run

if TYPE_CHECKING:
    from lem.results.check import Check


SCHEMA_VERSION = 1

_LEAD = 6


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `lem check` takes."""
    parser.description = (
        "What weakens the numbers of a campaign, each with what to do. WEAK: numbers or verdicts are "
        "not to be relied on for it; note: something to know about them."
    )
    parser.epilog = (
        "exit code: 0 with nothing weak, 4 (inconclusive) with something weak, 2 when there is no such campaign"
    )
    parser.add_argument("campaign", metavar="CAMPAIGN", help="a campaign (its last run), or a run")
    parser.add_argument(
        "--results-dir", "-o", type=Path, default=Path("results"), metavar="DIR", help="default: results"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:  # noqa: ARG001 - all commands get both
    """The exit code: 4 where something is weak, else 0."""
    from lem.results.check import check_run

    check = check_run(resolve_run(args.results_dir, args.campaign).read())
    if args.json:
        write_json(out, check_document(check))
    else:
        out.write(render_check(check, is_colour=is_colour_wanted(out), width=terminal_width(out)))
    return int(ExitCode.INCONCLUSIVE if check.is_weak else ExitCode.OK)


def check_document(check: Check) -> dict[str, Any]:
    """What was found, as JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "campaign": check.run.campaign_name,
        "run_id": check.run.run_id,
        "results": len(check.run.records),
        "weak": check.is_weak,
        "findings": [
            {
                "kind": item.kind,
                "weak": item.is_weak,
                "text": item.text,
                "remedy": item.remedy,
                "configurations": list(item.configurations),
            }
            for item in check.findings
        ],
    }


def render_check(check: Check, *, is_colour: bool = False, width: int = WIDTH) -> str:
    """What was found as text that ends in a newline: weak findings first, and one sentence at the end."""
    from lem.base.doc import NAME_WIDTH, Doc, NameShortener

    doc = Doc(min(width, WIDEST), is_colour=is_colour)
    configurations = check.run.with_results
    shortener = NameShortener([item.name for item in configurations], NAME_WIDTH)
    cycles = max((item.n_cycles for item in configurations), default=0)
    counts = f"{plural(len(configurations), 'configuration')} · {plural(cycles, 'cycle')}"
    doc.text(f"{check.run.campaign_name} · run {check.run.run_id} · {counts}", "bold")
    if shortener.explanation:
        doc.text(shortener.explanation)
    for item in check.findings:
        doc.block()
        label, style = ("WEAK", "red") if item.is_weak else ("note", "yellow")
        is_told = set(item.configurations) <= set(item.reason.data.values())
        whom = "" if is_told else _whom([shortener(name) for name in item.configurations], len(configurations))
        doc.labelled(f"{label:<{_LEAD}}", f"{item.kind.replace('_', ' ')}: {item.text}{whom}", style)
        if item.remedy:
            doc.text(item.remedy, lead=f"{'':<{_LEAD}}do: ")
    doc.block()
    doc.text(_conclusion(check))
    return doc.render()


def _whom(names: Sequence[str], n_all: int) -> str:
    """Which configurations it concerns; nothing where it is all of them or none in particular."""
    from lem.base.doc import NAMES_SHOWN

    if not names or len(names) == n_all:
        return ""
    return f" ({some_of(names, NAMES_SHOWN)})"


def _conclusion(check: Check) -> str:
    weak = sum(item.is_weak for item in check.findings)
    notes = len(check.findings) - weak
    noted = f"; {plural(notes, 'note')}" if notes else ""
    what = f"{plural(weak, 'thing')} {'weakens' if weak == 1 else 'weaken'} the numbers"
    return f"{what if weak else 'Nothing was found that weakens the numbers'}{noted}."
