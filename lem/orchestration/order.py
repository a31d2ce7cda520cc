"""In what order experiments run, and what follows from it: where gaps fall, and which ones load an engine. Pure."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from lem.base.durable import GROUPED, INTERLEAVED, SHUFFLED, STRUCTURES

T = TypeVar("T")

GapKind = Literal["configuration", "cycle"]


class Placed(Protocol):
    """What of an experiment decides about gaps and loads."""

    @property
    def config_hash(self) -> str: ...

    @property
    def engine_key(self) -> str: ...

    @property
    def cycle_index(self) -> int: ...


def order_experiments(
    configurations: Sequence[T], *, engine_key: Callable[[T], str], cycles: int, structure: str, seed: int
) -> list[tuple[T, int]]:
    """Every configuration in every cycle (from 0), in the order to run.

    `interleaved` is ABC ABC, `grouped` AAA BBB, `shuffled` another order in every cycle. Within a cycle equal engine
    keys lie together, the first of them where it was given, since each cycle loads an engine once. A cycle's shuffle
    depends on the seed and the cycle alone, so a campaign prolonged by a cycle keeps the order of the others.

    Raises:
        ValueError: no such structure.
    """
    if structure == GROUPED:
        return [(item, cycle) for item in configurations for cycle in range(cycles)]
    groups = _group(configurations, engine_key)
    if structure == INTERLEAVED:
        return [(item, cycle) for cycle in range(cycles) for group in groups for item in group]
    if structure == SHUFFLED:
        return [(item, cycle) for cycle in range(cycles) for item in _shuffle(groups, seed, cycle)]
    raise ValueError(f"structure {structure!r} is none of {', '.join(STRUCTURES)}")


def _group(configurations: Sequence[T], engine_key: Callable[[T], str]) -> list[list[T]]:
    groups: dict[str, list[T]] = {}
    for item in configurations:
        groups.setdefault(engine_key(item), []).append(item)
    return list(groups.values())


def _shuffle(groups: Sequence[Sequence[T]], seed: int, cycle: int) -> list[T]:
    """Engines in another order, and the configurations of each; one engine's stay together."""
    # Seeding with text hashes it with SHA-512, the same on every Python and machine.
    rng = random.Random(f"{seed}/{cycle}")
    shuffled = [rng.sample(group, len(group)) for group in groups]
    rng.shuffle(shuffled)
    return [item for group in shuffled for item in group]


def gaps_before(experiments: Sequence[Placed], structure: str) -> list[GapKind | None]:
    """The gap before each experiment; None before the first.

    A cycle, or in a grouped campaign the block of one configuration, ends when its last experiment in `experiments`
    ends, so a resumed part of a plan has its gaps in the right places too. The cycle gap then replaces the
    configuration gap.
    """
    blocks = [item.config_hash if structure == GROUPED else item.cycle_index for item in experiments]
    kinds: list[GapKind | None] = [
        "configuration" if one == two else "cycle" for one, two in itertools.pairwise(blocks)
    ]
    return [None, *kinds] if experiments else []


def loads_engine(experiments: Sequence[Placed], *, reuse: str, is_cold: bool = False) -> list[bool]:
    """Whether each experiment loads an engine rather than reuse the one before it left.

    One engine is resident at a time. With `reuse: cycle` it is kept for the next experiment of the same cycle and
    engine key, with `campaign` also across cycles, with `none` and under a forced cold start never.
    """
    if reuse == "none" or is_cold:
        return [True] * len(experiments)
    engines = [(item.engine_key, item.cycle_index if reuse == "cycle" else 0) for item in experiments]
    return [True, *(one != two for one, two in itertools.pairwise(engines))] if experiments else []


@dataclass(frozen=True)
class Prices:
    """What earlier experiments took, in seconds.

    Attributes:
        measured_by_config: an experiment beside its load, by config_hash.
        load_by_engine: a load, by engine_key.
        gap_s: a gap, which ends early once the device is back; None where none was kept: then each takes its cap.
    """

    measured_by_config: Mapping[str, float] = field(default_factory=dict)
    load_by_engine: Mapping[str, float] = field(default_factory=dict)
    gap_s: float | None = None


@dataclass(frozen=True)
class ExpectedTime:
    """How long experiments will take, in seconds; None where no earlier result tells.

    Attributes:
        gaps_s: all gaps.
        is_complete: every experiment's own time is known from an earlier result, not taken from others.
    """

    measured_s: float | None
    loading_s: float | None
    gaps_s: float
    is_complete: bool

    @property
    def total_s(self) -> float | None:
        """All of it; None when a part is not known."""
        if self.measured_s is None or self.loading_s is None:
            return None
        return self.measured_s + self.loading_s + self.gaps_s


def expected_time(
    experiments: Sequence[Placed],
    *,
    loads: Sequence[bool],
    gaps_s: float,
    prices: Prices,
) -> ExpectedTime:
    """The time that experiments will take, from what earlier ones took.

    Where a configuration or an engine was never run, the mean of those that were stands for it.

    Args:
        loads: as `loads_engine`.
        gaps_s: all gaps together.
    """
    measured_by_config, load_by_engine = prices.measured_by_config, prices.load_by_engine
    loading = [item for item, is_load in zip(experiments, loads, strict=True) if is_load]
    return ExpectedTime(
        measured_s=_sum_known([item.config_hash for item in experiments], measured_by_config),
        loading_s=_sum_known([item.engine_key for item in loading], load_by_engine),
        gaps_s=gaps_s,
        is_complete=all(item.config_hash in measured_by_config for item in experiments)
        and all(item.engine_key in load_by_engine for item in loading),
    )


def _sum_known(names: Sequence[str], known: Mapping[str, float]) -> float | None:
    if not names:
        return 0.0
    if not known:
        return None
    mean = sum(known.values()) / len(known)
    return sum(known.get(name, mean) for name in names)
