"""Workers as the host runs them: deadlines, with real processes, and in the end without any."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lem import __version__
from lem.base.errors import EngineError, UserError
from lem.base.launch import own_command
from lem.config.experiment import ExperimentConfig
from lem.orchestration.dispatch import (
    LocalExecutor,
    Outcome,
    Worker,
    WorkerUnavailable,
    event_of,
    outcome_of,
)
from lem.orchestration.schedule import Timeouts, Watch
from lem.orchestration.status import Event
from lem.record import read_record
from lem.worker.channel import (
    PROTOCOL_VERSION,
    ChannelError,
    Check,
    EngineProcess,
    Failure,
    Heartbeat,
    Message,
    Phase,
    Problem,
    Progress,
    Result,
    RunRequest,
)
from tests.processes import children_of, wait_until_ended
from tests.pythons import Python, find_pythons
from tests.worker_rig import COMMAND, SMALL, Rig

TIMEOUTS = Timeouts(load_s=100.0, experiment_s=50.0, silence_s=30.0, heartbeat_s=20.0)
REQUEST = RunRequest({}, {"experiment_id": "e"}, "/results/e", "key", True)
HEARTBEAT = Heartbeat()
RESULT = Result("e", engine_reused=False)
ERROR = Failure("e", "out_of_memory", "does not fit", "ask for less", True, "load", True, "last words")


def phase(name: str) -> Phase:
    return Phase("e", name)


PROGRESS = Progress("e", 3, 9, "requests")
LOAD = phase("load")

# Messages, and between which seconds they come, one every 10 s.
Said = tuple[Message, float, float]


@pytest.mark.parametrize(
    ("said", "rest_s", "late_s", "kind", "words"),
    [
        ([], 0.0, 20.0, "channel", "20.0 s"),
        ([(HEARTBEAT, 0, 30)], 0.0, 30.0, "silent", "silence_timeout_seconds"),
        # Phases and progress are signs of progress.
        ([(HEARTBEAT, 0, 25), (phase("prepare"), 25, 26), (HEARTBEAT, 30, 55)], 0.0, 55.0, "silent", "phase prepare"),
        ([(HEARTBEAT, 0, 25), (PROGRESS, 25, 26), (HEARTBEAT, 30, 55)], 0.0, 55.0, "silent", "phase start"),
        # Loading has a time of its own, of which power at rest before it is no part.
        ([(LOAD, 1, 2), (PROGRESS, 0, 100), (LOAD, 0, 100)], 0.0, 101.0, "timeout", "load_timeout_seconds"),
        ([(phase("prepare"), 0, 140)], 45.0, 145.0, "timeout", "2m 25s (in phase prepare)"),
        (
            [(phase("prepare"), 0, 140), (LOAD, 144, 145), (PROGRESS, 144, 240)],
            45.0,
            244.0,
            "timeout",
            "1m 40s (in phase load)",
        ),
        # The rest has its time from the end of the load, whatever phases follow.
        (
            [(PROGRESS, 0, 90), (phase("idle"), 90, 91), (phase("window"), 90, 140)],
            0.0,
            140.0,
            "timeout",
            "experiment_timeout_seconds",
        ),
    ],
)
def test_what_a_worker_says_moves_its_deadlines(said: list[Said], rest_s: float, late_s: float, kind: str, words: str):
    watch = Watch(replace(TIMEOUTS, rest_s=rest_s), 0.0)
    for message, start_s, end_s in said:
        for ten in range(math.ceil((end_s - start_s) / 10)):
            watch.heard(message, start_s + 10 * ten)
    assert watch.expired(late_s - 0.1) is None
    assert watch.next_deadline == pytest.approx(late_s)
    error = watch.expired(late_s)
    assert error is not None
    assert (error.kind, error.is_permanent) == (kind, False)
    assert words in f"{error.message} {error.hint}"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (replace(RESULT, exp_id="other"), "expected an answer about e, got one about"),
        (replace(ERROR, exp_id="other"), "expected an answer about e, got one about"),
        (replace(ERROR, exp_id=None), "does not fit"),  # it could not read the request
    ],
)
def test_an_answer_to_something_else_is_an_error_of_the_channel(message: Result | Failure, words: str):
    with pytest.raises(ChannelError, match=words):
        outcome_of(REQUEST, message)


def test_events_are_those_of_this_experiment_alone():
    how_far = {"phase_done": 3, "phase_total": 9, "text": "requests", "power_w": None}
    assert event_of(REQUEST, LOAD) == Event("phase", data={"exp_id": "e", "phase": "load"})
    assert event_of(REQUEST, PROGRESS) == Event("progress", data={"exp_id": "e", **how_far})
    assert event_of(REQUEST, HEARTBEAT) == Event("tick")
    assert event_of(REQUEST, Phase("other", "load")) is None
    assert event_of(REQUEST, EngineProcess(1, 1)) is None


PATIENT = Timeouts(load_s=100.0, experiment_s=100.0, silence_s=100.0, heartbeat_s=100.0)
HANG = {"at": "generate", "do": "hang"}
HELLO = {"type": "hello", "protocol": PROTOCOL_VERSION, "lem_version": __version__, "pid": 1, "environment": {}}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig.leaving_nothing(tmp_path) as rig:
        yield rig


class Events(list[Event]):
    """What was told, and something to do when a phase begins."""

    def __init__(self, phase: str = "", then: Callable[[], object] | None = None) -> None:
        super().__init__()
        self._phase = phase
        self._then = then

    def __call__(self, event: Event) -> None:
        self.append(event)
        if event.kind == "phase" and event.data["phase"] == self._phase and self._then is not None:
            self._then()


def failure(outcome: Outcome) -> EngineError:
    assert outcome.error is not None
    return outcome.error


def real_worker(rig: Rig, command: Sequence[str] = COMMAND) -> Worker:
    return Worker(command, env=rig.environ())


def say(message: dict[str, object]) -> str:
    return f"import sys; print({json.dumps(json.dumps(message))}, flush=True); sys.stdin.read()"


def scripted_worker(rig: Rig, *lines: object, then: str = "") -> Worker:
    """A worker that says hello, and lines after it got an order, and then does something."""
    said = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    script = (
        "import os, signal, sys, time\n"
        f"print({json.dumps(json.dumps(HELLO))}, flush=True)\n"
        "sys.stdin.readline()\n"
        f"for line in {said!r}: print(line, flush=True)\n"
        f"{then or 'sys.stdin.read()'}\n"
    )
    return Worker((sys.executable, "-c", script), env=rig.environ())


def test_an_experiment_ends_with_a_result_and_tells_its_phases_however_large_the_request(rig: Rig):
    worker, events = real_worker(rig), Events()
    large = rig.request("e", extra_metadata={"note": "x" * 1_000_000})  # more than a pipe holds
    assert worker.run(large, events, PATIENT).error is None
    assert [event.data["phase"] for event in events if event.kind == "phase"][-1] == "write"
    assert (rig.folder / "e" / "result.json").exists()
    worker.kill()
    assert not worker.is_open
    assert rig.marker.pids() == ()
    worker.kill()  # nothing to do
    worker.stop()


def is_reused(worker: Worker, request: RunRequest) -> bool | None:
    assert worker.run(request, Events(), PATIENT).error is None
    return read_record(Path(request.result_dir, "result.json")).validity.engine_reused


def test_the_engine_is_reused_until_it_is_unloaded_or_another_is_due(rig: Rig):
    worker = real_worker(rig)
    requests = [rig.request("e1"), rig.request("e2"), rig.request("e3", fp_precision="float32")]
    assert [is_reused(worker, request) for request in requests] == [False, True, False]
    worker.unload()
    assert len(rig.marker.pids()) == 1  # the supervisor alone
    assert is_reused(worker, rig.request("e4", fp_precision="float32", keep_engine=False)) is False
    assert is_reused(worker, rig.request("e5", fp_precision="float32")) is False
    worker.stop()


def test_an_engine_without_progress_is_silent_and_the_next_run_has_a_new_worker(rig: Rig):
    rig.rules = [{**HANG, "when": {"max_output_tokens": 8}}]
    worker = real_worker(rig)
    outcome = worker.run(rig.request("e1", max_output_tokens=8), Events(), Timeouts(silence_s=3.0))
    assert (failure(outcome).kind, outcome.phase) == ("silent", "window")
    assert rig.marker.pids() == ()
    assert "trivial_engine.py" in rig.log_of("e1")  # where it hung
    assert worker.run(rig.request("e2"), Events(), PATIENT).error is None
    worker.stop()


@pytest.mark.parametrize(
    "line",
    [
        None,
        "Loading weights: 100%",
        {"type": "unheard"},
        {"type": "result", "exp_id": "e"},
        {"type": "error", "exp_id": "other", "kind": "", "message": "", "hint": "", "permanent": False, "phase": None}
        | {"engine_lost": False},
    ],
    ids=["silence", "text", "unknown", "incomplete", "of another"],
)
def test_silence_or_garbage_on_the_channel_is_an_error_and_ends_the_worker(rig: Rig, line: object):
    worker = scripted_worker(rig) if line is None else scripted_worker(rig, line)
    error = failure(worker.run(rig.request("e"), Events(), Timeouts(heartbeat_s=0.5) if line is None else PATIENT))
    assert error.kind == "channel"
    assert not worker.is_open
    assert rig.marker.pids() == ()


def test_a_worker_that_dies_is_told_with_what_it_said(rig: Rig):
    worker = scripted_worker(rig, then="print('no space', file=sys.stderr); os.kill(os.getpid(), signal.SIGABRT)")
    error = failure(worker.run(rig.request("e"), Events(), PATIENT))
    assert error.kind == "died"
    assert error.message == "the worker was killed by SIGABRT: no space"
    assert not worker.is_open


def test_a_worker_that_died_between_two_experiments_costs_none_of_them(rig: Rig):
    worker = real_worker(rig)
    worker.run(rig.request("e1"), Events(), PATIENT)
    supervisor = rig.marker.pid_of("worker")
    os.kill(supervisor, signal.SIGKILL)
    assert wait_until_ended(supervisor)
    assert is_reused(worker, rig.request("e2")) is False
    worker.stop()


def test_a_stopped_guardian_does_not_save_an_engine_whose_supervisor_died(rig: Rig):
    rig.rules = [HANG]
    worker = real_worker(rig)

    def stop_guardian_and_kill_supervisor() -> None:
        supervisor = rig.marker.pid_of("worker")
        (guardian,) = children_of(supervisor)
        os.kill(guardian, signal.SIGSTOP)
        os.kill(supervisor, signal.SIGKILL)

    error = failure(worker.run(rig.request("e"), Events("window", stop_guardian_and_kill_supervisor), PATIENT))
    assert error.kind == "died"
    assert rig.marker.survivors() == ()


def test_a_check_is_answered_for_each_configuration_and_the_next_run_has_a_fresh_engine_process(rig: Rig):
    named = [ExperimentConfig.from_dict({**SMALL, "model": name}).to_dict() for name in ("here", "gone", "unsure")]
    rig.rules = [
        {"at": "check", "do": "fail", "text": "no such model", "permanent": True, "when": {"model.name": "gone"}},
        {"at": "check", "do": "fail", "text": "the hub said s3cret-token", "when": {"model.name": "unsure"}},
        {"at": "check", "do": "shell", "command": f"echo $PPID >> {rig.folder}/pids"},
        {"at": "load", "do": "shell", "command": f"echo $PPID >> {rig.folder}/pids"},
    ]
    worker = Worker(COMMAND, env=rig.environ())
    answers = worker.check(Check(tuple(named), {"HF_TOKEN": "s3cret-token"}))
    assert [item for item in answers if not isinstance(item, EngineProcess)] == [
        Problem("check", 1, "no such model", "", is_certain=True),
        Problem("check", 2, "the hub said [redacted]", "", is_certain=False),
        Result("check", engine_reused=False),
    ]
    assert worker.run(rig.request("a"), lambda _event: None, TIMEOUTS).error is None
    assert len(set((rig.folder / "pids").read_text().split())) == 2
    worker.stop()


def test_a_check_that_hangs_or_dies_ends_with_what_it_found_before(rig: Rig):
    config = ExperimentConfig.from_dict(SMALL).to_dict()
    rig.rules = [{"at": "check", "do": "fail", "permanent": True}, {"at": "check", "do": "hang"}]
    worker = Worker(COMMAND, env=rig.environ())
    answers = worker.check(Check((config,)), timeout_s=5.0)
    assert [type(item) for item in answers if not isinstance(item, Heartbeat)] == [EngineProcess, Problem]
    assert not worker.is_open
    rig.rules = [{"at": "check", "do": "exit", "code": 3}]
    dead = Worker(COMMAND, env=rig.environ())
    last = dead.check(Check((config,)))[-1]
    assert isinstance(last, Failure)
    assert (last.kind, last.exp_id) == ("died", "check")
    dead.stop()


def test_an_error_of_the_listener_leaves_no_worker(rig: Rig):
    worker = real_worker(rig)

    def fail() -> None:
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="terminal"):
        worker.run(rig.request("e"), Events("load", fail), PATIENT)
    assert not worker.is_open
    assert rig.marker.survivors() == ()


@pytest.mark.parametrize(
    ("script", "reason", "hint"),
    [
        (say({**HELLO, "protocol": PROTOCOL_VERSION + 1}), "the worker is lem", "lem.pyz"),
        (say({**HELLO, "lem_version": "0.0.0"}), "the worker is lem", "lem.pyz"),
        (say({"type": "heartbeat"}), "expected hello, got heartbeat", sys.executable),
        ("import sys; sys.exit('lem needs Python 3.10 or newer')", "lem needs Python 3.10 or newer", sys.executable),
        ("print('Welcome to this container!')", "not a message: b'Welcome", sys.executable),
        ("pass", "it ended with exit code 0", sys.executable),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "it was killed by SIGKILL", sys.executable),
        ("import sys; sys.stdin.read()", "no message within", sys.executable),
    ],
)
def test_a_worker_that_does_not_start_or_is_another_lem_is_told_with_why(rig: Rig, script: str, reason: str, hint: str):
    worker = Worker((sys.executable, "-c", script), env=rig.environ())
    with pytest.raises(WorkerUnavailable) as caught:
        worker.open(timeout_s=0.3 if reason == "no message within" else 60.0)
    assert reason in caught.value.message
    assert hint in caught.value.hint
    assert not worker.is_open


def dying_worker(rig: Rig, deaths: int) -> Worker:
    """A worker of which the first so many die before they say hello."""
    script = (
        "import os, pathlib, sys\n"
        f"seen = pathlib.Path({str(rig.folder / 'starts')!r})\n"
        "with seen.open('a') as file: file.write('x')\n"
        f"if len(seen.read_text()) <= {deaths}: sys.exit('no memory for a moment')\n"
        f"os.execv({COMMAND[0]!r}, {list(COMMAND)!r})\n"
    )
    return Worker((sys.executable, "-c", script), env=rig.environ())


def test_a_worker_that_dies_before_its_hello_is_started_once_more(rig: Rig):
    worker = dying_worker(rig, 1)
    assert worker.run(rig.request("e"), Events(), PATIENT).error is None
    assert (rig.folder / "starts").read_text() == "xx"
    worker.stop()


def test_workers_that_die_before_their_hello_fail_the_experiment_and_not_the_next_one(rig: Rig):
    worker = dying_worker(rig, 2)
    error = failure(worker.run(rig.request("e1"), Events(), PATIENT))
    assert (error.kind, error.is_permanent) == ("died", True)
    assert error.message == "the worker did not start: no memory for a moment"
    assert worker.run(rig.request("e2"), Events(), PATIENT).error is None
    assert (rig.folder / "starts").read_text() == "xxx"
    worker.stop()


def test_a_worker_for_which_there_is_no_temporary_file_is_unavailable(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(rig.folder / "gone"))
    with pytest.raises(WorkerUnavailable, match=r"no worker can be started: .*gone.*: no such file") as caught:
        real_worker(rig).run(rig.request("e"), Events(), PATIENT)
    assert "TMPDIR" in caught.value.hint


def test_what_may_be_left_elsewhere_is_looked_after_only_when_the_worker_did_not_end_by_itself(rig: Rig):
    calls: list[str] = []
    worker = Worker(COMMAND, env=rig.environ(), shares_pids=False, backstop=lambda: calls.append("backstop"))
    worker.open()
    worker.stop()
    assert calls == []
    worker.open()
    worker.kill()
    assert calls == ["backstop"]


@pytest.mark.parametrize("python", [item for item in find_pythons() if item.is_supported], ids=str)
def test_the_same_worker_runs_under_another_python(rig: Rig, python: Python):
    worker = real_worker(rig, (*own_command(str(python.path)), "worker"))
    assert worker.run(rig.request("e"), Events(), PATIENT).error is None
    assert worker.environment["python"] == str(python)
    worker.stop()
    assert rig.log_of("e") == ""  # nothing to warn of, and an idle engine leaves without a word


def test_the_local_executor_has_one_worker_under_the_python_it_is_told():
    executor = LocalExecutor()
    assert executor.python == sys.executable
    assert executor.worker_for("pytorch") is executor.worker_for("vllm")
    assert LocalExecutor("python3").python == shutil.which("python3")
    with pytest.raises(UserError, match="--python /no/such/python"):
        LocalExecutor("/no/such/python")
