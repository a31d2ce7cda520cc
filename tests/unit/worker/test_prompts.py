from __future__ import annotations

import hashlib
import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest

from lem.config.experiment import ExperimentConfig, SyntheticPrompts
from lem.record import PROMPTS_FILE
from lem.worker.prompts import (
    BUNDLED,
    Prompt,
    PromptError,
    ResolvedPrompts,
    fingerprint,
    generate,
    read_prompt_file,
    resolve_on_host,
    text_of_record,
    write_prompts,
)


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def resolve(**options: Any) -> ResolvedPrompts | None:
    return resolve_on_host(ExperimentConfig.from_dict({"model": "any", **options}))


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"first\nsecond line \n", ["first", "second line "]),
        (b"a\nb", ["a", "b"]),
        (b"\xef\xbb\xbfa\r\nb\r\n", ["a", "b"]),  # a byte order mark, and Windows line ends
        ("a\u2028b\x0bc\n".encode(), ["a\u2028b\x0bc"]),  # characters that splitlines() takes for line ends
    ],
)
def test_text_file_holds_one_prompt_a_line(tmp_path: Path, content: bytes, prompts: list[str]) -> None:
    assert read_prompt_file(write(tmp_path, "p.txt", content)) == tuple(map(Prompt, prompts))


def test_jsonl_lines_are_objects_or_texts_with_their_own_bounds(tmp_path: Path) -> None:
    content = b'{"prompt": "a", "output_tokens": 7, "id": 3}\n{"prompt": "b", "input_tokens": 5}\n"c"'
    assert read_prompt_file(write(tmp_path, "p.jsonl", content)) == (Prompt("a", None, 7), Prompt("b", 5), Prompt("c"))


MESSAGES = [
    {"role": role, "content": content}
    for role, content in (("system", "Be brief."), ("user", "Why?"), ("assistant", "Because."))
]
TURNS = [{"from": who, "value": text} for who, text in (("gpt", "Hi"), ("human", "Go"), ("human", "On"))]


@pytest.mark.parametrize(
    ("record", "text"),
    [({"messages": MESSAGES}, "Be brief.\n\nWhy?"), ({"conversations": TURNS}, "Go")],
    ids=["up to the last turn of the user", "the first human turn"],
)
def test_the_prompt_of_a_conversation(record: Any, text: str) -> None:
    assert text_of_record(record) == text


