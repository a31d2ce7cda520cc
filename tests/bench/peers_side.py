"""The window of `tests.bench.peers` as Zeus and CodeCarbon measure it; runs in their environment, without lem.

    python peers_side.py LOAD_LOG WINDOW_S GPUS PACKAGES

It must lead a process group, which it kills in the end.
Prints one JSON object: when the work began and ended, and for each meter its joules and the moments between which it
measured, all on CLOCK_MONOTONIC in ns; or the error that it raised.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REST_S = 3.0
_J_PER_KWH = 3.6e6


class Zeus:
    name = "zeus"

    def __init__(self, gpus: int, packages: int) -> None:
        monitor: Any = importlib.import_module("zeus.monitor")
        self._monitor = monitor.ZeusMonitor(gpu_indices=list(range(gpus)), cpu_indices=list(range(packages)))

    def begin(self) -> None:
        self._monitor.begin_window("window", sync_execution=False)

    def end(self) -> float:
        found = self._monitor.end_window("window", sync_execution=False)
        return float(sum((found.gpu_energy or found.cpu_energy or {}).values()))


class CodeCarbon:
    name = "codecarbon"

    def __init__(self, gpus: int, packages: int) -> None:
        codecarbon: Any = importlib.import_module("codecarbon")
        self._has_gpu = gpus > 0
        self._tracker = codecarbon.OfflineEmissionsTracker(
            country_iso_code="FRA", save_to_file=False, allow_multiple_runs=True, log_level="critical"
        )

    def begin(self) -> None:
        self._tracker.start()

    def end(self) -> float:
        self._tracker.stop()
        found = self._tracker.final_emissions_data
        return _J_PER_KWH * float(found.gpu_energy if self._has_gpu else found.cpu_energy)


def main() -> None:
    log, window_s = Path(sys.argv[1]), float(sys.argv[2])
    gpus, packages = int(sys.argv[3]), int(sys.argv[4])
    out: dict[str, Any] = {}
    meters = []
    for kind in (Zeus, CodeCarbon):
        out[kind.name] = {"version": importlib.metadata.version(kind.name)}
        with _noting(out[kind.name]):
            meters.append((kind(gpus, packages), out[kind.name]))
    time.sleep(REST_S)
    for meter, found in meters:
        with _noting(found):
            meter.begin()
            found["begun_ns"] = time.monotonic_ns()
    out["opened_ns"] = _say(log, 1)
    time.sleep(window_s)
    out["closed_ns"] = _say(log, 0)
    for meter, found in reversed(meters):
        with _noting(found):
            found["ended_ns"] = time.monotonic_ns()
            found["energy_j"] = meter.end()
    time.sleep(REST_S)
    print(json.dumps(out), flush=True)
    os.killpg(0, signal.SIGKILL)  # threads and processes of theirs are not waited for


@contextlib.contextmanager
def _noting(found: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is its answer
        found.setdefault("error", f"{type(error).__name__}: {error}")


def _say(log: Path, busy: int) -> int:
    now_ns = time.monotonic_ns()
    with log.open("a", encoding="ascii") as file:
        file.write(f"{now_ns} {busy}\n")
    return now_ns


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    main()
