"""The models that the other steps run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from lem.base import process
from tests.gpu.bench import Bench, Step
from tests.gpu.engine_client import ROOT
from tests.gpu.finding import Finding
from tests.gpu.models import made

TIMEOUT_S = 300.0


class MakeModels(Step):
    """Makes what is not there yet, each model in a process of its own."""

    name = "models"
    title = "Models with random weights"

    def run(self, bench: Bench) -> Iterator[Finding]:
        for shape in bench.extent.models:
            folder = bench.models / shape
            parameters = made(folder, shape)
            if parameters is not None:
                yield Finding(f"{shape}, parameters", parameters / 1e6, "M", "there already")
                continue
            begun_s = time.monotonic()
            device = "cpu" if bench.rehearsal else "cuda"
            command = [sys.executable, "-m", "tests.gpu.models", str(folder), shape, "--device", device]
            ended = process.run(command, timeout_s=TIMEOUT_S, env=bench.environ, cwd=ROOT)
            parameters = made(folder, shape)
            if ended.code != 0 or parameters is None:
                raise RuntimeError(f"{shape} was not made ({ended.code}): {ended.stderr.strip()[-500:]}")
            note = f"made and saved in {time.monotonic() - begun_s:.0f} s"
            yield Finding(f"{shape}, parameters", parameters / 1e6, "M", note)
