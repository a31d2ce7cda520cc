"""Strict YAML: the only module that imports it.

Beyond what PyYAML checks: no duplicate keys, no merge keys, no tags, plain words read by `scalars.resolve_plain`
instead of YAML 1.1, keys taken as written, the position of every key and value kept. Nothing is constructed but plain
data, and both nesting and aliases have a limit, since a few lines of YAML can stand for billions of values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from lem.base.errors import ConfigurationError
from lem.base.units import MIB
from lem.config import load
from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import ExpansionError, expand, resolve_plain
from lem.config.load import Loaded
from lem.config.problems import Path, Problem
from lem.config.sources import Document, FileProblems, Mark, Place

try:
    from lem._vendor import yaml
except ImportError:  # an installation has PyYAML beside lem, not inside it
    import yaml  # type: ignore[import-untyped, unused-ignore]


MAX_FILE_B = 16 * MIB
MAX_DEPTH = 64
MAX_VALUES = 200_000

_PLAIN = "lem:plain"
_TEXT = "tag:yaml.org,2002:str"
_LIST = "tag:yaml.org,2002:seq"
_MAPPING = "tag:yaml.org,2002:map"


def load_campaign(
    path: FilePath | str,
    sets: Sequence[str | tuple[str, Any]] = (),
    preset: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Loaded[CampaignConfig]:
    """A campaign file, and the experiment files it names, validated.

    Args:
        sets: overrides, `"execution.cycles=5"` or `("execution.cycles", 5)`.
        preset: values that experiments start from.
        environ: what `${VAR}` expands to.

    Raises:
        FileProblems: everything that is wrong, in its place.
        ConfigurationError: a file that cannot be read.
    """
    return load.load_campaign(_Reader(environ), FilePath(path), sets, preset)


def load_campaign_of_files(
    name: str,
    paths: Sequence[FilePath | str],
    sets: Sequence[str | tuple[str, Any]] = (),
    preset: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Loaded[CampaignConfig]:
    """A campaign made of experiment files; as `load_campaign`."""
    return load.load_campaign_of_files(_Reader(environ), name, [FilePath(path) for path in paths], sets, preset)


def complete_campaign(campaign: CampaignConfig, environ: Mapping[str, str] = os.environ) -> Loaded[CampaignConfig]:
    """A campaign made in Python, with the experiment files it names, relative to the working directory, validated.

    Raises:
        FileProblems, ConfigurationError: as `load_campaign`.
    """
    return load.complete_campaign(_Reader(environ), campaign)


def load_experiment(
    path: FilePath | str,
    sets: Sequence[str | tuple[str, Any]] = (),
    preset: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Loaded[ExperimentConfig]:
    """An experiment file, validated; as `load_campaign`."""
    return load.load_experiment(_Reader(environ), FilePath(path), sets, preset)


def kind_of(path: FilePath | str, environ: Mapping[str, str] = os.environ) -> str:
    """`campaign` or `experiment`, by the options in a file.

    Raises:
        ConfigurationError: a file that cannot be read, or is not YAML.
    """
    return load.kind_of(_Reader(environ), FilePath(path))


def read_document(path: FilePath, environ: Mapping[str, str]) -> Document:
    """A file as plain data with positions.

    Raises:
        ConfigurationError: it cannot be read, or is not text.
        FileProblems: it is not YAML.
    """
    return _read_text(_text_of(path), str(path), path, environ)


def parse_value(text: str, environ: Mapping[str, str], label: str) -> Any:
    """A value as it would be in a file.

    Raises:
        ConfigurationError: it is not one; `label` names it.
    """
    try:
        document = _read_text(text, label, FilePath(), environ)
    except FileProblems as error:  # a position within a word of the command line tells nobody anything
        raise FileProblems((Place(label), problem) for _, problem in error.located) from error
    if document.problems:
        raise FileProblems((Place(label), problem) for _, problem in document.problems)
    return document.tree


class _Reader:
    """Reads with one environment; what `loading` needs of YAML."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def read(self, path: FilePath) -> Document:
        return read_document(path, self._environ)

    def parse(self, text: str, label: str) -> Any:
        return parse_value(text, self._environ, label)


def _text_of(path: FilePath) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_B + 1)
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{path}: no such file", "check the path, which is relative to where you are"
        ) from error
    except IsADirectoryError as error:
        raise ConfigurationError(f"{path}: is a folder, a YAML file is due") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigurationError(f"{path}: cannot be read: {reason}") from error
    if len(data) > MAX_FILE_B:
        raise _no_text(path, data, 0, f"more than {MAX_FILE_B // MIB} MiB, which is no configuration")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _no_text(path, data, 0, "is UTF-16", "save it as UTF-8")
    if b"\0" in data:
        raise _no_text(path, data, data.index(b"\0"), "is binary, a YAML file is due")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The mark of UTF-8 at the beginning is left out of what the error counts in.
        begin = error.start + len(data) - len(error.object)
        raise _no_text(path, data, begin, f"is not UTF-8 (byte 0x{data[begin]:02x})", "save it as UTF-8") from error


def _no_text(path: FilePath, data: bytes, offset: int, message: str, hint: str = "") -> FileProblems:
    """What is wrong with the byte at an offset."""
    before = data[:offset]
    column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
    place = Place(str(path), Mark(before.count(b"\n") + 1, column))
    return FileProblems([(place, Problem((), message))], hint)


