"""What keeps a campaign from running, found before anything is measured: on this host, and where its engines are."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lem.base.dataclass import dataclass
from lem.base.errors import EngineError, UserError
from lem.base.units import format_duration, plural, some_of
from lem.config.backends import ServerConfig
from lem.config.experiment import ExperimentConfig
from lem.engines.common import demo_python
from lem.engines.named import NamedModel, named_models
from lem.engines.texts import allows_more, check_lengths, sure_lengths
from lem.orchestration import doctor
from lem.orchestration.dispatch import Worker
from lem.orchestration.gpu_control import find_problems
from lem.orchestration.plan import Experiment, Plan, needs_container, service_and_image
from lem.orchestration.schedule import StopRequest
from lem.results.stopping import StoppingRule
from lem.worker import channel
from lem.worker.datasets import choice_of, find_files
from lem.worker.supervisor import missing_distributions, probe_environment

_logger = logging.getLogger(__name__)

_SHOWN = 3
# What containers need before they are started, of the checks of `lem doctor`.
_OF_CONTAINERS = ("engine", "compose", "compose_file", "images", "servers")
# Gaps that are suggested where nothing can end them early, in seconds.
_SHORT_CONFIG_GAP_S, _SHORT_CYCLE_GAP_S = 10, 30


@dataclass(frozen=True)
class Problem:
    message: str
    hint: str = ""
    concerns: str = ""  # the configurations, where not all have it


class Findings:
    def __init__(self, experiments: Iterable[Experiment]) -> None:
        self._all = {item.config_hash: item for item in experiments}.values()
        # Configurations that need the same models, data and positions.
        self._groups: dict[Any, list[Experiment]] = {}
        known: dict[Any, tuple[Any, ...]] = {}
        for item in self._all:
            config = item.config
            lengths = {} if allows_more(config) else sure_lengths(config)
            parts = (config.section, config.model)  # which thousands of a grid share
            at = (item.place, *map(id, parts))
            if at not in known:
                known[at] = (item.place, config.model, *named_models(config).values(), *_server_of(config))
            key = (known[at], *lengths.items(), config.dataset, config.prompts)
            self._groups.setdefault(key, []).append(item)
        self._names: dict[tuple[str, str], dict[str, None]] = {}

    def add(self, message: str, hint: str, those: Iterable[Experiment] | None = None) -> None:
        names = [item.config_name for item in (self._all if those is None else those)]
        self._names.setdefault((message, hint), {}).update(dict.fromkeys(names))

    @property
    def problems(self) -> list[Problem]:
        return [Problem(*key, self._share(list(names))) for key, names in self._names.items()]

    def _share(self, names: Sequence[str]) -> str:
        if len(names) == len(self._all):
            return ""
        return f"{len(names)} of {plural(len(self._all), 'configuration')}: {some_of(names, _SHOWN)}"

    def look_here(self) -> None:
        for group in self._groups.values():
            config = group[0].config
            models = named_models(config)
            looks: list[Callable[[], object]] = [item.find_folder for item in models.values()]
            if "model" in models and config.backend != "vllm":  # which has rules of its own for some models
                looks.append(functools.partial(_check_lengths, config, models["model"]))
            if config.uses_dataset:
                looks.append(functools.partial(find_files, choice_of(config), os.environ))
            for look in looks:
                try:
                    look()
                except EngineError as error:  # noqa: PERF203 (each one is reported)
                    self.add(error.message, error.hint, group)

    def look_at_gpus(self, *, may_set: bool) -> None:
        """Whether GPUs accept the settings; with `may_set`, whether this user may set them: only with their locks."""
        for item in self._all:
            for problem in find_problems(item.config, os.environ, may_set=may_set):
                self.add(problem.message, problem.hint, [item])

    def look_for_engine(
        self, executor: str, backend: str, environment: Mapping[str, Any], place: str | None = None
    ) -> bool:
        """Whether the engine of a backend is there, in a place of its own or wherever its experiments run."""
        missing = missing_distributions(backend, environment)
        if not missing:
            return True
        names = " and ".join(missing) + (" is" if len(missing) == 1 else " are")
        where, python = "here", "this Python"
        other = f"name another Python: --executor local --python {demo_python(backend) or 'PROGRAM'}"
        hint = f"pip install {' '.join(missing)}, {other}, or use a container (lem doctor)"
        if executor == "docker":
            image = service_and_image(place or backend)[1]
            where, python = f"in service {backend}{f' with image {image}' if image else ''}", "its Python"
            hint = "name an image that has it in the compose file; lem compose prints one with such images"
            hint = hint if image is None else "name an image that has it (image)"
        version = environment.get("python")
        those = [item for item in self._all if item.backend == backend and place in (None, item.place)]
        text = f"backend {backend} cannot run {where}: {names} not installed in {python} ({version})"
        self.add(text, hint, those)
        return False

    def ask(self, place: str, worker: Worker, secrets: Mapping[str, str], stop: StopRequest) -> None:
        groups = [group for group in self._groups.values() if group[0].place == place and _is_to_ask(group[0])]
        if not groups:
            return
        check = channel.Check(tuple(group[0].config.to_dict() for group in groups), secrets)
        answers = worker.check(check, stop)
        unsure: dict[str, None] = {}
        for answer in answers:
            if isinstance(answer, channel.Problem) and answer.is_certain:
                self.add(answer.message, answer.hint, groups[answer.place])
            elif isinstance(answer, channel.Problem):
                unsure[f"{answer.message} ({answer.hint})"] = None
        for text in unsure:
            _logger.warning("not checked, which does not mean that it is missing: %s", text)
        if not isinstance(last := answers[-1] if answers else None, channel.Result):
            why = last.message if isinstance(last, channel.Failure) else "there was no answer in time"
            _logger.warning("not all models and data sets were looked for before the first cycle: %s", why)


def check_supported(plan: Plan, executor_name: str, rule: StoppingRule | None = None) -> None:
    """Refuse, with a UserError, what these experiments cannot have: containers, or loads of their own."""
    campaign = plan.campaign
    if campaign.cold_start.restart_container and executor_name != "docker":
        message = "cold_start.restart_container requires containers, but these experiments run in this Python"
        raise UserError(message, "use cold_start.force_cold_start, which starts a new worker for each experiment")
    needed = next(filter(None, map(needs_container, plan.experiments)), None)
    if executor_name != "docker" and needed:
        option = needed.partition(":")[0]
        hint = f"use `lem campaign` with --executor docker, or omit {option} to run on this machine"
        raise UserError(f"{needed} requires containers", hint)
    wanted = {
        "cold_start": plan.is_cold,
        "execution.reuse: none": plan.execution.reuse == "none",
        "--until": rule is not None,
    }
    for option in (name for name, is_set in wanted.items() if is_set):
        if any(item.config.has_running_engine for item in plan.experiments):
            message = f"{option} needs a new load in each cycle, but server.url names a server that runs already"
            raise UserError(message, "let lem start it: server.command or server.service")


def _check_lengths(config: ExperimentConfig, model: NamedModel) -> None:
    try:
        folder = model.find_folder()
    except EngineError:  # reported on its own
        return
    if folder is not None:
        check_lengths(config, folder)


def _server_of(config: ExperimentConfig) -> tuple[object, ...]:
    section = config.section
    return (section.command, section.env.get("PATH"), section.url) if isinstance(section, ServerConfig) else ()


def _is_to_ask(item: Experiment) -> bool:
    """Whether a configuration names more than folders that this host has."""
    if any(_server_of(item.config)):
        return True
    try:
        return item.config.uses_dataset or any(it.find_folder() is None for it in named_models(item.config).values())
    except EngineError:  # reported by this host
        return False


def foresee(plan: Plan, executor: str, python: str | None) -> list[Problem]:
    """As far as it shows with nothing started: what keeps a plan from running, for a dry run."""
    found = Findings(plan.experiments)
    found.look_here()
    found.look_at_gpus(may_set=False)
    backends = tuple(dict.fromkeys(item.backend for item in plan.experiments))
    host = doctor.host_of(plan)
    for item in doctor.examine(host, _OF_CONTAINERS if executor == "docker" else ("servers",)).findings.values():
        if item.status == doctor.FAILED:
            found.add(item.message, item.remedy)
    if executor != "docker" and python is None:
        for backend in backends:
            found.look_for_engine(executor, backend, probe_environment())
    return found.problems


def lines_of(problem: Problem) -> tuple[str, ...]:
    message = f"{problem.message} ({problem.concerns})" if problem.concerns else problem.message
    return (message, problem.hint) if problem.hint else (message,)


def refuse(problems: Sequence[Problem]) -> None:
    if len(problems) == 1:
        raise UserError(lines_of(problems[0])[0], problems[0].hint)
    if problems:
        listed = ("\n".join(lines_of(item)).replace("\n", "\n    ") for item in problems)
        text = "\n  - ".join([f"{len(problems)} problems, so nothing was run", *listed])
        raise UserError(text, "repair all of them, then repeat the command")


def gap_advice(plan: Plan, gpu_error: str | None) -> str | None:
    """That nothing can end the gaps of a plan early, and how to shorten them; `gpu_error`: why GPUs cannot be read."""
    execution, gaps = plan.execution, [gap_s for kind in plan.gap_kinds() if (gap_s := plan.gap_cap_s(kind))]
    uses_gpu = any(item.config.gpus != () for item in plan.configurations)
    short = {
        "--config-gap": (execution.config_gap_seconds, _SHORT_CONFIG_GAP_S),
        "--cycle-gap": (execution.cycle_gap_seconds, _SHORT_CYCLE_GAP_S),
    }
    flags = " ".join(f"{flag} {least}" for flag, (cap_s, least) in short.items() if cap_s > least)
    if not gaps or not flags or (uses_gpu and gpu_error is None):
        return None
    why = gpu_error if uses_gpu else "no GPU is used"
    lasts = f"{plural(len(gaps), 'gap')} {'lasts its' if len(gaps) == 1 else 'last their'} full time"
    return f"No sensor shows when to end a gap early ({why}): {lasts}, {format_duration(sum(gaps))}; shorter: {flags}"
