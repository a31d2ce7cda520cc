"""What a meter refuses."""

from __future__ import annotations

from lem.errors import OptionRefused

__all__ = ["MeterRefused"]


class MeterRefused(OptionRefused):
    """An option that needs a meter that is not there."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind = "meter"
