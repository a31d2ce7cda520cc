"""The plan of a campaign: its experiments in the order they run, the gaps and loads that follow, and its files."""

from __future__ import annotations

import gc
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lem.base import durable
from lem.base.dataclass import dataclass, field, replace
from lem.base.errors import ConfigurationError, UserError
from lem.base.reasons import Reason
from lem.base.variables import TOKEN_VARIABLE
from lem.config import rules
from lem.config.backends import ServerConfig
from lem.config.campaign_config import (
    BALANCED,
    GROUPED,
    INTERLEAVED,
    SHUFFLED,
    WITH_DEFAULTS,
    CampaignConfig,
    CampaignExecutionConfig,
    fill_defaults,
    with_sample_size,
    without_forced,
)
from lem.config.experiment import NO_TEMPLATE, OWN_TEMPLATE, ExperimentConfig
from lem.config.kinds import KnownValues, Problem, as_written
from lem.config.load import ListedExperiment, Loaded, Source, encode_config
from lem.config.option import Memo, canonical, joined_texts
from lem.config.rules import Gpu
from lem.config.sections import FilePrompts
from lem.config.yamlfile import FileProblems
from lem.orchestration import grid
from lem.orchestration.grid import GridValidationIssue, cycle_order, experiment_id
from lem.record import RATES
from lem.results.configurations import ListedConfiguration
from lem.worker.prompts import BUNDLED, resolve_on_host

GapKind = Literal["configuration", "cycle"]
# Begins the place of a worker that is on this machine whatever the executor; no service has such a name.
ON_HOST = "server:"
_IMAGE_MARK = "@"  # between a service and an image; no service has it in its name


def slot_of(place: str) -> str:
    """The service of a place, with `@IMAGE` where its container has another image than in the compose file."""
    return place.removeprefix(ON_HOST)


def service_and_image(place: str) -> tuple[str, str | None]:
    service, _, image = slot_of(place).partition(_IMAGE_MARK)
    return service, image or None


@dataclass(frozen=True, slots=True)
class Experiment:
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
    prompts: Mapping[str, Any] = field(default_factory=dict)  # their `prompts_fingerprint`
    n_prompts: int | None = None  # where it is known before the run; of a data set at most

    def at(self, cycle_index: int, order_index: int) -> Experiment:
        if (cycle_index, order_index) == (self.cycle_index, self.order_index):
            return self
        exp_id = experiment_id(self.config_hash, cycle_index)
        return replace(self, exp_id=exp_id, cycle_index=cycle_index, order_index=order_index)

    @property
    def backend(self) -> str:
        return self.config.backend

    @property
    def place(self) -> str:
        """Where its worker runs: a slot (`slot_of`) where backends run in containers, or ON_HOST and its server."""
        section, image = self.config.section, self.config.image
        ending = "" if image is None else f"{_IMAGE_MARK}{image}"
        if not isinstance(section, ServerConfig):
            return f"{self.backend}{ending}"
        return f"{'' if section.command and section.service else ON_HOST}{section.service or ''}{ending}"

    @property
    def container(self) -> str | None:
        """The compose service that its engine needs, where backends run in containers; None for none."""
        return service_and_image(self.place)[0] or None

    @property
    def server(self) -> str | None:
        """Which server it measures, in words; None where lem runs the engine itself."""
        section = self.config.section
        if not isinstance(section, ServerConfig):
            return None
        if section.url is not None:
            return f"{section.url}, which runs already: cycles share its load, so there is no interval"
        if section.command is None:
            return f"service {section.service}, a new container for each load"
        return f"{section.command[0]}, {f'in service {section.service}' if section.service else 'on this machine'}"

    @property
    def requested(self) -> dict[str, Any]:
        written: dict[str, Any] = as_written(self.config_dict)
        return written

    @property
    def resolved(self) -> dict[str, Any]:
        given = canonical(ExperimentConfig, self.config_dict)
        resolved: dict[str, Any] = as_written(self.config.to_dict(), given)
        return resolved if resolved["config_name"] else {**resolved, "config_name": self.config_name}


