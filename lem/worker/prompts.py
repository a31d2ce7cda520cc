"""Prompts: files, synthetic text, and how they are chosen."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.base import durable
from lem.base.errors import ConfigurationError
from lem.base.reasons import Reason
from lem.base.units import MIB
from lem.config import experiment
from lem.config.experiment import ExperimentConfig, FilePrompts, HuggingFacePrompts, SyntheticPrompts
from lem.record import PROMPTS_FILE

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
class Prompt:
    prompt: str
    input_tokens: int | None = None  # exact length in tokens to cut or extend it to; None leaves it as it is
    output_tokens: int | None = None  # bound on the tokens to generate for it; None takes the experiment's


# What is measured when neither dataset nor prompts is given.
BUNDLED = SyntheticPrompts(distribution=experiment.BUNDLED_DISTRIBUTION)


def seed_of_draw(seed: int, draw: int) -> int | str:
    """The seed of a `random.Random` for one of many draws: of prompts or arrivals, one for each cycle.

    The first draw is that of builds that drew once for all cycles. A seed of text is hashed with SHA-512, the same on
    every Python and machine.
    """
    return seed if draw == 0 else f"{seed}/{draw}"


def generate(plan: SyntheticPrompts, draw: int = 0) -> tuple[Prompt, ...]:
    """Made-up prompts, no two alike, of which each has its length in tokens and at least as many words."""
    rng = random.Random(seed_of_draw(plan.seed, draw))
    made: list[Prompt] = []
    for index in range(plan.sample_size):
        length = _draw_length(plan.input_tokens, plan.distribution, rng)
        output = None if plan.output_tokens is None else _draw_length(plan.output_tokens, plan.distribution, rng)
        made.append(Prompt(_text(index, length, rng), length, output))
    return tuple(made)


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


MAX_LISTED_PROBLEMS = 10
# A file above this is a data set put in by mistake; prompts are held in memory, on the host too.
MAX_FILE_B = 256 * MIB


class PromptError(ConfigurationError):
    """Prompts that cannot be used."""


@dataclass(frozen=True)
class ResolvedPrompts:
    prompts: tuple[Prompt, ...]
    source: Mapping[str, Any]  # for the record: kind, path or name, revision, sha256, count, and what chose them
    warnings: tuple[Reason, ...] = ()


def resolve_on_host(config: ExperimentConfig, folder: Path | None = None, *, draw: int = 0) -> ResolvedPrompts | None:
    """The prompts of an experiment; None for a data set, which needs a hub or the `datasets` package.

    Those in the `prompts.jsonl` of `folder`, a result folder, are taken as they are; others are made anew for each
    `draw`. Without `dataset` and `prompts` it
    is the bundled synthetic set, and the source says so. Where a file holds fewer than `sample_size`, all of them are
    taken and a warning says so: a repeated prompt would meet a warm prefix cache. Raises PromptError: a file that
    cannot be read or holds no usable prompts.
    """
    chosen = config.prompts
    if config.dataset is not None or isinstance(chosen, HuggingFacePrompts):
        return None
    given = None if folder is None else folder / PROMPTS_FILE
    kind, plan = ("synthetic", chosen) if isinstance(chosen, SyntheticPrompts) else ("bundled", BUNDLED)
    if given is not None and given.is_file():
        prompts = read_prompt_file(given)
    elif isinstance(chosen, FilePrompts):
        prompts = read_prompt_file(Path(chosen.path))[: chosen.sample_size]
    else:
        prompts = generate(plan, draw)
    contents = {"revision": None, "sha256": fingerprint(prompts), "count": len(prompts)}
    if isinstance(chosen, FilePrompts):
        path, wanted = str(chosen.path), chosen.sample_size or 0
        too_few = Reason.of("prompt_file_too_small", path=path, wanted=wanted, found=len(prompts))
        source = {"kind": "file", "path": path, **contents}
        return ResolvedPrompts(prompts, source, (too_few,) if len(prompts) < wanted else ())
    parameters = {name: getattr(plan, name) for name in ("input_tokens", "output_tokens", "distribution", "seed")}
    return ResolvedPrompts(prompts, {"kind": kind, "name": kind, **contents, **parameters})


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """SHA-256 over the contents of prompts in their order, whatever file and format they came from."""
    return hashlib.sha256(b"".join(map(_line, prompts))).hexdigest()


def write_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Write `prompts.jsonl` into a result folder, whole or not at all. Raises OSError: as `durable.write_bytes`."""
    durable.write_bytes(folder / PROMPTS_FILE, b"".join(map(_line, prompts)))


