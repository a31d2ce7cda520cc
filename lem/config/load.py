"""From files and overrides to a campaign or an experiment, with every problem at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Generic, TypeVar

from lem.base.dataclass import dataclass, field, replace
from lem.base.doc import json_text
from lem.base.durable import in_home
from lem.base.errors import ConfigurationError, nearest
from lem.config.backends import BACKENDS, find_preset
from lem.config.campaign_config import CampaignConfig, CampaignExplicitExperiment, with_campaign_defaults
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import ConfigProblems, Expanded, MapKind, Path, Problem, as_written, dotted, simple
from lem.config.option import Section, canonical, declared, find_option, is_secret, leaves, merge, nest, redacted
from lem.config.sections import DecoderConfig
from lem.config.terms import LLENERGY_NAMES, either, find_term
from lem.config.yamlfile import Document, FileProblems, Located, Place, parse_value, read_document

S = TypeVar("S", bound=Section)
Sets = Sequence["str | tuple[str, Any]"]

EXTENDS = "_extends"

# Options of which each makes a file a campaign, and all that only a campaign has.
_CAMPAIGN_MARKS = ("campaign_name", "grid", "configs", "experiments")
_CAMPAIGN_ONLY = frozenset(declared(CampaignConfig)) - frozenset(declared(ExperimentConfig))
_EXPERIMENT_ONLY = frozenset(declared(ExperimentConfig)) - frozenset(declared(CampaignConfig))

# The model of an experiment without one, to find what else is wrong with it.
_NO_MODEL = {"name": "none"}


@dataclass(frozen=True)
class Layer:
    kind: str  # `command line`, `file` or `preset`
    label: str  # the file's name, `--set a.b=c`, `preset benchmark`
    mapping: Mapping[str, Any]
    document: Document | None = None  # the file they come from
    prefix: Path = ()  # the path of the mapping in the document

    def find(self, path: Path, *, is_about_key: bool) -> tuple[int, Place]:
        if self.document is not None:
            found, place = self.document.find((*self.prefix, *path), is_about_key=is_about_key)
            return found - len(self.prefix), place
        node: Any = self.mapping
        found = 0
        while found < len(path) and isinstance(node, Mapping) and path[found] in node:
            node, found = node[path[found]], found + 1
        return found, Place(self.label)


@dataclass(frozen=True)
class Source:
    section: type[Section]  # what the values are for
    layers: tuple[Layer, ...] = ()
    mapping: Mapping[str, Any] = field(default_factory=dict)  # the layers merged, not yet validated
    origins: Mapping[Path, Layer] = field(default_factory=dict)  # for each value, the layer it comes from
    main: Document | None = None  # for problems without a place of their own
    prefix: Path = ()  # the path of all this in the campaign, for naming options

    def over(self, layer: Layer) -> Source:
        mapping = merge(self.section, self.mapping, layer.mapping)
        given = {path for path, _ in leaves(canonical(self.section, layer.mapping))}
        origins = {
            path: layer if path in given else self.origins[path]
            for path, _ in leaves(mapping)
            if path in given or path in self.origins
        }
        return replace(self, layers=(*self.layers, layer), mapping=mapping, origins=origins)

    @property
    def unexpanded(self) -> dict[str, Any]:
        written: dict[str, Any] = as_written(self.mapping)
        return written

    @property
    def forced(self) -> frozenset[str]:
        """The options given on the command line, which win over the experiments' own (`with_campaign_defaults`)."""
        return frozenset(dotted(path) for path, layer in self.origins.items() if layer.kind == "command line")

    def layer_of(self, path: Path) -> Layer | None:
        above = (path[:length] for length in range(len(path), 0, -1))
        given = next((part for part in above if part in self.origins), path)
        value: Any = self.mapping
        for key in given if given in self.origins else ():
            value = value[key]
        return None if value is None and given != path else self.origins.get(given)  # below a null are defaults

    def has(self, path: Path) -> bool:
        return any(layer.find(path, is_about_key=False)[0] == len(path) for layer in self.layers)

    def place(self, path: Path, *, is_about_key: bool = False) -> Place:
        owner = self.layer_of(path)
        for layers in ((owner,) if owner is not None else (), self.layers[::-1]):
            places = [layer.find(path, is_about_key=is_about_key) for layer in layers]
            found, place = max(places, key=lambda item: item[0], default=(0, Place("")))
            if found:
                return place
        return Place(dotted(path)) if self.main is None else self.main.top

    def folder_of(self, path: Path) -> FilePath:
        layer = self.layer_of(path)
        return layer.document.path.parent if layer is not None and layer.document is not None else FilePath()

    def found_file(self, name: str, *paths: Path) -> str:
        """A file name at one of the paths, from the working directory; unchanged if the file is only there."""
        home = in_home(name)
        if str(home) != name and name.startswith("~"):
            return Expanded(str(home), name.written, str(home)) if isinstance(name, Expanded) else str(home)
        folder = next((self.folder_of(path) for path in paths if self.layer_of(path) is not None), FilePath())
        if folder == FilePath() or (FilePath(name).exists() and not (folder / name).exists()):
            return name
        found = str(folder / name)
        return Expanded(found, str(folder / name.written), found) if isinstance(name, Expanded) else found

    def locate(self, problems: Iterable[Problem]) -> Located:
        placed = [(self.place(item.path, is_about_key=item.is_about_key), item) for item in problems]
        prefixed = [(place, replace(item, path=(*self.prefix, *item.path))) for place, item in placed]
        return _without_secrets(prefixed)