def needs_container(experiment: Experiment) -> str | None:
    """The option by which an experiment cannot run outside a container, with its value; None where it can."""
    config, section = experiment.config, experiment.config.section
    if isinstance(section, ServerConfig) and section.service is not None:
        return f"server.service: {section.service}"
    return None if config.image is None else f"image: {config.image}"


@dataclass(frozen=True)
class ExpectedDurations:
    measured_by_config: Mapping[str, float] = field(default_factory=dict)  # an experiment without its load
    load_by_engine: Mapping[str, float] = field(default_factory=dict)  # by engine_key
    gap_s: float | None = None  # a gap, which may end early; None where none was kept: then each takes its cap


@dataclass(frozen=True)
class ExpectedTime:
    measured_s: float | None
    loading_s: float | None
    gaps_s: float  # all gaps
    most_gaps_s: float  # the same if none ends early
    is_complete: bool  # every experiment's own time is known, not estimated from others

    @property
    def total_s(self) -> float | None:
        if self.measured_s is None or self.loading_s is None:
            return None
        return self.measured_s + self.loading_s + self.gaps_s


@dataclass(frozen=True)
class Plan:
    """The experiments of a campaign, or those that a resume leaves, in the order to run; and what became of others."""

    campaign: CampaignConfig
    experiments: tuple[Experiment, ...]
    given: tuple[Experiment, ...]  # one for each configuration, in the order given
    total_generated: int  # configurations before validation; cycles do not count
    filtered: tuple[GridValidationIssue, ...]  # an error for each configuration left out
    warnings: Counter[str]  # about those that are in, in words: coded, thousands take more memory than the rest
    given_before: tuple[Experiment, ...] = ()  # `given` as an older build had it, with 32 prompts where none are named

    @property
    def execution(self) -> CampaignExecutionConfig:
        return self.campaign.execution

    @property
    def is_cold(self) -> bool:
        return self.campaign.cold_start.force_cold_start or self.campaign.cold_start.restart_container

    @property
    def enlarged_to(self) -> int | None:
        """The prompts of configurations that name none, where the widest runs more than the usual 32 at once."""
        before = {item.config_hash for item in self.given_before}
        return next((item.n_prompts for item in self.given if item.config_hash not in before), None)

    @property
    def secret_names(self) -> tuple[str, ...]:
        """The environment variables that the workers get without their values being written or shown."""
        keys = (getattr(item.config.section, "api_key_env", None) for item in self.given)
        return (TOKEN_VARIABLE, *dict.fromkeys(filter(None, keys)))

    @property
    def config_hash(self) -> str:
        return grid.campaign_config_hash(self.campaign, [item.config_hash for item in self.given])

    def as_first_hashed(self) -> Plan:
        older = self.as_by_older_build()
        return older.with_hashes(
            {item.config_hash: grid.config_hash(item.config, item.prompts, is_first=True) for item in older.given}
        )

    def with_hashes(self, others: Mapping[str, str]) -> Plan:
        def renamed(item: Experiment) -> Experiment:
            digest = others.get(item.config_hash, item.config_hash)
            return replace(item, config_hash=digest, exp_id=experiment_id(digest, item.cycle_index))

        parts = (self.given, self.experiments, self.given_before)
        given, experiments, given_before = (tuple(map(renamed, items)) for items in parts)
        return replace(self, given=given, experiments=experiments, given_before=given_before)

    @property
    def shuffle_seed(self) -> int | None:
        return self.execution.seed if self.execution.structure == SHUFFLED else None

    @property
    def configurations(self) -> tuple[Experiment, ...]:
        first: dict[str, Experiment] = {}
        for item in self.experiments:
            first.setdefault(item.config_hash, item)
        return tuple(first.values())

    @property
    def listing(self) -> tuple[ListedConfiguration, ...]:
        rates = Memo(lambda section: {name: it for name in RATES if (it := getattr(section, name)) is not None})
        slo = Memo(lambda section: section.slo.changed())
        return tuple(
            ListedConfiguration(
                item.config_hash,
                item.config_name,
                rates(item.config.measurement),
                slo(item.config.traffic_simulation),
            )
            for item in self.given
        )

    @property
    def summary(self) -> str:
        counts = f"{len(self.filtered)} filtered, {self.warnings.total()} warnings"
        return f"Generated {self.total_generated} experiments ({counts})"

    @property
    def filtered_by_reason(self) -> list[tuple[str, int]]:
        return grid.count_reasons(self.filtered)

    @property
    def warnings_by_reason(self) -> list[tuple[str, int]]:
        return self.warnings.most_common()

    def with_cycles(self, cycles: int) -> Plan:
        """The plan with at least that many cycles; more are added at its end, or in each group of a grouped plan."""
        if cycles <= self.execution.cycles:
            return self
        campaign = replace(self.campaign, execution=replace(self.execution, cycles=cycles))
        return replace(self, campaign=campaign, experiments=order_experiments(self.given, campaign.execution))

    def as_by_older_build(self) -> Plan:
        """The plan of a build before `balanced`, whose default was `interleaved`."""
        execution = self.execution
        if execution.structure == BALANCED:
            execution = replace(execution, structure=INTERLEAVED)
        given = self.given_before or self.given
        planned = {(item.config_name, item.cycle_index) for item in self.experiments}
        ordered = order_experiments(given, execution)
        experiments = tuple(item for item in ordered if (item.config_name, item.cycle_index) in planned)
        return replace(self, campaign=replace(self.campaign, execution=execution), experiments=experiments, given=given)

    def loads(self) -> list[bool]:
        # One engine is resident at a time. With `reuse: cycle` it is kept for the next experiment of the same cycle and
        # engine key, with `campaign` also across cycles, with `none` and under a cold start never. A server that runs
        # already is never loaded.
        items, reuse = self.experiments, self.execution.reuse
        engines = [(item.engine_key, item.cycle_index if reuse == "cycle" else 0) for item in items]
        others = [True, *(one != two for one, two in itertools.pairwise(engines))] if items else []
        if reuse == "none" or self.is_cold:
            others = [True] * len(items)
        return [is_load and not item.config.has_running_engine for item, is_load in zip(items, others, strict=True)]

    def gap_kinds(self) -> list[GapKind | None]:
        """The gap before each experiment; None before the first."""
        # The cycle gap replaces the configuration gap after the last experiment of a cycle, or in a grouped campaign of
        # one configuration, so a resumed part of a plan has its gaps in the right places too.
        is_grouped = self.execution.structure == GROUPED
        blocks = [item.config_hash if is_grouped else item.cycle_index for item in self.experiments]
        pairs = itertools.pairwise(blocks)
        return [None, *("configuration" if one == two else "cycle" for one, two in pairs)] if blocks else []

    def gap_cap_s(self, kind: GapKind | None) -> float:
        if kind is None:
            return 0.0
        return self.execution.cycle_gap_seconds if kind == "cycle" else self.execution.config_gap_seconds

    def expected_time(self, known: ExpectedDurations) -> ExpectedTime:
        items = self.experiments
        loading = [item for item, is_load in zip(items, self.loads(), strict=True) if is_load]
        caps_s = [self.gap_cap_s(kind) for kind in self.gap_kinds()]
        return ExpectedTime(
            measured_s=_sum_known([item.config_hash for item in items], known.measured_by_config),
            loading_s=_sum_known([item.engine_key for item in loading], known.load_by_engine),
            gaps_s=sum(cap_s if known.gap_s is None else min(cap_s, known.gap_s) for cap_s in caps_s),
            most_gaps_s=sum(caps_s),
            is_complete=all(item.config_hash in known.measured_by_config for item in items)
            and all(item.engine_key in known.load_by_engine for item in loading),
        )


