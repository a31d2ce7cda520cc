"""What stands between two configurations beside what their settings say: another card, driver, prompts, lengths."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lem.reasons import Reason
from lem.record import Record

__all__ = ["Obstacle", "blocking_reason", "find_obstacles"]

# Lengths are whole tokens; what differs by less comes from a rare early end.
LENGTH_TOLERANCE = 0.01
_ID_SHOWN = 12
_ALL_GROUPS = ("energy", "throughput", "tokens", "latency")


@dataclass(frozen=True)
class Obstacle:
    """One thing that is not the same on both sides.

    Attributes:
        reason: what, with both values.
        is_blocking: nothing can be said about the configurations for it.
        groups: the groups of metrics it concerns.
    """

    reason: Reason
    is_blocking: bool = True
    groups: tuple[str, ...] = _ALL_GROUPS

    @property
    def text(self) -> str:
        """It in words."""
        return self.reason.text


def find_obstacles(
    before: Sequence[Record], after: Sequence[Record], *, is_anchored: bool = False
) -> tuple[Obstacle, ...]:
    """What differs between the used records of two configurations.

    Args:
        is_anchored: each side is set against one configuration of its own place and day: what that shares with it
            (a card's sensor, a driver) divides out, so it is told and blocks nothing.
    """
    if not before or not after:
        return ()
    found = (
        _kinds(before, after, "other_gpus", _gpu_names),
        _cards(before, after, is_blocking=not is_anchored),
        _kinds(before, after, "other_driver", lambda item: item.environment.versions.get("driver"), not is_anchored),
        _kinds(before, after, "other_cpu", _cpu, not is_anchored),
        _kinds(before, after, "other_prompts", _prompts),
        _lengths(before, after),
        _kinds(before, after, "other_traffic", lambda item: item.window.traffic_mode.replace("_", " ")),
        _kinds(before, after, "other_meter", lambda item: item.energy.energy_source, groups=("energy",)),
    )
    return tuple(obstacle for obstacle in found if obstacle is not None)


def blocking_reason(obstacles: Iterable[Obstacle], group: str) -> Reason | None:
    """Why nothing can be said about a group of metrics; None when something can."""
    return next((item.reason for item in obstacles if item.is_blocking and group in item.groups), None)


def _kinds(
    before: Iterable[Record],
    after: Iterable[Record],
    code: str,
    read: Callable[[Record], str | None],
    is_blocking: bool = True,
    groups: tuple[str, ...] = _ALL_GROUPS,
) -> Obstacle | None:
    """An obstacle where both sides tell something, and not the same."""
    left, right = (sorted({text for item in side if (text := read(item))}) for side in (before, after))
    if not left or not right or left == right:
        return None
    return Obstacle(Reason.of(code, before=", ".join(left), after=", ".join(right)), is_blocking, groups)


def _cards(before: Iterable[Record], after: Iterable[Record], *, is_blocking: bool) -> Obstacle | None:
    """Other cards; some of the same, as when a configuration takes more of them, is a setting."""
    left, right = ({uuid for item in side for uuid in item.environment.gpu_uuids} for side in (before, after))
    if not left or not right or left <= right or right <= left:
        return None
    shown = [", ".join(sorted(uuid[:_ID_SHOWN] for uuid in side)) for side in (left, right)]
    return Obstacle(Reason.of("other_cards", before=shown[0], after=shown[1]), is_blocking)


def _lengths(before: Sequence[Record], after: Sequence[Record]) -> Obstacle | None:
    found = [statistics.fmean(lengths) for side in (before, after) if (lengths := _output_lengths(side))]
    if len(found) < 2 or abs(found[0] - found[1]) <= LENGTH_TOLERANCE * max(found):
        return None
    return Obstacle(Reason.of("other_output_lengths", before=found[0], after=found[1]))


def _output_lengths(records: Iterable[Record]) -> list[float]:
    return [item.work.output_tok / item.work.requests_ok for item in records if item.work.requests_ok]


def _gpu_names(record: Record) -> str:
    return ", ".join(sorted({gpu.name for gpu in record.gpus}))


def _cpu(record: Record) -> str:
    """The CPU where it does the work."""
    environment = record.environment
    return f"{environment.cpu} × {environment.cpu_count}" if not environment.gpu_uuids else ""


def _prompts(record: Record) -> str:
    source = record.work.prompt_source
    digest = source.get("sha256")
    if isinstance(digest, str):
        return f"{source.get('name') or source.get('kind') or 'prompts'} {digest[:8]}"
    return str(source.get("name") or "")
