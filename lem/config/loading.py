"""Files, presets and overrides put together: command line over file over preset over default.

Reading YAML is handed in (`yamlfile` does it), so that nothing else here needs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Generic, TypeVar

from lem.config.campaign_config import CampaignConfig
from lem.config.containers import MapKind
from lem.config.defaults import given
from lem.config.drafts import DraftCollector, ExperimentDraft
from lem.config.experiment_config import ExperimentConfig
from lem.config.inheritance import Located, Reader, read_file
from lem.config.merging import leaves
from lem.config.presets import find_preset
from lem.config.problems import ConfigProblems, Path, Problem, dotted
from lem.config.schema import Section, declared
from lem.config.sources import FileProblems, Layer, Place, Source, is_secret
from lem.errors import ConfigurationError

__all__ = [
    "Loaded",
    "complete_campaign",
    "kind_of",
    "load_campaign",
    "load_campaign_of_files",
    "load_experiment",
]

C = TypeVar("C")
S = TypeVar("S", bound=Section)
Sets = Sequence["str | tuple[str, Any]"]

# Options that only a campaign has, for telling the two kinds of files apart.
_CAMPAIGN_ONLY = frozenset(declared(CampaignConfig)) - frozenset(declared(ExperimentConfig))


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
    source, found = read_file(reader, path, CampaignConfig)
    hint = f"{path} is an experiment: lem experiment {path}, or --campaign-name NAME to make a campaign of it"
    if not source.mapping or _CAMPAIGN_ONLY & set(source.mapping):
        hint = ""
    return _finish_campaign(reader, _with_sets(reader, source, sets), found, preset, hint)


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
    source, found = read_file(reader, path, ExperimentConfig, preset)
    hint = f"{path} is a campaign: lem campaign {path}" if "campaign_name" in source.mapping else ""
    source = _with_sets(reader, source, sets)
    config, problems = _validate(ExperimentConfig, source)
    _raise_if_any(found, problems, hint)
    assert config is not None  # noqa: S101 - without problems there is one
    return Loaded(config, _provenance(config, source), source)


def kind_of(reader: Reader, path: FilePath) -> str:
    """`campaign` or `experiment`, by whether a file has options that only a campaign has."""
    source, _ = read_file(reader, path, ExperimentConfig)
    return "campaign" if _CAMPAIGN_ONLY & set(source.mapping) else "experiment"


def _finish_campaign(
    reader: Reader, source: Source, found: Located, preset: str | None, hint: str = ""
) -> Loaded[CampaignConfig]:
    start = find_preset(preset).values if preset is not None else {}
    config, problems = _validate(CampaignConfig, source)
    loaded = None if config is None else Loaded(config, _provenance(config, source), source, preset=start)
    forced = frozenset() if loaded is None else loaded.forced
    drafts, more = DraftCollector(reader, source, config, forced=forced, preset=preset).collect()
    _raise_if_any(found, [*problems, *more], hint)
    assert loaded is not None  # noqa: S101 - without problems there is one
    return dataclasses.replace(loaded, drafts=tuple(drafts))


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
        if isinstance(item.kind_of_value, MapKind) and item.option.dotted_after is not None:
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


def _raise_if_any(found: Located, problems: Sequence[tuple[Place, Problem]], hint: str = "") -> None:
    """Raise what was found; what validation says about a value that could not even be read is left out."""
    unread = {place for place, _ in found if place.mark is not None}
    located = [*found, *(item for item in problems if item[0] not in unread)]
    if located:
        raise FileProblems(located, hint)


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
