from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import ConfigurationError
from lem.config.experiment import ExperimentConfig
from lem.record import PROMPTS_FILE
from lem.worker.prompts import (
    BUNDLED,
    Prompt,
    PromptError,
    fingerprint,
    is_resolved_on_host,
    read_prompt_file,
    read_prompts,
    resolve_on_host,
    text_of_record,
    write_prompts,
)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def config(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "any", **options})


def test_text_file_holds_one_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "first\nsecond line \n")
    assert read_prompt_file(path) == (Prompt("first"), Prompt("second line "))


def test_last_line_needs_no_end(tmp_path: Path) -> None:
    assert read_prompt_file(write(tmp_path, "p.txt", "a\nb")) == (Prompt("a"), Prompt("b"))


def test_byte_order_mark_and_windows_line_ends_are_no_part_of_a_prompt(tmp_path: Path) -> None:
    assert read_prompt_file(write(tmp_path, "p.txt", b"\xef\xbb\xbfa\r\nb\r\n")) == (Prompt("a"), Prompt("b"))


def test_characters_that_only_look_like_line_ends_stay_in_the_prompt(tmp_path: Path) -> None:
    assert read_prompt_file(write(tmp_path, "p.txt", "a\u2028b\x0bc\n")) == (Prompt("a\u2028b\x0bc"),)


def test_jsonl_lines_are_objects_or_texts_with_their_own_bounds(tmp_path: Path) -> None:
    lines = ['{"prompt": "a", "output_tokens": 7, "id": 3}', '{"prompt": "b", "input_tokens": 5}', '"c"']
    assert read_prompt_file(write(tmp_path, "p.jsonl", "\n".join(lines))) == (
        Prompt("a", None, 7),
        Prompt("b", 5, None),
        Prompt("c"),
    )


def test_messages_are_joined_up_to_the_last_turn_of_the_user() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
    ]
    assert text_of_record({"messages": messages}) == "Be brief.\n\nWhy?"


def test_conversations_give_their_first_human_turn() -> None:
    turns = [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "Go"}, {"from": "human", "value": "On"}]
    assert text_of_record({"conversations": turns}) == "Go"


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
    with pytest.raises(ValueError, match=r"due|blank|neither|no human turn|surrogate|none has the role"):
        text_of_record(record)


def test_every_bad_line_is_named_with_its_number(tmp_path: Path) -> None:
    path = write(
        tmp_path, "p.jsonl", '{"prompt": "a"}\n\n{"prompt": ""}\nnot json\n{"prompt": "b", "output_tokens": 0}\n'
    )
    with pytest.raises(PromptError) as caught:
        read_prompt_file(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{number}" for number in (2, 3, 4, 5)]
    assert "blank" in lines[0]
    assert "not JSON" in lines[2]
    assert "output_tokens" in lines[3]


def test_blank_line_of_a_text_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "a\n \nb\n")
    with pytest.raises(PromptError, match=r"p\.txt:2: the line is blank"):
        read_prompt_file(path)


def test_many_bad_lines_are_counted_not_all_listed(tmp_path: Path) -> None:
    with pytest.raises(PromptError) as caught:
        read_prompt_file(write(tmp_path, "p.txt", "\n" * 500))
    assert len(str(caught.value).splitlines()) == 11
    assert "490 more lines" in str(caught.value)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PromptError, match="the file is empty"):
        read_prompt_file(write(tmp_path, name, ""))


def test_binary_file_is_refused_with_the_line(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"p\.txt:2: not UTF-8"):
        read_prompt_file(write(tmp_path, "p.txt", b"fine\n\xff\xfe\x00"))


@pytest.mark.parametrize("name", ["missing.txt", ".", "/dev/null", "pipe"])
def test_a_path_that_is_no_readable_file_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")  # prompts are read again for every attempt, which a pipe cannot give
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompt_file(tmp_path / name)


def test_a_file_too_large_for_prompts_is_refused_unread(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "")
    os.truncate(path, 2**40)
    with pytest.raises(PromptError, match=r"p\.txt: 1099511627776 bytes of prompts, at most 268435456 are read"):
        read_prompt_file(path)


def test_prompt_errors_are_configuration_errors() -> None:
    assert issubclass(PromptError, ConfigurationError)


def test_written_prompts_are_read_back_as_they_were(tmp_path: Path) -> None:
    prompts = (Prompt('quote " and \\ and\nnewline', 5, None), Prompt("äöü 漢字 \u2028", None, 9))
    write_prompts(tmp_path, prompts)
    assert read_prompts(tmp_path) == prompts
    first = json.loads((tmp_path / PROMPTS_FILE).read_text(encoding="utf-8").split("\n")[0])
    assert set(first) == {"prompt", "input_tokens", "output_tokens"}


def test_no_prompts_file_is_none(tmp_path: Path) -> None:
    assert read_prompts(tmp_path) is None


def test_fingerprint_depends_on_contents_and_order_alone(tmp_path: Path) -> None:
    text = read_prompt_file(write(tmp_path, "p.txt", "a\nb\n"))
    lines = read_prompt_file(write(tmp_path, "p.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n'))
    assert fingerprint(text) == fingerprint(lines)
    assert fingerprint(text) != fingerprint(text[::-1])
    assert fingerprint([Prompt("a", 5)]) != fingerprint([Prompt("a")])
    # Neither may the border between two prompts be lost.
    assert fingerprint([Prompt("a"), Prompt("b")]) != fingerprint([Prompt("ab")])


def test_file_prompts_are_resolved_with_their_source(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "a\nb\nc\n")
    found = resolve_on_host(config(prompts={"type": "file", "path": str(path), "sample_size": 2}))
    assert found is not None
    assert found.prompts == (Prompt("a"), Prompt("b"))
    assert found.source == {
        "kind": "file",
        "path": str(path),
        "revision": None,
        "sha256": fingerprint(found.prompts),
        "count": 2,
    }
    assert found.warnings == ()


def test_fewer_prompts_than_asked_for_are_used_and_told(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "a\nb\n")
    found = resolve_on_host(config(prompts={"type": "file", "path": str(path), "sample_size": 5}))
    assert found is not None
    assert len(found.prompts) == 2
    assert found.warnings[0].code == "prompt_file_too_small"
    assert (found.warnings[0].data["wanted"], found.warnings[0].data["found"]) == (5, 2)


def test_synthetic_prompts_are_resolved_with_their_plan() -> None:
    chosen = {"type": "synthetic", "input_tokens": 20, "output_tokens": 6, "sample_size": 3, "seed": 9}
    found = resolve_on_host(config(prompts=chosen))
    assert found is not None
    assert [(item.input_tokens, item.output_tokens) for item in found.prompts] == [(20, 6)] * 3
    assert found.source["kind"] == "synthetic"
    assert found.source["seed"] == 9
    assert found.source["count"] == 3


def test_with_neither_dataset_nor_prompts_it_is_the_bundled_set_and_says_so() -> None:
    found = resolve_on_host(config())
    assert found is not None
    assert found.source["kind"] == "bundled"
    assert len(found.prompts) == BUNDLED.sample_size


@pytest.mark.parametrize("options", [{"dataset": "alpaca"}, {"prompts": {"type": "huggingface", "dataset": "a/b"}}])
def test_data_sets_are_left_to_the_worker(options: dict[str, Any]) -> None:
    assert not is_resolved_on_host(config(**options))
    assert resolve_on_host(config(**options)) is None
