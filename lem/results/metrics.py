"""Metrics of records, their values by cycle, and what may be compared."""

from __future__ import annotations

import statistics
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lem.base.reasons import Reason
from lem.record import Record, ResultKey


@dataclass(frozen=True)
class Metric:
    """One number of a record that is aggregated.

    Attributes:
        name: its name here and in JSON.
        group: `energy`, `throughput`, `tokens` or `latency`.
        unit: SI, as people write it.
        section, field: where it stands in the record.
        percentile: which percentile of a distribution; None for a plain number.
        is_higher_better: None where neither is.
        label: as it heads a table.
        relation: what a thing does with the value when it is compared, `{}` in the place of the ratio:
            `uses {} the energy per output token of`.
    """

    name: str
    group: str
    unit: str
    section: str
    field: str
    percentile: str | None = None
    is_higher_better: bool | None = False
    label: str = ""
    relation: str = ""

    @property
    def lower_label(self) -> str:
        """The label within a sentence; an abbreviation keeps its capitals."""
        return _lowered(self.label)

    def read(self, record: Record) -> tuple[float | None, str]:
        """The value in a record, and the reason where it is None."""
        holder = getattr(record, self.section)
        value = getattr(holder, self.field)
        if value is None:
            return None, str(holder.null_reasons.get(self.field, "no reason given"))
        if self.percentile is None:
            return float(value), ""
        quantile = getattr(value, self.percentile)
        return quantile, "" if quantile is not None else str(value.null_reasons[self.percentile])


def _energy(name: str, section: str, label: str) -> Metric:
    unit = "J/tok" if name.endswith("_tok_j") else "J"
    return Metric(name, "energy", unit, section, name, label=label, relation=f"uses {{}} the {_lowered(label)} of")


def _rate(name: str, unit: str, label: str, what: str) -> Metric:
    relation = f"makes {{}} the {what} per second of"
    return Metric(name, "throughput", unit, "throughput", name, None, True, label, relation)


def _tokens(name: str, label: str) -> Metric:
    return Metric(name, "tokens", "tok", "work", name, None, None, label, f"has {{}} the {_lowered(label)} of")


def _lowered(label: str) -> str:
    return label if label[:2].isupper() else label[0].lower() + label[1:]


LATENCIES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2e": "End-to-end latency",
    "queue": "Queueing time",
}


def _latency_metrics() -> Iterable[Metric]:
    for kind, words in LATENCIES.items():
        for percentile, called in (("p50", "median"), ("p95", "p95")):
            relation = f"has {{}} the {called} {words.lower()} of"
            label = f"{words}, {called}"
            yield Metric(
                f"{kind}_{percentile}_s", "latency", "s", "latency", f"{kind}_s", percentile, False, label, relation
            )


METRICS: tuple[Metric, ...] = (
    _energy("gpu_energy_j", "energy", "GPU energy"),
    _energy("gpu_energy_net_j", "energy", "GPU energy, net of idle"),
    _energy("cpu_package_energy_j", "energy", "CPU package energy"),
    _energy("energy_per_output_tok_j", "efficiency", "Energy per output token"),
    _energy("energy_per_total_tok_j", "efficiency", "Energy per token"),
    _energy("energy_per_request_j", "efficiency", "Energy per request"),
    _rate("output_tok_per_s", "tok/s", "Output throughput", "output tokens"),
    _rate("total_tok_per_s", "tok/s", "Total throughput", "tokens"),
    _rate("requests_per_s", "1/s", "Requests", "requests"),
    _tokens("input_tok", "Input tokens"),
    _tokens("output_tok", "Output tokens"),
    *_latency_metrics(),
)

METRIC_BY_NAME = types.MappingProxyType({metric.name: metric for metric in METRICS})


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
