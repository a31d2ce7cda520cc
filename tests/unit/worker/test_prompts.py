from __future__ import annotations

import gzip
import hashlib
import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest

from lem.config.experiment import ExperimentConfig
from lem.config.sections import SyntheticPrompts
from lem.record import PROMPTS_FILE
from lem.worker.prompts import (
    BUNDLED,
    PromptError,
    ResolvedPrompts,
    fingerprint,
    generate,
    read_prompt_file,
    resolve_on_host,
    write_prompts,
)
from lem.worker.shapes import Prompt, prompt_of_record


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
        (b"a\nb\n\n \n", ["a", "b"]),
        ("a\u2028b\x0bc\n".encode(), ["a\u2028b\x0bc"]),  # characters that splitlines() takes for line ends
    ],
)
def test_text_file_holds_one_prompt_a_line(tmp_path: Path, content: bytes, prompts: list[str]) -> None:
    assert read_prompt_file(write(tmp_path, "p.txt", content)) == tuple(map(Prompt, prompts))


def test_jsonl_lines_are_objects_or_texts_with_their_own_bounds(tmp_path: Path) -> None:
    content = b'{"prompt": "a", "output_tokens": 7, "id": 3}\n{"prompt": "b", "input_tokens": 5}\n"c"'
    assert read_prompt_file(write(tmp_path, "p.jsonl", content)) == (Prompt("a", None, 7), Prompt("b", 5), Prompt("c"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n\n'),
        ("p.ndjson", b'{"prompt": "a"}\n{"text": "b"}'),
        ("p.JSON", b'{"prompt": "a"}\n{"text": "b"}\n\n'),
        ("p.json", b'[{"prompt": "a"}, {"text": "b"}]'),
        ("p.json", b'{"version": 1,\n"data": [{"prompt": "a"}, {"text": "b"}]}'),
        ("p.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n{"text": "b"}\n\n', mtime=0)),
        ("p.txt.gz", gzip.compress(b"a\nb\n", mtime=0)),
    ],
)
def test_json_is_read_by_the_line_or_as_a_list_and_packed(tmp_path: Path, name: str, content: bytes) -> None:
    assert read_prompt_file(write(tmp_path, name, content)) == (Prompt("a"), Prompt("b"))


def test_a_json_file_may_hold_one_row(tmp_path: Path) -> None:
    for row in ({"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}):
        assert [item.prompt for item in read_prompt_file(write(tmp_path, "p.json", json.dumps(row).encode()))] == ["a"]


@pytest.mark.parametrize(
    ("rows", "texts"),
    [
        ([{"instruction": "Add.", "input": "1, 2", "output": "3"}], ["Add.\n\n1, 2"]),
        ([{"instruction": "Sing.", "input": "", "output": "La"}], ["Sing."]),
        ([{"instruction": "Add.", "context": "1, 2", "response": "3"}], ["Add.\n\n1, 2"]),
        ([{"question": "Which?", "choices": ["x", "y"], "answer": 1}], ["Which?\n\nA. x\nB. y"]),
        ([{"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"}],
         ["Which?\n\n1. x\n2. y"]),
        ([{"prompt": "### Add 1, 2. ### 3", "output": "3", "instruction": "Add.", "input": "1, 2"}], ["Add.\n\n1, 2"]),
        ([{"text": "Which? A or B", "answer": "B"}, {"text": "Who?", "answer": "I"}], ["Which? A or B", "Who?"]),
        ([{"role": "prompter", "text": "Hi"}, {"role": "doctor", "text": "Ho"}], ["Hi", "Ho"]),
    ],
)  # fmt: skip
def test_a_row_gives_the_whole_question_without_the_answer(tmp_path: Path, rows: list[Any], texts: list[str]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    assert [item.prompt for item in read_prompt_file(write(tmp_path, "p.jsonl", lines.encode()))] == texts


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED = [message("system", "Be brief."), message("user", "Why?")]
MESSAGES = [*ASKED, message("assistant", "Because.")]
TURNS = [{"from": who, "value": text} for who, text in (("gpt", "Hi"), ("human", "Go"), ("human", "On"))]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = [
    message("user", "Add."),
    message("assistant", None, tool_calls=[CALL]),
    message("tool", "2", tool_call_id="c1"),
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
PARTS = [{"type": "text", "text": "Why"}, {"type": "text", "text": "not?"}]
WILD = [{"role": role, "content": text, "toxic": False} for role, text in (("user", "Hi"), ("assistant", "Oh"))]


# Each with the text that is measured without a chat template, and what the record says about it.
@pytest.mark.parametrize(
    ("record", "text", "taken_from"),
    [
        ("a", "a", None),
        ({"prompt": "a", "text": "b"}, "a", "prompt"),
        ({"text": "b"}, "b", "text"),
        ({"messages": MESSAGES}, "Be brief.\n\nWhy?", "messages, up to the last user turn"),
        ({"prompt": MESSAGES, "completion": "b"}, "Be brief.\n\nWhy?", "prompt, up to the last user turn"),
        ({"messages": [*MESSAGES, *ASKED]}, "Be brief.\n\nWhy?\n\nBecause.\n\nBe brief.\n\nWhy?",
         "messages, up to the last user turn"),
        ({"messages": CALLED, "tools": TOOLS}, "Add.\n\n2", "messages, up to the last tool turn"),
        ({"messages": [*CALLED, message("assistant", "Two.")]}, "Add.\n\n2", "messages, up to the last tool turn"),
        ({"messages": [message("user", PARTS)]}, "Why\nnot?", "messages, up to the last user turn"),
        ({"messages": [message("developer", ""), message("user", "a")]}, "a", "messages, up to the last user turn"),
        ({"conversations": TURNS}, "Go", "conversations, first human turn"),
        ({"conversations": {"from": ["human", "gpt"], "value": ["Go", "No"]}}, "Go", "conversations, first human turn"),
        ({"conversation": TURNS}, "Go", "conversation, first human turn"),
        ({"conversation_id": 7, "conversation": WILD}, "Hi", "conversation, up to the last user turn"),
        ({"question_id": 81, "turns": ["Write.", "Rewrite."]}, "Write.", "turns, first turn"),
        ({"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": MESSAGES}},
         "Be brief.\n\nWhy?", "messages, up to the last user turn"),
        ({"custom_id": "2", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 9}}, "a", "prompt"),
    ],
)  # fmt: skip
def test_the_prompt_of_each_accepted_shape(record: Any, text: str, taken_from: str | None) -> None:
    prompt = prompt_of_record(record)
    assert (prompt.prompt, prompt.taken_from) == (text, taken_from)


def test_messages_keep_roles_turns_and_tools_without_the_answer() -> None:
    assert prompt_of_record({"messages": MESSAGES}).messages == tuple(ASKED)
    assert prompt_of_record({"conversation": WILD}).messages == (message("user", "Hi"),)
    assert prompt_of_record({"messages": [message("user", PARTS)]}).messages == (message("user", "Why\nnot?"),)
    called = prompt_of_record({"messages": CALLED, "tools": json.dumps(TOOLS)})
    assert called.tools == tuple(TOOLS)
    given = {**CALL, "function": {"name": "add", "arguments": {"a": 1}}}  # an object, as chat templates expect
    assert called.messages == (CALLED[0], message("assistant", None, tool_calls=[given]), CALLED[2])


def test_objects_that_are_written_as_text_are_read() -> None:
    """`datasets` writes objects that differ from row to row to Parquet as JSON in text."""
    texts = [
        json.dumps({**item, "tool_calls": [json.dumps(CALL)]} if "tool_calls" in item else item) for item in CALLED
    ]
    record = {"messages": CALLED, "tools": TOOLS}
    for messages in (texts, json.dumps(CALLED)):
        assert prompt_of_record({"messages": messages, "tools": [json.dumps(TOOLS[0])]}) == prompt_of_record(record)


def test_a_batch_line_bounds_its_output() -> None:
    bounds: tuple[dict[str, int], ...] = ({"max_tokens": 9}, {"max_tokens": 9, "max_completion_tokens": 8}, {})
    lines = ({"custom_id": "1", "body": {"messages": MESSAGES, **bound}} for bound in bounds)
    assert [prompt_of_record(line).output_tokens for line in lines] == [9, 8, None]


@pytest.mark.parametrize(
    "record",
    [
        {"answer": "a"},
        {},
        {"prompt": 3},
        {"prompt": "  "},
        {"prompt": None},
        {"prompt": "\ud800"},
        {"text": ["a"]},
        {"messages": []},
        {"messages": 1},
        {"messages": "a"},
        {"conversation": "Q: a A: b"},
        {"role": "assistant", "text": "a"},
        {"question": "a", "choices": [1, 2]},
        {"question": "a", "choices": {"text": ["a", "b"], "label": ["A"]}},
        {"messages": [message("assistant", "a")]},
        {"messages": [message("user", ["a"])]},
        {"messages": [message("user", None)]},
        {"messages": [message("user", [{"type": "image_url", "image_url": {"url": "a"}}])]},
        {"messages": [message("narrator", "a"), message("user", "a")]},
        {"messages": [message("user", "a"), message("assistant", None), message("user", "b")]},
        {"messages": [message("user", "a")], "tools": "{"},
        {"messages": [message("user", "a")], "tools": 3},
        {"messages": [message("user", None, tool_calls=[CALL])]},
        {"messages": [message("user", "a"), message("assistant", None, tool_calls=3), message("user", "b")]},
        {"messages": [message("user", "a"), message("assistant", None, tool_calls=[{}]), message("user", "b")]},
        {"messages": [message("user", "a")], "tools": [{"name": "\ud800"}]},
        {"messages": [message("user", "a")], "tools": [{"limit": float("nan")}]},
        {"conversations": [{"from": "gpt", "value": "a"}]},
        {"conversations": 1},
        {"conversations": {}},
        {"conversations": {"from": ["human"], "value": []}},
        {"turns": []},
        {"custom_id": "1", "body": {"input": 7}},
        {"custom_id": "1", "body": {"prompt": "a", "max_tokens": 0}},
        ["a"],
        None,
        7,
    ],
)
def test_a_record_without_text_is_refused(record: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        prompt_of_record(record)


def test_every_bad_line_is_named_with_its_number_and_many_are_counted(tmp_path: Path) -> None:
    content = b'{"prompt": "a"}\n\n{"prompt": ""}\nnot json\n{"prompt": "b", "output_tokens": 0}\n'
    path = write(tmp_path, "p.jsonl", content)
    with pytest.raises(PromptError) as caught:
        read_prompt_file(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{number}" for number in (2, 3, 4, 5)]
    assert "output_tokens" in lines[3]
    with pytest.raises(PromptError) as caught:
        read_prompt_file(write(tmp_path, "p.txt", b"\n" * 500 + b"a"))
    assert len(str(caught.value).splitlines()) == 11
    assert "490" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("p.txt", b"", "p.txt: "),
        ("p.jsonl", b"", "p.jsonl: "),
        ("p.txt", b"a\n \nb\n", "p.txt:2: "),
        ("p.txt", b"\n \n\n", "p.txt: the file is empty"),
        ("p.json", b'[\n{"prompt": "a"},', "p.json: line 2: not JSON"),
        ("p.json", b'[{"prompt": "a"}, {"answer": "a"}]', "p.json: item 2: expected 'prompt'"),
        ("p.json", b'{"a": [1], "b": [2]}', "p.json: expected a list of objects"),
        (
            "p.jsonl",
            b'{"text": "1 + 1 = 2", "answer": "2"}',
            "p.jsonl:1: expected 'prompt', 'text' or 'messages', got 'text', which",
        ),
        ("p.jsonl.gz", b'{"prompt": "a"}', "p.jsonl.gz: cannot be read: Not a gzipped file"),
        ("p.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9], "p.jsonl.gz: cannot be read: "),
        ("p.json", b"[" * 100_000, "p.json: nested too deeply"),
        ("p.jsonl", b"[" * 100_000, "p.jsonl:1: nested too deeply"),
        ("p.csv", b"prompt\na\n", "p.csv: expected prompts in text or JSON, got .csv"),
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


def test_conversations_are_written_and_read_back_with_what_they_were_taken_from(tmp_path: Path) -> None:
    records = ({"messages": CALLED, "tools": TOOLS}, {"messages": MESSAGES}, {"conversations": TURNS})
    prompts = tuple(map(prompt_of_record, records))
    write_prompts(tmp_path, prompts)
    read = read_prompt_file(tmp_path / PROMPTS_FILE)
    assert read == prompts
    assert [item.taken_from for item in read] == [item.taken_from for item in prompts]
    assert fingerprint(read) == fingerprint(prompts)


def test_prompts_of_earlier_builds_are_read_with_the_same_fingerprint(tmp_path: Path) -> None:
    content = b'{"prompt": "a\\n\\nb", "input_tokens": null, "output_tokens": 7}\n'
    read = read_prompt_file(write(tmp_path, PROMPTS_FILE, content))
    assert read == (Prompt("a\n\nb", None, 7),)
    line = b'{"prompt":"a\\n\\nb","input_tokens":null,"output_tokens":7}\n'
    assert fingerprint(read) == hashlib.sha256(line).hexdigest()


def test_without_a_chat_template_a_conversation_is_measured_as_its_text(tmp_path: Path) -> None:
    path = write(tmp_path, "p.jsonl", (json.dumps({"messages": MESSAGES}) + '\n{"prompt": "a"}\n').encode())
    found = resolve(prompts={"type": "file", "path": str(path)})
    assert found is not None
    assert found.prompts == (Prompt("Be brief.\n\nWhy?"), Prompt("a"))
    assert found.source["taken_from"] == "messages, up to the last user turn, joined without roles (1); prompt (1)"
    # The fingerprint of builds that knew no messages: their campaigns resume without repeating anything.
    assert found.source["sha256"] == fingerprint([Prompt("Be brief.\n\nWhy?"), Prompt("a")])


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
