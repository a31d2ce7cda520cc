from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lem.base import process
from lem.base.errors import UserError
from tests.processes import Marker, wait_until_ended

STAY = "import signal; signal.pause()"


def until_timeouts_are_long_enough(
    run: Callable[[float], process.Finished], has_come: Callable[[process.Finished], object]
) -> process.Finished:
    """The first run, with longer and longer timeouts, whose program came as far as the test is about.
    How far it comes within a time is up to the machine; only a slow one has to wait for longer than the first.
    """
    for timeout_s in (1.0, 8.0):
        finished = run(timeout_s)
        if has_come(finished):
            return finished
    return run(60.0)


def test_a_failing_exit_code_is_a_value():
    finished = process.run([sys.executable, "-c", "print('out'); exit(3)"], timeout_s=60)
    assert (finished.code, finished.stdout, finished.stderr) == (3, "out\n", "")
    assert not finished.has_timed_out


def test_stdin_and_environment_reach_the_program():
    assert process.run(["cat"], timeout_s=60, stdin=b"caf\xe9").stdout == "caf�"
    assert process.run(["env"], timeout_s=60, env={"ONLY": "this"}).stdout == "ONLY=this\n"


def test_a_signal_is_a_negative_code_and_told_by_name():
    finished = process.run(["sh", "-c", "kill -KILL $$"], timeout_s=60)
    assert finished.code == -signal.SIGKILL
    assert process.describe_exit(finished.code) == "was killed by SIGKILL"
    assert process.describe_exit(3) == "ended with exit code 3"


def test_at_the_timeout_the_program_and_what_it_started_are_killed_and_the_output_before_it_is_kept():
    marker = Marker()
    finished = until_timeouts_are_long_enough(
        lambda timeout_s: process.run(
            ["sh", "-c", "sleep 1000 & echo started; wait"], timeout_s=timeout_s, env=marker.environ()
        ),
        lambda finished: finished.stdout,
    )
    assert (finished.has_timed_out, finished.code, finished.stdout) == (True, 124, "started\n")
    assert marker.survivors() == ()


def test_a_process_that_left_the_group_is_not_waited_for():
    marker = Marker()
    escaped = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STAY!r}], start_new_session=True)"
    finished = until_timeouts_are_long_enough(
        lambda timeout_s: process.run(
            [sys.executable, "-c", f"{escaped}; {STAY}"], timeout_s=timeout_s, env=marker.environ()
        ),
        lambda _finished: marker.pids(),
    )
    assert finished.has_timed_out
    assert len(marker.pids()) == 1
    marker.kill()
    assert marker.survivors() == ()


def test_a_program_that_cannot_be_started_is_an_error_for_people(tmp_path: Path):
    (tmp_path / "text").write_text("no program")
    with pytest.raises(UserError, match="no-such-program: no such program"):
        process.run(["no-such-program"], timeout_s=1)
    with pytest.raises(UserError, match="no such folder to run true in"):
        process.run(["true"], timeout_s=1, cwd=tmp_path / "missing")
    with pytest.raises(UserError, match="cannot be started: Permission denied"):
        process.run([str(tmp_path / "text")], timeout_s=1)


def test_an_exception_in_between_leaves_nothing_behind():
    marker = Marker()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            process.run(["sh", "-c", "kill -USR1 $PPID; sleep 1000"], timeout_s=60, env=marker.environ())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert marker.survivors() == ()


def test_a_start_that_was_undone_starts_nothing_any_more():
    started: list[str] = []

    def start() -> process.Child[bytes]:
        started.append("now")
        return process.spawn(["true"])

    starting = process._Starting(start)
    starting.undo()  # as when a signal strikes before the thread has begun
    with pytest.raises(UserError, match="was not started"):
        starting.begin()
    assert started == []


def test_killing_a_group_leaves_the_exit_status_to_the_caller():
    child = process.spawn(["sleep", "1000"])
    process.kill_group(child.pid)
    assert child.wait() == -signal.SIGKILL
    process.kill_group(child.pid)  # gone already: nothing to do, and no error


def test_a_process_is_known_by_more_than_its_number():
    child = process.spawn(["sleep", "1000"])
    identity = process.identify(child.pid)
    assert identity is not None
    assert identity.is_running()
    since_boot_s = float(Path("/proc/uptime").read_text().split()[0])
    assert identity.started_ticks / os.sysconf("SC_CLK_TCK") == pytest.approx(since_boot_s, abs=60)
    assert not process.ProcessId(child.pid, identity.started_ticks + 1).is_running()
    child.kill()
    assert wait_until_ended(child.pid)
    assert not identity.is_running()  # a zombie runs no more
    child.wait()
    assert not identity.is_running()
    assert process.identify(child.pid) is None


def test_descendants_are_found_across_sessions():
    script = "setsid sleep 1000 & echo started; wait"
    child = process.spawn(["sh", "-c", script])
    _, stdout = process.pipes(child)
    assert stdout.readline() == b"started\n"
    below = process.descendants(child.pid)
    assert len(below) == 1
    assert child.pid in process.descendants(os.getpid())
    for pid in (child.pid, *below):
        os.kill(pid, signal.SIGKILL)
        assert wait_until_ended(pid)
    child.wait()
