"""What is read from records: metrics, and their values by cycle."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lem.base.dataclass import dataclass
from lem.base.errors import UserError, did_you_mean
from lem.base.measurement import Section
from lem.base.reasons import Reason
from lem.base.units import JOULES_PER_WATT_HOUR, fmean, format_latency, format_quantity
from lem.record import Record, ResultKey


@dataclass(frozen=True)
class Per:
    name: str  # as in the name of a metric: `energy_per_output_tok_j`
    noun: str
    count: Callable[[Record], int | None]


_OUTPUT_TOK = Per("output_tok", "output token", lambda record: record.work.output_tok)
_INPUT_TOK = Per("input_tok", "input token", lambda record: record.work.input_tok)
_TOK = Per("total_tok", "token", lambda record: record.work.total_tok)
_REQUEST = Per("request", "request", lambda record: record.work.requests_ok)
_TRIED = Per("request", "request", lambda record: record.work.tried)
_LOAD = Per("load", "engine load", lambda _: 1)
_WARMUP_PROMPT = Per("prompt", "warm-up prompt", lambda record: record.window.warmup_prompts)


@dataclass(frozen=True, eq=False)  # each is one object, and thousands of rows have it
class Metric:
    name: str  # here and in JSON
    group: str  # `energy` and what follows from it, `throughput`, `tokens` or `latency`
    unit: str
    section: str  # of the record
    field: str  # of that section
    label: str  # as it heads a table
    verb: str = "has"  # in a comparison: `uses 0.5 × the energy per output token of`
    what: str = ""  # in a comparison, where it is not the label
    percentile: str | None = None  # of a distribution, or `mean`; None for a plain number
    per: Per | None = None  # what the field is divided by
    factor: float = 1.0  # from the unit of the field to `unit`
    is_higher_better: bool | None = False  # None where neither is
    is_comparable: bool = True  # False for what grows with the work in a window
    is_headline: bool = False  # whether a comparison shows it by default

    @property
    def lower_label(self) -> str:
        return self.label if self.label[:2].isupper() else self.label[0].lower() + self.label[1:]

    @property
    def heading(self) -> str:
        """The label with the unit of what `shown` gives, less the `/tok` that the label says."""
        unit = "" if self.group == "latency" else self.unit.removesuffix("/tok")
        return ", ".join(filter(None, (self.label, unit)))

    def shown(self, value: float | None) -> str:
        return format_latency(value) if self.group == "latency" else format_quantity(value)

    @property
    def relation(self) -> str:
        """A verb phrase with a place for the ratio: `uses {} the energy per output token of`."""
        return f"{self.verb} {{}} the {self.what or self.lower_label} of"

    def read(self, record: Record) -> tuple[float | None, Reason | None]:
        section: Section = getattr(record, self.section)
        value = getattr(section, self.field)
        if value is None:
            return None, section.why_none(self.field)
        if self.percentile is not None:
            found = getattr(value, self.percentile)
            return found, value.null_reasons.get(self.percentile) if found is None else None
        if self.per is not None:
            if not (count := self.per.count(record)):
                return None, record.work.why_uncounted or Reason.of("no_work", what=f"{self.per.noun}s")
            value /= count
        # Of larger ones, sums are no floating-point numbers.
        return (self.factor * value, None) if abs(value) < 1e300 else (None, Reason.of("out_of_range"))


# Every latency that a record can have, in the order in which they are shown.
READABLE_LATENCIES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "icl": "Inter-chunk latency",
    "itl": "Inter-token latency",  # between tokens; in records before schema version 3 only
    "e2e": "End-to-end latency",
    "queue": "Queueing time",
}
LATENCIES = {kind: words for kind, words in READABLE_LATENCIES.items() if kind != "itl"}
_PERCENTILES = {"mean": "mean", "p50": "median", "p90": "p90", "p95": "p95", "p99": "p99"}


def _latencies(kind: str, words: str) -> Iterator[Metric]:
    for percentile, called in _PERCENTILES.items():
        yield Metric(
            f"{kind}_{percentile}_s",
            *("latency", "s", "latency", f"{kind}_s", f"{words}, {called}"),
            what=f"{called} {words.lower()}",
            percentile=percentile,
            is_headline=percentile == "p50" and kind in ("ttft", "e2e"),
        )


def _energy(name: str, unit: str, label: str, field: str = "", section: str = "efficiency", **more: Any) -> Metric:
    return Metric(name, "energy", unit, section, field or name, label, **{"verb": "uses", **more})


def _divided(field: str, label: str, *each: Per, section: str = "energy", verb: str = "uses") -> Iterator[Metric]:
    """An energy, or the emissions of one, divided by each of these."""
    stem, unit = field.rsplit("_", 1)
    for per in each:
        name, units = f"{stem}_per_{per.name}_{unit}", unit.upper() if unit == "j" else unit
        units += "/tok" if per.name.endswith("_tok") else ""
        yield _energy(name, units, f"{label} per {per.noun}", field, section, verb=verb, per=per)


METRICS: tuple[Metric, ...] = (
    _energy("gpu_energy_j", "J", "GPU energy", section="energy", is_comparable=False),
    _energy("gpu_energy_net_j", "J", "GPU energy, net of idle", section="energy", is_comparable=False),
    _energy("cpu_package_energy_j", "J", "CPU package energy", section="energy", is_comparable=False),
    _energy("energy_per_output_tok_j", "J/tok", "Energy per output token", is_headline=True),
    _energy("energy_per_total_tok_j", "J/tok", "Energy per token"),
    _energy("energy_per_request_j", "J", "Energy per request"),
    _energy("energy_per_good_request_j", "J", "Energy per good request", is_headline=True),
    _energy(  # the unit of AI Energy Score
        *("energy_per_1000_requests_wh", "Wh", "Energy per 1,000 requests", "energy_per_request_j"),
        what="energy per request",
        factor=1000 / JOULES_PER_WATT_HOUR,
    ),
    *_divided("gpu_energy_net_j", "Net GPU energy", _OUTPUT_TOK, _TOK, _REQUEST),
    *_divided("cpu_package_energy_j", "CPU package energy", _OUTPUT_TOK, _TOK, _REQUEST),
    *_divided("dram_energy_j", "DRAM energy", _OUTPUT_TOK, _TOK, _REQUEST),
    *_divided("external_energy_j", "Energy by external meter", _OUTPUT_TOK, _TOK, _REQUEST),
    *_divided("sensor_energy_j", "Energy by hwmon sensors", _OUTPUT_TOK, _TOK, _REQUEST),
    *_divided("prefill_energy_j", "Prefill energy", _INPUT_TOK, _REQUEST),
    *_divided("decode_energy_j", "Decode energy", _OUTPUT_TOK, _REQUEST),
    *_divided("load_energy_j", "Energy", _LOAD),
    *_divided("warmup_energy_j", "Energy", _WARMUP_PROMPT),
    *_divided("co2e_g", "CO₂e", _OUTPUT_TOK, _TOK, _REQUEST, section="carbon", verb="emits"),
    *(
        _energy(name, "", f"Energy cost per {noun}", "cost", "carbon", verb="has", per=per, factor=factor)
        for name, noun, per, factor in (
            ("cost_per_million_output_tok", "million output tokens", _OUTPUT_TOK, 1e6),
            ("cost_per_1000_requests", "1,000 requests", _REQUEST, 1e3),
        )
    ),
    *(
        Metric(
            *(name, "throughput", unit, "throughput", name, label, "makes", f"{what} per second"),
            is_higher_better=True,
            is_headline=is_headline,
        )
        for name, unit, label, what, is_headline in (
            ("output_tok_per_s", "tok/s", "Output throughput", "output tokens", True),
            ("total_tok_per_s", "tok/s", "Total throughput", "tokens", False),
            ("requests_per_s", "1/s", "Requests", "requests", False),
            ("good_requests_per_s", "1/s", "Goodput", "good requests", True),
        )
    ),
    Metric(
        *("good_requests_ratio", "throughput", "", "work", "requests_good", "Share of good requests"),
        per=_TRIED,
        is_higher_better=True,
    ),
    *(
        Metric(name, "tokens", "tok", "work", field, label, per=per, is_higher_better=None, is_comparable=bool(per))
        for name, field, label, per in (
            ("input_tok", "input_tok", "Input tokens", None),
            ("output_tok", "output_tok", "Output tokens", None),
            ("input_tok_per_request", "input_tok", "Input tokens per request", _REQUEST),
            ("output_tok_per_request", "output_tok", "Output tokens per request", _REQUEST),
        )
    ),
    *(metric for kind, words in LATENCIES.items() for metric in _latencies(kind, words)),
)

# Of a run of a program, which is the same work each time.
PROGRAM_METRICS = (
    Metric(*("window_s", "time", "s", "window", "window_s", "Time per run"), is_comparable=False),
    _energy("total_j", "J", "Energy per run", section="energy", is_comparable=False),
)

METRIC_BY_NAME: Mapping[str, Metric] = {
    metric.name: metric for metric in (*METRICS, *PROGRAM_METRICS, *_latencies("itl", READABLE_LATENCIES["itl"]))
}

# Short names of what people compare most.
_ALIASES = {
    "energy": "energy_per_output_tok_j",
    "net": "gpu_energy_net_per_output_tok_j",
    "throughput": "output_tok_per_s",
    "goodput": "good_requests_per_s",
    "ttft": "ttft_p50_s",
    "tpot": "tpot_p50_s",
    "icl": "icl_p50_s",
    "itl": "itl_p50_s",
    "e2e": "e2e_p50_s",
    "queue": "queue_p50_s",
}
SHORT_NAMES = {name: alias for alias, name in _ALIASES.items()}

# What grows with the work in a window, and what to compare instead. Fields that a metric divides are not listed.
_INSTEAD: Mapping[str, tuple[str, ...]] = {
    "gpu_energy_j": ("energy_per_output_tok_j", "energy_per_total_tok_j", "energy_per_request_j"),
    "total_j": ("energy_per_output_tok_j", "energy_per_request_j"),
    "window_s": ("output_tok_per_s", "requests_per_s"),
}


_SHORT_WIDTH = 16
_SHORT_LABELS = {"energy_per_output_tok_j": "J/tok", "output_tok_per_s": "tok/s", "good_requests_per_s": "goodput"}


def short_label(metric: Metric) -> str:
    if metric.percentile is not None:
        return f"{metric.field.removesuffix('_s').upper()} {metric.percentile}"
    return _SHORT_LABELS.get(metric.name) or "\n".join(textwrap.wrap(metric.heading, _SHORT_WIDTH))


def parse_metric(text: str) -> Metric:
    name = text.strip()
    metric = METRIC_BY_NAME.get(_ALIASES.get(name, name))
    if metric is None:
        guess = did_you_mean(name, [*_ALIASES, *METRIC_BY_NAME])
        hint = f"for example {', '.join(_ALIASES)}; `lem compare CAMPAIGN --json` lists all that were measured"
        raise UserError(f"unknown metric {name!r}{guess}", hint)
    return metric


def parse_comparable(text: str, *, is_for_gate: bool = False) -> Metric:
    """The metric of that name or alias; UserError also where windows of unequal work make its ratio meaningless."""
    name = text.strip()
    instead = _INSTEAD.get(name) or [item.name for item in METRICS if item.per is not None and item.field == name]
    if instead:
        hint = f"use {' or '.join(instead)}"
        raise UserError(f"{name} grows with the work in a window, so it is shown but not compared", hint)
    metric = parse_metric(name)
    if is_for_gate and metric.is_higher_better is None:
        raise UserError(f"metric {name!r} has no better direction, so it cannot have a gate")
    return metric


# Run, host, and number of the cycle from 0.
Cycle = tuple[str, str, int]
Cycles = Mapping[Cycle, Sequence[Record]]


def used_records(records: Iterable[Record]) -> tuple[Record, ...]:
    """The records that estimates rest on: of each experiment its last valid attempt."""
    return tuple(record for members in used_cycles(by_cycle(distinct(records))).values() for record in members)


def used_cycles(attempts: Cycles) -> Cycles:
    """The cycles with a valid attempt, and of each experiment in them the last one."""
    found: dict[Cycle, tuple[Record, ...]] = {}
    for cycle, members in attempts.items():
        valid = [record for record in members if record.validity.valid]
        if len(valid) > 1:
            last: dict[str, int] = {}
            for identity in (record.identity for record in valid):
                last[identity.experiment_id] = max(identity.attempt, last.get(identity.experiment_id, 0))
            valid = [it for it in valid if it.identity.attempt == last[it.identity.experiment_id]]
        if valid:
            found[cycle] = tuple(valid)
    return found


def distinct(records: Iterable[Record]) -> tuple[Record, ...]:
    given = tuple(records)
    keys = [record.identity.key for record in given]
    if len(set(keys)) == len(keys):
        return given
    kept: dict[ResultKey, list[Record]] = {}
    for key, record in zip(keys, given, strict=True):
        same = kept.setdefault(key, [])
        if record not in same:
            same.append(record)
    return tuple(record for same in kept.values() for record in same)


def by_cycle(records: Iterable[Record]) -> Cycles:
    cycles: dict[Cycle, list[Record]] = {}
    for record in records:
        identity = record.identity
        cycles.setdefault((identity.run_id, identity.machine, identity.cycle_index), []).append(record)
    return dict(sorted(cycles.items()))


def share_a_load(cycles: Cycles) -> bool:
    """Whether two cycles were measured with one engine load."""
    before: set[tuple[str, str]] = set()
    for members in cycles.values():
        loads = {(record.identity.host, load) for record in members if (load := record.validity.engine_load_id)}
        if not before.isdisjoint(loads):
            return True
        before |= loads
    return False


def cycle_values(metric: Metric, cycles: Cycles) -> dict[Cycle, float]:
    """One value per cycle: the mean over its records that measured the metric; cycles without one are left out."""
    found = {}
    for cycle, members in cycles.items():
        values = [value for record in members if (value := metric.read(record)[0]) is not None]
        if values:
            found[cycle] = values[0] if len(values) == 1 else fmean(values)
    return found


def mean_of(values: Sequence[float]) -> float:
    return math.exp(fmean(map(math.log, values))) if min(values) > 0 else fmean(values)
