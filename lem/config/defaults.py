"""What a campaign says for all its experiments, filled into each one that does not say it itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lem.config.campaign_config import CampaignConfig
from lem.config.experiment_config import BUNDLED_DISTRIBUTION, BUNDLED_INPUT_TOKENS, ExperimentConfig, WarmupConfig
from lem.config.merging import canonical
from lem.config.schema import Section, declared

__all__ = ["given", "with_campaign_defaults"]

# Options of a campaign, and those of an experiment that they stand for.
_RIVALS = {
    "model": ("model",),
    "dataset": ("dataset", "prompts"),
    "num_samples": ("dataset.sample_size", "prompts.sample_size"),
    "execution.warmup_prompts": ("warmup.min_prompts",),
    "execution.warmup_timeout_seconds": ("warmup.timeout_seconds",),
}


def with_campaign_defaults(
    campaign: CampaignConfig, experiment: Mapping[str, Any], forced: Collection[str] = ()
) -> dict[str, Any]:
    """The experiment, as a plain mapping, with the campaign's model, dataset, num_samples and warm-up filled in.

    Args:
        forced: options of the campaign, by dotted name, that win over the experiment's own: those of the command line.
    """
    out = _without_forced(canonical(ExperimentConfig, experiment), forced)
    if campaign.model is not None:
        _fill_named(out, "model", given(campaign.model))
    if campaign.dataset is not None and out.get("prompts") is None:
        _fill_named(out, "dataset", given(campaign.dataset))
    if campaign.num_samples is not None:
        _fill_sample_size(out, campaign.num_samples)
    _fill_warmup(out, campaign)
    return out


def _without_forced(out: dict[str, Any], forced: Collection[str]) -> dict[str, Any]:
    """Take out what the command line says otherwise."""
    for key, rivals in _RIVALS.items():
        if not any(name == key or name.startswith(f"{key}.") for name in forced):
            continue
        for section, _, option in (rival.partition(".") for rival in rivals):
            if not option:
                out.pop(section, None)
            elif isinstance(out.get(section), dict):
                out[section].pop(option, None)
    return out


def given(section: Section) -> dict[str, Any]:
    """The options of a section that differ from their defaults."""
    options = declared(type(section))
    return {name: value for name, value in section.to_dict().items() if value != options[name].option.default}


def _fill_named(out: dict[str, Any], key: str, default: dict[str, Any]) -> None:
    """Fill in a section that has a name; what belongs to another name is not mixed in."""
    if key not in out:
        out[key] = default
    elif isinstance(out[key], dict) and "name" not in out[key]:
        out[key] = {**default, **out[key]}


def _fill_sample_size(out: dict[str, Any], num_samples: int) -> None:
    for key in ("dataset", "prompts"):
        source = out.get(key)
        if isinstance(source, dict):
            source.setdefault("sample_size", num_samples)
    if out.get("dataset") is None and out.get("prompts") is None:
        longest = out.get("max_input_tokens")
        is_shorter = isinstance(longest, int) and 0 < longest < BUNDLED_INPUT_TOKENS
        length = longest if is_shorter else BUNDLED_INPUT_TOKENS
        out["prompts"] = {
            "type": "synthetic",
            "input_tokens": length,
            "sample_size": num_samples,
            "distribution": BUNDLED_DISTRIBUTION,
        }


def _fill_warmup(out: dict[str, Any], campaign: CampaignConfig) -> None:
    warmup = out.setdefault("warmup", {})
    if not isinstance(warmup, dict):
        return  # for validation to refuse
    if "min_prompts" not in warmup:
        prompts = campaign.execution.warmup_prompts
        warmup["min_prompts"] = prompts
        if prompts > declared(WarmupConfig)["max_prompts"].option.default:
            warmup.setdefault("max_prompts", prompts)
    warmup.setdefault("timeout_seconds", campaign.execution.warmup_timeout_seconds)
