"""A clock that only moves when told, and an engine that moves it: every figure can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from lem.base.clock import Clock
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import Completion, EngineReport, OnProgress, RequestQueue, TokenRequest, say_nothing

START_UTC = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=timezone.utc)
BEGIN_OF_TEXT = 1
NS_PER_MS = 1_000_000


class SteppedClock(Clock):
    """Stands still between `sleep` and `advance`."""

    def __init__(self, start_ns: int = 1_000_000_000) -> None:
        self.start_ns = start_ns
        self.now_ns = start_ns

    def monotonic_ns(self) -> int:
        return self.now_ns

    def utc_now(self) -> datetime:
        return START_UTC + timedelta(microseconds=(self.now_ns - self.start_ns) / 1000)

    def sleep(self, duration_s: float) -> None:
        assert duration_s > 0, "a wait for what is there already would never end"
        self.now_ns += round(duration_s * 1e9)

    def advance_ms(self, duration_ms: float) -> None:
        self.now_ns += round(duration_ms * NS_PER_MS)


@dataclass
class TimedBackend:
    """Runs batches of `width`: a prefill, then a step for each token of the longest answer.

    Attributes:
        output_of: how many tokens it answers to a request; None takes the bound.
        fails: whether it fails a request.
        is_counting_only: whether it gives the number of tokens instead of their ids.
        slow_down: told how many batches were run, the factor on all times.
        calls: what was called, in order.
    """

    clock: SteppedClock
    width: int = 2
    prefill_ms: float = 10.0
    token_ms: float = 1.0
    is_timing_tokens: bool = True
    is_counting_only: bool = False
    output_of: Callable[[TokenRequest], int] | None = None
    fails: Callable[[TokenRequest], bool] = lambda _: False
    slow_down: Callable[[int], float] = lambda _: 1.0
    report: EngineReport = field(
        default_factory=lambda: EngineReport(
            engine_name="timed",
            engine_version="1.2",
            versions={"timed": "1.2"},
            device="cpu",
            model_parameters=1000,
            embedding_parameters=400,
            active_parameters=1000,
        )
    )
    memory_b: int | None = None
    calls: list[str] = field(default_factory=list)
    batches: list[tuple[TokenRequest, ...]] = field(default_factory=list)
    vocabulary: dict[str, int] = field(default_factory=dict)

    def load(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> TimedBackend:
        self.calls.append("load")
        self.clock.advance_ms(3000)
        return self

    def configure(self, config: ExperimentConfig) -> None:
        self.calls.append("configure")

    def encode(self, text: str, *, is_whole: bool = True) -> list[int]:
        words, begin = text.split(), [BEGIN_OF_TEXT] if is_whole else []
        return [*begin, *(self.vocabulary.setdefault(word, len(self.vocabulary) + 2) for word in words)]

    def chat_template(self, given: str | None, *, has_tools: bool) -> str:
        return given or f"the model's own, tools {has_tools}"

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], template: str
    ) -> tuple[str, str, str]:
        texts = [str(item["content"]) for item in messages]
        return " ".join(["system", *texts[:-1], ""]), texts[-1], " answer"

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(f"t{token}" for token in token_ids)

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        self.calls.append("generate")
        width = 1 if observe_tokens else self.width
        out: list[Completion] = []
        for begin in range(0, len(requests), width):
            out += self._run(tuple(requests[begin : begin + width]), is_timed=observe_tokens)
            on_progress(len(out))
        return out

    def serve(self, queue: RequestQueue) -> None:
        self.calls.append("serve")
        while requests := queue.take(self.width):
            for completion in self._run(requests, is_timed=self.is_timing_tokens):
                queue.complete(completion)

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def reset_peak_memory(self) -> None:
        self.calls.append("reset_peak_memory")

    def peak_memory_b(self) -> int | None:
        return self.memory_b

    def close(self) -> None:
        self.calls.append("close")

    def _run(self, batch: tuple[TokenRequest, ...], *, is_timed: bool) -> list[Completion]:
        factor = self.slow_down(len(self.batches))
        self.batches.append(batch)
        started_ns = self.clock.monotonic_ns()
        lengths = [self._length(request) for request in batch]
        self.clock.advance_ms(self.prefill_ms * factor)
        stamps = []
        for _ in range(max(lengths)):
            self.clock.advance_ms(self.token_ms * factor)
            stamps.append(self.clock.monotonic_ns())
        finished_ns = self.clock.monotonic_ns()
        return [
            Completion(
                index=request.index,
                output_ids=() if self.fails(request) or self.is_counting_only else tuple(range(100, 100 + length)),
                counted_tok=length if self.is_counting_only else None,
                started_ns=started_ns,
                finished_ns=finished_ns,
                token_times_ns=tuple(stamps[:length]) if is_timed and not self.fails(request) else None,
                error="scripted failure" if self.fails(request) else None,
            )
            for request, length in zip(batch, lengths, strict=True)
        ]

    def _length(self, request: TokenRequest) -> int:
        return request.max_output_tokens if self.output_of is None else self.output_of(request)


def make_requests(count: int, input_tok: int = 3, output_tok: int = 4) -> list[TokenRequest]:
    return [TokenRequest(index, (index + 10, *range(50, 49 + input_tok)), output_tok) for index in range(count)]
