"""The lab's own logic, and the compose files it is made for, without an engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lem.base.durable import write_json
from lem.base.process import identify
from tests.lab.engine import RECORD, own_engine
from tests.lab.places import BACKENDS, COMPOSE_FILES, LAB_COMPOSE_FILES, MODELS, Places

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120
BASE, OVERLAY = COMPOSE_FILES


class ComposeLoader(yaml.SafeLoader):
    """Reads the tag with which an overlay takes something away."""


ComposeLoader.add_constructor("!reset", lambda _loader, _node: "RESET")


def compose(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), ComposeLoader)  # noqa: S506 - a safe loader with one more tag


def lab(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.lab", *arguments]
    environ = {**os.environ, "LEMTEST_LAB_DIR": str(folder)}
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_status_of_an_empty_folder_names_what_is_missing(tmp_path: Path) -> None:
    finished = lab(tmp_path, "status")
    assert finished.returncode == 1
    parts = [*(f"environments/{backend}" for backend in BACKENDS), *(f"models/{size}" for size in MODELS)]
    for name in (*parts, "models/demo.gguf"):
        assert any(line.startswith("missing:") and name in line for line in finished.stdout.splitlines()), name
    assert finished.stdout.endswith("lab: down\n")
    assert list(tmp_path.iterdir()) == []


def test_variables_are_those_of_the_compose_files(tmp_path: Path) -> None:
    finished = lab(tmp_path / "with blank", "env")
    exported = dict(re.findall(r"^export (\w+)=(.*)$", finished.stdout, re.MULTILINE))
    assert exported.pop("COMPOSE_FILE") == ":".join(map(str, LAB_COMPOSE_FILES))
    used = {name for path in LAB_COMPOSE_FILES for name in re.findall(r"\$\{(\w+)", path.read_text("utf-8"))}
    assert set(exported) <= used
    assert exported["LEM_MODEL_CACHE"] == f"'{tmp_path}/with blank/models'"


def test_engine_whose_number_was_given_to_another_process_is_not_ours(tmp_path: Path) -> None:
    places = Places(tmp_path)
    mine = identify(os.getpid())
    assert mine is not None
    assert own_engine(places) is None
    places.engine.mkdir()
    write_json(places.engine / RECORD, {"pid": mine.pid, "started_ticks": mine.started_ticks})
    found = own_engine(places)
    assert found is not None
    assert found.process == mine
    write_json(places.engine / RECORD, {"pid": mine.pid, "started_ticks": mine.started_ticks - 1})
    assert own_engine(places) is None
    (places.engine / RECORD).write_text("{", encoding="ascii")
    assert own_engine(places) is None


@pytest.mark.parametrize("name", ["pytorch", "vllm", "tensorrt"])
def test_service_is_a_place_to_exec_into_and_no_more(name: str) -> None:
    service = compose(BASE)["services"][name]
    assert service["entrypoint"] == ["sleep", "infinity"]
    assert service["init"] is True
    assert service["pull_policy"] == "never"
    assert service["user"] == "${LEM_UID:-1000}:${LEM_GID:-1000}"
    assert {"HOME", "USER"} <= set(service["environment"])
    assert "privileged" not in service
    assert service["cap_drop"] == ["ALL"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "device_ids": ["${LEM_GPU_IDS:-0}"], "capabilities": ["gpu"]}


@pytest.mark.parametrize("path", LAB_COMPOSE_FILES, ids=lambda path: path.name)
def test_mounts_are_never_made_by_the_engine(path: Path) -> None:
    services = compose(path)["services"]
    mounts = [mount for service in services.values() for mount in service.get("volumes", ())]
    assert mounts
    for mount in mounts:
        assert mount["type"] == "bind"
        assert mount["bind"] == {"create_host_path": False}
    targets = {mount["target"]: mount.get("read_only", False) for mount in mounts}
    assert targets.get("/opt/lem", True) is True


def test_overlay_takes_the_gpu_from_every_service() -> None:
    base, overlay = compose(BASE)["services"], compose(OVERLAY)["services"]
    assert set(overlay) == set(base)
    for name, service in overlay.items():
        assert service["deploy"]["resources"]["reservations"] == "RESET"
        assert ("healthcheck" in base[name]) == (service.get("healthcheck") == "RESET")


@pytest.mark.parametrize("path", LAB_COMPOSE_FILES, ids=lambda path: path.name)
def test_every_variable_is_explained_at_the_top(path: Path) -> None:
    def head(file: Path) -> str:
        return re.split(r"^\w", file.read_text("utf-8"), maxsplit=1, flags=re.MULTILINE)[0]

    text = path.read_text(encoding="utf-8")
    top = head(BASE) + head(OVERLAY) + head(path)
    used = set(re.findall(r"\$\{(\w+)", text))
    assert used
    assert {name for name in used if name not in top} == set()


def test_no_secret_is_in_the_compose_files() -> None:
    for path in COMPOSE_FILES:
        for service in compose(path)["services"].values():
            names = " ".join(map(str, service.get("environment", {}))).upper()
            assert not re.search(r"TOKEN|SECRET|PASSWORD|WEBHOOK", names)


def test_pins_of_the_lab_are_those_of_the_image() -> None:
    def pins(path: Path) -> dict[str, str]:
        return dict(re.findall(r"^([a-z][\w.-]*)==(\S+)$", path.read_text("utf-8"), re.MULTILINE))

    image, environment = (
        pins(ROOT / "docker/requirements-pytorch.txt"),
        pins(ROOT / "tests/lab/requirements-pytorch.txt"),
    )
    common = set(image) & set(environment)
    assert {"transformers", "accelerate"} <= common
    assert {name: image[name] for name in common} == {name: environment[name] for name in common}
    base = re.search(
        r"^ARG BASE=pytorch/pytorch:([\d.]+)-", (ROOT / "docker/Dockerfile.pytorch").read_text("utf-8"), re.MULTILINE
    )
    assert base is not None
    assert base[1] == environment["torch"]
    assert compose(BASE)["services"]["pytorch"]["image"] == f"${{LEM_PYTORCH_IMAGE:-lem-pytorch:{base[1]}}}"
    assert {f"requirements-{backend}.txt" for backend in BACKENDS} == {
        path.name for path in (ROOT / "tests/lab").glob("requirements-*.txt")
    }
