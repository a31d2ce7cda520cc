"""lem's `dataclass`, beside the one of the standard library."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import pprint
from dataclasses import KW_ONLY
from types import ModuleType
from typing import Any, ClassVar

import pytest

from lem.base import dataclass as ours
from lem.base.dataclass import dataclass


def described(module: ModuleType) -> dict[str, Any]:
    """Classes with everything that lem's dataclasses use."""
    decorate, field = module.dataclass, module.field

    @decorate(frozen=True)
    class Base:
        name: str
        size: int = 3
        kind: ClassVar[str] = "a"

        @property
        def double(self) -> int:
            return 2 * self.size

    @decorate(frozen=True)
    class Derived(Base):
        """A docstring."""

        parts: tuple[int, ...] = ()
        note: str = field(default="", compare=False)
        secret: str = field(default="s", repr=False)
        facts: dict[str, int] = field(default_factory=dict, kw_only=True)

        def __hash__(self) -> int:
            return 7

    @decorate
    class Changing:
        items: list[int]
        _: KW_ONLY
        limit: int = 2
        count: int = field(default=0, init=False)
        seen: list[int] = field(default_factory=list, init=False)

        def __post_init__(self) -> None:
            self.count = len(self.items)

    @decorate(frozen=True)
    class Own:  # noqa: PLW1641 - the decorator adds `__hash__`
        value: int

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Own) and abs(self.value - other.value) < 2

    @decorate(frozen=True)
    class Empty:
        pass

    @decorate(eq=False, repr=False)
    class Plain:
        value: int

    @decorate(frozen=True, slots=True)
    class Slim:
        name: str
        size: int = 3

    return {kind.__name__: kind for kind in (Base, Derived, Changing, Own, Empty, Plain, Slim)}


MANY = 100  # instances; the first ones are made without compiled code
OURS, STANDARD = described(ours), described(dataclasses)


@pytest.mark.parametrize("name", OURS)
def test_the_class_is_described_alike(name: str) -> None:
    ours, standard = OURS[name], STANDARD[name]
    assert dataclasses.is_dataclass(ours)
    assert [str(item) for item in dataclasses.fields(ours)] == [str(item) for item in dataclasses.fields(standard)]
    assert ours.__doc__ == (standard.__doc__ if standard.__doc__ == "A docstring." else None)
    assert vars(ours)["__match_args__"] == vars(standard)["__match_args__"]
    for method in ("__eq__", "__hash__", "__repr__", "__setattr__"):
        assert (getattr(ours, method) is getattr(object, method, None)) == (
            getattr(standard, method) is getattr(object, method, None)
        ), method


CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("Base", ("x",), {}),
    ("Base", ("x", 4), {}),
    ("Base", (), {"size": 5, "name": "y"}),
    ("Base", (), {}),
    ("Base", ("x", 1, 2), {}),
    ("Base", ("x",), {"nothing": 1}),
    ("Derived", ("x", 1, (2, 3), "note", "hidden"), {"facts": {"a": 1}}),
    ("Derived", ("x", 1, (), "", "", {}), {}),
    ("Changing", ([1, 2],), {"limit": 5}),
    ("Changing", ([1, 2], 5), {}),
    ("Changing", ([1],), {"count": 1}),
    ("Own", (1,), {}),
    ("Empty", (), {}),
    ("Slim", ("x",), {}),
    ("Slim", (1, 2, 3), {}),
]


def outcome(kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The attributes and text of an instance, or the error."""
    try:
        made = kind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return {item.name: getattr(made, item.name) for item in dataclasses.fields(made)}, repr(made)


@pytest.mark.parametrize(("name", "args", "kwargs"), CALLS)
def test_instances_are_made_and_shown_alike(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for _ in range(MANY):
        assert outcome(OURS[name], args, kwargs) == outcome(STANDARD[name], args, kwargs)


def test_pprint_shows_a_long_instance() -> None:
    made = OURS["Derived"]("x" * 50, 1, (2, 3), "y" * 50)
    assert pprint.pformat(made) == repr(made)


def test_a_frozen_instance_does_not_change() -> None:
    made = OURS["Derived"]("x")
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'size'"):
        made.size = 4
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'size'"):
        del made.size
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.other = 4
    changing = OURS["Changing"]([1])
    changing.limit = 9
    assert changing.limit == 9


def test_equality_and_hashes_are_those_of_the_compared_fields() -> None:
    derived, base, own = OURS["Derived"], OURS["Base"], OURS["Own"]
    assert derived("x", note="a") == derived("x", note="b") != derived("y")
    assert base("x") != derived("x")
    assert len({base("x"), base("x"), base("x", 4)}) == 2
    assert hash(derived("x")) == 7
    assert own(1) == own(2) != own(4)
    assert hash(own(1)) == hash(own(1))
    assert len({OURS["Empty"](), OURS["Empty"]()}) == 1
    assert OURS["Changing"]([1]) == OURS["Changing"]([1])
    with pytest.raises(TypeError, match="unhashable"):
        hash(OURS["Changing"]([1]))
    assert OURS["Plain"](1) != OURS["Plain"](1)


def test_factories_give_each_instance_its_own_value() -> None:
    first, second = OURS["Changing"]([]), OURS["Changing"]([])
    first.seen.append(1)
    assert (first.seen, second.seen) == ([1], [])


@dataclass(frozen=True)
class Kept:
    name: str
    parts: tuple[Kept, ...] = ()


@dataclass(frozen=True, slots=True)
class Slim:
    name: str
    parts: tuple[int, ...] = ()


def test_a_class_with_slots_has_nothing_else() -> None:
    slim = Slim("a", (1,))
    assert not hasattr(slim, "__dict__")
    assert pickle.loads(pickle.dumps(slim)) == copy.deepcopy(slim) == slim == Slim("a", parts=(1,))  # noqa: S301
    assert dataclasses.replace(slim, name="b") == Slim("b", (1,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        slim.name = "b"  # type: ignore[misc]


def test_instances_are_copied_replaced_and_pickled() -> None:
    kept = Kept("a", (Kept("b"),))
    assert pickle.loads(pickle.dumps(kept)) == copy.deepcopy(kept) == kept  # noqa: S301
    assert dataclasses.replace(kept, name="c") == Kept("c", (Kept("b"),))
    assert dataclasses.asdict(kept) == {"name": "a", "parts": ({"name": "b", "parts": ()},)}


def test_a_signature_is_shown_before_and_after_the_first_instance() -> None:
    @dataclass(frozen=True)
    class Shown:
        name: str
        size: int = 3

    @dataclass(frozen=True)
    class Longer(Shown):
        more: str = ""

    before = str(inspect.signature(Longer)), str(inspect.signature(Shown))
    for _ in range(MANY):
        assert (Longer("a").size, Shown("a").size) == (3, 3)
    assert before == (str(inspect.signature(Longer)), str(inspect.signature(Shown)))
    assert before == ("(name, size=3, more='')", "(name, size=3)")
    assert Shown.__init__.__module__ == __name__
