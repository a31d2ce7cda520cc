"""Prompts as token ids: every engine is handed ids, so that tokenising is never measured."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lem.base.errors import EngineError
from lem.base.reasons import Reason
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import TokenRequest
from lem.worker.prompts import Prompt

MAX_DRAWS = 8


@dataclass(frozen=True)
class EncodedPrompts:
    """The measured requests, in the order of their prompts.

    Attributes:
        truncated: how many prompts were cut to `max_input_tokens`.
        bounded: how many prompts asked for more output than `max_output_tokens`.
    """

    requests: tuple[TokenRequest, ...]
    truncated: int
    bounded: int
    warnings: tuple[Reason, ...] = ()


def encode_prompts(
    prompts: Sequence[Prompt], encode: Callable[[str], Sequence[int]], config: ExperimentConfig
) -> EncodedPrompts:
    """The requests of an experiment.

    A prompt with `input_tokens` gets exactly that many ids: cut, or extended by cycling its own (a leading id that all
    texts share, such as a begin-of-sequence token, is not cycled). None gets more than `max_input_tokens`.

    Raises:
        EngineError: kind `prompts`, a prompt of which the tokenizer makes nothing.
    """
    leader = _common_leader(encode)
    requests: list[TokenRequest] = []
    truncated = bounded = 0
    for index, prompt in enumerate(prompts):
        ids = tuple(encode(prompt.prompt))
        if not ids:
            raise EngineError(
                f"prompt {index + 1} has no tokens: {prompt.prompt[:60]!r}",
                "the model's tokenizer makes nothing of it; take it out",
                kind="prompts",
                is_permanent=True,
            )
        if prompt.input_tokens is not None:
            ids = _fit(ids, prompt.input_tokens, leader)
        if len(ids) > config.max_input_tokens:
            truncated += 1
            ids = ids[: config.max_input_tokens]
        wanted = config.max_output_tokens if prompt.output_tokens is None else prompt.output_tokens
        bounded += wanted > config.max_output_tokens
        most = min(wanted, config.max_output_tokens)
        requests.append(TokenRequest(index, ids, most, min(config.min_output_tokens, most)))
    return EncodedPrompts(tuple(requests), truncated, bounded, _warnings(len(prompts), truncated, bounded, config))


class DisjointRequests:
    """Requests of the same shapes as given ones with other ids, for warm-up; as many as are asked for.

    A shape is a length in tokens with the bounds on the output. The ids are drawn from all the given prompts, so that
    they are ids the model knows; a leading id that all prompts share is kept. They share no longer prefix than chance
    gives, so warm-up leaves nothing in a prefix cache that the measured prompts would find.

    Attributes:
        is_disjoint: every request made so far differs from every given one.
    """

    def __init__(self, requests: Sequence[TokenRequest], seed: int) -> None:
        self.is_disjoint = True
        self._shapes = tuple(requests)
        self._rng = random.Random(seed)
        self._measured = frozenset(request.token_ids for request in requests)
        self._made: set[tuple[int, ...]] = set()
        self._count = 0
        self._place = 0
        has_leader = len({request.token_ids[0] for request in requests}) == 1 and len(requests) > 1
        self._leader = 1 if has_leader and all(len(request.token_ids) > 1 for request in requests) else 0
        self._pool = [token for request in requests for token in request.token_ids[self._leader :]]

    def take(self, count: int) -> list[TokenRequest]:
        """Requests of the given shapes in their order, going on where the last call stopped, over and over."""
        shapes = [self._shapes[(self._place + step) % len(self._shapes)] for step in range(count)]
        self._place += count
        return [self._make(shape) for shape in shapes]

    def take_typical(self, count: int) -> list[TokenRequest]:
        """Requests whose shapes are spread evenly over the given ones by length: the same shapes at every call."""
        return [self._make(shape) for shape in self._typical(count)]

    def is_typical(self, requests: Sequence[TokenRequest]) -> bool:
        """Whether requests have the shapes that `take_typical` gives for as many."""
        return sorted(map(_shape_of, requests)) == [_shape_of(shape) for shape in self._typical(len(requests))]

    def _typical(self, count: int) -> list[TokenRequest]:
        ordered = sorted(self._shapes, key=_shape_of)
        return [ordered[(2 * step + 1) * len(ordered) // (2 * count)] for step in range(count)]

    def _make(self, shape: TokenRequest) -> TokenRequest:
        ids = self._other_ids(shape.token_ids)
        self.is_disjoint = self.is_disjoint and ids not in self._measured
        self._made.add(ids)
        request = replace(shape, index=self._count, token_ids=ids)
        self._count += 1
        return request

    def _other_ids(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        drawn = ids
        for _ in range(MAX_DRAWS):
            drawn = ids[: self._leader] + tuple(self._draw() for _ in ids[self._leader :])
            if drawn not in self._measured and drawn not in self._made:
                return drawn
        # Prompts of hardly any variety: any id up to the largest seen in the last place.
        choices = ((*ids[:-1], token) for token in range(max(self._pool) + 1))
        return next((choice for choice in choices if choice not in self._measured), drawn)

    def _draw(self) -> int:
        return self._pool[int(self._rng.random() * len(self._pool))]


def _shape_of(request: TokenRequest) -> tuple[int, int, int]:
    return len(request.token_ids), request.max_output_tokens, request.min_output_tokens


def _common_leader(encode: Callable[[str], Sequence[int]]) -> int:
    """How many ids a tokenizer puts before every text (0 or 1)."""
    one, other = encode("a"), encode("the")
    return int(len(one) > 1 and len(other) > 1 and one[0] == other[0])


def _fit(ids: tuple[int, ...], length: int, leader: int) -> tuple[int, ...]:
    if len(ids) >= length:
        return ids[:length]
    body = ids[leader:] or ids
    missing = length - len(ids)
    return ids + (body * (missing // len(body) + 1))[:missing]


def _warnings(count: int, truncated: int, bounded: int, config: ExperimentConfig) -> tuple[Reason, ...]:
    warnings = []
    if truncated:
        warnings.append(Reason.of("prompts_cut", cut=truncated, total=count, limit=config.max_input_tokens))
    if bounded:
        warnings.append(Reason.of("outputs_bounded", bounded=bounded, total=count, limit=config.max_output_tokens))
    return tuple(warnings)
