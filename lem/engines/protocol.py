"""What the harness asks of an inference engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lem.base.dataclass import dataclass, field
from lem.base.reasons import Reason
from lem.config.experiment import ExperimentConfig
from lem.engines.traffic import TrafficPlan


@dataclass(frozen=True)
class TokenRequest:
    """One request, already tokenised, so that tokenising is never measured."""

    index: int  # position in the prompt set; unique within a window repeat
    token_ids: tuple[int, ...]  # the prompt, without padding
    max_output_tokens: int
    min_output_tokens: int = 0
    # Of a chat whose template the server applies: the fields of the body in place of the prompt, as JSON. The ids are
    # those of its texts.
    conversation: str = ""


@dataclass(frozen=True)
class Completion:
    """The outcome of a request. Times are CLOCK_MONOTONIC nanoseconds."""

    index: int
    output_ids: tuple[int, ...]  # up to and including an end-of-sequence token; never padding
    started_ns: int  # when the engine took the request from its queue
    finished_ns: int  # when its last token was available
    token_times_ns: tuple[int, ...] | None = None  # one per output token; None if the engine does not time them
    error: str | None = None
    padding_tok: int | None = None  # computed in front of the prompt to fill its batch; None if unknown
    # Of a server, which counts tokens itself; ids may be missing.
    input_tok: int | None = None
    counted_tok: int | None = None  # of the output
    text: str | None = None

    @property
    def output_tok(self) -> int:
        return len(self.output_ids) if self.counted_tok is None else self.counted_tok


class RequestQueue(Protocol):
    """Requests that arrive while the engine works; thread-safe. The traffic generator implements it."""

    def take(self, limit: int) -> tuple[TokenRequest, ...]:
        """Up to `limit` requests that have arrived; waits for the first; () when closed and empty."""

    def complete(self, completion: Completion) -> None:
        """Hand in a finished or failed request."""


@dataclass(frozen=True)
class EngineReport:
    """What is loaded.

    `effective` holds JSON values, engine defaults included. Under the keys that the configuration has too (the
    backend's section, `decoder`, the shared fields) it has the same shape, so that the two can be compared; everything
    else has keys of its own.
    """

    engine_name: str  # the distribution: transformers
    engine_version: str
    versions: Mapping[str, str]  # of everything that can change the numbers: {"torch": "2.13.0+cpu", "cuda": "13.0"}
    device: str  # cpu or cuda
    gpu_uuids: tuple[str, ...] = ()  # the GPUs in use, as NVML names them (GPU-…)
    effective: Mapping[str, Any] = field(default_factory=dict)
    model_revision: str | None = None  # the commit of a model on the hub; None for a local folder
    weights_sha256: str | None = None  # over a line `<sha256 of the file>  <name>` per weight file, in name order
    model_parameters: int | None = None
    embedding_parameters: int | None = None  # of input and output embeddings
    active_parameters: int | None = None  # those that a token uses: all but of a mixture of experts; None if unknown
    warnings: tuple[Reason, ...] = ()
    compile_s: float | None = None  # part of the load spent on compiling; None if nothing was compiled
    checks_s: float = 0.0  # part of the load spent on a trial run and on hashing the weights
    longest_tok: int | None = None  # the most tokens of prompt and output together; None if it does not say
    load_id: str = ""  # of a server that was running already: the same for as long as it runs


OnProgress = Callable[[int], None]


def say_nothing(done: int) -> None:
    """Report no progress."""


class Engine(Protocol):
    """A loaded engine; a process has at most one.

    A backend is a module (`common.BACKEND_MODULES`) with a function that imports the engine and loads the model:
    `load(config, secrets) -> Engine`. It raises OptionRefused for options that the installed version does not support,
    and EngineError of kind `model`, `out_of_memory` or `engine`; a load that fails leaves nothing behind.
    """

    @property
    def report(self) -> EngineReport:
        """What is loaded, with the options in effect for the current experiment."""

    def configure(self, config: ExperimentConfig) -> None:
        """Switch to another experiment with the same engine key; a refused one (OptionRefused) unloads nothing."""

    def encode(self, text: str, *, is_whole: bool = True) -> list[int]:
        """Token ids of a text; of a whole prompt with the special tokens that the model expects, none of them twice."""

    def chat_template(self, given: str | None, *, has_tools: bool) -> str:
        """The chat template in effect: the given one, else the model's own; EngineError if it has none."""

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], template: str
    ) -> tuple[str, str, str]:
        """A conversation as text, in front of the last turn of the user, this turn, and after it.

        It ends where the model is to answer. EngineError, kind `prompts`: the template refuses it.
        """

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of output ids, without special tokens."""

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        """Run a closed set of requests in batches that the engine forms; one completion per request, in any order.

        Args:
            observe_tokens: run each request alone and time each token.
            on_progress: called with the number of completed requests, so that a long set does not look like a hang.

        Raises:
            EngineError: the engine failed as a whole; a single failed request is a completion with an error.
        """

    def serve(self, queue: RequestQueue) -> None:
        """Answer requests as they arrive and time their tokens, until the queue is closed and empty."""

    def synchronize(self) -> None:
        """Wait until the device is idle."""

    def reset_peak_memory(self) -> None:
        """Start a new peak."""

    def peak_memory_b(self) -> int | None:
        """Bytes of device memory at the peak since the reset; None if the device does not report it."""

    def close(self) -> None:
        """Free the model and the device memory."""


@dataclass(frozen=True)
class Arrival:
    """A request of steady traffic, as its client saw it. Times are CLOCK_MONOTONIC nanoseconds."""

    prompt: int  # its place in the prompt set
    arrived_ns: int  # open loop: as scheduled; closed loop: when it was sent
    completion: Completion | None  # None if it was never sent, or not answered
    error: str | None = None  # why it was not answered; None if it was never sent


@dataclass(frozen=True)
class Drive:
    """Steady traffic by a client that opens and closes the window itself."""

    opened_ns: int
    closed_ns: int
    has_turned_over: bool
    arrivals: tuple[Arrival, ...]


@dataclass(frozen=True)
class Observed:
    """What the client and the server say about a window."""

    token_source: str | None  # None: no request succeeded
    facts: Mapping[str, Any]  # JSON values, for the record
    warnings: tuple[Reason, ...] = ()
    invalid_reasons: tuple[Reason, ...] = ()


@runtime_checkable
class Driven(Protocol):
    """An engine behind a load client, which is a process of its own."""

    def run_passes(
        self, requests: Sequence[TokenRequest], least_s: float, on_progress: OnProgress
    ) -> list[list[Completion]]:
        """Run a closed set at once, over and over until so much time has passed; the completions of each pass."""

    def drive(self, requests: Sequence[TokenRequest], plan: TrafficPlan, on_progress: OnProgress) -> Drive:
        """Steady traffic over the requests; raises EngineError: the client or the server has failed."""

    def begin_window(self) -> None:
        """What is observed from here on is of the window."""

    def observed(self) -> Observed:
        """Since `begin_window`."""
