"""The plan of a campaign: its experiments in the order they run, the gaps and loads that follow, and its files."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lem.base import durable
from lem.base.durable import GROUPED, INTERLEAVED, SHUFFLED
from lem.base.errors import ConfigurationError, UserError
from lem.base.reasons import Reason
from lem.config.campaign_config import CampaignConfig, CampaignExecutionConfig, with_campaign_defaults
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import Expanded, Problem, as_written, simple
from lem.config.load import ListedExperiment, Source
from lem.config.option import canonical
from lem.config.rules import Gpu
from lem.config.yamlfile import FileProblems
from lem.orchestration.grid import GridValidationIssue, count_reasons, expand_campaign_grid, validate_named
from lem.orchestration.manifest import CampaignManifestEntry
from lem.orchestration.names import (
    campaign_config_hash,
    config_hash,
    distinct_names,
    experiment_id,
    file_stem,
    name_configurations,
    prompts_fingerprint,
)

GapKind = Literal["configuration", "cycle"]


@dataclass(frozen=True)
class CampaignExperiment:
    """One configuration in one cycle."""

    exp_id: str  # unique in the plan
    config_name: str
    config: ExperimentConfig
    config_dict: Mapping[str, Any]  # as given, the campaign's values filled in; text may remember its `${VAR}`
    config_path: str  # its file; for a generated one where `write_configs` writes it
    config_hash: str
    engine_key: str
    cycle_index: int  # from 0
    order_index: int  # its place in the plan, from 0
    is_generated: bool = False  # from a grid or written in the campaign, so without a file of its own
    container: str | None = None  # the service it runs in; None outside containers
    manifest_entry: CampaignManifestEntry | None = None

    @property
    def backend(self) -> str:
        """The engine."""
        return self.config.backend

    @property
    def requested(self) -> dict[str, Any]:
        """The configuration as it was written, `${VAR}` unexpanded, for records."""
        written: dict[str, Any] = as_written(self.config_dict)
        return written

    @property
    def resolved(self) -> dict[str, Any]:
        """The configuration with every default and its name in this campaign, `${VAR}` unexpanded, for records."""
        given = canonical(ExperimentConfig, self.config_dict)
        resolved: dict[str, Any] = as_written(self.config.to_dict(), given)
        return resolved if resolved["config_name"] else {**resolved, "config_name": self.config_name}

    def new_entry(self) -> CampaignManifestEntry:
        """A pending entry of a manifest."""
        return CampaignManifestEntry(
            exp_id=self.exp_id,
            config_name=self.config_name,
            config_path=self.config_path,
            config_hash=self.config_hash,
            backend=self.backend,
            container=self.container,
            cycle_index=self.cycle_index,
            order_index=self.order_index,
        )


@dataclass(frozen=True)
class ExpectedDurations:
    """What earlier experiments took, in seconds."""

    measured_by_config: Mapping[str, float] = field(default_factory=dict)  # an experiment without its load
    load_by_engine: Mapping[str, float] = field(default_factory=dict)  # by engine_key
    gap_s: float | None = None  # a gap, which may end early; None where none was kept: then each takes its cap


@dataclass(frozen=True)
class ExpectedTime:
    """How long experiments will take, in seconds; None where no earlier result is known."""

    measured_s: float | None
    loading_s: float | None
    gaps_s: float  # all gaps
    is_complete: bool  # every experiment's own time is known, not estimated from others

    @property
    def total_s(self) -> float | None:
        """All of it; None when a part is not known."""
        if self.measured_s is None or self.loading_s is None:
            return None
        return self.measured_s + self.loading_s + self.gaps_s


@dataclass(frozen=True)
class Plan:
    """The experiments of a campaign in the order to run, and what became of the others.

    Questions about time and loads take a part of the plan, such as what a resume leaves; all of it when not given.
    """

    experiments: tuple[CampaignExperiment, ...]
    total_generated: int  # configurations before validation; cycles do not count
    filtered: tuple[GridValidationIssue, ...]  # an error for each configuration left out
    warnings: tuple[GridValidationIssue, ...]  # about those that are in; several may be about one
    execution: CampaignExecutionConfig
    is_cold: bool
    config_hash: str  # of the campaign (`names.campaign_config_hash`)
    given: tuple[CampaignExperiment, ...] = ()  # one for each configuration, in the order given

    @property
    def shuffle_seed(self) -> int | None:
        """The seed of the order; None where nothing is shuffled."""
        return self.execution.seed if self.execution.structure == SHUFFLED else None

    @property
    def configurations(self) -> tuple[CampaignExperiment, ...]:
        """One experiment for each configuration, in the order they first run."""
        return tuple({item.config_hash: item for item in reversed(self.experiments)}.values())[::-1]

    @property
    def summary(self) -> str:
        """`Generated N experiments (M filtered, W warnings)`, before cycles."""
        return (
            f"Generated {self.total_generated} experiments "
            f"({len(self.filtered)} filtered, {len(self.warnings)} warnings)"
        )

    @property
    def filtered_by_reason(self) -> list[tuple[str, int]]:
        """How many configurations were left out for each reason, the most frequent first."""
        return count_reasons(self.filtered)

    @property
    def warnings_by_reason(self) -> list[tuple[str, int]]:
        """How many configurations each warning is about, the most frequent first."""
        return count_reasons(self.warnings)

    def loads(self, part: Sequence[CampaignExperiment] | None = None) -> list[bool]:
        """Whether each experiment loads an engine."""
        return loads_engine(self._part(part), reuse=self.execution.reuse, is_cold=self.is_cold)

    def gap_kinds(self, part: Sequence[CampaignExperiment] | None = None) -> list[GapKind | None]:
        """The gap before each experiment; None before the first."""
        return gaps_before(self._part(part), self.execution.structure)

    def gap_cap_s(self, kind: GapKind | None) -> float:
        """The most seconds a gap takes."""
        if kind is None:
            return 0.0
        return self.execution.cycle_gap_seconds if kind == "cycle" else self.execution.config_gap_seconds

    def expected_time(self, known: ExpectedDurations, part: Sequence[CampaignExperiment] | None = None) -> ExpectedTime:
        """The time it will take, from earlier experiments.

        For a configuration or an engine that was never run, the mean of those that were is assumed.
        """
        items = self._part(part)
        loading = [item for item, is_load in zip(items, self.loads(part), strict=True) if is_load]
        caps_s = map(self.gap_cap_s, self.gap_kinds(part))
        return ExpectedTime(
            measured_s=_sum_known([item.config_hash for item in items], known.measured_by_config),
            loading_s=_sum_known([item.engine_key for item in loading], known.load_by_engine),
            gaps_s=sum(cap_s if known.gap_s is None else min(cap_s, known.gap_s) for cap_s in caps_s),
            is_complete=all(item.config_hash in known.measured_by_config for item in items)
            and all(item.engine_key in known.load_by_engine for item in loading),
        )

    def _part(self, part: Sequence[CampaignExperiment] | None) -> Sequence[CampaignExperiment]:
        return self.experiments if part is None else part


def _sum_known(names: Sequence[str], known: Mapping[str, float]) -> float | None:
    if not names:
        return 0.0
    if not known:
        return None
    mean = sum(known.values()) / len(known)
    return sum(known.get(name, mean) for name in names)


def build_plan(
    campaign: CampaignConfig,
    listed: Sequence[ListedExperiment] = (),
    *,
    preset: Mapping[str, Any] | None = None,
    source: Source | None = None,
    gpus: Sequence[Gpu] | None = None,
) -> Plan:
    """The plan of a campaign: the experiments it names and those of its grid, validated, in every cycle.

    Args:
        listed, preset: as `load.load_campaign` gives them: the experiments of `configs` and `experiments`, and the
            values that a grid starts from.
        source: the campaign's, for its options that win over the experiments' own, and to locate problems.
        gpus: of the host that will run it, for warnings; None when unknown.

    Raises:
        ConfigurationError: prompts that cannot be used.
    """
    candidates = _collect(campaign, listed, preset or {}, source)
    configs, filtered, warnings = validate_named([(item.name, item.config_dict) for item in candidates], gpus)
    given, repeated = _identify(candidates, configs)
    return Plan(
        experiments=order_experiments(given, campaign.execution),
        total_generated=len(candidates),
        filtered=filtered,
        warnings=(*warnings, *repeated),
        execution=campaign.execution,
        is_cold=campaign.cold_start.force_cold_start or campaign.cold_start.restart_container,
        config_hash=campaign_config_hash(campaign, [item.config_hash for item in given]),
        given=tuple(given),
    )


def prolong_plan(plan: Plan, campaign: CampaignConfig) -> Plan:
    """The plan of the same configurations in the campaign's cycles, which are others than the plan's.

    An interleaved or shuffled plan keeps the experiments it has, each at its place: cycles are added at the end.
    """
    return replace(
        plan,
        experiments=order_experiments(plan.given, campaign.execution),
        execution=campaign.execution,
        config_hash=campaign_config_hash(campaign, [item.config_hash for item in plan.given]),
    )


@dataclass(frozen=True)
class _Candidate:
    """A configuration before validation."""

    name: str
    config_dict: dict[str, Any]
    path: str
    is_generated: bool
    source: Source | None
    is_of_grid: bool

    def located(self, error: ConfigurationError) -> ConfigurationError:
        """An error of the prompts with the place where they are named, as far as it is known."""
        if self.source is None:
            return error
        where = ("grid", "shared", "prompts", "path") if self.is_of_grid else ("prompts", "path")
        return FileProblems(self.source.locate([Problem(where, error.message)]), error.hint)

    def identified(self, config: ExperimentConfig, digest: str) -> CampaignExperiment:
        """Its experiment in the first cycle."""
        return CampaignExperiment(
            exp_id=experiment_id(digest, 0),
            config_name=self.name,
            config=config,
            config_dict=self.config_dict,
            config_path=self.path,
            config_hash=digest,
            engine_key=config.engine_key(),
            cycle_index=0,
            order_index=0,
            is_generated=self.is_generated,
        )


def _collect(
    campaign: CampaignConfig,
    listed: Sequence[ListedExperiment],
    preset: Mapping[str, Any],
    source: Source | None,
) -> list[_Candidate]:
    """The experiments named, then those of the grid, each with a name and a path of its own."""
    expanded = [] if campaign.grid is None else expand_campaign_grid(campaign.grid, preset)
    unnamed = iter(name_configurations([one.mapping for one in listed if one.name is None]))
    forced = source.forced if source is not None else ()
    of_grid = [with_campaign_defaults(campaign, item, forced) for item in expanded]
    names = [one.name or next(unnamed) for one in listed] + name_configurations(of_grid)
    config_dicts = [*(dict(one.mapping) for one in listed), *of_grid]
    names = distinct_names(names, config_dicts)
    folder = Path(campaign.io.configs_dir) / campaign.slug
    stems = distinct_names([file_stem(name) for name in names], config_dicts)
    origins = [*((one.path, one.source, False) for one in listed), *[(None, source, True)] * len(of_grid)]
    return [
        _Candidate(name, config_dict, str(file or folder / f"{stem}.yaml"), file is None, origin, is_of_grid)
        for name, config_dict, stem, (file, origin, is_of_grid) in zip(names, config_dicts, stems, origins, strict=True)
    ]


def _identify(
    candidates: Sequence[_Candidate], configs: Sequence[ExperimentConfig | None]
) -> tuple[list[CampaignExperiment], list[GridValidationIssue]]:
    """The valid configurations, each once, and a warning for each repetition of one."""
    prompts: dict[Any, dict[str, Any]] = {}
    found: dict[str, CampaignExperiment] = {}
    repeated = []
    for candidate, config in zip(candidates, configs, strict=True):
        if config is None:
            continue
        source = (config.dataset, config.prompts)
        if source not in prompts:
            try:
                prompts[source] = prompts_fingerprint(config)
            except ConfigurationError as error:
                raise candidate.located(error) from error
        digest = config_hash(config, prompts[source])
        if digest in found:
            same = Reason.of("repeated_experiment", name=found[digest].config_name)
            repeated.append(GridValidationIssue.of(candidate.name, same, severity="warning"))
        else:
            found[digest] = candidate.identified(config, digest)
    return list(found.values()), repeated


def order_experiments(
    given: Sequence[CampaignExperiment], execution: CampaignExecutionConfig
) -> tuple[CampaignExperiment, ...]:
    """Every configuration in every cycle, in the order to run.

    `interleaved` is ABC ABC, `grouped` AAA BBB, `shuffled` another order in every cycle. Within a cycle equal engine
    keys are adjacent, the first of them where it was given, since each cycle loads an engine once. A cycle's shuffle
    depends on the seed and the cycle alone, so a campaign prolonged by a cycle keeps the order of the others.
    """
    cycles = range(execution.cycles)
    groups: dict[str, list[CampaignExperiment]] = {}
    for item in given:
        groups.setdefault(item.engine_key, []).append(item)
    if execution.structure == GROUPED:
        ordered = [(item, cycle) for item in given for cycle in cycles]
    elif execution.structure == INTERLEAVED:
        ordered = [(item, cycle) for cycle in cycles for group in groups.values() for item in group]
    else:
        ordered = [(item, cycle) for cycle in cycles for item in _shuffle(list(groups.values()), execution.seed, cycle)]
    return tuple(
        replace(item, exp_id=experiment_id(item.config_hash, cycle), cycle_index=cycle, order_index=index)
        for index, (item, cycle) in enumerate(ordered)
    )


def _shuffle(groups: Sequence[Sequence[CampaignExperiment]], seed: int, cycle: int) -> list[CampaignExperiment]:
    """Engines in another order, and the configurations of each; one engine's stay together."""
    # Seeding with text hashes it with SHA-512, the same on every Python and machine.
    rng = random.Random(f"{seed}/{cycle}")
    shuffled = [rng.sample(group, len(group)) for group in groups]
    rng.shuffle(shuffled)
    return [item for group in shuffled for item in group]


