"""Requests through vLLM's engine: `add_request` and `step`, for closed sets, single requests and traffic.

Nothing here imports the engine. What is called is the engine's own interface, the two calls that `LLM.generate` makes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lem.base.errors import EngineError
from lem.base.units import NS_PER_S
from lem.engines.common import GOOD_ENDS, TAKE_LIMIT, EngineRaised, shortened
from lem.engines.protocol import Completion, OnProgress, RequestQueue, TokenRequest


class Engine(Protocol):
    """What is called of vLLM's LLMEngine."""

    def add_request(self, request_id: str, prompt: Any, params: Any, *, lora_request: Any = None) -> Any:
        """Hand a request over."""

    def step(self) -> list[Any]:
        """What became of requests since the last call; waits until the engine has made a step."""


class RequestForms(Protocol):
    """Requests in the engine's own types."""

    @property
    def longest(self) -> int:
        """The most tokens of prompt and output together."""

    @property
    def rejections(self) -> tuple[type[Exception], ...]:
        """What the engine raises over a request that it does not take."""

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What else its calls raise."""

    @property
    def adapter(self) -> Any:
        """The LoRA adapter of every request; None without."""

    def prompt(self, token_ids: Sequence[int], salt: str | None) -> Any:
        """A prompt; equal prompts with different salts share nothing in the prefix cache."""

    def parameters(self, request: TokenRequest, *, is_observed: bool) -> Any:
        """How to sample, and whether tokens are handed over as they come or all at the end."""


@dataclass
class _Stream:
    """A request that the engine has."""

    request: TokenRequest
    handed_ns: int
    is_observed: bool
    output_ids: list[int] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)

    def take(self, output: Any, now_ns: int) -> Completion | None:
        """Note what a step brought: one token, several, or none; the completion once it is the last.

        Tokens are timed when the caller has them. When the request was taken up the engine itself says, by the same
        clock (CLOCK_MONOTONIC); its `arrival_time` is of another clock and is not looked at.
        """
        part = output.outputs[0]
        self.output_ids += part.token_ids
        if self.is_observed:
            self.times_ns += [now_ns] * len(part.token_ids)
        if not output.finished:
            return None
        started_ns, finished_ns = self._span(output.metrics, now_ns)
        error = None if part.finish_reason in GOOD_ENDS else f"vLLM ended the request with {part.finish_reason!r}"
        return Completion(
            self.request.index,
            tuple(self.output_ids),
            started_ns,
            finished_ns,
            tuple(self.times_ns) if self.is_observed else None,
            error=error,
            padding_tok=0,
        )

    def _span(self, metrics: Any, now_ns: int) -> tuple[int, int]:
        started_s, last_s = (getattr(metrics, name, 0.0) for name in ("scheduled_ts", "last_token_ts"))
        started_ns = round(started_s * NS_PER_S) if started_s else self.handed_ns
        if self.is_observed:
            return started_ns, self.times_ns[-1] if self.times_ns else now_ns
        return started_ns, max(started_ns, round(last_s * NS_PER_S) if last_s else now_ns)


class StepLoop:
    """Runs requests through an engine. The thread that runs it is the only one that calls the engine.

    Args:
        answers: where an engine in a process of its own puts the result of each step, which `step` then takes. Requests
            go to it as they arrive, while it computes; without such a queue they wait for the end of the step.
    """

    def __init__(
        self,
        engine: Engine,
        forms: RequestForms,
        *,
        answers: queue.Queue[Any] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._engine = engine
        self._forms = forms
        self._answers = answers
        self._clock = clock
        self._streams: dict[str, _Stream] = {}
        self._count = 0

    def run_closed(self, requests: Sequence[TokenRequest], on_progress: OnProgress) -> list[Completion]:
        """A completion for each request, all of them handed over at once."""
        completions = [failed for request in requests if (failed := self._add(request, is_observed=False)) is not None]
        while self._streams:
            completions += self._step()
            on_progress(len(completions))
        return completions

    def run_alone(self, requests: Sequence[TokenRequest], on_progress: OnProgress) -> list[Completion]:
        """A completion for each request, one after another, with the times of its tokens."""
        completions: list[Completion] = []
        for request in requests:
            failed = self._add(request, is_observed=True)
            completions += [] if failed is None else [failed]
            while self._streams:
                completions += self._step()
                on_progress(len(completions))
        return completions

    def serve(self, arrivals: RequestQueue, *, is_salted: bool) -> None:
        """Work a queue off until it is closed and empty.

        Args:
            is_salted: a prompt that comes again is not found in the prefix cache.

        Raises:
            EngineRaised: the engine failed.
        """
        desk = _Desk(arrivals, self._answers)
        salts = _Salts() if is_salted else None
        thread = threading.Thread(target=desk.take_in, name="requests", daemon=True)
        thread.start()
        while (arrived := desk.collect(is_busy=bool(self._streams))) is not None:
            for request in arrived:
                salt = None if salts is None else salts.next(request.token_ids)
                failed = self._add(request, is_observed=True, salt=salt)
                if failed is not None:
                    arrivals.complete(failed)
            if self._streams and desk.can_step():
                for completion in self._step():
                    arrivals.complete(completion)
        if desk.failure is not None:
            raise desk.failure
        thread.join()

    def _add(self, request: TokenRequest, *, is_observed: bool, salt: str | None = None) -> Completion | None:
        """Hand a request over; its completion when it has failed already."""
        forms, now_ns = self._forms, self._clock()
        needed = len(request.token_ids) + request.max_output_tokens
        if needed > forms.longest:
            problem = (
                f"{len(request.token_ids)} tokens of prompt and {request.max_output_tokens} of output are more than "
                f"vllm.max_model_len, {forms.longest}"
            )
            return Completion(request.index, (), now_ns, now_ns, error=problem)
        self._count += 1
        name = f"lem-{self._count}"
        try:
            prompt = forms.prompt(request.token_ids, salt)
            parameters = forms.parameters(request, is_observed=is_observed)
        except forms.rejections as error:
            return Completion(request.index, (), now_ns, self._clock(), error=shortened(error))
        try:
            self._engine.add_request(name, prompt, parameters, lora_request=forms.adapter)
        except forms.rejections as error:
            return Completion(request.index, (), now_ns, self._clock(), error=shortened(error))
        except forms.failures as error:
            raise EngineRaised(error) from error
        self._streams[name] = _Stream(request, now_ns, is_observed)
        return None

    def _step(self) -> list[Completion]:
        try:
            outputs = self._engine.step()
        except self._forms.failures as error:
            raise EngineRaised(error) from error
        now_ns = self._clock()
        completions = []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                raise EngineError(f"vLLM answered request {output.request_id}, which it did not have")
            completion = stream.take(output, now_ns)
            if completion is not None:
                del self._streams[output.request_id]
                completions.append(completion)
        return completions


class _Salts:
    """Salts that keep a prompt from being found in the prefix cache when it comes again."""

    def __init__(self) -> None:
        self._occurrences: Counter[tuple[int, ...]] = Counter()

    def next(self, token_ids: tuple[int, ...]) -> str | None:
        """None for a prompt that is new; then another one each time it comes again."""
        self._occurrences[token_ids] += 1
        times = self._occurrences[token_ids]
        return None if times == 1 else str(times)


class _Desk:
    """Between the thread that takes requests in and the one that calls the engine.

    Attributes:
        failure: why no more requests can be taken in.
    """

    def __init__(self, arrivals: RequestQueue, answers: queue.Queue[Any] | None) -> None:
        self.failure: Exception | None = None
        self._arrivals = arrivals
        self._answers = answers
        # One condition for arrivals and for answers: `queue.Queue` notifies it when something is put there.
        self._changed = threading.Condition() if answers is None else answers.not_empty
        self._inbox: list[TokenRequest] = []
        self._is_closed = False

    def take_in(self) -> None:
        """Fetch requests as they arrive; runs in a thread of its own."""
        try:
            while arrived := self._arrivals.take(TAKE_LIMIT):
                with self._changed:
                    self._inbox.extend(arrived)
                    self._changed.notify()
        except Exception as error:  # noqa: BLE001 - the top of a thread: the loop raises it
            self.failure = error
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify()

    def collect(self, *, is_busy: bool) -> list[TokenRequest] | None:
        """The requests that have arrived; waits until there is one or the engine can be stepped.

        None when no more will come and the engine has none, or when taking in has failed.

        Args:
            is_busy: the engine has requests.
        """
        with self._changed:
            while not self._inbox and not (is_busy and self._has_answer()):
                if self.failure is not None or (self._is_closed and not is_busy):
                    return None
                self._changed.wait()
            if self.failure is not None:
                return None
            arrived, self._inbox = self._inbox, []
            return arrived

    def can_step(self) -> bool:
        """Whether a step does not keep requests waiting that arrive meanwhile."""
        with self._changed:
            return self._has_answer()

    def _has_answer(self) -> bool:
        return self._answers is None or bool(self._answers.queue)
