"""How large and how well tested a tree is: counts, branch coverage by package, and planted bugs."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import replace
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
    _add_coverage(commands.add_parser("coverage", help="branches of lem/ that the tests take, by package"))
    _add_plant(commands.add_parser("plant", help="plant bugs in a copy of a tree and see which its tests catch"))
    args = parser.parse_args(argv)
    if getattr(args, "nice", 0):
        os.nice(args.nice)
    code: int = args.run(args)
    return code


def _add_coverage(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run tests and print the branch coverage of lem/ by package; `compare` two such runs."
    parser.add_argument("--tests", nargs="+", default=[], metavar="PATH", help="default: tests/unit tests/integration")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the coverage of each module as JSON")
    parser.add_argument("--pytest", action="append", default=[], metavar="OPTION", help="for pytest, as --pytest=-x")
    _add_tree_and_nice(parser)
    parser.set_defaults(run=_coverage)
    compare = parser.add_subparsers(metavar="compare").add_parser(
        "compare", help="fail if the branch coverage of any package is lower in NEW"
    )
    compare.add_argument("old", type=Path, metavar="OLD", help="JSON of the old tree")
    compare.add_argument("new", type=Path, metavar="NEW", help="JSON of the new tree")
    compare.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="a package and what it is called in the new tree (default: backends=engines experiment=worker =base)",
    )
    compare.set_defaults(run=_compare_coverage)


def _add_plant(parser: argparse.ArgumentParser) -> None:
    parser.description = "Plant the bugs of planted.yaml in a copy of a tree, one at a time; `compare` two such runs."
    parser.add_argument("--bugs", metavar="REGEX", default="", help="only those whose name matches")
    parser.add_argument("--output", type=Path, metavar="FILE", help="add what became of each bug to this JSON file")
    parser.add_argument("--wide", action="store_true", help="run all unit tests of a bug's package, not those it names")
    parser.add_argument("--pytest", action="append", default=[], metavar="OPTION", help="for pytest, as --pytest=-v")
    parser.add_argument("--check", action="store_true", help="only say whether each place is found; no test is run")
    _add_tree_and_nice(parser)
    parser.set_defaults(run=_plant)
    compare = parser.add_subparsers(metavar="compare").add_parser("compare", help="fail if NEW catches fewer bugs")
    compare.add_argument("old", type=Path, metavar="OLD", help="JSON of the old tree")
    compare.add_argument("new", type=Path, metavar="NEW", help="JSON of the new tree")
    compare.set_defaults(run=_compare_plants)


def _add_tree_and_nice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tree", type=Path, default=ROOT, metavar="DIR", help="a tree (default: this checkout)")
    parser.add_argument("--nice", type=int, default=0, metavar="N", help="lower the priority, as nice(1); 19 is lowest")


def _counts(args: argparse.Namespace) -> int:
    from tests.structure.counts import print_counts

    return print_counts(args.commit, tree=args.tree, is_json=args.json)


def _coverage(args: argparse.Namespace) -> int:
    from tests.structure.branches import print_coverage

    return print_coverage(args.tree.resolve(), args.tests, args.output, args.pytest)


def _compare_coverage(args: argparse.Namespace) -> int:
    from tests.structure.branches import NEW_NAMES, print_comparison

    names = dict(text.split("=", 1) for text in args.map)
    return print_comparison(args.old, args.new, {**NEW_NAMES, **names})


def _plant(args: argparse.Namespace) -> int:
    from tests.structure.planting import find, plant, read_bugs
    from tests.structure.trees import modules

    tree = args.tree.resolve()
    bugs = [bug for bug in read_bugs() if re.search(args.bugs, bug.name)]
    bugs = [replace(bug, tests=()) for bug in bugs] if args.wide else bugs
    if not args.check:
        return plant(tree, bugs, args.output, args.pytest)
    known = modules(tree, "lem")
    lost = {bug.name: found for bug in bugs if isinstance(found := find(bug, known), str)}
    for name, problem in lost.items():
        print(f"{name}: {problem}")
    print(f"{len(bugs) - len(lost)} of {len(bugs)} bugs have a place in {tree}")
    return int(bool(lost))


def _compare_plants(args: argparse.Namespace) -> int:
    from tests.structure.planting import compare

    return compare(args.old, args.new)


if __name__ == "__main__":
    sys.exit(main())
