"""Tries every fault and counts what it cost, in one table.

    python -m tests.faults [--only plain,merge] [--actions kill,enospc] [--passes 1] [--thin] [--moments 20] [--jobs 4]

Each small campaign, on this machine and in containers, and each command that writes files, runs once undisturbed and
writes down each write, fsync, rename, folder and transition it passes through, in the host, the supervisor, the engine
and the sampler. Then, for each of these points, a new one is stopped or made to fail there, or the disk or the clock
changes, and it is resumed. Afterwards every experiment must be completed exactly once, no result partial or lost, no
duration wrong, no bug reported, no success claimed for results that are missing, and no process or container left.

Containers need the lab (tests/lab/README.md) and are left out, with a line that says so, where it is not up.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.doubles.fault_injector import ACTIONS
from tests.faults.campaigns import enumerate_points, try_all, try_moment, try_point
from tests.faults.commands import COMMANDS, Command, command_points, try_command
from tests.faults.containers import container_moments, container_points, try_in_containers
from tests.faults.points import after_completed, random_moments, spread, thin
from tests.faults.sandbox import copy_program
from tests.faults.scenarios import SCENARIOS, Scenario, Tools
from tests.faults.trials import Trial, try_each
from tests.faults.verdict import Verdict, format_table
from tests.needs import missing

CONTAINERS = "containers"
NAMES = (*(scenario.name for scenario in SCENARIOS), CONTAINERS, *(command.name for command in COMMANDS))


def main() -> int:
    """0 when no fault cost anything, 1 otherwise; the table on stdout."""
    args = _parser().parse_args()
    names, actions = args.only.split(","), args.actions.split(",")
    if not set(actions) <= set(ACTIONS) or not set(names) <= set(NAMES):
        raise SystemExit(f"--actions: some of {', '.join(ACTIONS)}; --only: some of {', '.join(NAMES)}")
    folder = Path(tempfile.mkdtemp(prefix="lem-faults-"))
    tools = copy_program(folder / "program")
    begin = time.monotonic()
    verdicts: list[Verdict] = []
    for scenario in SCENARIOS:
        if scenario.name in names:
            verdicts += _try_campaign(scenario, folder / scenario.name, tools, args, actions)
    for command in COMMANDS:
        if command.name in names:
            verdicts += _try_command(command, folder / command.name, tools, args, actions)
    if CONTAINERS in names:
        verdicts += _try_containers(folder / CONTAINERS, tools, args, actions)
    print(format_table(verdicts))
    print(f"in {time.monotonic() - begin:.0f} s")
    if all(verdict.is_good for verdict in verdicts):
        shutil.rmtree(folder)
        return 0
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(NAMES), metavar="A,B", help="where it is tried (%(default)s)")
    parser.add_argument("--actions", default=",".join(ACTIONS), metavar="A,B", help="what is tried there (%(default)s)")
    parser.add_argument(
        "--passes", type=int, default=len(ACTIONS), help="actions tried at each point, the points in turn (all)"
    )
    parser.add_argument("--thin", action="store_true", help="of each kind of point the first and the last alone")
    parser.add_argument("--moments", type=int, default=20, help="random moments of SIGKILL, a campaign (%(default)s)")
    parser.add_argument("--jobs", type=int, default=4, help="tried at a time (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the random moments (%(default)s)")
    return parser


def _try_campaign(
    scenario: Scenario, folder: Path, tools: Tools, args: argparse.Namespace, actions: Sequence[str]
) -> list[Verdict]:
    points, elapsed_s = enumerate_points(folder / "undisturbed", tools, scenario)
    # A sampler writes fifty times a second; its writes are all alike.
    points = tuple(point for point in points if point.process != "sampler" or point in thin(points))
    kept = thin(points) if args.thin else points
    own = after_completed(points, scenario.like_plain)
    pairs = [
        *spread([point for point in kept if point not in own], actions),
        *spread([point for point in kept if point in own], actions, args.passes),
    ]
    print(f"{scenario.name}: {len(points)} points, {len(pairs)} faults, {elapsed_s:.1f} s undisturbed", flush=True)
    moments = random_moments(scenario.processes, args.moments, elapsed_s, random.Random(args.seed))
    cases = [
        *(partial(try_point, point, action, scenario) for point, action in pairs),
        *(partial(try_moment, moment, scenario) for moment in moments),
    ]
    return try_all(cases, folder, tools, scenario, jobs=args.jobs)


def _try_command(
    command: Command, folder: Path, tools: Tools, args: argparse.Namespace, actions: Sequence[str]
) -> list[Verdict]:
    points, due = command_points(folder / "undisturbed", tools, command)
    possible = [action for action in actions if action not in ("clock", "vanish")]
    pairs = spread(thin(points) if args.thin else points, possible, args.passes)
    print(f"lem {command.name}: {len(points)} points, {len(pairs)} faults", flush=True)
    cases = [partial(try_command, point, action, command, due) for point, action in pairs]
    return try_all(cases, folder, tools, command, jobs=args.jobs)


def _try_containers(folder: Path, tools: Tools, args: argparse.Namespace, actions: Sequence[str]) -> list[Verdict]:
    """One action a point, in turn, and every one at a transition: a campaign in containers takes seconds."""
    if reason := missing("lab"):
        print(f"containers are left out: {reason}", flush=True)
        return []
    points, elapsed_s = container_points(folder / "undisturbed", tools)
    kept = thin(points) if args.thin else points
    actions = [action for action in actions if action != "vanish"]  # which a container may not see
    transitions = [point for point in kept if point.event == "lem.transition"]
    pairs = dict.fromkeys([*spread(kept, actions), *spread(transitions, actions, args.passes)])
    print(f"containers: {len(points)} points, {len(pairs)} faults, {elapsed_s:.1f} s undisturbed", flush=True)
    trials: list[Trial] = [partial(try_in_containers, point, action, tools=tools) for point, action in pairs]
    trials += container_moments(args.moments, elapsed_s, random.Random(args.seed), tools)
    return try_each(trials, folder, jobs=args.jobs)


if __name__ == "__main__":
    sys.exit(main())
