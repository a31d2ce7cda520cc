"""Columns and names of a table that must stay readable whatever stands in it."""

from __future__ import annotations

import io

import pytest

from lem.base.doc import Column, NameShortener, columns, printable, terminal_width, text_width, wrapped
from lem.base.log import paint
from tests.command_rig import on_terminal

LONG = [f"pytorch-tiny-llama-batch_size={size}-max_output_tokens=128-cpu" for size in (1, 16)]


def test_numbers_end_in_one_column_and_names_begin_in_one() -> None:
    assert columns("name", ["a", "bcd"], [Column("n", ("1", "200")), Column("mean\ntok/s", ("3.5", "10.25"))], 80) == [
        "            mean",
        "name    n  tok/s",
        "a       1    3.5",
        "bcd   200  10.25",
    ]


def test_a_long_name_is_wrapped_after_a_separator_into_the_room_that_is_left() -> None:
    lines = columns("name", ["batch_size=1, max_output_tokens=32"], [Column("value", ("1" * 10,))], 36)
    assert lines == [
        "name                         value",
        "batch_size=1,           1111111111",
        "  max_output_tokens=32",
    ]
    assert max(map(text_width, lines)) <= 36


def test_numbers_are_never_cut_where_the_table_cannot_fit() -> None:
    lines = columns("name", ["a name"], [Column("value", ("1" * 70,))], 60)
    assert lines[1] == "a name  " + "1" * 70


def test_wide_letters_take_two_columns() -> None:
    lines = columns("name", ["模型", "ab"], [Column("n", ("1", "2"))], 80)
    assert [text_width(line) for line in lines] == [7, 7, 7]


def test_names_that_do_not_fit_lose_what_they_share_and_it_is_said_once() -> None:
    shortener = NameShortener(LONG, 30)
    assert [shortener(name) for name in LONG] == ["…batch_size=1-…", "…batch_size=16-…"]
    assert shortener("another-name") == "another-name"  # as one without a result yet
    fitting = NameShortener(["demo-a", "demo-b"], 20)
    assert (fitting("demo-a"), fitting.explanation) == ("demo-a", "")
    assert shortener.explanation == (
        "Every name begins with “pytorch-tiny-llama-” and ends with “max_output_tokens=128-cpu”."
    )


@pytest.mark.parametrize("names", [["one-very-long-name-alone"], ["same-long-name", "same-long-name"], []])
def test_one_name_alone_loses_nothing(names: list[str]) -> None:
    assert NameShortener(names, 5).explanation == ""


def test_every_name_keeps_something_of_its_own() -> None:
    names = ["shared-prefix-of-names", "shared-prefix-of-names-more"]
    shortener = NameShortener(names, 10)
    assert len({shortener(name) for name in names}) == 2
    assert all(shortener(name).strip("…") for name in names)
    shortener = NameShortener(["a-long-prefix-of-names-batch_size=16", "a-long-prefix-of-names-batch_size=1"], 10)
    assert (shortener.prefix, shortener.suffix) == ("a-long-prefix-of-names-", "")  # no part of a word


@pytest.mark.parametrize(("columns", "width"), [(None, 80), ("100", 100), ("40", 72), ("500", 120)])
def test_a_width_follows_columns_in_a_pipe_too(
    columns: str | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert terminal_width(io.StringIO()) == width


def test_rows_of_one_section_have_one_heading_and_texts_are_aligned_left() -> None:
    text = Column("kind", ("a", "long", "b"), is_text=True)
    lines = columns("#", ["1", "2", "3"], [text, Column("n", ("1", "20", "3"))], 40, ("x=1", "x=1", "x=2"))
    assert lines == ["#  kind   n", "x=1", "1  a      1", "2  long  20", "x=2", "3  b      3"]


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2J\x07b\n c") == "a�[2J�b c"
    assert "\x1b" not in "".join(wrapped("red \x1b[31m", 80, "note: "))


def test_notes_are_wrapped_under_their_label() -> None:
    assert wrapped("one two three four", 16, "note: ") == ["note: one two", "      three four"]
    assert wrapped("", 20, "note: ") == ["note:"]


def test_a_path_longer_than_the_line_stays_whole_to_be_copied() -> None:
    path = "results/" + "x" * 80
    lines = wrapped(f"left out: {path} (corrupt)", 40, "note  ")
    assert lines == ["note  left out:", f"      {path}", "      (corrupt)"]


def test_colour_is_written_only_where_it_is_wanted() -> None:
    assert on_terminal(paint("x", "bold", is_colour=True)) == "\x1b[1mx\x1b[0m"
    assert paint("x", "bold", is_colour=False) == "x"
    assert paint("", "bold", is_colour=True) == ""


@pytest.mark.parametrize(
    "name",
    ["x" * 90, "日本" * 30, "e\u0301" * 90, "ab" + "日" * 45, "日" * 5],
    ids=["narrow", "wide", "combining", "both", "short"],
)
def test_one_word_longer_than_its_column_is_broken_where_the_columns_end(name: str) -> None:
    lines = columns("name", [name], [Column("n", ("1",))], 40)
    assert max(map(text_width, lines)) <= 40
    assert all(line.strip() for line in lines)
    assert "".join("".join(line.split()) for line in lines[1:]).replace("1", "", 1) == name


def test_a_name_of_any_length_is_wrapped_in_a_time_that_grows_with_it() -> None:
    name = "x" * 1_000_000  # took minutes when each line measured all that was left
    lines = columns("configuration", [name], [], 80)
    assert "".join(line.strip() for line in lines[1:]) == name
    assert max(map(len, lines)) == 80
