"""Where a campaign runs: in containers or in a Python of this machine, and why."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lem.base.errors import UserError
from lem.config.campaign_config import CampaignConfig, CampaignHealthCheckConfig
from lem.meters.nvml import GpuFacts, find_gpus, named_gpus, visible_gpus
from lem.orchestration.compose import Compose, find_compose_files
from lem.orchestration.docker import ContainerError, Docker, local_mounts
from lem.orchestration.docker_executor import DockerExecutor
from lem.orchestration.plan import Plan
from lem.orchestration.services import ComposeProject
from lem.orchestration.session import Executor, LocalExecutor
from lem.worker.supervisor import missing_distributions, probe_environment

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExecutorChoice:
    """An executor that was chosen, and is made when it is needed.

    Attributes:
        name: `docker` or `local`.
        place: where that is.
        reason: why it was chosen.
        make: makes it.
        detail: more about the place, which takes a moment to find out.
    """

    name: str
    place: str
    reason: str
    make: Callable[[], Executor] = field(repr=False)
    detail: Callable[[], str] = field(default=lambda: "", repr=False)

    def describe(self) -> str:
        """All of it, for the plan."""
        return ", ".join(filter(None, (self.name, self.place, self.detail()))) + f" ({self.reason})"


def choose_executor(
    wish: str,
    campaign: CampaignConfig,
    plan: Plan,
    *,
    python: str | None = None,
    folder: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> ExecutorChoice:
    """The executor that was asked for; for `auto` docker where a backend is not installed here and an engine is.

    Args:
        python: the Python of the local executor; naming one asks for that executor.
        folder: where relative paths start; None is the working directory.

    Raises:
        UserError: the wish cannot be granted.
    """
    backends = tuple(dict.fromkeys(item.backend for item in plan.experiments))
    where = folder or Path.cwd()
    if wish == "docker" and python is not None:
        raise UserError("--python is for the local executor", "leave out --python, or --executor docker")
    if wish == "local" or python is not None:
        _tell_what_needs_containers(campaign)
        return _local(python, "asked for")
    if wish == "docker":
        return _docker(campaign, plan, backends, where, environ, "asked for")
    if campaign.cold_start.restart_container:
        return _docker(campaign, plan, backends, where, environ, "chosen: cold_start.restart_container needs it")
    if campaign.io.compose_file is not None or campaign.io.env_file is not None:
        return _docker(campaign, plan, backends, where, environ, "chosen: a file for compose is named")
    absent = _not_installed(backends)
    if not absent:
        return _local(None, f"chosen: {', '.join(backends)} can be imported here")
    problem = _no_containers(campaign, where, environ)
    if problem is not None:
        return _local(None, f"chosen though {absent}, for want of containers: {problem}")
    return _docker(campaign, plan, backends, where, environ, f"chosen: {absent}")


def _not_installed(backends: Sequence[str]) -> str:
    """Which backends this Python lacks, in words; empty when none."""
    found = probe_environment()
    missing = {name: missing_distributions(name, found) for name in backends}
    lacking = [f"{name} ({', '.join(items)})" for name, items in missing.items() if items]
    return f"not installed here: {', '.join(lacking)}" if lacking else ""


def _no_containers(campaign: CampaignConfig, folder: Path, environ: Mapping[str, str]) -> str | None:
    """Why no container can be had; None when an engine, the plugin and the compose file are there."""
    try:
        docker = Docker(environ)
        docker.info()
        Compose(docker, "lem", ()).version()
        find_compose_files(campaign.io.compose_file, folder, environ)
    except ContainerError as error:
        return error.message
    return None


def docker_executor(
    campaign: CampaignConfig,
    plan: Plan,
    *,
    folder: Path,
    environ: Mapping[str, str] = os.environ,
    gpus: Sequence[GpuFacts] | None = None,
) -> DockerExecutor:
    """The containers of a campaign, none of them started.

    Args:
        folder: where relative paths start.
        gpus: of this host; None looks.

    Raises:
        ContainerError: a compose file that is named is not there.
    """
    backends = tuple(dict.fromkeys(item.backend for item in plan.experiments))
    # A number means here what it means to a local engine.
    visible = visible_gpus(find_gpus() if gpus is None else gpus, environ)
    uuids = {str(number): gpu.uuid for number, gpu in enumerate(visible)} | {gpu.uuid: gpu.uuid for gpu in visible}
    configs = {name: [item.config for item in plan.configurations if item.backend == name] for name in backends}
    named = {name: _gpus_named([item.gpus for item in items], visible) for name, items in configs.items()}
    project = dataclasses.replace(
        _project(campaign, folder, environ, state_folder=folder / campaign.io.state_dir / campaign.slug),
        mounts_of={name: local_mounts(items) for name, items in configs.items()},
        gpus_of={name: value for name, value in named.items() if value is not None},
    )
    return DockerExecutor(
        project,
        backends,
        campaign.campaign_name,
        health=campaign.health_check,
        gpu_uuids=uuids,
        is_recreating=campaign.cold_start.restart_container,
    )


def _project(
    campaign: CampaignConfig, folder: Path, environ: Mapping[str, str], *, state_folder: Path
) -> ComposeProject:
    env_file = campaign.io.env_file
    return ComposeProject(
        # Not the slug alone: a person may have a project of that name, which would be taken down with ours.
        name=f"lem-{campaign.slug}",
        files=find_compose_files(campaign.io.compose_file, folder, environ),
        state_folder=state_folder.absolute(),
        working_dir=folder.absolute(),
        results_dir=(folder / campaign.io.results_dir).absolute(),
        env_file=None if env_file is None else (folder / env_file).absolute(),
        environ=environ,
    )


def _gpus_named(wishes: Sequence[tuple[str, ...] | None], visible: Sequence[GpuFacts]) -> tuple[str, ...] | None:
    """The UUIDs of the GPUs that experiments name; () when all of them name the CPU, None when nobody knows."""
    if wishes and all(wish == () for wish in wishes):
        return ()
    return tuple(sorted({gpu.uuid for wish in wishes for gpu in named_gpus(wish, visible)})) or None


def _tell_what_needs_containers(campaign: CampaignConfig) -> None:
    """Warn of options that the local executor does nothing with."""
    options = {
        "io.compose_file": campaign.io.compose_file is not None,
        "io.env_file": campaign.io.env_file is not None,
        "health_check": campaign.health_check != CampaignHealthCheckConfig(),
    }
    for name in (name for name, is_set in options.items() if is_set):
        _logger.warning("%s has no effect: it is about containers, and these experiments run in this Python", name)


def _local(python: str | None, reason: str) -> ExecutorChoice:
    executor = LocalExecutor(python)
    return ExecutorChoice("local", executor.python, reason, lambda: executor)


def _docker(
    campaign: CampaignConfig,
    plan: Plan,
    backends: Sequence[str],
    folder: Path,
    environ: Mapping[str, str],
    reason: str,
) -> ExecutorChoice:
    files = find_compose_files(campaign.io.compose_file, folder, environ)
    services = f"services {', '.join(backends)} of {files.describe()}"
    return ExecutorChoice(
        "docker",
        services,
        reason,
        make=lambda: docker_executor(campaign, plan, folder=folder, environ=environ),
        detail=lambda: _images(campaign, backends, folder, environ),
    )


def _images(campaign: CampaignConfig, backends: Sequence[str], folder: Path, environ: Mapping[str, str]) -> str:
    """The image of each service, or why that cannot be said; nothing is written for it that stays."""
    with tempfile.TemporaryDirectory(prefix="lem-plan-") as scratch:
        try:
            project = _project(campaign, folder, environ, state_folder=Path(scratch))
            services = project.described()
        except ContainerError as error:
            return f"images unknown: {error.message}"
    named = {name: services[name].image for name in backends if name in services}
    return "images " + ", ".join(f"{image or 'none'} ({name})" for name, image in named.items())
