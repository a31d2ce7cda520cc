"""Where the samples of an attempt are read: the file that a sampler writes, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lem.clock import Clock
from lem.errors import EngineError
from lem.experiment.channel import RunRequest
from lem.experiment.sampler_process import wait_until_ready
from lem.meters.samples import PartReader, SampleHeader, SampleLog, SampleLogError
from lem.units import NS_PER_S

__all__ = ["NothingSampled", "PartFile", "SampleSource", "open_source"]

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
