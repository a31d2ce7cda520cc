"""Whether this host is fit to measure."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lem.base.clock import SystemClock
from lem.base.errors import UserError
from lem.base.measurement import EnergySource
from lem.base.units import GIB
from lem.meters.nvml import GpuReading, open_nvml, read_gpus
from lem.meters.rapl import POWERCAP
from lem.meters.sources import Capabilities, CpuCapability, find_capabilities
from lem.orchestration.compose import Compose, Service, find_compose_files
from lem.orchestration.docker import ContainerError, Docker
from lem.orchestration.services import ComposeProject

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"


_MAX_SHOWN = 4


def some_shown(texts: Sequence[str], separator: str = ", ") -> str:
    """The first few texts, and `…` where there are more."""
    return separator.join(texts[:_MAX_SHOWN]) + (" …" if len(texts) > _MAX_SHOWN else "")


@dataclass(frozen=True)
class Finding:
    """What a check came to.

    Attributes:
        status: `ok`, `warning`, `failed`, or `skipped` where it does not apply or something before it failed.
        remedy: what to do about it; empty when there is nothing to do.
    """

    status: str
    message: str
    remedy: str = ""


# Long enough for three changes of a counter that is updated every half second; most take a quarter of that.
PROBE_S = 2.5


def look_at_gpu_energy(found: Capabilities) -> Finding:
    """Whether every GPU has an energy counter, and how fine it is; none of it keeps a campaign from running."""
    if not found.gpus:
        return Finding(SKIPPED, found.gpu_error or "no GPU to look at")
    worst_first = sorted(found.gpus, key=lambda gpu: (gpu.source is not None, gpu.source == EnergySource.COUNTER))
    lines = [f"{gpu.meter.label}: {'; '.join(gpu.describe())}" for gpu in worst_first]
    shown = some_shown(lines, " · ")
    if all(gpu.source == EnergySource.COUNTER for gpu in found.gpus):
        return Finding(OK, shown)
    if all(gpu.source is not None for gpu in found.gpus):
        remedy = "energy is integrated from power and labelled so; measurement.energy: nvml refuses that"
    else:
        remedy = "GPU energy is null in the records until then; measurement.energy: nvml refuses to run"
    return Finding(WARNING, shown, remedy)


def look_at_cpu_energy(cpu: CpuCapability) -> Finding:
    """Whether the counters of the CPU packages can be read."""
    if cpu.rapl_error is None:
        text = f"RAPL can be read: {', '.join(cpu.zones)}"
        return Finding(WARNING, f"{text}; not {'; '.join(cpu.missing)}") if cpu.missing else Finding(OK, text)
    estimate = "" if cpu.tdp_w is None else f"; tdp_estimate would use {cpu.tdp_w:g} W ({cpu.tdp_source})"
    return Finding(WARNING, f"{cpu.rapl_error}{estimate}", cpu.rapl_remedy)


# A campaign's results are small; images and models are not.
LEAST_DISK_B = 1 * GIB
ENOUGH_DISK_B = 10 * GIB

_CLOCK_UNSYNCHRONISED = 5  # TIME_ERROR, adjtimex(2)
_TIMEX_SIZE_B = 512  # struct timex has 208 bytes on 64-bit Linux


@dataclass(frozen=True)
class Verdict:
    """What all checks came to.

    Attributes:
        findings: by the name of the check, in order.
        container_checks: the names of those that matter to containers alone.
    """

    findings: Mapping[str, Finding]
    container_checks: frozenset[str] = frozenset()

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that failed."""
        return tuple(name for name, item in self.findings.items() if item.status == FAILED)

    @property
    def is_ok(self) -> bool:
        """Whether a campaign can run in containers here."""
        return not self.failed

    @property
    def is_ok_without_containers(self) -> bool:
        """Whether nothing stands in the way of `--executor local`; which engines its Python has is not looked at."""
        return self.container_checks.issuperset(self.failed)

    @property
    def executors(self) -> tuple[str, ...]:
        """The executors that the host is fit for."""
        is_fit = {"docker": self.is_ok, "local": self.is_ok_without_containers}
        return tuple(name for name, is_fit_for_it in is_fit.items() if is_fit_for_it)


