"""Compose files as people have them: `lem campaign` starts each, and the running container shows what took effect."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.campaign_rig import Running
from tests.container_rig import ContainerRig, compose_text, container_campaign, docker

pytestmark = [pytest.mark.needs("lab"), pytest.mark.timeout(600)]

MIB = 1024**2
HANG = [{"at": "generate", "do": "hang"}]


def service(**more: Any) -> str:
    return json.dumps({"services": {"pytorch": more}})


@dataclass(frozen=True)
class Setup:
    """Files beside the campaign, and what the container must be like; `{base}` is a complete compose file."""

    files: dict[str, str]
    sees: Callable[[dict[str, Any], Path], object]  # of `docker inspect`, for comparison with `expected`
    expected: object
    options: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    more: str = ""  # of the campaign
    folder: str = "."  # where the command runs


def _memory(found: dict[str, Any], _folder: Path) -> int:
    memory: int = found["HostConfig"]["Memory"]
    return memory


def _label(found: dict[str, Any], name: str) -> str | None:
    label: str | None = found["Config"]["Labels"].get(name)
    return label


def _variables(found: dict[str, Any]) -> dict[str, str]:
    return dict(item.partition("=")[::2] for item in found["Config"]["Env"])


def _mounts(found: dict[str, Any]) -> dict[str, str]:
    return {item["Destination"]: item.get("Name") or item["Source"] for item in found["Mounts"]}


SETUPS = {
    "an override beside docker-compose.yml": Setup(
        {"docker-compose.yml": "{base}", "docker-compose.override.yml": service(mem_limit="3g")},
        _memory,
        3072 * MIB,
    ),
    "compose.yaml in the folder above, with an override": Setup(
        {"compose.yaml": "{base}", "compose.override.yaml": service(labels={"set": "up"}, volumes=["./data:/data:ro"])},
        lambda found, folder: (_label(found, "set"), _mounts(found)["/data"] == str(folder / "data")),
        ("up", True),
        folder="below",
    ),
    "a list of files in the campaign, which no override joins": Setup(
        {
            "docker-compose.yml": "{base}",
            "docker-compose.override.yml": service(labels={"a": "dropped"}),
            "two.yml": service(mem_limit="200m", labels={"b": "two"}),
            "three.yml": service(mem_limit="300m"),
        },
        lambda found, folder: (_memory(found, folder), _label(found, "a"), _label(found, "b")),
        (300 * MIB, None, "two"),
        more="io: {compose_file: [docker-compose.yml, two.yml, three.yml]}\n",
    ),
    "the flag twice, and a service of a profile": Setup(
        {"one.yml": "{base}", "two.yml": service(profiles=["cpu"], environment={"FROM": "two"})},
        lambda found, _folder: _variables(found)["FROM"],
        "two",
        options=("--compose-file", "one.yml", "--compose-file", "two.yml"),
    ),
    "COMPOSE_FILE and a project in .env": Setup(
        {
            ".env": "COMPOSE_FILE=one.yml;two.yml\nCOMPOSE_PROJECT_NAME=theirs-{name}\nSIZE=400m\n",
            "one.yml": "{base}",
            "two.yml": service(mem_limit="${SIZE}"),
        },
        lambda found, folder: (
            _memory(found, folder),
            _label(found, "com.docker.compose.project") == f"theirs-{_variables(found)['LEMTEST_CONTAINER_RIG']}",
        ),
        (400 * MIB, True),
        environ={"COMPOSE_PATH_SEPARATOR": ";"},
    ),
    "an included file with its own folder, and a volume that exists": Setup(
        {
            "engines/compose.yaml": "{base}",
            "engines/.env": "FLAVOUR=included\n",
            "compose.yaml": json.dumps({"include": ["engines/compose.yaml"], "volumes": {"hub": None}}),
            "compose.override.yaml": service(volumes=["hub:/hub"], environment={"A": "${FLAVOUR:-outer}"}),
        },
        lambda found, folder: (_mounts(found)["/hub"] == f"{folder.name}_hub", _variables(found)["A"]),
        (True, "outer"),
    ),
    "a Docker context, and an overlay of lem's own file": Setup(
        {"docker-compose.override.yml": "{overlay}"},
        lambda found, folder: (_memory(found, folder), found["HostConfig"]["ReadonlyRootfs"]),
        (500 * MIB, True),
        environ={"DOCKER_CONTEXT": "theirs", "LEM_PYTORCH_IMAGE": "lem-lab-base"},
    ),
}


def overlay(folder: Path, name: str) -> str:
    """What the trivial engine needs, and a limit, for the packaged file: no GPU, and no limit on locked memory."""
    given = json.loads(compose_text(folder, name))["services"]["pytorch"]
    needed = {key: given[key] for key in ("environment", "volumes")}
    text = json.dumps({**needed, "deploy": {"resources": {"limits": {"memory": "500m"}}}})
    reset = ', "reservations": !reset null}}, "ulimits": {"memlock": !reset null}}'
    return f'{{"services": {{"pytorch": {text[:-3]}{reset}}}}}'


@pytest.fixture
def rig(tmp_path):
    with ContainerRig(tmp_path).cleaned() as rig:
        (tmp_path / "docker-compose.yml").unlink()
        yield rig


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_a_campaign_uses_compose_files_as_docker_compose_would(rig, setup):
    texts = {"{base}": compose_text(rig.folder, rig.name), "{overlay}": overlay(rig.folder, rig.name)}
    for name in ("data", "engines", setup.folder):
        (rig.folder / name).mkdir(exist_ok=True)
    for name, text in setup.files.items():
        rig.write(texts.get(text, text.replace("{name}", rig.name)), name)
    rig.write(container_campaign(more=setup.more), f"{setup.folder}/c.yaml")
    config = rig.folder / "client"
    environ = {**os.environ, "DOCKER_CONFIG": str(config)}
    docker("context", "create", "theirs", "--docker", "host=unix:///var/run/docker.sock", environ=environ)
    docker("volume", "create", f"{rig.folder.name}_hub")
    try:
        environ = rig.environ(HANG, DOCKER_CONFIG=str(config), **setup.environ)
        command = rig.command("--yes", "--json", *setup.options)
        running = Running(command, rig.folder / setup.folder, environ, is_warm=True)
        running.wait_for_event("phase", phase="window")
        (container,) = rig.containers().values()
        (found,) = json.loads(docker("inspect", container))
        running.send(15)
        ended = running.wait()
    finally:
        docker("volume", "rm", "--force", f"{rig.folder.name}_hub")
    assert setup.sees(found, rig.folder) == setup.expected
    assert ended.code == 143, ended.err
    assert rig.containers(is_all=True) == {}