@dataclass(frozen=True)
class FleetPart:
    """What a host runs of a plan that several hosts share."""

    run_id: str | None = None  # of the run that all hosts share; None without a stored plan
    host: str | None = None  # its name in that run
    folder: str = ""  # its folder within those of the campaign and the run, which hosts may share


def _sum_known(names: Sequence[str], known: Mapping[str, float]) -> float | None:
    if not names:
        return 0.0
    if not known:
        return None
    mean = sum(known.values()) / len(known)
    return sum(known.get(name, mean) for name in names)


def plan_campaign(loaded: Loaded[CampaignConfig]) -> Plan:
    from lem.meters.nvml import find_gpus

    gpus = find_gpus() or None
    is_collecting = gc.isenabled()
    gc.disable()  # what a plan makes stays, and looking through it again and again is a tenth of the time
    try:
        plan = build_plan(loaded.config, loaded.listed, preset=loaded.preset, source=loaded.source, gpus=gpus)
    finally:
        if not gc.get_freeze_count():  # else this would undo a caller's own
            gc.freeze()
            gc.unfreeze()  # all of it is old now, and not looked through at once
        if is_collecting:
            gc.enable()
    unused = [
        Reason.of("campaign_decides", option=name, instead=instead).text
        for item in plan.configurations
        for name, is_set, instead in (
            ("num_cycles", item.config.num_cycles != 1, "execution.cycles"),
            ("io.results_dir", item.config.io.results_dir is not None, "the campaign's io.results_dir"),
        )
        if is_set
    ]
    unused += [grid.coded(problem).text for problem in loaded.config.without_effect()]
    return replace(plan, warnings=plan.warnings + Counter(unused))


