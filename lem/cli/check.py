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
from lem.cli.selection import SelectedRun, resolve_run

if TYPE_CHECKING:
    from lem.results.check import Check
    from lem.results.check_results import Finding


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
    check = _check(resolve_run(args.results_dir, args.campaign))
    if args.json:
        write_json(out, check_document(check))
    else:
        out.write(render_check(check, is_colour=is_colour_wanted(out), width=terminal_width(out)))
    return int(ExitCode.INCONCLUSIVE if check.is_weak else ExitCode.OK)


def check_document(check: Check) -> dict[str, Any]:
    """What was found, as JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "campaign": check.campaign_name,
        "run_id": check.run_id,
        "results": check.n_results,
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
    from lem.base.doc import NAME_WIDTH, NameShortener, paint, wrapped

    width = min(width, WIDEST)
    names = [item.name for item in check.run.subjects] if check.run is not None else []
    shortener = NameShortener(names, NAME_WIDTH)
    cycles = max((item.aggregate.n_cycles for item in check.run.subjects), default=0) if check.run is not None else 0
    counts = f"{plural(len(names), 'configuration')} · {plural(cycles, 'cycle')}"
    title = f"{check.campaign_name} · run {check.run_id} · {counts}"
    lines = [paint(line, "bold", is_colour=is_colour) for line in wrapped(title, width)]
    lines += wrapped(shortener.explanation, width) if shortener.explanation else []
    for item in check.findings:
        lines += ["", *_finding_lines(item, shortener, len(names), is_colour=is_colour, width=width)]
    return "\n".join([*lines, "", *wrapped(_conclusion(check), width)]) + "\n"


def _finding_lines(item: Finding, shortener: Any, n_all: int, *, is_colour: bool, width: int) -> list[str]:
    from lem.base.doc import paint, wrapped

    label, style = ("WEAK", "red") if item.is_weak else ("note", "yellow")
    is_told = set(item.configurations) <= set(item.reason.data.values())
    whom = "" if is_told else _whom([shortener(name) for name in item.configurations], n_all)
    first, *rest = wrapped(f"{item.kind.replace('_', ' ')}: {item.text}{whom}", width, f"{label:<{_LEAD}}")
    remedy = wrapped(item.remedy, width, f"{'':<{_LEAD}}do: ") if item.remedy else []
    return [paint(label, style, is_colour=is_colour) + first[len(label) :], *rest, *remedy]


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


def _check(where: SelectedRun) -> Check:
    from lem.results.check import check_run
    from lem.results.precision import read_stopping_rule
    from lem.results.store import count_failed

    scan = where.scan()
    return check_run(
        [item.record for item in scan.results],
        failed=count_failed(scan),
        problems=scan.problems,
        stopping=read_stopping_rule(where.results_dir / where.campaign / where.run_id),
        campaign_name=where.campaign,
        run_id=where.run_id,
    )
