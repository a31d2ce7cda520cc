"""`lem check`: what weakens the numbers of a campaign, each with a remedy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, TextIO

from lem.base.doc import NAME_WIDTH, NAMES_SHOWN, Doc, NameShortener, screen_of, write_json
from lem.base.errors import ExitCode
from lem.base.log import WIDTH
from lem.base.units import plural, some_of
from lem.cli.options import add_json, add_junit, add_results_dir, add_state_dir, folder_options, write_file
from lem.cli.selection import resolve_run
from lem.results.check import Finding, check_run
from lem.results.run import Run

SCHEMA_VERSION = 1

_LEAD = 6


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List what weakens the numbers of a campaign, each with a remedy. WEAK: do not rely on the numbers or "
        "verdicts; note: something to know about them."
    )
    parser.epilog = "exit codes: 0 nothing is weak, 2 no such campaign, 4 something is weak (inconclusive)"
    parser.add_argument("campaign", metavar="CAMPAIGN", help="a campaign (its last run) or a run")
    add_results_dir(parser)
    add_state_dir(parser)
    add_junit(parser, "the findings")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:  # noqa: ARG001 - all commands get both
    checked = resolve_run(args.results_dir, args.campaign).read(args.state_dir, is_checked=True)
    findings = check_run(checked)
    args.next = ["report", args.campaign, *folder_options(args.results_dir)]
    if args.junit is not None:
        from lem.results.junit import junit_of_check

        write_file(args.junit, junit_of_check(checked, findings), "--junit")
    if args.json:
        write_json(out, check_document(checked, findings))
    else:
        out.write(render_check(checked, findings, **screen_of(out)))
    return int(ExitCode.INCONCLUSIVE if any(item.is_weak for item in findings) else ExitCode.OK)


def check_document(checked: Run, findings: Sequence[Finding]) -> dict[str, Any]:
    numbers = {item.name: item.number for item in checked.configurations}
    return {
        "schema_version": SCHEMA_VERSION,
        "campaign": checked.campaign_name,
        "run_id": checked.run_id,
        "results": len(checked.records),
        "weak": any(item.is_weak for item in findings),
        "findings": [
            {
                "kind": item.kind,
                "weak": item.is_weak,
                "text": item.text,
                "remedy": item.remedy,
                "configurations": list(item.configurations),
                "numbers": [numbers[name] for name in item.configurations if name in numbers],
            }
            for item in findings
        ],
    }


def render_check(checked: Run, findings: Sequence[Finding], *, is_colour: bool = False, width: int = WIDTH) -> str:
    doc = Doc(width, is_colour=is_colour)
    configurations = checked.with_results
    shortener = NameShortener([item.name for item in configurations], NAME_WIDTH)
    labels = {item.name: f"{item.number} {shortener(item.name)}" for item in checked.configurations}
    cycles = max((item.n_cycles for item in configurations), default=0)
    counts = f"{plural(len(configurations), 'configuration')} · {plural(cycles, 'cycle')}"
    doc.text(f"{checked.campaign_name} · run {checked.run_id} · {counts}", "bold")
    if shortener.explanation:
        doc.text(shortener.explanation)
    for item in findings:
        doc.block()
        label, style = ("WEAK", "red") if item.is_weak else ("note", "yellow")
        names = item.configurations
        is_named = not names or len(names) == len(configurations) or set(names) <= set(item.reason.data.values())
        whom = "" if is_named else f" ({some_of([labels.get(name, name) for name in names], NAMES_SHOWN)})"
        doc.labelled(f"{label:<{_LEAD}}", f"{item.kind.replace('_', ' ')}: {item.text}{whom}", style)
        if item.remedy:
            doc.text(item.remedy, lead=f"{'':<{_LEAD}}do: ")
    weak = sum(item.is_weak for item in findings)
    notes = len(findings) - weak
    what = f"{plural(weak, 'thing')} {'weakens' if weak == 1 else 'weaken'} the numbers"
    what = what if weak else "Nothing was found that weakens the numbers"
    doc.block()
    doc.text(f"{what}; {plural(notes, 'note')}." if notes else f"{what}.")
    return doc.render()
