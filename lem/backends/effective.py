"""What an engine made of the options, beside what was asked for, in the same words for every backend."""

from __future__ import annotations

import contextlib
import enum
import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lem.config.experiment_config import DecoderConfig
from lem.errors import OptionRefused

__all__ = ["describe_decoder", "installed_versions", "is_same", "plain", "refuse_changes"]


def refuse_changes(pairs: Mapping[str, tuple[Any, Any]], facts: object) -> None:
    """Refuse the load when the engine has another value than the one asked for: nobody would see that it did.

    Args:
        pairs: {option: (requested, effective)}.
        facts: the engine and its version, as a text.

    Raises:
        OptionRefused: names option, requested and effective value, and the version.
    """
    differing = {name: pair for name, pair in pairs.items() if not is_same(*pair)}
    if differing:
        listed = "; ".join(f"{name}: {wanted} became {found}" for name, (wanted, found) in differing.items())
        raise OptionRefused(f"{facts} changed what was asked for: {listed}", "ask for what it does, or leave it out")


def is_same(wanted: Any, found: Any) -> bool:
    """Whether a value is the one asked for; whatever `auto` became is."""
    if wanted == "auto":
        return True
    if isinstance(wanted, str) and isinstance(found, str):
        return wanted.lower() == found.lower()
    return bool(wanted == found)


def describe_decoder(decoder: DecoderConfig, found: Mapping[str, Any], *, is_sampling: bool) -> dict[str, Any]:
    """The decoder as it works; None for sampling values that greedy decoding does not look at.

    Args:
        found: the engine's values by their names here.
    """
    values = {name: found.get(name) if is_sampling else None for name in ("temperature", "top_k", "top_p")}
    if not is_sampling and decoder.temperature == 0:
        values["temperature"] = 0.0
    return {"do_sample": is_sampling, **values, "repetition_penalty": found.get("repetition_penalty", 1.0)}


def plain(value: Any) -> Any:
    """A JSON value; None for what has no short form."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [plain(item) for item in items]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    text = str(value)
    # torch.float16 and its like; a folder.
    return text.removeprefix("torch.") if text.startswith("torch.") or isinstance(value, Path) else None


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """{distribution: version} of those that are installed."""
    found = {}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
