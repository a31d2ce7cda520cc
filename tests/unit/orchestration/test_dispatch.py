"""Workers as the host runs them: deadlines, with real processes, and in the end without any."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lem import __version__
from lem.base import process
from lem.base.errors import EngineError, Interrupted, UserError
from lem.orchestration.dispatch import (
    LocalExecutor,
    Outcome,
    Timeouts,
    Watch,
    Worker,
    WorkerUnavailable,
    event_of,
    outcome_of,
)
from lem.orchestration.schedule import StopRequest
from lem.orchestration.status import Event
from lem.record import read_record
from lem.worker.channel import (
    PROTOCOL_VERSION,
    ChannelError,
    EngineProcess,
    Failure,
    Heartbeat,
    Message,
    Phase,
    Progress,
    Result,
    RunRequest,
)
from lem.worker.launch import own_command
from tests.processes import children_of, wait_for, wait_until_ended
from tests.pythons import Python, find_pythons
from tests.worker_rig import COMMAND, Rig

TIMEOUTS = Timeouts(load_s=100.0, experiment_s=50.0, silence_s=30.0, heartbeat_s=20.0)
REQUEST = RunRequest({}, {"experiment_id": "e"}, "/results/e", "key", True)
HEARTBEAT = Heartbeat()
RESULT = Result("e", engine_reused=False)
ERROR = Failure("e", "out_of_memory", "does not fit", "ask for less", True, "load", True, "last words")


def phase(name: str) -> Phase:
    return Phase("e", name)


def progress(done: int) -> Progress:
    return Progress("e", done, 9, "requests")


def kept_alive(watch: Watch, *messages: Message, until: float, start: float = 0.0) -> None:
    """Tell the watch something every 10 s from a start until a moment, all of the messages at once."""
    now = start
    while now < until:
        for message in messages:
            watch.heard(message, now)
        now += 10.0


def kind_at(watch: Watch, now: float) -> str | None:
    error = watch.expired(now)
    return None if error is None else error.kind


def test_nothing_is_late_before_its_time():
    watch = Watch(TIMEOUTS, 0.0)
    assert watch.next_deadline == 20.0
    assert watch.expired(19.9) is None


def test_a_worker_that_says_nothing_at_all_is_lost_after_the_heartbeats_are_due():
    watch = Watch(TIMEOUTS, 0.0)
    error = watch.expired(20.0)
    assert error is not None
    assert error.kind == "channel"
    assert "20.0 s" in error.message


def test_heartbeats_are_no_sign_of_progress():
    watch = Watch(TIMEOUTS, 0.0)
    kept_alive(watch, HEARTBEAT, until=30.0)
    error = watch.expired(30.0)
    assert error is not None
    assert error.kind == "silent"
    assert "silence_timeout_seconds" in error.hint
    assert error.is_permanent is False


@pytest.mark.parametrize("sign", [phase("prepare"), progress(1)])
def test_phases_and_progress_are_signs_of_progress(sign: Message):
    watch = Watch(TIMEOUTS, 0.0)
    kept_alive(watch, HEARTBEAT, until=25.0)
    watch.heard(sign, 25.0)
    kept_alive(watch, HEARTBEAT, until=55.0, start=30.0)
    assert kind_at(watch, 54.9) is None
    assert kind_at(watch, 55.0) == "silent"


def test_loading_has_a_time_of_its_own():
    watch = Watch(TIMEOUTS, 0.0)
    watch.heard(phase("load"), 1.0)
    kept_alive(watch, progress(1), phase("load"), until=100.0)
    assert kind_at(watch, 100.9) is None
    error = watch.expired(101.0)
    assert error is not None
    assert error.kind == "timeout"
    assert "load_timeout_seconds" in error.hint
    assert "phase load" in error.message


def test_power_at_rest_before_the_load_is_no_part_of_it():
    watch = Watch(replace(TIMEOUTS, rest_s=45.0), 0.0)
    kept_alive(watch, phase("prepare"), until=140.0)
    assert kind_at(watch, 144.0) is None
    assert "2m 25s (in phase prepare)" in str(watch.expired(145.0))
    watch.heard(phase("load"), 144.0)
    kept_alive(watch, progress(1), start=144.0, until=240.0)
    assert kind_at(watch, 243.0) is None
    assert "1m 40s (in phase load)" in str(watch.expired(244.0))


def test_the_rest_has_its_time_from_the_end_of_the_load_whatever_phases_follow():
    watch = Watch(TIMEOUTS, 0.0)
    kept_alive(watch, progress(1), until=90.0)
    watch.heard(phase("idle"), 90.0)
    kept_alive(watch, phase("window"), until=140.0, start=90.0)
    assert kind_at(watch, 139.9) is None
    error = watch.expired(140.0)
    assert error is not None
    assert error.kind == "timeout"
    assert "experiment_timeout_seconds" in error.hint


def test_a_result_is_an_outcome():
    assert outcome_of(REQUEST, RESULT) == Outcome()


def test_an_error_is_an_outcome_with_all_that_the_worker_reported():
    outcome = outcome_of(REQUEST, ERROR)
    error = outcome.error
    assert error is not None
    assert (error.kind, error.message, error.hint) == ("out_of_memory", "does not fit", "ask for less")
    assert error.is_permanent is True
    assert (outcome.phase, outcome.log_tail) == ("load", "last words")


@pytest.mark.parametrize("message", [replace(RESULT, exp_id="other"), replace(ERROR, exp_id="other")])
def test_an_answer_to_something_else_is_an_error_of_the_channel(message: Result | Failure):
    with pytest.raises(ChannelError, match="expected an answer about e, got one about"):
        outcome_of(REQUEST, message)


def test_a_worker_that_cannot_read_the_request_says_why():
    with pytest.raises(ChannelError, match="does not fit"):
        outcome_of(REQUEST, replace(ERROR, exp_id=None))


def test_events_are_those_of_this_experiment_alone():
    how_far = {"phase_done": 3, "phase_total": 9, "text": "requests", "power_w": None}
    assert event_of(REQUEST, phase("load")) == Event("phase", data={"exp_id": "e", "phase": "load"})
    assert event_of(REQUEST, progress(3)) == Event("progress", data={"exp_id": "e", **how_far})
    assert event_of(REQUEST, HEARTBEAT) == Event("tick")
    assert event_of(REQUEST, Phase("other", "load")) is None
    assert event_of(REQUEST, EngineProcess(1, 1)) is None


ROOT = Path(__file__).resolve().parents[3]
PATIENT = Timeouts(load_s=100.0, experiment_s=100.0, silence_s=100.0, heartbeat_s=100.0)
HANG = {"at": "generate", "do": "hang"}
HELLO = {"type": "hello", "protocol": PROTOCOL_VERSION, "lem_version": __version__, "pid": 1, "environment": {}}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig.leaving_nothing(tmp_path) as rig:
        yield rig


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    stop = StopRequest()
    yield stop
    stop.close()


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


def test_an_experiment_ends_with_a_result_and_tells_its_phases(rig: Rig):
    worker, events = real_worker(rig), Events()
    outcome = worker.run(rig.request("e"), events, PATIENT)
    assert outcome.error is None
    assert [event.data["phase"] for event in events if event.kind == "phase"][-1] == "write"
    assert (rig.folder / "e" / "result.json").exists()
    worker.stop()


def is_reused(worker: Worker, request: RunRequest) -> bool | None:
    assert worker.run(request, Events(), PATIENT).error is None
    return read_record(Path(request.result_dir, "result.json")).validity.engine_reused


def test_the_engine_is_reused_until_it_is_unloaded_or_another_is_due(rig: Rig):
    worker = real_worker(rig)
    first, again, other, third, fourth = (
        rig.request("e1"),
        rig.request("e2"),
        rig.request("e3", fp_precision="float32"),
        rig.request("e4", fp_precision="float32", keep_engine=False),
        rig.request("e5", fp_precision="float32"),
    )
    assert [is_reused(worker, request) for request in (first, again, other)] == [False, True, False]
    worker.unload()
    assert len(rig.marker.pids()) == 1  # the supervisor alone
    assert is_reused(worker, third) is False
    assert is_reused(worker, fourth) is False
    worker.stop()


def test_a_failed_experiment_leaves_a_worker_that_can_run_the_next(rig: Rig):
    rig.rules = [{"at": "load", "do": "fail", "kind": "out_of_memory", "permanent": True, "when": {"gpus": []}}]
    worker = real_worker(rig)
    outcome = worker.run(rig.request("e1", gpus=[]), Events(), PATIENT)
    assert outcome.error is not None
    assert (outcome.error.kind, outcome.error.is_permanent, outcome.phase) == ("out_of_memory", True, "load")
    assert worker.run(rig.request("e2"), Events(), PATIENT).error is None
    worker.stop()


def test_a_load_that_hangs_ends_at_its_timeout_and_leaves_nothing(rig: Rig):
    rig.rules = [{"at": "load", "do": "hang"}]
    worker = real_worker(rig)
    error = failure(worker.run(rig.request("e"), Events(), Timeouts(load_s=1.0)))
    assert error.kind == "timeout"
    assert not worker.is_open
    assert rig.marker.pids() == ()


def test_an_experiment_that_takes_too_long_ends_at_its_timeout(rig: Rig):
    rig.token_s = 1000.0
    worker = real_worker(rig)
    error = failure(worker.run(rig.request("e"), Events(), Timeouts(experiment_s=0.5)))
    assert error.kind == "timeout"
    assert "experiment_timeout_seconds" in error.hint
    assert rig.marker.pids() == ()


def test_an_engine_without_progress_is_silent_and_the_next_run_has_a_new_worker(rig: Rig):
    rig.rules = [{**HANG, "when": {"max_output_tokens": 8}}]
    worker = real_worker(rig)
    outcome = worker.run(rig.request("e1", max_output_tokens=8), Events(), Timeouts(silence_s=3.0))
    assert outcome.error is not None
    assert (outcome.error.kind, outcome.phase) == ("silent", "window")
    assert rig.marker.pids() == ()
    assert "trivial_engine.py" in rig.log_of("e1")  # where it hung
    assert worker.run(rig.request("e2"), Events(), PATIENT).error is None
    worker.stop()


def test_a_worker_that_says_nothing_at_all_is_given_up(rig: Rig):
    worker = scripted_worker(rig)
    error = failure(worker.run(rig.request("e"), Events(), Timeouts(heartbeat_s=0.5)))
    assert error.kind == "channel"
    assert rig.marker.pids() == ()


@pytest.mark.parametrize(
    "line",
    [
        "Loading weights: 100%",
        {"type": "unheard"},
        {"type": "result", "exp_id": "e"},
        {"type": "error", "exp_id": "other", "kind": "", "message": "", "hint": "", "permanent": False, "phase": None}
        | {"engine_lost": False},
    ],
    ids=["text", "unknown", "incomplete", "of another"],
)
def test_garbage_on_the_channel_is_an_error_and_ends_the_worker(rig: Rig, line: object):
    worker = scripted_worker(rig, line)
    error = failure(worker.run(rig.request("e"), Events(), PATIENT))
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


def test_a_stop_ends_the_experiment_and_the_worker(rig: Rig, stop: StopRequest):
    rig.rules = [HANG]
    worker = real_worker(rig)
    with pytest.raises(Interrupted) as caught:
        worker.run(rig.request("e"), Events("window", lambda: stop.request(signal.SIGTERM)), PATIENT, stop)
    assert caught.value.signum == signal.SIGTERM
    assert not worker.is_open
    assert rig.marker.pids() == ()


@contextlib.contextmanager
def alarms_ask(stop: StopRequest, times: int = 1) -> Iterator[None]:
    """Let SIGALRM do what a Ctrl-C does; the first one sets the timer for the next, and so on."""
    left = times

    def ask(*_: object) -> None:
        nonlocal left
        left -= 1
        if left:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
        stop.request(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, ask)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # none may come once its handler is gone
        signal.signal(signal.SIGALRM, before)


def test_a_signal_wakes_a_host_that_waits(rig: Rig, stop: StopRequest):
    rig.rules = [HANG]
    worker = real_worker(rig)
    events = Events("window", lambda: signal.setitimer(signal.ITIMER_REAL, 0.5))
    with alarms_ask(stop), pytest.raises(Interrupted):
        worker.run(rig.request("e"), events, PATIENT, stop)
    assert rig.marker.pids() == ()


def test_a_second_signal_kills_at_once(rig: Rig, stop: StopRequest):
    is_stubborn = rig.folder / "stubborn"
    announce = {"at": "generate", "do": "shell", "command": f"touch '{is_stubborn}'"}
    rig.rules = [{"at": "generate", "do": "ignore_term"}, announce, {"at": "generate", "do": "hold_gil"}]
    worker = real_worker(rig)

    def ask_soon() -> None:
        wait_for(lambda: is_stubborn.exists() or None)
        signal.setitimer(signal.ITIMER_REAL, 0.5)

    with alarms_ask(stop, times=2), pytest.raises(Interrupted):
        worker.run(rig.request("e"), Events("window", ask_soon), PATIENT, stop)
    assert not worker.is_open
    assert rig.marker.survivors() == ()


def test_an_error_of_the_listener_leaves_no_worker(rig: Rig):
    worker = real_worker(rig)

    def fail() -> None:
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="terminal"):
        worker.run(rig.request("e"), Events("load", fail), PATIENT)
    assert not worker.is_open
    assert rig.marker.survivors() == ()


def test_kill_is_at_once_and_leaves_nothing(rig: Rig):
    worker = real_worker(rig)
    worker.run(rig.request("e"), Events(), PATIENT)
    worker.kill()
    assert not worker.is_open
    assert rig.marker.pids() == ()
    worker.kill()  # nothing to do
    worker.stop()


@pytest.mark.parametrize(
    "hello", [{**HELLO, "protocol": PROTOCOL_VERSION + 1}, {**HELLO, "lem_version": "0.0.0"}], ids=["protocol", "lem"]
)
def test_another_version_of_lem_is_refused(rig: Rig, hello: dict[str, object]):
    script = f"import sys; print({json.dumps(json.dumps(hello))}, flush=True); sys.stdin.read()"
    worker = Worker((sys.executable, "-c", script), env=rig.environ())
    with pytest.raises(WorkerUnavailable, match="the worker is lem") as caught:
        worker.open()
    assert "lem.pyz" in caught.value.hint
    assert not worker.is_open


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import sys; sys.exit('lem needs Python 3.10 or newer')", "lem needs Python 3.10 or newer"),
        ("print('Welcome to this container!')", "not a message: b'Welcome"),
        ("pass", "closed the channel"),
        ("""print('{"type":"heartbeat"}')""", "expected hello, got heartbeat"),
    ],
)
def test_a_worker_that_does_not_start_is_told_with_why(rig: Rig, script: str, reason: str):
    worker = Worker((sys.executable, "-c", script), env=rig.environ())
    with pytest.raises(WorkerUnavailable) as caught:
        worker.open()
    assert reason in caught.value.message
    assert sys.executable in caught.value.hint
    assert not worker.is_open


def test_a_worker_that_never_says_hello_is_given_up(rig: Rig):
    worker = Worker((sys.executable, "-c", "import sys; sys.stdin.read()"), env=rig.environ())
    with pytest.raises(WorkerUnavailable, match="no message within"):
        worker.open(timeout_s=0.3)


def test_what_may_be_left_elsewhere_is_looked_after_only_when_the_worker_did_not_end_by_itself(rig: Rig):
    calls: list[str] = []
    worker = Worker(COMMAND, env=rig.environ(), shares_pids=False, backstop=lambda: calls.append("backstop"))
    worker.open()
    worker.stop()
    assert calls == []
    worker.open()
    worker.kill()
    assert calls == ["backstop"]


def test_a_request_larger_than_a_pipe_arrives_whole(rig: Rig):
    worker = real_worker(rig)
    outcome = worker.run(rig.request("e", extra_metadata={"note": "x" * 1_000_000}), Events(), PATIENT)
    assert outcome.error is None
    worker.stop()


def test_a_killed_host_leaves_nothing(rig: Rig):
    rig.rules = [HANG, {"at": "load", "do": "spawn", "own_session": True}]
    request = json.dumps(rig.request("e").to_message())
    script = (
        "import json\n"
        "from lem.worker.channel import RunRequest\n"
        "from lem.orchestration.dispatch import LocalExecutor, Timeouts\n"
        f"request = RunRequest.from_message(json.loads({request!r}))\n"
        "worker = LocalExecutor().worker_for('pytorch')\n"
        "worker.run(request, lambda event: print(event.data.get('phase'), flush=True), Timeouts())\n"
    )
    host = process.spawn(
        (sys.executable, "-c", script), env={**rig.environ(), "PYTHONPATH": f"{ROOT}:{rig.environ()['PYTHONPATH']}"}
    )
    _, stdout = process.pipes(host)
    while stdout.readline() != b"window\n":
        assert host.poll() is None
    host.kill()
    host.communicate()
    assert rig.marker.survivors() == ()


@pytest.mark.parametrize("python", [item for item in find_pythons() if item.is_supported], ids=str)
def test_the_same_worker_runs_under_another_python(rig: Rig, python: Python):
    worker = real_worker(rig, (*own_command(str(python.path)), "worker"))
    assert worker.run(rig.request("e"), Events(), PATIENT).error is None
    assert worker.environment["python"] == str(python)
    worker.stop()
    assert rig.log_of("e") == ""  # nothing to warn of, and an idle engine leaves without a word


def test_the_local_executor_takes_the_python_it_is_told():
    assert LocalExecutor("python3").python == shutil.which("python3")
    assert LocalExecutor().python == sys.executable


def test_one_worker_serves_every_backend_of_the_local_executor():
    executor = LocalExecutor()
    assert executor.worker_for("pytorch") is executor.worker_for("vllm")


def test_a_python_that_is_not_there_is_an_error_for_people():
    with pytest.raises(UserError, match="--python /no/such/python"):
        LocalExecutor("/no/such/python")
