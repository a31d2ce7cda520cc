"""`lem doctor`: whether this host is fit for a campaign, and what to do where it is not."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lem import log
from lem.cli.streams import terminal_width, write_json
from lem.errors import ExitCode
from lem.orchestration.findings import FAILED, OK, SKIPPED, WARNING

if TYPE_CHECKING:
    from lem.orchestration.doctor import Verdict

__all__ = ["add_arguments", "run"]

_WIDEST = 100
_STATUS_WIDTH = 9
_STYLES = {OK: "bold", WARNING: "yellow", FAILED: "red", SKIPPED: "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `lem doctor` takes."""
    parser.description = (
        "Check that campaigns can run in containers here. Exit code 0 when they can, else 2; the last line"
        " says whether --executor local is left."
    )
    parser.add_argument(
        "--backend", action="append", default=[], metavar="NAME", help="a backend that has to be there; may be repeated"
    )
    parser.add_argument("--compose-file", metavar="FILE", help="compose file; several with colons between them")
    parser.add_argument("--env-file", type=Path, metavar="FILE", help="environment file for compose")
    parser.add_argument(
        "--results-dir", "-o", type=Path, default=Path("results"), metavar="DIR", help="default: results"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:  # noqa: ARG001 - as every command is called
    """The exit code: 2 when a campaign in containers cannot run here."""
    from lem.orchestration.doctor import CHECKS, Host, examine

    host = Host(
        folder=Path.cwd(),
        compose_file=args.compose_file,
        env_file=args.env_file,
        backends=tuple(args.backend),
        results_dir=args.results_dir,
    )
    verdict = examine(host, CHECKS)
    if args.json:
        write_json(out, _document(verdict))
    else:
        width = min(terminal_width(out), _WIDEST)
        out.write(_as_text(verdict, is_colour=log.is_colour_wanted(out), width=width))
    return int(ExitCode.OK if verdict.is_ok else ExitCode.USAGE)


def _document(verdict: Verdict) -> dict[str, Any]:
    checks = [{"name": name, **dataclasses.asdict(item)} for name, item in verdict.findings.items()]
    return {"schema_version": 1, "ok": verdict.is_ok, "executors": list(verdict.executors), "checks": checks}


def _as_text(verdict: Verdict, *, is_colour: bool, width: int) -> str:
    from lem.results.layout import paint, wrapped

    name_width = max(map(len, verdict.findings)) + 2
    indent = " " * (name_width + _STATUS_WIDTH)
    lines = []
    for name, item in verdict.findings.items():
        status = f"{item.status:<{_STATUS_WIDTH}}"
        first, *rest = wrapped(item.message, width, f"{name:<{name_width}}{status}")
        lines += [first.replace(status, paint(status, _STYLES[item.status], is_colour=is_colour), 1), *rest]
        if item.remedy and item.status != "ok":
            lines += wrapped(item.remedy, width, f"{indent}→ ")
    lines += ["", *wrapped(_conclusion(verdict), width)]
    return "\n".join(lines) + "\n"


def _conclusion(verdict: Verdict) -> str:
    if verdict.is_ok:
        return "this host is fit for campaigns in containers"
    failed = ", ".join(verdict.failed)
    if verdict.is_ok_without_containers:
        return f"not fit for campaigns in containers: {failed}; fit for --executor local"
    return f"not fit: {failed}"
