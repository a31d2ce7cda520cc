"""Campaigns over two images of a service: real containers, with the trivial engine and with two real transformers."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.results.compare import compare_configurations
from lem.results.run import read_run
from tests.container_rig import ContainerRig, container_campaign, docker
from tests.lab.places import BASE_IMAGE, COMPOSE_FILES, Places

pytestmark = [pytest.mark.needs("lab"), pytest.mark.timeout(900)]

PINNED = "5.22.0"  # the lab has a later one
IN_IMAGE = "/opt/pinned"


@contextlib.contextmanager
def built(folder: Path, *lines: str) -> Iterator[str]:
    """An image on top of the lab's, which is removed in the end."""
    name = f"lem-test-{secrets.token_hex(4)}:1"
    (folder / "Dockerfile").write_text("\n".join([f"FROM {BASE_IMAGE}", *lines]) + "\n")
    docker("build", "--quiet", "--tag", name, str(folder))
    try:
        yield name
    finally:
        docker("image", "rm", name)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ContainerRig]:
    (tmp_path / "rig").mkdir()
    with ContainerRig(tmp_path / "rig").cleaned() as rig:
        yield rig


@pytest.fixture
def other(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "image"
    folder.mkdir()
    (folder / "mark").write_text("other\n")
    with built(folder, "COPY mark /opt/mark") as name:
        yield name


def _image_id(name: str) -> str:
    return docker("image", "inspect", "--format", "{{.Id}}", name).strip()


def _campaign(*images: str | None, **execution: Any) -> str:
    text = container_campaign(outputs=(4, 8), structure="interleaved", **execution)
    return text.replace("    warmup.enabled:", f"    image: {json.dumps(images)}\n    warmup.enabled:")


def test_the_container_is_replaced_between_two_images_and_the_users_file_stays(rig: ContainerRig, other: str) -> None:
    before = (rig.folder / "docker-compose.yml").read_bytes()
    rig.write(_campaign(None, other, cycles=2))
    seen = rig.folder / "results" / "seen"
    command = f"echo $(cat /etc/hostname) $(cat /opt/mark || echo own) >> '{seen}'"
    ended = rig.run("--yes", "--json", rules=[{"at": "load", "do": "shell", "command": command}])
    assert ended.code == 0, ended.err
    found = [(record.requested.get("image"), record.environment.image) for record in rig.records()]
    assert set(found) == {(None, _image_id(BASE_IMAGE)), (other, _image_id(other))}
    loaded = [line.split() for line in seen.read_text().splitlines()]
    assert [mark for _, mark in loaded] == ["own", "other", "own", "other"]
    assert len({container for container, _ in loaded}) == 4
    assert (rig.folder / "docker-compose.yml").read_bytes() == before
    assert rig.containers(is_all=True) == {}
    rig.assert_nothing_inside()


def test_a_dry_run_names_the_images_and_one_that_is_missing_is_refused_before_a_run(rig: ContainerRig) -> None:
    rig.write(_campaign(None, "lem-test-missing:1"))
    shown = rig.run("--dry-run")
    assert shown.code == 0, shown.err
    words = " ".join(f"{shown.out} {shown.err}".split())
    assert f"images {BASE_IMAGE} (pytorch), lem-test-missing:1 (pytorch)" in words
    assert "missing: lem-test-missing:1 (pytorch)" in words
    ended = rig.run("--yes")
    assert ended.code == 2
    assert "image lem-test-missing:1 of service pytorch is missing" in ended.err
    assert "docker pull lem-test-missing:1" in ended.err
    assert not (rig.folder / "results").exists() or not list((rig.folder / "results").rglob("result.json"))


def test_a_run_that_was_interrupted_is_resumed_with_both_images(rig: ContainerRig, other: str) -> None:
    rig.write(_campaign(None, other))
    rules = [{"at": "generate", "do": "hang", "once": "/tmp/hung"}]
    running = rig.start("--yes", "--json", rules=rules)
    running.wait_for_event("phase", phase="window")
    running.send(15)
    assert running.wait().code == 143
    ended = rig.run("--yes", "--resume")
    assert ended.code == 0, ended.err
    assert {record.environment.image for record in rig.records()} == {_image_id(BASE_IMAGE), _image_id(other)}


@pytest.mark.long
def test_two_versions_of_transformers_are_compared_and_their_difference_is_intended(tmp_path: Path) -> None:
    context, places = tmp_path / "image", Places.of()
    context.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(context / "packages")]
    subprocess.run([*pip, f"transformers=={PINNED}"], check=True)
    folder = tmp_path / "work"
    folder.mkdir()
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("COMPOSE_", "LEM_"))}
    environ |= {**places.variables(), "COMPOSE_FILE": os.pathsep.join(map(str, COMPOSE_FILES))}
    environ["LEM_CACHE_DIR"] = str(folder / "cache")
    launch = Path(__file__).resolve().parents[2] / "lem" / "base" / "launch.py"
    with built(context, f"COPY packages {IN_IMAGE}", f"ENV PYTHONPATH={IN_IMAGE}") as pinned:
        grid: dict[str, Any] = {
            "backends": ["pytorch"],
            "shared": {"image": [BASE_IMAGE, pinned], "pytorch.batch_size": [1, 4]},
        }
        common = {
            "gpus": [],
            "max_output_tokens": 16,
            "min_output_tokens": 16,
            "ignore_eos": True,
            "fp_precision": "float32",
            "decoder.preset": "deterministic",
            "prompts": {"type": "synthetic", "input_tokens": 16, "output_tokens": 16, "sample_size": 8},
            "warmup.enabled": False,
            "baseline.enabled": False,
            "measurement.min_window_sec": 0.5,
            "measurement.max_wait_pct": None,
            "measurement.max_foreign_pct": None,
        }
        grid["shared"] |= {name: [value] for name, value in common.items()}
        campaign = {
            "campaign_name": "versions",
            "model": str(places.models / "tiny"),
            "grid": grid,
            "execution": {"cycles": 3, "config_gap_seconds": 0, "cycle_gap_seconds": 0},
        }
        (folder / "c.yaml").write_text(json.dumps(campaign))
        command = [sys.executable, str(launch), "campaign", "c.yaml", "--yes", "--executor", "docker"]
        ended = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (run_folder,) = (folder / "results" / "versions").iterdir()
    run = read_run(folder / "results", "versions", run_folder.name)
    versions = {str(record.requested["image"]): record.environment.versions["transformers"] for record in run.records}
    assert versions[pinned] == PINNED
    assert versions[BASE_IMAGE] != PINNED
    first, *others = run.with_results
    comparison = compare_configurations(run, first, others)
    codes = {obstacle.reason.code for pair in comparison.pairs for obstacle in pair.obstacles}
    assert codes.isdisjoint({"other_engine", "other_libraries"})
