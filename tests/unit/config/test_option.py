"""The declaration engine: what is declared once decides what is read, refused and written back."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest

from lem.base.dataclass import dataclass
from lem.base.errors import ConfigurationError, ExitCode, exit_code_of
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import REQUIRED, ConfigProblems, Expanded, Problem, as_written, dotted, simple
from lem.config.option import Section, check_partial, find_option, merge, option, put, walk
from lem.config.scalars import expand


@dataclass(frozen=True)
class Engine(Section):
    shorthand: ClassVar[str | None] = "name"

    name: str = option(REQUIRED, "Name.", reload=True)
    threads: int | None = option(None, "Threads.", min=1, max=64)


@dataclass(frozen=True)
class Pump(Section):
    switch: ClassVar[str | None] = "enabled"

    enabled: bool = option(False, "On.")
    rate: float = option(1.0, "Rate.", above=0, below=10, unit="1/s")


@dataclass(frozen=True)
class Disk(Section):
    type: str = option("disk", "Kind.", choices=("disk",))
    size: int = option(REQUIRED, "Size.", min=1)


@dataclass(frozen=True)
class Tape(Section):
    type: str = option("tape", "Kind.", choices=("tape",))
    length: float = option(2.0, "Length.")


@dataclass(frozen=True)
class Machine(Section):
    aliases: ClassVar[Mapping[str, str]] = {"engine_name": "engine"}

    engine: Engine = option(REQUIRED, "Engine.")
    low: int = option(0, "Low.")
    high: int = option(10, "High.")
    colour: str = option("red", "Colour.", choices=("red", "green"))
    mode: bool | str = option(False, "Mode.", choices=(False, "fast"))
    label: str | None = option(None, "Label.", identity=False)
    tags: tuple[str, ...] = option((), "Tags.", takes_scalar=True, is_unique=True)
    ports: tuple[str, ...] | None = option(None, "Ports.", takes_scalar=True, takes_integer=True)
    sizes: tuple[int, ...] = option((1,), "Sizes.", min=1, min_items=1)
    extra: Mapping[str, Any] = option({}, "Extra.")
    weights: Mapping[str, float] | None = option(None, "Weights.", max=1)
    pump: Pump = option(Pump(), "Pump.")
    store: Disk | Tape | None = option(None, "Store.")

    def check(self) -> Iterator[Problem]:
        if self.low > self.high:
            yield Problem(("low",), f"{self.low} is above high, {self.high}")


def problems_of(mapping: Any) -> list[str]:
    """The option of each problem, with the suggestion where there is one."""
    with pytest.raises(ConfigProblems) as caught:
        Machine.from_dict(mapping)
    found = caught.value.problems
    return [f"{dotted(item.path)}{f' → {item.suggestion}' if item.suggestion else ''}" for item in found]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (
            {"engine": {"nam": "e", "threads": 0}, "low": "1", "x": 1},
            ["engine.nam → name", "engine.threads", "low", "x"],
        ),
        ({"engine_name": "f"}, ["engine_name"]),
        ({"low": 1.5}, ["low"]),
        ({"low": 11}, ["low"]),  # above high
        ({"low": 11, "high": "x"}, ["high"]),  # options are checked against each other once each is valid
        ({"colour": "gren"}, ["colour → green"]),
        ({"mode": True}, ["mode"]),
        ({"pump": {"rate": 10}}, ["pump.rate", "pump.rate"]),  # out of bounds, and under a switch that is not given
        ({"engine": None}, ["engine"]),
        ({"pump": []}, ["pump"]),
        ({"pump": "on"}, ["pump"]),
        ({"pump": {"enabled": "yes"}}, ["pump.enabled → true"]),
        ({"pump": {"enabled": "off"}}, ["pump.enabled → false"]),
        ({"pump": {"enabled": "true"}}, ["pump.enabled"]),
        ({"pump": {"enabled": 1}}, ["pump.enabled"]),
        ({"pump": {"enabled": None}}, ["pump.enabled"]),
        ({"pump": {"enabled": True, "rate": True}}, ["pump.rate"]),
        ({"pump": {"enabled": True, "rate": 0}}, ["pump.rate"]),
        ({"pump": {"enabled": True, "rate": float("nan")}}, ["pump.rate"]),
        ({"pump": {"enabled": True, "rate": 10**400}}, ["pump.rate"]),
        ({"pump": {"enabled": True, "rate": "1,5"}}, ["pump.rate"]),
        ({"label": 2024}, ["label"]),
        ({"label": False}, ["label"]),
        ({"label": " "}, ["label"]),
        ({"label": "a\0b"}, ["label"]),
        ({"label": ["a"]}, ["label"]),
        ({"engine": {"name": "e", "threads": -(10**5000)}}, ["engine.threads"]),
        ({"engine": {"name": "e", "threads": 10**350}}, ["engine.threads"]),
        ({"sizes": [1, 0, "x"], "tags": ["a", "a"]}, ["sizes[1]", "sizes[2]", "tags[1]"]),
        ({"sizes": []}, ["sizes"]),
        ({"weights": {"a": 2, 5: 1}}, ["weights.a"]),
        ({"weights": {None: 1}}, ["weights"]),
        ({"weights": 1}, ["weights"]),
        ({"extra": {"a": [1, {"b": float("inf")}], "c": object()}}, ["extra.a[1].b", "extra.c"]),
        ({"store": 3}, ["store"]),
        ({"store": {"type": "disc"}}, ["store.type → disk"]),
        ({"store": {"type": 3}}, ["store.type"]),
        ({"store": {"size": 3}}, ["store.type"]),
        ({"store": {"type": "tape", "size": 3}}, ["store.size"]),
        ({"threads": 3}, ["threads → engine.threads"]),
        ({"pump.rate": 3}, ["pump.rate"]),
        ({3: 1}, [""]),
    ],
)
def test_every_problem_is_found_at_once(options: dict[Any, Any], found: list[str]) -> None:
    assert problems_of({"engine": "e", **options}) == found


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("1", "write it without quotes"),
        ("x", "an integer"),
        (1.5, "got 1.5"),
        (10**20, "more than 15 digits"),
        (-(10**5000), "more than 15 digits"),
    ],
    ids=["text", "word", "fraction", "long", "too long to print"],
)
def test_a_message_has_the_value_and_a_remedy(value: Any, words: str) -> None:
    with pytest.raises(ConfigProblems, match=words):
        Engine(name="e", threads=value)


def test_constructing_by_keyword_validates_too() -> None:
    with pytest.raises(ValueError, match=r"colour: expected one of red, green, got .blue.") as caught:
        Machine(engine=Engine(name="e"), colour="blue", low=99)
    assert isinstance(caught.value, ConfigurationError)
    assert exit_code_of(caught.value) == ExitCode.USAGE
    with pytest.raises(ConfigProblems):
        dataclasses.replace(Machine(engine=Engine(name="e")), low=11)


def test_keywords_and_mappings_make_equal_sections():
    by_keyword = Machine(engine=Engine(name="e", threads=2), low=1, tags=("a",), store=Tape(length=3))
    by_mapping = Machine.from_dict(
        {"engine": {"name": "e", "threads": 2}, "low": 1e0, "tags": ["a"], "store": {"type": "tape", "length": 3}}
    )
    assert by_keyword == by_mapping
    assert (type(by_mapping.low), type(by_mapping.store), type(by_mapping.store.length)) == (int, Tape, float)  # type: ignore[union-attr]
    assert (by_mapping.high, by_mapping.colour, by_mapping.pump) == (10, "red", Pump(enabled=False, rate=1.0))


def test_lists_become_tuples_that_equal_lists():
    tags: Any = Machine.from_dict({"engine": "e", "tags": ["a", "b"]}).tags
    plain: Any = ["a", "b"]
    assert tags == plain
    assert plain == tags
    assert tags == ("a", "b")
    assert tags != ["a"]
    assert isinstance(tags, tuple)
    assert hash(tags) == hash(("a", "b"))


def test_a_scalar_is_a_list_of_one_only_where_declared():
    assert Machine.from_dict({"engine": "e", "tags": "a"}).tags == ("a",)
    assert Machine.from_dict({"engine": "e", "ports": 0}).ports == ("0",)
    assert problems_of({"engine": "e", "sizes": 3}) == ["sizes"]


def test_short_form_alias_and_mapping_mean_the_same():
    mappings: list[dict[str, Any]] = [{"engine": "e"}, {"engine": {"name": "e"}}, {"engine_name": "e"}]
    assert len({Machine.from_dict(mapping).engine for mapping in mappings}) == 1


def test_round_trip_through_plain_json_values():
    machine = Machine.from_dict(
        {
            "engine": {"name": "e", "threads": 2},
            "mode": "fast",
            "tags": ["a"],
            "extra": {"deep": [1, {"x": None}]},
            "weights": {"w": 1},
            "pump": {"enabled": True, "rate": 3},
            "store": {"type": "disk", "size": 3},
        }
    )
    document = machine.to_dict()
    assert document["tags"] == ["a"]
    assert type(document["tags"]) is list
    assert Machine.from_dict(document) == machine
    assert Machine.from_dict(document).to_dict() == document


def test_identity_leaves_out_what_cannot_change_numbers():
    assert "label" not in Machine(engine=Engine(name="e"), label="x").identity()
    assert Machine(engine=Engine(name="e"), label="x").identity() == Machine(engine=Engine(name="e")).identity()
    assert Machine(engine=Engine(name="e"), low=1).identity() != Machine(engine=Engine(name="e")).identity()


def test_sections_are_frozen_and_can_be_copied():
    machine = Machine(engine=Engine(name="e"), extra={"a": [1]})
    with pytest.raises(dataclasses.FrozenInstanceError):
        machine.low = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(machine)) == machine  # noqa: S301
    assert copy.deepcopy(machine) == machine
    assert dataclasses.replace(machine, low=3).low == 3


def test_a_part_is_checked_without_what_it_lacks():
    assert check_partial(Machine, {"engine": {"threads": 2}, "low": 99, "pump": {"rate": 2}}) == ()
    assert check_partial(Machine, {"store": {"length": 3}}) == ()
    found = check_partial(Machine, {"engine": {"threads": 0}, "store": {"size": 0}})
    assert [str(item) for item in found] == [
        f"{name}: must be at least 1, got 0" for name in ("engine.threads", "store.size")
    ]


def test_options_are_found_by_dotted_name():
    found = find_option(Machine, "engine_name.threads")
    assert found is not None
    assert found.description == "Threads."
    assert find_option(Machine, "store.length") is not None
    assert find_option(Machine, "engine.nothing") is None
    assert find_option(Machine, "low.deeper") is None


def test_walking_lists_every_option_once_for_each_section():
    names = [name for name, _, _ in walk(Machine)]
    assert names[:4] == ["engine.name", "engine.threads", "low", "high"]
    assert names.count("store.type") == 2


# Layers


@pytest.mark.parametrize(
    ("base", "layer", "merged"),
    [
        (
            {"decoder": {"top_k": 5, "top_p": 0.5}, "gpus": [0, 1]},
            {"decoder": {"top_k": 7}, "gpus": [2]},
            {"decoder": {"top_k": 7, "top_p": 0.5}, "gpus": [2]},
        ),
        ({"model": {"name": "one", "revision": "abc"}}, {"model": "two"}, {"model": {"name": "two"}}),
        ({"model": {"name": "one", "revision": "abc"}}, {"model_name": "two"}, {"model": {"name": "two"}}),
        ({"model": "one"}, {"model": {"revision": "abc"}}, {"model": {"name": "one", "revision": "abc"}}),
        ({"model_name": "one"}, {"model": {"revision": "abc"}}, {"model": {"name": "one", "revision": "abc"}}),
        (
            {"prompts": {"type": "file", "path": "p.txt"}},
            {"prompts": {"type": "synthetic", "input_tokens": 8}},
            {"prompts": {"type": "synthetic", "input_tokens": 8}},
        ),
        (
            {"prompts": {"type": "synthetic", "input_tokens": 8}},
            {"prompts": {"input_tokens": 9}},
            {"prompts": {"type": "synthetic", "input_tokens": 9}},
        ),
        ({"prompts": {"type": "synthetic"}}, {"prompts": "p.txt"}, {"prompts": {"type": "file", "path": "p.txt"}}),
        (
            {"prompts": "p.txt"},
            {"prompts": {"sample_size": 3}},
            {"prompts": {"type": "file", "path": "p.txt", "sample_size": 3}},
        ),
        ({"dataset": "alpaca"}, {"dataset": None}, {"dataset": None}),
        (
            {"extra_metadata": {"a": 1, "b": {"c": 2}}},
            {"extra_metadata": {"b": {"d": 3}}},
            {"extra_metadata": {"a": 1, "b": {"c": 2, "d": 3}}},
        ),
        ({"x": {"y": 1}}, {"x": {"z": 2}}, {"x": {"y": 1, "z": 2}}),  # unknown keys stay for validation
        ({}, {"model": "a", "model_name": "b"}, {"model": {"name": "a"}, "model_name": "b"}),  # and so do both names
    ],
)
def test_a_layer_over_another(base: dict[str, Any], layer: dict[str, Any], merged: dict[str, Any]) -> None:
    before = copy.deepcopy((base, layer))
    assert merge(ExperimentConfig, base, layer) == merged
    assert (base, layer) == before


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ({}, {"model": {"revision": "abc"}}),
        ({"model": "gpt2"}, {"model": {"name": "gpt2", "revision": "abc"}}),
        ({"model": {"name": "gpt2"}}, {"model": {"name": "gpt2", "revision": "abc"}}),
    ],
)
def test_a_dotted_name_is_set_whatever_form_is_below(start: dict[str, Any], expected: dict[str, Any]):
    assert put(ExperimentConfig, start, "model.revision", "abc") == expected


# Expanded text


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