def _without_secrets(located: Located) -> Located:
    return [(place, replace(item, path=redacted(CampaignConfig, item.path))) for place, item in located]


@dataclass(frozen=True)
class ListedExperiment:
    mapping: Mapping[str, Any]  # its options, defaults of the campaign included; text from `${VAR}` is `Expanded`
    source: Source  # where they come from
    path: FilePath | None  # its file; None for one written in the campaign

    @property
    def name(self) -> str | None:
        given = self.mapping.get("config_name")
        return given if isinstance(given, str) else self.path.stem if self.path is not None else None


@dataclass(frozen=True)
class Loaded(Generic[S]):
    config: S
    source: Source
    listed: tuple[ListedExperiment, ...] = ()  # the experiments of `configs`, then those of `experiments`
    preset: Mapping[str, Any] = field(default_factory=dict)  # values that the experiments of a grid start from

    @property
    def provenance(self) -> dict[str, str]:
        decoder = self.config.decoder if isinstance(self.config, ExperimentConfig) else DecoderConfig()
        derived = {("decoder", name) for name in decoder.changed()} if decoder.preset is not None else ()
        kinds = {}
        for path, _ in leaves(self.config.to_dict()):
            layer = self.source.layer_of(path)
            kinds[dotted(path)] = layer.kind if layer is not None else "preset" if path in derived else "default"
        return kinds


def load_campaign(
    path: FilePath | str, sets: Sets = (), preset: str | None = None, environ: Mapping[str, str] = os.environ
) -> Loaded[CampaignConfig]:
    """A campaign file and those it names, validated; FileProblems, or ConfigurationError if one is unreadable."""
    loader = _Loader(sets, preset, environ)
    source, found = loader.read(FilePath(path), CampaignConfig)
    keys = set(source.mapping)
    if keys and not keys & set(_CAMPAIGN_MARKS) and (keys & _EXPERIMENT_ONLY or not keys & _CAMPAIGN_ONLY):
        problem = Problem((), f"expected a campaign, got an experiment: {either(_CAMPAIGN_MARKS)} is missing")
        hint = f"run it with `lem experiment {path}`, or make a campaign of it with --campaign-name NAME"
        raise FileProblems(source.locate([problem]), hint)
    return loader.campaign(source, found)


