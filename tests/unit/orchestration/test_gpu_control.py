"""Settings of GPUs that an attempt asks for, where none of its GPUs is there any more."""

from __future__ import annotations

import pytest

from lem.base.errors import EngineError
from lem.orchestration.gpu_control import GpuControl
from tests.scripted_attempt import config


def test_nothing_runs_without_the_settings_that_it_asks_for() -> None:
    control = GpuControl(("/nowhere",), {"CUDA_VISIBLE_DEVICES": ""}, "demo")
    with pytest.raises(EngineError, match="gpu.power_limit_w: no GPU here"):  # noqa: SIM117
        with control.holding(config(gpu={"power_limit_w": 250.0})):
            pytest.fail("it ran")
    with control.holding(config()):
        pass
