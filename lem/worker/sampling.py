"""Samplers: processes that write the log of the meters, seen from the process that starts or waits for one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from lem.base import process
from lem.base.clock import Clock
from lem.base.errors import UserError

READY_TIMEOUT_S = 30.0
RESTING_PHASES = frozenset({"prepare", "load", "idle", "cooldown"})  # power at rest is measured in them
_POLL_S = 0.02
_STDERR_MAX_B = 4096
_DEATH_S = 2.0


def interval_ms(config: Mapping[str, Any], phase: str) -> int:
    """The sampling interval of the GPUs, 0 for none, in a phase of an experiment (`ExperimentConfig.to_dict`)."""
    if phase in RESTING_PHASES:
        return int(config["baseline"]["sample_interval_ms"])
    return int(config["timeseries"]["sample_interval_ms"]) if config["timeseries"]["enabled"] else 0


class SamplerProcess:
    """A sampler, which ends with the process that holds this object."""

    def __init__(
        self,
        command: Sequence[str],
        output: Path,
        gpus: Sequence[str] = (),
        interval_ms: int = 100,
        tdp_w: float | None = None,
    ) -> None:
        """Start it; it has the header of its log written a moment later, see `wait_until_ready`.

        Args:
            command: what runs this lem, see `lem.worker.launch.own_command`.
            output: the log, which must not exist yet.
            gpus: their UUIDs.
            interval_ms: the sampling interval of the GPUs.
            tdp_w: the design power of all CPU packages that the user gave.

        Raises UserError: the command cannot be started.
        """
        words = [*command, "worker", "--sampler", "--output", str(output), "--interval-ms", str(interval_ms)]
        words += [word for gpu in gpus for word in ("--gpu", gpu)]
        words += [] if tdp_w is None else ["--tdp", repr(tdp_w)]
        self.output = output
        # A file, not a pipe: a library that prints a lot must not make the sampler wait for a reader.
        try:
            self._stderr: IO[bytes] = tempfile.TemporaryFile(prefix="lem-sampler-")  # noqa: SIM115 - kept by the object
        except OSError as error:
            raise UserError(f"{tempfile.gettempdir()}: cannot create a temporary file: {error.strerror}") from error
        try:
            self._child = process.spawn(words, stdout=process.DEVNULL, stderr=self._stderr.fileno(), new_session=True)
        except BaseException:
            self._stderr.close()
            raise
        self._stdin = cast("IO[bytes]", self._child.stdin)  # a pipe by default
        os.set_blocking(self._stdin.fileno(), False)

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._child.pid

    @property
    def has_hung_up(self) -> bool:
        """Whether it was asked to end."""
        return self._stdin.closed

    def is_running(self) -> bool:
        """Whether it is still there."""
        return self._child.poll() is None

    def set_interval(self, interval_ms: int) -> None:
        """Sample the GPUs with another interval from now on; one that is gone is left alone."""
        if not self._stdin.closed:
            # The pipe is full only when the sampler has hung through thousands of orders.
            with contextlib.suppress(BrokenPipeError, BlockingIOError):
                os.write(self._stdin.fileno(), f"interval {interval_ms}\n".encode())

    def hang_up(self) -> None:
        """Have it write its last rows and end; returns at once."""
        self._stdin.close()

    def stop(self, timeout_s: float) -> int | None:
        """Its exit code as `subprocess` gives it, once it has ended; it is killed when that takes longer.

        None for one that even KILL does not end, since it hangs in a driver.
        """
        self.hang_up()
        for patience_s in (timeout_s, _DEATH_S):
            with contextlib.suppress(process.TimeoutExpired):
                return self._child.wait(patience_s)
            self.kill()
        return None

    def kill(self) -> None:
        """End it at once, without its last rows."""
        if self._child.poll() is None:
            process.kill_group(self._child.pid)
        self.hang_up()

    def stderr_tail(self) -> str:
        """The end of what it wrote to stderr."""
        size = os.fstat(self._stderr.fileno()).st_size
        data = os.pread(self._stderr.fileno(), _STDERR_MAX_B, max(0, size - _STDERR_MAX_B))
        return data.decode("utf-8", "replace").strip()

    def death(self) -> str | None:
        """How it ended, with what it wrote to stderr; None while it runs."""
        code = self._child.poll()
        if code is None:
            return None
        tail = self.stderr_tail()
        return f"the sampler {process.describe_exit(code)}" + (f": {tail}" if tail else "")


def wait_until_ready(path: Path, deadline_ns: int, is_alive: Callable[[], bool], clock: Clock) -> bool:
    """Whether the log has its header by then (CLOCK_MONOTONIC); waiting ends when the sampler is not alive."""
    while True:
        was_alive = is_alive()  # asked first: it may write the header and end in between
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if file.readline().endswith(b"\n"):
                return True
        if not was_alive or clock.monotonic_ns() >= deadline_ns:
            return False
        clock.sleep(_POLL_S)
