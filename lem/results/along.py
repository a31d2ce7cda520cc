"""One verdict for each value of an axis: configurations that differ in nothing else, pooled within each cycle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from lem.base.dataclass import dataclass
from lem.base.errors import UserError
from lem.base.units import some_of
from lem.results.axes import Axis, find_axes, is_label, shared_settings
from lem.results.comparability import find_obstacles
from lem.results.compare import Along, Comparison, finished, metrics_to_show, pair_within, without_result
from lem.results.metrics import Cycle, Cycles, Metric, mean_of, used_cycles
from lem.results.run import Configuration, Run
from lem.results.stats import Gate

_ALONE_SHOWN = 4


@dataclass(frozen=True)
class Pooled(Configuration):
    """Configurations that have one value of an axis, as one: each cycle counts that all of them have."""

    members: tuple[Configuration, ...] = ()

    @classmethod
    def of(cls, name: str, members: Sequence[Configuration]) -> Pooled:
        records = tuple(record for item in members for record in item.records)
        n_failed, share = sum(item.n_failed for item in members), min(item.share for item in members)
        number = min(item.number for item in members)
        return cls(name, records, n_failed, share=share, number=number, members=tuple(members), paths=members[0].paths)

    @cached_property
    def cycles(self) -> Cycles:
        found = used_cycles(self.attempts)
        return {cycle: records for cycle, records in found.items() if all(cycle in it.cycles for it in self.members)}

    @property
    def settings(self) -> Mapping[str, str]:
        return shared_settings(item.settings for item in self.members)

    def values(self, metric: Metric, *, of_attempts: bool = False) -> Mapping[Cycle, float]:
        own = [item.values(metric, of_attempts=of_attempts) for item in self.members]
        return {cycle: mean_of([it[cycle] for it in own]) for cycle in own[0] if all(cycle in it for it in own)}


def compare_along(
    run: Run,
    name: str,
    first: str | None,
    *,
    metrics: Sequence[Metric] = (),
    gates: Sequence[Gate] = (),
    is_whole: bool = False,
) -> Comparison:
    """Each value of an axis against one, `first` or that of the first configuration, all other axes held equal."""
    known = run.with_results
    axes = find_axes([item.settings for item in known])
    chosen = [axis for axis in axes if is_label(axis.label, name)]
    if len(chosen) != 1:
        hint = f"axes of this run: {', '.join(axis.heading for axis in axes) or 'none'}"
        raise UserError(f"{'more than one axis' if chosen else 'no axis'} {name!r}", hint)
    (axis,) = chosen
    own = [item for item in axes if _is_own(item, axis)]
    others = [item for item in axes if item is not axis and item not in own]
    by_value: dict[str, dict[tuple[str, ...], Configuration]] = {}
    for index, item in enumerate(known):
        machines = sorted({record.identity.machine for record in item.records})  # each has configurations of its own
        key = (*(other.values[index] for other in others), *machines)
        by_value.setdefault(axis.values[index], {})[key] = item
    first = axis.values[0] if first is None else first
    if first not in by_value:
        raise UserError(f"no configuration has {axis.heading}={first}", f"values: {', '.join(by_value)}")
    pairs, left_out = [], []
    below = by_value.pop(first)
    for value, above in by_value.items():
        common = [key for key in below if key in above]
        alone = [item.name for key, item in (*below.items(), *above.items()) if key not in common]
        if alone:
            left_out.append(f"without a counterpart ({axis.heading}={value}): {some_of(alone, _ALONE_SHOWN, '; ')}")
        if common:
            sides = ((text, [side[key] for key in common]) for text, side in ((first, below), (value, above)))
            pairs.append([Pooled.of(f"{axis.heading}={text}", members) for text, members in sides])
    if not pairs:
        hint = "it takes two configurations with the same values of all other axes"
        raise UserError(f"no two configurations differ in {axis.heading} alone", hint)
    shown, further = metrics_to_show(metrics, gates, [item for sides in pairs for item in sides], is_whole=is_whole)
    compared = tuple(
        pair_within(before, after, (*shown, *further), find_obstacles(before.used, after.used))
        for before, after in pairs
    )
    held, with_it = (tuple(item.heading for item in each) for each in (others, own))
    along = Along(axis.heading, held, with_it, tuple(left_out))
    return finished(Comparison((run,), compared, shown, tuple(gates), along=along, missing=tuple(without_result(run))))


def _is_own(other: Axis, axis: Axis) -> bool:
    """Whether it is an option of one backend, where backends are compared: others cannot have the same value."""
    is_option = axis.label == "backend" and other.label.partition(".")[0] in axis.values
    return is_option and len(set(zip(axis.values, other.values, strict=True))) == len(set(axis.values))
