"""Names by content: what makes two experiments, or two campaigns, the same."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from lem import durable
from lem.clock import utc_stamp
from lem.config.campaign_config import CampaignConfig
from lem.config.experiment_config import ExperimentConfig, SyntheticPrompts
from lem.experiment.prompts import ResolvedPrompts
from lem.experiment.synthetic import BUNDLED, SyntheticPlan, generate

__all__ = [
    "PromptResolver",
    "campaign_config_hash",
    "canonical_json",
    "config_hash",
    "experiment_id",
    "make_run_id",
    "prompts_fingerprint",
]

CONFIG_HASH_LENGTH = 16
_ID_HASH_LENGTH = 12

# The parts of an identity that say where prompts come from. The fingerprint of the prompts stands for them: a file of
# prompts is known by its content, not by its path, and the bundled set by what it holds.
_PROMPT_KEYS = ("dataset", "prompts")

PromptResolver = Callable[[ExperimentConfig], "ResolvedPrompts | None"]
"""The prompts of an experiment; None where only the worker can have them (`lem.experiment.prompts.resolve_on_host`)."""


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: keys sorted, no spaces. 1 and 1.0 differ, as JSON writes them.

    Raises:
        ValueError: a NaN or an infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def prompts_fingerprint(config: ExperimentConfig, resolve: PromptResolver) -> dict[str, Any]:
    """What decides which prompts an experiment runs, as JSON values.

    Prompts of a file by their content; synthetic ones by their parameters and what the generator makes of some; a
    dataset, whose content only the worker sees and records, by its name and what is taken of it.

    Raises:
        ConfigurationError: from `resolve`, prompts that cannot be used.
    """
    if config.dataset is not None:
        return {"dataset": config.dataset.identity()}
    if config.prompts is None or isinstance(config.prompts, SyntheticPrompts):
        parameters = BUNDLED if config.prompts is None else config.prompts
        names = [item.name for item in dataclasses.fields(BUNDLED)]
        return {"synthetic": {name: getattr(parameters, name) for name in names}, "generator": generator_version()}
    resolved = resolve(config)
    return {"prompts": config.prompts.identity()} if resolved is None else {"sha256": resolved.source["sha256"]}


@functools.cache
def generator_version() -> str:
    """A hash of what the generator of synthetic prompts makes; another one when it is changed."""
    digest = hashlib.sha256()
    for distribution in ("fixed", "uniform", "lognormal"):
        for prompt in generate(SyntheticPlan(64, 64, sample_size=32, seed=42, distribution=distribution)):
            digest.update(repr(dataclasses.astuple(prompt)).encode("utf-8"))
    return digest.hexdigest()[:CONFIG_HASH_LENGTH]


def config_hash(config: ExperimentConfig, prompts: Mapping[str, Any]) -> str:
    """16 hex digits over everything that can change an experiment's numbers.

    Args:
        prompts: as `prompts_fingerprint`.
    """
    settings = {key: value for key, value in config.identity().items() if key not in _PROMPT_KEYS}
    return _digest({"config": settings, "prompts": prompts})


def experiment_id(configuration_hash: str, cycle_index: int) -> str:
    """The name of one configuration in one cycle: `3f2a…-c1` for cycle 0."""
    return f"{configuration_hash[:_ID_HASH_LENGTH]}-c{cycle_index + 1}"


def make_run_id(now: datetime, rng: random.Random) -> str:
    """A name for a run of a campaign, which sorts by time: `20260714T100000Z-1f3a`.

    Args:
        now: an aware time.
        rng: tells runs apart that start in one second, here or on another host.
    """
    return f"{utc_stamp(now)}-{rng.getrandbits(16):04x}"


def campaign_config_hash(campaign: CampaignConfig, config_hashes: Sequence[str]) -> str:
    """16 hex digits over what a campaign measures and how: its configurations in order, execution and cold start.

    Args:
        config_hashes: of the configurations planned, in their order.
    """
    sections = {"execution": campaign.execution.to_dict(), "cold_start": campaign.cold_start.to_dict()}
    return _digest({**sections, "experiments": list(config_hashes)})


def _digest(value: Any) -> str:
    return hashlib.sha256(durable.utf8(canonical_json(value))).hexdigest()[:CONFIG_HASH_LENGTH]
