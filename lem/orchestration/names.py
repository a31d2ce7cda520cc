"""Names and identities: configurations, experiments, runs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from lem.base import durable
from lem.base.clock import utc_stamp
from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig, SyntheticPrompts
from lem.config.kinds import Expanded
from lem.worker.prompts import BUNDLED, ResolvedPrompts, generate, resolve_on_host

# Leaves room for `.yaml` and a temporary name in the 255 bytes of a file name, and for a column of a table.
MAX_NAME_LENGTH = 96
_SUFFIX_LENGTH = 6

Flat = dict[tuple[str, ...], Any]

_BACKEND = ("backend",)
_MODEL = ("model", "name")
# Their values are clear without the option's name.
_SELF_EXPLAINING = {("fp_precision",), ("decoder", "preset")}
_SHORT_FORMS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("model",): _MODEL,
    ("model_name",): _MODEL,
    ("dataset",): ("dataset", "name"),
}
_IGNORED = {_BACKEND, _MODEL, ("config_name",)}


def name_configurations(config_dicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each: backend, every option that varies, and the model where it varies or nothing else does.

    `pytorch-float16-batch_size=4-max_output_tokens=64`: short, unique, fit for a file name, equal for equal input.
    """
    flat = [_flatten(config) for config in config_dicts]
    models = {str(options[_MODEL]) for options in flat if options.get(_MODEL)}
    keys = [key for key in _varying(flat) if key not in _IGNORED]
    labels = _labels(keys)
    shown_models = _short_models(models) if not keys or len(models) > 1 else {}
    names = [_name(options, labels, shown_models) for options in flat]
    return distinct_names(names, config_dicts)


