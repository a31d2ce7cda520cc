"""Kinds of values: how a value is read, checked, written, and described by JSON Schema."""

from __future__ import annotations

import contextlib
import enum
import math
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lem.config.problems import Path, Sink, describe, nearest

# What YAML 1.1 took for a truth value.
_TRUTHS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
# Longer numbers are unreadable, and one above 10**308 cannot be formatted at all.
MAX_SHOWN_DIGITS = 15


class Expanded(str):
    """A text in which `${VAR}` was expanded; it keeps the text as written, for records."""

    __slots__ = ("value", "written")

    written: str
    value: Any  # what it means without quotes, which options of other kinds than text read: 5 for "5"

    def __new__(cls, text: str, written: str, value: Any) -> Expanded:
        self = super().__new__(cls, text)
        self.written, self.value = written, value
        return self

    def __reduce__(self) -> tuple[type[Expanded], tuple[str, str, Any]]:
        return Expanded, (str(self), self.written, self.value)


def simple(value: Any) -> Any:
    """The value that an expanded text means; anything else unchanged."""
    return value.value if isinstance(value, Expanded) else value


def restore_references(resolved: Any, tree: Any) -> Any:
    """A copy of `resolved` in which text from a `${VAR}` in `tree` is as written; records store this."""
    if isinstance(tree, Expanded):
        return tree.written
    if isinstance(resolved, Expanded):
        return resolved.written
    if isinstance(resolved, Mapping):
        trees = tree if isinstance(tree, Mapping) else {}
        return {key: restore_references(value, trees.get(key)) for key, value in resolved.items()}
    if isinstance(resolved, (list, tuple)):
        is_alike = isinstance(tree, (list, tuple)) and len(tree) == len(resolved)
        return [restore_references(value, tree[index] if is_alike else None) for index, value in enumerate(resolved)]
    return resolved


def as_written(tree: Any) -> Any:
    """A copy of plain data with every expanded text as it was written."""
    return restore_references(tree, None)


class Marker(enum.Enum):
    """Values that no configuration contains."""

    INVALID = "INVALID"
    REQUIRED = "REQUIRED"
    UNSET = "UNSET"


INVALID: Any = Marker.INVALID
REQUIRED: Any = Marker.REQUIRED
# The default of every field, which distinguishes a value that was given from one that was left out.
UNSET: Any = Marker.UNSET


# The keywords of JSON Schema for the limits, in the order of `Bounds`.
BOUND_WORDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


@dataclass(frozen=True)
class Bounds:
    """Limits of a number; `above` and `below` are exclusive."""

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None

    @property
    def _limits(self) -> tuple[float | None, ...]:
        return self.minimum, self.above, self.maximum, self.below

    def complaint(self, value: float) -> str | None:
        """What is wrong with a value; None when it is within the limits."""
        for limit, (is_within, words, _) in zip(self._limits, _BOUND_CHECKS, strict=True):
            if limit is not None and not is_within(value, limit):
                return f"must be {words} {_plain(limit)}, got {_plain(value)}"
        return None

    def __str__(self) -> str:
        if self.minimum is not None and self.maximum is not None:
            return f"{_plain(self.minimum)}–{_plain(self.maximum)}"
        checks = zip(self._limits, _BOUND_CHECKS, strict=True)
        return ", ".join(f"{sign} {_plain(limit)}" for limit, (_, _, sign) in checks if limit is not None)

    def json_schema(self) -> dict[str, float]:
        """The limits in the words of JSON Schema."""
        limits = zip(BOUND_WORDS, self._limits, strict=True)
        return {word: limit for word, limit in limits if limit is not None}


_BOUND_CHECKS: Sequence[tuple[Callable[[float, float], bool], str, str]] = (
    (operator.ge, "at least", "≥"),
    (operator.gt, "above", ">"),
    (operator.le, "at most", "≤"),
    (operator.lt, "below", "<"),
)


