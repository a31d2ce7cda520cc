"""Warnings, findings, reasons of invalid results, of filters and of absent values: a code with data.

Programs use `code` and `data`; people read `text`, which comes from reasons.txt alone, so that a sentence can be
reworded without a change of behaviour.

The format in a template gives the type of its data: `{n:d}` an integer, `{x:.3f}` a float, `{name}` text or a reason.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

from lem.base.dataclass import dataclass, field
from lem.base.durable import packaged_text
from lem.base.units import plain

_Thing = TypeVar("_Thing")


def read_tables(package: str, name: str) -> Mapping[str, Mapping[str, str]]:
    """Sentences by code, by section of a file of the package: `[section]`, then lines of `code: sentence`."""
    tables: dict[str, dict[str, str]] = {}
    table: dict[str, str] = {}
    for line in packaged_text(package, name).splitlines():
        if line.startswith("["):
            table = tables[line.strip("[]")] = {}
        elif line and not line.startswith("#"):
            code, _, sentence = line.partition(":")
            table[code] = sentence.strip()
    return tables


V1_TEXTS, _NEW_TEXTS, NULL_TEXTS = read_tables("lem.base", "reasons.txt").values()
TEXTS: Mapping[str, str] = {**V1_TEXTS, **_NEW_TEXTS, **NULL_TEXTS}

_NUMBER = re.compile(r"[0-9]+(?:[.][0-9]+)?")


class _Plain(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        return plain(value, format_spec) if isinstance(value, float) else format(value, format_spec)


_PLAIN = _Plain()


@dataclass(frozen=True)
class Reason:
    code: str  # a key of `TEXTS`
    # Fills the sentence. Floats have as many digits as it shows, so that reasons that read the same are the same.
    data: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, code: str, /, **data: Any) -> Reason:
        """The reason; ValueError for an unknown code, or data that does not fit its sentence."""
        if code not in TEXTS:
            raise ValueError(f"unknown code {code!r}")
        formats = formats_of(TEXTS[code])
        if formats.keys() != data.keys():
            raise ValueError(f"{code} takes {', '.join(formats) or 'no data'}, got {', '.join(data) or 'none'}")
        return cls(code, {name: _as_shown(value, formats[name]) for name, value in data.items()})

    @functools.cached_property
    def text(self) -> str:
        return _PLAIN.format(TEXTS[self.code], **self.data)

    @property
    def kind(self) -> Hashable:
        texts = ((name, _NUMBER.sub("#", value)) for name, value in self.data.items() if isinstance(value, str))
        return (self.code, *sorted(texts))

    def worded(self, texts: Mapping[str, str]) -> str:
        return texts[self.code].format(**self.data)

    def __str__(self) -> str:
        return self.text

    def __hash__(self) -> int:
        return hash((self.code, frozenset(self.data.items())))


def alike(found: Iterable[tuple[Reason, _Thing]]) -> list[list[tuple[Reason, _Thing]]]:
    groups: dict[Hashable, list[tuple[Reason, _Thing]]] = {}
    for reason, thing in found:
        groups.setdefault(reason.kind, []).append((reason, thing))
    return list(groups.values())


@functools.cache
def formats_of(template: str) -> Mapping[str, str]:
    return {name: spec or "" for _, name, spec, _ in string.Formatter().parse(template) if name}


def _as_shown(value: Any, spec: str) -> Any:
    if not spec and not isinstance(value, (str, Reason)):
        raise ValueError(f"expected text or a reason, got {type(value).__name__}")
    if spec and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"expected a number, got {type(value).__name__}")
    try:
        shown = format(value, spec)
    except OverflowError as error:  # an integer too large for a float
        raise ValueError(str(error)) from error
    return parsed(shown, spec) if isinstance(value, float) and spec else value


def parsed(shown: str, spec: str) -> Any:
    if not spec:
        return shown
    if spec == "d":
        return int(shown)
    if spec == "#x":
        return int(shown, 16)
    return float(shown.removesuffix("%")) / 100 if spec.endswith("%") else float(shown)
