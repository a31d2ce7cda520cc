"""What is wrong with a configuration: every problem at once, each with its path and the nearest right word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lem.base.errors import ConfigurationError
from lem.base.reasons import Reason

Path = tuple["str | int", ...]

MAX_SHOWN_VALUE = 60


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: keys and list indices from the top, e.g. ("execution", "cycles") or ("configs", 0); () is the whole.
        message: what is wrong, what was found, and what to do about it.
        suggestion: the nearest key or value that would be right; None when nothing is near.
        severity: `error` or `warning`.
        is_about_key: the key itself is wrong, not its value.
        reason: what is wrong as a code, where a rule found it.
    """

    path: Path
    message: str
    suggestion: str | None = None
    severity: str = "error"
    is_about_key: bool = False
    reason: Reason | None = None

    @classmethod
    def of(cls, path: Path, reason: Reason, *, is_about_key: bool = False) -> Problem:
        """What a rule found."""
        return cls(path, reason.text, is_about_key=is_about_key, reason=reason)

    def __str__(self) -> str:
        where = f"{dotted(self.path)}: " if self.path else ""
        return f"{where}{self.message}{_in_brackets(self.suggestion)}"


class ConfigProblems(ConfigurationError):
    """A configuration with problems; the message has one line for each.

    Attributes:
        problems: all that was found, in the order of the declaration.
    """

    def __init__(self, problems: Iterable[Problem], text: str | None = None, hint: str = "") -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(item) for item in self.problems) if text is None else text, hint)


class Sink:
    """Collects problems while a configuration is read.

    Attributes:
        problems: what was found so far.
        is_partial: a part of a section is being read (overrides, an axis of a grid): nothing is required of it and
            its fields are not held against each other.
    """

    def __init__(self, *, is_partial: bool = False) -> None:
        self.problems: list[Problem] = []
        self.is_partial = is_partial

    def add(self, path: Path, message: str, suggestion: str | None = None, *, is_about_key: bool = False) -> None:
        """Note a problem."""
        self.problems.append(Problem(path, message, suggestion, is_about_key=is_about_key))

    def raise_if_any(self) -> None:
        """Raise everything noted.

        Raises:
            ConfigProblems: there is something.
        """
        if self.problems:
            raise ConfigProblems(self.problems)


def dotted(path: Path) -> str:
    """The path as people write it: `execution.cycles`, `experiments[0].config`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def describe(value: Any) -> str:
    """A found value in words: `the text 'x'`, `the number 3`, `true`, `nothing`, `a list`, `a mapping`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {_short(value)}"
    if isinstance(value, str):
        return f"the text {_short(str(value))}"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    return f"a {type(value).__name__}"


def nearest(word: str, candidates: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The candidate most like `word`, upper and lower case being alike; None when none is near."""
    import difflib

    by_lower = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    """What to put behind a message about a wrong word: ` (did you mean 'vllm'?)`; empty when nothing is near."""
    return _in_brackets(nearest(word, candidates))


def _in_brackets(suggestion: str | None) -> str:
    return "" if suggestion is None else f" (did you mean '{suggestion}'?)"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "of thousands of digits"
    return text if len(text) <= MAX_SHOWN_VALUE else f"{text[: MAX_SHOWN_VALUE - 1]}…"
