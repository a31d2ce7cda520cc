"""The supervisor: it owns the worker channel and the engine process, and never waits for either.

It answers the host, passes on what the engine process reports, writes what the engine prints into the log of the
running experiment, and ends the engine when the host is gone. An engine process loads one engine: for another key, or
when the engine may be in a bad state, the process is ended and a new one started, so that every load finds the
same fresh process and the device is free of the old one, context included.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lem.base import __version__
from lem.base.dataclass import replace
from lem.base.errors import DISK_FULL, UserError
from lem.base.launch import own_command
from lem.base.process import describe_exit, hint_on_exit, would_repeat
from lem.engines.common import BACKEND_DISTRIBUTIONS, OTHER_NAMES
from lem.meters.hwmon import metered_gpus
from lem.meters.machine import named_gpus, read_machine
from lem.meters.nvml import find_gpus, power_limits_w, read_gpus
from lem.record import LOG_FILE
from lem.worker import channel
from lem.worker.channel import READ_B, ChannelError, Check, EngineLog, LineBuffer, Message, Outbox, RunRequest
from lem.worker.children import EndStep, EngineChild, SamplerProcess, interval_ms


def probe_environment() -> dict[str, Any]:
    """Versions, devices and their settings by name, as JSON values, as far as a resume compares them."""
    distributions = sorted({name for names in BACKEND_DISTRIBUTIONS.values() for name in names})
    versions: dict[str, str | None] = dict.fromkeys(distributions)
    for distribution in distributions:
        for name in (distribution, *OTHER_NAMES.get(distribution, ())):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[distribution] = importlib.metadata.version(name)
                break
    gpus = find_gpus()
    return {
        "python": platform.python_version(),
        **versions,
        "driver": read_gpus().driver,
        "gpus": sorted(gpu.uuid for gpu in gpus),
        "gpu_models": sorted(gpu.name for gpu in gpus),
        "power_limits": [f"{uuid} {limit_w:g} W" for uuid, limit_w in sorted(power_limits_w().items())],
        "governor": read_machine(Path("/proc"), Path("/sys")).governor,
    }


def missing_distributions(backend: str, environment: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in BACKEND_DISTRIBUTIONS.get(backend, ()) if environment.get(name) is None)


HEARTBEAT_S = 5.0
# While an engine loads, what it prints is the only sign of progress; one line of it a second is passed on.
PRINTED_PROGRESS_S = 1.0
_PRINTED_WIDTH = 200
# Reads that empty a pipe whose writers have stopped; those that have not are not waited for.
_DRAIN_READS = 4
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def supervise(start_engine: Callable[[], EngineChild] = EngineChild) -> int:
    """The exit code of a worker whose channel is this process's stdin and stdout; to be called on the main thread."""
    # From here on stdout is stderr, so that nothing but messages reaches the channel.
    host_in, host_out = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    wakeup, wakeup_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wakeup_writer, warn_on_full_buffer=False)
    for signum in (*_SIGNALS, signal.SIGCHLD):
        signal.signal(signum, lambda *_: None)  # a handler, so that the wakeup pipe is written
    return Supervisor(host_in, host_out, wakeup, start_engine).run()


