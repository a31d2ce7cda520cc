"""The one engine that is loaded in this process."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lem.backends.protocol import Backend, EngineReport
from lem.backends.registry import create_backend
from lem.clock import Clock, SystemClock, seconds_between
from lem.config.experiment_config import ExperimentConfig
from lem.errors import EngineError

__all__ = ["Residence", "ResidentEngine", "new_load_id"]

_logger = logging.getLogger(__name__)


def new_load_id() -> str:
    """A name for one engine load that no other load anywhere has."""
    return uuid.uuid4().hex[:16]


class Residence(NamedTuple):
    """An engine that is loaded and set up for one experiment.

    Attributes:
        backend: the engine.
        report: what was loaded, with the options in effect for this experiment.
        load_s: seconds that `Backend.load` took, less `EngineReport.checks_s` and `compile_s`; None when the engine was
            there already.
        is_reused: it was loaded for an earlier experiment.
        load_id: which load it is.
    """

    backend: Backend
    report: EngineReport
    load_s: float | None
    is_reused: bool
    load_id: str


class ResidentEngine:
    """At most one loaded engine, with the key of the options that would need a reload.

    Attributes:
        own_pids: its processes on the GPUs as a sampler numbers them; None while nobody has looked.
    """

    def __init__(
        self,
        create: Callable[[str], Backend] = create_backend,
        clock: Clock | None = None,
        load_id: Callable[[], str] = new_load_id,
    ) -> None:
        self._create = create
        self._clock = clock or SystemClock()
        self._new_load_id = load_id
        self._backend: Backend | None = None
        self._engine_key: str | None = None
        self._load_id = ""
        self.own_pids: frozenset[int] | None = None

    def is_resident(self, engine_key: str) -> bool:
        """Whether `ensure` would reuse what is loaded."""
        return self._backend is not None and self._engine_key == engine_key

    def ensure(self, config: ExperimentConfig, engine_key: str, secrets: Mapping[str, str]) -> Residence:
        """The engine for this experiment: reused when its key is the same, else loaded after the other one left.

        A load that fails leaves nothing loaded; a reused engine that refuses the experiment stays loaded.

        Raises:
            EngineError: as `Backend.load` and `Backend.configure`.
        """
        if self._backend is not None and self._engine_key == engine_key:
            return Residence(self._backend, self._backend.configure(config), None, True, self._load_id)
        self.unload()
        backend = self._create(config.backend)
        started_ns = self._clock.monotonic_ns()
        try:
            report = backend.load(config, secrets)
        except BaseException:
            _give_up(backend)
            raise
        load_s = seconds_between(started_ns, self._clock.monotonic_ns()) - report.checks_s
        load_s -= report.compile_s or 0.0
        self._backend, self._engine_key, self._load_id = backend, engine_key, self._new_load_id()
        return Residence(backend, report, load_s, False, self._load_id)

    def unload(self) -> None:
        """Give up what is loaded; nothing counts as loaded afterwards, also when the engine fails at it."""
        backend, self._backend, self._engine_key, self.own_pids = self._backend, None, None, None
        if backend is not None:
            backend.unload()


def _give_up(backend: Backend) -> None:
    try:
        backend.unload()
    except (EngineError, RuntimeError) as error:
        # The failure of the load is the one to tell; torch's own errors are RuntimeErrors.
        _logger.warning("after a failed load, the engine could not be unloaded either: %s", error)
