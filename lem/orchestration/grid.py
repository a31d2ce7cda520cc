"""The configurations of a campaign: the combinations of a grid, which of them are experiments, names and identities."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import MAXYEAR, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from lem.base import durable
from lem.base.clock import run_time, utc_stamp
from lem.base.dataclass import dataclass, fields
from lem.base.errors import in_brackets
from lem.base.reasons import Reason
from lem.config.backends import BACKENDS
from lem.config.campaign_config import BALANCED, SHUFFLED, CampaignConfig, CampaignGridConfig
from lem.config.experiment import ENGINE_LENGTHS, ExperimentConfig, MeteredConfig
from lem.config.kinds import ConfigProblems, Expanded, Items, KnownValues, Option, Problem, dotted
from lem.config.option import Memo, canonical, canonical_text, declared, find_option, joined_texts, put
from lem.config.rules import Gpu
from lem.config.rules import warnings as warnings_about
from lem.config.sections import SyntheticPrompts
from lem.results.configurations import ID_HASH_LENGTH
from lem.worker.prompts import BUNDLED, ResolvedPrompts, generate, read_template, resolve_on_host, template_digest

__all__ = ["GridExpansionResult", "GridValidationIssue", "expand_campaign_grid", "validate_campaign_grid"]

# Reasons that name the backend and are clear without the option.
_NAMES_BACKEND = frozenset({"tensorrt_precision", "tensorrt_gpu", "pytorch_one_gpu"})

NO_MODEL = Reason.of("no_model")


@dataclass(frozen=True)
class GridValidationIssue:
    """Something about one configuration: `error` filters it, `warning` goes with it; `why` is its reason in codes."""

    config_desc: str
    reason: str
    severity: str = "error"
    why: tuple[Reason, ...] = ()

    @classmethod
    def of(cls, config_desc: str, *why: Reason, severity: str = "error") -> GridValidationIssue:
        """An issue for one or more reasons."""
        return cls(config_desc, "; ".join(item.text for item in why), severity, why)


@dataclass(frozen=True)
class GridExpansionResult:
    valid_configs: tuple[dict[str, Any], ...]  # as they were given to the validation
    filtered_configs: tuple[GridValidationIssue, ...]  # an error for each one left out
    warnings: tuple[GridValidationIssue, ...]  # about valid ones; there may be several for one
    total_generated: int  # before validation

    @property
    def summary(self) -> str:
        """`Generated 48 experiments (12 filtered: tensorrt needs float16 or bfloat16 × 12). 6 have warnings.`"""
        reasons = "; ".join(f"{reason} × {count}" for reason, count in count_reasons(self.filtered_configs))
        filtered = f"{len(self.filtered_configs)} filtered" + (f": {reasons}" if reasons else "")
        warned = len({issue.config_desc for issue in self.warnings})
        warning = f" {warned} {'has' if warned == 1 else 'have'} warnings." if warned else ""
        return f"Generated {self.total_generated} experiments ({filtered}).{warning}"


def count_reasons(issues: Iterable[GridValidationIssue]) -> list[tuple[str, int]]:
    counts = Counter((issue.why, issue.reason) for issue in issues)
    return [(reason, count) for (_, reason), count in counts.most_common()]


def expand_campaign_grid(
    grid: CampaignGridConfig, base_config: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Every combination of backends × models × shared axes × the backend's overrides, not yet validated.

    A list is an axis, anything else a fixed value; an option that is itself a list takes a list of lists. Dotted keys
    nest, and an override is a field of its backend's section. Axes whose change needs another engine load vary
    slowest, of these the image, so that configurations with equal engines lie together; beyond that the first axis
    varies slowest.

    Args:
        base_config: values for every experiment, which axes win over; of the backends' sections each experiment gets
            its own backend's alone.
    """
    return [_plain(config) for config in expand_shared(grid, base_config)]


