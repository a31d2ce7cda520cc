"""The settings of GPUs that an attempt asks for, up to the process that holds them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lem.base.errors import EngineError
from lem.base.launch import own_command
from lem.meters.machine import GpuFacts
from lem.orchestration import gpu_control
from lem.orchestration.gpu_control import GpuControl
from tests.scripted_attempt import config

WANTED = config(gpu={"power_limit_w": 250.0})


def test_nothing_runs_without_the_settings_that_it_asks_for() -> None:
    control = GpuControl(("/nowhere",), {"CUDA_VISIBLE_DEVICES": ""}, "demo")
    with control.holding(config()):
        pass
    with pytest.raises(EngineError, match="power_limit_w: no GPU here"), control.holding(WANTED):
        pytest.fail("it ran")


@pytest.mark.parametrize("name", ["demo", "-limits", "--gpu", "a\0b"])
def test_a_campaign_may_have_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_control, "find_gpus", lambda: (GpuFacts(0, "GPU-1", "H200", None, (9, 0)),))
    control = GpuControl(own_command(sys.executable), {"LEM_LOCK_DIR": str(tmp_path)}, name)
    with pytest.raises(EngineError, match="NVML reports"), control.holding(WANTED):  # what the holder answers
        pytest.fail("it ran")
