"""Requests through TensorRT-LLM's `LLM.generate_async`: closed sets, single requests and traffic.

Nothing here imports the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

from lem.backends.protocol import Completion, OnProgress, RequestQueue, TokenRequest
from lem.backends.refusals import EngineRaised, shortened
from lem.backends.session_backend import GOOD_ENDS, TAKE_LIMIT
from lem.units import NS_PER_US

__all__ = ["FAILURES", "Engine", "Server"]


# What `generate_async` and its results raise over one request: RequestError is a RuntimeError.
_REJECTIONS = (RuntimeError, TypeError, ValueError)
# What any of its calls raises.
FAILURES = (AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, *_REJECTIONS)


class Engine(Protocol):
    """What is called of TensorRT-LLM's LLM."""

    def generate_async(self, inputs: Any, sampling_params: Any = None, *, streaming: bool = False) -> Any:
        """Hand a request over; the answer can be waited for, or iterated over as it grows."""


class Server:
    """Runs requests through an engine.

    Args:
        parameters: the SamplingParams of a request; raises EngineRaised where the engine refuses them.
        longest: the most tokens of a prompt, and of prompt and output together.
    """

    def __init__(
        self,
        engine: Engine,
        parameters: Callable[[TokenRequest], Any],
        *,
        longest: tuple[int, int],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._engine = engine
        self._parameters = parameters
        self._longest_input, self._longest = longest
        self._clock = clock

    def run_closed(self, requests: Sequence[TokenRequest], on_progress: OnProgress) -> list[Completion]:
        """A completion for each request, all handed over at once: the two calls that `LLM.generate` makes for each."""
        handed = [(request, self._clock(), self._hand_over(request, streaming=False)) for request in requests]
        completions = []
        for request, handed_ns, answer in handed:
            completions.append(self._wait_for(request, handed_ns, answer))
            on_progress(len(completions))
        return completions

    def run_alone(self, requests: Sequence[TokenRequest], on_progress: OnProgress) -> list[Completion]:
        """A completion for each request, one after another, with the times of its tokens."""
        completions = []
        for request in requests:
            handed_ns, answer = self._clock(), self._hand_over(request, streaming=True)
            completions.append(self._follow_alone(request, handed_ns, answer))
            on_progress(len(completions))
        return completions

    def serve(self, queue: RequestQueue) -> None:
        """Work a queue off until it is closed and empty; requests join while others run."""
        asyncio.run(self._serve(queue))

    async def _serve(self, queue: RequestQueue) -> None:
        loop = asyncio.get_running_loop()
        arrivals: asyncio.Queue[Sequence[TokenRequest] | BaseException | None] = asyncio.Queue()
        tasks: set[asyncio.Task[None]] = set()

        def settle(task: asyncio.Task[None]) -> None:
            if task.cancelled() or (error := task.exception()) is None:
                tasks.discard(task)
            else:
                arrivals.put_nowait(error)

        def tell(found: Sequence[TokenRequest] | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # serving has failed, and its loop is closed
                loop.call_soon_threadsafe(arrivals.put_nowait, found)

        def take_in() -> None:
            """Fetch requests as they arrive, in a thread of its own."""
            try:
                while arrived := queue.take(TAKE_LIMIT):
                    tell(arrived)
            except Exception as error:  # noqa: BLE001 - the top of a thread: the loop raises it
                tell(error)
            else:
                tell(None)

        threading.Thread(target=take_in, name="requests", daemon=True).start()
        while isinstance(arrived := await arrivals.get(), Sequence):
            for request in arrived:
                task = asyncio.create_task(self._answer(queue, request))
                tasks.add(task)
                task.add_done_callback(settle)
        if arrived is not None:
            raise arrived
        await asyncio.gather(*tasks)

    async def _answer(self, queue: RequestQueue, request: TokenRequest) -> None:
        handed_ns, answer = self._clock(), self._hand_over(request, streaming=True)
        times_ns: list[int] = []
        parts = None if isinstance(answer, str) else aiter(answer)
        while parts is not None:
            try:
                part = await anext(parts)
            except StopAsyncIteration:
                break
            except FAILURES as error:
                answer = _words_of(error)
                break
            self._note(part, times_ns)
        queue.complete(self._complete(request, handed_ns, answer, times_ns))

    def _follow_alone(self, request: TokenRequest, handed_ns: int, answer: Any) -> Completion:
        times_ns: list[int] = []
        parts = None if isinstance(answer, str) else iter(answer)
        while parts is not None:
            try:
                part = next(parts)
            except StopIteration:
                break
            except FAILURES as error:
                answer = _words_of(error)
                break
            self._note(part, times_ns)
        return self._complete(request, handed_ns, answer, times_ns)

    def _wait_for(self, request: TokenRequest, handed_ns: int, answer: Any) -> Completion:
        if not isinstance(answer, str):
            try:
                answer = answer.result()
            except FAILURES as error:
                answer = _words_of(error)
        return self._complete(request, handed_ns, answer, None)

    def _hand_over(self, request: TokenRequest, *, streaming: bool) -> Any:
        """The answer to wait for; words when the request has failed already.

        Raises:
            EngineRaised: the engine failed.
        """
        prompt_tok, output_tok = len(request.token_ids), request.max_output_tokens
        if prompt_tok > self._longest_input or prompt_tok + output_tok > self._longest:
            return (
                f"{prompt_tok} tokens of prompt and {output_tok} of output are more than the engine is set up for "
                f"(tensorrt.max_input_len {self._longest_input}, both together {self._longest})"
            )
        inputs = {"prompt_token_ids": list(request.token_ids)}
        try:
            parameters = self._parameters(request)
        except EngineRaised as raised:
            return _words_of(raised.error)
        try:
            return self._engine.generate_async(inputs, parameters, streaming=streaming)
        except FAILURES as error:
            return _words_of(error)

    def _note(self, part: Any, times_ns: list[int]) -> None:
        """Give each token that a part of an answer brought the time at which it is here: one, several, or none."""
        now_ns = self._clock()
        times_ns += [now_ns] * (len(part.outputs[0].token_ids) - len(times_ns))

    def _complete(self, request: TokenRequest, handed_ns: int, answer: Any, times_ns: list[int] | None) -> Completion:
        now_ns = self._clock()
        if isinstance(answer, str):
            return Completion(request.index, (), handed_ns, now_ns, error=answer)
        output = answer.outputs[0]
        started_ns, last_ns = _span(output, handed_ns, now_ns)
        finished_ns = last_ns if times_ns is None else times_ns[-1] if times_ns else now_ns
        is_good = output.finish_reason in GOOD_ENDS
        return Completion(
            request.index,
            tuple(output.token_ids),
            min(started_ns, finished_ns),
            finished_ns,
            None if times_ns is None else tuple(times_ns),
            error=None if is_good else f"TensorRT-LLM ended the request with {output.finish_reason!r}",
            padding_tok=0,
        )


def _words_of(error: BaseException) -> str:
    """What the engine says against one request.

    Raises:
        EngineRaised: it is about more than a request.
    """
    if isinstance(error, _REJECTIONS):
        return shortened(error)
    raise EngineRaised(error) from error


def _span(output: Any, handed_ns: int, now_ns: int) -> tuple[int, int]:
    """When the engine took a request up and had its last token.

    The engine's metrics count from the start of std::chrono::steady_clock, which is CLOCK_MONOTONIC on Linux. Values
    outside of the request's life are of another clock, and are not used.
    """
    timing = getattr(getattr(output, "request_perf_metrics", None), "timing_metrics", None)

    def read(name: str, otherwise_ns: int) -> int:
        value = getattr(timing, name, None)
        if not isinstance(value, timedelta):
            return otherwise_ns
        found_ns = (value // timedelta(microseconds=1)) * NS_PER_US
        # They are cut to microseconds.
        return max(found_ns, handed_ns) if handed_ns - NS_PER_US <= found_ns <= now_ns else otherwise_ns

    return read("first_scheduled_time", handed_ns), read("last_token_time", now_ns)