def gaps_before(experiments: Sequence[CampaignExperiment], structure: str) -> list[GapKind | None]:
    """The gap before each experiment; None before the first.

    A cycle, or in a grouped campaign the block of one configuration, ends when its last experiment in `experiments`
    ends, so a resumed part of a plan has its gaps in the right places too. The cycle gap then replaces the
    configuration gap.
    """
    blocks = [item.config_hash if structure == GROUPED else item.cycle_index for item in experiments]
    kinds: list[GapKind | None] = [
        "configuration" if one == two else "cycle" for one, two in itertools.pairwise(blocks)
    ]
    return [None, *kinds] if experiments else []


def loads_engine(experiments: Sequence[CampaignExperiment], *, reuse: str, is_cold: bool = False) -> list[bool]:
    """Whether each experiment loads an engine rather than reuse that of the one before.

    One engine is resident at a time. With `reuse: cycle` it is kept for the next experiment of the same cycle and
    engine key, with `campaign` also across cycles, with `none` and under a forced cold start never.
    """
    if reuse == "none" or is_cold:
        return [True] * len(experiments)
    engines = [(item.engine_key, item.cycle_index if reuse == "cycle" else 0) for item in experiments]
    return [True, *(one != two for one, two in itertools.pairwise(engines))] if experiments else []


