"""The sampler of a worker whose host cannot read the meters."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lem.experiment.channel import RunRequest
from lem.experiment.launch import own_command
from lem.experiment.sampler_process import SamplerProcess, interval_ms
from lem.meters.gpus import find_gpus, named_gpus, visible_gpus

__all__ = ["WorkerSampler"]


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
