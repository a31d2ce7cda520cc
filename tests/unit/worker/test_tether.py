from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lem.base import process
from lem.base.launch import own_command
from lem.base.variables import MARK_VARIABLE
from lem.worker.guardian import end_marked, find_marked
from tests.processes import Marker, wait_for

WORKER = (*own_command(sys.executable), "worker")
DOUBLES = Path(__file__).resolve().parents[2] / "doubles"
SLEEP = "import signal; signal.pause()"


@pytest.fixture
def marker() -> Iterator[Marker]:
    marker = Marker()
    yield marker
    left = marker.survivors()
    marker.kill()
    assert left == ()


def tether(marker: Marker, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*WORKER, "--tether", *arguments],
        env=marker.environ(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize(
    ("line", "argument", "output"),
    [(b"{}\n", "--version", b"lem "), (b'{"LEM_NO_SUCH": "1"}\n', "presets", b"LEM_NO_SUCH")],
)
def test_a_tethered_command_has_its_environment_its_output_and_its_exit_code(
    marker: Marker, line: bytes, argument: str, output: bytes
) -> None:
    child = tether(marker, argument)
    stdin, stdout = process.pipes(child)
    stdin.write(line)
    stdin.flush()
    assert output in stdout.read()
    assert child.wait() == 0
    stdin.close()
    stdout.close()


@pytest.mark.parametrize("line", [b"", b"[1]\n", b"nonsense\n"])
def test_another_first_line_is_refused(marker: Marker, line: bytes) -> None:
    child = tether(marker, "--version")
    output, _ = child.communicate(line)
    assert child.returncode == 2
    assert b"first line" in output


def test_the_end_of_stdin_ends_the_command_and_all_that_it_started(marker: Marker, tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(
        "model: none\ngpus: []\nprompts: {type: synthetic, input_tokens: 3, sample_size: 2}\n"
    )
    script = {"rules": [{"at": "load", "do": "ignore_term"}, {"at": "load", "do": "hang"}]}
    child = tether(marker, "experiment", str(tmp_path / "e.yaml"), "--yes", "--results-dir", str(tmp_path / "results"))
    stdin, stdout = process.pipes(child)
    environ = {"PYTHONPATH": str(DOUBLES), "LEMTEST_ENGINE_SCRIPT": json.dumps(script)}
    stdin.write(json.dumps(environ).encode() + b"\n")
    stdin.flush()
    marker.pid_of("--engine")
    stdin.close()
    assert child.wait() in (143, 137)
    stdout.close()
    assert marker.survivors() == ()


def marked(marker: Marker, mark: str, program: str = SLEEP) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-c", program], env=marker.environ(**{MARK_VARIABLE: mark}))
    wait_for(lambda: find_marked(mark) or None)
    return child


def test_what_bears_the_mark_is_ended_whatever_it_holds(marker: Marker) -> None:
    stubborn = (
        "import os, signal, subprocess, sys\n"
        "for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)\n"
        "signal.pause()\n"
    )
    child, other = marked(marker, "one", stubborn), marked(marker, "two")
    wait_for(lambda: len(find_marked("one")) == 2 or None)
    assert end_marked("one") == ()
    assert child.wait() == -signal.SIGKILL
    assert other.poll() is None, "it bears another mark"
    assert end_marked("two") == ()
    other.wait()


def test_the_command_ends_all_but_itself_and_says_whether_something_is_left(marker: Marker) -> None:
    child = marked(marker, "three")
    environ = marker.environ(**{MARK_VARIABLE: "three"})
    finished = subprocess.run([*WORKER, "--end-marked", "three"], env=environ, check=False)
    assert finished.returncode == 0
    assert child.wait() == -signal.SIGKILL

    child = marked(marker, "four")
    assert end_marked("four", patience_s=0.0) == (child.pid,)
    child.kill()
    child.wait()
