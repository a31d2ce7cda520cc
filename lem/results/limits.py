"""Configurations that differ only in the power limit or the clock of the GPU, and the one with the least energy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Final

from lem.base.dataclass import dataclass, replace
from lem.base.doc import Column, Table
from lem.base.units import ABSENT, fixed, format_quantity, some_of
from lem.config.option import declared
from lem.config.sections import GpuConfig
from lem.record import Record
from lem.results.axes import find_axes
from lem.results.bootstrap import resamples
from lem.results.configurations import group_of
from lem.results.metrics import Metric
from lem.results.run import ENERGY, THROUGHPUT, Configuration
from lem.results.stats import CONFIDENCE, Effect, paired_effect

SETTINGS: Final = tuple(declared(GpuConfig))
_ITERATIONS, _SEED = 1000, 42  # as of `bootstrap_ci`
LIMITS_NOTE: Final = (
    "Least energy: the setting with the smallest geometric mean over the cycles that all settings have. Its interval "
    f"is that of {_ITERATIONS} resamples of these cycles (bootstrap, {100 * CONFIDENCE:g} %), which is too narrow for "
    "few cycles; it ends at settings that were tried. The interval of its energy is a t interval, wider because it was "
    "chosen from several. Changes are against the highest setting, with paired t intervals."
)


@dataclass(frozen=True)
class Least:
    """The setting with the least energy per output token."""

    index: int  # of the point
    low: float | None  # the interval of the setting; None with one cycle, or where cycles are no repeats
    high: float | None
    n_cycles: int


@dataclass(frozen=True)
class Sweep:
    setting: str  # an option of the section `gpu`
    label: str  # what tells it from the other sweeps of its run; empty if there is no other
    points: tuple[tuple[float, Configuration], ...]  # by setting; inf for a clock that is not locked

    @property
    def unit(self) -> str:
        return declared(GpuConfig)[self.setting].unit or ""

    def text(self, value: float) -> str:
        return "unlocked" if value == math.inf else f"{value:g} {self.unit}"

    @cached_property
    def least(self) -> Least | None:
        """None without a cycle in which the energy of all was measured."""
        known = [item.values(ENERGY) for _, item in self.points]
        cycles = [cycle for cycle in known[0] if all(each.get(cycle, 0) > 0 for each in known)]
        if not cycles:
            return None
        logs = [[math.log(each[cycle]) for cycle in cycles] for each in known]

        def lowest(rows: Sequence[int]) -> int:
            sums = [math.fsum(each[row] for row in rows) for each in logs]
            return sums.index(min(sums))

        low = high = None
        if len(cycles) > 1 and all(item.no_interval is None for _, item in self.points):
            drawn = sorted((lowest(rows), count) for rows, count in resamples(len(cycles), _ITERATIONS, _SEED))
            found = [index for index, count in drawn for _ in range(count)]
            skipped = round(_ITERATIONS * (1 - CONFIDENCE) / 2)
            low, high = (self.points[index][0] for index in (found[skipped], found[-1 - skipped]))
        return Least(lowest(range(len(cycles))), low, high, len(cycles))

    def change(self, index: int, metric: Metric) -> Effect | None:
        """The ratio to the highest setting, over the cycles that both have; None for that itself, or without any."""
        both = self.points[index][1], self.points[-1][1]
        above, below = (item.values(metric) for item in both)
        cycles = [cycle for cycle in above if above[cycle] > 0 and below.get(cycle, 0) > 0]
        if not cycles or index == len(self.points) - 1:
            return None
        found = paired_effect([above[it] for it in cycles], [below[it] for it in cycles])
        is_repeated = all(item.no_interval is None for item in both)
        return found if is_repeated else replace(found, std_error=None, df=None)

    def interval_text(self) -> str:
        least = self.least
        if least is None or least.low is None or least.high is None:
            return ABSENT
        return " – ".join(map(self.text, sorted({least.low, least.high})))


def change_text(effect: Effect | None) -> str:
    if effect is None:
        return ABSENT
    ends, centre = effect.interval(), f"{fixed(100 * (effect.ratio - 1), 1, '+')} %"
    if ends is None:
        return centre
    low, high = (fixed(100 * (end - 1), 1, "+") for end in ends)
    return f"{centre} ({low} to {high})"


def find_sweeps(configurations: Iterable[Configuration]) -> tuple[Sweep, ...]:
    """The configurations with energy that are equal but for one setting of the GPU, where there are several."""
    measured = [item for item in configurations if item.estimate(ENERGY).value is not None]
    groups: dict[tuple[Any, ...], dict[float, Configuration]] = {}
    for setting in SETTINGS:
        if not any(_asked(item.records[0], setting) is not None for item in measured):
            continue
        for item in measured:
            if (value := _value_of(item.records[0], setting)) is not None:
                key = setting, group_of(item.records[0].identity)[1], frozenset(_others(item, setting).items())
                groups.setdefault(key, {})[value] = item
    found = [(key[0], sorted(points.items())) for key, points in groups.items() if len(points) > 1]
    labels = [""] * len(found)
    for setting in SETTINGS:
        places = [place for place, (name, _) in enumerate(found) if name == setting]
        axes = find_axes([_others(found[place][1][0][1], setting) for place in places])
        for number, place in enumerate(places):
            labels[place] = ", ".join(axis.of(number) for axis in axes)
    return tuple(Sweep(name, label, tuple(points)) for (name, points), label in zip(found, labels, strict=True))


def _asked(record: Record, setting: str) -> Any:
    section = record.requested.get("gpu")
    return section.get(setting) if isinstance(section, dict) else None


def _value_of(record: Record, setting: str) -> float | None:
    value = _asked(record, setting)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if value is not None:  # a `${VAR}`
        return None
    if setting == "lock_clock_mhz":
        return math.inf
    found = {gpu.power_limit_set_w or gpu.power_limit_w for gpu in record.gpus}
    return found.pop() if len(found) == 1 else None


def _others(item: Configuration, setting: str) -> dict[str, str]:
    nothing = {f"gpu.{name}": "null" for name in SETTINGS}
    return {label: value for label, value in {**nothing, **item.settings}.items() if label != f"gpu.{setting}"}


def limit_tables(found: Iterable[Sweep]) -> Iterator[Table]:
    """What each setting costs and saves, one table for each sweep."""
    heads = ("#", "J/tok", "tok/s", "energy", "throughput", "least")
    for sweep in found:
        rows = []
        for index, (_, item) in enumerate(sweep.points):
            means = (format_quantity(item.estimate(metric).value) for metric in (ENERGY, THROUGHPUT))
            changes = (change_text(sweep.change(index, metric)) for metric in (ENERGY, THROUGHPUT))
            is_least = sweep.least is not None and sweep.least.index == index
            rows.append((str(item.number), *means, *changes, "*" if is_least else ""))
        names = tuple(sweep.text(value) for value, _ in sweep.points)
        columns = tuple(map(Column, heads, zip(*rows, strict=True)))
        yield Table(
            sweep.setting, names, columns, f"Along gpu.{sweep.setting}{f', {sweep.label}' if sweep.label else ''}"
        )


def limit_notes(found: Sequence[Sweep]) -> Iterator[str]:
    for sweep in found:
        if (least := sweep.least) is not None:
            yield f"{least_text(sweep, least)}."
    if any(sweep.least for sweep in found):
        yield LIMITS_NOTE


def least_text(sweep: Sweep, least: Least) -> str:
    value, item = sweep.points[least.index]
    energy, ends = item.estimate(ENERGY).value, item.interval_as_best(ENERGY, len(sweep.points))
    where = f" of {sweep.label}" if sweep.label else ""
    between = f" (interval {sweep.interval_text()})" if least.low is not None else " (no interval)"
    about = f" ({format_quantity(ends[0])} – {format_quantity(ends[1])})" if ends is not None else ""
    tried = some_of([sweep.text(it) for it, _ in sweep.points], 8)
    text = f"Least energy{where}: at {sweep.text(value)}{between}, {format_quantity(energy)} J per output token{about}"
    at_end = {0: "lower", len(sweep.points) - 1: "higher"}.get(least.index)
    further = f"; the least may be {at_end} than all that were tried" if at_end and value < math.inf else ""
    return f"{text}; tried: {tried}{further}"


def sweep_document(sweep: Sweep) -> dict[str, Any]:
    least = sweep.least
    return {
        "option": f"gpu.{sweep.setting}",
        "unit": sweep.unit,
        "label": sweep.label,
        "settings": [_finite(value) for value, _ in sweep.points],
        "numbers": [item.number for _, item in sweep.points],
        "least_energy": least
        and {
            "setting": _finite(sweep.points[least.index][0]),
            "number": sweep.points[least.index][1].number,
            "ci_lower": _finite(least.low),
            "ci_upper": _finite(least.high),
            "method": "bootstrap of the cycles",
            "n_cycles": least.n_cycles,
        },
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or value == math.inf else value
