"""The engine process as the driver sees it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lem.base import process
from tests.gpu.load import Busy

ROOT = Path(__file__).resolve().parents[2]

# Importing torch and making a CUDA context; loading 1 B parameters and running them for the first time.
START_TIMEOUT_S = 120.0
LATE_S = 60.0


class EngineFailed(Exception):
    """The engine process is gone, does not answer, or says what went wrong."""


class Engine:
    """An engine process, which ends with this object or with the driver.

    Attributes:
        uuid: the GPU it works on.
        versions: of what it imported.
    """

    def __init__(self, log: Path, rehearsed: tuple[str, Path] | None) -> None:
        """Start it; `log` gets what it prints, `rehearsed` are UUID and load log of the NVML double.

        Raises EngineFailed: it does not come up.
        """
        words = [sys.executable, "-m", "tests.gpu.engine", "--parent", str(os.getpid())]
        words += [] if rehearsed is None else ["--rehearse", rehearsed[0], str(rehearsed[1])]
        with log.open("ab") as said:
            self._child = process.spawn(words, cwd=ROOT, streams=(process.PIPE, process.PIPE, said.fileno()))
        self._log = log
        self._begun = b""
        hello = self._ask({"do": "hello"}, START_TIMEOUT_S)
        self.uuid: str = hello["uuid"]
        self.versions: Mapping[str, str] = hello["versions"]

    def is_running(self) -> bool:
        return self._child.poll() is None

    def stay_busy(self, duration_s: float) -> Busy:
        return Busy(**self._ask({"do": "busy", "s": duration_s}, duration_s + LATE_S))

    def swing(self, period_s: float, duration_s: float) -> Busy:
        return Busy(**self._ask({"do": "swing", "period_s": period_s, "s": duration_s}, duration_s + LATE_S))

    def load(self, model: Path, *, batch: int, input_tok: int, output_tok: int) -> int:
        """The number of parameters of the model, which is loaded and warm."""
        sizes = {"batch": batch, "input_tok": input_tok, "output_tok": output_tok}
        order = {"do": "load", "model": str(model), **sizes}
        return int(self._ask(order, START_TIMEOUT_S)["parameters"])

    def generate(self, duration_s: float) -> float:
        """Output tokens per second of generating at least so long."""
        answer = self._ask({"do": "generate", "s": duration_s}, duration_s + LATE_S)
        return float(answer["output_tok"]) * 1e9 / float(answer["closed_ns"] - answer["opened_ns"])

    def close(self) -> None:
        """End it, and wait until its context is gone."""
        stdin, stdout = process.pipes(self._child)
        stdin.close()
        with contextlib.suppress(process.TimeoutExpired):
            self._child.wait(5)
        if self._child.poll() is None:
            process.kill_group(self._child.pid)
            self._child.wait()
        stdout.close()

    def _ask(self, order: Mapping[str, Any], timeout_s: float) -> Mapping[str, Any]:
        stdin, _ = process.pipes(self._child)
        try:
            stdin.write((json.dumps(order) + "\n").encode())
        except BrokenPipeError:
            raise EngineFailed(f"the engine process is gone; see {self._log}") from None
        answer: dict[str, Any] = json.loads(self._read_line(time.monotonic() + timeout_s))
        if "error" in answer:
            raise EngineFailed(str(answer["error"]))
        return answer

    def _read_line(self, deadline: float) -> bytes:
        _, stdout = process.pipes(self._child)
        while b"\n" not in self._begun:
            if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise EngineFailed(f"the engine process does not answer; see {self._log}")
            data = os.read(stdout.fileno(), 65536)
            if not data:
                raise EngineFailed(f"the engine process is gone; see {self._log}")
            self._begun += data
        line, _, self._begun = self._begun.partition(b"\n")
        return line