@dataclass(frozen=True)
class Option:
    """The declaration of an option; its section adds the name and the kind that its type makes."""

    default: Any  # REQUIRED, a value, or a `Section`
    description: str  # one or two sentences for people
    bounds: Bounds = Bounds()
    choices: tuple[Any, ...] = ()  # the only values there are; () when open
    unit: str | None = None
    backends: tuple[str, ...] | None = None  # those that honour it; None for all
    reload: bool = UNSET  # a change needs another engine load; UNSET takes `Section.reloads`
    identity: bool = True  # it can change a measured number
    secret: bool = False  # never shown or logged
    is_width: bool = False  # it bounds how many requests are computed together
    check: Callable[[str], str | None] | None = None  # what is wrong with a text, or None
    form: str = ""  # what a text must look like, in words ("HH:MM")
    takes_scalar: bool = False  # a single value is a list of one
    takes_integer: bool = False  # an integer is taken as text
    min_items: int = 0  # of a list
    is_unique: bool = False  # of a list
    dotted_after: int | None = None  # below this many keys of a mapping, keys are dotted names of options
    name: str = ""
    kind: Kind = UNSET

    @property
    def value_kind(self) -> Kind:
        """The kind of a value that is not null."""
        return self.kind.inner if isinstance(self.kind, NullableKind) else self.kind

    @property
    def sections(self) -> tuple[type[Any], ...]:
        """The sections this option nests: none, one, or its variants."""
        return self.kind.sections


class Kind(ABC):
    """A kind of value."""

    name = "value"  # in the message "expected …"
    label = "value"  # in a table
    sections: tuple[type[Any], ...] = ()  # the sections that a value of this kind is one of

    def __init__(self, item: Option, inner: Kind | None = None) -> None:
        self.item = item
        if inner is not None:
            self.inner = inner
            self.sections = inner.sections

    @abstractmethod
    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        """The normalised value, or INVALID with the problems noted."""

    def dump(self, value: Any, *, is_identity: bool = False) -> Any:  # noqa: ARG002
        """The value as JSON has it, which `read` takes back; or the part of it that can change a measured number."""
        return value

    def refuse(self, value: Any, path: Path, sink: Sink, remedy: str = "", suggestion: str | None = None) -> Any:
        """INVALID, with the problem noted."""
        sink.add(path, f"expected {self.name}, got {describe(value)}{remedy}", suggestion)
        return INVALID


class BoolKind(Kind):
    """True or false, without the other words for them of YAML 1.1."""

    name = "true or false"
    label = "boolean"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        value = simple(value)
        if isinstance(value, bool):
            return value
        word = value.lower() if isinstance(value, str) else ""
        remedy = "; remove the quotes" if word in ("true", "false") else ""
        return self.refuse(value, path, sink, remedy, _TRUTHS.get(word))


class NumberKind(Kind):
    """A number within bounds."""

    def check(self, value: float, path: Path, sink: Sink) -> Any:
        complaint = self.item.bounds.complaint(value)
        if complaint is None:
            return value
        sink.add(path, complaint)
        return INVALID

    def refuse(self, value: Any, path: Path, sink: Sink, remedy: str = "", suggestion: str | None = None) -> Any:
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                float(value.replace("_", "").replace(",", ""))
                remedy = "; write it without quotes, leading zeros or separators"
        return super().refuse(value, path, sink, remedy, suggestion)


class IntKind(NumberKind):
    """An integer; a whole float such as 1e3 is one."""

    name = "an integer"
    label = "integer"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        value = simple(value)
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            return self.refuse(value, path, sink)
        return self.check(value, path, sink)


