"""The fault injector itself, on the program's own durable writes in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doubles import wall_clock
from tests.doubles.fault_injector import VARIABLE, Fault, read_journal

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60

# Writes two files durably and says which calls failed.
PROGRAM = """
import sys
from pathlib import Path
from tests.doubles import fault_injector
from lem.base import durable
fault_injector.install()
sys.argv[1:] = sys.argv[2:]
for name in ("a", "b"):
    try:
        durable.write_text(Path(name), name)
    except OSError as error:
        print(name, error.errno)
"""


def run(folder: Path, fault: Fault | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    environ.pop(VARIABLE, None)
    if fault is not None:
        environ[VARIABLE] = fault.to_json()
    command = [sys.executable, "-c", PROGRAM, "-", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"journal"}


def run_code(code: str, folder: Path, **environ: str) -> str:
    """What Python code prints that has the fault of the environment."""
    text = f"from tests.doubles import fault_injector\nfault_injector.install()\n{code}"
    finished = subprocess.run(
        [sys.executable, "-c", text],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize(
    ("event", "nth", "left"),
    [
        ("lem.write", 1, set()),
        ("lem.rename", 1, set()),
        ("lem.fsync_dir", 1, {"a"}),
        ("lem.rename", 2, {"a"}),
        ("lem.fsync_dir", 2, {"a", "b"}),
    ],
)
def test_kill_stops_the_program_just_before_the_call(tmp_path: Path, event: str, nth: int, left: set[str]) -> None:
    finished = run(tmp_path, Fault(str(tmp_path / "journal"), "host", event, nth, "kill"))
    assert finished.returncode == -signal.SIGKILL
    assert {name for name in files_in(tmp_path) if not name.startswith(".lem-tmp-")} == left
    last = read_journal(tmp_path / "journal")[-1]
    assert (last.event, last.action) == (event, "kill")


@pytest.mark.needs("gcc")
def test_the_wall_clock_goes_back_and_no_other_clock_does(tmp_path: Path) -> None:
    code = """
import sys, time
from datetime import datetime, timezone
from lem.base import durable
from pathlib import Path
clocks = (time.time, lambda: datetime.now(timezone.utc).timestamp(), time.monotonic)
before = [clock() for clock in clocks]
durable.write_text(Path("a"), "x")
print([round((clock() - at) / 3600) for clock, at in zip(clocks, before)])
"""
    library = wall_clock.build_library(tmp_path)
    fault = Fault(str(tmp_path / "journal"), "host", "lem.rename", 1, "clock")
    environ = {**wall_clock.prepare(library, tmp_path / "clock"), VARIABLE: fault.to_json()}
    assert run_code(code, tmp_path, **environ) == "[-1, -1, 0]\n"
