"""Prompts: files, synthetic text, and how they are chosen."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import math
import os
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from lem.base import durable
from lem.base.dataclass import dataclass, replace
from lem.base.errors import ConfigurationError
from lem.base.reasons import Reason
from lem.base.units import MIB
from lem.config.experiment import NO_TEMPLATE, OWN_TEMPLATE, ExperimentConfig
from lem.config.sections import BUNDLED_DISTRIBUTION, FilePrompts, SyntheticPrompts
from lem.record import PROMPTS_FILE, TEMPLATE_FILE
from lem.worker import shapes

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


# What is measured when neither dataset nor prompts is given.
BUNDLED = SyntheticPrompts(distribution=BUNDLED_DISTRIBUTION)


def seed_of_draw(seed: int, draw: int) -> int | str:
    """The seed of a `random.Random` for one of many draws: of prompts or arrivals, one for each cycle."""
    # The first draw is that of builds that drew once for all cycles. A seed of text is hashed with SHA-512, the same on
    # every Python and machine.
    return seed if draw == 0 else f"{seed}/{draw}"


def generate(plan: SyntheticPrompts, draw: int = 0) -> tuple[shapes.Prompt, ...]:
    """Made-up prompts, no two alike, of which each has its length in tokens and at least as many words."""
    rng = random.Random(seed_of_draw(plan.seed, draw))
    made: list[shapes.Prompt] = []
    for index in range(plan.sample_size):
        length = _draw_length(plan.input_tokens, plan.distribution, rng)
        output = None if plan.output_tokens is None else _draw_length(plan.output_tokens, plan.distribution, rng)
        made.append(shapes.Prompt(_text(index, length, rng), length, output))
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


JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PACKED = ".gz"
# Of files whose lines are not prompts.
_OTHER_SUFFIXES = frozenset(
    (".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".yaml", ".yml", ".zip", ".tar", ".tgz", ".zst", ".bz2", ".xz")
)
MAX_LISTED_PROBLEMS = 10
# A file above this is a data set put in by mistake; prompts are held in memory, on the host too.
MAX_FILE_B = 256 * MIB


class PromptError(ConfigurationError):
    """Prompts that cannot be used."""


@dataclass(frozen=True)
class ResolvedPrompts:
    prompts: tuple[shapes.Prompt, ...]
    source: Mapping[str, Any]  # for the record: kind, path or name, revision, sha256, count, and what chose them
    warnings: tuple[Reason, ...] = ()


def resolve_on_host(config: ExperimentConfig, folder: Path | None = None, *, draw: int = 0) -> ResolvedPrompts | None:
    """The prompts of an experiment, or those in a result `folder`; None for a data set. Raises PromptError."""
    # Where a file holds fewer than `sample_size`, all of them are taken and a warning says so: a repeated prompt would
    # meet a warm prefix cache.
    chosen = config.prompts
    if config.uses_dataset:
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


def as_measured(prompts: Sequence[shapes.Prompt], config: ExperimentConfig) -> tuple[shapes.Prompt, ...]:
    if config.is_templated:
        return tuple(prompts)

    def joined(item: shapes.Prompt) -> shapes.Prompt:
        return replace(item, messages=(), tools=(), taken_from=f"{item.taken_from}, joined without roles")

    return tuple(joined(item) if item.messages else item for item in prompts)


def taken_from(prompts: Iterable[shapes.Prompt]) -> dict[str, str]:
    counts = Counter(item.taken_from for item in prompts if item.taken_from is not None)
    parts = [name if len(counts) == 1 else f"{name} ({count})" for name, count in sorted(counts.items())]
    return {"taken_from": "; ".join(parts)} if parts else {}


def fingerprint(prompts: Iterable[shapes.Prompt]) -> str:
    lines = (_line(shapes.as_json(replace(item, taken_from=None))) for item in prompts)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def write_prompts(folder: Path, prompts: Sequence[shapes.Prompt]) -> None:
    durable.write_bytes(folder / PROMPTS_FILE, b"".join(_line(shapes.as_json(item)) for item in prompts))


def read_prompt_file(path: Path) -> tuple[shapes.Prompt, ...]:
    """The prompts of a text file, one a line, or of JSON, also packed (`.gz`); PromptError names each bad line."""
    text, unit = _read_text(path), ":"
    parse: Callable[[Any], Any] = str
    rows: list[Any] = text.split("\n")
    while rows and not rows[-1].strip():
        del rows[-1]
    if not rows:
        raise PromptError(f"{path}: the file is empty", "write one prompt per line")
    if suffix_of(path) in JSON_SUFFIXES:
        rows, parse, unit = _json_rows(path, text, rows)
    columns = shapes.usable_columns(_parsed(rows[: shapes.ROWS_TO_LOOK_AT], parse))
    prompts: list[shapes.Prompt] = []
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            prompts.append(_prompt_of(parse(row), columns))
        except ValueError as error:  # noqa: PERF203 (every bad line is named)
            problems.append(f"{path}{unit}{number}: {error}")
    if problems:
        if len(problems) > MAX_LISTED_PROBLEMS:
            problems[MAX_LISTED_PROBLEMS:] = [f"and {len(problems) - MAX_LISTED_PROBLEMS} more lines"]
        raise PromptError("\n".join(problems), "each line must hold one prompt; fix or delete these lines")
    return tuple(prompts)


def _json_rows(path: Path, text: str, lines: list[str]) -> tuple[list[Any], Callable[[Any], Any], str]:
    try:
        listed = list_of_json(text) if suffix_of(path) == ".json" else None
    except ValueError as error:
        raise PromptError(f"{path}: {error}", "write a list of objects with prompt or messages") from error
    return (lines, _parse_line, ":") if listed is None else (listed, lambda row: row, ": item ")


def _parsed(rows: Iterable[Any], parse: Callable[[Any], Any]) -> Iterator[Any]:
    for row in rows:
        with contextlib.suppress(ValueError):
            yield parse(row)


def list_of_json(text: str) -> list[Any] | None:
    try:
        document = shapes.json_of(text)
    except json.JSONDecodeError as error:
        with contextlib.suppress(ValueError):
            shapes.json_of(text.lstrip().split("\n", 1)[0])
            return None
        raise ValueError(f"line {error.lineno}: not JSON: {error.msg}") from error
    if isinstance(document, dict):
        if any(document.get(name) is not None for name in ("body", *shapes.TEXT_COLUMNS)):
            return [document]  # a single row
        lists = [value for value in document.values() if isinstance(value, list)]
        document = lists[0] if len(lists) == 1 else None
    if not isinstance(document, list):
        raise ValueError("expected a list of objects, or an object with one such list")
    return document


def suffix_of(path: Path) -> str:
    return Path(path.name.lower().removesuffix(PACKED)).suffix


def unpacked(stream: BinaryIO, path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.GzipFile(fileobj=stream)) if path.name.lower().endswith(PACKED) else stream


def read_template(config: ExperimentConfig, folder: Path | None = None) -> str | None:
    """The chat template that an experiment names, or its copy in a result folder; None without one; PromptError."""
    if config.chat_template in (NO_TEMPLATE, OWN_TEMPLATE):
        return None
    copy = None if folder is None else folder / TEMPLATE_FILE
    path = copy if copy is not None and copy.is_file() else Path(config.chat_template)
    try:
        return durable.read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = durable.reason_of(error) if isinstance(error, OSError) else "not UTF-8"
        hint = f"set chat_template to a Jinja file, {OWN_TEMPLATE} or {NO_TEMPLATE}"
        raise PromptError(f"{path}: cannot be read: {reason}", hint) from error


def template_digest(template: str) -> str:
    return hashlib.sha256(durable.utf8(template)).hexdigest()


def _read_text(path: Path) -> str:
    if suffix_of(path) in _OTHER_SUFFIXES:
        hint = "use .txt or .jsonl; a .csv or .parquet file can be a data set: `dataset: FILE`"
        raise PromptError(f"{path}: expected prompts in text or JSON, got {suffix_of(path)}", hint)
    try:
        with durable.open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            data = unpacked(stream, path).read(MAX_FILE_B + 1) if size <= MAX_FILE_B else b""
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(f"{path}: cannot be read: {reason}", "check prompts.path") from error
    if max(size, len(data)) > MAX_FILE_B:
        raise PromptError(f"{path}: {max(size, len(data))} bytes; the limit for prompts is {MAX_FILE_B}")
    try:
        # A byte order mark and Windows line ends are how an editor saved the file, not part of a prompt.
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{path}:{line}: not UTF-8", "save the file as UTF-8 text") from error


def _parse_line(line: str) -> Any:
    if not line.strip():
        raise ValueError("the line is blank")
    try:
        return shapes.json_of(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error


def _prompt_of(row: Any, columns: Sequence[str]) -> shapes.Prompt:
    prompt = shapes.prompt_of_record(row, usual=columns)
    if not isinstance(row, dict):
        return prompt
    origin = row.get("taken_from", prompt.taken_from)
    return replace(
        prompt,
        input_tokens=shapes.bound_of(row, "input_tokens"),
        output_tokens=shapes.bound_of(row, "output_tokens") or prompt.output_tokens,
        taken_from=origin if isinstance(origin, str) else None,
    )


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"
