"""Raw settings with the place of each: documents, presets, inheritance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any, Protocol

from lem.base.errors import ConfigurationError
from lem.config.kinds import as_written
from lem.config.merging import canonical, leaves, merge
from lem.config.option import Section, find_option, walk
from lem.config.problems import ConfigProblems, Path, Problem, did_you_mean, dotted

MAX_SHOWN_PROBLEMS = 100
MAX_SHOWN_LINE = 100


@dataclass(frozen=True)
class Mark:
    """A position in a file, from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Place:
    """Where a problem is shown: a file with a position in it, or a source that is no file."""

    label: str
    mark: Mark | None = None
    line: str = ""

    def __str__(self) -> str:
        return self.label if self.mark is None else f"{self.label}:{self.mark.line}:{self.mark.column}"


@dataclass(frozen=True)
class Document:
    """A file as read: plain values and where they stand.

    Attributes:
        name: as the person named it.
        path: to read it, and for what lies beside it.
        tree: plain data; text in which `${VAR}` was expanded is `Expanded`.
        keys, values: where the key and the value of a path begin.
        problems: what is wrong whatever the options are: duplicate keys, unset variables.
    """

    name: str
    path: FilePath
    lines: tuple[str, ...] = ()
    tree: Any = None
    keys: Mapping[Path, Mark] = field(default_factory=dict)
    values: Mapping[Path, Mark] = field(default_factory=dict)
    problems: tuple[tuple[Mark, Problem], ...] = ()

    @property
    def located(self) -> list[tuple[Place, Problem]]:
        """The problems with their places."""
        return [(self.at(mark), problem) for mark, problem in self.problems]

    @property
    def top(self) -> Mark:
        """Where the configuration begins, or the file where it holds none."""
        return self.values.get((), Mark(1, 1))

    def at(self, mark: Mark | None) -> Place:
        """A position in this file as a place."""
        if mark is None:
            return Place(self.name)
        return Place(self.name, mark, self.lines[mark.line - 1] if mark.line <= len(self.lines) else "")

    def find(self, path: Path, *, is_about_key: bool) -> tuple[int, Mark | None]:
        """How many parts of a path were found in the file, and where the last of them stands."""
        at: Path = ()
        found = 0
        while found < len(path):
            step = self._step(at, path[found:])
            if step is None:
                break
            at, taken = step
            found += taken
        marks = self.keys if is_about_key and found == len(path) else self.values
        return found, marks.get(at, self.values.get(at))

    def _step(self, at: Path, rest: Path) -> tuple[Path, int] | None:
        """One step down: under the name itself, another name of it, or several parts written as one dotted key."""
        for name in (rest[0], *_other_names().get(str(rest[0]), ())):
            if (*at, name) in self.values:
                return (*at, name), 1
        for count in range(2, len(rest) + 1):
            joined = ".".join(str(part) for part in rest[:count])
            if (*at, joined) in self.values:
                return (*at, joined), count
        return None


@dataclass(frozen=True)
class Layer:
    """One source of values, laid over others.

    Attributes:
        kind: `command line`, `file`, `preset` or `default`.
        label: what to call it: the file's name, `--set a.b=c`, `preset benchmark`.
        mapping: the values, as the section they are for has them.
        document: the file they come from; None when it is none.
        prefix: where in the document the mapping stands.
    """

    kind: str
    label: str
    mapping: Mapping[str, Any]
    document: Document | None = None
    prefix: Path = ()


class FileProblems(ConfigProblems):
    """Problems with the places they stand in; the message shows the lines.

    Attributes:
        located: the problems with their places, in the order of the message.
    """

    def __init__(self, located: Iterable[tuple[Place, Problem]], hint: str = "") -> None:
        # The same thing may be found twice: in a campaign, and in the experiment it is part of.
        unique = _without_repeats(located)
        self.located = tuple(sorted(unique, key=_order(unique)))
        shown = [render(place, problem) for place, problem in self.located[:MAX_SHOWN_PROBLEMS]]
        count = len(self.located)
        if count > len(shown):
            shown.append(f"and {count - len(shown)} more")
        if count > 1:
            shown.insert(0, f"{count} problems in the configuration:")
        super().__init__((problem for _, problem in self.located), "\n".join(shown), hint)


