"""A campaign in real containers, whose engine is the trivial one: what goes wrong in it goes wrong for real."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.campaign_rig import CampaignRig, campaign_text
from tests.lab.places import BASE_IMAGE
from tests.processes import wait_for

ROOT = Path(__file__).resolve().parents[1]
DOCKER_TIMEOUT_S = 600
VARIABLE = "LEMTEST_CONTAINER_RIG"

# What a worker looks for before it says that a backend can run.
DISTRIBUTIONS = ("torch", "transformers", "vllm")


def container_campaign(name: str = "demo", **given: Any) -> str:
    """As `campaign_text`, in one cycle, for containers that see the GPUs there are."""
    return campaign_text(name=name, **{"cycles": 1, **given}).replace("    gpus: [[]]\n", "")


def compose_text(folder: Path, name: str, *, image: str = BASE_IMAGE, limit: str = "") -> str:
    """A compose file whose services have the base image, the trivial engine, and names for what it stands in for."""
    service = {
        "image": image,
        "entrypoint": ["sleep", "infinity"],
        "init": True,
        "environment": {
            "PYTHONPATH": "/doubles:/distributions",
            "PYTHONDONTWRITEBYTECODE": "1",
            "LEMTEST_ENGINE_SCRIPT": "${LEMTEST_ENGINE_SCRIPT:-}",
            VARIABLE: name,
        },
        "volumes": [
            {"type": "bind", "source": str(ROOT / "tests" / "doubles"), "target": "/doubles", "read_only": True},
            {"type": "bind", "source": str(folder / "distributions"), "target": "/distributions", "read_only": True},
        ],
        # As in docker/docker-compose.yml: without it, what swaps is not killed but slow.
        **({"mem_limit": limit, "memswap_limit": limit} if limit else {}),
    }
    return json.dumps({"services": {"pytorch": service, "vllm": service}}, indent=2)


class ContainerRig(CampaignRig):
    """One folder with a campaign and a compose file, and the containers of it."""

    def __init__(self, folder: Path, text: str | None = None, *, image: str = BASE_IMAGE, limit: str = "") -> None:
        super().__init__(folder, container_campaign() if text is None else text)
        self.name = secrets.token_hex(6)
        for distribution in DISTRIBUTIONS:
            metadata = folder / "distributions" / f"{distribution}-1.0.dist-info"
            metadata.mkdir(parents=True)
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        self.write(compose_text(folder, self.name, image=image, limit=limit), "docker-compose.yml")

    def environ(self, rules: Sequence[Mapping[str, Any]] = (), **more: str) -> dict[str, str]:
        """As for any campaign; no other compose file is meant, and no pyz is left in the user's cache."""
        found = super().environ(rules, LEM_CACHE_DIR=str(self.folder / "cache"))
        return {**{key: value for key, value in found.items() if not key.startswith("COMPOSE_")}, **more}

    def command(self, *options: str, file: str = "c.yaml") -> list[str]:
        return super().command("--executor", "docker", *options, file=file)

    def containers(self, *, is_all: bool = False) -> dict[str, str]:
        """The ids of this rig's containers that run (or of all) by service."""
        words = ["ps", "--no-trunc", *(["--all"] if is_all else [])]
        words += ["--filter", f"label=com.docker.compose.project.working_dir={self.folder}"]
        lines = docker(*words, "--format", '{{.Label "com.docker.compose.service"}} {{.ID}}').splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def workers_inside(self) -> list[str]:
        """The command lines of what lem started in the containers, as this machine sees them."""
        mine = f"{VARIABLE}={self.name}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit():
                    environ = (folder / "environ").read_bytes().split(b"\0")
                    if mine in environ and any(item.startswith(b"LEM_WORKER_MARK=") for item in environ):
                        found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def workers_left_inside(self, patience_s: float) -> list[str]:
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: None if self.workers_inside() else True, patience_s)
        return self.workers_inside()

    def assert_nothing_inside(self, patience_s: float = 10.0) -> None:
        assert self.workers_left_inside(patience_s) == []

    @contextlib.contextmanager
    def cleaned(self) -> Iterator[ContainerRig]:
        try:
            yield self
        finally:
            self.marker.kill()
            label = f"label=com.docker.compose.project.working_dir={self.folder}"
            if left := list(self.containers(is_all=True).values()):
                projects = docker("ps", "-a", "--filter", label, "--format", '{{.Label "com.docker.compose.project"}}')
                docker("rm", "--force", "--volumes", *left)
                for project in set(projects.split()):
                    networks = docker("network", "ls", "-q", "--filter", f"label=com.docker.compose.project={project}")
                    for network in networks.split():
                        docker("network", "rm", network)


def docker(
    *words: str, stdin: bytes = b"", environ: Mapping[str, str] | None = None, timeout_s: float = DOCKER_TIMEOUT_S
) -> str:
    command = ["docker", *words]
    ended = subprocess.run(command, input=stdin, env=environ, capture_output=True, timeout=timeout_s, check=False)
    assert ended.returncode == 0, f"{' '.join(command)}: {ended.stderr.decode(errors='replace')}"
    return ended.stdout.decode(errors="replace")
