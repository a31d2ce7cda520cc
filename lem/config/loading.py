"""Files, presets and overrides put together: command line over file over preset over default.

Reading YAML is handed in (`yamlfile` does it), so that nothing else here needs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Generic, Protocol, TypeVar

from lem.config.campaign_config import CampaignConfig, CampaignExperimentEntry
from lem.config.defaults import given, with_campaign_defaults
from lem.config.experiment_config import ExperimentConfig
from lem.config.kinds import MapKind, NullableKind
from lem.config.merging import leaves
from lem.config.presets import find_preset
from lem.config.problems import ConfigProblems, Path, Problem, dotted
from lem.config.schema import Section, declared
from lem.config.sources import Document, FileProblems, Layer, Place, Source, is_secret
from lem.errors import ConfigurationError

__all__ = [
    "ExperimentDraft",
    "Loaded",
    "Reader",
    "complete_campaign",
    "kind_of",
    "load_campaign",
    "load_campaign_of_files",
    "load_experiment",
    "load_mapping",
]

C = TypeVar("C")
S = TypeVar("S", bound=Section)
Sets = Sequence["str | tuple[str, Any]"]
Located = list[tuple[Place, Problem]]

EXTENDS = "_extends"
# Options that only a campaign has, for telling the two kinds of files apart.
_CAMPAIGN_ONLY = frozenset(declared(CampaignConfig)) - frozenset(declared(ExperimentConfig))

# Stands for the model of an experiment that has none, to see what else is wrong with it.
_NO_MODEL = {"name": "none"}


class Reader(Protocol):
    """Reads YAML."""

    def read(self, path: FilePath) -> Document:
        """A file; raises `ConfigurationError` where it cannot."""

    def parse(self, text: str, label: str) -> Any:
        """A single value; raises `ConfigurationError` where it is none."""


@dataclass(frozen=True)
class ExperimentDraft:
    """An experiment that a campaign names, put together and not yet validated.

    Attributes:
        mapping: its options, those of the campaign filled in; text from `${VAR}` is `Expanded`.
        source: where they come from.
        path: its file; None for one written in the campaign.
    """

    mapping: Mapping[str, Any]
    source: Source
    path: FilePath | None

    @property
    def name(self) -> str | None:
        """Its `config_name`, else its file's name; None without either."""
        given = self.mapping.get("config_name")
        return given if isinstance(given, str) else self.path.stem if self.path is not None else None

    def validate(self) -> ExperimentConfig:
        """The experiment.

        Raises:
            FileProblems: what is wrong with it, at its own places.
        """
        try:
            return ExperimentConfig.from_dict(self.mapping)
        except ConfigProblems as error:
            raise self.source.error(error.problems) from error


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A configuration and where it came from.

    Attributes:
        provenance: for every dotted option `command line`, `file`, `preset` or `default`.
        source: the layers, for positions and for what was written.
        drafts: the experiments that `configs` and `experiments` of a campaign name, in this order.
        preset: values that the experiments of a grid start from.
    """

    config: C
    provenance: Mapping[str, str]
    source: Source
    drafts: tuple[ExperimentDraft, ...] = ()
    preset: Mapping[str, Any] = field(default_factory=dict)

    @property
    def forced(self) -> frozenset[str]:
        """The options given on the command line, which win over the experiments' own (`with_campaign_defaults`)."""
        return frozenset(key for key, origin in self.provenance.items() if origin == "command line")


def load_campaign(reader: Reader, path: FilePath, sets: Sets, preset: str | None) -> Loaded[CampaignConfig]:
    """A campaign and the experiment files it names; as `yamlfile.load_campaign`."""
    source, found = _read_file(reader, path, CampaignConfig)
    return _finish_campaign(reader, _with_sets(reader, source, sets), found, preset)


def load_campaign_of_files(
    reader: Reader, name: str, paths: Sequence[FilePath], sets: Sets, preset: str | None
) -> Loaded[CampaignConfig]:
    """A campaign made of experiment files; as `yamlfile.load_campaign_of_files`."""
    mapping = {"campaign_name": name, "configs": [str(path) for path in paths]}
    source = Source(CampaignConfig).over(Layer("command line", "the command line", mapping))
    return _finish_campaign(reader, _with_sets(reader, source, sets), [], preset)


def complete_campaign(reader: Reader, campaign: CampaignConfig) -> Loaded[CampaignConfig]:
    """A campaign made in Python; as `yamlfile.complete_campaign`."""
    source = Source(CampaignConfig).over(Layer("file", campaign.campaign_name, given(campaign)))
    return _finish_campaign(reader, source, [], None)


