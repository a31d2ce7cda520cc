"""Synthetic prompts: made-up text of chosen lengths, the same for the same seed on every machine and Python.

Only `random.Random.random()` is used, the one method whose sequence Python promises to keep for a seed; choices,
shuffles and normal values are made from it here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lem.config.experiment_config import BUNDLED_DISTRIBUTION, BUNDLED_INPUT_TOKENS, BUNDLED_SAMPLE_SIZE, BUNDLED_SEED

__all__ = ["BUNDLED", "SyntheticPlan", "SyntheticPrompt", "generate", "shuffled"]

_T = TypeVar("_T")

# Half the chosen length to one and a half times it.
UNIFORM_SPREAD = 0.5
# Of the logarithm; request lengths of deployed services spread at least as much. Cut at four times the chosen length.
LOGNORMAL_SIGMA = 0.5
LOGNORMAL_CUT = 4.0

# Everyday words, so that a tokenizer trained on text needs one token or more for each: a text of n words has n tokens.
_WORDS = (
    "the a one some each this that these those any of in on at by for from with about into over under after before "
    "between through during and or but because while if when where how why river mountain village harbour winter "
    "summer morning evening teacher farmer engineer doctor sailor painter child neighbour bridge window garden kitchen "
    "market station library machine engine letter number story question answer reason method result table paper "
    "colour sound light water stone metal glass bread apple horse bird fish tree leaf root seed cloud storm wind snow "
    "small large quick slow early late quiet loud bright dark heavy empty simple common careful patient open close "
    "carry build write read count measure compare explain describe follow return begin finish change keep find lose "
    "travel work speak listen remember learn teach grow fall rise turn hold bring send show "
    "is was has had will would could should may must often never always almost perhaps however therefore again"
)
WORDS = tuple(_WORDS.split())
SENTENCE_MIN_WORDS = 6
SENTENCE_MAX_WORDS = 14


@dataclass(frozen=True)
class SyntheticPlan:
    """What to make.

    Attributes:
        input_tokens, output_tokens: lengths to spread around; no output length takes the experiment's own.
        sample_size: how many prompts.
        seed: of all that is random here.
        distribution: `fixed`; `uniform` over half to one and a half the length; `lognormal` with that mean.
    """

    input_tokens: int
    output_tokens: int | None
    sample_size: int
    seed: int
    distribution: str = "fixed"


@dataclass(frozen=True)
class SyntheticPrompt:
    """A made-up prompt with its lengths in tokens; the text has at least as many words."""

    text: str
    input_tokens: int
    output_tokens: int | None


# What is measured when neither dataset nor prompts is given.
BUNDLED = SyntheticPlan(BUNDLED_INPUT_TOKENS, None, BUNDLED_SAMPLE_SIZE, BUNDLED_SEED, BUNDLED_DISTRIBUTION)


def generate(plan: SyntheticPlan) -> tuple[SyntheticPrompt, ...]:
    """The prompts of a plan, no two alike."""
    rng = random.Random(plan.seed)
    made: list[SyntheticPrompt] = []
    for index in range(plan.sample_size):
        length = _draw_length(plan.input_tokens, plan.distribution, rng)
        output = None if plan.output_tokens is None else _draw_length(plan.output_tokens, plan.distribution, rng)
        made.append(SyntheticPrompt(_text(index, length, rng), length, output))
    return tuple(made)


def shuffled(items: Sequence[_T], seed: int | None) -> list[_T]:
    """The items in another order (Fisher and Yates), the same for the same seed; without one any order."""
    rng = random.Random(seed)
    out = list(items)
    for last in range(len(out) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        out[last], out[other] = out[other], out[last]
    return out


def _draw_length(length: int, distribution: str, rng: random.Random) -> int:
    if distribution == "uniform":
        low, high = max(1, math.ceil(length * (1 - UNIFORM_SPREAD))), math.floor(length * (1 + UNIFORM_SPREAD))
        return low + int(rng.random() * (high - low + 1))
    if distribution == "lognormal":
        # The mean of a lognormal is exp(mu + sigma^2 / 2); a normal value by Box and Muller (1958).
        normal = math.sqrt(-2 * math.log(1 - rng.random())) * math.cos(2 * math.pi * rng.random())
        drawn = math.exp(math.log(length) - LOGNORMAL_SIGMA**2 / 2 + LOGNORMAL_SIGMA * normal)
        return max(1, min(round(drawn), math.floor(LOGNORMAL_CUT * length)))
    return length


def _text(index: int, words: int, rng: random.Random) -> str:
    # The number makes every prompt another one from its first token on, so that no two share a cached prefix.
    pieces = [f"{index + 1}."]
    while len(pieces) <= words:
        count = SENTENCE_MIN_WORDS + int(rng.random() * (SENTENCE_MAX_WORDS - SENTENCE_MIN_WORDS + 1))
        sentence = [WORDS[int(rng.random() * len(WORDS))] for _ in range(count)]
        sentence[0] = sentence[0].capitalize()
        sentence[-1] += "."
        pieces.extend(sentence)
    return " ".join(pieces)
