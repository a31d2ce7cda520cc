"""Requests through vLLM's engine: `add_request` and `step`, for closed sets, single requests and traffic.

Nothing here imports the engine. What is called is the engine's own interface, the two calls that `LLM.generate` makes.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lem.backends.protocol import Completion, OnProgress, RequestQueue, TokenRequest
from lem.backends.refusals import shortened
from lem.backends.session_backend import GOOD_ENDS, TAKE_LIMIT
from lem.errors import EngineError
from lem.units import NS_PER_S

__all__ = ["Engine", "RequestForms", "StepLoop"]


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
    """Runs requests through an engine.

    Args:
        is_concurrent: the engine works in a process of its own and takes requests while it makes a step. Then a thread
            hands traffic over as it arrives; between steps alone, each request would wait one step more than it has to.
            `add_request` and `step` may run at the same time: they share nothing but tables of requests by their id
            and, one each, the two ends of the connection.
    """

    def __init__(
        self,
        engine: Engine,
        forms: RequestForms,
        *,
        is_concurrent: bool,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._engine = engine
        self._forms = forms
        self._is_concurrent = is_concurrent
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

    def serve(self, queue: RequestQueue, *, is_salted: bool) -> None:
        """Work a queue off until it is closed and empty.

        Args:
            is_salted: a prompt that comes again is not found in the prefix cache.
        """
        desk = _Desk(queue, is_salted)
        thread = threading.Thread(target=self._take_in, args=(desk,), name="requests", daemon=True)
        thread.start()
        while desk.has_work():
            for request in desk.collect():
                self._enter(request, desk)
            for completion in self._step():
                desk.leave()
                queue.complete(completion)
        if desk.failure is not None:
            raise desk.failure
        thread.join()

    def _take_in(self, desk: _Desk) -> None:
        """Fetch requests as they arrive, in a thread of its own."""
        try:
            while arrived := desk.queue.take(TAKE_LIMIT):
                if not self._is_concurrent:
                    desk.put(arrived)
                    continue
                for request in arrived:
                    self._enter(request, desk)
        except Exception as error:  # noqa: BLE001 - the top of a thread: the loop raises it
            desk.failure = error
        finally:
            desk.close()

    def _enter(self, request: TokenRequest, desk: _Desk) -> None:
        failed = self._add(request, is_observed=True, salt=desk.salt_of(request))
        if self._is_concurrent and failed is None:
            desk.enter()
        if failed is not None:
            if not self._is_concurrent:
                desk.leave()
            desk.queue.complete(failed)

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
        self._streams[name] = _Stream(request, now_ns, is_observed)
        try:
            self._engine.add_request(
                name,
                forms.prompt(request.token_ids, salt),
                forms.parameters(request, is_observed=is_observed),
                lora_request=forms.adapter,
            )
        except forms.rejections as error:
            del self._streams[name]
            return Completion(request.index, (), now_ns, self._clock(), error=shortened(error))
        return None

    def _step(self) -> list[Completion]:
        outputs = self._engine.step()
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


class _Desk:
    """Between the thread that takes requests in and the one that makes steps; counts what is under way."""

    def __init__(self, queue: RequestQueue, is_salted: bool) -> None:
        self.queue = queue
        self.failure: Exception | None = None
        self._changed = threading.Condition()
        self._inbox: deque[TokenRequest] = deque()
        self._under_way = 0
        self._is_closed = False
        self._occurrences: Counter[tuple[int, ...]] | None = Counter() if is_salted else None

    def has_work(self) -> bool:
        """Wait until a step has something to do; False once nothing more will come, or taking in has failed."""
        with self._changed:
            while self._under_way <= 0 and not self._is_closed:
                self._changed.wait()
            return self._under_way > 0 and self.failure is None

    def put(self, requests: Sequence[TokenRequest]) -> None:
        """Keep requests until the next step."""
        with self._changed:
            self._inbox.extend(requests)
            self._under_way += len(requests)
            self._changed.notify()

    def collect(self) -> list[TokenRequest]:
        """The requests that were kept."""
        with self._changed:
            kept = list(self._inbox)
            self._inbox.clear()
            return kept

    def enter(self) -> None:
        """The engine has one request more; it may have answered it already."""
        with self._changed:
            self._under_way += 1
            self._changed.notify()

    def leave(self) -> None:
        """The engine has one less."""
        with self._changed:
            self._under_way -= 1

    def close(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def salt_of(self, request: TokenRequest) -> str | None:
        """None for a prompt that is new; then another one each time it comes again."""
        if self._occurrences is None:
            return None
        self._occurrences[request.token_ids] += 1
        times = self._occurrences[request.token_ids]
        return None if times == 1 else str(times)