@pytest.mark.parametrize(
    "record",
    [
        {"text": "a"},
        {"prompt": 3},
        {"prompt": "  "},
        {"prompt": None},
        {"prompt": "\ud800"},
        {"messages": []},
        {"messages": "a"},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": ["a"]}]},
        {"conversations": [{"from": "gpt", "value": "a"}]},
        {"conversations": 1},
        ["a"],
        None,
        7,
    ],
)
def test_a_record_without_text_is_refused(record: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        text_of_record(record)


def test_every_bad_line_is_named_with_its_number_and_many_are_counted(tmp_path: Path) -> None:
    content = b'{"prompt": "a"}\n\n{"prompt": ""}\nnot json\n{"prompt": "b", "output_tokens": 0}\n'
    path = write(tmp_path, "p.jsonl", content)
    with pytest.raises(PromptError) as caught:
        read_prompt_file(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{number}" for number in (2, 3, 4, 5)]
    assert "output_tokens" in lines[3]
    with pytest.raises(PromptError) as caught:
        read_prompt_file(write(tmp_path, "p.txt", b"\n" * 500))
    assert len(str(caught.value).splitlines()) == 11
    assert "490" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("p.txt", b"", "p.txt: "),
        ("p.jsonl", b"", "p.jsonl: "),
        ("p.txt", b"a\n \nb\n", "p.txt:2: "),
        ("p.txt", b"fine\n\xff\xfe\x00", "p.txt:2: not UTF-8"),
        ("missing.txt", None, "missing.txt: cannot be read"),
        (".", None, ": cannot be read: expected a regular file"),
        ("/dev/null", None, "/dev/null: cannot be read: expected a regular file"),
        ("large.txt", None, "large.txt: 1099511627776 bytes; the limit for prompts is 268435456"),
        ("pipe", None, "pipe: cannot be read: expected a regular file"),  # prompts are read again for every attempt
    ],
)
def test_a_file_without_prompts_is_refused_with_the_place(
    tmp_path: Path, name: str, content: bytes | None, place: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.truncate(write(tmp_path, "large.txt", b""), 2**40)
    if content is not None:
        write(tmp_path, name, content)
    with pytest.raises(PromptError) as caught:
        read_prompt_file(tmp_path / name)
    assert place in caught.value.message


def test_written_prompts_are_read_back_as_they_were(tmp_path: Path) -> None:
    prompts = (Prompt('quote " and \\ and\nnewline', 5, None), Prompt("äöü 漢字 \u2028", None, 9))
    write_prompts(tmp_path, prompts)
    assert read_prompt_file(tmp_path / PROMPTS_FILE) == prompts
    first = json.loads((tmp_path / PROMPTS_FILE).read_text(encoding="utf-8").split("\n")[0])
    assert set(first) == {"prompt", "input_tokens", "output_tokens"}


def test_fingerprint_depends_on_contents_and_order_alone(tmp_path: Path) -> None:
    text = read_prompt_file(write(tmp_path, "p.txt", b"a\nb\n"))
    assert fingerprint(text) == fingerprint(read_prompt_file(write(tmp_path, "p.jsonl", b'{"prompt": "a"}\n"b"\n')))
    others = [text[::-1], (Prompt("a", 5), Prompt("b")), (Prompt("ab"),)]
    assert len({fingerprint(text), *map(fingerprint, others)}) == 4


@pytest.mark.parametrize(
    ("sample_size", "count", "warnings"),
    [
        (2, 2, []),
        (5, 3, [("prompt_file_too_small", 5, 3)]),  # a repeated prompt would meet a warm prefix cache
    ],
)
def test_file_prompts_are_resolved_with_their_source(
    tmp_path: Path, sample_size: int, count: int, warnings: list[tuple[str, int, int]]
) -> None:
    path = write(tmp_path, "p.txt", b"a\nb\nc\n")
    found = resolve(prompts={"type": "file", "path": str(path), "sample_size": sample_size})
    assert found is not None
    assert found.prompts == tuple(map(Prompt, "abc"[:count]))
    sha256 = fingerprint(found.prompts)
    assert found.source == {
        "kind": "file", "path": str(path), "revision": None, "sha256": sha256, "count": count
    }  # fmt: skip
    assert [(item.code, item.data["wanted"], item.data["found"]) for item in found.warnings] == warnings


def test_synthetic_prompts_are_resolved_with_their_plan_and_without_one_it_is_the_bundled_set() -> None:
    chosen = {"type": "synthetic", "input_tokens": 20, "output_tokens": 6, "sample_size": 3, "seed": 9}
    found, bundled = resolve(prompts=chosen), resolve()
    assert found is not None
    assert bundled is not None
    assert [(item.input_tokens, item.output_tokens) for item in found.prompts] == [(20, 6)] * 3
    assert (found.source["kind"], found.source["seed"], found.source["count"]) == ("synthetic", 9, 3)
    assert (bundled.source["kind"], len(bundled.prompts)) == ("bundled", BUNDLED.sample_size)


@pytest.mark.parametrize("options", [{"dataset": "alpaca"}, {"prompts": {"type": "huggingface", "dataset": "a/b"}}])
def test_data_sets_are_left_to_the_worker(options: dict[str, Any]) -> None:
    assert resolve(**options) is None


# Synthetic prompts


def plan(length: int, size: int, seed: int, distribution: str = "fixed") -> SyntheticPrompts:
    return SyntheticPrompts(input_tokens=length, sample_size=size, seed=seed, distribution=distribution)


def lengths(distribution: str, length: int = 200, size: int = 2000) -> list[int]:
    return [item.input_tokens or 0 for item in generate(plan(length, size, 5, distribution))]


@pytest.mark.parametrize(
    ("distribution", "least", "most"), [("fixed", 200, 200), ("uniform", 100, 300), ("lognormal", 20, 800)]
)
def test_lengths_are_spread_around_the_chosen_one(distribution: str, least: int, most: int) -> None:
    found = lengths(distribution)
    assert least <= min(found) <= max(found) <= most
    assert statistics.fmean(found) == pytest.approx(200, rel=0.04)
    assert (statistics.median(found) < statistics.fmean(found)) == (distribution == "lognormal")
    assert min(lengths(distribution, length=1, size=200)) >= 1


def test_texts_have_enough_words_and_no_two_begin_alike() -> None:
    assert all(len(item.prompt.split()) > (item.input_tokens or 0) for item in generate(BUNDLED))
    assert len({item.prompt.split()[0] for item in generate(plan(4, 300, 1))}) == 300


def test_same_seed_same_prompts_another_seed_others() -> None:
    first, again, other = (generate(plan(16, 8, seed, "lognormal")) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_bundled_set_never_changes() -> None:
    """Its hash is part of every campaign that gave no prompts: another one would make old results incomparable."""
    text = "\n".join(f"{item.input_tokens} {item.prompt}" for item in generate(BUNDLED))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "2c69b04f5636b590f9631642481173298127de2f77c2d946ea481dba6f966cb9"


def test_each_draw_has_other_prompts_and_the_first_is_that_of_builds_that_drew_once() -> None:
    drawn = [generate(BUNDLED, draw) for draw in range(3)]
    assert drawn[0] == generate(BUNDLED)
    assert len({prompt.prompt for prompts in drawn for prompt in prompts}) == 3 * BUNDLED.sample_size
    assert len({tuple(prompt.input_tokens for prompt in prompts) for prompts in drawn}) == 3
    resolved = resolve_on_host(ExperimentConfig.from_dict({"model": "any"}), draw=2)
    assert resolved is not None
    assert resolved.prompts == drawn[2]
