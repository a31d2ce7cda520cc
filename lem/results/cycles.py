"""The records of one configuration by cycle: which of them count, and one value a cycle.

Attempts within a cycle share everything that varies between cycles, so a cycle is one value however many there were.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from lem.record import Record, ResultKey
from lem.results.metrics import Metric

__all__ = ["Cycle", "Cycles", "by_cycle", "cycle_values", "distinct", "share_a_load", "used_cycles", "used_records"]

Cycle = tuple[str, str, int]
"""Run, host, and number of the cycle from 0."""

Cycles = Mapping[Cycle, Sequence[Record]]


def used_records(records: Iterable[Record]) -> tuple[Record, ...]:
    """The records of one configuration that its estimates stand on: of each cycle the last valid attempt."""
    return tuple(record for members in used_cycles(by_cycle(distinct(records))).values() for record in members)


def used_cycles(attempts: Cycles) -> Cycles:
    """The cycles with a valid attempt, and of each the last one; several where a cycle holds several experiments."""
    return {cycle: chosen for cycle, members in attempts.items() if (chosen := _last_valid(members))}


def distinct(records: Iterable[Record]) -> tuple[Record, ...]:
    """The records without identical duplicates, as two copies of one folder bring them."""
    kept: dict[ResultKey, list[Record]] = {}
    for record in records:
        same = kept.setdefault(record.identity.key, [])
        if record not in same:
            same.append(record)
    return tuple(record for same in kept.values() for record in same)


def by_cycle(records: Iterable[Record]) -> Cycles:
    """Every attempt, under its cycle."""
    cycles: dict[Cycle, list[Record]] = {}
    for record in records:
        identity = record.identity
        cycles.setdefault((identity.run_id, identity.host, identity.cycle_index), []).append(record)
    return dict(sorted(cycles.items()))


def share_a_load(cycles: Cycles) -> bool:
    """Whether two cycles were measured with one engine load."""
    loads = [
        {(record.identity.host, record.validity.engine_load_id) for record in members if record.validity.engine_load_id}
        for members in cycles.values()
    ]
    return sum(map(len, loads)) > len(set().union(*loads))


def cycle_values(metric: Metric, cycles: Cycles) -> dict[Cycle, float]:
    """One value a cycle: the mean over its records that measured the metric; cycles where none did are left out."""
    measured = {
        cycle: [value for record in members if (value := metric.read(record)[0]) is not None]
        for cycle, members in cycles.items()
    }
    return {cycle: statistics.fmean(values) for cycle, values in measured.items() if values}


def _last_valid(members: Sequence[Record]) -> tuple[Record, ...]:
    last: dict[str, list[Record]] = {}
    for record in members:
        if not record.validity.valid:
            continue
        same = last.setdefault(record.identity.experiment_id, [])
        if same and record.identity.attempt > same[0].identity.attempt:
            same.clear()
        if not same or record.identity.attempt == same[0].identity.attempt:
            same.append(record)
    return tuple(record for same in last.values() for record in same)
