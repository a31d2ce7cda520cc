"""The `LLM` of the double."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

from tensorrt_llm.llmapi import SamplingParams, TorchLlmArgs

FAILS_AT_THE_DOOR, FAILS_ON_THE_WAY, CANCELLED, IN_PAIRS, OF_ANOTHER_CLOCK, BREAKS_THE_ENGINE = range(900, 906)


class RequestError(RuntimeError):
    """As the real one calls what happens to a single request."""


class Tokenizer:
    """A token for each byte, after one that begins every text."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [*([1] if add_special_tokens else []), *(byte + 3 for byte in text.encode())]

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return bytes(token - 3 for token in ids if token >= 3 or not skip_special_tokens).decode()


class Answer:
    """What becomes of a request; it can be waited for once, or iterated over in an event loop."""

    def __init__(self, token_ids: list[int], parameters: SamplingParams, *, streaming: bool) -> None:
        self._first_id = token_ids[0]
        self._parameters: Any = parameters
        self._streaming = streaming
        self._scheduled_s = time.monotonic()
        reason = "cancelled" if self._first_id == CANCELLED else "length"
        self.outputs = [SimpleNamespace(token_ids=[], finish_reason=None, request_perf_metrics=None)]
        self._reason = reason

    def result(self) -> Answer:
        assert not self._streaming
        for _ in self._parts():
            pass
        return self

    async def __aiter__(self) -> AsyncIterator[Answer]:
        assert self._streaming
        for part in self._parts():
            await asyncio.sleep(0)
            yield part

    def _parts(self) -> Iterator[Answer]:
        output, size = self.outputs[0], 2 if self._first_id == IN_PAIRS else 1
        while len(output.token_ids) < self._parameters.max_tokens:
            if self._first_id == FAILS_ON_THE_WAY:
                raise RequestError("no memory for\nthis request")
            if self._first_id == BREAKS_THE_ENGINE:
                raise AssertionError("a check of its own")
            room = self._parameters.max_tokens - len(output.token_ids)
            start = self._first_id + 1 + len(output.token_ids)
            output.token_ids += range(start, start + min(size, room))
            if len(output.token_ids) == self._parameters.max_tokens:
                output.finish_reason = self._reason
                output.request_perf_metrics = self._metrics()
            yield self

    def _metrics(self) -> SimpleNamespace | None:
        if not self._parameters.return_perf_metrics:
            return None
        offset_s = 1e6 if self._first_id == OF_ANOTHER_CLOCK else 0.0
        times = {"first_scheduled_time": self._scheduled_s + offset_s, "last_token_time": time.monotonic() + offset_s}
        return SimpleNamespace(
            timing_metrics=SimpleNamespace(**{name: timedelta(seconds=value) for name, value in times.items()})
        )


class LLM:
    """Keeps what it was made of, and whether it was ended."""

    made: ClassVar[list[LLM]] = []

    def __init__(self, **arguments: Any) -> None:
        self.args: Any = TorchLlmArgs(**arguments)
        self.tokenizer = Tokenizer()
        self.requests: list[tuple[list[int], Any, bool]] = []
        self.answers: list[Answer] = []
        self.is_shut_down = False
        LLM.made.append(self)

    def generate_async(
        self, inputs: dict[str, Any], sampling_params: SamplingParams, *, streaming: bool = False
    ) -> Answer:
        token_ids = inputs["prompt_token_ids"]
        assert isinstance(token_ids, list)
        self.requests.append((token_ids, sampling_params, streaming))
        if token_ids[0] == FAILS_AT_THE_DOOR:
            raise ValueError("this request is\ntoo long")
        self.answers.append(Answer(token_ids, sampling_params, streaming=streaming))
        return self.answers[-1]

    def shutdown(self) -> None:
        self.is_shut_down = True
