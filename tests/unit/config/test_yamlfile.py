"""Strict YAML: what is read as written, what is refused, and every kind of file that is no configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import ConfigurationError
from lem.config import kinds
from lem.config.scalars import ExpansionError, expand, resolve_plain
from lem.config.yamlfile import Document, FileProblems, parse_value, read_document


def read(tmp_path: Path, content: str | bytes, environ: Mapping[str, str] | None = None) -> Document:
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return read_document(path, environ or {})


def refusal(tmp_path: Path, content: str | bytes) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, content)
    assert "Traceback" not in caught.value.message
    return caught.value.message.replace(str(tmp_path / "c.yaml"), "c.yaml")


def problems(tmp_path: Path, content: str, environ: Mapping[str, str] | None = None) -> list[str]:
    located = read(tmp_path, content, environ).located
    return [f"{place.mark}: {problem}".replace("Mark(", "(") for place, problem in located]


@pytest.mark.parametrize(
    ("content", "tree"),
    [
        (
            "no: yes\nat: 12:30\nrate: 1e3\nnull: ~\nquoted: '1'\n",
            {"no": "yes", "at": "12:30", "rate": 1000.0, "null": None, "quoted": "1"},
        ),
        ("1: a\ntrue: b\n1.5: c\n~: d\n", {"1": "a", "true": "b", "1.5": "c", "~": "d"}),
        ("a: &x {b: !!str 5}\nc: *x\n", {"a": {"b": "5"}, "c": {"b": "5"}}),
        ('a: "${A}"\nb: ${B:-x}\nc: ["$${A}"]\n', {"a": "1", "b": "x", "c": ["${A}"]}),
        ("a: [${A}, ${B:-16}]\nb: {c: ${B:-x}, ${A}: 2}\n", {"a": ["1", "16"], "b": {"c": "x", "${A}": 2}}),
        ("a: [${B:-{x,y: 'z'}, 2] # ${B:-[}\nb: ${B:-a: #b}\n", {"a": ["{x,y: 'z'", 2], "b": "a: #b"}),
        ("a: '${B:-it''s}'\nb: |\n  ${B:-{}\n", {"a": "it's", "b": "{\n"}),
        (b"\xef\xbb\xbfa: 1\r\nb: x\r\n", {"a": 1, "b": "x"}),
    ],
)
def test_what_is_read_as_written(tmp_path: Path, content: str | bytes, tree: Any):
    assert read(tmp_path, content, {"A": "1"}).tree == tree


def test_positions_of_keys_and_values(tmp_path: Path):
    document = read(tmp_path, "a:\n  b: [1, {c: x}]\n")
    assert document.keys["a", "b"] == (2, 3)
    assert document.values["a", "b"] == (2, 6)
    assert document.values["a", "b", 1, "c"] == (2, 14)


def test_a_reference_in_a_flow_list_is_one_value_at_its_place(tmp_path: Path):
    document = read(tmp_path, "a: [${N:-16}, {b: ${N:-{,}}, x]\n")
    assert document.tree == {"a": ["16", {"b": "{,"}, "x"]}
    assert kinds.simple(document.tree["a"][0]) == 16
    assert document.values["a", 1, "b"] == (1, 19)
    assert document.values["a", 2] == (1, 30)


def test_every_duplicate_key_is_found_with_its_line(tmp_path: Path):
    assert problems(tmp_path, "a: 1\nb: {c: 1, c: 2}\na: 2\na: 3\n") == [
        "(line=2, column=11): b.c: duplicate key, first on line 2",
        "(line=3, column=1): a: duplicate key, first on line 1",
        "(line=4, column=1): a: duplicate key, first on line 1",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: !!python/object:os.system x\n", "a: the tag !!python/object:os.system"),
        ("a: !thing x\n", "a: the tag !thing"),
        ("a: !!python/object/apply:os.system ['x']\n", "a: the tag !!python/object/apply:os.system"),
        ("a: !!int '3'\n", "a: the tag !!int"),
        ("a: !!timestamp 2026-01-01\n", "a: the tag !!timestamp"),
        ("b: &x {c: 1}\na:\n  <<: *x\n", "a.<<: merge keys"),
        ("? [a]\n: b\n", "plain text"),
        ("a: &x [*x]\n", "a[0]: an alias (*name)"),
        ('a: "\\ud800"\n', "a: contains half of a surrogate pair"),
        ('a: "x\\0y"\n', "a: contains the control character U+0000"),
        ("a: ${NOPE}\n", "a: the environment variable NOPE is not set; set it or write ${NOPE:-default}"),
        ("a: ${NO\n", "a: incomplete '${'"),
    ],
)
def test_what_strict_yaml_leaves_out(tmp_path: Path, text: str, problem: str):
    (found,) = problems(tmp_path, text)
    assert problem in found


@pytest.mark.parametrize("digits", ["00110000", "FFFFFFFF"])
def test_a_character_beyond_unicode_is_shown_where_it_is(tmp_path: Path, digits: str):
    with pytest.raises(FileProblems, match=r"c\.yaml:1:7: not YAML: expected at most \\U0010FFFF"):
        problems(tmp_path, f'a: "\\U{digits}"\n')


def test_an_alias_bomb_is_defused(tmp_path: Path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (found,) = problems(tmp_path, "\n".join(lines))
    assert "more than 200000 values; do aliases (*name) multiply?" in found


@pytest.mark.parametrize(
    "text", ["a: " + "[" * 5000, "a: " + "{a: " * 5000, "\n".join(" " * n + "a:" for n in range(500))]
)
def test_deep_nesting_is_refused(tmp_path: Path, text: str):
    assert "nested more than 64 deep" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\1\2", "c.yaml:1:1: expected a YAML file, found binary data"),
        (b"\x89PNG\r\n\x1a\n", "c.yaml:1:1: is not UTF-8 (byte 0x89)"),
        ("a: 1\nb: é\n".encode("latin-1"), "c.yaml:2:4: is not UTF-8 (byte 0xe9)"),
        (b"\xef\xbb\xbfa: \xff\n", "c.yaml:1:5: is not UTF-8 (byte 0xff)"),
        ("a: 1\n".encode("utf-16"), "c.yaml:1:1: is UTF-16"),
        ("a:\n\tb: 1\n", "c.yaml:2:1: not YAML: found character '\\t' that cannot start any token; indent with spaces"),
        ("a: b: c\n", "c.yaml:1:5: not YAML: mapping values are not allowed here; quote a text that contains ': '"),
        ("a: @x\n", "c.yaml:1:4: not YAML: found character '@' that cannot start any token; quote a text"),
        ("a: *x\n", "c.yaml:1:4: not YAML: found undefined alias; quote a text that begins with *"),
        ("a: 'x\n\n", "c.yaml:1:4: not YAML: found unexpected end of stream"),
        ("a: [1\nb: 2\n", "c.yaml:2:2: not YAML: expected ',' or ']', but got ':'"),
        ("a: [x{B}]\n", "c.yaml:1:6: not YAML: expected ',' or ']', but got '{'; inside brackets, quote"),
        ("a: 1\n---\nb: 2\n", "c.yaml:2:1: not YAML: but found another document; write one configuration per file"),
        ('a: 1\nb: "\x07"\n', "c.yaml:2:5: contains the control character U+0007"),
    ],
)
def test_what_is_no_yaml_is_told_with_its_place(tmp_path: Path, content: str | bytes, message: str):
    assert refusal(tmp_path, content).startswith(message)


def test_a_missing_file_a_folder_and_an_unreadable_file(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="no such file"):
        read_document(tmp_path / "nothing.yaml", {})
    with pytest.raises(ConfigurationError, match="found a folder"):
        read_document(tmp_path, {})
    (tmp_path / "c.yaml").write_text("a: 1\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_document(tmp_path / "c.yaml" / "d.yaml", {})
    if os.geteuid() != 0:  # root reads everything
        (tmp_path / "c.yaml").chmod(0)
        with pytest.raises(ConfigurationError, match="cannot be read: Permission denied"):
            read_document(tmp_path / "c.yaml", {})


def test_a_file_that_is_far_too_large_is_not_parsed(tmp_path: Path):
    assert "larger than 16 MiB" in refusal(tmp_path, b"# " + b"x" * (16 * 2**20))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("[float16, bfloat16]", ["float16", "bfloat16"]),
        ("no", "no"),
        ("", None),
        ("{a: 1}", {"a": 1}),
        ("'5'", "5"),
        ("${A}", "x"),
    ],
)
def test_values_of_the_command_line_are_the_same_yaml(text: str, value: Any):
    assert parse_value(text, {"A": "x"}, "--set k=v") == value


@pytest.mark.parametrize("text", ["[1", "a: b: c", "@x", "{a: 1, a: 2}", "${NOPE}"])
def test_a_value_that_is_none_is_told_with_its_option(text: str):
    with pytest.raises(ConfigurationError, match=r"^--set k=v"):
        parse_value(text, {}, "--set k=v")


# Plain words and `${VAR}`


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("0", 0),
        ("-1", -1),
        ("+1", 1),
        ("1e3", 1000.0),
        ("1E-2", 0.01),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        ("9" * 400_000, float("inf")),
    ],
)
def test_words_that_all_readers_read_alike_are_values(text: str, value: Any):
    assert resolve_plain(text) == value
    assert type(resolve_plain(text)) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "yes",
        "on",
        "off",
        "n",
        "Y",
        "12:30",
        "1:2:3",
        "010",
        "0o17",
        "0x1F",
        "1_000",
        "2024-01-01",
        "=",
        "1e",
        ".",
    ],
)
def test_what_yaml_versions_read_differently_is_text(text: str):
    assert resolve_plain(text) == text


def test_variables_expand_with_defaults():
    environ = {"A": "1", "EMPTY": ""}
    text = "${A}-${B:-b}-${EMPTY:-e}-${EMPTY}-$${A}-$A"
    assert expand(text, environ, is_plain=True) == "1-b-e--${A}-$A"
    assert expand("${A}", {"A": "${B}"}, is_plain=True) == "${B}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("${", "incomplete"),
        ("${}", "incomplete"),
        ("${1A}", "incomplete"),
        ("a ${B c", "incomplete"),
        ("${X}/a", "X is not"),
    ],
)
def test_a_reference_that_is_incomplete_or_unset_is_refused(text: str, words: str) -> None:
    with pytest.raises(ExpansionError, match=words):
        expand(text, {}, is_plain=True)
