"""A campaign: which experiments to run, how often, in which order, and what to do around them."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.base import units
from lem.base.dataclass import dataclass, replace
from lem.base.errors import nearest
from lem.base.names import MANIFEST_FILENAME, generate_campaign_id, slug_of
from lem.config.backends import BACKENDS
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import REQUIRED, Items, Problem, check_url, dotted
from lem.config.kinds import Path as Location
from lem.config.option import Matching, Section, canonical, check_partial, declared, find_option, nest, option, put
from lem.config.sections import BUNDLED_DISTRIBUTION, BUNDLED_INPUT_TOKENS, DatasetConfig, ModelConfig, WarmupConfig
from lem.config.terms import Term, either, find_term

__all__ = [
    "CampaignColdStartConfig",
    "CampaignConfig",
    "CampaignDaemonConfig",
    "CampaignExecutionConfig",
    "CampaignExplicitExperiment",
    "CampaignGridConfig",
    "CampaignHealthCheckConfig",
    "CampaignIOConfig",
    "CampaignNotificationConfig",
    "CampaignScheduleConfig",
    "generate_campaign_id",
    "slug_of",
    "with_campaign_defaults",
]

# The orders of experiments that `execution.structure` can ask for.
BALANCED, INTERLEAVED, SHUFFLED, GROUPED = STRUCTURES = ("balanced", "interleaved", "shuffled", "grouped")

_WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_GROUPS = {"weekdays": _WEEKDAYS[:5], "weekends": _WEEKDAYS[5:]}
_check_time = Matching(r"([01][0-9]|2[0-3]):[0-5][0-9]", "a time from 00:00 to 23:59")
_check_file_name = Matching(r"(?!\.\.?$)[^/]+", "a file name without a folder")

# Twelve days of measuring at 10 s each. A plan of this size takes 0.4 GB of memory; a few long axes exceed any limit.
MAX_EXPERIMENTS = 100_000


def _check_duration(text: str) -> str | None:
    try:
        units.parse_duration(text)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class CampaignGridConfig(Section):
    """Experiments as the product of axes: backends, models, shared options, and options of each backend."""

    backends: tuple[str, ...] = option(
        REQUIRED, "The backends to run.", choices=BACKENDS, min_items=1, is_unique=True, takes_scalar=True
    )
    models: tuple[Any, ...] | None = option(
        None, "The models to run; null takes the campaign's.", min_items=1, takes_scalar=True
    )
    shared: Mapping[str, Any] = option(
        {}, "Axes of all backends: dotted option names, each with a list of values.", dotted_after=0
    )
    backend_overrides: Mapping[str, Mapping[str, Any]] = option(
        {}, "Per backend, options of its section: a value, or a list of values as an axis.", dotted_after=1
    )

    @classmethod
    def elsewhere(cls, names: Sequence[str]) -> str | None:
        found = [_in_grid(name) for name in names if find_option(ExperimentConfig, name) is not None]
        return f"set {either(found)}" if found else None

    def derive(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        axes = given.get("shared", {}).items()
        return {"shared": {axis: value if isinstance(value, tuple) else Items((value,)) for axis, value in axes}}

    @classmethod
    def check_given(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        backends = given.get("backends", BACKENDS)
        for index, model in enumerate(given.get("models") or ()):
            for problem in check_partial(ExperimentConfig, {"model": model}):
                yield replace(problem, path=("models", index, *problem.path[1:]))
        for axis, values in given.get("shared", {}).items():
            yield from _check_shared_axis(backends, axis, values)
        for backend, overrides in given.get("backend_overrides", {}).items():
            yield from _check_overrides(backends, backend, overrides)

    def check(self) -> Iterator[Problem]:
        count = 0
        for backend in self.backends:
            axes = [*self.shared.values(), *self.backend_overrides.get(backend, {}).values()]
            count += math.prod(len(values) for values in (self.models or (None,), *axes) if isinstance(values, tuple))
        if count > MAX_EXPERIMENTS:
            remedy = "remove values or split the campaign"
            yield Problem((), f"makes {count:,} experiments; the limit is {MAX_EXPERIMENTS:,}; {remedy}")


def _check_shared_axis(backends: Sequence[str], axis: str, values: Any) -> Iterator[Problem]:
    path = ("shared", axis)
    top = axis.partition(".")[0]
    if axis in ("backend", "model", "model_name", "model.name"):
        proper = "grid.backends" if axis == "backend" else "grid.models"
        yield Problem(path, f"is not a shared axis; use {proper}", is_about_key=True)
    elif top in BACKENDS and set(backends) != {top}:
        remedy = f"move it to grid.backend_overrides.{top}"
        yield Problem(path, f"is an option of {top} only; {remedy}", is_about_key=True)
    else:
        yield from _check_axis(backends, axis, values, path)


def _in_grid(name: str) -> str:
    return f"grid.{'backend_overrides' if name.partition('.')[0] in BACKENDS else 'shared'}.{name}"


def _check_overrides(backends: Sequence[str], backend: str, overrides: Mapping[str, Any]) -> Iterator[Problem]:
    path = ("backend_overrides", backend)
    if backend not in backends:
        near = None if backend in BACKENDS else nearest(backend, backends)
        yield Problem(path, f"is not in grid.backends ({', '.join(backends)})", near, is_about_key=True)
        return
    for key, value in overrides.items():
        yield from _check_axis((backend,), f"{backend}.{key}", value, (*path, key))


def _check_axis(backends: Sequence[str], axis: str, given: Any, path: Location) -> Iterator[Problem]:
    if given == ():
        yield Problem(path, "has no values; add some or remove the axis")
    parts = axis.split(".")
    for index, value in enumerate(given if isinstance(given, tuple) else (given,)):
        at = (*path, index) if isinstance(given, tuple) else path
        for problem in check_partial(ExperimentConfig, nest(parts, value), chosen=backends):
            if problem.is_about_key and len(problem.path) <= len(parts):
                yield _unknown_axis(backends, parts, path, problem)
                return
            below = problem.path[len(parts) :]
            inner = functools.reduce(lambda node, part: node[part] if isinstance(node, dict) else node, below, value)
            remedy = f"; write it as an axis {dotted((path[-1], *below))}" if below and isinstance(inner, tuple) else ""
            yield replace(problem, path=(*at, *below), message=f"{problem.message}{remedy}")


def _unknown_axis(backends: Sequence[str], parts: Sequence[str], path: Location, problem: Problem) -> Problem:
    key = len(problem.path) - 1
    term = find_term(parts[key], parts[key - 1] if key else "") or Term()
    fitting = [name for name in term.options if name.partition(".")[0] in backends] or term.options
    names = [_in_grid(name) for name in fitting if find_option(ExperimentConfig, name) is not None]
    if names and (problem.suggestion is None or problem.suggestion.partition(".")[0] in BACKENDS):
        one = names[0] if len(names) == 1 else None
        return Problem(path, "unknown key" if one else f"unknown key; set {either(names)}", one, is_about_key=True)
    above = parts[len(parts) - len(str(path[-1]).split(".")) : key]  # of the name as it is written
    near = problem.suggestion and ".".join((*above, problem.suggestion))
    return replace(problem, path=path, suggestion=near)


@dataclass(frozen=True)
class CampaignExplicitExperiment(Section, alternative=ExperimentConfig):
    """One experiment: a file with overrides, or the experiment itself written in place."""

    config: str | None = option(None, "Experiment file, relative to the campaign file.")
    overrides: Mapping[str, Any] = option({}, "Options that override the file, nested or with dotted names.")
    inline: Mapping[str, Any] | None = option(
        None, "The experiment, if it has no file. The key `inline` may be omitted."
    )

    @classmethod
    def rewrite(cls, mapping: Mapping[Any, Any]) -> Mapping[Any, Any]:
        return mapping if not mapping or set(mapping) & set(declared(cls)) else {"inline": mapping}

    @classmethod
    def elsewhere(cls, names: Sequence[str]) -> str | None:
        found = [name for name in names if find_option(ExperimentConfig, name) is not None]
        return f"options that override the file belong under overrides: {either(found)}" if found else None

    @staticmethod
    def nest_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in overrides.items():
            out = put(ExperimentConfig, out, key, value)
        return out

    @classmethod
    def check_given(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        if given.get("inline") is not None:
            yield from check_partial(ExperimentConfig, given["inline"])
        for key, value in given.get("overrides", {}).items():
            for problem in check_partial(ExperimentConfig, nest(key, value)):
                yield replace(problem, path=("overrides", *problem.path))

    def check(self) -> Iterator[Problem]:
        if (self.config is None) == (self.inline is None):
            yield Problem((), "expected either a config file or the options of an experiment")
        if self.inline is not None and self.overrides:
            yield Problem(("overrides",), "has no effect without config", is_about_key=True)


def _time_limit(default_s: float, description: str) -> Any:
    return option(default_s, description, above=0, unit="s", is_dropped=True)


@dataclass(frozen=True)
class CampaignExecutionConfig(Section):
    """How often, in which order, and how long to wait."""

    cycles: int = option(3, "Runs of every experiment; intervals need at least 3.", min=1, max=20)
    structure: str = option(
        BALANCED,
        "Order: balanced ABC CBA BCA ACB; interleaved ABC ABC; shuffled within each cycle; grouped AAA BBB.",
        choices=STRUCTURES,
    )
    warmup_prompts: int = option(5, "Default of an experiment's warmup.min_prompts.", min=0, max=200, unit="prompts")
    warmup_timeout_seconds: float = option(
        30.0, "Default of an experiment's warmup.timeout_seconds.", min=0, unit="s", is_dropped=True
    )
    config_gap_seconds: float = option(
        60.0,
        "Longest wait between experiments; ends when the device is idle again.",
        min=0,
        max=units.LONGEST_S,
        unit="s",
    )
    cycle_gap_seconds: float = option(300.0, "Longest wait between cycles.", min=0, max=units.LONGEST_S, unit="s")
    load_timeout_seconds: float = _time_limit(1800.0, "Time limit for loading an engine.")
    experiment_timeout_seconds: float = _time_limit(3600.0, "Time limit for an experiment after loading.")
    silence_timeout_seconds: float = _time_limit(600.0, "Time limit without any sign of progress.")
    reuse: str = option(
        "cycle",
        "How long an engine stays loaded. cycle: cycles are independent; campaign: faster, but without intervals over "
        "cycles; none: every experiment loads.",
        choices=("cycle", "campaign", "none"),
    )
    seed: int = option(42, "Seed of the shuffled order.", min=0)


@dataclass(frozen=True)
class CampaignScheduleConfig(Section):
    """When to start."""

    at: str | None = option(None, "Time of day on the host.", check=_check_time, form="a time HH:MM")
    days: tuple[str, ...] | None = option(
        None, "Days; null is any.", choices=(*_WEEKDAYS, *_DAY_GROUPS), takes_scalar=True, min_items=1
    )

    def check(self) -> Iterator[Problem]:
        if self.at is None:
            yield Problem(("at",), "is required in a schedule: a time HH:MM", is_about_key=True)

    @property
    def weekdays(self) -> frozenset[int]:
        """The days as `datetime.weekday()` counts them, 0 for Monday; all of them when none is named."""
        names = {day for name in self.days or _WEEKDAYS for day in _DAY_GROUPS.get(name, (name,))}
        return frozenset(_WEEKDAYS.index(name) for name in names)


@dataclass(frozen=True)
class CampaignHealthCheckConfig(Section):
    """Checks of the containers between experiments."""

    enabled: bool = option(True, "Check the containers.")
    interval_experiments: int = option(0, "Experiments between checks; 0: once per cycle.", min=0, unit="experiments")
    gpu_memory_threshold_pct: float = option(
        90.0, "GPU memory used by others that is unhealthy.", min=50, max=100, unit="%"
    )
    restart_on_failure: bool = option(True, "Restart an unhealthy container; false only logs it.")
    max_restarts: int = option(3, "Restarts of a container per campaign, at most.", min=0)


@dataclass(frozen=True)
class CampaignColdStartConfig(Section):
    """A cold start for every experiment."""

    force_cold_start: bool = option(False, "End the worker after each experiment.")
    restart_container: bool = option(False, "Recreate the container too.")


@dataclass(frozen=True)
class CampaignDaemonConfig(Section, switch="enabled"):
    """Repeated runs."""

    enabled: bool = option(False, "Repeat the campaign.")
    at: str | None = option(None, "Time of day of the first run.", check=_check_time, form="a time HH:MM")
    interval: str | None = option(
        None, "Time from the end of a run to the next: 90s, 30m, 6h, 2d.", check=_check_duration, form="a duration"
    )
    total_duration: str | None = option(None, "Stop after this long.", check=_check_duration, form="a duration")
    quiet: bool = option(True, "Log to a file in the state folder, not to the screen.")

    @property
    def interval_seconds(self) -> float | None:
        return None if self.interval is None else units.parse_duration(self.interval)

    @property
    def total_duration_seconds(self) -> float | None:
        return None if self.total_duration is None else units.parse_duration(self.total_duration)


@dataclass(frozen=True)
class CampaignIOConfig(Section):
    """Files and folders, relative to the working directory."""

    results_dir: str = option("results", "Folder of results.")
    configs_dir: str = option("configs", "Folder of the experiments that a grid generates.")
    state_dir: str = option(".state", "Folder of the manifest and the log.")
    manifest_filename: str = option(
        MANIFEST_FILENAME, "Name of the manifest.", check=_check_file_name, form="a file name"
    )
    compose_file: tuple[str, ...] | None = option(
        None, "Compose files, later ones override earlier ones; null takes those of docker compose.", takes_scalar=True
    )
    env_file: str | None = option(None, "File of environment variables for compose.")

    @property
    def manifest_path(self) -> Path:
        """The manifest in the state folder; a run puts the campaign's own folder between the two."""
        return Path(self.state_dir) / self.manifest_filename