@dataclass(frozen=True)
class Host:
    """This machine, and what a campaign would use of it; each fact is looked up once.

    Attributes:
        folder: where relative paths start.
        backends: that the campaign needs; () for any one of the compose file's.
    """

    folder: Path
    compose_file: str | None = None
    env_file: Path | None = None
    backends: tuple[str, ...] = ()
    results_dir: Path = Path("results")
    state_dir: Path = Path(".state")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    device_folder: Path = Path("/dev")
    rapl_root: Path = POWERCAP

    @functools.cached_property
    def engine(self) -> Mapping[str, Any]:
        """What the Docker engine says of itself.

        Raises:
            ContainerError: it says nothing.
        """
        return Docker(self.environ).info()

    @functools.cached_property
    def compose_version(self) -> tuple[int, ...]:
        """The version of docker compose.

        Raises:
            ContainerError: there is none.
        """
        return Compose(Docker(self.environ), "lem-doctor", ()).version()

    @functools.cached_property
    def services(self) -> Mapping[str, Service]:
        """The services of the compose files.

        Raises:
            ContainerError: there are no valid ones.
        """
        _ = self.compose_version
        with tempfile.TemporaryDirectory(prefix="lem-doctor-") as scratch:
            return self._project(Path(scratch)).described()

    @functools.cached_property
    def needed(self) -> tuple[Service, ...]:
        """The services of the backends named, else all that there are.

        Raises:
            ContainerError: the compose files are not valid, or lack one of them.
        """
        missing = [name for name in self.backends if name not in self.services]
        if missing:
            raise ContainerError(
                f"{self.files_described} has no service {', '.join(missing)}", "see lem compose", kind="service"
            )
        return tuple(self.services[name] for name in self.backends or self.services)

    @functools.cached_property
    def gpus(self) -> GpuReading:
        """The GPUs as NVML sees them."""
        return read_gpus()

    @functools.cached_property
    def capabilities(self) -> Capabilities:
        """The meters of energy, each energy counter looked at for a moment."""
        with open_nvml() as nvml:
            return find_capabilities(nvml, SystemClock(), probe_s=PROBE_S, rapl_root=self.rapl_root)

    @property
    def has_gpu_device(self) -> bool:
        """Whether the kernel has an NVIDIA GPU, also where NVML cannot reach it."""
        return bool(self.gpus.gpus) or any(self.device_folder.glob("nvidia[0-9]*"))

    @property
    def files_described(self) -> str:
        """The compose files."""
        return find_compose_files(self.compose_file, self.folder, self.environ).describe()

    def _project(self, scratch: Path) -> ComposeProject:
        return ComposeProject(
            name="lem-doctor",
            files=find_compose_files(self.compose_file, self.folder, self.environ),
            state_folder=scratch,
            working_dir=self.folder,
            results_dir=self.folder / self.results_dir,
            env_file=self.env_file,
            environ=self.environ,
        )


@dataclass(frozen=True)
class Check:
    """One thing to look at.

    Attributes:
        is_for_containers: nothing else needs it.
    """

    name: str
    look: Callable[[Host], Finding]
    is_for_containers: bool = False

    def run(self, host: Host) -> Finding:
        """What it came to; what stands in its way is a finding, too."""
        try:
            return self.look(host)
        except UserError as error:
            return Finding(FAILED, error.message, error.hint)


def examine(host: Host, checks: Sequence[Check]) -> Verdict:
    """What the checks came to; what stands in the way of several is told by the first of them alone."""
    findings: dict[str, Finding] = {}
    told_by: dict[Finding, str] = {}
    for check in checks:
        found = check.run(host)
        if found in told_by:
            found = Finding(SKIPPED, f"not looked at, see {told_by[found]}")
        elif found.status == FAILED:
            told_by[found] = check.name
        findings[check.name] = found
    return Verdict(findings, frozenset(check.name for check in checks if check.is_for_containers))


def _check_engine(host: Host) -> Finding:
    return Finding(OK, f"Docker {host.engine['ServerVersion']} answers")


def _check_compose(host: Host) -> Finding:
    return Finding(OK, f"docker compose {'.'.join(map(str, host.compose_version))}")


def _check_compose_file(host: Host) -> Finding:
    services = ", ".join(item.name for item in host.needed)
    return Finding(OK, f"{host.files_described}: {services}")


def _check_images(host: Host) -> Finding:
    _ = host.engine
    docker = Docker(host.environ)
    missing = [item for item in host.needed if item.image is None or docker.image_id(item.image) is None]
    names = ", ".join(f"{item.image or 'unnamed'} ({item.name})" for item in missing)
    if not missing:
        return Finding(OK, f"all there: {', '.join(sorted({str(item.image) for item in host.needed}))}")
    # Who names no backend may mean to use the others alone.
    is_enough = not host.backends and len(missing) < len(host.needed)
    remedy = "pull, build or load it; only the images of the backends that a campaign uses are needed"
    return Finding(WARNING if is_enough else FAILED, f"not there: {names}", remedy)


def _check_driver(host: Host) -> Finding:
    if not host.has_gpu_device:
        return Finding(SKIPPED, "no NVIDIA GPU on this machine")
    reading = host.gpus
    if reading.error is not None:
        remedy = "nvidia-smi says more; after an update of the driver, reboot"
        return Finding(FAILED, f"a GPU is here, but NVML says: {reading.error}", remedy)
    names = ", ".join(gpu.name for gpu in reading.gpus)
    return Finding(OK, f"driver {reading.driver}, {names}")


