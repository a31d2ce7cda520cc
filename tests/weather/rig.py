"""A campaign in real containers of the lab, with the trivial engine inside and a name of its own."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.orchestration.container import ContainerManager
from lem.orchestration.manifest import CampaignManifest, ManifestManager
from tests.campaign_rig import CampaignRig, campaign_text
from tests.container_rig import docker
from tests.doubles.nvml.library import NvmlDouble, build_library
from tests.lab.places import COMPOSE_FILES, Places
from tests.processes import Marker, wait_until_ended

ROOT = Path(__file__).resolve().parents[2]
DOUBLES = ROOT / "tests" / "doubles"
SERVICE = "pytorch"

# What a container runs when nobody sends anything into it.
IDLE = ("sleep", "docker-init", "tini")

# What NVML says in one container alone, until that is replaced; a restart keeps it.
LOCAL_NVML = "/var/tmp/weather-nvml"

# A device whose name says that it is a GPU's, which the engine gives a container without any toolkit.
GPU_DEVICE = Path("/dev/nvidia-lemtest")


class WeatherRig(CampaignRig):
    """One folder with a campaign that runs in containers of its own."""

    def __init__(self, folder: Path, *, name: str | None = None, outputs: Sequence[int] = (4, 8, 16), **more: Any):
        self.name = name or f"weather-{secrets.token_hex(4)}"
        self.project = f"lem-{self.name}"
        self.shared = folder / "shared"  # at the same path inside, and writable on both sides
        self.inside = Marker()  # of every process in the containers
        self.variables: dict[str, str] = {}
        self.options: dict[str, Any] = {}
        self.has_gpu = False
        self.shared.mkdir(parents=True)
        super().__init__(folder, self.text(outputs, **more))
        self.nvml = NvmlDouble(self.shared / "nvml", more=(LOCAL_NVML,))
        self.be()

    def text(self, outputs: Sequence[int], *, top: str = "", **execution: Any) -> str:
        """The campaign: a configuration for each number of output tokens, one cycle unless told otherwise."""
        more = f"io: {{compose_file: '{self.compose_files}'}}\n{top}"
        return campaign_text(name=self.name, outputs=outputs, more=more, **{"cycles": 1, **execution})

    @property
    def override(self) -> Path:
        return self.shared.parent / "weather.yml"

    @property
    def compose_files(self) -> str:
        """The lab's files and the override, as COMPOSE_FILE has them."""
        return ":".join(map(str, (*COMPOSE_FILES, self.override)))

    def be(
        self, *rules: Mapping[str, Any], python_path: Sequence[str] = (), token_s: float = 0.0, **script: Any
    ) -> None:
        """Have the engine follow these rules from the next container on; without any it is good weather."""
        environment = {
            "PYTHONPATH": ":".join([str(DOUBLES), *python_path]),
            "LEMTEST_ENGINE_SCRIPT": json.dumps({"token_s": token_s, "rules": list(rules), **script}).replace(
                "$", "$$"
            ),
            "LEMTEST_MARKER": self.inside.value,
        }
        mounts = [(DOUBLES, True), (self.shared, False)]
        # What is put into one container, outside of /tmp, stays over a restart and goes with the container.
        service: dict[str, Any] = {"environment": environment, "read_only": False, **self.options}
        if self.has_gpu:
            environment |= self.nvml.variables()
            mounts.append((build_library(), True))
            service["devices"] = [f"{GPU_DEVICE}:{GPU_DEVICE}"]
        service["volumes"] = [
            {"type": "bind", "source": str(path), "target": str(path), "read_only": is_read_only}
            for path, is_read_only in mounts
        ]
        self.override.write_text(json.dumps({"services": {SERVICE: service}}, indent=1), encoding="utf-8")

    def give_gpu(self, *lines: str) -> None:
        """Have the service ask for a GPU, and NVML inside it say these lines."""
        with contextlib.suppress(FileExistsError):
            GPU_DEVICE.symlink_to("/dev/null")
            atexit.register(GPU_DEVICE.unlink, missing_ok=True)
        self.nvml.say(*lines)
        self.has_gpu = True
        self.be()

    def environ(self, rules: Sequence[Mapping[str, Any]] = (), **more: str) -> dict[str, str]:
        """The environment of lem on the host, which has no engine and no double."""
        assert not rules, "the engine runs in the containers: rig.be(...)"
        plain = {
            name: value for name, value in os.environ.items() if not name.startswith(("LEM", "COMPOSE_", "DOCKER_"))
        }
        own = {
            "PYTHONPATH": str(ROOT),
            "LEM_LOCK_DIR": str(self.folder / "locks"),
            "LEM_CACHE_DIR": str(ROOT / "build" / "weather-cache"),
            "LEM_SHM_SIZE": "64m",
            "HF_HUB_OFFLINE": "1",
        }
        return {
            **plain,
            **Places.of().variables(),
            "LEMTEST_MARKER": self.marker.value,
            **own,
            **self.variables,
            **more,
        }

    def manager(self) -> ContainerManager:
        """The containers as a script of a person's own would use them, in a project of this rig."""
        manager = ContainerManager(self.compose_files, self.folder, environ=self.environ())
        manager.project = dataclasses.replace(manager.project, name=self.project)
        return manager

    def command(self, *options: str, file: str = "c.yaml") -> list[str]:
        return [sys.executable, "-m", "lem", "campaign", file, "--executor", "docker", *options]

    def manifest(self, campaign: str = "") -> CampaignManifest:
        path = self.folder / ".state" / (campaign or self.name) / "campaign_manifest.json"
        manifest = ManifestManager(path).load_strict()
        assert manifest is not None
        return manifest

    def has_manifest(self) -> bool:
        return (self.folder / ".state" / self.name / "campaign_manifest.json").exists()

    def docker(self, *words: str) -> str:
        return docker(*words).strip()

    def containers(self) -> list[str]:
        return self.docker("ps", "-aq", "--filter", f"label=com.docker.compose.project={self.project}").split()

    def container(self) -> str:
        (found,) = self.docker("ps", "-q", "--filter", f"label=com.docker.compose.project={self.project}").split()
        return found

    def workers_left(self, patience_s: float = 10.0) -> tuple[str, ...]:
        """Processes of lem, on both sides of the channel, that are still there after a while."""
        deadline = time.monotonic() + patience_s
        pids = (*self.marker.pids(), *self.pids_inside())
        left = [pid for pid in pids if not wait_until_ended(pid, deadline - time.monotonic())]
        return tuple(f"{pid}: {_command(pid)}" for pid in left)

    def pids_inside(self) -> tuple[int, ...]:
        """Processes in the containers beside the one that sleeps."""
        return tuple(pid for pid in self.inside.pids() if Path(_command(pid).split(" ")[0]).name not in IDLE)

    @contextlib.contextmanager
    def cleaned(self) -> Iterator[WeatherRig]:
        try:
            yield self
        finally:
            self.marker.kill()
            if found := self.containers():
                self.docker("rm", "--force", "--volumes", *found)
            for network in self.docker(
                "network", "ls", "-q", "--filter", f"label=com.docker.compose.project={self.project}"
            ).split():
                self.docker("network", "rm", network)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return ""
