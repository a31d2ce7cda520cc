"""What every backend and its session do alike. A session is a loaded engine, and its module imports that engine."""

from __future__ import annotations

import importlib.util
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from lem.backends.protocol import Completion, EngineReport, OnProgress, RequestQueue, TokenRequest, say_nothing
from lem.config.experiment_config import ExperimentConfig
from lem.errors import EngineError
from lem.units import NS_PER_S

__all__ = [
    "GOOD_ENDS",
    "TAKE_LIMIT",
    "TRIAL_TOKENS",
    "EngineSession",
    "ServedSession",
    "SessionBackend",
    "check_ids",
    "check_same_engine",
    "explain_import",
    "seconds_since",
]

# All that has arrived goes to the engine at once: waiting in its queue is what the engine's scheduler is about.
TAKE_LIMIT = 1 << 20
# How a request ends that was answered: by its end token, or at its length.
GOOD_ENDS = frozenset({"stop", "length"})
# Of the request that tries an engine out: the prefill gives one, a step of decoding another.
TRIAL_TOKENS = 2


class EngineSession(Protocol):
    """A loaded engine, as `Backend` describes it."""

    def configure(self, config: ExperimentConfig) -> None:
        """Set it up for another experiment."""

    def report(self) -> EngineReport:
        """What is loaded, with the options in effect."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer."""

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress
    ) -> list[Completion]:
        """A completion for each request."""

    def serve(self, queue: RequestQueue) -> None:
        """Work the queue off."""

    def synchronize(self) -> None:
        """Return when the device has nothing more to do."""

    def reset_peak_memory(self) -> None:
        """Begin to look for the peak anew."""

    def peak_memory_b(self) -> int | None:
        """The peak since then, in bytes."""

    def close(self) -> None:
        """Give up what it holds."""


class ServedSession:
    """The part of a session whose engine runs in processes of its own."""

    def synchronize(self) -> None:
        """Nothing: a token is handed over once it was read from the device, so the last one ends the work."""

    def reset_peak_memory(self) -> None:
        """Nothing: the engine takes its memory when it loads, and its processes tell of no peak."""

    def peak_memory_b(self) -> int | None:
        """None."""
        return None


S = TypeVar("S", bound=EngineSession)


class SessionBackend(ABC, Generic[S]):
    """A backend that loads its engine with a session and forgets it with that.

    Attributes:
        name: as configurations say it.
        packages: what Python must have.
        package_hint: how to come by them; `{missing}` and `{python}` stand for themselves.
    """

    name: str
    packages: tuple[str, ...]
    package_hint: str

    def __init__(self) -> None:
        self._session: S | None = None

    @abstractmethod
    def open_session(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> S:
        """Import the engine and load it.

        Raises:
            EngineError: either fails.
        """

    def load(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> EngineReport:
        """As `Backend`."""
        self.unload()
        self._require_packages()
        self._session = self.open_session(config, secrets)
        return self._session.report()

    def configure(self, config: ExperimentConfig) -> EngineReport:
        """As `Backend`."""
        self._there.configure(config)
        return self._there.report()

    def encode(self, text: str) -> list[int]:
        """As `Backend`."""
        return self._there.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """As `Backend`."""
        return self._there.decode(token_ids)

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        """As `Backend`."""
        return self._there.generate(requests, observe_tokens=observe_tokens, on_progress=on_progress)

    def serve(self, queue: RequestQueue) -> None:
        """As `Backend`."""
        self._there.serve(queue)

    def synchronize(self) -> None:
        """As `Backend`."""
        self._there.synchronize()

    def reset_peak_memory(self) -> None:
        """As `Backend`."""
        self._there.reset_peak_memory()

    def peak_memory_b(self) -> int | None:
        """As `Backend`."""
        return self._there.peak_memory_b()

    def unload(self) -> None:
        """As `Backend`."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    @property
    def _there(self) -> S:
        if self._session is None:
            raise EngineError("no model is loaded")
        return self._session

    def _require_packages(self) -> None:
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise EngineError(
                f"the {self.name} backend needs {' and '.join(missing)}, which {sys.executable} does not have",
                self.package_hint.format(missing=" ".join(missing), python=sys.executable),
                kind="engine",
                is_permanent=True,
            )


def explain_import(what: str, error: Exception, hint: str) -> EngineError:
    """The error of an engine that is installed and cannot be imported.

    Raises:
        ImportError: what is missing belongs to lem, so it is not the engine's fault.
    """
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "lem":
        raise error
    return EngineError(
        f"{what} cannot be imported by {sys.executable}: {error}", hint, kind="engine", is_permanent=True
    )


def check_same_engine(config: ExperimentConfig, engine_key: str) -> None:
    """Refuse an experiment that needs another load than the one of this key.

    Raises:
        EngineError: it does; whoever keeps the engine should have known.
    """
    if config.engine_key() != engine_key:
        raise EngineError("this experiment needs another engine load than the one that is there")


def check_ids(ids: list[int], known: int) -> list[int]:
    """The token ids of a prompt, all of which the model knows.

    Args:
        known: how many ids it knows, from 0 on.

    Raises:
        EngineError: kind `model`, the tokenizer is of another model.
    """
    if ids and max(ids) >= known:
        raise EngineError(
            f"the tokenizer makes id {max(ids)}, the model knows ids below {known}",
            "set model.tokenizer to the one the model was trained with",
            kind="model",
            is_permanent=True,
        )
    return ids


def seconds_since(began_ns: int) -> float:
    """The seconds since a moment of CLOCK_MONOTONIC."""
    return (time.monotonic_ns() - began_ns) / NS_PER_S
