"""Kinds of values that hold others: null or a value, lists, mappings, and whatever JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from lem.config.kinds import INVALID, Kind
from lem.config.problems import Path, Sink, describe
from lem.config.scalars import simple

__all__ = ["AnyKind", "Items", "ListKind", "MapKind", "NullableKind"]

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