def load_experiment(reader: Reader, path: FilePath, sets: Sets, preset: str | None) -> Loaded[ExperimentConfig]:
    """An experiment; as `yamlfile.load_experiment`."""
    source, found = _read_file(reader, path, ExperimentConfig, preset)
    source = _with_sets(reader, source, sets)
    config, problems = _validate(ExperimentConfig, source)
    _raise_if_any(found, problems)
    assert config is not None  # noqa: S101 - without problems there is one
    return Loaded(config, _provenance(config, source), source)


def load_mapping(reader: Reader, path: FilePath) -> Loaded[dict[str, Any]]:
    """An experiment that is not yet validated; as `yamlfile.load_mapping`."""
    source, found = _read_file(reader, path, ExperimentConfig)
    _raise_if_any(found)
    origins = {dotted(key): source.layers[number].kind for key, number in source.origins.items()}
    return Loaded(dict(source.mapping), origins, source)


def kind_of(reader: Reader, path: FilePath) -> str:
    """`campaign` or `experiment`, by whether a file has options that only a campaign has."""
    source, _ = _read_file(reader, path, ExperimentConfig)
    return "campaign" if _CAMPAIGN_ONLY & set(source.mapping) else "experiment"


def _finish_campaign(reader: Reader, source: Source, found: Located, preset: str | None) -> Loaded[CampaignConfig]:
    start = find_preset(preset).values if preset is not None else {}
    config, problems = _validate(CampaignConfig, source)
    loaded = None if config is None else Loaded(config, _provenance(config, source), source, preset=start)
    drafts, more = _Drafts(reader, source, loaded, preset).collect()
    _raise_if_any(found, [*problems, *more])
    assert loaded is not None  # noqa: S101 - without problems there is one
    return dataclasses.replace(loaded, drafts=tuple(drafts))


class _Drafts:
    """The experiments a campaign names, each with what is wrong with it."""

    def __init__(
        self, reader: Reader, source: Source, campaign: Loaded[CampaignConfig] | None, preset: str | None
    ) -> None:
        self._reader = reader
        self._source = source
        self._campaign = campaign
        self._preset = preset
        self._problems: Located = []

    def collect(self) -> tuple[list[ExperimentDraft], Located]:
        """The drafts, and all problems of theirs."""
        mapping = self._source.mapping
        drafts = [self._of_file(name, ("configs", index)) for index, name in enumerate(_items(mapping.get("configs")))]
        for index, entry in enumerate(_items(mapping.get("experiments"))):
            path = ("experiments", index)
            if isinstance(entry, Mapping) and "config" in entry:
                drafts.append(self._of_file(entry["config"], (*path, "config"), entry.get("overrides")))
            elif isinstance(entry, Mapping):
                drafts.append(self._in_place(entry, path))
        return [draft for draft in drafts if draft is not None], self._problems

    def _of_file(self, name: Any, path: Path, overrides: Any = None) -> ExperimentDraft | None:
        if not isinstance(name, str) or not name:
            return None  # the campaign's own validation says so
        file = self._source.folder_of(path) / name
        try:
            source, found = _read_file(self._reader, file, ExperimentConfig, self._preset)
        except FileProblems as error:
            self._problems.extend(error.located)
            return None
        except ConfigurationError as error:
            place = self._source.place(path)
            self._problems.append((place, Problem(path, error.message)))
            return None
        self._problems.extend(found)
        if isinstance(overrides, Mapping):
            source = self._with_overrides(source, overrides, (*path[:-1], "overrides"))
        return self._finish(source, file)

    def _with_overrides(self, source: Source, overrides: Mapping[str, Any], path: Path) -> Source:
        nested = CampaignExperimentEntry.nest_overrides(overrides)
        layer = self._source.layer_of(path[:1])
        document = layer.document if layer is not None else None
        kind, label = (layer.kind, layer.label) if layer is not None else ("file", "overrides")
        return source.over(Layer(kind, label, nested, document, path))

    def _in_place(self, entry: Mapping[str, Any], path: Path) -> ExperimentDraft | None:
        layer = self._source.layer_of(path[:1])
        start = _preset_source(ExperimentConfig, self._preset)
        source = dataclasses.replace(start, main=self._source.main, prefix=path)
        if layer is not None:
            inline = entry.get("inline", entry)
            source = source.over(
                Layer(layer.kind, layer.label, inline if isinstance(inline, Mapping) else {}, layer.document, path)
            )
        return self._finish(source, None)

    def _finish(self, source: Source, file: FilePath | None) -> ExperimentDraft | None:
        mapping: Mapping[str, Any] = source.mapping
        if self._campaign is not None:
            mapping = with_campaign_defaults(self._campaign.config, mapping, self._campaign.forced)
        draft = ExperimentDraft(mapping, source, file)
        # An experiment without a model is no error of the file: the plan filters it with that reason.
        probe = draft if "model" in mapping else dataclasses.replace(draft, mapping={**mapping, "model": _NO_MODEL})
        try:
            probe.validate()
        except FileProblems as error:
            self._problems.extend(error.located)
        return draft


