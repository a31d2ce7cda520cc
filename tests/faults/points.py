"""Where and when faults are tried."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.doubles.fault_injector import ACTIONS, DURABLE_EVENTS, SIGNALS, START, Entry

# What is a signal, or happens to the machine, needs no call that could fail.
WITHOUT_CALL = (*SIGNALS, "clock", "vanish")

# A transition is no call that could fail, and at its start a process has done nothing yet.
_POSSIBLE = {"lem.transition": WITHOUT_CALL, START: tuple(SIGNALS)}

# Each one is gone before `lem.write` of the same file, or is the step that `lem.rename` has told of.
_DURABLE_PREFIX = ".lem-tmp-"
_RUN = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{4}")
_EXPERIMENT = re.compile(r"[0-9a-f]{12}-c[0-9]+")
_NUMBER = re.compile(r"[0-9]+")
# How often these are written depends on the time.
VARYING = ("samples.part", ".lem-tmp-campaign.activity")


@dataclass(frozen=True)
class Point:
    """The nth event of a kind in a kind of process."""

    process: str
    event: str
    nth: int
    detail: str

    def case(self, action: str) -> str:
        return f"{action} at {self.process} {self.event} {self.nth} ({self.detail})"

    @property
    def kind(self) -> tuple[str, str, str]:
        """What it is, whatever the experiment: process, event, and the file or the transition."""
        if self.event == "lem.transition":
            return self.process, self.event, self.detail.partition(" ")[2]
        name = _EXPERIMENT.sub("EXPERIMENT", _RUN.sub("RUN", self.detail.rpartition("/")[2]))
        return self.process, self.event, _NUMBER.sub("N", name)


@dataclass(frozen=True)
class Moment:
    """SIGKILL to a process, some seconds after the start of the campaign."""

    process: str
    after_s: float


def points_of(journal: Iterable[Entry]) -> tuple[Point, ...]:
    """The points of an undisturbed run in their order.

    Of a durable write Python tells the same steps once more; those of its temporary file are left out.
    """
    counts: Counter[tuple[str, str]] = Counter()
    points = []
    for entry in journal:
        counts[entry.process, entry.event] += 1
        is_told_twice = entry.event not in DURABLE_EVENTS and _is_random_name(Path(entry.detail).name)
        if not is_told_twice:
            points.append(Point(entry.process, entry.event, counts[entry.process, entry.event], entry.detail))
    return tuple(points)


def _is_random_name(name: str) -> bool:
    """Whether `lem.base.durable` made it up, or `tempfile` with its prefix."""
    return re.fullmatch(re.escape(_DURABLE_PREFIX) + "([0-9a-f]{16}|[a-z0-9_]{8})", name) is not None


def thin(points: Sequence[Point]) -> tuple[Point, ...]:
    """Of each kind the first and the last; one in the middle where their number depends on the time."""
    kinds: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        kinds.setdefault(point.kind, []).append(point)
    chosen = {
        point
        for (_, _, name), group in kinds.items()
        for point in (group[0], group[len(group) // 2 if name in VARYING else -1])
    }
    return tuple(point for point in points if point in chosen)


def after_completed(points: Sequence[Point], experiments: int) -> tuple[Point, ...]:
    """Those from the moment on at which so many experiments are completed."""
    completed = [index for index, point in enumerate(points) if point.detail.endswith(" completed")]
    return tuple(points[completed[experiments - 1] :] if experiments else points)


def spread(points: Sequence[Point], actions: Sequence[str], passes: int = 1) -> list[tuple[Point, str]]:
    """Each point with one of the actions in turn, pass by pass, in each pass with the next one.

    As many passes as actions try every action at every point.
    """
    pairs = []
    for number in range(min(passes, len(actions))):
        turns: Counter[tuple[str, ...]] = Counter()
        for point in points:
            possible = tuple(action for action in actions if action in _POSSIBLE.get(point.event, ACTIONS))
            if number < len(possible):
                pairs.append((point, possible[(turns[possible] + number) % len(possible)]))
                turns[possible] += 1
    return pairs


def random_moments(processes: Sequence[str], count: int, elapsed_s: float, rng: random.Random) -> list[Moment]:
    """Moments spread over the time a campaign takes, the processes in turn."""
    turns = itertools.cycle(processes)
    return [Moment(next(turns), rng.uniform(0.0, elapsed_s)) for _ in range(count)]
