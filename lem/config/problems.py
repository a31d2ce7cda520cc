"""What is wrong with a configuration: every problem at once, each with its path and the nearest valid word."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lem.base.errors import ConfigurationError
from lem.base.reasons import Reason

Path = tuple["str | int", ...]

MAX_SHOWN_VALUE = 60


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, or that a person should know about."""

    path: Path  # keys and list indices from the top: ("execution", "cycles") or ("configs", 0); () is the whole
    message: str
    suggestion: str | None = None  # the nearest valid key or value
    is_about_key: bool = False  # the key itself is wrong, not its value
    reason: Reason | None = None  # where a rule found it

    @classmethod
    def of(cls, option: str, code: str, /, *, is_about_key: bool = False, **data: Any) -> Problem:
        """A problem of the option with a dotted name, for a coded reason."""
        reason = Reason.of(code, **data)
        return cls(tuple(option.split(".")), reason.text, is_about_key=is_about_key, reason=reason)

    def __str__(self) -> str:
        where = f"{dotted(self.path)}: " if self.path else ""
        return f"{where}{self.message}{_in_brackets(self.suggestion)}"


class ConfigProblems(ConfigurationError):
    """A configuration with problems; the message has one line for each."""

    def __init__(self, problems: Iterable[Problem], text: str | None = None, hint: str = "") -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(item) for item in self.problems) if text is None else text, hint)


class Sink:
    """Collects problems while a configuration is read.

    A partial sink is for a part of a section (overrides, an axis of a grid): nothing is required of it, and its options
    are not checked against each other.
    """

    def __init__(self, *, is_partial: bool = False) -> None:
        self.problems: list[Problem] = []
        self.is_partial = is_partial

    def add(self, path: Path, message: str, suggestion: str | None = None, *, is_about_key: bool = False) -> None:
        self.problems.append(Problem(path, message, suggestion, is_about_key))

    def raise_if_any(self) -> None:
        if self.problems:
            raise ConfigProblems(self.problems)


def dotted(path: Path) -> str:
    """The path as people write it: `execution.cycles`, `experiments[0].config`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def nest(path: str | Sequence[str], value: Any) -> dict[str, Any]:
    """`{"decoder": {"preset": value}}` for "decoder.preset" or ("decoder", "preset")."""
    for part in reversed(path.split(".") if isinstance(path, str) else path):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value that is not a mapping with something in it, with its path."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif path:
        yield path, tree


def describe(value: Any) -> str:
    """A value in a message: `'x'`, `3`, `true`, `null`, `a list`, `a mapping`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return _short(value)
    if isinstance(value, str):
        return _short(str(value))
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    return f"a {type(value).__name__}"


def nearest(word: str, candidates: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The candidate most like `word`, ignoring case; None when none is near."""
    import difflib

    by_lower = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    """The end of a message about a wrong word: ` (did you mean 'vllm'?)`; empty when nothing is near."""
    return _in_brackets(nearest(word, candidates))


def _in_brackets(suggestion: str | None) -> str:
    return "" if suggestion is None else f" (did you mean '{suggestion}'?)"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN_VALUE else f"{text[: MAX_SHOWN_VALUE - 1]}…"
