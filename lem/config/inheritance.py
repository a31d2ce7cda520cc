"""A file, the files it inherits from, and the preset below them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Protocol

from lem.config.presets import find_preset
from lem.config.problems import Problem
from lem.config.schema import Section
from lem.config.sources import Document, FileProblems, Layer, Place, Source

__all__ = ["Located", "Reader", "preset_source", "read_file"]

Located = list[tuple[Place, Problem]]

EXTENDS = "_extends"


class Reader(Protocol):
    """Reads YAML."""

    def read(self, path: FilePath) -> Document:
        """A file; raises `ConfigurationError` where it cannot."""

    def parse(self, text: str, label: str) -> Any:
        """A single value; raises `ConfigurationError` where it is none."""


def read_file(
    reader: Reader, path: FilePath, section: type[Section], preset: str | None = None
) -> tuple[Source, Located]:
    """A file over those it inherits from over a preset, and what is wrong with them whatever the options are."""
    documents: list[Document] = []
    found: Located = []
    following: FilePath | None = path
    while following is not None:
        document = reader.read(following)
        if not isinstance(document.tree, Mapping):
            raise FileProblems([(document.at(document.top), Problem((), _not_a_mapping(document.tree)))])
        documents.append(document)
        found.extend(document.located)
        following = _base_of(documents, found)
    source = dataclasses.replace(preset_source(section, preset), main=documents[0])
    for document in reversed(documents):
        values = {key: value for key, value in document.tree.items() if key != EXTENDS}
        source = source.over(Layer("file", document.name, values, document))
    return source, found


def _not_a_mapping(tree: Any) -> str:
    if tree is None:
        return "is empty; a configuration is due (`lem config new` writes one to start from)"
    return f"a mapping (key: value) is due at the top, got {'a list' if isinstance(tree, list) else 'plain text'}"


def _base_of(documents: Sequence[Document], found: Located) -> FilePath | None:
    """The file that the last document inherits from; None when there is none, or none that can be read."""
    document = documents[-1]
    name = document.tree.get(EXTENDS)
    if EXTENDS not in document.tree:
        return None
    place = document.at(document.values.get((EXTENDS,)))
    if not isinstance(name, str) or not name:
        found.append((place, Problem((EXTENDS,), "the name of one file is due")))
        return None
    base = document.path.parent / name
    if base.resolve() in [earlier.path.resolve() for earlier in documents]:
        found.append((place, Problem((EXTENDS,), f"{base} inherits from itself")))
        return None
    if not _is_file(base):
        found.append((place, Problem((EXTENDS,), f"{str(base)[:200]}: no such file")))
        return None
    return base


def _is_file(path: FilePath) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder that is not readable
        return False


def preset_source(section: type[Section], preset: str | None) -> Source:
    """The values of a preset as the lowest layer; no layer without one."""
    source = Source(section)
    return source if preset is None else source.over(Layer("preset", f"preset {preset}", find_preset(preset).values))
