"""A wall clock of its own for the processes of a run, which steps while they run; wall_clock.c does it.

Everything that asks libc for the time of day sees the step, Python's `time.time` and `datetime.now` among them. What
the kernel stamps itself, as the times of files, does not step, as files from before a step do not either.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.doubles.fault_injector import WALL_CLOCK_OFFSET, WALL_CLOCK_VARIABLE

_SOURCE = Path(__file__).with_name("wall_clock.c")
_BUILD_TIMEOUT_S = 60


def build_library(folder: Path) -> Path:
    """The library, for LD_PRELOAD."""
    library = folder / "libwallclock.so"
    command = ["gcc", "-std=gnu11", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", str(library), str(_SOURCE)], check=True, timeout=_BUILD_TIMEOUT_S)
    return library


def prepare(library: Path, file: Path) -> dict[str, str]:
    """The variables that give processes a clock that is right until `fault_injector.step_wall_clock`."""
    file.write_bytes(WALL_CLOCK_OFFSET.pack(0))
    return {"LD_PRELOAD": str(library), WALL_CLOCK_VARIABLE: str(file)}
