"""Sampler processes, and where samples come from: this host or this container."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from lem.base import process
from lem.base.clock import Clock
from lem.base.errors import EngineError, UserError
from lem.base.units import NS_PER_S
from lem.meters.nvml import find_gpus, named_gpus, visible_gpus
from lem.meters.samples import PartReader, SampleHeader, SampleLog, SampleLogError
from lem.worker.channel import RunRequest
from lem.worker.launch import own_command

# In these phases power at rest is measured.
RESTING_PHASES = frozenset({"prepare", "load", "idle", "cooldown"})

_POLL_S = 0.02
_SAID_MAX_B = 4096
_DEATH_S = 2.0


def interval_ms(config: Mapping[str, Any], phase: str) -> int:
    """From one look at a GPU to the next, 0 for none, in a phase of an experiment (`ExperimentConfig.to_dict`)."""
    if phase in RESTING_PHASES:
        return int(config["baseline"]["sample_interval_ms"])
    return int(config["timeseries"]["sample_interval_ms"]) if config["timeseries"]["enabled"] else 0


class SamplerProcess:
    """A sampler, which ends with the process that holds this object.

    Attributes:
        output: the log that it writes.
    """

    def __init__(self, child: process.Child[bytes], output: Path, said: IO[bytes]) -> None:
        """Take a child over; use `start`."""
        self._child = child
        self.output = output
        self._said = said

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        output: Path,
        gpus: Sequence[str] = (),
        interval_ms: int = 100,
        tdp_w: float | None = None,
    ) -> SamplerProcess:
        """A sampler that was started; it has the header of its log written a moment later, see `wait_until_ready`.

        Args:
            command: what runs this lem, see `lem.worker.launch.own_command`.
            output: the log, which must not be there yet.
            gpus: their UUIDs; () for none.
            interval_ms: from one look at a GPU to the next.
            tdp_w: the user's design power of all CPU packages.

        Raises:
            UserError: the command cannot be started.
        """
        words = [*command, "worker", "--sampler", "--output", str(output), "--interval-ms", str(interval_ms)]
        words += [word for gpu in gpus for word in ("--gpu", gpu)]
        words += [] if tdp_w is None else ["--tdp", repr(tdp_w)]
        # A file, not a pipe: a library that talks a lot must not make the sampler wait for a reader.
        try:
            said = tempfile.TemporaryFile(prefix="lem-sampler-")  # noqa: SIM115 - the sampler and this object hold it
        except OSError as error:
            raise UserError(f"{tempfile.gettempdir()}: no temporary file can be made: {error.strerror}") from error
        try:
            child = process.spawn(
                words, stdin=process.PIPE, stdout=process.DEVNULL, stderr=said.fileno(), new_session=True
            )
        except BaseException:
            said.close()
            raise
        if child.stdin is not None:
            os.set_blocking(child.stdin.fileno(), False)
        return cls(child, output, said)

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._child.pid

    def is_running(self) -> bool:
        """Whether it is still there."""
        return self._child.poll() is None

    def set_interval(self, interval_ms: int) -> None:
        """Look at the GPUs every so often from now on; one that is gone is told nothing."""
        stdin = self._child.stdin
        if stdin is not None and not stdin.closed:
            # The pipe is full only when the sampler has hung through thousands of orders.
            with contextlib.suppress(BrokenPipeError, BlockingIOError):
                os.write(stdin.fileno(), f"interval {interval_ms}\n".encode())

    def hang_up(self) -> None:
        """Have it write its last rows and end; returns at once."""
        stdin = self._child.stdin
        if stdin is not None and not stdin.closed:
            stdin.close()

    def stop(self, timeout_s: float) -> int | None:
        """Its exit code as `subprocess` gives it, once it has ended; it is killed when that takes longer.

        None for one that cannot even be killed, since it sits in a driver; it ends when the driver lets it go.
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

    def said(self) -> str:
        """The last of what it wrote to stderr: why it ended, where it could say so."""
        size = os.fstat(self._said.fileno()).st_size
        data = os.pread(self._said.fileno(), _SAID_MAX_B, max(0, size - _SAID_MAX_B))
        return data.decode("utf-8", "replace").strip()

    def death(self) -> str | None:
        """How it ended, and what it said; None while it runs."""
        code = self._child.poll()
        if code is None:
            return None
        said = self.said()
        return f"the sampler {process.describe_exit(code)}" + (f", saying: {said}" if said else "")


