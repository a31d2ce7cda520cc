"""What a word in YAML without quotes means, and how `${VAR}` in a text is replaced."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lem.config.kinds import Expanded

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEAN = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# No leading zeros: 010 is 8 in YAML 1.1 and 10 in YAML 1.2, so it is neither here.
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,400})")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")


class ExpansionError(ValueError):
    """A `${VAR}` that cannot be expanded."""


def resolve_plain(text: str) -> Any:
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


def expand(text: str, environ: Mapping[str, str], *, is_plain: bool) -> str:
    """The text with `${VAR}` and `${VAR:-default}` expanded as in a shell, once, and `$${` as `${`; ExpansionError."""
    if "${" not in text:
        return text

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name, default = match[1], match[2]
        if name is None:
            raise ExpansionError("incomplete '${': expected ${NAME} or ${NAME:-default}; write $${ for a literal ${")
        value = environ.get(name)
        if default is not None:
            return value or default
        if value is None:
            raise ExpansionError(f"the environment variable {name} is not set; set it or write ${{{name}:-default}}")
        return value

    expanded = _REFERENCE.sub(replace, text)
    return Expanded(expanded, text, resolve_plain(expanded) if is_plain else expanded)