@dataclass(frozen=True)
class Source:
    """Layers over each other, and what they make.

    Attributes:
        section: what the values are for.
        layers: the lowest first.
        mapping: the layers merged, not yet validated.
        origins: for each value given, the number of the layer that has the last word on it.
        main: which document problems are laid to that have no place of their own.
        prefix: where all this stands in what the person wrote, for naming options.
    """

    section: type[Section]
    layers: tuple[Layer, ...] = ()
    mapping: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[Path, int] = field(default_factory=dict)
    main: Document | None = None
    prefix: Path = ()

    def over(self, layer: Layer) -> Source:
        """The source with another layer on top."""
        mapping = merge(self.section, self.mapping, layer.mapping)
        given = {path for path, _ in leaves(canonical(self.section, layer.mapping))}
        number = len(self.layers)
        origins = {
            path: number if path in given else self.origins[path]
            for path, _ in leaves(mapping)
            if path in given or path in self.origins
        }
        return dataclasses.replace(self, layers=(*self.layers, layer), mapping=mapping, origins=origins)

    @property
    def unexpanded(self) -> dict[str, Any]:
        """What was given, as it was written, with `${VAR}` unexpanded; records hold this."""
        written: dict[str, Any] = as_written(self.mapping)
        return written

    def layer_of(self, path: Path) -> Layer | None:
        """The layer that gave the value at a path, or the value that holds it; None for a default."""
        for length in range(len(path), 0, -1):
            number = self.origins.get(path[:length])
            if number is not None:
                return self.layers[number]
        return None

    def place(self, path: Path, *, is_about_key: bool = False) -> Place:
        """Where a path was written; the nearest place above it when it was not."""
        owner = self.layer_of(path)
        if owner is not None:
            found, place = _place_in(owner, path, is_about_key=is_about_key)
            if found:
                return place
        best: tuple[int, Place] | None = None
        for layer in reversed(self.layers):
            found, place = _place_in(layer, path, is_about_key=is_about_key)
            if found and (best is None or found > best[0]):
                best = (found, place)
        if best is not None:
            return best[1]
        return Place(dotted(path)) if self.main is None else self.main.at(self.main.top)

    def folder_of(self, path: Path) -> FilePath:
        """The folder that a relative file name at a path is relative to: its file's, or the working directory."""
        layer = self.layer_of(path)
        return layer.document.path.parent if layer is not None and layer.document is not None else FilePath()

    def locate(self, problems: Iterable[Problem]) -> list[tuple[Place, Problem]]:
        """The problems with their places."""
        located = [(self.place(item.path, is_about_key=item.is_about_key), item) for item in problems]
        return [
            (
                dataclasses.replace(place, line="") if is_secret(self.section, item.path) else place,
                dataclasses.replace(item, path=(*self.prefix, *item.path)),
            )
            for place, item in located
        ]

    def error(self, problems: Iterable[Problem]) -> FileProblems:
        """The problems as an error to raise."""
        return FileProblems(self.locate(problems))