def wait_until_ready(path: Path, deadline_ns: int, is_alive: Callable[[], bool], clock: Clock) -> bool:
    """Whether the log has its header by then; what is read there is read with `lem.meters.samples.read_part`.

    Args:
        deadline_ns: on the clock's CLOCK_MONOTONIC.
        is_alive: whether the sampler is, as far as the caller can tell; waiting ends when it is not.
    """
    while True:
        was_alive = is_alive()  # before the file is looked at: it may write the header and end in between
        if _has_header(path):
            return True
        if not was_alive or clock.monotonic_ns() >= deadline_ns:
            return False
        clock.sleep(_POLL_S)


def _has_header(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.readline().endswith(b"\n")
    except FileNotFoundError:
        return False


_NO_SAMPLER = "the host started no sampler"

READY_TIMEOUT_S = 30.0


class SampleSource(Protocol):
    """Where the sample log is read from."""

    def read(self) -> SampleLog:
        """The log as far as it is written."""


@dataclass(frozen=True)
class NothingSampled:
    """No sampler runs; the header says why."""

    header: SampleHeader

    def read(self) -> SampleLog:
        """A log without rows."""
        return SampleLog(self.header)


class PartFile:
    """The file that a sampler is writing."""

    def __init__(self, path: Path) -> None:
        """Read from its beginning on."""
        self.path = path
        self._reader = PartReader(path)

    def read(self) -> SampleLog:
        """The log as far as it is written.

        Raises:
            EngineError: kind `meter`, it cannot be read.
        """
        try:
            return self._reader.read()
        except (OSError, SampleLogError) as error:
            raise EngineError(f"{self.path}: the samples cannot be read: {error}", kind="meter") from error


def open_source(request: RunRequest, clock: Clock) -> SampleSource:
    """Where the samples of an attempt are read, once the sampler writes.

    Raises:
        EngineError: kind `meter`, it does not.
    """
    if request.samples_path is None:
        errors = request.meter_errors
        header = SampleHeader(
            started_ns=clock.monotonic_ns(),
            started_utc=clock.utc_now().isoformat(),
            host=str(request.identity.get("host", "")),
            interval_ms=0,
            gpu_error=errors.get("gpu", _NO_SAMPLER),
            rapl_error=errors.get("rapl", _NO_SAMPLER),
        )
        return NothingSampled(header)
    path = Path(request.samples_path)
    deadline_ns = clock.monotonic_ns() + round(READY_TIMEOUT_S * NS_PER_S)
    if not wait_until_ready(path, deadline_ns, lambda: True, clock):
        raise EngineError(f"{path}: no sampler has written there for {READY_TIMEOUT_S:g} s", kind="meter")
    return PartFile(path)


class WorkerSampler:
    """At most one sampler, beside the experiment that asks for it; nothing here waits."""

    def __init__(self) -> None:
        self._sampler: SamplerProcess | None = None
        self._is_wanted = False

    def begin(self, request: RunRequest) -> None:
        """Sample for an experiment, if that is asked for.

        Raises:
            UserError: the sampler cannot be started.
        """
        if not request.is_sampler_due or request.samples_path is None:
            return
        self._is_wanted = True
        seen = visible_gpus(find_gpus(), os.environ)
        self._sampler = SamplerProcess.start(
            own_command(sys.executable),
            Path(request.samples_path),
            [gpu.uuid for gpu in named_gpus(request.config["gpus"], seen)],
            interval_ms(request.config, "prepare"),
            request.config["measurement"]["cpu_tdp_w"],
        )

    def follow(self, request: RunRequest, phase: str) -> None:
        """Sample as a phase wants it."""
        if self._sampler is not None:
            self._sampler.set_interval(interval_ms(request.config, phase))

    def end(self) -> None:
        """Have it end, which takes a moment."""
        self._is_wanted = False
        if self._sampler is not None:
            self._sampler.hang_up()

    def reap(self) -> str | None:
        """How one ended that was wanted yet; it is forgotten."""
        death = None if self._sampler is None else self._sampler.death()
        if death is not None:
            self._sampler = None
        return death if self._is_wanted else None

    def kill(self) -> None:
        """End it at once."""
        if self._sampler is not None:
            self._sampler.kill()
