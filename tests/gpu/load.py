"""Work for a GPU that can be switched on and off, with the times at which it was."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

NS_PER_S = 1_000_000_000

# Reads and writes memory, as decoding does: of all loads the one that is least likely to run into the power limit,
# where a GPU no longer does the same work in the same time.
_TENSOR_B = 1 << 30
_LAUNCHES = 4


@dataclass(frozen=True)
class Busy:
    """A window of work on CLOCK_MONOTONIC; the device was idle at both edges."""

    opened_ns: int
    closed_ns: int
    done: int  # how much, in units of the load's own

    @property
    def seconds(self) -> float:
        return (self.closed_ns - self.opened_ns) / NS_PER_S


class Load(Protocol):
    """Work."""

    @property
    def uuid(self) -> str:
        """The GPU."""

    def work_until(self, until_ns: int) -> int:
        """Work, and wait for the device; how much was done."""


def stay_busy(load: Load, duration_s: float) -> Busy:
    opened_ns = time.monotonic_ns()
    done = load.work_until(opened_ns + round(duration_s * NS_PER_S))
    return Busy(opened_ns, time.monotonic_ns(), done)


def fixed_lengths(input_tok: int, output_tok: int) -> dict[str, Any]:
    """Options with which every request is the same work."""
    return {
        "fp_precision": "bfloat16",
        "ignore_eos": True,
        "max_input_tokens": input_tok,
        "max_output_tokens": output_tok,
        "min_output_tokens": output_tok,
        "decoder": {"preset": "deterministic"},
    }


def swing(load: Load, period_s: float, duration_s: float) -> Busy:
    """Work for half of each period and rest for the other, over whole periods."""
    opened_ns, period_ns, done = time.monotonic_ns(), round(period_s * NS_PER_S), 0
    periods = max(1, round(duration_s / period_s))
    for number in range(periods):
        begin_ns = opened_ns + number * period_ns
        done += load.work_until(begin_ns + period_ns // 2)
        _wait_until(begin_ns + period_ns)
    return Busy(opened_ns, time.monotonic_ns(), done)


def _wait_until(until_ns: int) -> None:
    time.sleep(max(0, until_ns - time.monotonic_ns()) / NS_PER_S)


class CudaLoad:
    """Copies through a GPU's memory."""

    def __init__(self) -> None:
        """Take the memory, and work once so that nothing is made in the first window."""
        import torch

        self._torch: Any = torch
        self.uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        self._source = torch.zeros(_TENSOR_B // 2, dtype=torch.bfloat16, device="cuda:0")
        self._sink = torch.empty_like(self._source)
        self.work_until(time.monotonic_ns() + NS_PER_S // 10)

    def work_until(self, until_ns: int) -> int:
        done = 0
        while time.monotonic_ns() < until_ns:
            for _ in range(_LAUNCHES):
                self._torch.add(self._source, 1, out=self._sink)
            self._torch.cuda.synchronize()
            done += _LAUNCHES
        return done


@dataclass(frozen=True)
class RehearsedLoad:
    """Tells the NVML double that its GPU is busy, and waits; what it has done is counted in ms."""

    uuid: str
    log: Path
    wait_until: Callable[[int], None] = _wait_until

    def work_until(self, until_ns: int) -> int:
        opened_ns = say_busy(self.log, 1)
        self.wait_until(until_ns)
        return (say_busy(self.log, 0) - opened_ns) // 1_000_000


def say_busy(log: Path, state: int) -> int:
    """The time of the change, which the double reads in the log."""
    now_ns = time.monotonic_ns()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, f"{now_ns} {state}\n".encode())
    finally:
        os.close(descriptor)
    return now_ns
