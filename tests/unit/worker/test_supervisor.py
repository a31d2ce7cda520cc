"""What the supervisor makes of things that happen at the same moment, which real processes do only now and then."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lem.base import process
from lem.base.process import ProcessId
from lem.config.experiment import ExperimentConfig
from lem.meters.samples import ClockPair, read_tail
from lem.worker.channel import MAX_LINE_B, LineBuffer, Outbox, RunRequest, encode_line
from lem.worker.children import EndStep, EngineChild
from lem.worker.supervisor import Supervisor
from tests.processes import wait_for
from tests.worker_rig import decode_report

ROOT = Path(__file__).resolve().parents[3]
RESULT = {"type": "result", "engine_reused": True}
ERROR = {
    "type": "error",
    "kind": "engine",
    "message": "",
    "hint": "",
    "permanent": False,
    "phase": None,
    "log_tail": "",
}


def run_message(folder: Path, name: str, *, engine_key: str = "key", keep_engine: bool = True) -> dict[str, Any]:
    (folder / name).mkdir()
    return RunRequest({}, {"experiment_id": name}, str(folder / name), engine_key, keep_engine).to_message()


class PipedEngine:
    """An engine process that is none, in place of `EngineChild`: pipes whose other ends a test holds."""

    def __init__(self) -> None:
        self.message_fd, self._messages = os.pipe()
        self.output_fd, self._output = os.pipe()
        for descriptor in (self.message_fd, self.output_fd):
            os.set_blocking(descriptor, False)
        self._control, control = os.pipe()
        self.control = Outbox(control)
        self.identity = ProcessId(1, 1)
        self.engine_key: str | None = None
        self.is_stuck = False
        self.next_step_at: float | None = None
        self.steps: list[EndStep] = []  # by which it was to be ended; the second one ends it
        self.exit_code: int | None = None  # what `reap` finds; None while it lives
        self.looks_survived = 0  # how often `reap` is answered with None though it has ended
        self.on_run: Callable[[Mapping[str, Any]], None] = lambda _message: None

    @property
    def step(self) -> EndStep | None:
        return self.steps[-1] if self.steps else None

    def say(self, message: Mapping[str, Any] | bytes) -> None:
        os.write(self._messages, message if isinstance(message, bytes) else encode_line(message))

    def send(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "run":
            self.on_run(message)

    def end(self, step: EndStep, now: float) -> None:
        del now
        self.steps.append(step)
        if len(self.steps) > 1:
            self.exit_code = -9

    def tick(self, now: float) -> None:
        """Nothing comes by itself here."""

    def reap(self) -> int | None:
        if self.exit_code is not None and self.looks_survived > 0:
            self.looks_survived -= 1
            return None
        return self.exit_code

    def close(self) -> None:
        for descriptor in (self.message_fd, self.output_fd, self.control.descriptor):
            os.close(descriptor)
        for descriptor in (self._messages, self._output, self._control):
            os.close(descriptor)


class Host:
    """Both ends that a host has, and a supervisor at work on a thread."""

    def __init__(self, *engines: PipedEngine, **options: float) -> None:
        waiting = list(engines)
        host_in, self.orders = os.pipe()
        self._reports, host_out = os.pipe()
        wakeup, self.signals = os.pipe()
        start: Callable[[], EngineChild] = lambda: waiting.pop(0)  # type: ignore[assignment,return-value] # noqa: E731
        self.supervisor = Supervisor(host_in, host_out, wakeup, start, **options)
        self._lines = LineBuffer()
        self._messages: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self._thread = threading.Thread(target=lambda: self.exit_codes.append(self.supervisor.run()), daemon=True)
        self._thread.start()

    def order(self, *messages: Mapping[str, Any]) -> None:
        os.write(self.orders, b"".join(map(encode_line, messages)))

    def until(self, *kinds: str, **fields: object) -> dict[str, Any]:
        while True:
            while self._messages:
                message = self._messages.pop(0)
                if message["type"] in kinds and all(message.get(name) == value for name, value in fields.items()):
                    return message
            self._messages += map(decode_report, self._lines.feed(os.read(self._reports, 65536)))

    def join(self) -> int:
        self._thread.join()
        return self.exit_codes[0]


@pytest.fixture
def engine() -> PipedEngine:
    return PipedEngine()


def test_what_was_printed_before_an_error_is_in_its_tail(tmp_path: Path, engine: PipedEngine):
    def fail(message: Mapping[str, Any]) -> None:
        engine.say({**ERROR, "exp_id": "e", "engine_lost": False})
        os.write(engine._output, b"line\n" * 10_000 + b"last words\n")

    engine.on_run = fail
    host = Host(engine)
    host.order(run_message(tmp_path, "e"))

    assert host.until("error")["log_tail"].splitlines()[-1] == "last words"


def test_an_engine_that_ends_while_the_next_experiment_comes_has_its_say_first(tmp_path: Path, engine: PipedEngine):
    second = PipedEngine()
    next_run = run_message(tmp_path, "e2")

    def answer_and_end(message: Mapping[str, Any]) -> None:
        engine.say({**RESULT, "exp_id": "e1"})
        engine.exit_code, engine.looks_survived = 0, 1  # seen when the next order comes, not at the end of this turn
        host.order(next_run)  # read in the same turn as the answer, and before it

    engine.on_run = answer_and_end
    second.on_run = lambda message: second.say({**RESULT, "exp_id": "e2", "engine_reused": False})
    host = Host(engine, second)
    host.order(run_message(tmp_path, "e1"))

    assert host.until("result")["exp_id"] == "e1"
    assert host.until("result")["engine_reused"] is False


def test_a_late_answer_is_not_taken_for_the_next_experiment(tmp_path: Path, engine: PipedEngine):
    host = Host(engine)
    answers = {"e1": ("e1", "e0", "e1"), "e2": ("e1", "e2")}

    def answer(message: Mapping[str, Any]) -> None:
        for name in answers[message["identity"]["experiment_id"]]:
            engine.say({**RESULT, "exp_id": name})

    engine.on_run = answer
    host.order(run_message(tmp_path, "e1"))
    assert host.until("result")["exp_id"] == "e1"
    host.order(run_message(tmp_path, "e2"))

    assert host.until("result")["exp_id"] == "e2"


def test_an_engine_process_that_talks_nonsense_is_ended_and_its_experiment_answered(
    tmp_path: Path, engine: PipedEngine
):
    host = Host(engine)
    engine.on_run = lambda _message: engine.say(b"CUDA initialised\n")
    host.order(run_message(tmp_path, "e"))

    error = host.until("error")

    assert (error["kind"], error["exp_id"], error["engine_lost"]) == ("channel", "e", True)
    assert "CUDA initialised" in error["message"]
    assert engine.steps == [EndStep.TERM]


def test_a_message_that_is_too_long_fails_its_own_experiment_alone(tmp_path: Path):
    first, second = PipedEngine(), PipedEngine()
    host = Host(first, second)

    def say_too_much() -> None:
        for _ in range(MAX_LINE_B // 65536 + 1):
            first.say(b"x" * 65536)

    first.on_run = lambda _message: threading.Thread(target=say_too_much).start()
    second.on_run = lambda _message: second.say({**RESULT, "exp_id": "e2"})
    host.order(run_message(tmp_path, "e1"))
    assert host.until("error")["exp_id"] == "e1"
    host.order(run_message(tmp_path, "e2"))
    first.exit_code = -9
    os.write(host.signals, b"\0")

    assert host.until("error", "result")["type"] == "result"


@pytest.mark.parametrize(
    ("answer", "keep_engine", "steps"),
    [
        (RESULT, True, []),
        (RESULT, False, [EndStep.QUIT]),
        ({**ERROR, "engine_lost": False}, True, []),
        ({**ERROR, "engine_lost": True}, True, [EndStep.TERM]),
    ],
)
def test_the_engine_is_kept_asked_to_leave_or_ended(
    tmp_path: Path, engine: PipedEngine, answer: Mapping[str, Any], keep_engine: bool, steps: list[EndStep]
):
    host = Host(engine)
    engine.on_run = lambda _message: engine.say({**answer, "exp_id": "e"})
    host.order(run_message(tmp_path, "e", keep_engine=keep_engine))

    host.until(answer["type"], exp_id="e")

    assert engine.steps == steps


def test_an_experiment_for_another_engine_waits_until_the_first_is_gone(tmp_path: Path, engine: PipedEngine):
    second = PipedEngine()
    host = Host(engine, second)
    engine.on_run = lambda _message: engine.say({**RESULT, "exp_id": "e1"})
    second.on_run = lambda _message: second.say({**RESULT, "exp_id": "e2"})
    host.order(run_message(tmp_path, "e1"))
    host.until("result")

    host.order(run_message(tmp_path, "e2", engine_key="other"), {"type": "unload"})
    assert "e2 is running" in host.until("error", kind="channel")["message"]
    assert engine.steps == [EndStep.QUIT]
    assert second.engine_key is None

    engine.exit_code = 0
    os.write(host.signals, bytes([signal.SIGCHLD]))
    assert host.until("result", exp_id="e2")
    assert second.engine_key == "other"


def test_an_engine_that_kill_does_not_end_is_told_and_given_up(tmp_path: Path, engine: PipedEngine):
    host = Host(engine)
    engine.on_run = lambda _message: setattr(engine, "is_stuck", True)
    host.order(run_message(tmp_path, "e"))

    error = host.until("error", exp_id="e")

    assert "does not end after SIGKILL" in error["message"]
    assert host.join() == 1


def test_a_host_that_reads_no_more_is_a_host_that_is_gone(tmp_path: Path, engine: PipedEngine):
    host = Host(engine)
    host.until("hello")
    engine.on_run = lambda _message: setattr(engine, "exit_code", 0)
    os.close(host._reports)

    host.order(run_message(tmp_path, "e"))

    assert host.join() == 0


def test_heartbeats_come_while_nothing_else_does():
    host = Host(heartbeat_s=0.02)

    assert [host.until("heartbeat") for _ in range(2)] == [{"type": "heartbeat"}] * 2

    os.close(host.orders)
    assert host.join() == 0


@pytest.mark.parametrize("folder", [".", "missing"])
def test_a_sampler_beside_the_experiment_ends_with_it_or_says_in_the_log_why_it_could_not(
    tmp_path: Path, engine: PipedEngine, folder: str
):
    host = Host(engine, heartbeat_s=0.02)
    path = tmp_path / folder / "samples.part"
    config = ExperimentConfig.from_dict({"model": "any", "gpus": []}).to_dict()
    request = {"config": config, "samples_path": str(path), "is_worker_sampling": True}

    host.order({**run_message(tmp_path, "e"), **request})
    host.until("engine")
    log = tmp_path / "e" / "log.txt"
    if folder == "missing":
        wait_for(lambda: log.read_text() or None)
        assert "cannot be written: No such file or directory" in log.read_text()
    else:
        wait_for(lambda: path.exists() or None)
    engine.say({**RESULT, "exp_id": "e"})
    host.until("result")
    if folder == ".":
        wait_for(lambda: any(isinstance(row, ClockPair) for row in read_tail(path)) or None)
        assert log.read_text() == ""
    engine.exit_code = 0
    os.close(host.orders)
    assert host.join() == 0


def test_what_a_supervisor_prints_does_not_reach_the_channel(tmp_path: Path):
    script = (
        "from lem.base.errors import UserError\n"
        "from lem.worker.supervisor import supervise\n"
        "def start():\n"
        "    print('stray', flush=True)\n"
        "    raise UserError('no engine today')\n"
        "supervise(start)\n"
    )
    order = encode_line(run_message(tmp_path, "e"))

    finished = process.run((sys.executable, "-c", script), timeout_s=60, stdin=order, cwd=ROOT)

    reports = [decode_report(line) for line in LineBuffer().feed(finished.stdout.encode())]
    assert [item["type"] for item in reports] == ["hello", "error"]
    assert "no engine today" in reports[1]["message"]
    assert "stray" in finished.stderr