def write_configs(configurations: Iterable[CampaignExperiment]) -> int:
    """Write the generated configurations of `Plan.configurations`; the number of files that were new or changed.

    Raises:
        UserError: the folder is not writable or full.
    """
    written = 0
    for item in configurations:
        if item.is_generated:
            path = Path(item.config_path)
            content = encode_config({**item.config_dict, "config_name": item.config_name})
            try:
                written += _write(path, durable.utf8(content))
            except OSError as error:
                raise UserError(
                    f"cannot write {path}: {error.strerror}", "make the folder writable, or set io.configs_dir"
                ) from error
    return written


def encode_config(config_dict: Mapping[str, Any]) -> str:
    """The configuration as JSON, which is YAML too; `${VAR}` as it was written, so that no secret lands in a file."""
    return durable.json_text(_as_yaml(config_dict))


def _write(path: Path, data: bytes) -> bool:
    try:
        if path.read_bytes() == data:
            return False
    except FileNotFoundError:
        durable.make_folder(path.parent)
    # A file that a power cut spoils differs the next time and is written again; syncing 10,000 took 12 s.
    durable.write_bytes(path, data, is_synced=False)
    return True


def _as_yaml(value: Any) -> Any:
    """The value so that reading it gives the same again."""
    if isinstance(value, Mapping):
        return {key: _as_yaml(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_yaml(item) for item in value]
    if isinstance(value, Expanded):
        # In quotes a reference is text; one that stood for a number or a truth value is written as that.
        plain = simple(value)
        return value.written if isinstance(plain, str) else plain
    return value.replace("${", "$${") if isinstance(value, str) else value
