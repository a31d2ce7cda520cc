"""Prompts: files, synthetic text, and how they are chosen."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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


# Of a conversation: `role` (system, user, assistant or tool) and `content`, which is text, or None beside `tool_calls`;
# `name` and `tool_call_id` where they are given. The arguments of a call are an object, as chat templates expect.
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    prompt: str  # of a conversation the texts of its messages, with blank lines between them
    input_tokens: int | None = None  # exact length in tokens to cut or extend it to; None leaves it as it is
    output_tokens: int | None = None  # bound on the tokens to generate for it; None takes the experiment's
    messages: tuple[Message, ...] = ()  # a conversation up to the turn to generate, for a chat template; () for a text
    tools: tuple[Mapping[str, Any], ...] = ()  # what the conversation may call, as the API of OpenAI writes it
    taken_from: str | None = field(default=None, compare=False)  # the column and the turns, for the record


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


# Looked for in this order when no column is named.
TEXT_COLUMNS = (
    *("prompt", "messages", "conversations", "conversation", "turns", "instruction", "question", "text", "input"),
    *("query", "content"),
)
_LISTS_OF_TURNS = ("turns", "conversations", "conversation")
# The roles of messages, by the names that data sets give them.
_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "function": "tool",
}
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
    prompts = as_measured(prompts, config)
    contents = {"revision": None, "sha256": fingerprint(prompts), "count": len(prompts), **taken_from(prompts)}
    if isinstance(chosen, FilePrompts):
        path, wanted = str(chosen.path), chosen.sample_size or 0
        too_few = Reason.of("prompt_file_too_small", path=path, wanted=wanted, found=len(prompts))
        source = {"kind": "file", "path": path, **contents}
        return ResolvedPrompts(prompts, source, (too_few,) if len(prompts) < wanted else ())
    parameters = {name: getattr(plan, name) for name in ("input_tokens", "output_tokens", "distribution", "seed")}
    return ResolvedPrompts(prompts, {"kind": kind, "name": kind, **contents, **parameters})


def as_measured(prompts: Sequence[Prompt], config: ExperimentConfig) -> tuple[Prompt, ...]:
    """The prompts; without a chat template, each conversation as its text alone."""
    if config.is_templated:
        return tuple(prompts)
    return tuple(replace(item, messages=(), tools=()) if item.messages else item for item in prompts)


def taken_from(prompts: Iterable[Prompt]) -> dict[str, str]:
    """For the record: which column and turns were taken, and of how many rows where they differ; {} if unknown."""
    counts = Counter(item.taken_from for item in prompts if item.taken_from is not None)
    parts = [name if len(counts) == 1 else f"{name} ({count})" for name, count in sorted(counts.items())]
    return {"taken_from": "; ".join(parts)} if parts else {}


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """SHA-256 over the contents of prompts in their order, whatever file and format they came from."""
    lines = (_line(as_json(replace(item, taken_from=None))) for item in prompts)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def as_json(prompt: Prompt) -> dict[str, Any]:
    """A line of `prompts.jsonl`: `prompt`, or `messages` (and `tools`) from which it is made again."""
    tools = {"tools": prompt.tools} if prompt.tools else {}
    contents = {"messages": prompt.messages, **tools} if prompt.messages else {"prompt": prompt.prompt}
    bounds = {"input_tokens": prompt.input_tokens, "output_tokens": prompt.output_tokens}
    return {**contents, **bounds, **({"taken_from": prompt.taken_from} if prompt.taken_from else {})}


def write_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Write `prompts.jsonl` into a result folder, whole or not at all. Raises OSError: as `durable.write_bytes`."""
    durable.write_bytes(folder / PROMPTS_FILE, b"".join(_line(as_json(item)) for item in prompts))


