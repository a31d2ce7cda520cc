"""Strict YAML with positions, and problems shown at them. The only module that imports PyYAML.

Beyond what PyYAML checks: no duplicate keys, no merge keys, no tags, plain words read by `resolve_plain` instead
of YAML 1.1, keys taken as written, the position of every key and value kept. Nothing is constructed but plain data,
and both nesting and aliases have a limit, since a few lines of YAML can expand to billions of values.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, NamedTuple

from lem.base import durable
from lem.base.dataclass import dataclass, field
from lem.base.errors import ConfigurationError
from lem.base.units import MIB
from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import MAX_SHOWN_PROBLEMS, ConfigProblems, Path, Problem
from lem.config.option import is_secret, redacted
from lem.config.scalars import ExpansionError, expand, resolve_plain

try:
    from lem._vendor.yaml import composer, nodes, parser, reader, scanner
    from lem._vendor.yaml import error as errors
except ImportError:
    from yaml import composer, nodes, parser, reader, scanner  # type: ignore[import-untyped, unused-ignore]
    from yaml import error as errors


MAX_FILE_B = 16 * MIB
MAX_DEPTH = 64
MAX_VALUES = 200_000
MAX_SHOWN_LINE = 100

_KEY = re.compile(r"([\w.-]+)[\"']?\s*:")
_TOP_KEY = re.compile(r"[\"']?[\w.-]+[\"']?\s*:(?:\s|$)")
_MAX_SEARCHED = 10_000  # characters

# Within a `${VAR:-default}`, characters that mean something in YAML, and those that stand for them while it is read.
_REFERENCE = re.compile(r"\$\{[A-Za-z_]\w*(?::-[^}\n]*)?\}")
_MASK = {ord(character): 0x10FF00 + ord(character) for character in "{}[],:#"}
_UNMASK = {stand_in: chr(character) for character, stand_in in _MASK.items()}

_PLAIN = "lem:plain"
_TEXT = "tag:yaml.org,2002:str"
_LIST = "tag:yaml.org,2002:seq"
_MAPPING = "tag:yaml.org,2002:map"


class Mark(NamedTuple):
    line: int
    column: int


@dataclass(frozen=True)
class Place:
    label: str
    mark: Mark | None = None
    line: str = ""  # without a secret; empty where there is nothing else to show

    def __str__(self) -> str:
        return ":".join((self.label, *map(str, self.mark or ())))


Located = list[tuple[Place, Problem]]


class FileProblems(ConfigProblems):
    def __init__(self, located: Iterable[tuple[Place, Problem]], hint: str = "") -> None:
        unique: dict[tuple[Place, str], tuple[Place, Problem]] = {}
        for place, problem in located:  # a campaign and its experiment may have the same problem
            unique.setdefault((place, problem.message if place.mark else str(problem)), (place, problem))
        files = list(dict.fromkeys(place.label for place, _ in unique))
        # Problems without a position come before those of their file, which are in the order of its lines.
        self.located = tuple(sorted(unique.values(), key=lambda it: (files.index(it[0].label), it[0].mark or (0, 0))))
        count = len(self.located)
        shown = [render(place, problem) for place, problem in self.located[:MAX_SHOWN_PROBLEMS]]
        if count > len(shown):
            shown.append(f"and {count - len(shown)} more")
        if count > 1:
            shown.insert(0, f"{count} problems in the configuration:")
        super().__init__((problem for _, problem in self.located), "\n".join(shown), hint)


def render(place: Place, problem: Problem) -> str:
    text = f"{place}: {problem}"
    if place.mark is None or not place.line.strip():
        return text
    begin = max(0, place.mark.column - MAX_SHOWN_LINE // 2) if len(place.line) > MAX_SHOWN_LINE else 0
    shown = place.line[begin : begin + MAX_SHOWN_LINE].replace("\t", " ").rstrip()
    gutter = f"{place.mark.line:5d} | "
    return f"{text}\n{gutter}{shown}\n{' ' * (len(gutter) - 2)}| {' ' * (place.mark.column - 1 - begin)}^"


class Span(NamedTuple):
    path: Path
    is_key: bool
    begin: Mark
    end_line: int

    @classmethod
    def of(cls, path: Path, node: Any, *, is_key: bool = False) -> Span:
        # Where a text without quotes or in lines of its own ends, PyYAML takes the empty lines behind it to it.
        return cls(path, is_key, _mark(node), node.end_mark.line + (1 if node.end_mark.column else 0))

    @property
    def is_secret(self) -> bool:
        """Whether a secret, or what may be meant as one, is here; it may be in a file of either kind."""
        names = tuple(part for part in self.path if isinstance(part, str))
        return redacted(CampaignConfig, names) != names if self.is_key else _is_secret(names)


@functools.cache  # the experiments of a list have the same names
def _is_secret(names: tuple[str, ...]) -> bool:
    return is_secret(CampaignConfig, names)


@dataclass(frozen=True)
class Document:
    name: str  # as the person named it
    path: FilePath  # to read it, and for the files that it names
    lines: tuple[str, ...] = ()
    tree: Any = None  # plain data; text in which `${VAR}` was expanded is `Expanded`
    keys: Mapping[Path, Mark] = field(default_factory=dict)  # where the key of a path begins
    values: Mapping[Path, Mark] = field(default_factory=dict)  # where the value of a path begins
    problems: tuple[tuple[Mark, Problem], ...] = ()  # whatever the options are: duplicate keys, unset variables
    spans: tuple[Span, ...] = ()  # of all keys and values, those of a list in that of the list

    @functools.cached_property
    def _hidden(self) -> Mapping[int, int]:
        found: dict[int, int] = {}
        for span in self.spans:
            if span.is_secret:
                for line in range(span.begin.line, span.end_line + 1):
                    column = span.begin.column if line == span.begin.line else 1
                    found[line] = min(column, found.get(line, column))
        return found

    @property
    def located(self) -> Located:
        return [(self.at(mark), problem) for mark, problem in self.problems]

    @property
    def top(self) -> Place:
        return self.at(self.values.get((), Mark(1, 1)))

    def at(self, mark: Mark | None) -> Place:
        if mark is None:
            return Place(self.name)
        line = self.lines[mark.line - 1] if mark.line <= len(self.lines) else ""
        column = self._hidden.get(mark.line)
        if column is not None:
            line = f"{line[: column - 1]}(hidden)" if mark.column <= column and column > 1 else ""
        return Place(self.name, mark, line)

    def find(self, path: Path, *, is_about_key: bool) -> tuple[int, Place]:
        at: Path = ()
        found = 0
        while found < len(path):
            step = self._step(at, path[found:])
            if step is None:
                break
            at, taken = step
            found += taken
        marks = self.keys if is_about_key and found == len(path) else self.values
        return found, self.at(marks.get(at, self.values.get(at)))

    def _step(self, at: Path, rest: Path) -> tuple[Path, int] | None:
        aliases = (alias for alias, name in ExperimentConfig.aliases.items() if name == rest[0])
        for name in (rest[0], *aliases):
            if (*at, name) in self.values:
                return (*at, name), 1
        for count in range(2, len(rest) + 1):
            joined = ".".join(str(part) for part in rest[:count])
            if (*at, joined) in self.values:
                return (*at, joined), count
        return None


def read_document(path: FilePath, environ: Mapping[str, str]) -> Document:
    try:
        with durable.open_regular(path) as stream:
            data = stream.read(MAX_FILE_B + 1)
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path}: no such file", "the path is relative to the current directory") from error
    except IsADirectoryError as error:
        raise ConfigurationError(f"{path}: expected a YAML file, found a folder") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigurationError(f"{path}: cannot be read: {reason}") from error
    if len(data) > MAX_FILE_B:
        raise _no_text(path, data, 0, f"larger than {MAX_FILE_B // MIB} MiB")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _no_text(path, data, 0, "is UTF-16", "save it as UTF-8")
    if b"\0" in data:
        raise _no_text(path, data, data.index(b"\0"), "expected a YAML file, found binary data")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The mark of UTF-8 at the beginning is left out of what the error counts in.
        begin = error.start + len(data) - len(error.object)
        raise _no_text(path, data, begin, f"is not UTF-8 (byte 0x{data[begin]:02x})", "save it as UTF-8") from error
    return _read_text(text, str(path), path, environ)


def parse_value(text: str, environ: Mapping[str, str], label: str) -> Any:
    try:
        document = _read_text(text, label, FilePath(), environ)
        if document.problems:
            raise FileProblems(document.located)
    except FileProblems as error:  # a position within a word of the command line is useless
        raise FileProblems((Place(label), problem) for _, problem in error.located) from error
    return document.tree


def _no_text(path: FilePath, data: bytes, offset: int, message: str, hint: str = "") -> FileProblems:
    before = data[:offset]
    column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
    place = Place(str(path), Mark(before.count(b"\n") + 1, column))
    return FileProblems([(place, Problem((), message))], hint)


def _read_text(text: str, name: str, path: FilePath, environ: Mapping[str, str]) -> Document:
    lines = tuple(text.splitlines())
    try:
        node = _Loader(_REFERENCE.sub(lambda found: found[0].translate(_MASK), text)).get_single_node()
    except errors.YAMLError as error:
        raise FileProblems([_syntax_problem(error, name, text)]) from error
    builder = _Builder(environ)
    tree = builder.build(node, ()) if node is not None else None
    problems, spans = tuple(builder.problems), tuple(builder.spans)
    return Document(name, path, lines, tree, builder.keys, builder.values, problems, spans)


class _TooMuch(errors.MarkedYAMLError):  # type: ignore[misc, unused-ignore]
    """More nesting or more values than a configuration has."""


class _Loader(reader.Reader, scanner.Scanner, parser.Parser, composer.Composer):  # type: ignore[misc, unused-ignore]
    def __init__(self, text: str) -> None:
        reader.Reader.__init__(self, text)
        scanner.Scanner.__init__(self)
        parser.Parser.__init__(self)
        composer.Composer.__init__(self)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise _TooMuch(None, None, f"nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def scan_flow_scalar_non_spaces(self, double: bool, start_mark: Any) -> Any:
        try:
            return super().scan_flow_scalar_non_spaces(double, start_mark)
        except (OverflowError, ValueError) as error:  # of chr(), which PyYAML gives any eight digits
            message = "expected at most \\U0010FFFF, the last character of Unicode"
            raise scanner.ScannerError(None, None, message, self.get_mark()) from error

    def descend_resolver(self, *_: Any) -> None:
        """Nothing: PyYAML's resolver is not used."""

    ascend_resolver = descend_resolver

    def resolve(self, kind: Any, _value: Any, implicit: Any) -> str:
        if kind is nodes.ScalarNode:
            return _PLAIN if implicit[0] else _TEXT
        return _LIST if kind is nodes.SequenceNode else _MAPPING


