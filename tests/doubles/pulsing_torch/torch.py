"""Just enough of PyTorch for `lem gpus --probe`: its products tell the NVML double that the GPU is busy."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LOG_VARIABLE = "LEMTEST_LOAD_LOG"
float16 = "float16"
_LAUNCHED_S = 0.02  # how long the GPU works on what was launched


class _Matrix:
    def __matmul__(self, other: _Matrix) -> _Matrix:
        return self


def ones(*_size: int, dtype: str, device: str) -> _Matrix:
    if LOG_VARIABLE not in os.environ:
        raise RuntimeError("No CUDA GPUs are available")
    assert (dtype, device) == (float16, "cuda")
    return _Matrix()


def mm(_left: _Matrix, _right: _Matrix, out: Any) -> None:
    if not _device.is_busy:
        _device.say(is_busy=True)


class _Device:
    is_busy = False

    def say(self, *, is_busy: bool) -> None:
        self.is_busy = is_busy
        with Path(os.environ[LOG_VARIABLE]).open("a", encoding="ascii") as log:
            log.write(f"{time.monotonic_ns()} {is_busy:d}\n")

    def synchronize(self) -> None:
        if self.is_busy:
            time.sleep(_LAUNCHED_S)
            self.say(is_busy=False)


_device = _Device()
cuda = SimpleNamespace(synchronize=_device.synchronize)
