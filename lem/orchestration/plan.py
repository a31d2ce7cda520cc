"""The plan of a campaign: its experiments in order, and the configuration files written from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lem.base import durable
from lem.base.durable import SHUFFLED, json_text, make_folder
from lem.base.errors import ConfigurationError, UserError
from lem.base.reasons import Reason
from lem.config.campaign_config import CampaignConfig, CampaignExecutionConfig
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import Expanded, as_written, restore_references, simple
from lem.config.load import ListedExperiment, Source, with_campaign_defaults
from lem.config.option import canonical
from lem.config.problems import Problem
from lem.config.rules import Gpu
from lem.config.yamlfile import FileProblems
from lem.orchestration.grid import GridValidationIssue, count_reasons, expand_campaign_grid, validate_named
from lem.orchestration.manifest import CampaignManifestEntry
from lem.orchestration.names import (
    PromptResolver,
    campaign_config_hash,
    config_hash,
    distinct_names,
    experiment_id,
    file_stem,
    name_configurations,
    prompts_fingerprint,
)
from lem.orchestration.order import (
    ExpectedTime,
    GapKind,
    Prices,
    expected_time,
    gaps_before,
    loads_engine,
    order_experiments,
)
from lem.worker.prompts import resolve_on_host


@dataclass(frozen=True)
class CampaignExperiment:
    """One configuration in one cycle.

    Attributes:
        exp_id: unique in the plan.
        config_dict: the configuration as given, the campaign's values filled in; text may remember its `${VAR}`.
        config_path: its file; for a generated one where `generated.write_configs` writes it.
        is_generated: it comes from a grid or was written in the campaign, so it has no file of its own.
        cycle_index: from 0.
        order_index: its place in the plan, from 0.
        container: the service it runs in; None outside containers.
    """

    exp_id: str
    config_name: str
    config: ExperimentConfig
    config_dict: Mapping[str, Any]
    config_path: str
    config_hash: str
    engine_key: str
    cycle_index: int
    order_index: int
    is_generated: bool = False
    container: str | None = None
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
        resolved: dict[str, Any] = restore_references(self.config.to_dict(), given)
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
class Plan:
    """The experiments of a campaign in the order to run, and what became of the others.

    Questions about time and loads take a part of the plan, such as what a resume leaves; all of it when not given.

    Attributes:
        total_generated: configurations before validation; cycles do not count.
        filtered: an error for each configuration left out.
        warnings: about those that are in; several may be about one.
        config_hash: of the campaign (`identity.campaign_config_hash`).
        given: the configurations that run, in the order they were given, of which every cycle's order is made.
    """

    experiments: tuple[CampaignExperiment, ...]
    total_generated: int
    filtered: tuple[GridValidationIssue, ...]
    warnings: tuple[GridValidationIssue, ...]
    execution: CampaignExecutionConfig
    is_cold: bool
    config_hash: str
    given: tuple[_Configuration, ...] = ()

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
        """Whether each experiment loads an engine; the sum is what a run will cost."""
        return loads_engine(self._part(part), reuse=self.execution.reuse, is_cold=self.is_cold)

    def gap_kinds(self, part: Sequence[CampaignExperiment] | None = None) -> list[GapKind | None]:
        """The gap before each experiment; None before the first."""
        return gaps_before(self._part(part), self.execution.structure)

    def gap_cap_s(self, kind: GapKind | None) -> float:
        """The most seconds a gap takes."""
        if kind is None:
            return 0.0
        return self.execution.cycle_gap_seconds if kind == "cycle" else self.execution.config_gap_seconds

    def expected_time(self, prices: Prices, part: Sequence[CampaignExperiment] | None = None) -> ExpectedTime:
        """The time it will take, from earlier experiments; as `order.expected_time`."""
        caps_s = map(self.gap_cap_s, self.gap_kinds(part))
        return expected_time(
            self._part(part),
            loads=self.loads(part),
            gaps_s=sum(cap_s if prices.gap_s is None else min(cap_s, prices.gap_s) for cap_s in caps_s),
            prices=prices,
        )

    def _part(self, part: Sequence[CampaignExperiment] | None) -> Sequence[CampaignExperiment]:
        return self.experiments if part is None else part


def build_plan(
    campaign: CampaignConfig,
    drafts: Sequence[ListedExperiment] = (),
    *,
    preset: Mapping[str, Any] | None = None,
    forced: Collection[str] = (),
    source: Source | None = None,
    resolve_prompts: PromptResolver = resolve_on_host,
    gpus: Sequence[Gpu] | None = None,
) -> Plan:
    """The plan of a campaign: the experiments it names and those of its grid, validated, in every cycle.

    Args:
        drafts, preset, forced: as `load.load_campaign` gives them: the experiments of `configs` and `experiments`,
            the values a grid starts from, and the campaign's options that win over the experiments' own.
        source: the campaign's, so that what is wrong with prompts of its grid is said in its place.
        resolve_prompts: called once for each different source of prompts.
        gpus: of the host that will run it, for warnings; None when unknown.

    Raises:
        ConfigurationError: prompts that cannot be used.
    """
    candidates = _collect(campaign, drafts, preset or {}, forced, source)
    validation = validate_named([(item.name, item.config_dict) for item in candidates], gpus)
    configurations, repeated = _identify(candidates, validation.configs, resolve_prompts)
    execution = campaign.execution
    return Plan(
        experiments=_in_order(configurations, execution),
        total_generated=len(candidates),
        filtered=validation.filtered,
        warnings=(*validation.warnings, *repeated),
        execution=execution,
        is_cold=campaign.cold_start.force_cold_start or campaign.cold_start.restart_container,
        config_hash=campaign_config_hash(campaign, [item.config_hash for item in configurations]),
        given=tuple(configurations),
    )


def prolong_plan(plan: Plan, campaign: CampaignConfig) -> Plan:
    """The plan of the same configurations in as many cycles as the campaign now has.

    An interleaved or shuffled plan keeps the experiments it has, each at its place: cycles are added at the end.

    Args:
        campaign: that of the plan, with other `execution.cycles`.
    """
    return replace(
        plan,
        experiments=_in_order(plan.given, campaign.execution),
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


@dataclass(frozen=True)
class _Configuration:
    """A configuration that runs."""

    candidate: _Candidate
    config: ExperimentConfig
    config_hash: str
    engine_key: str


def _collect(
    campaign: CampaignConfig,
    drafts: Sequence[ListedExperiment],
    preset: Mapping[str, Any],
    forced: Collection[str],
    source: Source | None,
) -> list[_Candidate]:
    """The experiments named, then those of the grid, each with a name and a path of its own."""
    expanded = [] if campaign.grid is None else expand_campaign_grid(campaign.grid, preset)
    unnamed = iter(name_configurations([draft.mapping for draft in drafts if draft.name is None]))
    of_grid = [with_campaign_defaults(campaign, item, forced) for item in expanded]
    names = [draft.name or next(unnamed) for draft in drafts] + name_configurations(of_grid)
    config_dicts = [*(dict(draft.mapping) for draft in drafts), *of_grid]
    names = distinct_names(names, config_dicts)
    folder = Path(campaign.io.configs_dir) / campaign.slug
    stems = distinct_names([file_stem(name) for name in names], config_dicts)
    origins = [*((draft.path, draft.source, False) for draft in drafts), *[(None, source, True)] * len(of_grid)]
    return [
        _Candidate(name, config_dict, str(file or folder / f"{stem}.yaml"), file is None, origin, is_of_grid)
        for name, config_dict, stem, (file, origin, is_of_grid) in zip(names, config_dicts, stems, origins, strict=True)
    ]


def _identify(
    candidates: Sequence[_Candidate], configs: Sequence[ExperimentConfig | None], resolve_prompts: PromptResolver
) -> tuple[list[_Configuration], list[GridValidationIssue]]:
    """The valid configurations with their hashes, each once, and a warning for each one that was there already."""
    prompts: dict[Any, dict[str, Any]] = {}
    found: dict[str, _Configuration] = {}
    repeated = []
    for candidate, config in zip(candidates, configs, strict=True):
        if config is None:
            continue
        source = (config.dataset, config.prompts)
        if source not in prompts:
            try:
                prompts[source] = prompts_fingerprint(config, resolve_prompts)
            except ConfigurationError as error:
                raise candidate.located(error) from error
        digest = config_hash(config, prompts[source])
        if digest in found:
            same = Reason.of("repeated_experiment", name=found[digest].candidate.name)
            repeated.append(GridValidationIssue.of(candidate.name, same, severity="warning"))
        else:
            found[digest] = _Configuration(candidate, config, digest, config.engine_key())
    return list(found.values()), repeated


def _in_order(
    configurations: Sequence[_Configuration], execution: CampaignExecutionConfig
) -> tuple[CampaignExperiment, ...]:
    ordered = order_experiments(
        configurations,
        engine_key=lambda item: item.engine_key,
        cycles=execution.cycles,
        structure=execution.structure,
        seed=execution.seed,
    )
    return tuple(_place(item, cycle, index) for index, (item, cycle) in enumerate(ordered))


def _place(item: _Configuration, cycle: int, index: int) -> CampaignExperiment:
    return CampaignExperiment(
        exp_id=experiment_id(item.config_hash, cycle),
        config_name=item.candidate.name,
        config=item.config,
        config_dict=item.candidate.config_dict,
        config_path=item.candidate.path,
        config_hash=item.config_hash,
        engine_key=item.engine_key,
        cycle_index=cycle,
        order_index=index,
        is_generated=item.candidate.is_generated,
    )


def write_configs(configurations: Iterable[CampaignExperiment]) -> int:
    """How many files were written; one that is there already and says the same is left alone.

    Args:
        configurations: as `Plan.configurations`; those with a file of their own are passed over.

    Raises:
        UserError: the folder is not writable or full.
    """
    written = 0
    for item in configurations:
        if item.is_generated:
            path = Path(item.config_path)
            content = encode_config({**item.config_dict, "config_name": item.config_name})
            try:
                written += _write(path, content)
            except OSError as error:
                raise UserError(
                    f"cannot write {path}: {error.strerror}", "make the folder writable, or set io.configs_dir"
                ) from error
    return written


def encode_config(config_dict: Mapping[str, Any]) -> str:
    """The configuration as JSON, which is YAML too; `${VAR}` as it was written, so that no secret lands in a file."""
    return json_text(_as_yaml(config_dict))


def _write(path: Path, content: str) -> bool:
    data = durable.utf8(content)
    try:
        if path.read_bytes() == data:
            return False
    except FileNotFoundError:
        make_folder(path.parent)
    # What a power cut spoils is another file the next time, and written anew; syncing 10,000 took 12 s.
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
