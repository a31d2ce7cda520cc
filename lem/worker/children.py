"""The processes that lem starts for an experiment, as their parent holds them: the engine process and the sampler."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, cast

from lem.base import process
from lem.base.clock import Clock
from lem.base.errors import UserError
from lem.base.launch import own_command
from lem.worker.channel import Outbox


class EndStep(enum.IntEnum):
    QUIT = 1  # ask it to unload and leave
    TERM = 2  # signal its whole group
    HANG_UP = 3  # close the control pipe: the guardian kills all that came from it
    KILL = 4  # kill the group; the guardian is stopped or gone


PATIENCE_S: Mapping[EndStep, float] = MappingProxyType(
    # vLLM takes about 5 s to leave by itself; the guardian gives KILL 10 s.
    {EndStep.QUIT: 15.0, EndStep.TERM: 5.0, EndStep.HANG_UP: 12.0, EndStep.KILL: 5.0}
)


class EngineChild:
    def __init__(self) -> None:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            control_end, control_fd = _pipe(theirs, ours)
            self.message_fd, message_end = _pipe(ours, theirs)
            self.output_fd, output_end = _pipe(ours, theirs)
            fds = ("--control-fd", str(control_end), "--message-fd", str(message_end))
            command = (*own_command(sys.executable), "worker", "--engine", *fds)
            streams = (process.DEVNULL, output_end, output_end)
            self._child = process.spawn(command, streams=streams, pass_fds=(control_end, message_end))
            ours.pop_all()
        for descriptor in (self.message_fd, self.output_fd):
            os.set_blocking(descriptor, False)
        # The guardian; its pid is the id of the group. Its entry in /proc stays until it is reaped, so it is there.
        self.identity = process.identify(self._child.pid) or process.ProcessId(self._child.pid, 0)
        self.control = Outbox(control_fd)
        self.engine_key: str | None = None  # of the engine that it was given to load
        self.is_stuck = False  # it is there in spite of KILL
        self.step: EndStep | None = None  # the step that is under way; None while it is not ending
        self.next_step_at: float | None = None
        self._has_hung_up = False

    def send(self, message: Mapping[str, Any]) -> None:
        if not self._has_hung_up:
            with contextlib.suppress(BrokenPipeError):
                self.control.put(message)

    def end(self, step: EndStep, now: float) -> None:
        if self.step is not None and self.step >= step:
            return
        if step is EndStep.QUIT:
            self.send({"type": "quit"})
        elif step is EndStep.TERM:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGTERM)
        elif step is EndStep.HANG_UP:
            self._hang_up()
        else:
            process.kill_group(self._child.pid)
        self.step, self.next_step_at = step, now + PATIENCE_S[step]

    def tick(self, now: float) -> None:
        if self.step is None or self.next_step_at is None or now < self.next_step_at:
            return
        if self.step is EndStep.KILL:
            self.is_stuck, self.next_step_at = True, None
        else:
            self.end(EndStep(self.step + 1), now)

    def reap(self) -> int | None:
        if os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        # Not reaped yet, it keeps the number of its group from being used again.
        process.kill_group(self._child.pid)
        return self._child.wait()

    def close(self) -> None:
        self._hang_up()
        os.close(self.message_fd)
        os.close(self.output_fd)

    def _hang_up(self) -> None:
        if not self._has_hung_up:
            self._has_hung_up = True
            self.control.drop()  # the number of the descriptor may be used again from here on
            os.close(self.control.descriptor)


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> Sequence[int]:
    ends = os.pipe2(os.O_CLOEXEC)
    reader.callback(os.close, ends[0])
    writer.callback(os.close, ends[1])
    return ends


# Samplers: processes that write the log of the meters

READY_TIMEOUT_S = 30.0
RESTING_PHASES = frozenset({"prepare", "load", "idle", "cooldown"})  # power at rest is measured in them
_POLL_S = 0.02
_STDERR_MAX_B = 4096
_DEATH_S = 2.0


def interval_ms(config: Mapping[str, Any], phase: str) -> int:
    if phase in RESTING_PHASES:
        return int(config["baseline"]["sample_interval_ms"])
    return int(config["timeseries"]["sample_interval_ms"]) if config["timeseries"]["enabled"] else 0


class SamplerProcess:
    def __init__(
        self,
        command: Sequence[str],
        output: Path,
        gpus: Sequence[str] = (),
        interval_ms: int = 100,
        tdp_w: float | None = None,
        energy: str = "auto",
    ) -> None:
        """Start it; it writes the header of its log a moment later, see `wait_until_ready`."""
        words = [*command, "worker", "--sampler", "--output", str(output), "--interval-ms", str(interval_ms)]
        words += [word for gpu in gpus for word in ("--gpu", gpu)]
        words += [] if tdp_w is None else ["--tdp", repr(tdp_w)]
        words += ["--energy", energy]
        self.output = output
        # A file, not a pipe: a library that prints a lot must not make the sampler wait for a reader.
        try:
            self._stderr: IO[bytes] = tempfile.TemporaryFile(prefix="lem-sampler-")  # noqa: SIM115 - kept by the object
        except OSError as error:
            raise UserError(f"{tempfile.gettempdir()}: cannot create a temporary file: {error.strerror}") from error
        try:
            self.child = process.spawn(words, streams=(process.PIPE, process.DEVNULL, self._stderr.fileno()))
        except BaseException:
            self._stderr.close()
            raise
        self._stdin = cast("IO[bytes]", self.child.stdin)  # a pipe by default
        os.set_blocking(self._stdin.fileno(), False)

    @property
    def has_hung_up(self) -> bool:
        return self._stdin.closed

    def set_interval(self, interval_ms: int) -> None:
        self._order(f"interval {interval_ms}")

    def watch(self, *pids: int) -> None:
        """The engine is these processes, as the sampler numbers them, and those below them."""
        self._order(f"watch {' '.join(map(str, pids))}")

    def find_processes(self) -> None:
        """What is watched may have started others."""
        self._order("find")

    def _order(self, order: str) -> None:
        if not self._stdin.closed:
            # The pipe is full only when the sampler has hung through thousands of orders.
            with contextlib.suppress(BrokenPipeError, BlockingIOError):
                os.write(self._stdin.fileno(), f"{order}\n".encode())

    def hang_up(self) -> None:
        self._stdin.close()

    def stop(self, timeout_s: float) -> int | None:
        """Its exit code; it is killed at the timeout. None if even KILL does not end it, since it hangs in a driver."""
        self.hang_up()
        for patience_s in (timeout_s, _DEATH_S):
            with contextlib.suppress(process.TimeoutExpired):
                return self.child.wait(patience_s)
            self.kill()
        return None

    def kill(self) -> None:
        if self.child.poll() is None:
            process.kill_group(self.child.pid)
        self.hang_up()

    def death(self) -> str | None:
        code = self.child.poll()
        if code is None:
            return None
        size = os.fstat(self._stderr.fileno()).st_size
        printed = os.pread(self._stderr.fileno(), _STDERR_MAX_B, max(0, size - _STDERR_MAX_B))
        tail = printed.decode("utf-8", "replace").strip()
        return f"the sampler {process.describe_exit(code)}" + (f": {tail}" if tail else "")


def wait_until_ready(path: Path, deadline_ns: int, clock: Clock) -> bool:
    while True:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if file.readline().endswith(b"\n"):
                return True
        if clock.monotonic_ns() >= deadline_ns:
            return False
        clock.sleep(_POLL_S)
