"""Expanded text and the values it means."""

from __future__ import annotations

import json
import pickle

from lem.config.kinds import Expanded, as_written, simple
from lem.config.yamlfile import expand


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
    assert as_written(resolved, {"a": secret, "list": [secret, "x"]}) == {
        "a": "${TOKEN}",
        "list": ["${TOKEN}", "x"],
        "default": 3,
    }


def test_expanded_text_survives_pickling():
    text = expand("${A}", {"A": "x"}, is_plain=True)
    again = pickle.loads(pickle.dumps(text))  # noqa: S301
    assert isinstance(again, Expanded)
    assert (again, again.written, again.value) == ("x", "${A}", "x")
