"""Kinds of values: how a value is read, checked and written; and every problem that is found with it, with its path."""

from __future__ import annotations

import contextlib
import enum
import json
import math
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Generic, TypeVar

from lem.base.dataclass import dataclass
from lem.base.errors import ConfigurationError, in_brackets, nearest
from lem.base.log import shorten
from lem.base.reasons import Reason
from lem.base.units import plural
from lem.config.terms import value_named

T = TypeVar("T")
Path = tuple["str | int", ...]

MAX_SHOWN_PROBLEMS = 100
MAX_SHOWN_VALUE = 60
# Longer numbers are unreadable, and one above 10**308 cannot be formatted at all.
MAX_SHOWN_DIGITS = 15

# What YAML 1.1 took for a truth value.
_TRUTHS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


# Values that no configuration contains.
Marker = enum.Enum("Marker", ("INVALID", "REQUIRED", "UNSET"))
INVALID: Any = Marker.INVALID
REQUIRED: Any = Marker.REQUIRED
# The default of every field, which distinguishes a value that was given from one that was left out.
UNSET: Any = Marker.UNSET


@dataclass(frozen=True)
class Problem:
    path: Path  # keys and list indices from the top: ("execution", "cycles") or ("configs", 0); () is the whole
    message: str
    suggestion: str | None = None  # the nearest valid key or value
    is_about_key: bool = False  # the key itself is wrong, not its value
    reason: Reason | None = None  # where a rule found it

    @classmethod
    def of(cls, option: str, code: str, /, *, is_about_key: bool = False, **data: Any) -> Problem:
        reason = Reason.of(code, **data)
        return cls(tuple(option.split(".")), reason.text, is_about_key=is_about_key, reason=reason)

    def __str__(self) -> str:
        where = f"{dotted(self.path)}: " if self.path else ""
        return f"{where}{self.message}{in_brackets(self.suggestion)}"


class ConfigProblems(ConfigurationError):
    def __init__(self, problems: Iterable[Problem], text: str | None = None, hint: str = "") -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)) if text is None else text, hint)


# The name and the value of an option, by its key and the number of the object it was read from, which is kept, too.
KnownValues = dict[tuple[Any, int], tuple[str, Any, Any]]


class Sink:
    """Collects problems; a partial one, for a part of a section, requires nothing and compares no options."""

    def __init__(
        self,
        root: type[Any],
        chosen: Callable[[], Collection[str]] = tuple,
        *,
        is_partial: bool = False,
        known: KnownValues | None = None,
    ) -> None:
        self.problems: list[Problem] = []
        self.is_partial = is_partial
        self.known = known
        self.root = root  # the section that paths begin in
        self.chosen = chosen  # gives the backends and the sections that are given, to choose between options by

    def add(self, path: Path, message: str, suggestion: str | None = None, *, is_about_key: bool = False) -> Any:
        self.problems.append(Problem(path, message, suggestion, is_about_key))
        return INVALID

    def raise_if_any(self) -> None:
        if self.problems:
            raise ConfigProblems(self.problems)


def dotted(path: Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def describe(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float, str)):
        try:
            return shorten(repr(str(value) if isinstance(value, str) else value), MAX_SHOWN_VALUE)
        except ValueError:  # an integer of more digits than Python prints
            return "a number of thousands of digits"
    if isinstance(value, (list, tuple, dict)):
        return f"{'a' if value else 'an empty'} {'mapping' if isinstance(value, dict) else 'list'}"
    return f"a {type(value).__name__}"


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
    return value.value if isinstance(value, Expanded) else value


def as_written(resolved: Any, tree: Any = None) -> Any:
    expanded = next((item for item in (tree, resolved) if isinstance(item, Expanded)), None)
    if expanded is not None:
        return expanded.written
    if isinstance(resolved, Mapping):
        trees = tree if isinstance(tree, Mapping) else {}
        return {key: as_written(value, trees.get(key)) for key, value in resolved.items()}
    if isinstance(resolved, (list, tuple)):
        is_alike = isinstance(tree, (list, tuple)) and len(tree) == len(resolved)
        return [as_written(value, tree[index] if is_alike else None) for index, value in enumerate(resolved)]
    return resolved


class Items(tuple[T, ...], Generic[T]):
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, tuple(other) if isinstance(other, list) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


# Limits of a number, by their keywords in JSON Schema: what must hold, in words, and as a sign.
LIMITS: Mapping[str, tuple[Callable[[float, float], bool], str, str]] = {
    "minimum": (operator.ge, "at least", "≥"),
    "exclusiveMinimum": (operator.gt, "above", ">"),
    "maximum": (operator.le, "at most", "≤"),
    "exclusiveMaximum": (operator.lt, "below", "<"),
}


def bounds_text(bounds: Mapping[str, float]) -> str:
    if "minimum" in bounds and "maximum" in bounds:
        return f"{_plain(bounds['minimum'])}–{_plain(bounds['maximum'])}"
    return ", ".join(f"{LIMITS[word][2]} {_plain(limit)}" for word, limit in bounds.items())


def _plain(number: float) -> str:
    if abs(number) >= 10**MAX_SHOWN_DIGITS:
        return f"a number of more than {MAX_SHOWN_DIGITS} digits"
    return f"{number:.0f}" if number == number // 1 else str(number)


