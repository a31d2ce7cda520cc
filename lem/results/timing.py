"""How long experiments took before, which prices a campaign that is planned. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

from lem.clock import parse_time
from lem.record import Record, ResultKey

__all__ = ["EarlierTimes", "earlier_times"]

# Between two starts further apart than this beside what is known of them somebody stopped the campaign.
_PAUSE_S = 3600.0


@dataclass(frozen=True)
class EarlierTimes:
    """Seconds that experiments took, of each kind the median.

    Attributes:
        measured: an experiment beside its load: baselines, warm-up, window and the rest, by config_hash.
        load: a load of a configuration's engine, by config_hash.
        gap: the gap before an experiment; None where none was kept.
    """

    measured: Mapping[str, float]
    load: Mapping[str, float]
    gap: float | None


def earlier_times(records: Iterable[Record]) -> EarlierTimes:
    """What the results of a campaign tell about its times.

    A record knows its load, warm-up and window. What lies around them, baselines, guards and the prompts, is seen from
    one experiment's start to the next one's; where nothing follows, it is what it was with the others.
    """
    known = list(records)
    around = _around(known)
    usual_s = statistics.median(around.values()) if around else 0.0
    measured: dict[str, list[float]] = {}
    loads: dict[str, list[float]] = {}
    for record in known:
        digest = record.identity.config_hash
        around_s = around.get(record.identity.key, usual_s)
        measured.setdefault(digest, []).append(_inner_s(record) + around_s)
        if record.window.load_s is not None:
            loads.setdefault(digest, []).append(record.window.load_s)
    gaps = [gap for record in known if (gap := record.window.gap_s)]
    return EarlierTimes(
        {digest: statistics.median(values) for digest, values in measured.items()},
        {digest: statistics.median(values) for digest, values in loads.items()},
        statistics.median(gaps) if gaps else None,
    )


def _around(records: Sequence[Record]) -> dict[ResultKey, float]:
    """What each experiment took beside load, warm-up and window, where another followed it at once."""
    runs: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        runs.setdefault((record.identity.run_id, record.identity.host), []).append(record)
    found = {}
    for members in runs.values():
        for record, following in pairwise(sorted(members, key=lambda item: item.identity.start_utc)):
            whole_s = _seconds_between(record, following)
            if whole_s is None:
                continue
            around_s = whole_s - (following.window.gap_s or 0.0) - (record.window.load_s or 0.0) - _inner_s(record)
            if 0 <= around_s <= _PAUSE_S:
                found[record.identity.key] = around_s
    return found


def _inner_s(record: Record) -> float:
    return (record.window.warmup_s or 0.0) + record.window.window_s


def _seconds_between(record: Record, following: Record) -> float | None:
    start, end = (parse_time(item.identity.start_utc) for item in (record, following))
    if start is None or end is None or (start.tzinfo is None) != (end.tzinfo is None):
        return None
    return (end - start) / timedelta(seconds=1)
