"""Plain words as values, and `${VAR}` in text.

YAML 1.1, which PyYAML follows, reads `no` as false, `12:30` as 750, `010` as 8 and `1e3` as text. Here a plain word is
a value only where all readers agree: the core schema of YAML 1.2.2 (10.3.2) without its octal and hexadecimal numbers.
Everything else is text, and an option that wants a number says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Expanded", "ExpansionError", "as_written", "expand", "resolve_plain", "restore_references", "simple"]

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEAN = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# No leading zeros: 010 is 8 in YAML 1.1 and 10 in YAML 1.2, so it is neither here.
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,400})")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}

_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")


class ExpansionError(ValueError):
    """A `${VAR}` that cannot be expanded."""


class Expanded(str):
    """A text in which `${VAR}` was expanded.

    Attributes:
        written: the text as written, which is what records hold.
        is_plain: it was written without quotes, so it may stand for a number or true or false.
    """

    __slots__ = ("is_plain", "written")

    written: str
    is_plain: bool

    def __new__(cls, text: str, written: str, *, is_plain: bool) -> Expanded:
        self = super().__new__(cls, text)
        self.written = written
        self.is_plain = is_plain
        return self

    def __reduce__(self) -> tuple[Callable[..., Expanded], tuple[str, str, bool]]:
        return _expanded, (str(self), self.written, self.is_plain)


def _expanded(text: str, written: str, is_plain: bool) -> Expanded:
    return Expanded(text, written, is_plain=is_plain)


def resolve_plain(text: str) -> Any:
    """The value of a word written without quotes: None, a bool, an int, a float, or the text itself."""
    if text in _NULL:
        return None
    if text in _BOOLEAN:
        return _BOOLEAN[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if text.lower() in _SPECIAL:
        return float(_SPECIAL[text.lower()])
    return text


def simple(value: Any) -> Any:
    """The value an expanded plain text stands for; anything else as it is."""
    return resolve_plain(str(value)) if isinstance(value, Expanded) and value.is_plain else value


def expand(text: str, environ: Mapping[str, str], *, is_plain: bool) -> str:
    """The text with `${VAR}` and `${VAR:-default}` replaced; `$${` stands for `${` itself.

    The default is taken when the variable is unset or empty, as a shell does. What a variable holds is not expanded
    again.

    Raises:
        ExpansionError: a variable that is not set and has no default, or a `${` that does not end.
    """
    if "${" not in text:
        return text

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name, default = match[1], match[2]
        if name is None:
            raise ExpansionError("'${' without ${NAME} or ${NAME:-default}; write $${ for the characters themselves")
        value = environ.get(name)
        if default is not None:
            return value or default
        if value is None:
            raise ExpansionError(f"the environment variable {name} is not set; set it or write ${{{name}:-default}}")
        return value

    return Expanded(_REFERENCE.sub(replace, text), text, is_plain=is_plain)


def as_written(tree: Any) -> Any:
    """A copy of plain data with every expanded text as it was written."""
    if isinstance(tree, Expanded):
        return tree.written
    if isinstance(tree, Mapping):
        return {key: as_written(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [as_written(value) for value in tree]
    return tree


def restore_references(resolved: Any, tree: Any) -> Any:
    """A copy of `resolved` in which what `tree` has from `${VAR}` is as written; records hold this."""
    if isinstance(tree, Expanded):
        return tree.written
    if isinstance(resolved, Mapping) and isinstance(tree, Mapping):
        return {
            key: restore_references(value, tree[key]) if key in tree else as_written(value)
            for key, value in resolved.items()
        }
    if isinstance(resolved, (list, tuple)) and isinstance(tree, (list, tuple)) and len(resolved) == len(tree):
        return [restore_references(value, written) for value, written in zip(resolved, tree, strict=True)]
    return as_written(resolved)
