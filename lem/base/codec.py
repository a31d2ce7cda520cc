"""Dataclasses from JSON of unknown origin: exactly their fields, each of its declared type, numbers within bounds.

A file comes from a disk, another host or another version; what is looked at here is relied on by everything behind it.
`lem.record` is stricter.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

# No meter counts so far, and no clock; beyond it sums would leave the range of floating point.
_MOST = 2.0**64

# Types of values that were found good for a kind: of those there are few, of rows of a log hundreds of thousands.
_GOOD: dict[type, set[tuple[type, ...]]] = {}


def build(kind: type[T], values: Sequence[Any]) -> T:
    """The dataclass with these values, in the order of its fields.

    Raises:
        ValueError: too few or too many, one of another type, or a number out of all bounds; it is named.
    """
    found = tuple(map(type, values))
    good = _GOOD.setdefault(kind, set())
    if found not in good:
        due = _types_of(typing.cast("Any", kind))
        if len(values) != len(due):
            raise ValueError(f"{kind.__name__}: {len(due)} values are due, got {len(values)}")
        for name, value in zip(due, values, strict=True):
            _check_type(due[name], value, f"{kind.__name__}.{name}")
        good.add(found)
    for value in values:
        if (type(value) is int or type(value) is float) and not -_MOST < value < _MOST:
            raise ValueError(f"{kind.__name__}: {shown(value)} is more than anything measures")
    return kind(*values)


def build_from(kind: type[T], document: Any, where: str) -> T:
    """As `build`, of an object with exactly the fields of `kind`.

    Raises:
        ValueError: as `build`.
    """
    return build(kind, list(typed_fields(kind, document, where).values()))


def typed_fields(kind: Any, document: Any, where: str) -> dict[str, Any]:
    """A copy of an object that has exactly the fields of `kind`, in their order, each of a right type.

    A list stands for a tuple and stays one; what is in it is not looked at.

    Raises:
        ValueError: it is none; `where` names it.
    """
    due = _types_of(kind)
    if not isinstance(document, Mapping) or document.keys() != due.keys():
        raise ValueError(f"{where}: an object with the fields {', '.join(due)} is due")
    for name, allowed in due.items():
        _check_type(allowed, document[name], f"{where}.{name}")
    return {name: document[name] for name in due}


def shown(value: Any) -> str:
    """`value` in a message: a damaged file can hold anything, of any length, that does anything to a terminal."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _check_type(allowed: frozenset[type], value: Any, where: str) -> None:
    if type(value) not in allowed:
        raise ValueError(f"{where}: {shown(value)} has the wrong type")


@functools.cache
def _types_of(kind: Any) -> Mapping[str, frozenset[type]]:
    """What JSON may hold for each field."""
    hints = typing.get_type_hints(kind)
    return {item.name: frozenset(_plain(hints[item.name])) for item in dataclasses.fields(kind)}


def _plain(hint: Any) -> tuple[type, ...]:
    if isinstance(hint, types.UnionType):
        return tuple(plain for part in typing.get_args(hint) for plain in _plain(part))
    if hint is float:
        return (float, int)  # JSON writes 3.0 as 3 where it is not from Python
    origin: type = typing.get_origin(hint) or hint
    return (tuple, list) if origin is tuple else (origin,)