def load_campaign_of_files(
    name: str,
    paths: Sequence[FilePath | str],
    sets: Sets = (),
    preset: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Loaded[CampaignConfig]:
    mapping = {"campaign_name": name, "configs": [str(path) for path in paths]}
    source = Source(CampaignConfig).over(Layer("command line", "the command line", mapping))
    return _Loader(sets, preset, environ).campaign(source)


def complete_campaign(campaign: CampaignConfig, environ: Mapping[str, str] = os.environ) -> Loaded[CampaignConfig]:
    source = Source(CampaignConfig).over(Layer("file", campaign.campaign_name, campaign.changed()))
    return _Loader((), None, environ).campaign(source)


def load_experiment(
    path: FilePath | str | None, sets: Sets = (), preset: str | None = None, environ: Mapping[str, str] = os.environ
) -> Loaded[ExperimentConfig]:
    loader = _Loader(sets, preset, environ)
    empty: tuple[Source, Located] = loader.start(ExperimentConfig), []
    source, found = empty if path is None else loader.read(FilePath(path), ExperimentConfig)
    mark = next((key for key in _CAMPAIGN_MARKS if key in source.mapping), None)
    if mark is not None:
        problem = Problem((mark,), "expected an experiment, got a campaign: it has this key", is_about_key=True)
        raise FileProblems(source.locate([problem]), f"run it with `lem campaign {path}`")
    source = loader.with_sets(source)
    config, problems = _validate(ExperimentConfig, source)
    return Loaded(_without_problems(config, found, problems), source)


def kind_of(path: FilePath | str, environ: Mapping[str, str] = os.environ) -> str:
    source, _ = _Loader((), None, environ).read(FilePath(path), ExperimentConfig)
    return "campaign" if set(_CAMPAIGN_MARKS) & set(source.mapping) else "experiment"


def read_mapping(path: FilePath | str, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    source, found = _Loader((), None, environ).read(FilePath(path), ExperimentConfig)
    if found:
        raise FileProblems(found)
    return source.unexpanded


@dataclass(frozen=True)
class _Loader:
    sets: Sets
    preset: str | None
    environ: Mapping[str, str]

    def read(self, path: FilePath, section: type[Section]) -> tuple[Source, Located]:
        documents: list[Document] = []
        found: Located = []
        following: FilePath | None = path
        while following is not None:
            document = read_document(following, self.environ)
            if not isinstance(document.tree, Mapping):
                found_type = "a list" if isinstance(document.tree, list) else "plain text"
                complaint = f"expected a mapping (key: value) at the top level, got {found_type}"
                if document.tree is None:
                    complaint = "the file is empty; `lem config new` writes one to start from"
                raise FileProblems([(document.top, Problem((), complaint))])
            documents.append(document)
            found += _without_secrets(document.located)
            following = _base_of(documents, found)
        source = replace(self.start(section), main=documents[0])
        for document in reversed(documents):
            values = {key: value for key, value in document.tree.items() if key != EXTENDS}
            source = source.over(Layer("file", document.name, values, document))
        return source, found

    def start(self, section: type[Section]) -> Source:
        source = Source(section)
        if self.preset is None or section is not ExperimentConfig:
            return source
        return source.over(Layer("preset", f"preset {self.preset}", find_preset(self.preset).values))

    def with_sets(self, source: Source) -> Source:
        for label, key, value in self._given():
            keys = _keys_of(source.section, key)
            if source.section is CampaignConfig and keys[0] in _EXPERIMENT_ONLY:
                grid = source.mapping.get("grid")
                if not isinstance(grid, Mapping):
                    continue
                if key == "backend":
                    keys, value = ["grid", "backends"], [value]
                elif keys[0] not in BACKENDS:
                    keys, value = ["grid", "shared", key], [value]
                elif keys[0] in _items(grid.get("backends")) and keys[1:]:
                    keys, value = ["grid", "backend_overrides", keys[0], key.partition(".")[2]], [value]
                elif keys[0] in _items(grid.get("backends")) and isinstance(value, Mapping):
                    value = {name: [item] for name, item in value.items()}
                    keys = ["grid", "backend_overrides", keys[0]]
                else:
                    continue
            source = source.over(Layer("command line", label, nest(keys, value)))
        return source

    def _given(self) -> Iterable[tuple[str, str, Any]]:
        given = []
        for item in self.sets:
            key, equals, text = item.partition("=") if isinstance(item, str) else (item[0], "=", str(item[1]))
            key = key.strip()
            shown = "(hidden)" if equals and is_secret(CampaignConfig, tuple(key.split("."))) else text
            label = f"--set {key}{equals}{shown}"
            if not equals or not all(key.split(".")):
                raise ConfigurationError(f"{label}: expected KEY=VALUE", "such as --set execution.cycles=5")
            given.append((label, key, parse_value(text, self.environ, label) if isinstance(item, str) else item[1]))
        return sorted(given, key=lambda item: item[1] != "backend")

    def _idle_sets(self, campaign: Source, listed: Sequence[ListedExperiment]) -> Located:
        grid = campaign.mapping.get("grid")
        backends = [one.mapping.get("backend", BACKENDS[0]) for one in listed]
        backends += _items(grid.get("backends")) if isinstance(grid, Mapping) else ()
        given = ((label, key.partition(".")[0]) for label, key, _ in self._given())
        idle = [(label, own) for label, own in given if own in BACKENDS and own not in backends]
        return [
            (Place(label), Problem((), f"has no effect: no experiment has the backend {own}")) for label, own in idle
        ]

    def _with_own_sets(self, one: ListedExperiment) -> ListedExperiment:
        source = one.source
        for label, key, value in self._given():
            keys = _keys_of(ExperimentConfig, key)
            backend = source.mapping.get("backend", BACKENDS[0])
            if keys[0] in _EXPERIMENT_ONLY and (keys[0] not in BACKENDS or keys[0] == backend):
                source = source.over(Layer("command line", label, nest(keys, value)))
        return replace(one, mapping=source.mapping, source=source)

    def campaign(self, source: Source, found: Located | None = None) -> Loaded[CampaignConfig]:
        source = self.with_sets(source)
        start = find_preset(self.preset).values if self.preset is not None else {}
        config, problems = _validate(CampaignConfig, source)
        listed = []
        for one in map(self._with_own_sets, self._listed(source, problems)):
            mapping = one.mapping if config is None else with_campaign_defaults(config, one.mapping, source.forced)
            listed.append(replace(one, mapping=mapping))
            # An experiment without a model is not an error of the file: the plan filters it, with that reason.
            checked = mapping if "model" in mapping else {**mapping, "model": _NO_MODEL}
            try:
                ExperimentConfig.from_dict(checked)
            except ConfigProblems as error:
                problems += one.source.locate(map(_explained, error.problems))
        problems = problems or self._idle_sets(source, listed)
        return Loaded(_without_problems(config, found or [], problems), source, tuple(listed), start)

    def _listed(self, campaign: Source, problems: Located) -> Iterable[ListedExperiment]:
        for index, name in enumerate(_items(campaign.mapping.get("configs"))):
            yield from self._of_file(campaign, ("configs", index), name, None, problems)
        for index, entry in enumerate(_items(campaign.mapping.get("experiments"))):
            path = ("experiments", index)
            if isinstance(entry, Mapping) and entry.get("config") is not None:
                yield from self._of_file(campaign, (*path, "config"), entry["config"], entry.get("overrides"), problems)
            elif isinstance(entry, Mapping):
                start = replace(self.start(ExperimentConfig), main=campaign.main, prefix=path)
                source = _over(start, campaign, entry.get("inline", entry), path)
                yield ListedExperiment(source.mapping, source, None)

    def _of_file(
        self, campaign: Source, path: Path, name: Any, overrides: Any, problems: Located
    ) -> Iterable[ListedExperiment]:
        if not isinstance(name, str) or not name:
            return  # refused by the validation of the campaign
        file = campaign.folder_of(path) / name
        try:
            source, found = self.read(file, ExperimentConfig)
        except FileProblems as error:
            problems += error.located
        except ConfigurationError as error:
            problems.append((campaign.place(path), Problem(path, error.message)))
        else:
            problems += found
            if isinstance(overrides, Mapping):
                nested = CampaignExplicitExperiment.nest_overrides(overrides)
                source = _over(source, campaign, nested, (*path[:-1], "overrides"))
            yield ListedExperiment(source.mapping, source, file)


def _over(source: Source, campaign: Source, values: Any, path: Path) -> Source:
    layer = campaign.layer_of(path[:1])
    mapping = values if isinstance(values, Mapping) else {}
    return source if layer is None else source.over(replace(layer, mapping=mapping, prefix=path))


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else () if value is None else (value,)


def _base_of(documents: Sequence[Document], found: Located) -> FilePath | None:
    document = documents[-1]
    if EXTENDS not in document.tree:
        return None
    name = document.tree[EXTENDS]
    base = document.path.parent / str(name)
    if not isinstance(name, str) or not name:
        complaint = "expected the name of one file"
    elif base.resolve() in [earlier.path.resolve() for earlier in documents]:
        complaint = f"{base} inherits from itself"
    elif not os.path.isfile(base):  # noqa: PTH113 - False also for a name too long and a folder that is not readable
        complaint = f"{str(base)[:200]}: no such file"
    else:
        return base
    found.append((document.at(document.values.get((EXTENDS,))), Problem((EXTENDS,), complaint)))
    return None


def _keys_of(section: type[Section], key: str) -> list[str]:
    parts = key.split(".")
    for length in range(1, len(parts)):
        item = find_option(section, ".".join(parts[:length]))
        if item is not None and isinstance(item.kind, MapKind) and item.dotted_after is not None:
            split = length + item.dotted_after
            return [*parts[:split], ".".join(parts[split:])] if parts[split:] else parts
    return parts


def _validate(section: type[S], source: Source) -> tuple[S | None, Located]:
    try:
        return section.from_dict(source.mapping), []
    except ConfigProblems as error:
        return None, source.locate(map(_explained, error.problems) if section is ExperimentConfig else error.problems)


def _explained(problem: Problem) -> Problem:
    key = str(problem.path[-1]) if problem.is_about_key and problem.suggestion is None else ""
    term = find_term(key)
    named = [name for name in (term.options if term else ()) if find_option(CampaignConfig, name) is not None]
    if len(problem.path) == 1 and key in _CAMPAIGN_ONLY:
        named = [key]
    if named and not any(find_option(ExperimentConfig, name) for name in (term.options if term else ())):
        return replace(problem, message=f"unknown key; a campaign sets {named[0]}, an experiment does not")
    if not key or term or len(problem.path) > 1 or key in declared(ExperimentConfig):
        return problem
    return replace(problem, suggestion=nearest(key, sorted(_CAMPAIGN_ONLY)))


def _without_problems(config: S | None, found: Located, problems: Located) -> S:
    """The configuration; else FileProblems, without those of the validation about a value that could not be read."""
    unread = {place for place, _ in found if place.mark is not None}
    located = [*found, *(item for item in problems if item[0] not in unread)]
    if located or config is None:
        foreign = {item.path[-1]: at.label for at, item in located if item.path and item.path[-1] in LLENERGY_NAMES}
        label = next(iter(foreign.values()), "")
        remedy = f"if it is a file of LLenergyMeasure, convert it: lem config convert {label} > converted.yaml"
        raise FileProblems(located, remedy if len(foreign) > 1 else "")
    return config


def encode_config(config_dict: Mapping[str, Any]) -> str:
    return json_text(_as_yaml(config_dict))


def _as_yaml(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_yaml(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_yaml(item) for item in value]
    if isinstance(value, Expanded):
        # In quotes a reference is text; one that stood for a number or a truth value is written as that.
        plain = simple(value)
        return value.written if isinstance(plain, str) else plain
    return value.replace("${", "$${") if isinstance(value, str) else value
