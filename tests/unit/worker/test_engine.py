"""What an engine process answers; how it lives and dies is in test_worker.py and test_supervisor.py."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.base.clock import Clock
from lem.base.errors import ConfigurationError, EngineError, OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.record import Record, read_record
from lem.worker.channel import LineBuffer, Progress, RunRequest, encode_line
from lem.worker.engine import PipeReporter, describe_failure, serve
from lem.worker.harness import ResidentEngine
from lem.worker.metering import Reporter
from tests.doubles.trivial_engine import TrivialEngine
from tests.records import make_record
from tests.worker_rig import PHASES, decode_report

SECRET, GONE = "hf_a_token_of_somebody", "[redacted]"
FREE = "free some space, then continue with --resume"


Harness = Callable[[RunRequest, ResidentEngine, Reporter, Clock], Record]


class Pipes:
    """Both pipes of an engine process, with what it is to do written already and what it said readable afterwards."""

    def __init__(self) -> None:
        self.control, self._orders = os.pipe()
        self._reports, messages = os.pipe()
        self.messages = messages
        self.reporter = PipeReporter(messages)

    def order(self, *messages: dict[str, Any]) -> None:
        for message in messages:
            os.write(self._orders, encode_line(message))
        os.close(self._orders)

    def said(self) -> list[dict[str, Any]]:
        os.close(self.messages)
        return self.said_until_closed()

    def said_until_closed(self) -> list[dict[str, Any]]:
        with open(self._reports, "rb", closefd=False) as stream:
            return [decode_report(line) for line in LineBuffer().feed(stream.read())]

    def close(self) -> None:
        os.close(self.control)
        os.close(self._reports)


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    pipes = Pipes()
    yield pipes
    pipes.close()


def request_for(folder: Path, name: str = "e") -> RunRequest:
    return RunRequest({}, {"experiment_id": name}, str(folder), "key", True, secrets={"HF_TOKEN": SECRET})


def measuring(record: Record, *phases: str) -> Harness:

    def run(request: RunRequest, engine: ResidentEngine, reporter: Reporter, clock: Clock) -> Record:
        for phase in phases:
            reporter.phase(phase)
        reporter.progress(1, 2, "half")
        return record

    return run


def failing(error: Exception) -> Harness:
    def run(request: RunRequest, engine: ResidentEngine, reporter: Reporter, clock: Clock) -> Record:
        reporter.phase("load")
        raise error

    return run


def engine() -> ResidentEngine:
    return ResidentEngine(lambda config, secrets: TrivialEngine({}, config, secrets))


@pytest.mark.parametrize("phases", [PHASES[:-1], PHASES])
def test_a_record_is_on_disk_before_the_result_is_told(pipes: Pipes, tmp_path: Path, phases: tuple[str, ...]):
    record = make_record()
    pipes.order(request_for(tmp_path).to_message())

    assert serve(pipes.control, pipes.reporter, engine(), measuring(record, *phases), Clock()) == 0

    *before, result = pipes.said()
    assert [item["phase"] for item in before if item["type"] == "phase"] == list(PHASES)
    assert read_record(tmp_path / "result.json") == record
    assert result == {"type": "result", "exp_id": "e", "engine_reused": record.validity.engine_reused}


def test_a_failure_is_answered_and_the_next_experiment_runs(pipes: Pipes, tmp_path: Path):
    pipes.order(request_for(tmp_path, "e1").to_message(), request_for(tmp_path, "e2").to_message())

    serve(pipes.control, pipes.reporter, engine(), failing(RuntimeError("CUDA error")), Clock())

    errors = [item for item in pipes.said() if item["type"] == "error"]
    assert [(item["exp_id"], item["phase"], item["message"]) for item in errors] == [
        ("e1", "load", "RuntimeError: CUDA error"),
        ("e2", "load", "RuntimeError: CUDA error"),
    ]
    assert not (tmp_path / "result.json").exists()


def test_a_result_that_cannot_be_written_is_an_error(pipes: Pipes, tmp_path: Path):
    pipes.order(request_for(tmp_path / "missing").to_message())

    serve(pipes.control, pipes.reporter, engine(), measuring(make_record()), Clock())

    error = pipes.said()[-1]
    assert (error["type"], error["phase"]) == ("error", "write")
    assert "No such file or directory" in error["message"]


def test_quit_unloads_the_engine_and_what_comes_after_is_not_done(pipes: Pipes, tmp_path: Path):
    resident = engine()
    resident.ensure(ExperimentConfig.from_dict({"model": "m"}), "key", {})
    pipes.order({"type": "quit"}, request_for(tmp_path).to_message())

    assert serve(pipes.control, pipes.reporter, resident, measuring(make_record()), Clock()) == 0

    assert pipes.said() == []
    assert not resident.is_resident("key")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OptionRefused("no beams", "omit them"), ("option", "no beams", "omit them", True, False)),
        (EngineError("gone", kind="prompts", is_permanent=True), ("prompts", "gone", "", True, False)),
        (EngineError("big", kind="out_of_memory", is_permanent=True), ("out_of_memory", "big", "", True, True)),
        (EngineError("broke"), ("engine", "broke", "", False, True)),
        (ConfigurationError("bad", "mend it"), ("option", "bad", "mend it", True, False)),
        # A bug is there the next time too; what the machine does may pass.
        (ValueError("odd"), ("engine", "ValueError: odd", "", True, True)),
        (KeyError(), ("engine", "KeyError", "", True, True)),
        (NotImplementedError(), ("engine", "NotImplementedError", "", True, True)),
        (RuntimeError("CUDA error"), ("engine", "RuntimeError: CUDA error", "", False, True)),
        (OSError(errno.EIO, "I/O error", "/r"), ("engine", "OSError: [Errno 5] I/O error: '/r'", "", False, True)),
        (OSError(errno.ENOSPC, "full", "/r"), ("full", "cannot write /r: full", FREE, False, False)),
        (OSError(errno.EDQUOT, "quota"), ("full", "cannot write the result: quota", FREE, False, False)),
        (
            EngineError(f"401 for {SECRET}", f"is {SECRET} right?"),
            ("engine", f"401 for {GONE}", f"is {GONE} right?", False, True),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failures_are_told_by_kind_and_without_secrets(error: Exception, expected: tuple[str, str, str, bool, bool]):
    told = describe_failure(error, "e", None, {"HF_TOKEN": SECRET})

    assert (told.kind, told.message, told.hint, told.permanent, told.engine_lost) == expected


def test_messages_of_several_threads_do_not_mix(pipes: Pipes):
    def talk(number: int) -> None:
        for done in range(50):
            pipes.reporter.send(Progress(str(number), done, None, "x" * 200))

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(4)]
    received: list[dict[str, Any]] = []
    reading = threading.Thread(target=lambda: received.extend(pipes.said_until_closed()))
    reading.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(pipes.messages)
    reading.join()

    assert len(received) == 200
    for number in range(4):
        assert [item["done"] for item in received if item["exp_id"] == str(number)] == list(range(50))