def _read_text(text: str, name: str, path: FilePath, environ: Mapping[str, str]) -> Document:
    lines = tuple(text.splitlines())
    try:
        node = _Loader(text).single_node()
    except yaml.YAMLError as error:
        raise FileProblems([_syntax_problem(error, name, text)]) from error
    builder = _Builder(environ)
    tree = builder.build(node, ()) if node is not None else None
    return Document(name, path, lines, tree, builder.keys, builder.values, tuple(builder.problems))


class _TooMuch(yaml.MarkedYAMLError):  # type: ignore[misc, unused-ignore]
    """More nesting or more values than a configuration has."""


class _Loader(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser, yaml.composer.Composer):  # type: ignore[misc, unused-ignore]
    """Text to nodes, with neither a resolver of plain words nor a constructor."""

    def __init__(self, text: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        self._depth = 0

    def single_node(self) -> Any:
        return self.get_single_node()

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise _TooMuch(None, None, f"nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def descend_resolver(self, parent: Any, index: Any) -> None:
        """Part of PyYAML's resolver, which is not used."""

    def ascend_resolver(self) -> None:
        """Part of PyYAML's resolver, which is not used."""

    def resolve(self, kind: Any, _value: Any, implicit: Any) -> str:
        """The tag of a node that has none of its own."""
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else _TEXT
        return _LIST if kind is yaml.SequenceNode else _MAPPING


class _Builder:
    """Nodes to plain data, noting positions and problems."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._open: set[int] = set()
        self._count = 0
        self.keys: dict[Path, Mark] = {}
        self.values: dict[Path, Mark] = {}
        self.problems: list[tuple[Mark, Problem]] = []

    def build(self, node: Any, path: Path) -> Any:
        self.values[path] = _mark(node)
        self._count += 1
        if self._count > MAX_VALUES:
            if self._count == MAX_VALUES + 1:
                self._note((), f"more than {MAX_VALUES} values; do aliases (*name) multiply?")
            return None
        if id(node) in self._open:
            self._note(path, "an alias (*name) of what it is part of")
            return None
        self._open.add(id(node))
        value = self._build(node, path)
        self._open.discard(id(node))
        return value

    def _build(self, node: Any, path: Path) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING:
            return self._build_mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _LIST:
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in (_PLAIN, _TEXT):
            return self._build_scalar(node, path)
        self._note(path, f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not read; write the value plainly")
        return None

    def _build_mapping(self, node: Any, path: Path) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in (_PLAIN, _TEXT):
                self._note(path, "a key must be plain text", _mark(key_node))
                continue
            key = str(key_node.value)
            where = (*path, key)
            if key in out:
                self._note(where, f"duplicate key, first on line {self.keys[where].line}", _mark(key_node))
                continue
            self.keys[where] = _mark(key_node)
            if key == "<<" and key_node.tag == _PLAIN:
                self._note(where, "merge keys are not read; use _extends, or write the values out", _mark(key_node))
                continue
            out[key] = self.build(value_node, where)
        return out

    def _build_scalar(self, node: Any, path: Path) -> Any:
        is_plain = node.tag == _PLAIN
        value = resolve_plain(node.value) if is_plain else node.value
        if not isinstance(value, str):
            return value
        if any("\ud800" <= character <= "\udfff" for character in value):
            self._note(path, "holds half of a surrogate pair, which is no character")
            return None
        if "\0" in value:  # no name of a file or a model holds one, and no text is read for anything else
            self._note(path, "holds the control character U+0000; take it out")
            return None
        try:
            return expand(value, self._environ, is_plain=is_plain)
        except ExpansionError as error:
            self._note(path, str(error))
            return None

    def _note(self, path: Path, message: str, mark: Mark | None = None) -> None:
        self.problems.append((mark or self.values[path], Problem(path, message)))


def _mark(node: Any) -> Mark:
    return Mark(node.start_mark.line + 1, node.start_mark.column + 1)


def _syntax_problem(error: Any, name: str, text: str) -> tuple[Place, Problem]:
    """PyYAML's words, with the remedy of what people run into."""
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        mark = Mark(before.count("\n") + 1, error.position - before.rfind("\n"))
        return Place(name, mark), Problem(
            (), f"holds the control character U+{ord(text[error.position]):04X}; take it out"
        )
    mark = _mark_of(error)
    message = str(error.problem or error.context)
    remedies = {
        "'\\t'": "indent with spaces, never with tabs",
        "mapping values are not allowed": "quote a text that holds ': ', and check the indentation",
        "cannot start any token": "quote a text that begins with such a character",
        "single document": "one file holds one configuration; take out the line ---",
        "undefined alias": "quote a text that begins with *",
        "but got '{'": "quote a text that holds a brace, such as ${NAME}, inside brackets",
        "block end": "check the indentation",
    }
    remedy = next((advice for words, advice in remedies.items() if words in f"{message} {error.context or ''}"), "")
    complaint = message if isinstance(error, _TooMuch) else f"not YAML: {message}"
    lines = text.splitlines()
    line = lines[mark.line - 1] if mark.line <= len(lines) else ""
    return Place(name, mark, line), Problem((), f"{complaint}; {remedy}" if remedy else complaint)


def _mark_of(error: Any) -> Mark:
    """Where an error is; where it began when it shows only at the end, as a quote that is not closed does."""
    mark = error.problem_mark or error.context_mark
    if "unexpected end of stream" in str(error.problem) and error.context_mark is not None:
        mark = error.context_mark
    return Mark(mark.line + 1, mark.column + 1)
