"""What engines share: missing packages, refused changes, JSON values, and the GPU that an experiment names."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from lem.base.errors import EngineError, OptionRefused
from lem.base.reasons import Reason
from lem.config.backends import VllmConfig
from lem.config.experiment import ExperimentConfig
from lem.engines.common import (
    demo_python,
    environment,
    idle_gpu,
    importing,
    load_engine,
    pick_gpus,
    refuse_changes,
    section_of,
)
from lem.engines.named import named_models

UUIDS = ("GPU-8d2f1c00-0000-0000-0000-000000000001", "GPU-8d2f77aa-0000-0000-0000-000000000002")


@pytest.mark.parametrize(
    ("named", "uuids", "indices"),
    [
        (None, (), []),
        (None, UUIDS, [0, 1]),
        ((), UUIDS, []),  # [] is the CPU, also beside a GPU
        (("1", "0"), UUIDS, [1, 0]),
        ((UUIDS[1],), UUIDS, [1]),
        ((UUIDS[1].upper(),), UUIDS, [1]),
        (("GPU-8d2f77",), UUIDS, [1]),
    ],
)
def test_the_named_gpus_are_picked(named: tuple[str, ...] | None, uuids: tuple[str, ...], indices: list[int]) -> None:
    assert pick_gpus(named, uuids) == indices


@pytest.mark.parametrize(
    ("named", "uuids", "reason", "hint"),
    [
        (("2",), UUIDS, f"2 not found; PyTorch sees 0 ({UUIDS[0]}), 1", "[] for the CPU"),
        (("GPU-ffff",), UUIDS, "GPU-ffff not found", "use one of these"),
        (("0", "7"), UUIDS, "7 not found", "use one of these"),
        (("GPU-8d2f",), UUIDS, "GPU-8d2f is ambiguous", "use one of these"),
        (("0",), (), "PyTorch sees none", "driver"),
    ],
)
def test_a_gpu_that_is_not_one_of_those_there_is_an_error(
    named: tuple[str, ...], uuids: tuple[str, ...], reason: str, hint: str
) -> None:
    with pytest.raises(EngineError) as caught:
        pick_gpus(named, uuids)
    assert reason in caught.value.message
    assert hint in caught.value.hint
    assert (caught.value.kind, caught.value.is_permanent) == ("option", True)


def test_a_gpu_that_pytorch_cannot_use_is_told(tmp_path: Path) -> None:
    assert idle_gpu(None, (), tmp_path) == ()
    (tmp_path / "nvidiactl").touch()
    assert idle_gpu(None, (), tmp_path) == ()
    (tmp_path / "nvidia0").touch()
    assert idle_gpu(None, (), tmp_path) == (Reason.of("gpu_unusable"),)
    assert idle_gpu((), (), tmp_path) == ()  # the CPU was asked for
    assert idle_gpu(None, UUIDS, tmp_path) == ()


@pytest.mark.parametrize(
    ("backend", "needs", "remedy"),
    [
        ("tensorrt", "tensorrt_llm", "run it in NVIDIA's image (nvcr.io/nvidia/tensorrt-llm"),
        (
            "pytorch",
            "torch and transformers",
            " -m pip install torch transformers, or name another Python",
        ),
    ],
)
def test_a_backend_without_its_packages_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, backend: str, needs: str, remedy: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(EngineError, match=f"the {backend} backend needs {needs}, which ") as caught:
        load_engine(ExperimentConfig.from_dict({"model": "m", "backend": backend}), {})
    assert remedy in caught.value.hint
    assert caught.value.is_permanent


def test_the_python_of_the_demo_is_named_where_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo_python("pytorch") is None
    python = Path("build/demo-env/bin/python")
    python.parent.mkdir(parents=True)
    python.touch()
    assert [demo_python(name) for name in ("pytorch", "vllm")] == [python, None]


@pytest.mark.parametrize("error", [ImportError("no libcuda", name="vllm"), OSError("no libcuda")])
def test_an_engine_that_cannot_be_imported_is_an_error_with_a_hint(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", __import__("json"))
    with pytest.raises(EngineError, match=r"vLLM cannot .*: no libcuda") as caught, importing("vllm", "vLLM", "a hint"):
        raise error
    assert (caught.value.hint, caught.value.is_permanent) == ("a hint", True)


def test_an_engine_is_not_blamed_for_a_missing_module_of_lem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", __import__("json"))
    with pytest.raises(ImportError, match="gone"), importing("vllm", "vLLM", "a hint"):
        raise ImportError("gone", name="lem.engines")


def test_an_experiment_of_another_backend_is_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match="backend pytorch has no VllmConfig"):
        section_of(ExperimentConfig.from_dict({"model": "m"}), VllmConfig)


def test_changed_values_are_refused_by_name_and_others_are_not() -> None:
    same = {"a": (1, 1), "b": ("FP8", "fp8"), "c": ("auto", "fp8")}
    refuse_changes(same, "vLLM 1")
    with pytest.raises(OptionRefused, match="vLLM 1 changed requested values: d: 1 became 2; e: fp8 became auto"):
        refuse_changes({**same, "d": (1, 2), "e": ("fp8", "auto")}, "vLLM 1")


def test_an_environment_variable_is_set_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMTEST_SET", "before")
    monkeypatch.delenv("LEMTEST_UNSET", raising=False)
    for name in ("LEMTEST_SET", "LEMTEST_UNSET"):
        before = os.environ.get(name)
        with environment(name, "meanwhile"):
            assert os.environ[name] == "meanwhile"
        assert os.environ.get(name) == before
        with environment(name, None):
            assert os.environ.get(name) == before


@pytest.mark.parametrize(("name", "is_on_hub"), [("m" * 300, True), ("~nobody-of-this-name/model", False)])
def test_a_model_that_cannot_be_a_folder_is_looked_for_in_words(name: str, is_on_hub: bool) -> None:
    named = named_models(ExperimentConfig.from_dict({"model": name}))["model"]
    if is_on_hub:
        assert named.find_folder() is None
        return
    with pytest.raises(EngineError, match="model: no such folder: ~nobody"):
        named.find_folder()