@dataclass(frozen=True)
class CampaignNotificationConfig(Section):
    """Messages when a campaign ends."""

    webhook_url: str | None = option(None, "Where to post JSON.", check=check_url, form="a URL", secret=True)
    on: tuple[str, ...] = option(
        ("complete", "failure"), "When to post.", choices=("complete", "failure"), takes_scalar=True
    )


@dataclass(frozen=True)
class CampaignConfig(Section, aliases={"model_name": "model", "sample_size": "num_samples"}):
    """A campaign, validated and with every default filled in."""

    campaign_name: str = option(REQUIRED, "Name of the campaign; file and unit names derive from it.")
    model: ModelConfig | None = option(None, "Model of experiments without one.")
    dataset: DatasetConfig | None = option(None, "Dataset of experiments without prompts.")
    num_samples: int | None = option(None, "Prompts of experiments without a sample_size.", min=1, unit="prompts")
    configs: tuple[str, ...] = option((), "Experiment files, relative to the campaign file.", takes_scalar=True)
    grid: CampaignGridConfig | None = option(None, "Experiments as the product of axes.")
    experiments: tuple[CampaignExplicitExperiment, ...] = option((), "Experiments one by one.")
    execution: CampaignExecutionConfig = option(CampaignExecutionConfig(), "How often and in which order.")
    schedule: CampaignScheduleConfig | None = option(None, "When to start.")
    health_check: CampaignHealthCheckConfig = option(CampaignHealthCheckConfig(), "Checks of containers.")
    cold_start: CampaignColdStartConfig = option(CampaignColdStartConfig(), "Cold starts.")
    daemon: CampaignDaemonConfig | None = option(None, "Repeated runs.")
    io: CampaignIOConfig = option(CampaignIOConfig(), "Files and folders.")
    notification: CampaignNotificationConfig = option(CampaignNotificationConfig(), "Messages at the end.")

    def without_effect(self) -> Iterator[Problem]:
        """Options that are set and change nothing."""
        execution, health = self.execution, self.health_check
        if execution.structure != SHUFFLED and "seed" in execution.changed():
            yield Problem.of("execution.seed", "unused_with", setting=f"structure: {execution.structure}")
        if not health.restart_on_failure and "max_restarts" in health.changed():
            yield Problem.of("health_check.max_restarts", "unused_with", setting="restart_on_failure: false")
        if self.notification.webhook_url is None and "on" in self.notification.changed():
            yield Problem.of("notification.on", "unused_with", setting="webhook_url: null")

    @classmethod
    def elsewhere(cls, names: Sequence[str]) -> str | None:
        found = CampaignGridConfig.elsewhere(names)
        return f"it is an option of experiments; in a grid, {found}" if found else None

    def check(self) -> Iterator[Problem]:
        if not self.configs and self.grid is None and not self.experiments:
            yield Problem((), "nothing to run: set at least one of configs, grid, experiments")

    generate_campaign_id = staticmethod(generate_campaign_id)

    @property
    def campaign_id(self) -> str:
        return generate_campaign_id(self.campaign_name)

    @property
    def slug(self) -> str:
        return slug_of(self.campaign_name)

    def get_config_paths(self) -> list[Path]:
        """The experiment files as written, those of `configs` first."""
        return [Path(name) for name in (*self.configs, *(entry.config for entry in self.experiments if entry.config))]

    def get_config_names(self) -> list[str]:
        """The names of the experiment files, without folder and ending."""
        return [path.stem for path in self.get_config_paths()]


