"""Types of options: how a value is parsed, checked, described and written."""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lem.config.problems import Path, Sink, describe, nearest

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEAN = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# No leading zeros: 010 is 8 in YAML 1.1 and 10 in YAML 1.2, so it is neither here.
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,400})")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}

_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")


class ExpansionError(ValueError):
    """A `${VAR}` that cannot be expanded."""


class Expanded(str):
    """A text in which `${VAR}` was expanded.

    Attributes:
        written: the text as written, which is what records hold.
        is_plain: it was written without quotes, so it may stand for a number or true or false.
    """

    __slots__ = ("is_plain", "written")

    written: str
    is_plain: bool

    def __new__(cls, text: str, written: str, *, is_plain: bool) -> Expanded:
        self = super().__new__(cls, text)
        self.written = written
        self.is_plain = is_plain
        return self

    def __reduce__(self) -> tuple[Callable[..., Expanded], tuple[str, str, bool]]:
        return _expanded, (str(self), self.written, self.is_plain)


def _expanded(text: str, written: str, is_plain: bool) -> Expanded:
    return Expanded(text, written, is_plain=is_plain)


def resolve_plain(text: str) -> Any:
    """The value of a word written without quotes: None, a bool, an int, a float, or the text itself."""
    if text in _NULL:
        return None
    if text in _BOOLEAN:
        return _BOOLEAN[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if text.lower() in _SPECIAL:
        return float(_SPECIAL[text.lower()])
    return text


def simple(value: Any) -> Any:
    """The value an expanded plain text stands for; anything else as it is."""
    return resolve_plain(str(value)) if isinstance(value, Expanded) and value.is_plain else value


def expand(text: str, environ: Mapping[str, str], *, is_plain: bool) -> str:
    """The text with `${VAR}` and `${VAR:-default}` replaced; `$${` stands for `${` itself.

    The default is taken when the variable is unset or empty, as a shell does. What a variable holds is not expanded
    again.

    Raises:
        ExpansionError: a variable that is not set and has no default, or a `${` that does not end.
    """
    if "${" not in text:
        return text

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name, default = match[1], match[2]
        if name is None:
            raise ExpansionError("'${' without ${NAME} or ${NAME:-default}; write $${ for the characters themselves")
        value = environ.get(name)
        if default is not None:
            return value or default
        if value is None:
            raise ExpansionError(f"the environment variable {name} is not set; set it or write ${{{name}:-default}}")
        return value

    return Expanded(_REFERENCE.sub(replace, text), text, is_plain=is_plain)


def as_written(tree: Any) -> Any:
    """A copy of plain data with every expanded text as it was written."""
    if isinstance(tree, Expanded):
        return tree.written
    if isinstance(tree, Mapping):
        return {key: as_written(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [as_written(value) for value in tree]
    return tree


def restore_references(resolved: Any, tree: Any) -> Any:
    """A copy of `resolved` in which what `tree` has from `${VAR}` is as written; records hold this."""
    if isinstance(tree, Expanded):
        return tree.written
    if isinstance(resolved, Mapping) and isinstance(tree, Mapping):
        return {
            key: restore_references(value, tree[key]) if key in tree else as_written(value)
            for key, value in resolved.items()
        }
    if isinstance(resolved, (list, tuple)) and isinstance(tree, (list, tuple)) and len(resolved) == len(tree):
        return [restore_references(value, written) for value, written in zip(resolved, tree, strict=True)]
    return as_written(resolved)


class _Invalid:
    def __repr__(self) -> str:
        return "INVALID"


INVALID: Any = _Invalid()

# More would not be read, and what is above 10**308 cannot be formatted at all.
MAX_SHOWN_DIGITS = 15

# What YAML 1.1 took for a truth value.
_TRUTHS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


@dataclass(frozen=True)
class Bounds:
    """Limits of a number; `above` and `below` are exclusive."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.minimum, self.maximum, self.above, self.below))

    def complaint(self, value: float) -> str | None:
        """What is wrong with a value; None when it lies within."""
        got = _plain(value)
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {_plain(self.minimum)}, got {got}"
        if self.above is not None and value <= self.above:
            return f"must be above {_plain(self.above)}, got {got}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {_plain(self.maximum)}, got {got}"
        if self.below is not None and value >= self.below:
            return f"must be below {_plain(self.below)}, got {got}"
        return None

    def __str__(self) -> str:
        if self.minimum is not None and self.maximum is not None:
            return f"{_plain(self.minimum)}–{_plain(self.maximum)}"
        limits = (("≥", self.minimum), (">", self.above), ("≤", self.maximum), ("<", self.below))
        return ", ".join(f"{sign} {_plain(limit)}" for sign, limit in limits if limit is not None)

    def json_schema(self) -> dict[str, Any]:
        """The limits in the words of JSON Schema."""
        named = {
            "minimum": self.minimum,
            "exclusiveMinimum": self.above,
            "maximum": self.maximum,
            "exclusiveMaximum": self.below,
        }
        return {name: limit for name, limit in named.items() if limit is not None}


class Kind(ABC):
    """A kind of value."""

    name = "value"  # in the sentence "… is due"
    label = "value"  # in a table

    @abstractmethod
    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        """The normalised value, or INVALID with the problems noted."""

    def dump(self, value: Any) -> Any:
        """The value as JSON has it; `read` takes it back."""
        return value

    def identity(self, value: Any) -> Any:
        """What of the value can change a measured number."""
        return self.dump(value)

    @abstractmethod
    def json_schema(self) -> dict[str, Any]:
        """The kind as JSON Schema 2020-12."""

    def due(self, value: Any, path: Path, sink: Sink, remedy: str = "", suggestion: str | None = None) -> Any:
        """INVALID, with the problem noted that something else than `value` is due."""
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
        if isinstance(value, str) and value.lower() in _TRUTHS:
            return self.due(value, path, sink, suggestion=_TRUTHS[value.lower()])
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return self.due(value, path, sink, "; leave the quotes out")
        return self.due(value, path, sink)

    def json_schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


class _NumberKind(Kind):
    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds

    def check(self, value: float, path: Path, sink: Sink) -> Any:
        complaint = self.bounds.complaint(value)
        if complaint is None:
            return value
        sink.add(path, complaint)
        return INVALID

    def remedy(self, value: Any) -> str:
        if not isinstance(value, str):
            return ""
        try:
            float(value.replace("_", "").replace(",", ""))
        except ValueError:
            return ""
        return "; write the plain number, without quotes, leading zeros or separators"


class IntKind(_NumberKind):
    """An integer; a whole float such as 1e3 is one."""

    name = "an integer"
    label = "integer"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        value = simple(value)
        if type(value) is not int:
            if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
                value = int(value)
            elif isinstance(value, bool) or not isinstance(value, int):
                return self.due(value, path, sink, self.remedy(value))
        return self.check(value, path, sink)

    def json_schema(self) -> dict[str, Any]:
        return {"type": "integer", **self.bounds.json_schema()}


class FloatKind(_NumberKind):
    """A finite number; an integer is one."""

    name = "a number"
    label = "number"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        value = simple(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return self.due(value, path, sink, self.remedy(value))
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            sink.add(path, f"a finite number is due, got {describe(value)}")
            return INVALID
        return self.check(number, path, sink)

    def json_schema(self) -> dict[str, Any]:
        return {"type": "number", **self.bounds.json_schema()}


class TextKind(Kind):
    """Text that is not blank.

    Args:
        check: says what is wrong with a text, or None.
        is_integer_text: an integer is taken as its digits (indices among names).
    """

    name = "text"
    label = "text"

    def __init__(
        self, check: Callable[[str], str | None] | None = None, *, form: str = "", is_integer_text: bool = False
    ) -> None:
        self._check = check
        self._is_integer_text = is_integer_text
        if form:
            self.name = self.label = form

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        if isinstance(value, int) and not isinstance(value, bool) and self._is_integer_text:
            value = str(value)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            remedy = f'; in quotes it is text: "{value}"' if isinstance(value, (int, float)) else ""
            if isinstance(value, bool):
                remedy = remedy.replace(str(value), str(value).lower())
            return self.due(value, path, sink, remedy)
        if not value.strip() or "\0" in value:
            sink.add(path, "must not be empty" if not value.strip() else "must not hold a NUL character")
            return INVALID
        complaint = self._check(value) if self._check is not None else None
        if complaint is not None:
            sink.add(path, complaint)
            return INVALID
        return str(value)

    def json_schema(self) -> dict[str, Any]:
        kinds = ["string", "integer"] if self._is_integer_text else "string"
        return {"type": kinds, "minLength": 1}


class ChoiceKind(Kind):
    """One of a few values."""

    def __init__(self, choices: Sequence[Any]) -> None:
        self.choices = tuple(choices)
        self.name = f"one of {', '.join(_word(choice) for choice in self.choices)}"
        self.label = "text" if all(isinstance(choice, str) for choice in self.choices) else "boolean or text"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        value = simple(value)
        for choice in self.choices:
            if type(value) is type(choice) and value == choice:
                return choice
        if isinstance(value, str):
            value = str(value)
            if value in self.choices:
                return value
            words = [choice for choice in self.choices if isinstance(choice, str)]
            sink.add(path, f"{value!r} is not {self.name}", nearest(value, words, cutoff=0.5))
            return INVALID
        return self.due(value, path, sink)

    def json_schema(self) -> dict[str, Any]:
        return {"enum": list(self.choices)}


def _plain(number: float) -> str:
    """A number without exponent or needless decimals; of one that nobody reads, how long it is."""
    if abs(number) >= 10**MAX_SHOWN_DIGITS:
        return f"a number of more than {MAX_SHOWN_DIGITS} digits"
    return f"{number:.0f}" if number == number // 1 else str(number)


def _word(choice: Any) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


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
        return None if value is None or simple(value) is None else self.inner.read(value, path, sink)

    def dump(self, value: Any) -> Any:
        return None if value is None else self.inner.dump(value)

    def identity(self, value: Any) -> Any:
        return None if value is None else self.inner.identity(value)

    def json_schema(self) -> dict[str, Any]:
        inner = self.inner.json_schema()
        if isinstance(inner.get("type"), str) and set(inner) <= {"type", "minLength", *_BOUND_WORDS}:
            return {**inner, "type": [inner["type"], "null"]}
        return {"anyOf": [inner, {"type": "null"}]}


_BOUND_WORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


class ListKind(Kind):
    """A list of one kind.

    Args:
        is_scalar_taken: a single value is a list of one.
        is_unique: no value twice.
    """

    def __init__(
        self, inner: Kind, *, min_items: int = 0, is_scalar_taken: bool = False, is_unique: bool = False
    ) -> None:
        self.inner = inner
        self.name, self.label = "a list", f"list of {inner.label}"
        self._min_items = min_items
        self._is_scalar_taken = is_scalar_taken
        self._is_unique = is_unique

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        if not isinstance(value, (list, tuple)):
            if not self._is_scalar_taken or value is None or isinstance(value, Mapping):
                remedy = "; put it in brackets: [ ]" if isinstance(value, (str, int, float)) else ""
                return self.due(value, path, sink, remedy)
            read = self.inner.read(value, path, sink)
            return INVALID if read is INVALID else Items((read,))
        if len(value) < self._min_items:
            sink.add(path, f"must have at least {self._min_items} {'item' if self._min_items == 1 else 'items'}")
            return INVALID
        items = [self.inner.read(item, (*path, index), sink) for index, item in enumerate(value)]
        if any(item is INVALID for item in items):
            return INVALID
        return self._without_repeats(items, path, sink)

    def _without_repeats(self, items: list[Any], path: Path, sink: Sink) -> Any:
        if self._is_unique:
            for index, item in enumerate(items):
                if item in items[:index]:
                    sink.add((*path, index), f"{item!r} is in the list twice")
                    return INVALID
        return Items(items)

    def dump(self, value: Any) -> Any:
        return [self.inner.dump(item) for item in value]

    def identity(self, value: Any) -> Any:
        return [self.inner.identity(item) for item in value]

    def json_schema(self) -> dict[str, Any]:
        items = self.inner.json_schema()
        schema: dict[str, Any] = {"type": "array", "items": items}
        if self._min_items:
            schema["minItems"] = self._min_items
        if self._is_unique:
            schema["uniqueItems"] = True
        return {"anyOf": [items, schema]} if self._is_scalar_taken else schema


class MapKind(Kind):
    """A mapping from text to one kind; an integer key is taken as its digits."""

    def __init__(self, inner: Kind) -> None:
        self.inner = inner
        self.name, self.label = "a mapping", "mapping" if isinstance(inner, AnyKind) else f"mapping to {inner.label}"

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

    def json_schema(self) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self.inner.json_schema()}


class AnyKind(Kind):
    """Whatever JSON can hold; lists become `Items`, and text keeps its `${VAR}` for records."""

    name = "a value"
    label = "any value"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            if math.isfinite(value):
                return value
            sink.add(path, f"a finite number is due, got {describe(value)}")
            return INVALID
        if isinstance(value, (list, tuple)):
            return _LIST_OF_ANY.read(value, path, sink)
        if isinstance(value, Mapping):
            return _MAPPING_OF_ANY.read(value, path, sink)
        sink.add(path, f"a value that JSON can hold is due, got {describe(value)}")
        return INVALID

    def dump(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self.dump(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.dump(item) for item in value]
        return str(value) if isinstance(value, str) else value

    def json_schema(self) -> dict[str, Any]:
        return {}


_LIST_OF_ANY = ListKind(AnyKind())
_MAPPING_OF_ANY = MapKind(AnyKind())
