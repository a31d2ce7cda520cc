"""The GPU an experiment names is the one it gets, or it is told that there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from lem.base.errors import EngineError
from lem.base.reasons import Reason
from lem.engines.common import idle_gpu, pick_gpu

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
    with pytest.raises(EngineError, match="is not there") as caught:
        pick_gpu(named, UUIDS)
    assert UUIDS[0] in caught.value.message
    assert caught.value.is_permanent
    assert caught.value.kind == "option"


def test_a_gpu_named_on_a_machine_without_one_is_an_error_that_names_driver_and_build() -> None:
    with pytest.raises(EngineError, match="PyTorch sees none") as caught:
        pick_gpu(("0",), ())
    assert "driver" in caught.value.hint


def test_a_shortened_uuid_of_two_gpus_is_refused() -> None:
    with pytest.raises(EngineError, match="stands for several"):
        pick_gpu(("GPU-8d2f",), UUIDS)


def test_a_gpu_that_pytorch_cannot_use_is_told(tmp_path: Path) -> None:
    assert idle_gpu(None, (), tmp_path) == ()
    (tmp_path / "nvidiactl").touch()
    assert idle_gpu(None, (), tmp_path) == ()
    (tmp_path / "nvidia0").touch()
    assert idle_gpu(None, (), tmp_path) == (Reason.of("gpu_unusable"),)
    assert idle_gpu((), (), tmp_path) == ()  # the CPU was asked for
    assert idle_gpu(None, UUIDS, tmp_path) == ()
