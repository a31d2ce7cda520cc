"""The numbers of a record that are aggregated and compared: where each stands, and what is good about it."""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass

from lem.record import Record

__all__ = ["LATENCIES", "METRICS", "METRIC_BY_NAME", "Metric"]


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