def _read_file(
    reader: Reader, path: FilePath, section: type[Section], preset: str | None = None
) -> tuple[Source, Located]:
    """A file over those it inherits from over a preset, and what is wrong with them whatever the options are."""
    documents: list[Document] = []
    found: Located = []
    following: FilePath | None = path
    while following is not None:
        document = reader.read(following)
        if not isinstance(document.tree, Mapping):
            raise FileProblems([(Place(document.name), Problem((), _not_a_mapping(document.tree)))])
        documents.append(document)
        found.extend(document.located)
        following = _base_of(documents, found)
    source = dataclasses.replace(_preset_source(section, preset), main=documents[0])
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
    if not base.is_file():
        found.append((place, Problem((EXTENDS,), f"{base}: no such file")))
        return None
    return base


def _preset_source(section: type[Section], preset: str | None) -> Source:
    source = Source(section)
    return source if preset is None else source.over(Layer("preset", f"preset {preset}", find_preset(preset).values))


def _with_sets(reader: Reader, source: Source, sets: Sets) -> Source:
    for item in sets:
        key, value, label = _parse_set(reader, source.section, item)
        source = source.over(Layer("command line", label, _nest_option(source.section, key, value)))
    return source


def _parse_set(reader: Reader, section: type[Section], item: str | tuple[str, Any]) -> tuple[str, Any, str]:
    if not isinstance(item, str):
        key, value = item
        return key, value, _set_label(section, key, str(value))
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigurationError(f"--set {item}: KEY=VALUE is due", "for example --set execution.cycles=5")
    label = _set_label(section, key, text)
    return key, reader.parse(text, label), label


def _set_label(section: type[Section], key: str, text: str) -> str:
    return f"--set {key}={'(hidden)' if is_secret(section, tuple(key.split('.'))) else text}"


def _nest_option(section: type[Section], key: str, value: Any) -> dict[str, Any]:
    """`value` nested under a dotted name; where a mapping has dotted names for keys, the rest is one key."""
    parts = key.split(".")
    options: Mapping[str, Any] = declared(section)
    for index, part in enumerate(parts):
        item = options.get(part)
        if item is None:
            break
        kind = item.kind.inner if isinstance(item.kind, NullableKind) else item.kind
        if isinstance(kind, MapKind) and item.option.dotted_after is not None:
            split = index + 1 + item.option.dotted_after
            parts = [*parts[:split], *([".".join(parts[split:])] if parts[split:] else [])]
            break
        options = declared(item.sections[0]) if len(item.sections) == 1 else {}
    for part in reversed(parts):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def _validate(section: type[S], source: Source) -> tuple[S | None, Located]:
    try:
        return section.from_dict(source.mapping), []
    except ConfigProblems as error:
        return None, source.locate(error.problems)


def _raise_if_any(found: Located, problems: Sequence[tuple[Place, Problem]] = ()) -> None:
    """Raise what was found; what validation says about a value that could not even be read is left out."""
    unread = {place for place, _ in found if place.mark is not None}
    located = [*found, *(item for item in problems if item[0] not in unread)]
    if located:
        raise FileProblems(located)


def _provenance(config: Section, source: Source) -> dict[str, str]:
    """Where each option came from."""
    out: dict[str, str] = {}
    for path, _ in leaves(config.to_dict()):
        layer = source.layer_of(path)
        if layer is not None:
            out[dotted(path)] = layer.kind
        else:
            out[dotted(path)] = "preset" if _is_from_decoder_preset(config, path) else "default"
    return out


def _is_from_decoder_preset(config: Section, path: Path) -> bool:
    if not isinstance(config, ExperimentConfig) or path[0] != "decoder" or config.decoder.preset is None:
        return False
    default = declared(type(config.decoder))[str(path[1])].option.default
    return bool(getattr(config.decoder, str(path[1])) != default)


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else () if value is None else (value,)
