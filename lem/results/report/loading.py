"""What the page is made from, read from the results folder; what is damaged is named and left out."""

from __future__ import annotations

from collections.abc import Sequence

from lem.record import Record
from lem.results.report.content import Entry, FailedSettings, flat_settings
from lem.results.repository import Problem, Scan, StoredResult, config_beside, configuration_of, configured_name

__all__ = ["failed_settings", "select_traced"]

_TRACES_SHOWN = 12
_FAULTY_FIRST = 4


def failed_settings(scan: Scan) -> tuple[FailedSettings, ...]:
    """The settings of configurations without any whole result, from the `config.json` beside what is missing."""
    known = {configuration_of(item.record.identity.experiment_id) for item in scan.results}
    found: dict[str, FailedSettings] = {}
    for problem in scan.problems:
        key = configuration_of(problem.exp_id)
        if not problem.exp_id or key in known or key in found:
            continue
        settings = _read_settings(problem, key)
        if settings is not None:
            found[key] = settings
    return tuple(found.values())


def select_traced(entries: Sequence[Entry], results: Sequence[StoredResult]) -> tuple[StoredResult, ...]:
    """The results whose power over time is drawn: some that were invalid or throttled, then one a configuration.

    All of them when there are few enough; else configurations in the order of their merit.
    """
    if len(results) <= _TRACES_SHOWN:
        return tuple(results)
    faulty = [item for item in results if not item.record.validity.valid or _is_throttled(item.record)]
    chosen = faulty[:_FAULTY_FIRST]
    by_key = {item.record.identity.key: item for item in results}
    for entry in entries:
        own = (by_key[record.identity.key] for record in entry.used if record.identity.key in by_key)
        first = next(own, None)
        if len(chosen) < _TRACES_SHOWN and first is not None and first not in chosen:
            chosen.append(first)
    return tuple(chosen)


def _is_throttled(record: Record) -> bool:
    return any(gpu.was_slowed for gpu in record.gpus)


def _read_settings(problem: Problem, key: str) -> FailedSettings | None:
    config = config_beside(problem)
    requested = config.get("requested")
    if not isinstance(requested, dict):
        return None
    return FailedSettings(configured_name(config) or key, flat_settings(requested))
