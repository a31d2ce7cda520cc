"""Kinds of values: how a value is read, checked, written, and described by JSON Schema."""

from __future__ import annotations

import contextlib
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


class _Invalid:
    def __repr__(self) -> str:
        return "INVALID"


INVALID: Any = _Invalid()


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


class Kind(ABC):
    """A kind of value."""

    name = "value"  # in the message "… is due"
    label = "value"  # in a table

    @abstractmethod
    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        """The normalised value, or INVALID with the problems noted."""

    def dump(self, value: Any) -> Any:
        """The value as JSON has it; `read` takes it back."""
        return value

    def identity(self, value: Any) -> Any:
        """The part of the value that can change a measured number."""
        return self.dump(value)

    def due(self, value: Any, path: Path, sink: Sink, remedy: str = "", suggestion: str | None = None) -> Any:
        """INVALID, with the problem noted that a value of another kind was given."""
        sink.add(path, f"{self.name} is due, got {describe(value)}{remedy}", suggestion)
        return INVALID


class BoolKind(Kind):
    """True or false, and no other word for them."""

    name = "true or false"
    label = "boolean"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        value = simple(value)
        if isinstance(value, bool):
            return value
        word = value.lower() if isinstance(value, str) else ""
        remedy = "; leave the quotes out" if word in ("true", "false") else ""
        return self.due(value, path, sink, remedy, _TRUTHS.get(word))


