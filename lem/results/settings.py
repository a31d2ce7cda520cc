"""The settings of a configuration as people name them: what several share, and in what they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from lem.record import Record

__all__ = ["differing_settings", "headline_settings", "settings_of", "shared_settings"]


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
