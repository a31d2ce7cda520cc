"""What a backend cannot honour, told all at once with the version that cannot; and engines' words in messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lem.errors import OptionRefused

__all__ = ["EngineRaised", "Refusal", "refuse", "shortened"]

MAX_TEXT = 400


@dataclass(frozen=True)
class Refusal:
    """An option, and why it cannot be honoured."""

    option: str
    reason: str


class EngineRaised(Exception):
    """A call of an engine raised something; what lem itself raises around such calls passes as it is.

    Attributes:
        error: what the engine raised.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.error = error


def refuse(
    refusals: Iterable[Refusal], facts: object, hint: str = "leave the option out, or change what it needs"
) -> None:
    """Raise what there is to refuse, all of it at once.

    Args:
        facts: the engine and its version, as a text.

    Raises:
        OptionRefused: names each option, the version found, and why.
    """
    listed = "; ".join(f"{refusal.option}: {refusal.reason}" for refusal in refusals)
    if listed:
        raise OptionRefused(f"{facts} cannot honour {listed}", hint)


def shortened(said: BaseException | str) -> str:
    """The first words of an engine's message on one line; the name of an error that has no words."""
    text = " ".join(str(said).split()) or type(said).__name__
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
