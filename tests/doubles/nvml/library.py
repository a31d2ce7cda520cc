"""The NVML double: a shared library that says what a script says, for processes on the host and in containers."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LIBRARY_NAME = "libnvidia-ml.so.1"
SCRIPT_VARIABLE = "LEMTEST_NVML_SCRIPT"

SOURCES = tuple(Path(__file__).with_name(name) for name in ("nvml.c", "power.c", "script.c", "sensors.c"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("power.h", "script.h", "sensors.h"))
BUILD_FOLDER = Path(__file__).resolve().parents[3] / "build" / "nvml-double"
BUILD_TIMEOUT_S = 120
# Contracted sums would round otherwise than those of the twin in Python.
OPTIONS = ("-std=gnu11", "-shared", "-fPIC", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")


def build_library(folder: Path = BUILD_FOLDER) -> Path:
    """The folder that holds the library, for LD_LIBRARY_PATH; it is built once for each text of its sources."""
    exports = "{ global: nvml*; local: *; };\n"
    text = b"".join(path.read_bytes() for path in (*SOURCES, *HEADERS))
    digest = hashlib.sha256(" ".join([*OPTIONS, exports]).encode() + text).hexdigest()[:16]
    place = folder / digest
    library = place / LIBRARY_NAME
    if not library.exists():
        place.mkdir(parents=True, exist_ok=True)
        fresh = place / f"{LIBRARY_NAME}.{os.getpid()}"
        script = place / f"exports.{os.getpid()}"
        script.write_text(exports, encoding="ascii")
        link = (f"-Wl,-soname,{LIBRARY_NAME}", f"-Wl,--version-script,{script}")
        command = ["gcc", *OPTIONS, *link, "-o", str(fresh), *map(str, SOURCES), "-lm"]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
        if finished.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {finished.stderr}")
        script.unlink()
        fresh.replace(library)
    return place


@dataclass(frozen=True)
class NvmlDouble:
    """A script, and how a process is made to see it."""

    script: Path
    # Files that are read after the script where they are there, as those of one container alone.
    more: tuple[str, ...] = ()

    def say(self, *lines: str) -> None:
        """Have every process see this from its next call on; no reader meets half a script."""
        fresh = self.script.with_name(f"{self.script.name}.{os.getpid()}")
        fresh.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        fresh.chmod(0o644)
        fresh.replace(self.script)

    def variables(self) -> dict[str, str]:
        return {
            "LD_LIBRARY_PATH": str(build_library()),
            SCRIPT_VARIABLE: ":".join([str(self.script), *self.more]),
        }

    def environ(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        return {**base, **self.variables()}

    @staticmethod
    def gpu(*, used_b: int = 0, total_b: int = 80_000_000_000, processes: Sequence[tuple[int, int]] = ()) -> list[str]:
        """The lines of one GPU whose memory is in use like that; processes are (pid, bytes)."""
        held = [f"process {pid} {memory_b}" for pid, memory_b in processes]
        return ["count 1", f"memory_total {total_b}", f"memory_used {used_b}", *held]
