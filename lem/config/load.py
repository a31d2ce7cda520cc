"""From raw settings to a campaign or an experiment, with every problem at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Generic, TypeVar

from lem.base.errors import ConfigurationError
from lem.config.campaign_config import CampaignConfig, CampaignExplicitExperiment
from lem.config.experiment import BUNDLED_DISTRIBUTION, BUNDLED_INPUT_TOKENS, ExperimentConfig, WarmupConfig
from lem.config.kinds import MapKind
from lem.config.merging import canonical, leaves
from lem.config.option import Section, declared
from lem.config.problems import ConfigProblems, Path, Problem, dotted
from lem.config.sources import (
    FileProblems,
    Layer,
    Located,
    Place,
    Reader,
    Source,
    find_preset,
    is_secret,
    preset_source,
    read_file,
)

# Options of a campaign, and those of an experiment that they stand for.
_RIVALS = {
    "model": ("model",),
    "dataset": ("dataset", "prompts"),
    "num_samples": ("dataset.sample_size", "prompts.sample_size"),
    "execution.warmup_prompts": ("warmup.min_prompts",),
    "execution.warmup_timeout_seconds": ("warmup.timeout_seconds",),
}


def with_campaign_defaults(
    campaign: CampaignConfig, experiment: Mapping[str, Any], forced: Collection[str] = ()
) -> dict[str, Any]:
    """The experiment, as a plain mapping, with the campaign's model, dataset, num_samples and warm-up filled in.

    Args:
        forced: options of the campaign, by dotted name, that win over the experiment's own: those of the command line.
    """
    out = _without_forced(canonical(ExperimentConfig, experiment), forced)
    if campaign.model is not None:
        _fill_named(out, "model", given(campaign.model))
    if campaign.dataset is not None and out.get("prompts") is None:
        _fill_named(out, "dataset", given(campaign.dataset))
    if campaign.num_samples is not None:
        _fill_sample_size(out, campaign.num_samples)
    _fill_warmup(out, campaign)
    return out


def _without_forced(out: dict[str, Any], forced: Collection[str]) -> dict[str, Any]:
    """Take out what the command line says otherwise."""
    for key, rivals in _RIVALS.items():
        if not any(name == key or name.startswith(f"{key}.") for name in forced):
            continue
        for section, _, option in (rival.partition(".") for rival in rivals):
            if not option:
                out.pop(section, None)
            elif isinstance(out.get(section), dict):
                out[section].pop(option, None)
    return out


def given(section: Section) -> dict[str, Any]:
    """The options of a section that differ from their defaults."""
    options = declared(type(section))
    return {name: value for name, value in section.to_dict().items() if value != options[name].option.default}


def _fill_named(out: dict[str, Any], key: str, default: dict[str, Any]) -> None:
    """Fill in a section that has a name; what belongs to another name is not mixed in."""
    if key not in out:
        out[key] = default
    elif isinstance(out[key], dict) and "name" not in out[key]:
        out[key] = {**default, **out[key]}


def _fill_sample_size(out: dict[str, Any], num_samples: int) -> None:
    for key in ("dataset", "prompts"):
        source = out.get(key)
        if isinstance(source, dict):
            source.setdefault("sample_size", num_samples)
    if out.get("dataset") is None and out.get("prompts") is None:
        longest = out.get("max_input_tokens")
        is_shorter = isinstance(longest, int) and 0 < longest < BUNDLED_INPUT_TOKENS
        length = longest if is_shorter else BUNDLED_INPUT_TOKENS
        out["prompts"] = {
            "type": "synthetic",
            "input_tokens": length,
            "sample_size": num_samples,
            "distribution": BUNDLED_DISTRIBUTION,
        }


def _fill_warmup(out: dict[str, Any], campaign: CampaignConfig) -> None:
    warmup = out.setdefault("warmup", {})
    if not isinstance(warmup, dict):
        return  # for validation to refuse
    if "min_prompts" not in warmup:
        prompts = campaign.execution.warmup_prompts
        warmup["min_prompts"] = prompts
        if prompts > declared(WarmupConfig)["max_prompts"].option.default:
            warmup.setdefault("max_prompts", prompts)
    warmup.setdefault("timeout_seconds", campaign.execution.warmup_timeout_seconds)


# Stands for the model of an experiment that has none, to see what else is wrong with it.
_NO_MODEL = {"name": "none"}


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


class DraftCollector:
    """The experiments a campaign names, each with what is wrong with it.

    Args:
        source: the campaign's.
        campaign: None where it is not valid itself.
        forced: its options that win over the experiments' own.
    """

    def __init__(
        self,
        reader: Reader,
        source: Source,
        campaign: CampaignConfig | None,
        *,
        forced: Collection[str],
        preset: str | None,
    ) -> None:
        self._reader = reader
        self._source = source
        self._campaign = campaign
        self._forced = forced
        self._preset = preset
        self._problems: Located = []

    def collect(self) -> tuple[list[ExperimentDraft], Located]:
        """The drafts, and all problems of theirs."""
        mapping = self._source.mapping
        drafts = [self._of_file(name, ("configs", index)) for index, name in enumerate(_items(mapping.get("configs")))]
        for index, entry in enumerate(_items(mapping.get("experiments"))):
            path = ("experiments", index)
            if isinstance(entry, Mapping) and entry.get("config") is not None:
                drafts.append(self._of_file(entry["config"], (*path, "config"), entry.get("overrides")))
            elif isinstance(entry, Mapping):
                drafts.append(self._in_place(entry, path))
        return [draft for draft in drafts if draft is not None], self._problems

    def _of_file(self, name: Any, path: Path, overrides: Any = None) -> ExperimentDraft | None:
        if not isinstance(name, str) or not name:
            return None  # the campaign's own validation says so
        file = self._source.folder_of(path) / name
        try:
            source, found = read_file(self._reader, file, ExperimentConfig, self._preset)
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
        nested = CampaignExplicitExperiment.nest_overrides(overrides)
        layer = self._source.layer_of(path[:1])
        document = layer.document if layer is not None else None
        kind, label = (layer.kind, layer.label) if layer is not None else ("file", "overrides")
        return source.over(Layer(kind, label, nested, document, path))

    def _in_place(self, entry: Mapping[str, Any], path: Path) -> ExperimentDraft | None:
        layer = self._source.layer_of(path[:1])
        start = preset_source(ExperimentConfig, self._preset)
        source = dataclasses.replace(start, main=self._source.main, prefix=path)
        if layer is not None:
            inline = entry.get("inline", entry)
            values = inline if isinstance(inline, Mapping) else {}
            source = source.over(Layer(layer.kind, layer.label, values, layer.document, path))
        return self._finish(source, None)

    def _finish(self, source: Source, file: FilePath | None) -> ExperimentDraft | None:
        mapping: Mapping[str, Any] = source.mapping
        if self._campaign is not None:
            mapping = with_campaign_defaults(self._campaign, mapping, self._forced)
        draft = ExperimentDraft(mapping, source, file)
        # An experiment without a model is no error of the file: the plan filters it with that reason.
        probe = draft if "model" in mapping else dataclasses.replace(draft, mapping={**mapping, "model": _NO_MODEL})
        try:
            probe.validate()
        except FileProblems as error:
            self._problems.extend(error.located)
        return draft


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else () if value is None else (value,)


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