class _Builder:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._open: set[int] = set()
        self._count = 0
        self.keys: dict[Path, Mark] = {}
        self.values: dict[Path, Mark] = {}
        self.problems: list[tuple[Mark, Problem]] = []
        self.spans: list[Span] = []

    def build(self, node: Any, path: Path, within: Any = None) -> Any:
        self.values[path] = _mark(node)
        self._count += 1
        if self._count > MAX_VALUES:
            if self._count == MAX_VALUES + 1:
                self._note((), f"more than {MAX_VALUES} values; do aliases (*name) multiply?")
            return None
        if id(node) in self._open:
            self._note(path, "an alias (*name) that contains itself")
            return None
        if not isinstance(node, nodes.MappingNode) and not _is_item(node, within):  # whose keys and values are noted
            self.spans.append(Span.of(path, node))
        self._open.add(id(node))
        value = self._build(node, path)
        self._open.discard(id(node))
        return value

    def _build(self, node: Any, path: Path) -> Any:
        if isinstance(node, nodes.MappingNode) and node.tag == _MAPPING:
            return self._build_mapping(node, path)
        if isinstance(node, nodes.SequenceNode) and node.tag == _LIST:
            return [self.build(item, (*path, index), node) for index, item in enumerate(node.value)]
        if isinstance(node, nodes.ScalarNode) and node.tag in (_PLAIN, _TEXT):
            return self._build_scalar(node, path)
        self.spans.append(Span.of(path, node))
        tag = "this tag" if self.spans[-1].is_secret else f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')}"
        self._note(path, f"{tag} is not supported; remove it")
        return None

    def _build_mapping(self, node: Any, path: Path) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, nodes.ScalarNode) or key_node.tag not in (_PLAIN, _TEXT):
                self.spans += Span.of((*path, ""), key_node), Span.of((*path, ""), value_node)
                self._note(path, "expected plain text as the key", _mark(key_node))
                continue
            key = str(key_node.value).translate(_UNMASK)
            where = (*path, key)
            self.spans.append(Span.of(where, key_node, is_key=True))
            if key in out or key == "<<":  # what is not read
                self.spans.append(Span.of(where, value_node))
            if key in out:
                self._note(where, f"duplicate key, first on line {self.keys[where].line}", _mark(key_node))
                continue
            self.keys[where] = _mark(key_node)
            if key == "<<" and key_node.tag == _PLAIN:
                self._note(where, "merge keys are not supported; use _extends or repeat the values", _mark(key_node))
                continue
            out[key] = self.build(value_node, where)
        return out

    def _build_scalar(self, node: Any, path: Path) -> Any:
        is_plain = node.tag == _PLAIN
        text = node.value.translate(_UNMASK)
        value = resolve_plain(text) if is_plain else text
        if not isinstance(value, str):
            return value
        if any("\ud800" <= character <= "\udfff" for character in value):
            self._note(path, "contains half of a surrogate pair")
            return None
        if "\0" in value:
            self._note(path, "contains the control character U+0000; remove it")
            return None
        try:
            return expand(value, self._environ, is_plain=is_plain)
        except ExpansionError as error:
            self._note(path, str(error))
            return None

    def _note(self, path: Path, message: str, mark: Mark | None = None) -> None:
        self.problems.append((mark or self.values[path], Problem(path, message)))


