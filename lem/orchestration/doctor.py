"""Whether this host is fit to measure."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lem.base.clock import Clock
from lem.base.dataclass import dataclass, field
from lem.base.errors import UserError
from lem.base.measurement import INTERFERENCE_FROM, is_counter
from lem.base.units import GIB, some_of
from lem.engines.named import find_server_problem
from lem.meters.capabilities import Capabilities, CpuCapability, GpuCapability, describe_power, find_capabilities
from lem.meters.control import find_notes
from lem.meters.nvml import GpuReading, open_nvml, read_gpus
from lem.meters.usage import HERE, Limits, Roots, watch_machine
from lem.orchestration.compose import (
    ComposeProject,
    compose_variables,
    describe_files,
    find_compose_files,
    with_image,
)
from lem.orchestration.docker import (
    CPU_OVERRIDE,
    INSTALL_TOOLKIT,
    PUBLISH_HINT,
    ContainerError,
    Docker,
    Service,
)
from lem.orchestration.locks import default_gpu_lock_folder
from lem.orchestration.plan import ON_HOST, Experiment, Plan, service_and_image, slot_of
from lem.orchestration.served import find_server

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"

# Long enough for three changes of a counter that is updated every half second; most take a quarter of that.
PROBE_S = 2.5

# A moment of another program is no interference.
INTERFERENCE_S = 1.0

# A campaign's results are small; images and models are not.
LEAST_DISK_B = 1 * GIB
ENOUGH_DISK_B = 10 * GIB
_MAX_SHOWN = 4
_CLOCK_UNSYNCHRONISED = 5  # TIME_ERROR, adjtimex(2)
_TIMEX_SIZE_B = 512  # struct timex has 208 bytes on 64-bit Linux


@dataclass(frozen=True)
class Finding:
    status: str  # ok, warning, failed, or skipped: it does not apply, or an earlier check failed for the same reason
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Verdict:
    findings: Mapping[str, Finding]  # by the name of the check, in order

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(name for name, item in self.findings.items() if item.status == FAILED)

    @property
    def executors(self) -> tuple[str, ...]:
        return ("docker",) * (not self.failed) + ("local",) * (FOR_CONTAINERS.issuperset(self.failed))


@dataclass(frozen=True)
class Host:
    folder: Path  # where relative paths start
    compose_files: tuple[str, ...] = ()
    env_file: Path | None = None
    # Those that the campaign needs, with the images of a grid as in `slot_of`; () for any one of the compose file's.
    backends: tuple[str, ...] = ()
    results_dir: Path = Path("results")
    state_dir: Path = Path(".state")
    experiments: tuple[Experiment, ...] = ()  # of the campaign, one of each configuration
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    device_folder: Path = Path("/dev")
    roots: Roots = HERE
    clock: Clock = field(default_factory=Clock)

    @functools.cached_property
    def engine(self) -> Mapping[str, Any]:
        """`docker info`; ContainerError if the engine does not answer."""
        return Docker(self.environ).info()

    @functools.cached_property
    def compose_version(self) -> str:
        return ".".join(map(str, Docker(self.environ).compose_version()))

    @functools.cached_property
    def needed(self) -> tuple[Service, ...]:
        """The services of the named backends, else all; ContainerError if one is missing or the files are not valid."""
        _ = self.compose_version
        services = ComposeProject(
            name="lem-doctor",
            files=self.files,
            state_folder=self.folder / self.state_dir,
            working_dir=self.folder,
            results_dir=self.folder / self.results_dir,
            env_file=self.env_file,
            environ=self._variables,
        ).described(tuple(dict.fromkeys(service_and_image(slot)[0] for slot in self.backends)))
        pairs = map(service_and_image, self.backends or services)
        return tuple(with_image(services[name], image) for name, image in pairs)

    @functools.cached_property
    def gpus(self) -> GpuReading:
        return read_gpus()

    @functools.cached_property
    def capabilities(self) -> Capabilities:
        with open_nvml() as nvml:
            return find_capabilities(nvml, Clock(), probe_s=PROBE_S, roots=self.roots)

    @property
    def has_gpu_device(self) -> bool:
        return bool(self.gpus.gpus) or any(self.device_folder.glob("nvidia[0-9]*"))

    @property
    def files(self) -> tuple[Path, ...]:
        return find_compose_files(self.compose_files, self.folder, self._variables)

    @property
    def _variables(self) -> Mapping[str, str]:
        return compose_variables(self.compose_files, self.env_file, self.folder, self.environ)


def host_of(plan: Plan) -> Host:
    """This machine for a campaign."""
    io, items = plan.campaign.io, plan.configurations
    env_file = None if io.env_file is None else Path(io.env_file).absolute()
    services = tuple(dict.fromkeys(slot for item in items if (slot := slot_of(item.place))))
    folders = Path(io.results_dir), Path(io.state_dir)
    return Host(Path.cwd(), io.compose_file or (), env_file, services, *folders, experiments=items)


def examine(host: Host, names: Collection[str] | None = None) -> Verdict:
    findings: dict[str, Finding] = {}
    reported_by: dict[Finding, str] = {}
    for name, look in CHECKS.items():
        if names is not None and name not in names:
            continue
        try:
            found = look(host)
        except UserError as error:
            found = Finding(FAILED, error.message, error.hint)
        if found in reported_by:
            found = Finding(SKIPPED, f"not checked, see {reported_by[found]}")
        elif found.status == FAILED:
            reported_by[found] = name
        findings[name] = found
    return Verdict(findings)


def _rank(gpu: GpuCapability) -> tuple[bool, ...]:
    return gpu.meter.covered_by is not None, gpu.source is not None, is_counter(gpu.source)


def check_gpu_energy(found: Capabilities) -> Finding:
    """Whether every GPU has an energy counter, and its resolution; at most a warning."""
    if not found.gpus:
        return Finding(SKIPPED, found.gpu_error or "no GPU to check")
    worst_first = sorted(found.gpus, key=_rank)
    lines = [f"{gpu.meter.label}: {'; '.join(gpu.describe())}" for gpu in worst_first]
    shown = some_of(lines, _MAX_SHOWN, " · ")
    sources = [gpu.source for gpu in found.gpus if gpu.meter.covered_by is None]
    if all(map(is_counter, sources)):
        return Finding(OK, shown)
    if None not in sources:
        remedy = "energy is integrated from power and labelled so; measurement.energy: nvml refuses that"
    else:
        remedy = "GPU energy is null in the records until then; measurement.energy: nvml refuses to run"
    return Finding(WARNING, shown, remedy)


def check_cpu_energy(cpu: CpuCapability) -> Finding:
    if cpu.rapl_error is None:
        text = f"RAPL can be read: {', '.join(cpu.zones)}"
        return Finding(WARNING, f"{text}; not {'; '.join(cpu.missing)}") if cpu.missing else Finding(OK, text)
    estimate = "" if cpu.tdp_w is None else f"; tdp_estimate would use {cpu.tdp_w:g} W ({cpu.tdp_source})"
    return Finding(WARNING, f"{cpu.rapl_error}{estimate}", cpu.rapl_remedy)


def check_sensors(found: Capabilities) -> Finding:
    """The sensors of hwmon for what has no other meter: the module, the CPUs, the machine."""
    if not found.sensors:
        return Finding(SKIPPED, "no hwmon sensor of the module, the CPUs or the machine")
    usable = [it for it in found.sensors if it.power_error is None]
    text = "; ".join(f"{describe_power(it)} covers {it.energy_scope}" for it in usable)
    errors = "; ".join(f"{it.uuid}: {it.power_error}" for it in found.sensors if it.power_error is not None)
    if errors:
        return Finding(WARNING, f"{text}; cannot be used: {errors}" if text else f"cannot be used: {errors}")
    return Finding(OK, text)


def _check_images(host: Host) -> Finding:
    _ = host.engine
    docker = Docker(host.environ)
    missing = [item for item in host.needed if item.image is None or docker.image_id(item.image) is None]
    names = ", ".join(f"{item.image or 'unnamed'} ({item.name})" for item in missing)
    if not missing:
        return Finding(OK, f"all found: {', '.join(sorted({str(item.image) for item in host.needed}))}")
    # Without named backends, the campaign may use only those that have an image.
    is_enough = not host.backends and len(missing) < len(host.needed)
    ways = ", ".join(item.how_to_get for item in missing)
    remedy = f"run {ways}, or load it; a campaign needs only the images of its backends"
    return Finding(WARNING if is_enough else FAILED, f"missing: {names}", remedy)


def _check_servers(host: Host) -> Finding:
    found = [item for item in host.experiments if item.server is not None]
    if not found:
        return Finding(SKIPPED, "no campaign with backend server was given")
    unread = []
    for item in found:
        if item.place.startswith(ON_HOST):
            if (problem := find_server_problem(item.config)) is not None:
                return Finding(FAILED, problem.message, problem.hint)
            unread += [why] if (why := find_server(item.config, host.environ)[1]) is not None else []
            hidden = [it.name for it in host.needed if it.name == item.container and it.url is None]
            if hidden:
                return Finding(FAILED, f"service {hidden[0]} publishes no port under a fixed number", PUBLISH_HINT)
    text = "; ".join(dict.fromkeys(str(item.server) for item in found))
    if unread:
        return Finding(WARNING, f"{text}; energy will be null: {unread[0]}", "run lem on its machine, as its user")
    return Finding(OK, text)


def _check_driver(host: Host) -> Finding:
    if not host.has_gpu_device:
        return Finding(SKIPPED, "no NVIDIA GPU on this machine")
    reading = host.gpus
    if reading.error is not None:
        remedy = "run nvidia-smi for details; reboot after a driver update"
        return Finding(FAILED, f"this machine has a GPU, but NVML reports: {reading.error}", remedy)
    names = ", ".join(gpu.name for gpu in reading.gpus)
    return Finding(OK, f"driver {reading.driver}, {names}")


def _check_gpu_runtime(host: Host) -> Finding:
    wanting = [item.name for item in host.needed if item.has_gpu]
    if not wanting:
        return Finding(SKIPPED, "no service reserves a GPU")
    runtimes, devices = host.engine.get("Runtimes") or {}, host.engine.get("DiscoveredDevices") or ()
    if "nvidia" in runtimes:
        found = "the nvidia runtime is installed"
    elif any("nvidia.com/gpu" in str(device) for device in devices):
        found = "GPUs are available through CDI"
    else:
        remedy = f"{INSTALL_TOOLKIT} Docker" if host.has_gpu_device else f"without a GPU, {CPU_OVERRIDE}"
        return Finding(FAILED, f"{', '.join(wanting)} need a GPU, which the Docker engine cannot provide", remedy)
    if not host.has_gpu_device:
        return Finding(FAILED, f"{found}, but no GPU", CPU_OVERRIDE)
    return Finding(OK, found)


def _check_foreign_processes(host: Host) -> Finding:
    if not host.gpus.gpus:
        return Finding(SKIPPED, "no GPU to check")
    found = [f"{item.pid} on GPU {gpu.index}" for gpu in host.gpus.gpus for item in gpu.processes]
    if not found:
        return Finding(OK, "no processes on the GPUs")
    return Finding(WARNING, f"processes on the GPUs: {some_of(found, _MAX_SHOWN)}", "end them, or use another GPU")


def _check_settings(host: Host) -> Finding:
    folder = default_gpu_lock_folder(host.environ)
    left = [path.name for path in (*find_notes(folder), *find_notes(folder, of_others=True))]
    if left:
        text = f"settings of GPUs that a campaign holds, or left when it was killed: {some_of(left, _MAX_SHOWN)}"
        return Finding(WARNING, f"{text} (in {folder})", "lem doctor --restore restores those that were left")
    return Finding(OK, "no GPU settings were left by a killed campaign")


def _check_interference(host: Host) -> Finding:
    """What would keep an engine from the CPUs if it ran now."""
    try:
        load = watch_machine(host.clock, host.roots, os.getpid(), INTERFERENCE_S)
    except (OSError, ValueError) as error:
        return Finding(SKIPPED, f"the use of the CPUs cannot be read: {error}")
    found, remedies = [], []
    if load.foreign > INTERFERENCE_FROM * load.cpus:
        named = [f"{name} {cpus:.2f}" for name, cpus in load.programs]
        found.append(f"other programs use {load.foreign:.1f} of {load.cpus:.0f} CPUs: {some_of(named, _MAX_SHOWN)}")
        remedies.append("end them, or measure when they have ended")
    if load.stolen > INTERFERENCE_FROM * load.cpus:
        found.append(f"the hypervisor gives {load.stolen:.1f} of {load.cpus:.0f} CPUs to other machines (steal)")
        remedies.append("use a machine with dedicated CPUs")
    limit = Limits(host.roots, os.getpid()).cpus
    if limit is not None and limit < load.cpus:
        found.append(
            f"a cgroup limits lem to {limit:g} of {load.cpus:.0f} CPUs, and with it engines of --executor local"
        )
        remedies.append("raise the limit (CPUQuota= of systemd, --cpus of docker)")
    if found:
        return Finding(WARNING, "; ".join(found), "; ".join(remedies))
    return Finding(OK, f"other programs use {load.foreign:.2f} of {load.cpus:.0f} CPUs")


def _check_rights(host: Host) -> Finding:
    for folder in (host.folder / host.results_dir, host.folder / host.state_dir):
        there = _existing(folder)
        if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
            return Finding(FAILED, f"{there} cannot be written", "change its owner, or choose another folder")
    closed = [str(path) for path in sorted(host.device_folder.glob("nvidia[0-9]*")) if not os.access(path, os.R_OK)]
    if closed:
        return Finding(FAILED, f"this user has no access to {', '.join(closed)}", "join their group (video)")
    return Finding(OK, f"results and state can be written as user {os.getuid()}")


def _check_disk(host: Host) -> Finding:
    folders = {"results": host.folder / host.results_dir}
    with contextlib.suppress(ContainerError):
        root = host.engine.get("DockerRootDir")
        if root and os.access(root, os.R_OK):  # it may be on another machine, or only for root
            folders["Docker"] = Path(root)
    free_b = {name: shutil.disk_usage(_existing(folder)).free for name, folder in folders.items()}
    text = ", ".join(f"{value / GIB:.1f} GiB for {name}" for name, value in free_b.items())
    if min(free_b.values()) < LEAST_DISK_B:
        remedy = "free some space; `docker system df` shows what Docker uses"
        return Finding(FAILED, f"the disk is nearly full: {text}", remedy)
    status = WARNING if min(free_b.values()) < ENOUGH_DISK_B else OK
    return Finding(status, f"free: {text}", "an image of an engine takes 10 to 30 GB" if status == WARNING else "")


def _check_clock() -> Finding:
    libc = ctypes.CDLL(None, use_errno=True)
    state = libc.adjtimex(ctypes.create_string_buffer(_TIMEX_SIZE_B))
    if state < 0:
        return Finding(SKIPPED, f"the kernel does not report it: {os.strerror(ctypes.get_errno())}")
    if state == _CLOCK_UNSYNCHRONISED:
        remedy = "timedatectl set-ntp true, or install chrony; durations are not affected"
        return Finding(WARNING, "the clock is not synchronised: times of several hosts cannot be compared", remedy)
    return Finding(OK, "the clock is synchronised")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


# A UserError that one raises is a finding, too.
CHECKS: Mapping[str, Callable[[Host], Finding]] = {
    "engine": lambda host: Finding(OK, f"Docker {host.engine['ServerVersion']} answers"),
    "compose": lambda host: Finding(OK, f"docker compose {host.compose_version}"),
    "compose_file": lambda host: Finding(
        OK, f"{describe_files(host.files)}: {', '.join(item.name for item in host.needed)}"
    ),
    "images": _check_images,
    "servers": _check_servers,
    "driver": _check_driver,
    "gpu_runtime": _check_gpu_runtime,
    "gpu_processes": _check_foreign_processes,
    "gpu_settings": _check_settings,
    "interference": _check_interference,
    "gpu_energy": lambda host: check_gpu_energy(host.capabilities),
    "cpu_energy": lambda host: check_cpu_energy(host.capabilities.cpu),
    "sensors": lambda host: check_sensors(host.capabilities),
    "rights": _check_rights,
    "disk": _check_disk,
    "clock": lambda _host: _check_clock(),
}
# What the local executor does not need.
FOR_CONTAINERS = frozenset({"engine", "compose", "compose_file", "images", "gpu_runtime"})
