"""Tries every fault and counts what it cost, in one table.

    python -m tests.faults [--only plain,merge] [--actions kill,enospc] [--passes 1] [--thin] [--moments 20] [--jobs 4]
                           [--continue FILE]

Each small campaign, on this machine and in containers, and each command that writes files, runs once undisturbed and
writes down each write, fsync, rename, folder and transition it passes through, in the host, the supervisor, the engine
and the sampler. Then, for each of these points, a new one is stopped or made to fail there, or the disk or the clock
changes, and it is resumed. Afterwards every experiment must be completed exactly once, no result partial or lost, no
duration wrong, no bug reported, no success claimed for results that are missing, and no process or container left.

The undisturbed runs, and those that are killed at random moments, are processes of Python as a person starts them. In
the others, which are thousands, lem is imported once and forked (tests/doubles/warm_start.py): they pass the same
points in a third of the CPU time. With --continue, a sweep that was stopped, by Ctrl-C too, goes on where it was.

Containers need the lab (tests/lab/README.md) and are left out, with a line that says so, where it is not up.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.doubles.fault_injector import ACTIONS
from tests.faults.campaigns import enumerate_points, in_sandbox, try_moment, try_point
from tests.faults.commands import COMMANDS, Command, command_points, try_command
from tests.faults.containers import container_moments, container_points, try_in_containers
from tests.faults.points import Point, after_completed, random_moments, spread, thin
from tests.faults.sandbox import copy_program
from tests.faults.scenarios import SCENARIOS, Scenario, Tools
from tests.faults.trials import Sitting, Trial, try_each
from tests.faults.verdict import format_table
from tests.needs import missing

CONTAINERS = "containers"
_MEMORY = "/dev/shm"
NAMES = (*(scenario.name for scenario in SCENARIOS), CONTAINERS, *(command.name for command in COMMANDS))


def main() -> int:
    """0 when no fault cost anything, 1 otherwise; the table on stdout."""
    args = _parser().parse_args()
    names, actions = args.only.split(","), args.actions.split(",")
    if not set(actions) <= set(ACTIONS) or not set(names) <= set(NAMES):
        raise SystemExit(f"--actions: some of {', '.join(ACTIONS)}; --only: some of {', '.join(NAMES)}")
    # Campaigns in memory, where a sync takes no time.
    memory = _MEMORY if "TMPDIR" not in os.environ and os.access(_MEMORY, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="lem-faults-", dir=memory))
    with tempfile.TemporaryDirectory(prefix="lem-program-") as program:
        tools = copy_program(Path(program) / "program")
        sitting = Sitting(args.continues, tools.program / "lem")
        begin = time.monotonic()
        trials: dict[str, Trial] = {}
        for scenario in SCENARIOS:
            if scenario.name in names:
                trials |= _of_campaign(scenario, folder, tools, args, actions)
        for command in COMMANDS:
            if command.name in names:
                trials |= _of_command(command, folder, tools, args, actions)
        if CONTAINERS in names:
            trials |= _of_containers(folder, tools, args, actions)
        try_each(trials, folder, jobs=args.jobs, sitting=sitting)
    print(format_table(sitting.verdicts))
    print(f"{sitting.describe_programs()}; in {time.monotonic() - begin:.0f} s")
    if all(verdict.is_good for verdict in sitting.verdicts):
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
    parser.add_argument(
        "--continue",
        dest="continues",
        type=Path,
        metavar="FILE",
        help="keep each verdict in this file, and try only what is not in it or had a cost; the table counts all",
    )
    parser.add_argument("--seed", type=int, default=42, help="of the random moments (%(default)s)")
    return parser


def _of_campaign(
    scenario: Scenario, folder: Path, tools: Tools, args: argparse.Namespace, actions: Sequence[str]
) -> dict[str, Trial]:
    points, elapsed_s = enumerate_points(folder / f"{scenario.name}-undisturbed", tools, scenario)
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
    cases = {
        **{_name(scenario.name, *pair): partial(try_point, *pair, scenario) for pair in pairs},
        **{
            f"{scenario.name}: SIGKILL {number} at random": partial(try_moment, moment, scenario)
            for number, moment in enumerate(moments, 1)
        },
    }
    return {name: in_sandbox(case, tools, scenario) for name, case in cases.items()}


def _of_command(
    command: Command, folder: Path, tools: Tools, args: argparse.Namespace, actions: Sequence[str]
) -> dict[str, Trial]:
    points, due = command_points(folder / f"{command.name}-undisturbed", tools, command)
    possible = [action for action in actions if action not in ("clock", "vanish")]
    pairs = spread(thin(points) if args.thin else points, possible, args.passes)
    print(f"lem {command.name}: {len(points)} points, {len(pairs)} faults", flush=True)
    cases = {_name(f"lem {command.name}", *pair): partial(try_command, *pair, command, due) for pair in pairs}
    return {name: in_sandbox(case, tools, command) for name, case in cases.items()}


def _of_containers(folder: Path, tools: Tools, args: argparse.Namespace, actions: Sequence[str]) -> dict[str, Trial]:
    """One action a point, in turn, and every one at a transition: a campaign in containers takes seconds."""
    if reason := missing("lab"):
        print(f"containers are left out: {reason}", flush=True)
        return {}
    points, elapsed_s = container_points(folder / "containers-undisturbed", tools)
    kept = thin(points) if args.thin else points
    actions = [action for action in actions if action != "vanish"]  # which a container may not see
    transitions = [point for point in kept if point.event == "lem.transition"]
    pairs = dict.fromkeys([*spread(kept, actions), *spread(transitions, actions, args.passes)])
    print(f"containers: {len(points)} points, {len(pairs)} faults, {elapsed_s:.1f} s undisturbed", flush=True)
    moments = container_moments(args.moments, elapsed_s, random.Random(args.seed), tools)
    return {
        **{_name(CONTAINERS, *pair): partial(try_in_containers, *pair, tools=tools) for pair in pairs},
        **{f"{CONTAINERS}: SIGKILL {number} at random": moment for number, moment in enumerate(moments, 1)},
    }


def _name(where: str, point: Point, action: str) -> str:
    """The fault, the same in every sitting."""
    return f"{where}: {action} at {point.process} {point.event} {point.nth}"


if __name__ == "__main__":
    sys.exit(main())
