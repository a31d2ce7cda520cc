"""What the harness asks of an inference engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lem.base.reasons import Reason
from lem.config.experiment import ExperimentConfig


@dataclass(frozen=True)
class TokenRequest:
    """One request, already tokenised, so that tokenising is never measured.

    Attributes:
        index: position in the prompt set; unique within a window repeat.
        token_ids: the prompt, without padding.
        max_output_tokens, min_output_tokens: bounds on the tokens to generate.
    """

    index: int
    token_ids: tuple[int, ...]
    max_output_tokens: int
    min_output_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """What became of a request. Times are CLOCK_MONOTONIC nanoseconds.

    Attributes:
        index: the request's index.
        output_ids: tokens the engine generated, up to and including an end-of-sequence token; padding never.
        started_ns: when the engine took the request up (it left the queue).
        finished_ns: when its last token was there.
        token_times_ns: when each output token was seen, one per id; None where the engine gave no time for them.
        error: why it failed; None when it did not.
        padding_tok: padding computed in front of this prompt to make its batch rectangular; never input. None
            where the engine does not tell.
    """

    index: int
    output_ids: tuple[int, ...]
    started_ns: int
    finished_ns: int
    token_times_ns: tuple[int, ...] | None = None
    error: str | None = None
    padding_tok: int | None = None


class RequestQueue(Protocol):
    """Requests that arrive while the engine works; thread-safe. The traffic generator implements it."""

    def take(self, limit: int) -> tuple[TokenRequest, ...]:
        """Up to `limit` requests that have arrived; waits for the first; () when closed and empty."""

    def complete(self, completion: Completion) -> None:
        """Hand in a finished or failed request."""


@dataclass(frozen=True)
class EngineReport:
    """What was loaded.

    Attributes:
        engine_name, engine_version: the distribution found, e.g. `transformers`, `5.23.0`.
        versions: versions of everything that can change the numbers, e.g. {"torch": "2.13.0+cpu", "cuda": "13.0"}.
        device: `cpu` or `cuda`.
        gpu_uuids: the GPUs in use, `GPU-…` as NVML names them.
        effective: the engine configuration as found after loading, engine defaults included (JSON values). The
            options of the backend's section stand under the section's name (`pytorch`), `decoder` and the shared
            fields under theirs, so that they can be laid beside the requested ones; whatever else there is to
            know has keys of its own.
        model_revision: the commit of a hub model; None for a local folder.
        weights_sha256: hash of the weight files as loaded: SHA-256 over a line `<sha256 of the file>  <name>` for
            each file in name order; None where it cannot be had.
        model_parameters: number of parameters; None when unknown.
        embedding_parameters: parameters of input and output embeddings; None when unknown.
        warnings: what a person should know about this load.
        compile_s: part of `load` spent on compiling; None when nothing was compiled.
        checks_s: part of `load` spent on trying and identifying what was loaded (a short generation, the hash of the
            weights), which is no part of loading it.
    """

    engine_name: str
    engine_version: str
    versions: Mapping[str, str]
    device: str
    gpu_uuids: tuple[str, ...] = ()
    effective: Mapping[str, Any] = field(default_factory=dict)
    model_revision: str | None = None
    weights_sha256: str | None = None
    model_parameters: int | None = None
    embedding_parameters: int | None = None
    warnings: tuple[Reason, ...] = ()
    compile_s: float | None = None
    checks_s: float = 0.0


OnProgress = Callable[[int], None]


def say_nothing(done: int) -> None:
    """Tell nobody how many requests are done."""


class Backend(Protocol):
    """An engine behind one module; at most one engine is resident in a process."""

    name: str

    def load(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> EngineReport:
        """Import the engine and load the model; what only an installed engine can judge is judged here.

        Raises:
            OptionRefused: an option that this engine version cannot honour, named with the version.
            EngineError: kind `model` (missing model), `out_of_memory`, `engine`.
        """

    def configure(self, config: ExperimentConfig) -> EngineReport:
        """Adopt another experiment with the same engine key without a reload; the report with its effective options.

        Raises:
            OptionRefused: as `load`.
        """

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens as the model wants them; no truncation."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of output ids, special tokens left out."""

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        """Run a closed set of requests in batches of the engine's own making; one completion a request, any order.

        Args:
            observe_tokens: measure each request alone, with the time of each token.
            on_progress: is told now and then how many of the requests are done; without it a long set looks like
                an engine that hangs.

        Raises:
            EngineError: the engine failed as a whole; a single failed request is a completion with an error.
        """

    def serve(self, queue: RequestQueue) -> None:
        """Work the queue off until it is closed and empty, observing token times; requests arrive meanwhile."""

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""

    def reset_peak_memory(self) -> None:
        """Start a new peak."""

    def peak_memory_b(self) -> int | None:
        """Bytes of device memory at the peak since the reset; None on a device that does not tell."""

    def unload(self) -> None:
        """Give up model and device memory."""