def expand_shared(grid: CampaignGridConfig, base_config: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """As `expand_campaign_grid`, where equal sections of several configurations are one object: not to be changed."""
    configs = []
    for backend in grid.backends:
        own = {key: value for key, value in (base_config or {}).items() if key == backend or key not in BACKENDS}
        base: dict[str, Any] = _plain(canonical(ExperimentConfig, {**own, "backend": backend}))
        layer = [base]
        for key, values in _axes_of(grid, backend, base):
            lay = Shared(_part_of(key), _layer_of(key), is_kept=len(layer) > 1)  # else each value comes once
            layer = [lay(config, value) for config in layer for value in values]
        configs.extend(layer)
    finish = Shared(("model",), lambda part, _: {key: _short_model(model) for key, model in part.items()})
    return [finish(config) for config in configs]


class Shared:
    """A function of some keys of a configuration, which is called once for those that have the same objects there.

    The function gets a mapping of these keys alone, which it must not change, and returns what replaces them.
    """

    def __init__(
        self,
        keys: Sequence[str],
        function: Callable[[Mapping[str, Any], Any], dict[str, Any]],
        *,
        is_kept: bool = True,
    ) -> None:
        self._keys, self._function, self._is_kept = tuple(keys), function, is_kept
        self._known: dict[Any, tuple[dict[str, Any], Any, dict[str, Any]]] = {}

    def __call__(self, config: dict[str, Any], value: Any = None) -> dict[str, Any]:
        """The configuration with its part replaced, itself where that is as it was; the function gets `value`, too."""
        key = (id(value), *[id(config[name]) if name in config else None for name in self._keys])
        known = self._known.get(key)
        if known is None:
            part = {name: config[name] for name in self._keys if name in config}
            changed = self._function(part, value)
            is_same = changed.keys() == part.keys() and all(changed[name] is part[name] for name in part)
            known = (part, value, part if is_same else changed)
            if self._is_kept:
                self._known[key] = known
        part, _, changed = known
        if changed is part:
            return config
        out = {name: item for name, item in config.items() if name not in part or name in changed}
        out.update(changed)
        return out


def _axes_of(grid: CampaignGridConfig, backend: str, base: Mapping[str, Any]) -> list[tuple[str, Sequence[Any]]]:
    axes: dict[str, Sequence[Any]] = {"model": _values_of(grid.models)} if grid.models else {}
    axes.update({key: _values_of(value) for key, value in grid.shared.items()})
    overrides = grid.backend_overrides.get(backend, {})
    axes.update({f"{backend}.{key}": _values_of(value) for key, value in overrides.items()})
    given = {*axes, *(f"{backend}.{key}" for key in base.get(backend) or ())}
    return sorted(axes.items(), key=lambda axis: (axis[0] != "image", not _needs_reload(axis[0], backend, given)))


def _values_of(value: Any) -> Sequence[Any]:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else [_plain(value)]


def _plain(value: Any) -> Any:
    """Lists as JSON and YAML have them; text stays as it is, since it may remember its `${VAR}`."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _needs_reload(key: str, backend: str, given: set[str]) -> bool:
    derived = next((name for name, sources in ENGINE_LENGTHS[backend].items() if key in sources), None)
    if derived is not None and f"{backend}.{derived}" not in given:
        return True
    found = find_option(ExperimentConfig, key)
    while found is None and "." in key:  # what a free mapping holds is not declared, the mapping is
        key = key.rpartition(".")[0]
        found = find_option(ExperimentConfig, key)
    return found is not None and _reloads(found)


def _reloads(option: Option) -> bool:
    return option.reload or any(_reloads(item) for one in option.kind.sections for item in declared(one).values())


def _part_of(key: str) -> tuple[str, ...]:
    """The options of a configuration that an axis can change."""
    written = key.partition(".")[0]
    name = ExperimentConfig.aliases.get(written, written)
    return ExperimentConfig.exclusive if name in ExperimentConfig.exclusive else (name, written)


def _layer_of(key: str) -> Callable[[Mapping[str, Any], Any], dict[str, Any]]:
    found = find_option(ExperimentConfig, key)
    if found is None or found.kind.sections:
        return lambda part, value: put(ExperimentConfig, part, key, value)
    # Of a plain option nothing needs merging.
    parts = tuple(key.split("."))
    return lambda part, value: _with_leaf(part, parts, value)


def _with_leaf(config: Mapping[str, Any], parts: tuple[str, ...], value: Any) -> dict[str, Any]:
    out = dict(config)
    if len(parts) > 1:
        below = out.get(parts[0])
        value = _with_leaf(below if isinstance(below, dict) else {}, parts[1:], value)
    out[parts[0]] = value
    return out


def _short_model(model: Any) -> Any:
    return model["name"] if isinstance(model, dict) and model.keys() == {"name"} else model


def validate_campaign_grid(config_dicts: Sequence[dict[str, Any]]) -> GridExpansionResult:
    """Which configurations are experiments; the others with the reason why not."""
    named = list(zip(name_configurations(config_dicts), config_dicts, strict=True))
    configs, filtered, found = validate_named(named)
    warnings = Items(GridValidationIssue.of(name, why, severity="warning") for name, why in found)
    valid = [item for item, config in zip(config_dicts, configs, strict=True) if config is not None]
    return GridExpansionResult(Items(valid), filtered, warnings, len(config_dicts))


def validate_named(
    named: Iterable[tuple[str, Mapping[str, Any]]], gpus: Sequence[Gpu] | None = None
) -> tuple[Sequence[ExperimentConfig | None], tuple[GridValidationIssue, ...], Sequence[tuple[str, Reason]]]:
    """Of each its configuration, None where it is none; why those are left out; and warnings about others, by name."""
    configs: list[ExperimentConfig | None] = []
    filtered: list[GridValidationIssue] = []
    warnings: list[tuple[str, Reason]] = []
    known: KnownValues = {}
    for name, config_dict in named:
        try:
            config = ExperimentConfig.from_dict(config_dict, known)
        except ConfigProblems as error:
            model = config_dict.get("model", config_dict.get("model_name"))  # in any of the ways to write it
            has_model = bool(model.get("name") if isinstance(model, Mapping) else model)
            why = map(coded, error.problems) if has_model else [NO_MODEL]
            filtered.append(GridValidationIssue.of(name, *why))
            configs.append(None)
            continue
        configs.append(config)
        warnings += [(name, coded(problem)) for problem in warnings_about(config, gpus)]
    return configs, Items(filtered), warnings


def coded(found: Problem) -> Reason:
    what = found.reason or Reason.of("verbatim", text=f"{found.message}{in_brackets(found.suggestion)}")
    if what.code in _NAMES_BACKEND or not found.path:
        return what
    return Reason.of("at_option", option=dotted(found.path), what=what)


# --- names

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
    """A name for each, fit for a file: backend, options that vary, the model where it varies or nothing else does."""
    # By the object that an option has, which many configurations of a grid share.
    known: dict[tuple[Any, int], Flat] = {}
    flat = [
        [
            known.get(at := (key, id(value))) or known.setdefault(at, _flatten({key: value}))
            for key, value in config.items()
        ]
        for config in config_dicts
    ]
    models = {str(part[_MODEL]) for part in known.values() if part.get(_MODEL)}
    keys = [key for key in _varying(flat, known.values()) if key not in _IGNORED]
    labels = _labels(keys)
    short = {model: model.rstrip("/").rpartition("/")[2] for model in models if not keys or len(models) > 1}
    counts = Counter(short.values())
    shown_models = {model: _clean(name if counts[name] == 1 else model) for model, name in short.items()}
    texts = {id(part): _texts(part, labels, shown_models) for part in known.values()}
    return distinct_names([_name([texts[id(part)] for part in parts], labels) for parts in flat], config_dicts)


def distinct_names(names: Sequence[str], contents: Sequence[Mapping[str, Any]]) -> list[str]:
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
    out: Flat = {}
    for key, value in config.items():
        path = (*prefix, key)
        if isinstance(value, dict):
            out.update(_flatten(value, path))
        else:
            out[_SHORT_FORMS.get(path, path)] = value
    return out


def _varying(flat: Sequence[Sequence[Flat]], known: Iterable[Flat]) -> list[tuple[str, ...]]:
    times = Counter(id(part) for parts in flat for part in parts)
    seen: dict[tuple[str, ...], set[str]] = {}
    counts: Counter[tuple[str, ...]] = Counter()
    for part in known:
        for key, value in part.items():
            seen.setdefault(key, set()).add(repr(value))
            counts[key] += times[id(part)]
    return [key for key, values in seen.items() if len(values) > 1 or counts[key] < len(flat)]


def _labels(keys: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    labels = {}
    for key in keys:
        length = 1
        while length < len(key) and any(other != key and other[-length:] == key[-length:] for other in keys):
            length += 1
        labels[key] = f"{_clean('.'.join(key[-length:]))}="
    return labels


def _texts(part: Flat, labels: Mapping[tuple[str, ...], str], models: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    found = {
        key: _value(value) if key in _SELF_EXPLAINING and value else labels[key] + _value(value)
        for key, value in part.items()
        if key in labels
    }
    if _BACKEND in part:
        found[_BACKEND] = _clean(_text(part[_BACKEND]))
    if model := models.get(str(part.get(_MODEL))):
        found[_MODEL] = model
    return found


def _name(parts: Iterable[Mapping[tuple[str, ...], str]], labels: Iterable[tuple[str, ...]]) -> str:
    texts: dict[tuple[str, ...], str] = {_BACKEND: "pytorch"}
    for part in parts:
        texts.update(part)
    return _shortened("-".join([texts[key] for key in (_BACKEND, _MODEL, *labels) if key in texts]))


def file_stem(name: str) -> str:
    return _shortened(_clean(name).lstrip(".-")) or "experiment"


def _shortened(name: str) -> str:
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
    if isinstance(value, Expanded):
        return value.written
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


@functools.lru_cache(maxsize=4096)
def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", text)


CONFIG_HASH_LENGTH = 16

# The parts of an identity that name the source of prompts. The fingerprint of the prompts replaces them: a file of
# prompts is known by its content, not by its path, and the bundled set by what it holds.
_PROMPT_KEYS = ("dataset", "prompts")


def prompts_fingerprint(
    config: ExperimentConfig, resolved: ResolvedPrompts | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """What determines the prompts of an experiment, as JSON values; ConfigurationError where they cannot be used."""
    # Prompts of a file, and a chat template, by their content; synthetic ones by their parameters and a sample of the
    # generator's output; a dataset, whose content only the worker sees and records, by its name and what is taken of
    # it. A result `folder` has a copy of the template.
    template = read_template(config, folder)
    applied = {} if template is None else {"chat_template": template_digest(template)}
    return {**_source_fingerprint(config, resolved), **applied}


def _source_fingerprint(config: ExperimentConfig, resolved: ResolvedPrompts | None) -> dict[str, Any]:
    if config.dataset is not None:
        return {"dataset": config.dataset.identity(), **_joined_columns(config)}
    if config.prompts is None or isinstance(config.prompts, SyntheticPrompts):
        parameters = BUNDLED if config.prompts is None else config.prompts
        names = [item.name for item in fields(BUNDLED) if item.name != "type"]
        return {"synthetic": {name: getattr(parameters, name) for name in names}, "generator": generator_version()}
    resolved = resolved or resolve_on_host(config)
    if resolved is not None:
        return {"sha256": resolved.source["sha256"]}
    return {"prompts": config.prompts.identity(), **_joined_columns(config)}


def _joined_columns(config: ExperimentConfig) -> dict[str, Any]:
    """Columns that an alias joins; an earlier lem took the first alone, and its results are of other prompts."""
    from lem.worker.datasets import choice_of

    columns = choice_of(config).columns
    return {"columns": list(columns)} if len(columns) > 1 else {}


@functools.cache
def generator_version() -> str:
    digest = hashlib.sha256()
    for distribution in ("fixed", "uniform", "lognormal"):
        plan = SyntheticPrompts(input_tokens=64, output_tokens=64, sample_size=32, seed=42, distribution=distribution)
        for prompt in generate(plan):
            digest.update(repr((prompt.prompt, prompt.input_tokens, prompt.output_tokens)).encode("utf-8"))
    return digest.hexdigest()[:CONFIG_HASH_LENGTH]


def config_hash(config: MeteredConfig, prompts: Mapping[str, Any], *, is_first: bool = False) -> str:
    """16 hex digits over all that can change an experiment's numbers; with `is_first`, as the first build had it."""
    return hash_of(config.identity_texts(is_first=is_first), prompts)


def hash_of(texts: Mapping[str, str], prompts: Mapping[str, Any]) -> str:
    """`config_hash` of the texts of an identity."""
    settings = {key: text for key, text in texts.items() if key not in _PROMPT_KEYS}
    return _digest(f'{{"config":{joined_texts(settings)},"prompts":{FINGERPRINT_TEXTS(prompts)}}}')


FINGERPRINT_TEXTS = Memo[str](canonical_text)  # of prompts, which thousands of configurations share


def experiment_id(configuration_hash: str, cycle_index: int) -> str:
    return f"{configuration_hash[:ID_HASH_LENGTH]}-c{cycle_index + 1}"


def make_run_id(now: datetime, rng: random.Random, existing: Iterable[str] = ()) -> str:
    """A name for a run of a campaign, which sorts by time: `20260714T100000Z-1f3a`."""
    # It sorts after the existing ones, also when the clock was set back. The random end distinguishes runs that start
    # in one second on several hosts.
    last = max(filter(None, map(run_time, existing)), default=None)
    if last is not None and last.year < MAXYEAR:
        now = max(now, last + timedelta(seconds=1))
    return f"{utc_stamp(now)}-{rng.getrandbits(16):04x}"


def campaign_config_hash(campaign: CampaignConfig, config_hashes: Sequence[str], *, is_first: bool = False) -> str:
    """16 hex digits over what is measured and how; with `is_first`, as the first build computed it."""
    execution = campaign.execution.identity(is_first=is_first)
    sections = {"execution": execution, "cold_start": campaign.cold_start.to_dict()}
    return _digest(canonical_text({**sections, "experiments": list(config_hashes)}))


def _digest(text: str) -> str:
    return hashlib.sha256(durable.utf8(text)).hexdigest()[:CONFIG_HASH_LENGTH]


# --- the order of the experiments within a cycle

_Item = TypeVar("_Item")


def cycle_order(
    engine_keys: Sequence[str], structure: str, seed: int, cycle: int, images: Sequence[str | None] = ()
) -> list[int]:
    """The order of a cycle: indices of the configurations with these engine keys and, where given, these images."""
    # Equal images are adjacent, since a container is replaced for another one, and of these equal keys, since each
    # cycle loads an engine once. The order depends on nothing but the arguments, so a campaign prolonged by a cycle
    # keeps the order of the others.
    by_image: dict[str | None, dict[str, list[int]]] = {}
    for index, (key, image) in enumerate(zip(engine_keys, images or [None] * len(engine_keys), strict=True)):
        by_image.setdefault(image, {}).setdefault(key, []).append(index)
    tree = [list(by_key.values()) for by_key in by_image.values()]
    if structure == SHUFFLED:
        # Seeding with text hashes it with SHA-512, the same on every Python and machine.
        rng = random.Random(f"{seed}/{cycle}")
        for groups in tree:
            groups[:] = [rng.sample(group, len(group)) for group in groups]
            rng.shuffle(groups)
        rng.shuffle(tree)
    elif structure == BALANCED:
        tree = _rotated_and_mirrored(tree, cycle)
    return [index for groups in tree for group in groups for index in group]


def _rotated_and_mirrored(tree: Sequence[list[list[int]]], cycle: int) -> list[list[list[int]]]:
    """Every second cycle mirrors the one before, which cancels a linear trend; each pair of cycles starts one later."""
    # What has several members rotates half as often as the members. At the same rate, two groups of two would only run
    # the mirrored order again.
    pair = cycle // 2
    turn = pair // 2 if any(len(group) > 1 for groups in tree for group in groups) else pair
    slow = turn // 2 if any(len(groups) > 1 for groups in tree) else turn
    rotated = [[_rotated(group, pair) for group in _rotated(groups, turn)] for groups in _rotated(tree, slow)]
    return [[group[::-1] for group in groups[::-1]] for groups in rotated[::-1]] if cycle % 2 else rotated


def _rotated(items: Sequence[_Item], by: int) -> list[_Item]:
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]
