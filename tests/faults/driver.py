"""Tries every fault and counts what it cost.

    python -m tests.faults.driver [--only plain,merge] [--actions kill,enospc] [--thin] [--moments 20] [--jobs 2]
    python -m tests.faults.containers

Each small campaign, and each command that writes files, runs once undisturbed and writes down each write, fsync,
rename, folder and transition it passes through, in the host, the supervisor, the engine and the sampler. Then, for each
of these points, a new one is stopped or made to fail there, or the disk or the clock changes, and it is resumed.
Afterwards every experiment must be completed exactly once, no result partial or lost, no duration wrong, and no
process left.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.doubles.fault_injector import ACTIONS
from tests.faults.campaigns import enumerate_points, try_all, try_moment, try_point
from tests.faults.commands import COMMANDS, Command, command_points, try_command
from tests.faults.points import Point, random_moments, spread, thin
from tests.faults.sandbox import copy_program
from tests.faults.scenarios import SCENARIOS, Scenario, Tools
from tests.faults.verdict import Verdict, format_table

__all__ = ["main", "show"]

# Of the faults that cost something, this many are shown with their folder.
SHOWN = 10


def main() -> int:
    """0 when no fault cost anything, 1 otherwise; the table on stdout."""
    args = _parser().parse_args()
    actions, names = args.actions.split(","), args.only.split(",")
    if not set(actions) <= set(ACTIONS):
        raise SystemExit(f"--actions: some of {', '.join(ACTIONS)}")
    folder = Path(tempfile.mkdtemp(prefix="lem-faults-"))
    tools = copy_program(folder / "program")
    verdicts: list[Verdict] = []
    for scenario in SCENARIOS:
        if scenario.name in names:
            verdicts += _try_campaign(scenario, folder / scenario.name, tools, args, actions)
    for command in COMMANDS:
        if command.name in names:
            verdicts += _try_command(command, folder / command.name, tools, args, actions)
    is_good = show(verdicts)
    if is_good:
        shutil.rmtree(folder)
    return 0 if is_good else 1


def _parser() -> argparse.ArgumentParser:
    names = [item.name for item in (*SCENARIOS, *COMMANDS)]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(names), metavar="A,B", help="what is tried (%(default)s)")
    parser.add_argument("--actions", default=",".join(ACTIONS), metavar="A,B", help="tried at each point (%(default)s)")
    parser.add_argument("--thin", action="store_true", help="of each kind of point the first and the last alone")
    parser.add_argument("--moments", type=int, default=20, help="random moments of SIGKILL, a campaign (%(default)s)")
    parser.add_argument("--jobs", type=int, default=4, help="tried at a time (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the random moments (%(default)s)")
    return parser


def _chosen(points: Sequence[Point], args: argparse.Namespace, actions: Sequence[str]) -> list[tuple[Point, str]]:
    """Each action at each point."""
    kept = thin(points) if args.thin else points
    return [pair for action in actions for pair in spread(kept, [action])]


def _try_campaign(
    scenario: Scenario, folder: Path, tools: Tools, args: argparse.Namespace, actions: Sequence[str]
) -> list[Verdict]:
    points, elapsed_s = enumerate_points(folder / "undisturbed", tools, scenario)
    # A sampler writes fifty times a second; its writes are all alike.
    points = tuple(point for point in points if point.process != "sampler" or point in thin(points))
    print(f"{scenario.name}: {len(points)} points in {scenario.experiments} experiments, {elapsed_s:.1f} s", flush=True)
    moments = random_moments(scenario.processes, args.moments, elapsed_s, random.Random(args.seed))
    cases = [
        *(partial(try_point, point, action, scenario) for point, action in _chosen(points, args, actions)),
        *(partial(try_moment, moment, scenario) for moment in moments),
    ]
    return try_all(cases, folder, tools, scenario, jobs=args.jobs)


def _try_command(
    command: Command, folder: Path, tools: Tools, args: argparse.Namespace, actions: Sequence[str]
) -> list[Verdict]:
    points, due = command_points(folder / "undisturbed", tools, command)
    print(f"lem {command.name}: {len(points)} points", flush=True)
    chosen = _chosen(points, args, [action for action in actions if action != "clock"])
    cases = [partial(try_command, point, action, command, due) for point, action in chosen]
    return try_all(cases, folder, tools, command, jobs=args.jobs)


def show(verdicts: Sequence[Verdict]) -> bool:
    """Print the table, and what cost something; whether nothing did."""
    print(format_table(verdicts))
    bad = [verdict for verdict in verdicts if not verdict.is_good]
    for verdict in bad[:SHOWN]:
        print(verdict)
    return not bad


if __name__ == "__main__":
    sys.exit(main())
