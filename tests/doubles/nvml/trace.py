"""GPUs over time, the questions about them that have an exact answer, and their script for the NVML double."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.doubles.nvml.gpus import NS_PER_S, GpuTrace, Load
from tests.doubles.nvml.power import PowerSignal
from tests.doubles.nvml.sensors import Sensor


@dataclass(frozen=True)
class Trace:
    """What GPUs do, and the questions that have an exact answer. Every `at_ns` is a time of CLOCK_MONOTONIC."""

    origin_ns: int
    gpus: tuple[GpuTrace, ...]
    driver: str = "580.65.06"

    def lines(self) -> list[str]:
        head = [f"driver {self.driver}", f"count {len(self.gpus)}", f"origin {self.origin_ns}"]
        return [*head, *(line for index, gpu in enumerate(self.gpus) for line in gpu.lines(index))]

    def after_load(self, logs: Mapping[int, str] | None = None) -> Trace:
        """The trace with what the engines have written by now; `logs` by GPU stands for the files."""
        texts = logs if logs is not None else {i: _text_of(gpu.load) for i, gpu in enumerate(self.gpus)}
        gpus = [gpu.after_load(texts.get(index, ""), self.origin_ns) for index, gpu in enumerate(self.gpus)]
        return dataclasses.replace(self, gpus=tuple(gpus))

    def energy_j(self, from_ns: int, to_ns: int, gpu: int = 0) -> float:
        """What the GPU truly drew between the two."""
        return self._signal(gpu).energy_j(self.seconds(from_ns), self.seconds(to_ns))

    def power_w(self, at_ns: int, gpu: int = 0) -> float:
        """What the GPU truly draws then."""
        return self._signal(gpu).power_w(self.seconds(at_ns))

    def counter_mj(self, at_ns: int, gpu: int = 0) -> int:
        """What the energy counter says then; ValueError without one."""
        counter = self.gpus[gpu].counter
        if counter is None:
            raise ValueError(f"GPU {gpu} has no energy counter")
        return counter.read_mj(self._signal(gpu), self.seconds(at_ns))

    def instant_w(self, at_ns: int, gpu: int = 0) -> float:
        """What field 186 says then, to the milliwatt; ValueError without it."""
        return self._read_w(self.gpus[gpu].instant, at_ns, gpu)

    def average_w(self, at_ns: int, gpu: int = 0) -> float:
        """What `nvmlDeviceGetPowerUsage` says then; ValueError without it."""
        return self._read_w(self.gpus[gpu].average, at_ns, gpu)

    def temp_c(self, at_ns: int, gpu: int = 0) -> int:
        """What the temperature sensor says then, whole degrees."""
        item = self.gpus[gpu]
        return item.thermal.read_c(self._signal(gpu), self.seconds(at_ns)) if item.thermal else item.temp_c

    def event_mask(self, at_ns: int, gpu: int = 0) -> int:
        at_s, mask = self.seconds(at_ns), 0
        for item in self.gpus[gpu].events:
            mask |= item.mask if item.from_s <= at_s < item.to_s else 0
        return mask

    def sm_clock_mhz(self, at_ns: int, gpu: int = 0) -> int:
        return _step(self.gpus[gpu].sm_clocks_mhz, self.seconds(at_ns), 1980)

    def utilisation_percent(self, at_ns: int, gpu: int = 0) -> int:
        return _step(self.gpus[gpu].utilisation_percent, self.seconds(at_ns), 0)

    def pids(self, at_ns: int, gpu: int = 0) -> tuple[int, ...]:
        at_s = self.seconds(at_ns)
        return tuple(held.pid for held in self.gpus[gpu].processes if held.from_s <= at_s < held.to_s)

    def seconds(self, at_ns: int) -> float:
        """That time as the times of the GPUs are."""
        return (at_ns - self.origin_ns) / NS_PER_S

    def nanoseconds(self, at_s: float) -> int:
        """A time of the GPUs on CLOCK_MONOTONIC."""
        return self.origin_ns + round(at_s * NS_PER_S)

    def _read_w(self, sensor: Sensor | None, at_ns: int, gpu: int) -> float:
        if sensor is None:
            raise ValueError(f"GPU {gpu} has no such power sensor")
        return sensor.read_mw(self._signal(gpu), self.seconds(at_ns)) / 1000

    def _signal(self, gpu: int) -> PowerSignal:
        if self.gpus[gpu].load is not None:
            raise ValueError(f"GPU {gpu} follows an engine: ask after_load()")
        return self.gpus[gpu].signal


def _step(steps: Sequence[tuple[float, int]], at_s: float, before: int) -> int:
    """The last value since then; the first holds before it, too."""
    value = steps[0][1] if steps else before
    for since_s, later in steps:
        value = later if since_s <= at_s else value
    return value


def _text_of(load: Load | None) -> str:
    path = Path(load.path) if load else None
    return path.read_text(encoding="ascii") if path and path.exists() else ""