def _is_item(node: Any, within: Any) -> bool:
    """Whether a text is written in that list; an alias (*name) may be to one elsewhere."""
    if within is None or not isinstance(node, nodes.ScalarNode):
        return False
    return bool(within.start_mark.index <= node.start_mark.index and node.end_mark.index <= within.end_mark.index)


def _mark(node: Any) -> Mark:
    return Mark(node.start_mark.line + 1, node.start_mark.column + 1)


def _syntax_problem(error: Any, name: str, text: str) -> tuple[Place, Problem]:
    if isinstance(error, reader.ReaderError):
        before = text[: error.position]
        mark = Mark(before.count("\n") + 1, error.position - before.rfind("\n"))
        complaint = f"contains the control character U+{ord(text[error.position]):04X}; remove it"
        return Place(name, mark), Problem((), complaint)
    found = error.problem_mark or error.context_mark
    if "unexpected end of stream" in str(error.problem) and error.context_mark is not None:
        found = error.context_mark  # where an open quote begins
    mark = Mark(found.line + 1, found.column + 1)
    message = str(error.problem or error.context).translate(_UNMASK)
    remedies = {
        "'\\t'": "indent with spaces, never with tabs",
        "mapping values are not allowed": "quote a text that contains ': ', and check the indentation",
        "cannot start any token": "quote a text that begins with such a character",
        "single document": "write one configuration per file; remove the line ---",
        "undefined alias": "quote a text that begins with *",
        "but got '{'": "inside brackets, quote a text with a brace",
        "block end": "check the indentation",
    }
    remedy = next((advice for words, advice in remedies.items() if words in f"{message} {error.context or ''}"), "")
    message = re.sub(r"(alias|anchor|tag handle) '.*'", r"\1", message)  # which may be in a secret
    complaint = message if isinstance(error, _TooMuch) else f"not YAML: {message}"
    place = Document(name, FilePath(), _without_secrets(text.splitlines(), mark.line)).at(mark)
    return place, Problem((), f"{complaint}; {remedy}" if remedy else complaint)


def _without_secrets(lines: Sequence[str], number: int) -> tuple[str, ...]:
    """The lines of a text that is not YAML; that of a number is empty if a secret may be in it."""
    # One may be there if, since the last key without indentation, there is the name of one or of a section with one.
    begin = next((at for at in range(number - 1, 0, -1) if _TOP_KEY.match(lines[at])), 0) if number <= len(lines) else 0
    above = "\n".join(lines[begin:number])
    if len(above) > _MAX_SEARCHED or any(_is_secret((name,)) for name in _KEY.findall(above)):
        return (*lines[: number - 1], "", *lines[number:])
    return tuple(lines)