def read_prompt_file(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a text file, one a line, or of a `.jsonl` file.

    A line of `.jsonl` is an object with `prompt`, or with `messages` (or ShareGPT's `conversations`), and may bound its
    own `input_tokens` and `output_tokens`; a JSON string is a prompt too. Raises PromptError: no such file, not UTF-8,
    empty, or lines that are blank or malformed, each with its number.
    """
    lines = _read_text(path).split("\n")
    if lines[-1] == "":
        del lines[-1]
    if not lines:
        raise PromptError(f"{path}: the file is empty", "write one prompt per line")
    is_json = path.suffix.lower() in (".jsonl", ".ndjson")
    prompts: list[Prompt] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(_parse_json_line(line) if is_json else Prompt(_some_text(line, "line")))
        except ValueError as error:  # noqa: PERF203 (every bad line is named)
            problems.append(f"{path}:{number}: {error}")
    if problems:
        if len(problems) > MAX_LISTED_PROBLEMS:
            problems[MAX_LISTED_PROBLEMS:] = [f"and {len(problems) - MAX_LISTED_PROBLEMS} more lines"]
        raise PromptError("\n".join(problems), "each line must hold one prompt; fix or delete these lines")
    return tuple(prompts)


def text_of_record(record: Any) -> str:
    """The prompt in an object with `prompt`, `messages` or `conversations`, or in a plain string.

    Messages are joined in their order up to the last turn of the user, blank lines between them: no chat template is
    applied, since it would be another one for every model. Of `conversations` (ShareGPT) it is the first human turn.
    Raises ValueError: there is no text in it; the message says what was due.
    """
    if isinstance(record, str):
        return _some_text(record, "prompt")
    if not isinstance(record, Mapping):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    if "prompt" in record:
        return _some_text(record["prompt"], "prompt")
    if "messages" in record:
        return _text_of_messages(record["messages"])
    if "conversations" not in record:
        raise ValueError("expected 'prompt' or 'messages'")
    turns = record["conversations"]
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, Mapping) and turn.get("from", turn.get("role")) in ("human", "user"):
            return _some_text(turn.get("value", turn.get("content")), "first human turn")
    raise ValueError("conversations: no human turn")


def _read_text(path: Path) -> str:
    try:
        with durable.open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_FILE_B:
                raise PromptError(f"{path}: {size} bytes; the limit for prompts is {MAX_FILE_B}")
            data = stream.read()
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror}", "check prompts.path") from error
    try:
        # A byte order mark and Windows line ends are how an editor saved the file, not part of a prompt.
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{path}:{line}: not UTF-8", "save the file as UTF-8 text") from error


def _parse_json_line(line: str) -> Prompt:
    if not line.strip():
        raise ValueError("the line is blank")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    bounds = record if isinstance(record, dict) else {}
    return Prompt(text_of_record(record), _bound(bounds, "input_tokens"), _bound(bounds, "output_tokens"))


def _bound(record: Mapping[str, Any], key: str) -> int | None:
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key}: expected an integer of at least 1, got {value!r}")
    return value


def _some_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what}: expected text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"the {what} is blank")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"the {what} contains half of a surrogate pair")
    return value


def _text_of_messages(messages: Any) -> str:
    if not isinstance(messages, list) or not messages or not all(isinstance(item, Mapping) for item in messages):
        raise ValueError("messages: expected a list of objects with role and content")
    last_user = max((index for index, item in enumerate(messages) if item.get("role") == "user"), default=None)
    if last_user is None:
        raise ValueError("messages: none with the role 'user'")
    return "\n\n".join(_some_text(item.get("content"), "content of a message") for item in messages[: last_user + 1])


def _line(prompt: Prompt) -> bytes:
    record = {"prompt": prompt.prompt, "input_tokens": prompt.input_tokens, "output_tokens": prompt.output_tokens}
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"