class Supervisor:
    def __init__(
        self,
        host_in: int,
        host_out: int,
        wakeup: int,
        start_engine: Callable[[], EngineChild],
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._host_in = host_in
        self._host_lines = LineBuffer()
        self._host = Outbox(host_out)
        self._wakeup = wakeup
        self._start_engine = start_engine
        self._engine: EngineChild | None = None
        self._engine_lines = LineBuffer()
        self._log: EngineLog | None = None
        self._sampler: SamplerProcess | None = None
        self._request: RunRequest | Check | None = None  # what the host waits for
        self._is_handed_on = False  # the engine process has it
        self._phase: str | None = None
        self._is_unloading = False
        self._exit_code: int | None = None
        self._heartbeat_s = heartbeat_s
        self._heartbeat_at = time.monotonic() + heartbeat_s
        self._printed_at = 0.0
        self._selector = selectors.PollSelector()  # a stdin that is a file, which epoll refuses, ends at once

    def run(self) -> int:
        self._selector.register(self._host_in, selectors.EVENT_READ, self._read_host)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._read_signals)
        self._send(channel.Hello(channel.PROTOCOL_VERSION, __version__, os.getpid(), probe_environment()))
        try:
            while self._exit_code is None or self._engine is not None:
                step_at = None if self._engine is None else self._engine.next_step_at
                until = self._heartbeat_at if step_at is None else min(self._heartbeat_at, step_at)
                for key, _ in self._selector.select(max(0.0, until - time.monotonic())):
                    if self._selector.get_map().get(key.fd) is key:  # not dropped on account of another one
                        key.data()
                self._tick()
                self._watch_writers()
            return self._exit_code
        finally:
            if self._sampler is not None:
                self._sampler.kill()

    def _tick(self) -> None:
        now = time.monotonic()
        if now >= self._heartbeat_at:
            self._heartbeat_at = now + self._heartbeat_s
            self._send(channel.Heartbeat(), is_droppable=True)
        if (sampler := self._sampler) is not None and (death := sampler.death()) is not None:
            if not sampler.has_hung_up and self._log is not None:
                self._log.write(f"{death}\n".encode())
            self._sampler = None
        if self._engine is not None:
            self._engine.tick(now)
            self._check(self._engine)

    # The host

    def _send(self, message: Message, *, is_droppable: bool = False) -> None:
        try:
            self._host.put(message.to_message(), is_droppable=is_droppable)
        except BrokenPipeError:
            self._finish(0, "the host is gone")

    def _read_host(self) -> None:
        data = os.read(self._host_in, READ_B)
        try:
            lines = self._host_lines.feed(data)
        except ChannelError as error:
            self._fail(None, "channel", str(error))
            data, lines = b"", []
        if not data:
            self._finish(0, "the host closed the channel")
        for line in lines:
            if self._exit_code is None:
                try:
                    self._obey(channel.decode_line(line))
                except ChannelError as error:
                    self._fail(None, "channel", str(error))

    def _obey(self, message: Mapping[str, Any]) -> None:
        kind = message["type"]
        if self._engine is not None:
            self._check(self._engine)  # one that died just now is not given anything
        if kind == "quit":
            self._finish(0, "the host asked for it")
        elif kind not in (RunRequest.type, Check.type, "unload"):
            raise ChannelError(f"no message of the host: type {kind!r}")
        elif self._request is not None:
            raise ChannelError(f"{kind}: {self._request.exp_id} is running")
        elif kind != "unload":
            self._request, self._is_handed_on, self._phase = channel.read_order(message), False, None
            self._hand_on()
        elif self._engine is None:
            self._send(channel.Unloaded())
        else:
            self._is_unloading = True
            self._engine.end(EndStep.QUIT, time.monotonic())

    def _fail(
        self,
        exp_id: str | None,
        kind: str,
        message: str,
        hint: str = "",
        *,
        is_engine_lost: bool = False,
        is_permanent: bool = False,
    ) -> None:
        tail = self._log.tail() if self._log else ""
        self._send(channel.Failure(exp_id, kind, message, hint, is_permanent, self._phase, is_engine_lost, tail))

    def _answer_error(
        self, kind: str, message: str, hint: str = "", *, is_engine_lost: bool = True, is_permanent: bool = False
    ) -> None:
        request, self._request = self._request, None
        self._end_sampler()
        if request is not None:
            message = channel.redact(message, request.secrets.values())
            lost = {"is_engine_lost": is_engine_lost, "is_permanent": is_permanent}
            self._fail(request.exp_id, kind, message, hint, **lost)

    def _finish(self, code: int, reason: str) -> None:
        now = time.monotonic()
        if self._exit_code is None:
            self._exit_code = code
            self._selector.unregister(self._host_in)
            self._answer_error("died", f"the worker ends: {reason}")
            if self._engine is not None:
                self._engine.end(EndStep.TERM, now)
        elif self._engine is not None and code:
            step = self._engine.step
            self._engine.end(EndStep.TERM if step is None else EndStep(min(step + 1, EndStep.KILL)), now)

    def _read_signals(self) -> None:
        for signum in os.read(self._wakeup, 4096):
            if signum in _SIGNALS:
                self._finish(128 + signum, f"received {signal.Signals(signum).name}")
        # SIGCHLD: `_tick` checks the engine process in any case.

    def _watch_writers(self) -> None:
        outboxes = [self._host] if self._engine is None else [self._host, self._engine.control]
        for outbox in outboxes:
            is_watched = outbox.descriptor in self._selector.get_map()
            if outbox.is_pending and not is_watched:
                self._selector.register(outbox.descriptor, selectors.EVENT_WRITE, lambda box=outbox: self._flush(box))
            elif is_watched and not outbox.is_pending:
                self._selector.unregister(outbox.descriptor)

    def _flush(self, outbox: Outbox) -> None:
        try:
            outbox.flush()
        except BrokenPipeError:
            outbox.drop()
            if outbox is self._host:
                self._finish(0, "the host is gone")

    # The sampler, where the host cannot read the meters; nothing here waits for it

    def _start_sampler(self, request: RunRequest) -> None:
        if not request.is_worker_sampling or request.samples_path is None:
            return
        config, command, log = request.config, own_command(sys.executable), Path(request.samples_path)
        uuids = [gpu.uuid for gpu in named_gpus(config["gpus"], metered_gpus(os.environ))]
        wanted = config["measurement"]
        more = (interval_ms(config, "prepare"), wanted["cpu_tdp_w"], wanted["energy"])
        self._sampler = SamplerProcess(command, log, uuids, *more)

    def _end_sampler(self) -> None:
        if self._sampler is not None:
            self._sampler.hang_up()

    # The engine process

    def _hand_on(self) -> None:
        request = self._request
        if request is None or self._is_handed_on:
            return
        if self._engine is not None and self._engine.engine_key not in (None, request.engine_key):
            self._engine.end(EndStep.QUIT, time.monotonic())
        if self._engine is not None and self._engine.step is not None:
            return  # `_engine_ended` comes back here
        try:
            if self._engine is not None:
                _drain(self._read_output, self._engine)
            if self._log is not None:
                self._log.close()
            self._log = None
            if isinstance(request, RunRequest):
                self._log = EngineLog(str(Path(request.result_dir) / LOG_FILE), request.secrets.values())
                self._start_sampler(request)
            engine = self._engine or self._new_engine()
        except (OSError, UserError) as error:
            kind = "full" if isinstance(error, OSError) and error.errno in DISK_FULL else "engine"
            self._answer_error(kind, f"the experiment could not be started: {error}", is_engine_lost=False)
            return
        engine.engine_key = request.engine_key
        if self._sampler is not None:
            self._sampler.watch(engine.identity.pid)
        self._is_handed_on = True
        engine.send(request.to_message())

    def _new_engine(self) -> EngineChild:
        engine = self._engine = self._start_engine()
        self._engine_lines = LineBuffer()
        self._selector.register(engine.message_fd, selectors.EVENT_READ, lambda: self._read_messages(engine))
        self._selector.register(engine.output_fd, selectors.EVENT_READ, lambda: self._read_output(engine))
        self._send(channel.EngineProcess(engine.identity.pid, engine.identity.started_ticks))
        return engine

    def _read_output(self, engine: EngineChild) -> bool:
        data = self._take(engine.output_fd)
        if not data or self._log is None:
            return bool(data)
        self._log.write(data)
        now, request = time.monotonic(), self._request
        is_loading = self._phase is None or self._phase in channel.LOADING_PHASES
        if request is not None and is_loading and now >= self._printed_at + PRINTED_PROGRESS_S:
            self._printed_at = now
            text = self._log.tail(1)[:_PRINTED_WIDTH]
            self._send(channel.Progress(request.exp_id, 0, None, text), is_droppable=True)
        return True

    def _read_messages(self, engine: EngineChild) -> bool:
        data = self._take(engine.message_fd)
        if not data:  # a full buffer would report the same error again, as that of the next experiment
            return False
        try:
            for line in self._engine_lines.feed(data):
                self._pass_on(engine, channel.read_report(line))
        except ChannelError as error:
            engine.end(EndStep.TERM, time.monotonic())
            self._answer_error("channel", f"the engine process reported {error}")
        return True

    def _take(self, descriptor: int) -> bytes:
        try:
            data = os.read(descriptor, READ_B)
        except BlockingIOError:
            return b""
        if not data:
            self._forget(descriptor)
        return data

    def _pass_on(self, engine: EngineChild, message: Message) -> None:
        request = self._request
        if request is None or getattr(message, "exp_id", None) != request.exp_id:
            return  # late: the host was answered already
        if isinstance(message, channel.Phase):
            self._phase = message.phase
            if self._sampler is not None and isinstance(request, RunRequest):
                self._sampler.set_interval(interval_ms(request.config, message.phase))
        if not isinstance(message, (channel.Result, channel.Failure)):
            self._send(message, is_droppable=isinstance(message, channel.Progress))
            return
        _drain(self._read_output, engine)  # the log is whole before the host gets the answer
        self._end_sampler()
        if isinstance(message, channel.Failure):
            message = replace(message, log_tail=self._log.tail() if self._log else "")
        self._request = None
        if isinstance(message, channel.Failure) and message.engine_lost:
            engine.end(EndStep.TERM, time.monotonic())
        elif not request.keep_engine:
            engine.end(EndStep.QUIT, time.monotonic())
        self._send(message)

    def _check(self, engine: EngineChild) -> None:
        code = engine.reap()
        if code is not None:
            self._engine_ended(engine, code)
        elif engine.is_stuck:
            self._drop(engine)
            text = f"the engine process (process group {engine.identity.pid}) does not end after SIGKILL"
            hint = "it hangs in a driver call: see the kernel log, and restart the container or the machine"
            self._answer_error("died", text, hint)
            self._finish(1, "its engine process cannot be ended")

    def _engine_ended(self, engine: EngineChild, code: int) -> None:
        _drain(self._read_messages, engine)
        _drain(self._read_output, engine)
        self._drop(engine)
        if self._is_handed_on:
            how, is_loading = describe_exit(code), self._phase is None or self._phase in channel.LOADING_PHASES
            text = f"the engine process {how} in phase {self._phase or 'start'}"
            repeats = would_repeat(code, is_loading=is_loading)
            self._answer_error("died", text, hint_on_exit(code), is_permanent=repeats)
        if self._is_unloading:
            self._is_unloading = False
            self._send(channel.Unloaded())
        self._hand_on()

    def _drop(self, engine: EngineChild) -> None:
        for descriptor in (engine.message_fd, engine.output_fd, engine.control.descriptor):
            self._forget(descriptor)
        engine.close()
        self._engine = None
        self._send(channel.EngineProcess())

    def _forget(self, descriptor: int) -> None:
        if descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)


def _drain(read: Callable[[EngineChild], bool], engine: EngineChild) -> None:
    for _ in range(_DRAIN_READS):
        if not read(engine):
            break