def render(place: Place, problem: Problem) -> str:
    """The problem with its place, then the line with a caret under the column."""
    text = f"{place}: {problem}"
    if place.mark is None or not place.line.strip() or any(name in place.line for name in _secret_names()):
        return text
    begin = max(0, place.mark.column - MAX_SHOWN_LINE // 2) if len(place.line) > MAX_SHOWN_LINE else 0
    shown = place.line[begin : begin + MAX_SHOWN_LINE].replace("\t", " ").rstrip()
    gutter = f"{place.mark.line:5d} | "
    return f"{text}\n{gutter}{shown}\n{' ' * (len(gutter) - 2)}| {' ' * (place.mark.column - 1 - begin)}^"


def is_secret(section: type[Section], path: Path) -> bool:
    """Whether a path leads to an option that is never shown."""
    found = find_option(section, ".".join(part for part in path if isinstance(part, str)))
    return found is not None and found.option.is_secret


@functools.cache
def _other_names() -> Mapping[str, tuple[str, ...]]:
    """Names under which options of an experiment may have been written instead of their own."""
    from lem.config.experiment import ExperimentConfig

    names: dict[str, tuple[str, ...]] = {}
    for alias, name in ExperimentConfig.aliases.items():
        names[name] = (*names.get(name, ()), alias)
    return names


@functools.cache
def _secret_names() -> tuple[str, ...]:
    """Names of options never shown; a line that holds one may hold its value."""
    from lem.config.campaign_config import CampaignConfig

    return tuple(key.rpartition(".")[2] for key, item, _ in walk(CampaignConfig) if item.option.is_secret)


def _place_in(layer: Layer, path: Path, *, is_about_key: bool) -> tuple[int, Place]:
    document = layer.document
    if document is None:
        node: Any = layer.mapping
        found = 0
        while found < len(path) and isinstance(node, Mapping) and path[found] in node:
            node, found = node[path[found]], found + 1
        return found, Place(layer.label)
    found, mark = document.find((*layer.prefix, *path), is_about_key=is_about_key)
    found -= len(layer.prefix)
    return found, document.at(mark)


def _without_repeats(located: Iterable[tuple[Place, Problem]]) -> list[tuple[Place, Problem]]:
    seen: dict[tuple[Place, str], tuple[Place, Problem]] = {}
    for place, problem in located:
        seen.setdefault((place, problem.message if place.mark else str(problem)), (place, problem))
    return list(seen.values())


def _order(located: list[tuple[Place, Problem]]) -> Any:
    """Files in the order they turned up, problems by line and column; those without a place come first."""
    labels = list(dict.fromkeys(place.label for place, _ in located))

    def key(item: tuple[Place, Problem]) -> tuple[int, int, int]:
        mark = item[0].mark or Mark(0, 0)
        return labels.index(item[0].label), mark.line, mark.column

    return key


@dataclass(frozen=True)
class Preset:
    """Values of an experiment under a name.

    Attributes:
        values: as an experiment file would have them.
    """

    name: str
    description: str
    values: Mapping[str, Any]


def _preset(
    name: str, description: str, tokens: tuple[int, int], backend: str | None = None, **options: Any
) -> tuple[str, Preset]:
    values: dict[str, Any] = {
        "max_input_tokens": tokens[0],
        "max_output_tokens": tokens[1],
        "decoder": {"preset": "deterministic"},  # all are greedy, so that two runs do the same work
    }
    if backend is not None:
        values.update({"backend": backend, backend: options})
    return name, Preset(name, description, MappingProxyType(values))


PRESETS: Mapping[str, Preset] = MappingProxyType(
    dict(
        (
            _preset("quick-test", "Short prompts and outputs, to see that everything works.", (64, 32)),
            _preset("benchmark", "Long prompts and outputs, for numbers to compare.", (2048, 512)),
            _preset("throughput", "Medium lengths, for tokens per second.", (512, 256)),
            _preset(
                "vllm-throughput",
                "vLLM with many requests at a time, chunked prefill and prefix caching.",
                (2048, 512),
                "vllm",
                max_num_seqs=256,
                enable_chunked_prefill=True,
                enable_prefix_caching=True,
            ),
            _preset(
                "vllm-speculative",
                "vLLM drafting 5 tokens at a time from n-grams of the prompt.",
                (2048, 256),
                "vllm",
                speculative={"method": "ngram", "num_tokens": 5, "prompt_lookup_max": 4},
            ),
            _preset(
                "vllm-memory-efficient", "vLLM with an fp8 key-value cache.", (4096, 512), "vllm", kv_cache_dtype="fp8"
            ),
            _preset(
                "vllm-low-latency",
                "vLLM with few requests at a time and no CUDA graphs.",
                (512, 128),
                "vllm",
                max_num_seqs=32,
                enforce_eager=True,
            ),
            _preset(
                "pytorch-optimized",
                "transformers with flash attention 2, compiled.",
                (2048, 512),
                "pytorch",
                attn_implementation="flash_attention_2",
                torch_compile="default",
            ),
            _preset(
                "pytorch-speculative",
                "transformers drafting 5 tokens at a time from n-grams of the prompt.",
                (2048, 256),
                "pytorch",
                assisted_generation={"num_tokens": 5},
            ),
            _preset(
                "pytorch-compatible",
                "transformers with eager attention, which runs every model.",
                (512, 128),
                "pytorch",
                attn_implementation="eager",
            ),
        )
    )
)


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigurationError: there is none.
    """
    found = PRESETS.get(name)
    if found is not None:
        return found
    raise ConfigurationError(
        f"there is no preset {name!r}{did_you_mean(name, list(PRESETS))}", f"one of: {', '.join(PRESETS)}"
    )


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
