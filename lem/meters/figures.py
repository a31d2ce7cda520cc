"""Figures as they are worked out, each with the reason where it has none: what a section of the record is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from lem.meters.curve import NotMeasured
from lem.record import Carbon, Efficiency, Energy, Gpu, Idle

__all__ = ["Figures"]

_Value = TypeVar("_Value")
_Section = TypeVar("_Section", Carbon, Efficiency, Energy, Gpu, Idle)


class Figures:
    """The fields of one section while it is filled.

    Attributes:
        values: what was found; None where there is a reason.
        reasons: why a field is None.
    """

    def __init__(self, **values: Any) -> None:
        """Begin with fields that are known."""
        self.values: dict[str, Any] = dict(values)
        self.reasons: dict[str, str] = {}

    def work_out(self, name: str, figure: Callable[[], _Value]) -> _Value | None:
        """The figure, kept under its name; None, with its reason kept, where it cannot be had."""
        try:
            self.values[name] = value = figure()
        except NotMeasured as error:
            self.leave_out(name, str(error))
            return None
        return value

    def leave_out(self, name: str, reason: str) -> None:
        """Keep a field as None."""
        self.values[name] = None
        self.reasons[name] = reason

    def put(self, name: str, value: Any, reason: str) -> None:
        """Keep a value, or the reason where it is None."""
        if value is None:
            self.leave_out(name, reason)
        else:
            self.values[name] = value

    def need(self, name: str) -> Any:
        """A value found before.

        Raises:
            NotMeasured: there is none, for the reason that was kept.
        """
        if self.values.get(name) is None:
            raise NotMeasured(self.reasons.get(name, f"{name} was not worked out"))
        return self.values[name]

    def section(self, kind: type[_Section]) -> _Section:
        """The section of the record; a field that nobody touched is a bug and fails there."""
        names = [item.name for item in dataclasses.fields(kind) if item.name != "null_reasons"]
        values: dict[str, Any] = {name: self.values[name] for name in names}
        values["null_reasons"] = self.reasons
        return kind(**values)
