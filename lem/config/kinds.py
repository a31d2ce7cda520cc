"""The kinds of single values an option can have: how each is read, written back, and described.

`read` never raises: it notes problems in the sink and gives INVALID, so that one pass finds everything that is wrong.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lem.config.problems import Path, Sink, describe, nearest
from lem.config.scalars import simple

__all__ = ["INVALID", "BoolKind", "Bounds", "ChoiceKind", "FloatKind", "IntKind", "Kind", "TextKind"]


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
