"""The experiments that a campaign names, each put together from its file, its overrides and the campaign."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from lem.config.campaign_config import CampaignConfig, CampaignExplicitExperiment
from lem.config.defaults import with_campaign_defaults
from lem.config.experiment_config import ExperimentConfig
from lem.config.inheritance import Located, Reader, preset_source, read_file
from lem.config.problems import ConfigProblems, Path, Problem
from lem.config.sources import FileProblems, Layer, Source
from lem.errors import ConfigurationError

__all__ = ["DraftCollector", "ExperimentDraft"]

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