def read_prompt_file(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a text file, one a line, or of a `.jsonl` file.

    A line of `.jsonl` is an object (`prompt_of_record`), and may bound its own `input_tokens` and `output_tokens`; a
    JSON string is a prompt too. Raises PromptError: no such file, not UTF-8,
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


def prompt_of_record(record: Any, columns: Iterable[str] = TEXT_COLUMNS) -> Prompt:
    """The prompt in an object, or in a plain string; of an object, in the first of these columns that it has.

    A line for OpenAI's batch API holds it in its `body`. Raises ValueError: there is none; the message says what was
    expected.
    """
    if isinstance(record, str):
        return Prompt(_some_text(record, "prompt"))
    if not isinstance(record, Mapping):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    body = record.get("body")
    if isinstance(body, Mapping) and "custom_id" in record:
        limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        return replace(prompt_of_record(body, columns), output_tokens=_bound(body, limit))
    column = next((name for name in columns if record.get(name) is not None), None)
    if column is None:
        raise ValueError(f"expected 'prompt', 'text' or 'messages', got {', '.join(map(repr, record)) or 'no keys'}")
    found = _prompt_of_value(column, record[column])
    if not found.messages:
        return found
    found = replace(found, tools=_tools(record.get("tools")))
    try:
        json.dumps(as_json(found), ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{column}: not JSON in Unicode: {error}") from error
    return found


def _prompt_of_value(column: str, value: Any) -> Prompt:
    """Of ShareGPT's `conversations` the first human turn, of MT-Bench's `turns` the first, and messages as such."""
    if not isinstance(value, list):
        return Prompt(_some_text(value, column), taken_from=column)
    if value and all(isinstance(item, str) for item in value) and column in _LISTS_OF_TURNS:
        return Prompt(_some_text(value[0], "first turn"), taken_from=f"{column}, first turn")
    if not value or not all(isinstance(item, Mapping) for item in value):
        raise ValueError(f"{column}: expected text, or a list of messages with role and content")
    if column != "conversations" and "from" not in value[0]:
        return prompt_of_messages(value, column)
    for turn in value:
        if turn.get("from", turn.get("role")) in ("human", "user"):
            text = _some_text(turn.get("value", turn.get("content")), "first human turn")
            return Prompt(text, taken_from=f"{column}, first human turn")
    raise ValueError(f"{column}: no human turn")


def prompt_of_messages(given: Sequence[Mapping[str, Any]], column: str = "messages") -> Prompt:
    """A conversation up to its last turn of the user or of a tool: the answer is not part of the prompt.

    Raises ValueError: a message that is not text, or there is none of the user.
    """
    messages = [_message(item) for item in given]
    roles = [item["role"] for item in messages]
    if "user" not in roles:
        raise ValueError(f"{column}: no message with the role 'user'")
    end = max(index for index, role in enumerate(roles) if role in ("user", "tool"))
    text = "\n\n".join(item["content"] for item in messages[: end + 1] if item["content"])
    return Prompt(text, messages=tuple(messages[: end + 1]), taken_from=f"{column}, up to the last {roles[end]} turn")


def _message(given: Mapping[str, Any]) -> Message:
    role = _ROLES.get(str(given.get("role")))
    if role is None:
        raise ValueError(f"expected a role of {', '.join(_ROLES)}, got {given.get('role')!r}")
    calls = [_tool_call(item) for item in given.get("tool_calls") or ()]
    content = given.get("content")
    if isinstance(content, list):
        content = "\n".join(map(_text_of_part, content))
    if content is not None or not calls:
        is_user = role == "user"
        content = _some_text(content, f"content of the {role} message", may_be_blank=not is_user)
    known = {name: given[name] for name in ("name", "tool_call_id") if given.get(name) is not None}
    return {"role": role, "content": content, **known, **({"tool_calls": calls} if calls else {})}


def _text_of_part(part: Any) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in ("text", "input_text"):
        raise ValueError(f"expected a content part of type text, got {kind}")
    return _some_text(part.get("text"), "content part", may_be_blank=True)


def _tool_call(call: Any) -> Mapping[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError("tool_calls: expected objects with 'function'")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # a model may have called with what is not JSON
            arguments = json.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(given: Any) -> tuple[Mapping[str, Any], ...]:
    """The tools of a conversation; data sets store them as JSON text too."""
    tools = json.loads(given) if isinstance(given, str) and given.strip() else given or []
    if not isinstance(tools, list) or not all(isinstance(item, Mapping) for item in tools):
        raise ValueError("tools: expected a list of objects")
    return tuple(tools)


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
    prompt = prompt_of_record(record)
    if not isinstance(record, dict):
        return prompt
    origin = record.get("taken_from", prompt.taken_from)
    return replace(
        prompt,
        input_tokens=_bound(record, "input_tokens"),
        output_tokens=_bound(record, "output_tokens") or prompt.output_tokens,
        taken_from=origin if isinstance(origin, str) else None,
    )


def _bound(record: Mapping[str, Any], key: str) -> int | None:
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key}: expected an integer of at least 1, got {value!r}")
    return value


def _some_text(value: Any, what: str, *, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what}: expected text, got {type(value).__name__}")
    if not value.strip() and not may_be_blank:
        raise ValueError(f"the {what} is blank")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"the {what} contains half of a surrogate pair")
    return value


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"
