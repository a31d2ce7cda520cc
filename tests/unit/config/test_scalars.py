"""Plain words and `${VAR}`."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from lem.config.kinds import Expanded, as_written, restore_references, simple
from lem.config.yamlfile import ExpansionError, expand, resolve_plain


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


def test_a_number_of_thousands_of_digits_does_no_harm():
    assert isinstance(resolve_plain("9" * 100_000), float)


def test_variables_expand_with_defaults():
    environ = {"A": "1", "EMPTY": ""}
    text = "${A}-${B:-b}-${EMPTY:-e}-${EMPTY}-$${A}-$A"
    assert expand(text, environ, is_plain=True) == "1-b-e--${A}-$A"


def test_what_a_variable_holds_is_not_expanded_again():
    assert expand("${A}", {"A": "${B}"}, is_plain=True) == "${B}"


@pytest.mark.parametrize("text", ["${", "${}", "${1A}", "a ${B c"])
def test_a_reference_that_is_none_is_refused(text: str):
    with pytest.raises(ExpansionError, match=r"write \$\$\{"):
        expand(text, {}, is_plain=True)


def test_an_unset_variable_without_default_is_named():
    with pytest.raises(ExpansionError, match="HF_HOME_X is not set"):
        expand("${HF_HOME_X}/a", {}, is_plain=True)


def test_text_without_references_stays_a_plain_string():
    assert type(expand("plain", {}, is_plain=True)) is str


def test_an_expanded_plain_word_stands_for_a_number_but_a_quoted_one_does_not():
    assert simple(expand("${N}", {"N": "5"}, is_plain=True)) == 5
    assert simple(expand("${N}", {"N": "5"}, is_plain=False)) == "5"
    assert simple("5") == "5"


def test_records_get_the_text_as_written():
    secret = expand("${TOKEN}", {"TOKEN": "hunter2"}, is_plain=True)
    tree = {"a": [secret, {"b": secret}], "c": 1}
    assert as_written(tree) == {"a": ["${TOKEN}", {"b": "${TOKEN}"}], "c": 1}
    assert "hunter2" not in json.dumps(as_written(tree))


def test_references_are_put_back_into_what_was_resolved():
    secret = expand("${TOKEN}", {"TOKEN": "hunter2"}, is_plain=True)
    resolved = {"a": "hunter2", "list": ["hunter2", "x"], "default": 3}
    assert restore_references(resolved, {"a": secret, "list": [secret, "x"]}) == {
        "a": "${TOKEN}",
        "list": ["${TOKEN}", "x"],
        "default": 3,
    }


def test_expanded_text_survives_pickling():
    text = expand("${A}", {"A": "x"}, is_plain=True)
    again = pickle.loads(pickle.dumps(text))  # noqa: S301
    assert isinstance(again, Expanded)
    assert (again, again.written, again.value) == ("x", "${A}", "x")
