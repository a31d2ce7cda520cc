"""The model of the demo: made once, whole, the same everywhere, and readable by whoever measures it."""

from __future__ import annotations

import filecmp
import json
import stat
from pathlib import Path

import pytest

from examples.make_demo_model import STAMP_NAME, main

pytestmark = [pytest.mark.needs("torch"), pytest.mark.needs("transformers")]


def make(folder: Path, size: str = "tiny") -> int:
    return main([str(folder), "--size", size])


def moments(folder: Path) -> dict[str, int]:
    """When each file was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_model_that_is_there_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    assert make(folder) == 0
    before = moments(folder)
    assert make(folder) == 0
    assert moments(folder) == before
    assert "already exists" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "gone", "no stamp", "other texts"])
def test_a_model_that_is_not_whole_or_not_this_one_is_made_again_byte_by_byte(tmp_path: Path, damage: str) -> None:
    folder, whole = tmp_path / "model", tmp_path / "whole"
    whole.mkdir()  # an empty folder is used
    assert make(whole) == make(folder) == 0
    weights, stamp = folder / "model.safetensors", folder / STAMP_NAME
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "gone":
        (folder / "config.json").unlink()
    elif damage == "other texts":
        values = json.loads(stamp.read_text(encoding="utf-8"))
        values["recipe"]["texts"] = {}
        stamp.write_text(json.dumps(values), encoding="utf-8")
    else:
        stamp.write_text("{", encoding="utf-8")
    assert make(folder) == 0
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    _same, different, missing = filecmp.cmpfiles(whole, folder, names, shallow=False)
    assert (different, missing) == ([], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "whole"]


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert make(tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert "contains other files" in capsys.readouterr().err


def test_other_users_may_read_every_file(tiny_model: Path) -> None:
    assert stat.S_IMODE(tiny_model.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in tiny_model.iterdir()} == {0o644}


def test_the_demo_has_10_to_50_million_parameters_and_a_token_for_each_row(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = tmp_path / "demo"
    assert make(folder, "demo") == 0
    # Four bytes a weight in float32; the head of the file is a few kB.
    parameters = (folder / "model.safetensors").stat().st_size / 4
    assert 10e6 < parameters < 50e6
    assert len(AutoTokenizer.from_pretrained(folder)) == AutoConfig.from_pretrained(folder).vocab_size