@dataclass(frozen=True)
class Option:
    default: Any  # REQUIRED, a value, or a `Section`
    description: str  # one or two sentences for people
    bounds: Mapping[str, float]  # of a number, by the keywords of `LIMITS`
    choices: tuple[Any, ...] = ()  # the only values there are; () when open
    unit: str | None = None
    backends: tuple[str, ...] | None = None  # those that honour it; None for all
    reload: bool = UNSET  # a change needs another engine load; UNSET takes `Section.reloads`
    identity: bool = True  # it can change a measured number
    is_added: bool = False  # since the first build, whose hashes do not know it: at its default it changes none
    is_dropped: bool = (
        False  # no part of the identity since the first build, whose hashes hold it: all hold its default
    )
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
    kind: Kind = UNSET  # of a value that is not null
    is_nullable: bool = False

    @property
    def takes_null(self) -> bool:
        """Whether null is a value, or as good as nothing: a section of which all lines are comments is null."""
        return self.is_nullable or (self.kind.holds_others and self.default is not REQUIRED)


class Kind(ABC):
    name = "value"  # in the message "expected …"
    label = "value"  # in a table
    sections: tuple[type[Any], ...] = ()  # that a value of this kind is one of: none, one, or the variants
    holds_others = False  # a section, a list or a mapping

    def __init__(self, item: Option, inner: Kind | None = None) -> None:
        self.item = item
        if inner is not None:
            self.inner = inner
            self.sections = inner.sections

    @abstractmethod
    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        """The normalised value, or INVALID with the problems noted."""

    def refuse(self, value: Any, path: Path, sink: Sink, remedy: str = "", suggestion: str | None = None) -> Any:
        got = "" if self.item.secret else f", got {describe(value)}{remedy}"
        return sink.add(path, f"expected {self.name}{got}", suggestion)


class BoolKind(Kind):
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
    def __init__(self, item: Option, kind: type[int] | type[float]) -> None:
        super().__init__(item)
        self.type = kind
        self.name, self.label = ("an integer", "integer") if kind is int else ("a number", "number")

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        value = number = simple(value)
        if self.type is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            number = int(value)
        if isinstance(number, bool) or not isinstance(number, (int, self.type)):
            remedy = ""
            if isinstance(value, str):
                with contextlib.suppress(ValueError):
                    float(value.replace("_", "").replace(",", ""))
                    remedy = "; write it without quotes, leading zeros or separators"
            return self.refuse(value, path, sink, remedy)
        if self.type is float:
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if not math.isfinite(number):
                return sink.add(path, f"expected a finite number, got {describe(value)}")
        for word, limit in self.item.bounds.items():
            is_within, words, _ = LIMITS[word]
            if not is_within(number, limit):
                return sink.add(path, f"must be {words} {_plain(limit)}, got {_plain(number)}")
        return number


class TextKind(Kind):
    name = label = "text"

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
            return sink.add(path, "must not be empty")
        if "\0" in value:
            return sink.add(path, "must not contain a NUL character")
        complaint = self.item.check(value) if self.item.check is not None else None
        return str(value) if complaint is None else sink.add(path, complaint)


class ChoiceKind(Kind):
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
        near = None
        if isinstance(value, str):
            near = value_named(value, self._words) or nearest(value, self._words, cutoff=0.5)
        return self.refuse(value, path, sink, suggestion=near)


class ListKind(Kind):
    name = "a list"
    holds_others = True

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
            return sink.add(path, f"must have at least {plural(self.item.min_items, 'item')}")
        items = [self.inner.read(item, (*path, index), sink) for index, item in enumerate(value)]
        if any(item is INVALID for item in items):
            return INVALID
        if self.item.is_unique:
            for index, item in enumerate(items):
                if item in items[:index]:
                    return sink.add((*path, index), f"duplicate item {item!r}")
        return Items(items)


class MapKind(Kind):
    name = "a mapping"
    holds_others = True

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


class AnyKind(Kind):
    name = "a JSON value"
    label = "any value"

    def read(self, value: Any, path: Path, sink: Sink) -> Any:
        if isinstance(value, Expanded) and not isinstance(value.value, str):
            value = value.value
        if value is None or isinstance(value, (bool, int, str)):
            return value
        kinds = (kind for types, kind in _JSON_KINDS.items() if isinstance(value, types))
        kind = next(kinds, None)
        return self.refuse(value, path, sink) if kind is None else kind.read(value, path, sink)


_FREE = Option(None, "", {})
_ANY = AnyKind(_FREE)
_JSON_KINDS: Mapping[Any, Kind] = {
    float: NumberKind(_FREE, float),
    (list, tuple): ListKind(_FREE, _ANY),
    Mapping: MapKind(_FREE, _ANY),
}


def check_url(text: str) -> str | None:
    import urllib.parse  # only campaigns with a webhook need it

    if not text.isascii() or not text.isprintable() or " " in text:
        return "expected a URL without spaces, control characters and letters beyond ASCII; percent-encode them (%20)"
    try:
        parts = urllib.parse.urlsplit(text)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")
    except UnicodeError:
        return "invalid host name in the URL"
    except ValueError:
        return "invalid host or port in the URL"
    if parts.scheme not in ("http", "https"):
        return "expected a URL that begins with http:// or https://"
    if "@" in parts.netloc:
        return "a user name or password in the URL is not supported; most services take a token in the path"
    if not host:
        return "the URL has no host"
    return "invalid port in the URL" if port == 0 else None
