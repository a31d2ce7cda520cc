# ruff: noqa: RUF009 - `option` makes a dataclass field, as `dataclasses.field` does
"""The declaration engine: what is declared once decides what is read, refused and written back."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from lem.base.errors import ConfigurationError, ExitCode, exit_code_of
from lem.config.kinds import REQUIRED, Items
from lem.config.option import Section, check_partial, declared, find_option, option, walk
from lem.config.problems import ConfigProblems, Problem


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
    with pytest.raises(ConfigProblems) as caught:
        Machine.from_dict(mapping)
    return [str(problem) for problem in caught.value.problems]


def test_defaults_fill_what_is_left_out():
    machine = Machine(engine="e")  # type: ignore[arg-type]
    assert (machine.low, machine.high, machine.colour, machine.mode) == (0, 10, "red", False)
    assert machine.pump == Pump(enabled=False, rate=1.0)
    assert machine.store is None


def test_keywords_and_mappings_make_equal_sections():
    by_keyword = Machine(engine=Engine(name="e", threads=2), tags=("a",), store=Tape(length=3))
    by_mapping = Machine.from_dict(
        {"engine": {"name": "e", "threads": 2}, "tags": ["a"], "store": {"type": "tape", "length": 3}}
    )
    assert by_keyword == by_mapping


def test_lists_become_tuples_that_equal_lists():
    tags: Any = Machine.from_dict({"engine": "e", "tags": ["a", "b"]}).tags
    plain: Any = ["a", "b"]
    assert tags == plain
    assert plain == tags
    assert tags == ("a", "b")
    assert tags != ["a"]
    assert isinstance(tags, tuple)
    assert hash(tags) == hash(("a", "b"))


def test_integers_become_floats_where_a_number_is_due_and_whole_floats_integers():
    assert type(Pump.from_dict({"enabled": True, "rate": 2}).rate) is float
    low = Machine.from_dict({"engine": "e", "low": 1e1}).low
    assert low == 10
    assert type(low) is int


def test_a_scalar_is_a_list_of_one_only_where_declared():
    assert Machine.from_dict({"engine": "e", "tags": "a"}).tags == ("a",)
    assert Machine.from_dict({"engine": "e", "ports": 0}).ports == ("0",)
    assert problems_of({"engine": "e", "sizes": 3}) == [
        "sizes: a list is due, got the number 3; put it in brackets: [ ]"
    ]


def test_short_form_alias_and_mapping_mean_the_same():
    mappings: list[dict[str, Any]] = [{"engine": "e"}, {"engine": {"name": "e"}}, {"engine_name": "e"}]
    assert len({Machine.from_dict(mapping).engine for mapping in mappings}) == 1


def test_an_option_under_two_names_is_refused():
    assert problems_of({"engine": "e", "engine_name": "f"}) == [
        "engine_name: is given twice, since engine_name is another name of engine"
    ]


def test_every_problem_is_listed_at_once():
    found = problems_of(
        {"engine": {"nam": "e", "threads": 0}, "low": "1", "colour": "gren", "mode": True, "pump": {"rate": 10}, "x": 1}
    )
    assert found == [
        "engine.nam: unknown key (did you mean 'name'?)",
        "engine.threads: must be at least 1, got 0",
        "engine.name: is required",
        "low: an integer is due, got the text '1'; write the plain number, without quotes, leading zeros or separators",
        "colour: 'gren' is not one of red, green (did you mean 'green'?)",
        "mode: one of false, fast is due, got true",
        "pump.rate: must be below 10, got 10",
        "pump.rate: has no effect while pump.enabled is not given; add enabled: true (or false)",
        "x: unknown key",
    ]


def test_constructing_by_keyword_validates_too():
    with pytest.raises(ValueError, match=r"colour: 'blue' is not one of red, green") as caught:
        Machine(engine=Engine(name="e"), colour="blue", low=99)
    assert isinstance(caught.value, ConfigurationError)
    assert exit_code_of(caught.value) == ExitCode.USAGE


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (None, "a mapping is due, got nothing (null); leave the line out to have the defaults"),
        ([], "a mapping is due, got an empty list"),
        ("on", "a mapping is due, got the text 'on'"),
        ({"enabled": "yes"}, "true or false is due, got the text 'yes' (did you mean 'true'?)"),
        ({"enabled": "off"}, "true or false is due, got the text 'off' (did you mean 'false'?)"),
        ({"enabled": "true"}, "true or false is due, got the text 'true'; leave the quotes out"),
        ({"enabled": 1}, "true or false is due, got the number 1"),
        ({"enabled": None}, "true or false is due, got nothing (null)"),
        ({"enabled": True, "rate": True}, "a number is due, got true"),
        ({"enabled": True, "rate": 0}, "must be above 0, got 0"),
        ({"enabled": True, "rate": float("nan")}, "a finite number is due, got the number nan"),
        ({"enabled": True, "rate": 10**400}, "a finite number is due, got the number"),
        ({"enabled": True, "rate": "1,5"}, "a number is due, got the text '1,5'; write the plain number"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_due(value: Any, complaint: str):
    (found,) = problems_of({"engine": "e", "pump": value})
    assert complaint in found


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (2024, 'text is due, got the number 2024; in quotes it is text: "2024"'),
        (False, 'text is due, got false; in quotes it is text: "false"'),
        ("", "must not be empty"),
        (" ", "must not be empty"),
        ("a\0b", "must not hold a NUL character"),
        (["a"], "text is due, got a list"),
    ],
)
def test_text_is_never_guessed_from_something_else(value: Any, complaint: str):
    assert problems_of({"engine": "e", "label": value}) == [f"label: {complaint}"]


def test_an_integer_with_a_fraction_is_refused():
    assert problems_of({"engine": "e", "low": 1.5}) == ["low: an integer is due, got the number 1.5"]


@pytest.mark.parametrize("value", [10**20, 10**350, -(10**5000)], ids=["long", "no float", "no text"])
def test_a_number_out_of_bounds_is_refused_however_long_it_is(value: int):
    (found,) = problems_of({"engine": {"name": "e", "threads": value}})
    bound = "at least 1" if value < 0 else "at most 64"
    assert found == f"engine.threads: must be {bound}, got a number of more than 15 digits"


def test_items_of_lists_and_mappings_are_checked_one_by_one():
    found = problems_of({"engine": "e", "sizes": [1, 0, "x"], "tags": ["a", "a"], "weights": {"a": 2, 5: 1}})
    assert found == [
        "sizes[1]: must be at least 1, got 0",
        "sizes[2]: an integer is due, got the text 'x'",
        "tags[1]: 'a' is in the list twice",
        "weights.a: must be at most 1, got 2",
    ]
    assert problems_of({"engine": "e", "sizes": []}) == ["sizes: must have at least 1 item"]


def test_integer_keys_of_a_mapping_are_text():
    assert Machine.from_dict({"engine": "e", "weights": {5: 1}}).weights == {"5": 1.0}


def test_free_values_are_what_json_can_hold():
    assert problems_of({"engine": "e", "extra": {"a": [1, {"b": float("inf")}], "c": object()}}) == [
        "extra.a[1].b: a finite number is due, got the number inf",
        "extra.c: a value that JSON can hold is due, got a object",
    ]


def test_variants_are_told_apart_by_type():
    store = Machine.from_dict({"engine": "e", "store": {"type": "disk", "size": 3}}).store
    assert store == Disk(size=3)
    assert problems_of({"engine": "e", "store": {"type": "disc"}}) == [
        "store.type: one of disk, tape is due, got 'disc' (did you mean 'disk'?)"
    ]
    assert problems_of({"engine": "e", "store": {"size": 3}}) == ["store.type: is required: one of disk, tape"]
    assert problems_of({"engine": "e", "store": {"type": "tape", "size": 3}}) == ["store.size: unknown key"]


def test_a_key_of_a_nested_section_is_found_from_above():
    assert problems_of({"engine": "e", "threads": 3}) == ["threads: unknown key (did you mean 'engine.threads'?)"]


def test_a_dotted_key_is_told_to_nest():
    assert problems_of({"engine": "e", "pump.rate": 3}) == ["pump.rate: unknown key; nest it: pump: rate: …"]


def test_fields_are_held_against_each_other_once_each_is_right():
    assert problems_of({"engine": "e", "low": 11}) == ["low: 11 is above high, 10"]
    assert problems_of({"engine": "e", "low": 11, "high": "x"}) == ["high: an integer is due, got the text 'x'"]


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


def test_defaults_round_trip_too():
    machine = Machine(engine=Engine(name="e"))
    assert Machine.from_dict(machine.to_dict()) == machine


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


def test_replacing_validates():
    with pytest.raises(ConfigProblems):
        dataclasses.replace(Machine(engine=Engine(name="e")), low=11)


def test_a_default_mapping_is_not_shared():
    first, second = Machine(engine=Engine(name="a")), Machine(engine=Engine(name="b"))
    assert first.extra is not second.extra


def test_a_part_is_checked_without_what_it_lacks():
    assert check_partial(Machine, {"engine": {"threads": 2}, "low": 99, "pump": {"rate": 2}}) == ()
    (found,) = check_partial(Machine, {"engine": {"threads": 0}})
    assert str(found) == "engine.threads: must be at least 1, got 0"


def test_a_part_of_a_variant_is_held_against_all_of_them():
    assert check_partial(Machine, {"store": {"length": 3}}) == ()
    assert [str(item) for item in check_partial(Machine, {"store": {"size": 0}})] == [
        "store.size: must be at least 1, got 0"
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


def test_declarations_keep_their_order():
    assert list(declared(Engine)) == ["name", "threads"]


def test_items_compare_like_the_sequences_they_stand_for():
    assert Items(()) == []
    assert Items((1, 2)) != (1,)
    assert Items((1, 2)) != [2, 1]
    assert Items((1,)) != "1"
