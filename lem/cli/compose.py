"""`lem compose`: the compose file that lem brings along."""

from __future__ import annotations

import argparse
from typing import TextIO

from lem.errors import ExitCode

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `lem compose` takes."""
    parser.description = (
        "Print the compose file that campaigns use where there is none: lem compose > docker-compose.yml"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:  # noqa: ARG001 - as every command is called
    """The exit code."""
    from lem.orchestration.compose_files import packaged_compose_file

    out.write(packaged_compose_file())
    return int(ExitCode.OK)
