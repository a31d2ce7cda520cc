"""Where a campaign runs, and why: in containers, or in a Python of this machine."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lem.base.clock import utc_now, utc_text
from lem.base.dataclass import replace
from lem.base.errors import EngineError, InfrastructureError, Interrupted, LockedError, UserError
from lem.base.reasons import Reason
from lem.config.campaign_config import CampaignConfig, CampaignHealthCheckConfig
from lem.meters.machine import GpuFacts, named_gpus, visible_gpus
from lem.meters.nvml import GpuReading, find_gpus, read_gpus
from lem.orchestration import dispatch
from lem.orchestration.compose import (
    PROJECT_VARIABLE,
    ComposeProject,
    compose_variables,
    describe_files,
    find_compose_files,
    local_mounts,
)
from lem.orchestration.container import ContainerManager, gpu_loss
from lem.orchestration.dispatch import Outcome
from lem.orchestration.docker import ContainerError, Docker, describe
from lem.orchestration.locks import Holder, LockTarget, default_gpu_lock_folder, hold_locks
from lem.orchestration.packing import provide_pyz
from lem.orchestration.plan import ON_HOST, Plan, needs_container, service_and_image, slot_of
from lem.orchestration.schedule import StopRequest, Timeouts
from lem.orchestration.served import HostWorker, keeper
from lem.orchestration.status import Observer
from lem.record import RESULT_FILE, RecordError, read_record, write_record
from lem.worker.channel import LOADING_PHASES, RunRequest
from lem.worker.supervisor import missing_distributions, probe_environment

_logger = logging.getLogger(__name__)

TEARDOWN_S = 10.0
_EVENT_DELAY_S = 1.0  # how long after the death of a process the Docker engine may report the reason
_POLL_S = 0.2


class ContainerWorker(dispatch.Worker):
    """The worker in the container of one slot; no other worker holds its device while it runs."""

    def __init__(self, executor: DockerExecutor, slot: str, command: Sequence[str], **options: Any) -> None:
        super().__init__(command, **options)
        self._executor = executor
        self.slot = slot
        self._service = service_and_image(slot)[0]
        self._begun_s = 0.0  # Unix time of the last attempt
        self.is_stale = False  # its container is to be replaced before its next use
        self.has_lost_gpu = False

    def run(
        self, request: RunRequest, on_event: Observer, timeouts: Timeouts, stop: StopRequest | None = None
    ) -> Outcome:
        self._executor.make_way(self.slot, stop)
        adapted = self.adapt(request)
        self._begun_s = time.time()
        return self._settle(adapted, super().run(adapted, on_event, timeouts, stop))

    def _open(self, stop: StopRequest | None, timeout_s: float) -> dispatch.WorkerConnection:
        executor, service = self._executor, self._service
        if self.is_stale or not executor.is_in_place(self.slot):
            executor.replace_container(self.slot)
            self.is_stale = False
        state = executor.state(service)
        if state is None or not state.is_running or self.has_lost_gpu:
            executor.recover(service)
            self.has_lost_gpu = False
        provide_pyz(executor.project.environ)  # checked again: the container has been running for a while
        connection = super()._open(stop, timeout_s)
        self.environment = {**self.environment, "image": executor.compose.images.get(self.slot)}
        return connection

    def _recover(self) -> None:
        self._executor.recover(self._service)

    def adapt(self, request: RunRequest) -> RunRequest:
        """The request as it is valid inside: GPUs have other numbers there, so they are named by UUID."""
        executor, uuids = self._executor, self._executor.gpu_uuids
        has_gpu = executor.has_gpu(self._service)
        config = dict(request.config)
        if uuids and has_gpu:
            named = ("0",) if config.get("gpus") is None else config["gpus"]
            config["gpus"] = [uuids.get(str(name), str(name)) for name in named]
        return replace(request, config=config, image=executor.compose.images.get(self.slot))

    def _settle(self, request: RunRequest, outcome: Outcome) -> Outcome:
        """The outcome with what happened to the container; a result is invalid if it lost its GPU meanwhile."""
        if outcome.error is not None and outcome.error.kind == "died":
            outcome = replace(outcome, error=self._explain_death(outcome.error, outcome.phase))
        has_gpu = self._executor.has_gpu(self._service)
        reading = self._executor.try_to_read_gpus(self._service) if has_gpu else None
        if reading is None or (lost := gpu_loss(reading)) is None:
            return outcome
        self.has_lost_gpu = True
        self.stop()
        if outcome.error is not None:
            error = EngineError(f"{outcome.error.message}; {lost}", outcome.error.hint, kind=outcome.error.kind)
            return replace(outcome, error=error)
        _mark_invalid(Path(request.result_dir) / RESULT_FILE, lost)
        return outcome

    def _explain_death(self, error: EngineError, phase: str | None) -> EngineError:
        executor, until_s = self._executor, time.time() + _EVENT_DELAY_S
        state = executor.state(self._service)
        if state is not None and executor.compose.was_out_of_memory(state.container_id, self._begun_s, until_s):
            message = f"{error.message}; the container ran out of memory"
            hint = "raise its limit (LEM_MEMORY_LIMIT, or the limit in your compose file), or let the engine use less"
            return EngineError(message, hint, kind="out_of_memory", is_permanent=phase in LOADING_PHASES)
        state = executor.state(self._service)
        if state is not None and state.is_running:
            return error
        hint = "lem did not end the container; `docker events --since 1h` shows when it ended"
        return EngineError(f"{error.message}; {describe(state)}", hint, kind=error.kind)


class DockerExecutor(ContainerManager):
    """Workers in one compose project, each backend in the service of its name; the first starts all containers.

    A service has one container: it is replaced when the next worker needs another image. Beside them, workers on this
    machine, for servers that are services themselves, or not in containers at all.
    """

    name = "docker"

    def __init__(
        self,
        project: ComposeProject,
        backends: Sequence[str],  # the places (`Experiment.place`) that will be needed
        campaign: CampaignConfig,
        gpu_uuids: Mapping[str, str],  # by the number of a GPU on this host
        free_timeout_s: float = 30.0,  # for the GPU to become free after its engine has ended
    ) -> None:
        super().__init__(project=project)
        self.backends = backends
        self.gpu_uuids = gpu_uuids
        self._campaign = campaign
        self._free_timeout_s = free_timeout_s
        self._made: dict[str, ContainerWorker] = {}
        self._beside: dict[str, HostWorker] = {}
        self._held: contextlib.ExitStack | None = None  # lock and containers, once they are started

    def worker_for(self, place: str) -> ContainerWorker | HostWorker:
        """ContainerError if something is missing or does not start, LockedError if another campaign has the project."""
        if self._held is None:
            self._held = self._start()
        if place.startswith(ON_HOST):
            if place not in self._beside:
                self._beside[place] = HostWorker(self, place, self.make_way)
            return self._beside[place]
        if place not in self._made:
            service = service_and_image(place)[0]
            self._made[place] = self.worker_in(service, functools.partial(ContainerWorker, self, place))
        return self._made[place]

    def prepare(self, backends: Collection[str]) -> None:
        super().prepare(slots_of(backends))

    def is_in_place(self, slot: str) -> bool:
        """Whether the container of a service has the image of a slot."""
        return self._slots[service_and_image(slot)[0]] == slot

    def replace_container(self, slot: str) -> None:
        """Give a service a new container, from the image of a slot; workers in the old one are ended."""
        service = service_and_image(slot)[0]
        for name, worker in self._made.items():
            if name != slot and service_and_image(name)[0] == service:
                worker.stop()
        if not self.is_in_place(slot):
            self.choose_image(slot)
        self.recreate(service)
        self.await_answer(service)

    @property
    def _workers_here(self) -> Mapping[str, ContainerWorker | HostWorker]:
        return {**self._made, **self._beside}

    def _start(self) -> contextlib.ExitStack:
        with contextlib.ExitStack() as held:
            held.enter_context(self._locked())
            self.prepare(self.backends)  # whatever is missing is reported before there is anything to take down
            if self.project.servers:
                held.enter_context(keeper(self.compose, self.project.mark))
            try:  # recreated, since a container that an earlier run left may be in any state
                inside = [place for place in self.backends if not place.startswith(ON_HOST)]
                self.start_services(inside, recreate=True)
            except BaseException:
                with contextlib.suppress(Interrupted):  # a second signal does not replace the error
                    self.teardown(TEARDOWN_S)
                raise
            held.callback(self.teardown, TEARDOWN_S)
            return held.pop_all()

    def _locked(self) -> contextlib.AbstractContextManager[object]:
        path = default_gpu_lock_folder(self.project.environ) / f"compose-{self.project.name}.lock"
        holder = Holder(os.getpid(), socket.gethostname(), self._campaign.campaign_name, utc_text(utc_now()))
        return hold_locks([LockTarget(path, f"compose project {self.project.name}", is_shared=True)], holder)

    def stop(self) -> None:
        for worker in self._workers_here.values():
            worker.stop()
        for container in self._made.values():
            container.is_stale = self._campaign.cold_start.restart_container

    def kill(self) -> None:
        for worker in self._workers_here.values():
            worker.kill()

    def close(self) -> None:
        held, self._held = self._held, None
        for known in (self._made, self._beside, self._workers, self._slots, self.restarts):
            known.clear()
        try:
            if held is not None:
                held.close()  # takes the services down
        finally:
            self._compose = None

    def clear(self) -> None:
        with contextlib.suppress(LockedError), self._locked():
            self.teardown(TEARDOWN_S)

    def look_after(self, tell: Callable[[str], None]) -> None:
        health = self._campaign.health_check
        for slot, worker in self._made.items():
            if not self.is_in_place(slot):
                continue
            service = service_and_image(slot)[0]
            status = self.check_health(service, health.gpu_memory_threshold_pct)
            if status.healthy:
                continue
            if not health.restart_on_failure:
                tell(f"{service} is unhealthy, and restart_on_failure is off: {status.reason}")
                continue
            tell(f"{service} is unhealthy and will be restarted: {status.reason}")
            worker.stop()
            self.recover(service)
            worker.has_lost_gpu = False
            tell(f"{service} is healthy again")

    def recover(self, service: str) -> None:
        health = self._campaign.health_check
        limit = health.max_restarts if health.restart_on_failure else 0
        status = self.check_and_recover(service, health.gpu_memory_threshold_pct, limit)
        if status.healthy:
            return
        used = self.restarts[service]
        tried = f"is still unhealthy after {used} restart{'s' if used > 1 else ''}"
        what = tried if used else "is unhealthy and may not be restarted"
        hint = "`lem doctor` shows what is missing; then continue with --resume"
        raise InfrastructureError(f"the container of {service} {what}: {status.reason}", hint)

    def make_way(self, place: str, stop: StopRequest | None) -> None:
        """Unload the engines of the other workers until none is on the GPU of a place; an error if one stays."""
        open_ones = {name: item for name, item in self._workers_here.items() if name != place and item.is_open}
        for worker in open_ones.values():
            worker.unload(stop)
        # On this machine nothing outlives an engine, nor in a container that will be replaced.
        service = service_and_image(place)[0]
        slots = {service_and_image(name)[0]: name for name in open_ones if name in self._made}
        others = [name for name in slots if name != service]
        if not others or not self.has_gpu(service) or self._becomes_free(service, others, stop):
            return
        for name in others:
            self._made[slots[name]].stop()
            self.recreate(name)
        if not self._becomes_free(service, others, stop):
            message = f"the GPU of {service} is still in use by the containers of {', '.join(others)} after a restart"
            raise InfrastructureError(message, "if a process hangs in the driver, reset the GPU or reboot")

    def has_gpu(self, service: str) -> bool:
        return bool(self.gpu_uuids) if not service else super().has_gpu(service)

    def try_to_read_gpus(self, service: str) -> GpuReading | None:
        """None if the container does not answer; it is recovered when its worker is opened."""
        if not service or service in self.project.servers:
            return read_gpus()
        try:
            return self.read_gpus(service)
        except ContainerError as error:
            _logger.warning("%s: %s", service, error.message)
            return None

    def _becomes_free(self, service: str, others: Sequence[str], stop: StopRequest | None) -> bool:
        """Whether, within a while, no process of the other containers is left on the GPUs of a service."""
        deadline = time.monotonic() + self._free_timeout_s
        while True:
            if stop is not None and stop.signum is not None:
                raise Interrupted(stop.signum)
            pids = frozenset().union(*(self.pids(name) for name in others))
            reading = self.try_to_read_gpus(service)
            if reading is None or pids.isdisjoint(item.pid for gpu in reading.gpus for item in gpu.processes):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)


def _mark_invalid(path: Path, reason: Reason) -> None:
    try:
        record = read_record(path)
        reasons = (*record.validity.invalid_reasons, reason)
        validity = replace(record.validity, valid=False, invalid_reasons=reasons)
        write_record(path, replace(record, validity=validity))
    except (RecordError, OSError) as error:
        _logger.warning("%s cannot be marked as invalid (%s): %s", path, reason, error)


class ExecutorChoice(NamedTuple):
    name: str  # docker, local
    make: Callable[[], dispatch.Executor]
    describe: Callable[[], str]  # where, and why; may call docker


EXECUTORS = ("auto", "docker", "local")


def choose_executor(
    wanted: str,
    campaign: CampaignConfig,
    plan: Plan,
    *,
    python: str | None = None,
    part: str = "",  # of a campaign on several hosts, which may share a file system
    environ: Mapping[str, str] = os.environ,
) -> ExecutorChoice:
    """The executor for `--executor` and `--python`; UserError if they contradict each other or cannot be satisfied.

    `auto` is docker if the campaign needs it, or if a backend is not installed here and an engine answers.
    """
    if wanted == "docker" and python is not None:
        raise UserError("--python requires the local executor", "omit --python or --executor docker")
    places, is_local = _places(plan), wanted == "local" or python is not None
    backends, needed = services_of(places), next(filter(None, map(needs_container, plan.experiments)), None)
    if not backends and wanted == "docker":
        hint = "server.service runs a command in a container; omit --executor docker to run it here"
        raise UserError("--executor docker: no experiment runs in a container", hint)
    if is_local or not backends:
        _warn_of_container_options(campaign)
        reason = "requested" if is_local else "chosen: no experiment runs in a container"
        is_local = True
    elif wanted == "docker":
        reason = "requested"
    elif needed:
        reason = f"chosen: {needed} needs it"
    elif campaign.cold_start.restart_container:
        reason = "chosen: cold_start.restart_container needs it"
    elif campaign.io.compose_file is not None or campaign.io.env_file is not None:
        reason = "chosen: io.compose_file or io.env_file is set"
    else:
        is_local, reason = _what_is_installed(backends, environ)
    if is_local:
        executor = dispatch.LocalExecutor(python)
        return ExecutorChoice("local", lambda: executor, lambda: f"local, {executor.python} ({reason})")
    project = campaign_project(campaign, Path.cwd(), environ, part)
    place = f"services {', '.join(backends)} of {describe_files(project.files)}"
    return ExecutorChoice(
        "docker",
        lambda: docker_executor(campaign, plan, project),
        lambda: f"docker, {place}, {_images(project, slots_of(places))} ({reason})",
    )


def _places(plan: Plan) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item.place for item in plan.experiments))


def services_of(places: Iterable[str]) -> tuple[str, ...]:
    """The compose services of places, with those that are servers."""
    return tuple(dict.fromkeys(name for place in places if (name := service_and_image(place)[0])))


def slots_of(places: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(slot for place in places if (slot := slot_of(place))))


def _what_is_installed(backends: Sequence[str], environ: Mapping[str, str]) -> tuple[bool, str]:
    found = probe_environment()
    listed = [f"{name} ({', '.join(items)})" for name in backends if (items := missing_distributions(name, found))]
    if not listed:
        return True, f"chosen: {', '.join(backends)} can be imported here"
    absent = f"not installed here: {', '.join(listed)}"
    try:
        Docker(environ).info()
        Docker(environ).compose_version()
    except ContainerError as error:
        return True, f"chosen because containers are not available: {error.message}; {absent}"
    return False, f"chosen: {absent}"


def _warn_of_container_options(campaign: CampaignConfig) -> None:
    for name, is_set in (
        ("io.compose_file", campaign.io.compose_file is not None),
        ("io.env_file", campaign.io.env_file is not None),
        ("health_check", campaign.health_check != CampaignHealthCheckConfig()),
    ):
        if is_set:
            _logger.warning("%s has no effect: it applies to containers, but experiments run in this Python", name)


def _images(project: ComposeProject, slots: Sequence[str]) -> str:
    try:
        services = project.described(services_of(slots))
    except ContainerError as error:
        return f"images unknown: {error.message}"
    pairs = [(services[name], image) for name, image in map(service_and_image, slots) if name in services]
    return "images " + ", ".join(f"{image or service.image or 'none'} ({service.name})" for service, image in pairs)


def docker_executor(
    campaign: CampaignConfig, plan: Plan, project: ComposeProject, gpus: Sequence[GpuFacts] | None = None
) -> DockerExecutor:
    places = _places(plan)
    on_host = [place for place in places if place.startswith(ON_HOST)]
    backends, servers = services_of(places), set(services_of(on_host))
    if both := servers.intersection(services_of(place for place in places if place not in on_host)):
        hint = "name two services, or give all experiments of this one a command, or none"
        raise UserError(f"server.service: {both.pop()} is to be a server itself, and to run a command", hint)
    # A number has the same meaning as for a local engine.
    visible = visible_gpus(find_gpus() if gpus is None else gpus, project.environ)
    uuids = {str(number): gpu.uuid for number, gpu in enumerate(visible)}
    configs = {name: [item.config for item in plan.configurations if item.container == name] for name in backends}
    for name in servers:
        if len({config.gpus for config in configs[name]}) > 1:
            hint = "use a service for each, or server.command, whose {gpus} is filled in"
            raise UserError(f"server.service: {name}: its container cannot have other GPUs in each experiment", hint)
    gpus_of = {name: _gpus_named([item.gpus for item in items], visible) for name, items in configs.items()}
    project = replace(
        project,
        mounts_of={name: local_mounts(items) for name, items in configs.items()},
        gpus_of={name: uuids for name, uuids in gpus_of.items() if uuids is not None},
        servers=frozenset(servers),
    )
    return DockerExecutor(project, places, campaign, uuids)


def campaign_project(
    campaign: CampaignConfig, folder: Path, environ: Mapping[str, str], part: str = ""
) -> ComposeProject:
    io = campaign.io
    env_file = None if io.env_file is None else (folder / io.env_file).absolute()
    environ = compose_variables(io.compose_file, env_file, folder, environ)
    return ComposeProject(
        # Not the slug alone: the user may have a project of that name, which would be taken down with ours.
        name=environ.get(PROJECT_VARIABLE) or f"lem-{campaign.slug}",
        files=find_compose_files(io.compose_file, folder, environ),
        state_folder=(folder / io.state_dir / campaign.slug / part).absolute(),
        working_dir=folder.absolute(),
        results_dir=(folder / io.results_dir).absolute(),
        env_file=env_file,
        environ=environ,
    )


def _gpus_named(lists: Sequence[tuple[str, ...] | None], visible: Sequence[GpuFacts]) -> tuple[str, ...] | None:
    """The UUIDs of the GPUs that experiments name; () if all of them name the CPU, None if they are unknown."""
    if lists and all(names == () for names in lists):
        return ()
    return tuple(sorted({gpu.uuid for names in lists for gpu in named_gpus(names, visible)})) or None