def distinct_names(names: Sequence[str], contents: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names, each that is not the first of its kind followed by a hash of its content, or by a number."""
    seen: dict[str, None] = {}
    for name, content in zip(names, contents, strict=True):
        candidate, number = name, 1
        while candidate in seen:
            text = json.dumps(content, sort_keys=True, default=str)
            digest = hashlib.sha256(text.encode("utf-8")).hexdigest()[:_SUFFIX_LENGTH]
            candidate = f"{name}-{digest}" if number == 1 else f"{name}-{digest}-{number}"
            number += 1
        seen[candidate] = None
    return list(seen)


def _flatten(config: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Flat:
    """Every option given, by its path; the short form of a model or dataset under its name."""
    out: Flat = {}
    for key, value in config.items():
        path = (*prefix, key)
        if isinstance(value, dict):
            out.update(_flatten(value, path))
        else:
            out[_SHORT_FORMS.get(path, path)] = value
    return out


def _varying(flat: Sequence[Flat]) -> list[tuple[str, ...]]:
    seen: dict[tuple[str, ...], set[str]] = {}
    counts: Counter[tuple[str, ...]] = Counter()
    for options in flat:
        counts.update(options.keys())
        for key, value in options.items():
            seen.setdefault(key, set()).add(repr(value))
    return [key for key, values in seen.items() if len(values) > 1 or counts[key] < len(flat)]


def _labels(keys: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """For each option the shortest end of its name that is unique."""
    labels = {}
    for key in keys:
        length = 1
        while length < len(key) and any(other != key and other[-length:] == key[-length:] for other in keys):
            length += 1
        labels[key] = f"{_clean('.'.join(key[-length:]))}="
    return labels


def _short_models(models: set[str]) -> dict[str, str]:
    short = {model: model.rstrip("/").rpartition("/")[2] for model in models}
    counts = Counter(short.values())
    return {model: _clean(name if counts[name] == 1 else model) for model, name in short.items()}


def _name(options: Flat, labels: Mapping[tuple[str, ...], str], models: Mapping[str, str]) -> str:
    model = models.get(str(options.get(_MODEL)))
    parts = [_clean(_text(options.get(_BACKEND, "pytorch"))), *([model] if model else [])]
    parts += [
        _value(options[key]) if key in _SELF_EXPLAINING and options[key] else label + _value(options[key])
        for key, label in labels.items()
        if key in options
    ]
    return _shortened("-".join(parts))


def file_stem(name: str) -> str:
    """A configuration's name as a file name, without its ending."""
    return _shortened(_clean(name).lstrip(".-")) or "experiment"


def _shortened(name: str) -> str:
    """The name; where it is too long, its end is replaced by a hash."""
    if len(name) <= MAX_NAME_LENGTH:
        return name
    ending = hashlib.sha256(name.encode("utf-8")).hexdigest()[:_SUFFIX_LENGTH]
    return f"{name[: MAX_NAME_LENGTH - _SUFFIX_LENGTH - 1]}-{ending}"


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(_value(item) for item in value) or "none"
    text = _text(value)
    if isinstance(value, str) and "/" in text:
        text = text.rstrip("/").rpartition("/")[2]
    return _clean(text)


def _text(value: Any) -> str:
    """A value as YAML writes it; `${VAR}` as it was written, since what it holds may be a secret."""
    if isinstance(value, Expanded):
        return value.written
    if isinstance(value, str):
        return str(value)
    return _PLAIN_TEXTS[value] if value is None or isinstance(value, bool) else str(value)


_PLAIN_TEXTS = {None: "null", True: "true", False: "false"}


@functools.lru_cache(maxsize=4096)
def _clean(text: str) -> str:
    return _UNFIT.sub("_", text)


_UNFIT = re.compile(r"[^A-Za-z0-9._=+-]+")


CONFIG_HASH_LENGTH = 16
_ID_HASH_LENGTH = 12

# The parts of an identity that name the source of prompts. The fingerprint of the prompts replaces them: a file of
# prompts is known by its content, not by its path, and the bundled set by what it holds.
_PROMPT_KEYS = ("dataset", "prompts")


def prompts_fingerprint(config: ExperimentConfig, resolved: ResolvedPrompts | None = None) -> dict[str, Any]:
    """What determines the prompts of an experiment, as JSON values; ConfigurationError where they cannot be used.

    Prompts of a file by their content; synthetic ones by their parameters and a sample of the generator's output; a
    dataset, whose content only the worker sees and records, by its name and what is taken of it.
    """
    if config.dataset is not None:
        return {"dataset": config.dataset.identity()}
    if config.prompts is None or isinstance(config.prompts, SyntheticPrompts):
        parameters = BUNDLED if config.prompts is None else config.prompts
        names = [item.name for item in dataclasses.fields(BUNDLED) if item.name != "type"]
        return {"synthetic": {name: getattr(parameters, name) for name in names}, "generator": generator_version()}
    resolved = resolved or resolve_on_host(config)
    return {"prompts": config.prompts.identity()} if resolved is None else {"sha256": resolved.source["sha256"]}


@functools.cache
def generator_version() -> str:
    """A hash of a sample of synthetic prompts, which changes with their generator."""
    digest = hashlib.sha256()
    for distribution in ("fixed", "uniform", "lognormal"):
        plan = SyntheticPrompts(input_tokens=64, output_tokens=64, sample_size=32, seed=42, distribution=distribution)
        for prompt in generate(plan):
            digest.update(repr(dataclasses.astuple(prompt)).encode("utf-8"))
    return digest.hexdigest()[:CONFIG_HASH_LENGTH]


def config_hash(config: ExperimentConfig, prompts: Mapping[str, Any]) -> str:
    """16 hex digits over everything that can change an experiment's numbers, with its `prompts_fingerprint`."""
    settings = {key: value for key, value in config.identity().items() if key not in _PROMPT_KEYS}
    return _digest({"config": settings, "prompts": prompts})


def experiment_id(configuration_hash: str, cycle_index: int) -> str:
    """The name of one configuration in one cycle: `3f2a…-c1` for cycle 0."""
    return f"{configuration_hash[:_ID_HASH_LENGTH]}-c{cycle_index + 1}"


def make_run_id(now: datetime, rng: random.Random) -> str:
    """A name for a run of a campaign, which sorts by time: `20260714T100000Z-1f3a`.

    The random end distinguishes runs that start in one second, here or on another host.
    """
    return f"{utc_stamp(now)}-{rng.getrandbits(16):04x}"


def campaign_config_hash(campaign: CampaignConfig, config_hashes: Sequence[str]) -> str:
    """16 hex digits over what a campaign measures and how: its configurations in order, execution and cold start."""
    sections = {"execution": campaign.execution.to_dict(), "cold_start": campaign.cold_start.to_dict()}
    return _digest({**sections, "experiments": list(config_hashes)})


def _digest(value: Any) -> str:
    # Keys sorted, no spaces: one text for equal values. 1 and 1.0 differ, as JSON writes them.
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(durable.utf8(text)).hexdigest()[:CONFIG_HASH_LENGTH]