_DEFAULTS_OF = {  # options of a campaign, and those of an experiment that they are defaults of
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
        forced: options of the campaign by dotted name, given on the command line: they win over the experiment's own.
    """
    return fill_defaults(campaign, without_forced(experiment, forced))


# The options of an experiment that the next two functions depend on.
WITH_DEFAULTS = ("model", "dataset", "prompts", "warmup", "max_input_tokens")


def without_forced(experiment: Mapping[str, Any], forced: Collection[str]) -> dict[str, Any]:
    out = canonical(ExperimentConfig, experiment)
    for key, options in _DEFAULTS_OF.items():
        if any(name == key or name.startswith(f"{key}.") for name in forced):
            for section, _, option in (name.partition(".") for name in options):
                holder = out.get(section) if option else out
                if isinstance(holder, dict):
                    holder.pop(option or section, None)
    return out


def fill_defaults(campaign: CampaignConfig, experiment: Mapping[str, Any]) -> dict[str, Any]:
    out = canonical(ExperimentConfig, experiment)
    if campaign.model is not None:
        _fill_named(out, "model", campaign.model)
    if campaign.dataset is not None and out.get("prompts") is None:
        _fill_named(out, "dataset", campaign.dataset)
    if campaign.num_samples is not None:
        out = with_sample_size(out, campaign.num_samples)
    warmup = out["warmup"] = {} if out.get("warmup") is None else out["warmup"]
    if isinstance(warmup, dict):  # else for validation to refuse
        prompts = campaign.execution.warmup_prompts
        is_own = "min_prompts" in warmup
        warmup.setdefault("min_prompts", prompts)
        if not is_own and prompts > declared(WarmupConfig)["max_prompts"].default:
            warmup.setdefault("max_prompts", prompts)
        warmup.setdefault("timeout_seconds", campaign.execution.warmup_timeout_seconds)
    return out


def _fill_named(out: dict[str, Any], key: str, default: Section) -> None:
    own = {} if out.get(key) is None and key == "model" else out.get(key, {})
    if isinstance(own, dict) and "name" not in own:  # options that belong to another name are not mixed in
        out[key] = {**default.changed(), **own}


def with_sample_size(experiment: Mapping[str, Any], num_samples: int) -> dict[str, Any]:
    """The experiment with that many prompts where it does not say how many."""
    out = dict(experiment)
    for key in ("dataset", "prompts"):
        if isinstance(out.get(key), dict):
            out[key] = {**out[key], "sample_size": out[key].get("sample_size", num_samples)}
    if out.get("dataset") is None and out.get("prompts") is None:
        longest = out.get("max_input_tokens")
        is_shorter = isinstance(longest, int) and 0 < longest < BUNDLED_INPUT_TOKENS
        out["prompts"] = {
            "type": "synthetic",
            "input_tokens": longest if is_shorter else BUNDLED_INPUT_TOKENS,
            "sample_size": num_samples,
            "distribution": BUNDLED_DISTRIBUTION,
        }
    return out
