"""The engine process: it runs one experiment after another for its supervisor, over pipes of its own.

Its stdout and stderr belong to whatever the engine prints. What it has to say goes to the message pipe; what it is to
do comes from the control pipe, whose end of file means that the supervisor is gone.
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
from types import FrameType
from typing import Any, NoReturn

from lem.base.clock import Clock, SystemClock
from lem.base.errors import DISK_FULL, EngineError, LemError
from lem.record import RESULT_FILE, Record, write_record
from lem.worker.channel import READ_B, LineBuffer, RunRequest, decode_line, encode_line, redact
from lem.worker.harness import Reporter, run_experiment
from lem.worker.recording import ResidentEngine

Harness = Callable[[RunRequest, ResidentEngine, Reporter, Clock], Record]

# Refused before the engine did anything that could leave it in a bad state; after any other failure it is replaced.
_HARMLESS_KINDS = frozenset({"channel", "option", "prompts", "meter", "model", "full"})


class MessageWriter:
    """Messages to the supervisor, each written whole; any thread may send."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, kind: str, /, **fields: Any) -> None:
        """Send a message."""
        view = memoryview(encode_line({"type": kind, **fields}))
        with self._lock:
            while view:
                view = view[os.write(self._descriptor, view) :]


class PhaseReporter:
    """What the harness tells of one experiment.

    Attributes:
        current: the phase that was begun last.
    """

    def __init__(self, writer: MessageWriter, exp_id: str) -> None:
        self._writer = writer
        self._exp_id = exp_id
        self.current: str | None = None

    def phase(self, name: str) -> None:
        """Tell that a phase begins."""
        self.current = name
        self._writer.send("phase", exp_id=self._exp_id, phase=name)

    def progress(self, done: int, total: int | None, text: str = "") -> None:
        """Tell how far the phase is."""
        self._writer.send("progress", exp_id=self._exp_id, done=done, total=total, text=text)


def serve_pipes(control_fd: int, message_fd: int) -> int:
    """The exit code of an engine process, which has its guardian already."""
    for descriptor in (control_fd, message_fd):
        os.set_inheritable(descriptor, False)  # the engine's own children have no part in this
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, _leave)
    faulthandler.enable()
    # CUDA counts the fastest GPU first by default, NVML by PCI bus: an index must mean the same GPU to both.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return serve(control_fd, MessageWriter(message_fd), ResidentEngine(), _run_traced, SystemClock())


def _run_traced(request: RunRequest, engine: ResidentEngine, reporter: Reporter, clock: Clock) -> Record:
    """Run an experiment whose log ends with where it was should it be ended, also while it holds Python's lock."""
    faulthandler.register(signal.SIGTERM, chain=True)
    try:
        return run_experiment(request, engine, reporter, clock)
    finally:
        faulthandler.unregister(signal.SIGTERM)


def serve(control_fd: int, writer: MessageWriter, engine: ResidentEngine, run_experiment: Harness, clock: Clock) -> int:
    """The exit code, once the supervisor said `quit` or is gone."""
    lines = LineBuffer()
    while data := os.read(control_fd, READ_B):
        for line in lines.feed(data):
            message = decode_line(line)
            if message["type"] == "quit":
                engine.unload()
                return 0
            _run(RunRequest.from_message(message), writer, engine, run_experiment, clock)
    return 0


def _run(
    request: RunRequest, writer: MessageWriter, engine: ResidentEngine, run_experiment: Harness, clock: Clock
) -> None:
    """Run one experiment and answer it."""
    reporter = PhaseReporter(writer, request.exp_id)
    try:
        measured = run_experiment(request, engine, reporter, clock)
        if reporter.current != "write":
            reporter.phase("write")
        write_record(Path(request.result_dir) / RESULT_FILE, measured)
    except Exception as error:  # noqa: BLE001 - the top of a worker
        traceback.print_exc()
        flush_output()
        failure = describe_failure(error, request.secrets)
        writer.send("error", exp_id=request.exp_id, phase=reporter.current, **failure)
    else:
        flush_output()
        writer.send("result", exp_id=request.exp_id, **_describe_result(measured))


def describe_failure(error: Exception, secrets: Mapping[str, str]) -> dict[str, Any]:
    """The fields of an `error` message that tell what went wrong."""
    kind, is_permanent, hint = "engine", False, ""
    if isinstance(error, EngineError):
        kind, is_permanent, message, hint = error.kind, error.is_permanent, error.message, error.hint
    elif isinstance(error, LemError):
        # What is wrong with a person's configuration or files stays wrong.
        kind, is_permanent, message, hint = "option", True, error.message, error.hint
    elif isinstance(error, OSError) and error.errno in DISK_FULL:
        kind, message = "full", f"no space is left to write {error.filename or 'the result'}: {error.strerror}"
        hint = "make room, then go on with --resume"
    else:
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return {
        "kind": kind,
        "message": redact(message, secrets.values()),
        "hint": redact(hint, secrets.values()),
        "permanent": is_permanent,
        "engine_lost": kind not in _HARMLESS_KINDS,
    }


def _describe_result(measured: Record) -> dict[str, Any]:
    validity, window, throughput, work = measured.validity, measured.window, measured.throughput, measured.work
    summary = {
        "window_s": window.window_s,
        "output_tok": work.output_tok,
        "requests_ok": work.requests_ok,
        "requests_failed": work.requests_failed,
        "output_tok_per_s": throughput.output_tok_per_s,
    }
    return {
        "valid": validity.valid,
        "engine_load_id": validity.engine_load_id,
        "engine_reused": validity.engine_reused,
        "summary": summary,
    }


def flush_output() -> None:
    """Push out what this process printed, the C library's buffers included, so that it is in this experiment's log."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # an engine may have closed it
            stream.flush()
    ctypes.CDLL(None).fflush(None)


def _leave(signum: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - as signal handlers are called
    sys.exit(128 + signum)
