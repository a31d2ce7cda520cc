"""The grid of a campaign: every combination of its axes, and which of them are experiments. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lem.base.reasons import Reason
from lem.config.backends import BACKENDS
from lem.config.campaign_config import CampaignGridConfig
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import ConfigProblems, Items, Problem, dotted
from lem.config.option import Section, canonical, declared, find_option, put
from lem.config.rules import Gpu
from lem.config.rules import warnings as warnings_about
from lem.orchestration.names import name_configurations

__all__ = ["GridExpansionResult", "GridValidationIssue", "expand_campaign_grid", "validate_campaign_grid"]

# Options that determine an engine option (on the right) where that one is not given
# (ExperimentConfig.engine_key).
_DERIVED_RELOADS: Mapping[str, Mapping[str, str]] = {
    "vllm": {"max_input_tokens": "max_model_len", "max_output_tokens": "max_model_len"},
    "tensorrt": {"max_input_tokens": "max_input_len", "max_output_tokens": "max_output_len"},
}

# Reasons that name the backend and are clear without the option.
_NAMES_BACKEND = frozenset({"tensorrt_precision", "tensorrt_gpu", "pytorch_one_gpu"})

Axis = tuple[str, Sequence[Any]]

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
    """A grid after validation.

    Attributes:
        valid_configs: as they were given to the validation.
        filtered_configs: an error for each one left out.
        warnings: about valid ones; there may be several for one.
        total_generated: all, before validation.
    """

    valid_configs: tuple[dict[str, Any], ...]
    filtered_configs: tuple[GridValidationIssue, ...]
    warnings: tuple[GridValidationIssue, ...]
    total_generated: int

    @property
    def summary(self) -> str:
        """`Generated 48 experiments (12 filtered: tensorrt needs float16 or bfloat16 × 12). 6 have warnings.`"""
        reasons = "; ".join(f"{reason} × {count}" for reason, count in count_reasons(self.filtered_configs))
        filtered = f"{len(self.filtered_configs)} filtered" + (f": {reasons}" if reasons else "")
        warned = len({issue.config_desc for issue in self.warnings})
        warning = f" {warned} {'has' if warned == 1 else 'have'} warnings." if warned else ""
        return f"Generated {self.total_generated} experiments ({filtered}).{warning}"


def count_reasons(issues: Iterable[GridValidationIssue]) -> list[tuple[str, int]]:
    """How many issues have each reason, the most frequent first."""
    counts: Counter[tuple[Reason, ...]] = Counter()
    texts: dict[tuple[Reason, ...], str] = {}
    for issue in issues:
        why = issue.why or (Reason.of("verbatim", text=issue.reason),)
        counts[why] += 1
        texts.setdefault(why, issue.reason)
    return [(texts[why], count) for why, count in counts.most_common()]


def expand_campaign_grid(
    grid: CampaignGridConfig, base_config: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Every combination of backends × models × shared axes × the backend's overrides, not yet validated.

    A list is an axis, anything else a fixed value; an option that is itself a list takes a list of lists. Dotted keys
    nest, and an override is a field of its backend's section. Axes whose change needs another engine load vary
    slowest, so that configurations with equal engines lie together; beyond that the first axis varies slowest.

    Args:
        base_config: values for every experiment, which axes win over; of the backends' sections each experiment gets
            its own backend's alone.
    """
    configs = []
    for backend in grid.backends:
        base = _base_of(backend, base_config or {})
        layer = [base]
        for key, values in _axes_of(grid, backend, base):
            lay = _layer_of(key)
            layer = [lay(config, value) for config in layer for value in values]
        configs.extend(layer)
    return [_finished(config) for config in configs]


def _base_of(backend: str, base_config: Mapping[str, Any]) -> dict[str, Any]:
    others = set(BACKENDS) - {backend}
    own = {key: value for key, value in base_config.items() if key not in others}
    return canonical(ExperimentConfig, {**own, "backend": backend})


def _axes_of(grid: CampaignGridConfig, backend: str, base: Mapping[str, Any]) -> list[Axis]:
    axes: dict[str, Sequence[Any]] = {"model": grid.models} if grid.models else {}
    axes.update({key: _values_of(value) for key, value in grid.shared.items()})
    overrides = grid.backend_overrides.get(backend, {})
    axes.update({f"{backend}.{key}": _values_of(value) for key, value in overrides.items()})
    given = {*axes, *(f"{backend}.{key}" for key in base.get(backend) or ())}
    return sorted(axes.items(), key=lambda axis: not _needs_reload(axis[0], backend, given))


