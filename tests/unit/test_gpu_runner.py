"""What goes through the steps for a machine with a GPU, and its table; the steps themselves are rehearsed elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gpu.bench import Bench, Step
from tests.gpu.engine_client import ROOT
from tests.gpu.extent import QUICK, Extent
from tests.gpu.finding import CUT_OFF, DONE, FAILED, LEFT_OUT, Finding, LeftOut, Section
from tests.gpu.run import cut_off_by_signals, run_steps


@dataclass
class Scripted(Step):
    """A step that finds one thing, then does something else."""

    name: str
    error: BaseException | None = None
    signum: int | None = None
    is_brief: bool = False
    title: str = "Title"

    def run(self, bench: Bench) -> Iterator[Finding]:
        yield Finding(f"of {self.name}", 1.5, "W")
        if self.signum is not None:
            os.kill(os.getpid(), self.signum)
        if self.error is not None:
            raise self.error


def bench(folder: Path, limit_s: float = 1000.0) -> Bench:
    return Bench(folder, folder, Extent(**{**vars(QUICK), "limit_s": limit_s}), "GPU-1", {})


def go_through(folder: Path, *steps: Scripted, limit_s: float = 1000.0) -> tuple[list[Section], list[Section]]:
    """What they came to, and what was told meanwhile."""
    told: list[Section] = []
    with cut_off_by_signals():
        return run_steps(steps, bench(folder, limit_s), told.append), told


def test_a_step_that_fails_is_named_and_the_next_goes_on(tmp_path: Path) -> None:
    found, _ = go_through(tmp_path, Scripted("one", OSError("no room")), Scripted("two"))
    assert [section.status for section in found] == [FAILED, DONE]
    assert found[0].message == "OSError: no room"
    assert [item.name for item in found[0].findings] == ["of one"]
    assert "OSError" in (tmp_path / "one.traceback").read_text()


def test_a_step_that_has_nothing_to_do_says_why(tmp_path: Path) -> None:
    found, _ = go_through(tmp_path, Scripted("one", LeftOut("no such package")))
    assert (found[0].status, found[0].message) == (LEFT_OUT, "no such package")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_and_keeps_what_was_found(tmp_path: Path, signum: int) -> None:
    before = signal.getsignal(signum)  # ignored, where the tests run in the background of a shell
    found, told = go_through(tmp_path, Scripted("one"), Scripted("two", signum=signum), Scripted("three"))
    assert [section.status for section in found] == [DONE, CUT_OFF, LEFT_OUT]
    assert [item.value for item in found[1].findings] == [1.5]
    assert told[-1].step == "three"
    assert signal.getsignal(signum) == before


def test_no_step_begins_when_time_is_over_but_those_that_only_read(tmp_path: Path) -> None:
    found, _ = go_through(tmp_path, Scripted("one"), Scripted("two", is_brief=True), limit_s=0.0)
    assert [section.status for section in found] == [LEFT_OUT, DONE]
    assert "--only one" in found[0].message


def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    environ = {"PATH": "", "LD_LIBRARY_PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.gpu", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "--rehearse" in ended.stderr
