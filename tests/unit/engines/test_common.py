"""What engines share: missing packages, refused changes, JSON values, and the GPU that an experiment names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lem.base.errors import EngineError, OptionRefused
from lem.base.reasons import Reason
from lem.config.experiment import ExperimentConfig
from lem.engines.common import (
    environment,
    explain_import,
    idle_gpu,
    load_engine,
    pick_gpu,
    plain,
    refuse_changes,
)

UUIDS = ("GPU-8d2f1c00-0000-0000-0000-000000000001", "GPU-8d2f77aa-0000-0000-0000-000000000002")


@pytest.mark.parametrize(
    ("named", "uuids", "index"),
    [
        (None, (), None),
        (None, UUIDS, 0),
        ((), UUIDS, None),  # [] is the CPU, also beside a GPU
        (("0",), UUIDS, 0),
        (("1",), UUIDS, 1),
        ((UUIDS[1],), UUIDS, 1),
        ((UUIDS[1].upper(),), UUIDS, 1),
        (("GPU-8d2f77",), UUIDS, 1),
    ],
)
def test_the_named_gpu_is_picked(named: tuple[str, ...] | None, uuids: tuple[str, ...], index: int | None) -> None:
    assert pick_gpu(named, uuids) == index


@pytest.mark.parametrize("named", [("2",), ("GPU-ffff",), ("0", "7")])
def test_a_gpu_that_is_not_there_is_an_error_that_says_which_are(named: tuple[str, ...]) -> None:
    with pytest.raises(EngineError, match="not found") as caught:
        pick_gpu(named, UUIDS)
    assert UUIDS[0] in caught.value.message
    assert caught.value.is_permanent
    assert caught.value.kind == "option"


def test_a_gpu_named_on_a_machine_without_one_is_an_error_that_names_driver_and_build() -> None:
    with pytest.raises(EngineError, match="PyTorch sees none") as caught:
        pick_gpu(("0",), ())
    assert "driver" in caught.value.hint


def test_a_shortened_uuid_of_two_gpus_is_refused() -> None:
    with pytest.raises(EngineError, match="is ambiguous"):
        pick_gpu(("GPU-8d2f",), UUIDS)


def test_a_gpu_that_pytorch_cannot_use_is_told(tmp_path: Path) -> None:
    assert idle_gpu(None, (), tmp_path) == ()
    (tmp_path / "nvidiactl").touch()
    assert idle_gpu(None, (), tmp_path) == ()
    (tmp_path / "nvidia0").touch()
    assert idle_gpu(None, (), tmp_path) == (Reason.of("gpu_unusable"),)
    assert idle_gpu((), (), tmp_path) == ()  # the CPU was asked for
    assert idle_gpu(None, UUIDS, tmp_path) == ()


def test_a_backend_without_its_package_says_how_to_get_it() -> None:
    with pytest.raises(EngineError, match="the tensorrt backend needs tensorrt_llm, which ") as caught:
        load_engine(ExperimentConfig.from_dict({"model": "m", "backend": "tensorrt"}), {})
    assert "nvcr.io/nvidia/tensorrt-llm" in caught.value.hint
    assert caught.value.is_permanent


def test_an_engine_that_cannot_be_imported_is_not_blamed_for_a_module_of_lem() -> None:
    explained = explain_import("vLLM", ImportError("no libcuda", name="vllm"), "a hint")
    assert "vLLM cannot be imported by" in explained.message
    with pytest.raises(ImportError):
        explain_import("vLLM", ImportError("gone", name="lem.engines"), "a hint")


def test_changed_values_are_refused_by_name_and_others_are_not() -> None:
    same = {"a": (1, 1), "b": ("FP8", "fp8"), "c": ("auto", "fp8")}
    refuse_changes(same, "vLLM 1")
    with pytest.raises(OptionRefused, match="vLLM 1 changed requested values: d: 1 became 2; e: fp8 became auto"):
        refuse_changes({**same, "d": (1, 2), "e": ("fp8", "auto")}, "vLLM 1")


def test_values_are_described_as_json() -> None:
    sizes = [1, 2, 4, *range(8, 1025, 8)]  # what vLLM captures CUDA graphs for
    assert plain(sizes) == sizes
    assert plain(set(sizes)) == sorted(sizes, key=str)
    assert plain({"a": Path("/x"), 1: object()}) == {"a": "/x", "1": None}


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