def _values_of(value: Any) -> Sequence[Any]:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else [_plain(value)]


def _plain(value: Any) -> Any:
    """Lists as JSON and YAML have them; text stays as it is, since it may remember its `${VAR}`."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _needs_reload(key: str, backend: str, given: set[str]) -> bool:
    stands_in = _DERIVED_RELOADS.get(backend, {}).get(key)
    if stands_in is not None and f"{backend}.{stands_in}" not in given:
        return True
    found = find_option(ExperimentConfig, key)
    while found is None and "." in key:  # what a free mapping holds is not declared, the mapping is
        key = key.rpartition(".")[0]
        found = find_option(ExperimentConfig, key)
    return found is not None and (found.reload or any(map(_has_reload, found.sections)))


def _has_reload(section: type[Section]) -> bool:
    return any(item.reload or any(map(_has_reload, item.sections)) for item in declared(section).values())


def _layer_of(key: str) -> Callable[[Mapping[str, Any], Any], dict[str, Any]]:
    """A function that lays a value of an axis over a copy of a configuration."""
    found = find_option(ExperimentConfig, key)
    if found is None or found.sections:
        return lambda config, value: put(ExperimentConfig, config, key, value)
    # Of a plain option nothing needs merging, which matters for a grid of 10,000.
    parts = tuple(key.split("."))
    return lambda config, value: _with_leaf(config, parts, value)


def _with_leaf(config: Mapping[str, Any], parts: tuple[str, ...], value: Any) -> dict[str, Any]:
    out = dict(config)
    if len(parts) > 1:
        below = out.get(parts[0])
        value = _with_leaf(below if isinstance(below, dict) else {}, parts[1:], value)
    out[parts[0]] = value
    return out


def _finished(config: dict[str, Any]) -> dict[str, Any]:
    """A copy that shares nothing, with a model that has only a name written as its name, as people do."""
    out: dict[str, Any] = _plain(config)
    model = out.get("model")
    if isinstance(model, dict) and model.keys() == {"name"}:
        out["model"] = model["name"]
    return out


def validate_campaign_grid(config_dicts: Sequence[dict[str, Any]]) -> GridExpansionResult:
    """Which configurations are experiments; the others with the reason why not."""
    named = list(zip(name_configurations(config_dicts), config_dicts, strict=True))
    configs, filtered, warnings = validate_named(named)
    valid = [item for item, config in zip(config_dicts, configs, strict=True) if config is not None]
    return GridExpansionResult(Items(valid), filtered, warnings, len(config_dicts))


def validate_named(
    named: Sequence[tuple[str, Mapping[str, Any]]], gpus: Sequence[Gpu] | None = None
) -> tuple[Sequence[ExperimentConfig | None], tuple[GridValidationIssue, ...], tuple[GridValidationIssue, ...]]:
    """The configurations in the order given, None for one that was filtered; an error for each of these; warnings.

    Args:
        named: each with its name.
        gpus: of the host that will run them, for warnings; None when unknown.
    """
    configs: list[ExperimentConfig | None] = []
    filtered: list[GridValidationIssue] = []
    warnings: list[GridValidationIssue] = []
    for name, config_dict in named:
        try:
            config = ExperimentConfig.from_dict(config_dict)
        except ConfigProblems as error:
            why = map(_coded, error.problems) if has_model(config_dict) else [NO_MODEL]
            filtered.append(GridValidationIssue.of(name, *why))
            configs.append(None)
            continue
        configs.append(config)
        warnings += [
            GridValidationIssue.of(name, _coded(item), severity="warning") for item in warnings_about(config, gpus)
        ]
    return configs, Items(filtered), Items(warnings)


def has_model(config_dict: Mapping[str, Any]) -> bool:
    """Whether a configuration names a model, in any of the ways to write it."""
    model = config_dict.get("model", config_dict.get("model_name"))
    return bool(model.get("name") if isinstance(model, Mapping) else model)


def _coded(found: Problem) -> Reason:
    if found.reason is None:
        return Reason.of("verbatim", text=str(found))
    if found.reason.code in _NAMES_BACKEND:
        return found.reason
    return Reason.of("at_option", option=dotted(found.path), what=found.reason)