class FloatKind(NumberKind):
    """A finite number; an integer is one."""

    name = "a number"
    label = "number"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        value = simple(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return self.refuse(value, path, sink)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            sink.add(path, f"expected a finite number, got {describe(value)}")
            return INVALID
        return self.check(number, path, sink)


class TextKind(Kind):
    """Text that is not blank."""

    name = "text"
    label = "text"

    def __init__(self, item: Option) -> None:
        super().__init__(item)
        if item.form:
            self.name = self.label = item.form

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        if isinstance(value, int) and not isinstance(value, bool) and self.item.takes_integer:
            value = str(value)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            shown = str(value).lower() if isinstance(value, bool) else value
            remedy = f'; quote it: "{shown}"' if isinstance(value, (int, float)) else ""
            return self.refuse(value, path, sink, remedy)
        if not value.strip():
            complaint: str | None = "must not be empty"
        elif "\0" in value:
            complaint = "must not contain a NUL character"
        else:
            complaint = self.item.check(value) if self.item.check is not None else None
        if complaint is not None:
            sink.add(path, complaint)
            return INVALID
        return str(value)


class ChoiceKind(Kind):
    """One of a few values."""

    def __init__(self, item: Option) -> None:
        super().__init__(item)
        self._words = [choice for choice in item.choices if isinstance(choice, str)]
        names = (str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in item.choices)
        self.name = f"one of {', '.join(names)}"
        self.label = "text" if len(self._words) == len(item.choices) else "boolean or text"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        value = simple(value)
        if isinstance(value, str):
            value = str(value)
        for choice in self.item.choices:
            if type(value) is type(choice) and value == choice:
                return choice
        near = nearest(value, self._words, cutoff=0.5) if isinstance(value, str) else None
        return self.refuse(value, path, sink, suggestion=near)


def _plain(number: float) -> str:
    """A number without exponent or needless decimals."""
    if abs(number) >= 10**MAX_SHOWN_DIGITS:
        return f"a number of more than {MAX_SHOWN_DIGITS} digits"
    return f"{number:.0f}" if number == number // 1 else str(number)


T = TypeVar("T")


class Items(tuple[T, ...], Generic[T]):
    """A tuple that also equals a list of the same items, since scripts compare with lists."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, tuple(other) if isinstance(other, list) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


class NullableKind(Kind):
    """A value or null."""

    def __init__(self, item: Option, inner: Kind) -> None:
        super().__init__(item, inner)
        self.name, self.label = inner.name, inner.label

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        return None if simple(value) is None else self.inner.read(value, path, sink)

    def dump(self, value: Any, *, is_identity: bool = False) -> Any:
        return None if value is None else self.inner.dump(value, is_identity=is_identity)


class ListKind(Kind):
    """A list of one kind."""

    name = "a list"

    def __init__(self, item: Option, inner: Kind) -> None:
        super().__init__(item, inner)
        self.label = f"list of {inner.label}"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        if not isinstance(value, (list, tuple)):
            if not self.item.takes_scalar or value is None or isinstance(value, Mapping):
                remedy = "; put it in brackets: [ ]" if isinstance(value, (str, int, float)) else ""
                return self.refuse(value, path, sink, remedy)
            read = self.inner.read(value, path, sink)
            return INVALID if read is INVALID else Items((read,))
        if len(value) < self.item.min_items:
            sink.add(
                path, f"must have at least {self.item.min_items} {'item' if self.item.min_items == 1 else 'items'}"
            )
            return INVALID
        items = [self.inner.read(item, (*path, index), sink) for index, item in enumerate(value)]
        if any(item is INVALID for item in items):
            return INVALID
        if self.item.is_unique:
            for index, item in enumerate(items):
                if item in items[:index]:
                    sink.add((*path, index), f"duplicate item {item!r}")
                    return INVALID
        return Items(items)

    def dump(self, value: Any, *, is_identity: bool = False) -> Any:
        return [self.inner.dump(item, is_identity=is_identity) for item in value]


class MapKind(Kind):
    """A mapping from text to one kind; an integer key is taken as its digits."""

    name = "a mapping"

    def __init__(self, item: Option, inner: Kind) -> None:
        super().__init__(item, inner)
        self.label = "mapping" if isinstance(inner, AnyKind) else f"mapping to {inner.label}"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        if not isinstance(value, Mapping):
            return self.refuse(value, path, sink)
        out: dict[str, Any] = {}
        for key, item in value.items():
            if isinstance(key, int) and not isinstance(key, bool):
                key = str(key)
            if not isinstance(key, str):
                sink.add(path, f"expected a text key, got {describe(key)}")
                continue
            out[str(key)] = self.inner.read(item, (*path, str(key)), sink)
        return INVALID if any(item is INVALID for item in out.values()) else out

    def dump(self, value: Any, *, is_identity: bool = False) -> Any:
        return {key: self.inner.dump(item, is_identity=is_identity) for key, item in value.items()}


class AnyKind(Kind):
    """Anything that JSON can hold; lists become `Items`, and text keeps its `${VAR}` for records."""

    name = "a JSON value"
    label = "any value"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return _FINITE.read(value, path, sink)
        if isinstance(value, (list, tuple)):
            return _LIST_OF_ANY.read(value, path, sink)
        if isinstance(value, Mapping):
            return _MAPPING_OF_ANY.read(value, path, sink)
        return self.refuse(value, path, sink)

    def dump(self, value: Any, *, is_identity: bool = False) -> Any:  # noqa: ARG002
        if isinstance(value, Mapping):
            return _MAPPING_OF_ANY.dump(value)
        if isinstance(value, (list, tuple)):
            return _LIST_OF_ANY.dump(value)
        return str(value) if isinstance(value, str) else value


_FREE = Option(None, "")
_FINITE, _LIST_OF_ANY, _MAPPING_OF_ANY = (
    FloatKind(_FREE),
    ListKind(_FREE, AnyKind(_FREE)),
    MapKind(_FREE, AnyKind(_FREE)),
)