class NumberKind(Kind):
    """A number within bounds."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds

    def check(self, value: float, path: Path, sink: Sink) -> Any:
        complaint = self.bounds.complaint(value)
        if complaint is None:
            return value
        sink.add(path, complaint)
        return INVALID

    def due(self, value: Any, path: Path, sink: Sink, remedy: str = "", suggestion: str | None = None) -> Any:
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                float(value.replace("_", "").replace(",", ""))
                remedy = "; write the plain number, without quotes, leading zeros or separators"
        return super().due(value, path, sink, remedy, suggestion)


class IntKind(NumberKind):
    """An integer; a whole float such as 1e3 is one."""

    name = "an integer"
    label = "integer"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        value = simple(value)
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            return self.due(value, path, sink)
        return self.check(value, path, sink)


class FloatKind(NumberKind):
    """A finite number; an integer is one."""

    name = "a number"
    label = "number"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        value = simple(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return self.due(value, path, sink)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            sink.add(path, f"a finite number is due, got {describe(value)}")
            return INVALID
        return self.check(number, path, sink)


class TextKind(Kind):
    """Text that is not blank."""

    name = "text"
    label = "text"

    def __init__(
        self,
        check: Callable[[str], str | None] | None = None,  # what is wrong with a text, or None
        *,
        form: str = "",  # what a text must look like, in words
        takes_integer: bool = False,  # an integer is taken as its digits (GPU indexes among UUIDs)
    ) -> None:
        self._check = check
        self.takes_integer = takes_integer
        if form:
            self.name = self.label = form

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        if isinstance(value, int) and not isinstance(value, bool) and self.takes_integer:
            value = str(value)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            shown = str(value).lower() if isinstance(value, bool) else value
            remedy = f'; in quotes it is text: "{shown}"' if isinstance(value, (int, float)) else ""
            return self.due(value, path, sink, remedy)
        if not value.strip():
            complaint: str | None = "must not be empty"
        elif "\0" in value:
            complaint = "must not hold a NUL character"
        else:
            complaint = self._check(value) if self._check is not None else None
        if complaint is not None:
            sink.add(path, complaint)
            return INVALID
        return str(value)


class ChoiceKind(Kind):
    """One of a few values."""

    def __init__(self, choices: Sequence[Any]) -> None:
        self.choices = tuple(choices)
        self._words = [choice for choice in self.choices if isinstance(choice, str)]
        names = (str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in self.choices)
        self.name = f"one of {', '.join(names)}"
        self.label = "text" if len(self._words) == len(self.choices) else "boolean or text"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        value = simple(value)
        if isinstance(value, str):
            value = str(value)
        for choice in self.choices:
            if type(value) is type(choice) and value == choice:
                return choice
        if not isinstance(value, str):
            return self.due(value, path, sink)
        sink.add(path, f"{value!r} is not {self.name}", nearest(value, self._words, cutoff=0.5))
        return INVALID


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

    def __init__(self, inner: Kind) -> None:
        self.inner = inner
        self.name, self.label = inner.name, inner.label

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        return None if simple(value) is None else self.inner.read(value, path, sink)

    def dump(self, value: Any) -> Any:
        return None if value is None else self.inner.dump(value)

    def identity(self, value: Any) -> Any:
        return None if value is None else self.inner.identity(value)


class ListKind(Kind):
    """A list of one kind."""

    name = "a list"

    def __init__(
        self,
        inner: Kind,
        *,
        min_items: int = 0,
        takes_scalar: bool = False,  # a single value is a list of one
        is_unique: bool = False,  # no value twice
    ) -> None:
        self.inner = inner
        self.label = f"list of {inner.label}"
        self.min_items = min_items
        self.takes_scalar = takes_scalar
        self.is_unique = is_unique

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        if not isinstance(value, (list, tuple)):
            if not self.takes_scalar or value is None or isinstance(value, Mapping):
                remedy = "; put it in brackets: [ ]" if isinstance(value, (str, int, float)) else ""
                return self.due(value, path, sink, remedy)
            read = self.inner.read(value, path, sink)
            return INVALID if read is INVALID else Items((read,))
        if len(value) < self.min_items:
            sink.add(path, f"must have at least {self.min_items} {'item' if self.min_items == 1 else 'items'}")
            return INVALID
        items = [self.inner.read(item, (*path, index), sink) for index, item in enumerate(value)]
        if any(item is INVALID for item in items):
            return INVALID
        if self.is_unique:
            for index, item in enumerate(items):
                if item in items[:index]:
                    sink.add((*path, index), f"{item!r} is in the list twice")
                    return INVALID
        return Items(items)

    def dump(self, value: Any) -> Any:
        return [self.inner.dump(item) for item in value]

    def identity(self, value: Any) -> Any:
        return [self.inner.identity(item) for item in value]


class MapKind(Kind):
    """A mapping from text to one kind; an integer key is taken as its digits."""

    name = "a mapping"

    def __init__(self, inner: Kind) -> None:
        self.inner = inner
        self.label = "mapping" if isinstance(inner, AnyKind) else f"mapping to {inner.label}"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        if not isinstance(value, Mapping):
            return self.due(value, path, sink)
        out: dict[str, Any] = {}
        for key, item in value.items():
            if isinstance(key, int) and not isinstance(key, bool):
                key = str(key)
            if not isinstance(key, str):
                sink.add(path, f"a key must be text, got {describe(key)}")
                continue
            out[str(key)] = self.inner.read(item, (*path, str(key)), sink)
        return INVALID if any(item is INVALID for item in out.values()) else out

    def dump(self, value: Any) -> Any:
        return {key: self.inner.dump(item) for key, item in value.items()}


class AnyKind(Kind):
    """Anything that JSON can hold; lists become `Items`, and text keeps its `${VAR}` for records."""

    name = "a value that JSON can hold"
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
        return self.due(value, path, sink)

    def dump(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _MAPPING_OF_ANY.dump(value)
        if isinstance(value, (list, tuple)):
            return _LIST_OF_ANY.dump(value)
        return str(value) if isinstance(value, str) else value


_FINITE, _LIST_OF_ANY, _MAPPING_OF_ANY = FloatKind(Bounds()), ListKind(AnyKind()), MapKind(AnyKind())


class SectionKind(Kind):
    """A nested section (a class of `lem.config.option`)."""

    name = "a mapping"
    label = "section"

    def __init__(self, section: Any) -> None:
        self.section = section

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        return value if isinstance(value, self.section) else self.section.read(value, path, sink)

    def dump(self, value: Any) -> Any:
        return value.to_dict()

    def identity(self, value: Any) -> Any:
        return value.identity()


class VariantKind(SectionKind):
    """One of several sections, distinguished by their option `type`."""

    def __init__(self, variants: Mapping[str, Any]) -> None:
        self.variants = variants
        super().__init__(tuple(variants.values()))

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        if isinstance(value, self.section):
            return value
        if not isinstance(value, Mapping):
            return self.due(value, path, sink)
        names = ", ".join(self.variants)
        if "type" not in value:
            if sink.is_partial:
                return self._read_untyped(value, path, sink)
            sink.add((*path, "type"), f"is required: one of {names}", is_about_key=True)
            return INVALID
        kind = value["type"]
        if not isinstance(kind, str) or str(kind) not in self.variants:
            got = repr(str(kind)) if isinstance(kind, str) else describe(kind)
            near = nearest(kind, list(self.variants)) if isinstance(kind, str) else None
            sink.add((*path, "type"), f"one of {names} is due, got {got}", near)
            return INVALID
        return self.variants[str(kind)].read(value, path, sink)

    def _read_untyped(self, value: Mapping[str, Any], path: Path, sink: Sink) -> Any:
        """Check a part of a variant against every variant, and keep the problems of the best fit."""
        sinks = []
        for section in self.variants.values():
            sinks.append(Sink(is_partial=True))
            section.read(value, path, sinks[-1])
        best = min(sinks, key=lambda tried: len(tried.problems))
        sink.problems.extend(best.problems)
        return INVALID if best.problems else dict(value)
