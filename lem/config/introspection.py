"""The options there are, for programs: every one by its dotted name, from its declaration."""

from __future__ import annotations

from typing import Any

from lem.base.errors import ConfigurationError
from lem.config.backends import BACKENDS
from lem.config.campaign_config import CampaignConfig, CampaignGridConfig, CampaignHealthCheckConfig
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import Bounds
from lem.config.option import REQUIRED, Declared, Section, declared, walk

__all__ = [
    "describe",
    "get_campaign_grid_params",
    "get_campaign_health_check_params",
    "get_campaign_params",
    "get_experiment_params",
]


def get_campaign_params() -> dict[str, dict[str, Any]]:
    """Every option of a campaign by dotted name (`execution.cycles`).

    Each is a dict of `type`, `default`, `required`, `bounds`, `choices`, `unit`, `description`, `backends`, `reload`,
    `variants`. Bounds are a dict in the words of JSON Schema, None where there are none.
    """
    return _describe_all(CampaignConfig)


def get_campaign_grid_params() -> dict[str, dict[str, Any]]:
    """Every option of a grid by dotted name (`grid.backends`), as `get_campaign_params`."""
    return _describe_all(CampaignGridConfig, "grid")


def get_campaign_health_check_params() -> dict[str, dict[str, Any]]:
    """Every option of the health check by dotted name, as `get_campaign_params`."""
    return _describe_all(CampaignHealthCheckConfig, "health_check")


def get_experiment_params(backend: str | None = None) -> dict[str, dict[str, Any]]:
    """Every option of an experiment by dotted name, as `get_campaign_params`.

    Args:
        backend: leave out what this backend does not honour; None keeps the options of all.

    Raises:
        ConfigurationError: there is no such backend.
    """
    if backend is not None and backend not in BACKENDS:
        raise ConfigurationError(f"there is no backend {backend!r}", f"one of: {', '.join(BACKENDS)}")
    found = _describe_all(ExperimentConfig)
    return {
        key: entry
        for key, entry in found.items()
        if backend is None or entry["backends"] is None or backend in entry["backends"]
    }


def _describe_all(section: type[Section], prefix: str = "") -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for key, item, owner in walk(section, prefix):
        variant = _variant_of(owner)
        entry = {**describe(item), "variants": None if variant is None else [variant]}
        out[key] = entry if key not in out else _join_variants(out[key], entry)
    return out


def _join_variants(known: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """An option that several variants have, such as `prompts.sample_size`, as one."""
    joined = {**known, "variants": [*known["variants"], *entry["variants"]]}
    if known["choices"]:  # `type` itself, which tells the variants apart
        joined.update(choices=[*known["choices"], *entry["choices"]], default=None, required=True)
    if entry["description"] not in known["description"]:
        joined["description"] = f"{known['description']} {entry['variants'][0]}: {entry['description']}"
    return joined


def _variant_of(section: type[Section]) -> str | None:
    """The `type` under which a section is one of several; None for one that stands alone."""
    item = declared(section).get("type")
    return str(item.option.default) if item is not None else None


def describe(item: Declared) -> dict[str, Any]:
    """What is declared about an option; as `get_campaign_params`, but for `variants`."""
    declaration = item.option
    bounds: Bounds = declaration.bounds
    is_required = declaration.default is REQUIRED
    return {
        "type": item.kind.label,
        "default": None if is_required else item.kind.dump(item.default()),
        "required": is_required,
        "bounds": bounds.json_schema() or None,
        "choices": list(declaration.choices) or None,
        "unit": declaration.unit,
        "description": declaration.description,
        "backends": None if declaration.backends is None else list(declaration.backends),
        "reload": declaration.is_reload,
    }
