"""One line of a table of figures."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HEADER", "Figure"]

HEADER = f"{'figure':<64}{'value':>10} {'unit':<6}{'target':>10}"


@dataclass(frozen=True)
class Figure:
    """One line of the table; `target` is what the value must not exceed, None for a figure others are measured by."""

    name: str
    value: float
    unit: str
    target: float | None = None

    def __str__(self) -> str:
        line = f"{self.name:<64}{self.value:>10.2f} {self.unit:<6}"
        if self.target is None:
            return line.rstrip()
        return f"{line}{self.target:>10.2f}  {'ok' if self.value <= self.target else 'OVER'}"
