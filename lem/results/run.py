"""A run's results: one summary for each configuration."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from lem.base.clock import parse_time
from lem.record import Record, ResultKey
from lem.results.aggregation import ConfigAggregate, aggregate_config
from lem.results.bootstrap import CONFIDENCE
from lem.results.precision import StoppingRule, stopping_document


def _short_model(model: str) -> str:
    """The model's name; of a local folder its last part, since the way to it says nothing."""
    return PurePath(model).name if model.startswith((".", "/", "~")) else model


def _gpus(record: Record) -> str:
    names = [gpu.name for gpu in record.gpus]
    kinds = dict.fromkeys(names)
    return ", ".join(f"{names.count(kind)} × {kind}" if names.count(kind) > 1 else kind for kind in kinds)


# Settings worth a place in the heading of a table.
_HEADLINES: Mapping[str, Callable[[Record], Any]] = {
    "backend": lambda record: record.identity.backend,
    "model": lambda record: _short_model(record.identity.model),
    "precision": lambda record: record.requested.get("fp_precision"),
    "device": lambda record: record.environment.device,
    "traffic": lambda record: record.window.traffic_mode.replace("_", " "),
}
_MORE: Mapping[str, Callable[[Record], Any]] = {
    "engine": lambda record: f"{record.environment.engine_name} {record.environment.engine_version}",
    "GPU": _gpus,
    "driver": lambda record: record.environment.versions.get("driver"),
}

# Options that the settings above tell, that are no settings, or that another part of the record tells better.
_TOLD = ("backend", "model", "model_name", "fp_precision", "config_name", "io", "extra_metadata", "gpus", "num_cycles")


def headline_settings(record: Record) -> dict[str, str]:
    """The few settings that head a table, by their label; without those that the record does not tell."""
    return _texts(_HEADLINES, record)


def settings_of(record: Record) -> dict[str, str]:
    """Every setting, by its label: those of the heading, engine, GPU and driver, then the options as given."""
    options = {name: item for name, item in record.requested.items() if name not in _TOLD}
    return {**headline_settings(record), **_texts(_MORE, record), **dict(_flatten(options))}


def shared_settings(settings: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The settings that all have, with the same value."""
    first, *others = [*settings] or [{}]
    return {label: value for label, value in first.items() if all(item.get(label) == value for item in others)}


def differing_settings(settings: Sequence[Mapping[str, str]]) -> dict[str, tuple[str | None, ...]]:
    """By label the value in each, of those that are not the same in all; None where it is not set."""
    labels = dict.fromkeys(label for item in settings for label in item)
    values = {label: tuple(item.get(label) for item in settings) for label in labels}
    return {label: found for label, found in values.items() if len(set(found)) > 1}


def _texts(readers: Mapping[str, Callable[[Record], Any]], record: Record) -> dict[str, str]:
    found = {label: read(record) for label, read in readers.items()}
    return {label: str(value) for label, value in found.items() if value}


def _flatten(options: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


SCHEMA_VERSION = 1

SINGLE_CYCLE = "Single cycle: use --cycles 3+ for confidence intervals"


@dataclass(frozen=True)
class CampaignSummary:
    """What a campaign found.

    Attributes:
        campaign_name: as the person named it; with several, joined by commas.
        run_ids, hosts: where the results come from.
        confidence: of every interval.
        shared: settings that all configurations have in common, by their label.
        configurations: in the order in which they ran first, those without any result last.
        stopping: by which rule cycles were added; None where their number was fixed.
    """

    campaign_name: str
    run_ids: tuple[str, ...]
    hosts: tuple[str, ...]
    confidence: float
    shared: Mapping[str, str]
    configurations: tuple[ConfigAggregate, ...]
    stopping: StoppingRule | None = None

    @property
    def is_single_cycle(self) -> bool:
        """There are results, and no configuration has more than one cycle."""
        return max((item.n_cycles for item in self.configurations), default=0) == 1


def summarise(
    records: Iterable[Record],
    *,
    failed: Mapping[str, int] | None = None,
    campaign_name: str = "",
    run_id: str = "",
    confidence: float = CONFIDENCE,
    stopping: StoppingRule | None = None,
) -> CampaignSummary:
    """The summary of the results of one campaign.

    Args:
        records: all whole results, valid or not, of all attempts.
        failed: per configuration name, how many experiments gave no result.
        campaign_name, run_id: what to call a campaign of which there is no result that says it.
        confidence: of every interval.
        stopping: as `precision.read_stopping_rule` finds it beside the results.
    """
    kept = sorted(records, key=lambda record: (record.identity.order_index, record.identity.cycle_index))
    failed = failed or {}
    by_name: dict[str, list[Record]] = {}
    for record in kept:
        by_name.setdefault(record.identity.config_name, []).append(record)
    for name in failed:
        by_name.setdefault(name, [])
    return CampaignSummary(
        campaign_name=", ".join(_distinct(kept, lambda record: record.identity.campaign_name)) or campaign_name,
        run_ids=_distinct(kept, lambda record: record.identity.run_id) or ((run_id,) if run_id else ()),
        hosts=_distinct(kept, lambda record: record.identity.host),
        confidence=confidence,
        shared=shared_settings(map(headline_settings, kept)),
        configurations=tuple(
            aggregate_config(name, members, confidence, failed.get(name, 0)) for name, members in by_name.items()
        ),
        stopping=stopping,
    )


def summary_document(summary: CampaignSummary) -> dict[str, Any]:
    """The summary as JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        **{item.name: getattr(summary, item.name) for item in dataclasses.fields(summary)},
        "shared": dict(summary.shared),
        "run_ids": list(summary.run_ids),
        "hosts": list(summary.hosts),
        "stopping": None if summary.stopping is None else stopping_document(summary.stopping),
        "note": SINGLE_CYCLE if summary.is_single_cycle else None,
        "configurations": [item.to_dict() for item in summary.configurations],
    }


def _distinct(records: Sequence[Record], read: Callable[[Record], str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(read, records)))


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
