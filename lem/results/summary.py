"""A campaign's results in one value: what the final table, its JSON and other views are made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lem.record import Record
from lem.results.aggregation import ConfigAggregate, aggregate_config
from lem.results.bootstrap import CONFIDENCE
from lem.results.precision import StoppingRule, stopping_document
from lem.results.settings import headline_settings, shared_settings

__all__ = ["SINGLE_CYCLE", "CampaignSummary", "summarise", "summary_document"]

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