def _check_gpu_runtime(host: Host) -> Finding:
    wanting = [item.name for item in host.needed if item.has_gpu]
    if not wanting:
        return Finding(SKIPPED, "no service reserves a GPU")
    runtimes, devices = host.engine.get("Runtimes") or {}, host.engine.get("DiscoveredDevices") or ()
    if "nvidia" in runtimes:
        found = "the nvidia runtime is there"
    elif any("nvidia.com/gpu" in str(device) for device in devices):
        found = "GPUs are known by CDI"
    else:
        remedy = (
            "install the NVIDIA Container Toolkit, then: nvidia-ctk runtime configure --runtime=docker, and restart"
        )
        if not host.has_gpu_device:
            remedy = "without a GPU, lay docker/docker-compose.cpu.yml over the compose file"
        return Finding(FAILED, f"{', '.join(wanting)} want a GPU, which the Docker engine cannot give", remedy)
    if not host.has_gpu_device:
        return Finding(FAILED, f"{found}, but no GPU", "lay docker/docker-compose.cpu.yml over the compose file")
    return Finding(OK, found)


def _check_foreign_processes(host: Host) -> Finding:
    if not host.gpus.gpus:
        return Finding(SKIPPED, "no GPU to look at")
    found = [f"{item.pid} on GPU {gpu.index}" for gpu in host.gpus.gpus for item in gpu.processes]
    if not found:
        return Finding(OK, "nobody computes on the GPUs")
    return Finding(
        WARNING, f"processes compute on the GPUs: {some_shown(found)}", "end them, or measure on another GPU"
    )


def _check_gpu_energy(host: Host) -> Finding:
    return look_at_gpu_energy(host.capabilities)


def _check_cpu_energy(host: Host) -> Finding:
    return look_at_cpu_energy(host.capabilities.cpu)


def _check_rights(host: Host) -> Finding:
    for folder in (host.folder / host.results_dir, host.folder / host.state_dir):
        there = _existing(folder)
        if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
            return Finding(FAILED, f"{there} cannot be written", "make it yours, or name another folder")
    closed = [str(path) for path in sorted(host.device_folder.glob("nvidia[0-9]*")) if not os.access(path, os.R_OK)]
    if closed:
        return Finding(FAILED, f"this user may not use {', '.join(closed)}", "join the group that owns them (video)")
    return Finding(OK, f"results and state can be written as user {os.getuid()}")


def _check_disk(host: Host) -> Finding:
    folders = {"results": host.folder / host.results_dir}
    root = _root_of(host)
    if root is not None:
        folders["Docker"] = root
    free_b = {name: shutil.disk_usage(_existing(folder)).free for name, folder in folders.items()}
    text = ", ".join(f"{value / GIB:.1f} GiB for {name}" for name, value in free_b.items())
    if min(free_b.values()) < LEAST_DISK_B:
        return Finding(
            FAILED, f"the disk is nearly full: {text}", "make room: docker system df shows what Docker holds"
        )
    status = WARNING if min(free_b.values()) < ENOUGH_DISK_B else OK
    return Finding(status, f"free: {text}", "an image of an engine takes 10 to 30 GB" if status == WARNING else "")


def _root_of(host: Host) -> Path | None:
    """The data folder of the engine, where it is on this machine and can be seen."""
    try:
        root = host.engine.get("DockerRootDir")
    except ContainerError:
        return None
    return Path(root) if root and os.access(root, os.R_OK) else None


def _check_clock(host: Host) -> Finding:  # noqa: ARG001 - as every check is called
    libc = ctypes.CDLL(None, use_errno=True)
    state = libc.adjtimex(ctypes.create_string_buffer(_TIMEX_SIZE_B))
    if state < 0:
        return Finding(SKIPPED, f"the kernel does not tell: {os.strerror(ctypes.get_errno())}")
    if state == _CLOCK_UNSYNCHRONISED:
        remedy = "timedatectl set-ntp true, or install chrony; durations are right all the same"
        return Finding(WARNING, "the clock is not synchronised: times of several hosts cannot be compared", remedy)
    return Finding(OK, "the clock is synchronised")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


CHECKS: Sequence[Check] = (
    Check("engine", _check_engine, is_for_containers=True),
    Check("compose", _check_compose, is_for_containers=True),
    Check("compose_file", _check_compose_file, is_for_containers=True),
    Check("images", _check_images, is_for_containers=True),
    Check("driver", _check_driver),
    Check("gpu_runtime", _check_gpu_runtime, is_for_containers=True),
    Check("gpu_processes", _check_foreign_processes),
    Check("gpu_energy", _check_gpu_energy),
    Check("cpu_energy", _check_cpu_energy),
    Check("rights", _check_rights),
    Check("disk", _check_disk),
    Check("clock", _check_clock),
)
