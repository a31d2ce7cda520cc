from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lem.config.experiment import ExperimentConfig
from lem.orchestration.compose import CONTAINER_HOME, Mount, local_mounts, without_nested


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def config(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "gpt2", **options})


def targets(*configs: ExperimentConfig) -> dict[str, bool]:
    """Targets, and whether each is read-only."""
    return {mount.target: mount.is_read_only for mount in local_mounts(configs)}


def test_a_model_of_a_hub_needs_no_mount(here: Path) -> None:
    assert local_mounts([config()]) == ()


def test_a_folder_is_seen_at_its_absolute_path_read_only(here: Path) -> None:
    (here / "models" / "a b").mkdir(parents=True)
    (mount,) = local_mounts([config(model="models/a b"), config(model=f"{here}/models/a b")])
    assert mount == Mount(here / "models" / "a b", f"{here}/models/a b")
    assert mount.to_compose() == {
        "type": "bind",
        "source": f"{here}/models/a b",
        "target": f"{here}/models/a b",
        "read_only": True,
        "bind": {"create_host_path": False},
    }


def test_every_path_that_an_experiment_names_is_mounted(here: Path) -> None:
    for name in ("model", "tokenizer", "adapter", "draft", "lists"):
        (here / name).mkdir()
    (here / "template.jinja").write_text("")
    found = targets(
        config(
            model={"name": "model", "tokenizer": "tokenizer", "adapter": "adapter"},
            backend="vllm",
            vllm={
                "speculative": {"model": "draft", "num_tokens": 2},
                "extra": {"chat_template": str(here / "template.jinja"), "paths": [{"one": "lists"}]},
            },
        )
    )
    names = ("model", "tokenizer", "adapter", "draft", "lists", "template.jinja")
    assert found == {str(here / name): True for name in names}


def test_a_folder_that_is_written_to_is_made_and_writable(here: Path) -> None:
    found = targets(config(backend="tensorrt", tensorrt={"engine_cache_dir": "engines"}))
    assert found == {str(here / "engines"): False}
    assert (here / "engines").is_dir()


def test_a_path_in_the_home_folder_is_where_home_is_inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    (here / "models" / "m").mkdir(parents=True)
    assert local_mounts([config(model="~/models/m")]) == (Mount(here / "models" / "m", "/tmp/models/m"),)


def test_a_snapshot_brings_the_files_that_its_links_lead_to(here: Path) -> None:
    blobs, snapshot = here / "hub" / "blobs", here / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    (snapshot / "deep").mkdir(parents=True)
    (blobs / "1").write_text("weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "deep" / "x").symlink_to("../../../blobs/1")
    (snapshot / "gone").symlink_to("nowhere")
    assert targets(config(model=str(snapshot))) == {str(snapshot): True, str(blobs): True}


def test_the_root_is_never_mounted(here: Path) -> None:
    assert local_mounts([config(model="/")]) == ()


def test_what_another_mount_shows_already_is_left_out() -> None:
    outer, inner = Mount(Path("/a"), "/a"), Mount(Path("/a/b"), "/a/b")
    assert without_nested([inner, outer, inner]) == (outer,)


def test_what_is_written_to_inside_what_is_read_stays() -> None:
    outer, inner = Mount(Path("/a"), "/a"), Mount(Path("/a/b"), "/a/b", is_read_only=False)
    assert without_nested([outer, inner]) == (outer, inner)


def test_another_folder_at_a_place_below_stays() -> None:
    outer, inner = Mount(Path("/a"), "/a"), Mount(Path("/c"), "/a/b")
    assert without_nested([outer, inner]) == (outer, inner)


def test_a_folder_both_read_and_written_is_written() -> None:
    read, written = Mount(Path("/a"), "/a"), Mount(Path("/a"), "/a", is_read_only=False)
    assert without_nested([read, written]) == (written,)
    assert without_nested([written, read]) == (written,)


def test_the_folder_of_an_external_meter_s_file_is_seen_at_its_place(here: Path) -> None:
    found = targets(config(measurement={"external_csv": "meter/watts.csv"}))
    assert found == {f"{here}/meter": True}
    assert targets(config(measurement={"external_csv": "~/meter/watts.csv"})) == {f"{CONTAINER_HOME}/meter": True}
