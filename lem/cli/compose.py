"""`lem compose`: the compose file that lem brings along."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TextIO

from lem.errors import ExitCode

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> None:
    """Add `compose` to the command line."""
    parser = subparsers.add_parser(
        "compose",
        help="print the default compose file",
        description="Print the compose file that campaigns use where there is none: lem compose > docker-compose.yml",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:  # noqa: ARG001 - as every command is called
    """The exit code."""
    from lem.orchestration.compose_files import packaged_compose_file

    out.write(packaged_compose_file())
    return int(ExitCode.OK)
