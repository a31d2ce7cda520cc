"""The sampler as a process: its orders come through stdin, and it ends with whoever holds the other end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

from lem.clock import SystemClock
from lem.errors import ExitCode
from lem.meters.gpus import open_nvml
from lem.meters.sampler import SampleFileError, SamplerOptions, run_sampler
from lem.units import NS_PER_S

__all__ = ["PipeOwner", "run_sampler_process"]

_STDIN = 0
_READ_B = 4096


class PipeOwner:
    """An owner at the other end of a pipe: a line is an order, the end of file an end."""

    def __init__(self, orders_fd: int, wakeup_fd: int) -> None:
        """Listen.

        Args:
            wakeup_fd: readable when a signal asked for an end.
        """
        self._orders_fd = orders_fd
        self._wakeup_fd = wakeup_fd
        self._begun = b""

    def wait(self, until_ns: int) -> Sequence[str] | None:
        """The orders that came until then; None when an end is wanted."""
        timeout_s = max(0, until_ns - time.monotonic_ns()) / NS_PER_S
        ready, _, _ = select.select([self._orders_fd, self._wakeup_fd], [], [], timeout_s)
        if self._wakeup_fd in ready:
            return None
        if not ready:
            return ()
        data = os.read(self._orders_fd, _READ_B)
        if not data:
            return None
        *lines, self._begun = (self._begun + data).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]


def run_sampler_process(options: SamplerOptions, err: TextIO) -> int:
    """The exit code: 0 when the owner ended it, 1 when the log could not be written, which `err` then says."""
    with _end_signals() as wakeup_fd, _open_nvml_for(options) as nvml:
        try:
            run_sampler(options, nvml, SystemClock(), PipeOwner(_STDIN, wakeup_fd))
        except SampleFileError as error:
            err.write(f"error: {error.message}\n")
            return int(ExitCode.EXPERIMENT_FAILED)
    return int(ExitCode.OK)


@contextlib.contextmanager
def _open_nvml_for(options: SamplerOptions) -> Iterator[object]:
    """pynvml, initialised, when there are GPUs to sample; else why there is none."""
    if not options.gpus:
        yield "no GPU is sampled"
        return
    with open_nvml() as nvml:
        yield nvml


@contextlib.contextmanager
def _end_signals() -> Iterator[int]:
    """A descriptor that becomes readable when TERM or INT comes, which then do nothing else."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
