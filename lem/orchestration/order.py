"""The order of the experiments within a cycle. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from lem.base.durable import BALANCED, SHUFFLED

_Item = TypeVar("_Item")


def cycle_order(engine_keys: Sequence[str], structure: str, seed: int, cycle: int) -> list[int]:
    """The order of a cycle: indices of the configurations with these engine keys."""
    # Equal keys are adjacent, since each cycle loads an engine once. The order depends on nothing but the arguments, so
    # a campaign prolonged by a cycle keeps the order of the others.
    by_key: dict[str, list[int]] = {}
    for index, key in enumerate(engine_keys):
        by_key.setdefault(key, []).append(index)
    groups = list(by_key.values())
    if structure == SHUFFLED:
        # Seeding with text hashes it with SHA-512, the same on every Python and machine.
        rng = random.Random(f"{seed}/{cycle}")
        groups = [rng.sample(group, len(group)) for group in groups]
        rng.shuffle(groups)
    elif structure == BALANCED:
        groups = _rotated_and_mirrored(groups, cycle)
    return [index for group in groups for index in group]


def _rotated_and_mirrored(groups: Sequence[list[int]], cycle: int) -> list[list[int]]:
    """Every second cycle mirrors the one before, which cancels a linear trend; each pair of cycles starts one later."""
    # Groups with several members rotate half as often as the members. At the same rate, two groups of two would only
    # run the mirrored order again.
    pair = cycle // 2
    turn = pair // 2 if any(len(group) > 1 for group in groups) else pair
    rotated = [_rotated(group, pair) for group in _rotated(groups, turn)]
    return [group[::-1] for group in rotated[::-1]] if cycle % 2 else rotated


def _rotated(items: Sequence[_Item], by: int) -> list[_Item]:
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]
