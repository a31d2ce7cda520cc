"""The NVML double in place of a GPU, so that the program is known to run before a machine with one is at hand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.doubles.nvml.library import NvmlDouble
from tests.doubles.nvml.traces import Counter, GpuTrace, Load, Sensor, Thermal, Trace
from tests.gpu.engine_client import ROOT

UUID = "GPU-00000000-0000-0000-0000-000000000001"
IDLE_W, BUSY_W = 80.0, 350.0
COUNTER_PERIOD_S, SENSOR_PERIOD_S = 0.05, 0.1
POWER_CAP = 0x4

# The folder of the double; where it is set, this is a rehearsal.
VARIABLE = "LEMTEST_GPU_REHEARSAL"


@dataclass(frozen=True)
class Rehearsal:
    """One GPU of the double, which draws what the load log says."""

    folder: Path  # of its script and its load log

    @property
    def load_log(self) -> Path:
        return self.folder / "load"

    def trace(self, origin_ns: int = 1) -> Trace:
        """The GPU; what it truly drew is asked of `trace().after_load()`."""
        load = Load(str(self.load_log), IDLE_W, BUSY_W, events=POWER_CAP)
        gpu = GpuTrace(
            uuid=UUID,
            load=load,
            counter=Counter(period_s=COUNTER_PERIOD_S),
            instant=Sensor(period_s=SENSOR_PERIOD_S, noise_w=0.2),  # else its updates could not be seen at rest
            thermal=Thermal(tau_s=1.0),
        )
        return Trace(origin_ns, (gpu,))

    def environ(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """An environment in which this is the machine's GPU, after it was made ready."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.load_log.write_text("", encoding="ascii")
        double = NvmlDouble(self.folder / "nvml")
        double.say(*self.trace().lines())
        paths = [str(ROOT), str(Path(__file__).with_name("rehearsal"))]
        return {
            **base,
            **double.variables(),
            VARIABLE: str(self.folder),
            "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [base.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "0",  # of the double; a PyTorch without CUDA does not look at it
        }

    @classmethod
    def under_way(cls, environ: Mapping[str, str] = os.environ) -> Rehearsal | None:
        """The rehearsal that this process takes part in; None on a real machine."""
        folder = environ.get(VARIABLE)
        return cls(Path(folder)) if folder else None
