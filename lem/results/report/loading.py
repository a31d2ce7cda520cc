"""What the page is made from, read from the results folder; what is damaged is named and left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lem import durable
from lem.record import Record
from lem.results.attempt import CONFIG_FILE
from lem.results.report.content import Entry, FailedSettings, flat_settings
from lem.results.repository import Problem, Scan, StoredResult

__all__ = ["TRACES_SHOWN", "failed_settings", "select_traced"]

TRACES_SHOWN = 12
_FAULTY_FIRST = 4


def failed_settings(scan: Scan) -> tuple[FailedSettings, ...]:
    """The settings of configurations without any whole result, from the `config.json` beside what is missing."""
    known = {_configuration(item.record.identity.experiment_id) for item in scan.results}
    found: dict[str, FailedSettings] = {}
    for problem in scan.problems:
        key = _configuration(problem.exp_id)
        if not problem.exp_id or key in known or key in found:
            continue
        settings = _read_settings(problem, key)
        if settings is not None:
            found[key] = settings
    return tuple(found.values())


def select_traced(
    entries: Sequence[Entry], results: Sequence[StoredResult], limit: int = TRACES_SHOWN
) -> tuple[StoredResult, ...]:
    """The results whose power over time is drawn: some that were invalid or throttled, then one a configuration.

    All of them when there are few enough; else configurations in the order of their merit.
    """
    if len(results) <= limit:
        return tuple(results)
    faulty = [item for item in results if not item.record.validity.valid or _is_throttled(item.record)]
    chosen = faulty[:_FAULTY_FIRST]
    by_key = {item.record.identity.key: item for item in results}
    for entry in entries:
        own = (by_key[record.identity.key] for record in entry.used if record.identity.key in by_key)
        first = next(own, None)
        if len(chosen) < limit and first is not None and first not in chosen:
            chosen.append(first)
    return tuple(chosen)


def _is_throttled(record: Record) -> bool:
    return any(gpu.throttle_thermal_s for gpu in record.gpus)


def _configuration(exp_id: str) -> str:
    """The part of an experiment's name that all its cycles share."""
    return exp_id.rpartition("-c")[0] or exp_id


def _read_settings(problem: Problem, key: str) -> FailedSettings | None:
    folder: Path = problem.path if problem.path.is_dir() else problem.path.parent
    try:
        document = durable.read_json(folder / CONFIG_FILE)
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or not isinstance(document.get("requested"), dict):
        return None
    resolved = document.get("resolved")
    name = resolved.get("config_name") if isinstance(resolved, dict) else None
    return FailedSettings(name if isinstance(name, str) else key, flat_settings(document["requested"]))