def build_plan(
    campaign: CampaignConfig,
    listed: Sequence[ListedExperiment] = (),  # of `configs` and `experiments`, as `load_campaign` gives them
    *,
    preset: Mapping[str, Any] | None = None,  # the values that a grid starts from
    source: Source | None = None,  # the campaign's: its options win over the experiments' own, and it locates problems
    gpus: Sequence[Gpu] | None = None,  # of the host that will run it, for warnings; None when unknown
) -> Plan:
    candidates = _collect(campaign, listed, preset or {}, source)
    configs, filtered, found = grid.validate_named(((item.name, item.config_dict) for item in candidates), gpus)
    valid = [(item, config) for item, config in zip(candidates, configs, strict=True) if config is not None]
    sized = _with_enough_prompts(valid)
    given, repeated, idle = _identify(sized)
    warnings = Counter(why.text for _, why in found)
    for counts in (repeated, idle):
        warnings.update(counts)
    experiments = order_experiments(given, campaign.execution)
    first = {item.config_hash: item for item in experiments if not item.cycle_index}
    given = tuple(first[item.config_hash] for item in given)  # thousands need not be there twice
    return Plan(
        campaign=campaign,
        experiments=experiments,
        given=given,
        total_generated=len(candidates),
        filtered=filtered,
        warnings=warnings,
        given_before=given if sized is valid else _identify(valid)[0],
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    name: str
    config_dict: dict[str, Any]
    path: str
    is_generated: bool
    source: Source | None
    is_of_grid: bool


def _collect(
    campaign: CampaignConfig, listed: Sequence[ListedExperiment], preset: Mapping[str, Any], source: Source | None
) -> list[_Candidate]:
    unnamed = iter(grid.name_configurations([one.mapping for one in listed if one.name is None]))
    forced = source.forced if source is not None else ()
    # In two steps, so that what is removed and filled in again comes last, as in results of earlier builds.
    remove = grid.Shared(WITH_DEFAULTS, lambda part, _: without_forced(part, forced))
    fill = grid.Shared(WITH_DEFAULTS, lambda part, _: fill_defaults(campaign, part))
    place = grid.Shared(_WITH_FILES, lambda part, _: _found_files(part, source, is_of_grid=True))
    of_grid = [] if campaign.grid is None else grid.expand_shared(campaign.grid, preset)
    for step in (remove, fill) if forced else (fill,):
        _replace(of_grid, 0, step)
    names = [one.name or next(unnamed) for one in listed] + grid.name_configurations(of_grid)
    n_listed, n_of_grid = len(listed), len(of_grid)
    config_dicts = [*(dict(one.mapping) for one in listed), *of_grid]
    del of_grid
    names = grid.distinct_names(names, config_dicts)
    folder = str(Path(campaign.io.configs_dir) / campaign.slug)
    stems = grid.distinct_names([grid.file_stem(name) for name in names], config_dicts)
    origins = [*((one.path, one.source, False) for one in listed), *[(None, source, True)] * n_of_grid]
    config_dicts[:n_listed] = [_found_files(one.mapping, one.source, is_of_grid=False) for one in listed]
    _replace(config_dicts, n_listed, place)
    return [
        _Candidate(name, config_dict, str(file or f"{folder}/{stem}.yaml"), file is None, origin, is_of_grid)
        for name, config_dict, stem, (file, origin, is_of_grid) in zip(names, config_dicts, stems, origins, strict=True)
    ]


def _replace(items: list[dict[str, Any]], begin: int, function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace each item from `begin` on, one by one, so that thousands are not there twice."""
    for index in range(begin, len(items)):
        items[index] = function(items[index])


_WITH_FILES = ("prompts", "chat_template")


def _found_files(options: Mapping[str, Any], source: Source | None, *, is_of_grid: bool) -> dict[str, Any]:
    """The options, with paths of files from the working directory, and not from the file that names them."""
    config_dict = dict(options)
    if source is None:
        return config_dict
    prompts, template = config_dict.get("prompts"), config_dict.get("chat_template")
    inside = ("grid", "shared") if is_of_grid else ()
    if isinstance(prompts, Mapping) and isinstance(prompts.get("path"), str):
        path = source.found_file(prompts["path"], (*inside, "prompts", "path"), (*inside, "prompts.path"))
        config_dict["prompts"] = {**prompts, "path": path}
    if isinstance(template, str) and template not in (NO_TEMPLATE, OWN_TEMPLATE):
        config_dict["chat_template"] = source.found_file(template, (*inside, "chat_template"))
    return config_dict


_Valid = Sequence[tuple[_Candidate, ExperimentConfig]]


def _with_enough_prompts(valid: _Valid) -> _Valid:
    bare = [config.dataset is None and config.prompts is None for _, config in valid]
    widths = (
        config.most_at_once(config.width) or 0 for (_, config), is_bare in zip(valid, bare, strict=True) if is_bare
    )
    size = max(widths, default=0)
    if size <= BUNDLED.sample_size:
        return valid
    known: KnownValues = {}
    fill = grid.Shared(("dataset", "prompts", "max_input_tokens"), lambda part, _: with_sample_size(part, size))
    found = []
    for (item, config), is_bare in zip(valid, bare, strict=True):
        if is_bare:
            item = replace(item, config_dict=fill(item.config_dict))
            config = ExperimentConfig.from_dict(item.config_dict, known)
        found.append((item, config))
    return found


def _identify(valid: _Valid) -> tuple[tuple[Experiment, ...], Counter[str], Counter[str]]:
    """The configurations, and warnings about those that are repeated, and about those that cannot differ."""
    prompts: dict[Any, tuple[dict[str, Any], int | None]] = {}
    unusable: dict[Any, FileProblems] = {}
    found: dict[str, Experiment] = {}
    repeated, idle = Counter[str](), Counter[str]()
    seen: dict[bytes, Experiment] = {}
    for item, config in valid:
        key = (config.dataset, config.prompts, config.chat_template)
        if key not in prompts and key not in unusable:
            try:
                prompts[key] = _find_prompts(item, config)
            except FileProblems as error:
                unusable[key] = error
        if key in unusable:
            continue
        texts, (fingerprint, n_prompts) = config.identity_texts(), prompts[key]
        digest = grid.hash_of(texts, fingerprint)
        if digest in found:
            repeated[Reason.of("repeated_experiment", name=found[digest].config_name).text] += 1
            continue
        found[digest] = experiment = Experiment(
            exp_id=experiment_id(digest, 0),
            config_name=item.name,
            config=config,
            config_dict=item.config_dict,
            config_path=item.path,
            config_hash=digest,
            engine_key=config.engine_key(),
            cycle_index=0,
            order_index=len(found),
            is_generated=item.is_generated,
            prompts=fingerprint,
            n_prompts=n_prompts,
        )
        idle.update(why.text for why in _without_effect(experiment, texts, seen))
    if unusable:
        located = [place for error in unusable.values() for place in error.located]
        hints = {error.hint for error in unusable.values()}
        raise FileProblems(located, hints.pop() if len(hints) == 1 else "correct these files, or name others")
    return tuple(found.values()), repeated, idle


def _find_prompts(item: _Candidate, config: ExperimentConfig) -> tuple[dict[str, Any], int | None]:
    source = config.dataset or config.prompts or BUNDLED
    where: tuple[str, ...] = ("prompts", "path")
    try:
        resolved = resolve_on_host(config) if isinstance(source, FilePrompts) else None
        where = ("chat_template",)
        fingerprint = grid.prompts_fingerprint(config, resolved)
    except ConfigurationError as error:
        if item.source is None:
            raise
        where = ("grid", "shared", *where) if item.is_of_grid else where
        raise FileProblems(item.source.locate([Problem(where, error.message)]), error.hint) from error
    return fingerprint, len(resolved.prompts) if resolved else source.sample_size


def _without_effect(item: Experiment, texts: dict[str, str], seen: dict[bytes, Experiment]) -> list[Reason]:
    """A warning for a width that is not reached, and for a configuration that does what one seen before does.

    `texts` are those of its identity.
    """
    config = item.config
    reasons = [grid.coded(found)] if (found := rules.width_warning(config, item.n_prompts)) else []
    effective = joined_texts(rules.effective(config, texts, item.n_prompts))
    key = hashlib.sha256(durable.utf8(f"{grid.FINGERPRINT_TEXTS(item.prompts)}{effective}")).digest()
    other = seen.setdefault(key, item)
    if other is not item:
        names = rules.differing(other.config, config)
        reasons.append(Reason.of("cannot_differ", options=" and ".join(names)))
    return reasons


def order_experiments(given: Sequence[Experiment], execution: CampaignExecutionConfig) -> tuple[Experiment, ...]:
    cycles, keys = range(execution.cycles), [item.engine_key for item in given]
    images = [item.config.image for item in given]
    if execution.structure == GROUPED:
        ordered = [(item, cycle) for item in given for cycle in cycles]
    else:
        orders = ((cycle, cycle_order(keys, execution.structure, execution.seed, cycle, images)) for cycle in cycles)
        ordered = [(given[place], cycle) for cycle, order in orders for place in order]
    return tuple(item.at(cycle, index) for index, (item, cycle) in enumerate(ordered))


def write_configs(configurations: Iterable[Experiment]) -> None:
    for item in configurations:
        if not item.is_generated:
            continue
        path = Path(item.config_path)
        data = durable.utf8(encode_config({**item.config_dict, "config_name": item.config_name}))
        try:
            if path.exists() and durable.read_bytes(path) == data:
                continue
            durable.make_folder(path.parent)
            # A file that a power cut spoils differs the next time and is written again; syncing 10,000 took 12 s.
            durable.write_bytes(path, data, is_synced=False)
        except OSError as error:
            hint = "make the folder writable, or set io.configs_dir"
            raise UserError(f"cannot write {path}: {error.strerror}", hint) from error
