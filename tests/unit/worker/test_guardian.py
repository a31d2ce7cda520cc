from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lem.base import process
from lem.base.launch import own_command
from tests.processes import Marker, children_of, wait_for, wait_until_ended
from tests.worker_rig import RawWorker, Rig

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 60
HANG = {"at": "generate", "do": "hang"}
HOLD_GIL = {"at": "generate", "do": "hold_gil"}
STUBBORN = {"at": "generate", "do": "ignore_term"}
CHILD = {"at": "load", "do": "spawn"}
FAR_CHILD = {"at": "load", "do": "spawn", "own_session": True}
FUTEX = ("202", "98")  # its number on x86-64 and on aarch64


def start_hanging(rig: Rig, *rules: Mapping[str, Any]) -> tuple[RawWorker, int]:
    """A worker whose engine hangs in the window by the last of the rules, and the pid of the engine's guardian."""
    reached = rig.folder / "reached"
    os.mkfifo(reached)
    announce = {"at": "generate", "do": "shell", "command": f"echo > {reached}", "when": {"max_output_tokens": 4}}
    rig.rules = [*rules[:-1], announce, rules[-1]]
    worker = RawWorker(rig)
    worker.send(rig.request("e").to_message())
    guardian = worker.until("engine")["pgid"]
    reached.read_text()
    engine = engine_of(guardian)
    wait_for(lambda: True if waits_for_a_lock(engine) else None)
    return worker, guardian


def waits_for_a_lock(pid: int) -> bool:
    """Whether the main thread is in futex(2), which is how both kinds of hanging look from outside."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] in FUTEX


def engine_of(guardian: int) -> int:
    """The engine process below a guardian: the oldest, since orphans come to the guardian later."""
    return min(children_of(guardian))


def others(marker: Marker, *pids: int) -> tuple[int, ...]:
    return tuple(pid for pid in marker.pids() if pid not in pids)


@pytest.mark.parametrize("rules", [(STUBBORN, HANG), (CHILD, FAR_CHILD, HANG), (HOLD_GIL,)])
def test_end_of_file_ends_an_engine_that_hangs(rig: Rig, rules: tuple[Mapping[str, Any], ...]):
    worker, guardian = start_hanging(rig, *rules)

    worker.hang_up()

    assert worker.child.wait() == 0
    assert not Path(f"/proc/{guardian}").exists()
    assert rig.marker.pids() == ()
    if rules == (HOLD_GIL,):
        assert "_hold_gil" in rig.log_of("e"), "the log ends with where it hung"


def test_a_signal_ends_the_worker_and_a_second_one_does_not_wait_for_a_stubborn_engine(rig: Rig):
    worker, guardian = start_hanging(rig, STUBBORN, HANG)
    worker.child.send_signal(signal.SIGTERM)
    assert "SIGTERM" in worker.until("error", exp_id="e-c1", kind="died")["message"]

    worker.child.send_signal(signal.SIGTERM)

    assert worker.child.wait() == 143
    assert not Path(f"/proc/{guardian}").exists()


@pytest.mark.parametrize("rules", [(HOLD_GIL,), (STUBBORN, CHILD, FAR_CHILD, HANG)])
def test_when_the_supervisor_is_killed_nothing_is_left(rig: Rig, rules: tuple[Mapping[str, Any], ...]):
    worker, guardian = start_hanging(rig, *rules)

    worker.child.kill()

    assert wait_until_ended(guardian)
    assert rig.marker.survivors() == ()


@pytest.mark.parametrize("rules", [(HOLD_GIL,), (CHILD, HANG)])
def test_when_the_guardian_is_killed_the_engine_is_ended_and_told_dead(rig: Rig, rules: tuple[Mapping[str, Any], ...]):
    worker, guardian = start_hanging(rig, *rules)

    os.kill(guardian, signal.SIGKILL)

    assert "SIGKILL" in worker.until("error", exp_id="e-c1", kind="died")["message"]
    wait_for(lambda: True if others(rig.marker, worker.child.pid) == () else None)
    worker.close()


def test_when_the_engine_process_is_killed_the_worker_goes_on(rig: Rig):
    worker, guardian = start_hanging(rig, CHILD, FAR_CHILD, {**HANG, "when": {"max_output_tokens": 4}})

    os.kill(engine_of(guardian), signal.SIGKILL)

    error = worker.until("error", exp_id="e-c1")
    assert (error["kind"], error["message"]) == ("died", "the engine process was killed by SIGKILL in phase window")
    assert others(rig.marker, worker.child.pid) == ()
    assert worker.run(rig.request("next", max_output_tokens=5))[-1]["engine_reused"] is False
    worker.close()


def test_when_supervisor_and_guardian_are_killed_at_once_the_engine_is_gone(rig: Rig):
    worker, guardian = start_hanging(rig, HOLD_GIL)
    engine = engine_of(guardian)
    for pid in (worker.child.pid, guardian):
        os.kill(pid, signal.SIGSTOP)  # neither can act on the other's end

    for pid in (worker.child.pid, guardian):
        os.kill(pid, signal.SIGKILL)

    assert wait_until_ended(engine)


# What is imported when the engine process forks is in the guardian for as long as the engine runs.
GUARDIAN = """
import os, runpy, sys
def report(event, _):
    if event == "os.fork":
        print(*sorted(name for name in sys.modules if name.partition(".")[0] == "lem"))
        sys.stdout.flush()
        os._exit(0)
sys.addaudithook(report)
runpy.run_module("lem", run_name="__main__")
"""


def test_the_guardian_imports_only_what_it_needs():
    command = (sys.executable, "-c", GUARDIAN, "worker", "--engine", "--control-fd", "0", "--message-fd", "1")
    found = process.run(command, timeout_s=60, cwd=ROOT)

    base = "dataclass errors importer launch log process units variables"
    modules = {"base": base, "cli": "main worker", "worker": "guardian"}
    expected = [f"lem.{package}.{name}" for package, names in modules.items() for name in names.split()]
    assert found.stdout.split() == sorted(["lem", *(f"lem.{package}" for package in modules), *expected])


def test_a_guarded_program_waits_for_a_byte_and_leaves_nothing_when_the_control_pipe_hangs_up():
    marker = Marker()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    words = ("sh", "-c", "setsid sleep 1000 & echo started; sleep 1000")
    command = (*own_command(sys.executable), "worker", "--control-fd", str(reader), "--program", *words)
    child = process.spawn(command, env=marker.environ(), pass_fds=(reader,))
    os.close(reader)
    os.write(writer, b"x")
    assert process.pipes(child)[1].read(7) == b"started"

    os.close(writer)

    assert child.wait(TIMEOUT_S) == 128 + signal.SIGKILL
    assert marker.survivors() == ()


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -SEGV $$", -signal.SIGSEGV)])
def test_a_guarded_program_ends_as_the_program_does(script: str, code: int):
    reader, writer = os.pipe2(os.O_CLOEXEC)
    command = (*own_command(sys.executable), "worker", "--control-fd", str(reader), "--program", "sh", "-c", script)
    child = process.spawn(command, pass_fds=(reader,))
    os.close(reader)
    os.write(writer, b"x")

    assert child.wait(TIMEOUT_S) == code
    os.close(writer)


def test_a_guarded_program_does_not_start_without_its_byte():
    reader, writer = os.pipe2(os.O_CLOEXEC)
    command = (*own_command(sys.executable), "worker", "--control-fd", str(reader), "--program", "echo", "started")
    child = process.spawn(command, pass_fds=(reader,))
    os.close(reader)
    os.close(writer)

    assert child.communicate(timeout=TIMEOUT_S)[0] == b""
