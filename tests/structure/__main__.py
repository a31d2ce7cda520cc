"""How large and how well tested a tree is: counts, branch coverage by package, and planted bugs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.structure.trees import ROOT


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.structure", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    counts = commands.add_parser("counts", help="files, lines by kind, import cycles, sizes, modules on each flow")
    counts.add_argument("--commit", metavar="REV", help="of this commit (git archive), not of the working copy")
    counts.add_argument(
        "--tree", type=Path, default=ROOT, metavar="DIR", help="of this folder (default: this checkout)"
    )
    counts.add_argument("--json", action="store_true", help="as one JSON document")
    counts.set_defaults(run=_counts)
    args = parser.parse_args(argv)
    code: int = args.run(args)
    return code


def _counts(args: argparse.Namespace) -> int:
    from tests.structure.counts import print_counts

    return print_counts(args.commit, tree=args.tree, is_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
