"""The engine process: it runs one experiment after another for its supervisor, over pipes of its own.

Its stdout and stderr belong to whatever the engine prints. It reports through the message pipe and takes orders from
the control pipe; the end of that file means that the supervisor is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from lem.base.clock import Clock
from lem.base.durable import reason_of
from lem.base.errors import DISK_FULL, REPEATING, EngineError, LemError
from lem.config.experiment import ExperimentConfig
from lem.record import RESULT_FILE, Record, write_record
from lem.worker import channel
from lem.worker.channel import READ_B, Check, Failure, LineBuffer, Message, Phase, Problem, Progress, Result, RunRequest
from lem.worker.harness import ResidentEngine, find_problems, run_experiment
from lem.worker.metering import Reporter

Harness = Callable[[RunRequest, ResidentEngine, Reporter, Clock], Record]

# Refused before the engine did anything that could leave it in a bad state; after any other failure it is replaced.
_HARMLESS_KINDS = frozenset({"channel", "option", "prompts", "meter", "model", "full"})


class PipeReporter:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self.begin("")

    def begin(self, exp_id: str) -> None:
        self._exp_id = exp_id
        self.current: str | None = None  # the phase that began last

    def send(self, message: Message) -> None:
        view = memoryview(channel.encode_line(message.to_message()))
        with self._lock:
            while view:
                view = view[os.write(self._descriptor, view) :]

    def phase(self, name: str) -> None:
        self.current = name
        self.send(Phase(self._exp_id, name))

    def progress(self, done: int, total: int | None, text: str = "") -> None:
        self.send(Progress(self._exp_id, done, total, text))


def serve_pipes(control_fd: int, message_fd: int) -> int:
    for descriptor in (control_fd, message_fd):
        os.set_inheritable(descriptor, False)  # not for the engine's own children
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    faulthandler.enable()
    # CUDA counts the fastest GPU first by default, NVML by PCI bus: an index must mean the same GPU to both.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return serve(control_fd, PipeReporter(message_fd), ResidentEngine(), _run_traced, Clock())


def _run_traced(request: RunRequest, engine: ResidentEngine, reporter: Reporter, clock: Clock) -> Record:
    """Run an experiment; at SIGTERM its log shows where it was, even while an engine holds the interpreter's lock."""
    faulthandler.register(signal.SIGTERM, chain=True)
    try:
        return run_experiment(request, engine, reporter, clock)
    finally:
        faulthandler.unregister(signal.SIGTERM)


def serve(control_fd: int, reporter: PipeReporter, engine: ResidentEngine, run: Harness, clock: Clock) -> int:
    lines = LineBuffer()
    while data := os.read(control_fd, READ_B):
        for line in lines.feed(data):
            message = channel.decode_line(line)
            if message["type"] == "quit":
                engine.unload()
                return 0
            order = channel.read_order(message)
            reporter.begin(order.exp_id)
            reporter.send(_answer(order, reporter, engine, run, clock))
    return 0


def _answer(
    order: RunRequest | Check, reporter: PipeReporter, engine: ResidentEngine, run: Harness, clock: Clock
) -> Message:
    try:
        if isinstance(order, Check):
            _check(order, reporter)
            answer: Message = Result(order.exp_id, engine_reused=False)
        else:
            record = run(order, engine, reporter, clock)
            if reporter.current != "write":
                reporter.phase("write")
            write_record(Path(order.result_dir) / RESULT_FILE, record)
            answer = Result(order.exp_id, record.validity.engine_reused)
    except Exception as error:  # noqa: BLE001 - the top of a worker
        traceback.print_exc()
        answer = describe_failure(error, order.exp_id, reporter.current, order.secrets)
    # What this process printed, the C library's buffers included, must be in this experiment's log.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # an engine may have closed it
            stream.flush()
    ctypes.CDLL(None).fflush(None)
    return answer


def _check(check: Check, reporter: PipeReporter) -> None:
    for place, document in enumerate(check.configs):
        for error in find_problems(ExperimentConfig.from_dict(document), check.secrets):
            message, hint = (channel.redact(text, check.secrets.values()) for text in (error.message, error.hint))
            reporter.send(Problem(check.exp_id, place, message, hint, error.is_permanent))


def describe_failure(error: Exception, exp_id: str, phase: str | None, secrets: Mapping[str, str]) -> Failure:
    kind, is_permanent, hint = "engine", False, ""
    if isinstance(error, EngineError):
        kind, is_permanent, message, hint = error.kind, error.is_permanent, error.message, error.hint
    elif isinstance(error, LemError):
        # An error in the user's configuration or files is there the next time too.
        kind, is_permanent, message, hint = "option", True, error.message, error.hint
    elif isinstance(error, OSError) and error.errno in DISK_FULL:
        kind, message = "full", f"cannot write {error.filename or 'the result'}: {reason_of(error)}"
        hint = "free some space, then continue with --resume"
    else:
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        is_permanent = isinstance(error, REPEATING)
    message, hint = (channel.redact(text, secrets.values()) for text in (message, hint))
    return Failure(exp_id, kind, message, hint, is_permanent, phase, engine_lost=kind not in _HARMLESS_KINDS)
