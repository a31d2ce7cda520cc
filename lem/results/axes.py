"""What identifies configurations for people: numbers, settings and axes, and the words that name one of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Protocol, TypeVar

from lem.base.dataclass import dataclass, replace
from lem.base.doc import GAP, NAME_MIN, NAME_WIDTH, Column, NameShortener, Table, printable, text_width
from lem.base.errors import UserError, did_you_mean
from lem.base.units import ABSENT, hash_label, some_of
from lem.config.backends import WIDTH_OPTIONS
from lem.config.dialects import DIALECTS
from lem.config.experiment import ExperimentConfig
from lem.config.option import find_option, leaves
from lem.record import Record

_CANDIDATES_SHOWN = 8


class Configured(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def config_hash(self) -> str: ...

    @property
    def number(self) -> int: ...

    @property
    def settings(self) -> Mapping[str, str]: ...


C = TypeVar("C", bound=Configured)


def select(configurations: Sequence[C], wanted: str, where: str) -> C:
    """The configuration of a number, name, setting (`axis=value,…`) or part of a name; UserError unless it is one."""
    settings = parse_settings(wanted)
    merged = with_one_width([item.settings for item in configurations])
    shown = {item.number: each for item, each in zip(configurations, merged, strict=True)}
    rules: tuple[Callable[[C], bool], ...] = (
        lambda item: wanted in (str(item.number), item.name, item.config_hash, hash_label(item.config_hash)),
        lambda item: (
            settings is not None and any(has_settings(it, settings) for it in (item.settings, shown[item.number]))
        ),
        lambda item: (
            wanted in item.name or any(it.startswith(wanted) for it in (item.config_hash, hash_label(item.config_hash)))
        ),
    )
    if not wanted or wanted.isdecimal():  # a number is no part of a name
        rules = rules[:1]
    found = next(filter(None, ([item for item in configurations if rule(item)] for rule in rules)), [])
    if len(found) == 1:
        return found[0]
    named = [f"{item.number} {item.name}" for item in found or configurations]
    candidates = some_of(named, _CANDIDATES_SHOWN, "; ")
    if found:
        hint = "name one by its number, its full name, or more settings: axis=value,axis=value"
        raise UserError(f"{wanted!r} is ambiguous: {candidates}", hint)
    meant = did_you_mean(wanted, [item.name for item in configurations])
    raise UserError(f"{where} has no configuration {wanted!r}{meant}", f"configurations: {candidates}")


def _model(record: Record) -> str:
    name = record.identity.model
    return PurePath(name).name if name.startswith((".", "/", "~")) else name


def _gpus(record: Record) -> str:
    names = [gpu.name for gpu in record.gpus]
    kinds = dict.fromkeys(names)
    return ", ".join(f"{names.count(kind)} × {kind}" if names.count(kind) > 1 else kind for kind in kinds)


# Settings in the heading of a table.
_HEADLINES: Mapping[str, Callable[[Record], Any]] = {
    "backend": lambda record: record.identity.backend,
    "model": _model,
    "precision": lambda record: record.requested.get("fp_precision"),
    "device": lambda record: record.environment.device,
    "traffic": lambda record: record.window.traffic_mode.replace("_", " "),
}
_MORE: Mapping[str, Callable[[Record], Any]] = {
    "engine": lambda record: f"{record.environment.engine_name} {record.environment.engine_version}",
    "GPU": _gpus,
    "driver": lambda record: record.environment.versions.get("driver"),
}

# Options that are among the settings above, that are no settings, or that are better known from elsewhere.
_LEFT_OUT = frozenset({
    "backend", "model", "model_name", "fp_precision", "config_name", "io", "extra_metadata", "gpus", "num_cycles",
})  # fmt: skip


_SLO = "traffic_simulation.slo"


@functools.cache
def _is_setting(name: str) -> bool:
    """Whether an option can change a measurement, as rates and limits cannot."""
    item = find_option(ExperimentConfig, name)
    return not name.startswith(_SLO) and (item is None or not item.is_dropped)


def headline_settings(record: Record) -> dict[str, str]:
    return _texts(_HEADLINES, record)


def shared_headlines(records: Sequence[Record]) -> dict[str, str]:
    found = {label: {str(read(record) or "") for record in records} for label, read in _HEADLINES.items()}
    return {label: text for label, texts in found.items() if len(texts) == 1 and (text := next(iter(texts)))}


def settings_of(record: Record) -> dict[str, str]:
    options = {name: item for name, item in record.requested.items() if name not in _LEFT_OUT}
    return {**headline_settings(record), **_texts(_MORE, record), **dict(_flatten(options))}


def settings_without_record(options: Mapping[str, Any], others: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The settings of a configuration of which only the options are known, as far as `others` have such settings."""
    labels = {label for item in others for label in item}
    known = {_OPTION_NAMES.get(name, name): value for name, value in _flatten(options)}
    nearest = max(others, key=lambda item: len(item.items() & known.items()), default={})
    derived = {label: value for label, value in nearest.items() if label in _DERIVED}
    return {**shared_settings(others), **derived, **{label: it for label, it in known.items() if label in labels}}


def shared_settings(settings: Iterable[Mapping[str, str]]) -> dict[str, str]:
    first, *others = [*settings] or [{}]
    return {label: value for label, value in first.items() if all(item.get(label) == value for item in others)}


# What follows from another setting, and is no axis of its own where both vary together.
_DERIVED = frozenset({"device", "engine", "traffic.mode"})
_OF_ENGINE = ("backend", "image")
_WIDTHS = frozenset(f"{backend}.{option}" for backend, option in WIDTH_OPTIONS.items()) | {
    f"server.options.{dialect.width}" for dialect in DIALECTS.values() if dialect.width
}
_WIDTH = "batch_size"  # of several backends
# Settings that tables call otherwise than the option is called.
_OPTION_NAMES = {"fp_precision": "precision", "model.name": "model"}


@dataclass(frozen=True)
class Axis:
    label: str  # of the setting
    heading: str  # the shortest end of its label that no other axis has
    values: tuple[str, ...]  # of each configuration, without the folders or owner that they do not need

    @property
    def partition(self) -> tuple[int, ...]:
        first = {value: place for place, value in reversed([*enumerate(self.values)])}
        return tuple(map(first.__getitem__, self.values))

    @functools.cached_property
    def column(self) -> Column:
        return Column(self.heading.replace("_", "_\n"), self.values, is_text=True)

    def of(self, index: int) -> str:
        return f"{self.heading}={self.values[index]}"


def find_axes(settings: Sequence[Mapping[str, str]]) -> tuple[Axis, ...]:
    """The axes of configurations with these settings, in the order of the settings; no settings are unknown ones."""
    settings = with_one_width(settings)
    labels = dict.fromkeys(label for item in settings for label in item)
    values = {label: tuple(item.get(label, ABSENT) for item in settings) for label in labels}
    known = [place for place, item in enumerate(settings) if item]
    differing = {label: each for label, each in values.items() if len({each[place] for place in known}) > 1}
    found = [Axis(label, label, _shortened(each)) for label, each in differing.items()]
    partitions = {axis.partition for axis in found if axis.label not in _DERIVED}
    kept = [axis for axis in found if axis.label not in _DERIVED or axis.partition not in partitions]
    causes = [values[label] for label in _OF_ENGINE if label in values]
    chosen = {tuple(each[place] for each in causes) for place in known}
    engines = {(*(each[place] for each in causes), values["engine"][place]) for place in known if "engine" in values}
    if len(engines) == len(chosen):  # backend and image together say which
        kept = [axis for axis in kept if axis.label != "engine"]
    return tuple(replace(axis, heading=_heading(axis.label, kept)) for axis in kept)


def with_one_width(settings: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    """How many requests an engine takes at once is one setting, though each backend has its own option for it."""
    if len({label for item in settings for label in item} & _WIDTHS) < 2:
        return settings
    return [{_WIDTH if label in _WIDTHS else label: value for label, value in item.items()} for item in settings]


def _shortened(values: tuple[str, ...]) -> tuple[str, ...]:
    ends = tuple(printable(value.rstrip("/").rpartition("/")[2] or value) for value in values)
    return ends if len(set(ends)) == len(set(values)) else tuple(map(printable, values))


def _heading(label: str, axes: Iterable[Axis]) -> str:
    parts = label.split(".")
    ends = (".".join(parts[-length:]) for length in range(1, len(parts)))
    others = [axis.label for axis in axes if axis.label != label]
    return next((end for end in ends if not any(f".{it}".endswith(f".{end}") for it in others)), label)


def parse_settings(text: str) -> dict[str, str] | None:
    pairs = [part.partition("=") for part in text.split(",")]
    return {name.strip(): value.strip() for name, _, value in pairs} if all(sign for _, sign, _ in pairs) else None


def is_label(label: str, name: str) -> bool:
    """Whether a user who writes `name` means that setting: its label, the end of it, or the option of it."""
    return f".{label}".endswith(f".{name}") or label == _OPTION_NAMES.get(name)


def has_settings(settings: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return all(
        any(is_label(label, name) and value in (found, found.rpartition("/")[2]) for label, found in settings.items())
        for name, value in wanted.items()
    )


class Key:
    """What identifies the rows of tables about configurations: numbers, axes, and names that say more than these."""

    def __init__(
        self,
        numbers: Sequence[str],
        settings: Sequence[Mapping[str, str]],
        names: Sequence[str] = (),
        *,
        heading: str = "#",
    ) -> None:
        self._numbers, self._heading = tuple(numbers), heading
        self.axes = find_axes(settings)
        each = set(zip(*(axis.values for axis in self.axes), strict=True))
        self._needs_names = bool(names) and (len(each) < len(names) or not all(settings))
        # A name that was made from the axes repeats them.
        is_given = self._needs_names or not any("=" in name for name in names)
        shortener = NameShortener(names if is_given else (), NAME_WIDTH)
        self._names = tuple(map(shortener, names)) if is_given else ()
        self.explanation = shortener.explanation  # what was left out of every name

    def without_axes(self) -> Key:
        return Key(self._numbers, (), heading=self._heading)

    def n_above(self, columns: Sequence[Column], width: int) -> int | None:
        """How many columns of axes and names must go for these to fit; None where they do not fit beside the rest."""
        table = self._table(columns, width)
        return None if table is None else len(self.columns) + len(columns) - len(table.columns)

    def tables(self, columns: Sequence[Column], width: int | None = None, title: str = "") -> list[Table]:
        # Where it is too wide, axes become headings between the rows; else a table of names and axes comes first.
        beside = self._table(columns, width)
        if beside is not None:
            return [replace(beside, title=title)]
        return [*self.axis_tables(width), Table(self._heading, self._numbers, tuple(columns), title)]

    def axis_tables(self, width: int | None = None) -> list[Table]:
        columns = self.columns
        if not columns:
            return []
        if (whole := self._table((), width)) is not None:
            return [whole]
        rows = tuple(map(" ".join, zip(self._numbers, self._names, strict=True))) if self._names else self._numbers
        parts: list[list[Column]] = [[]]
        for column in columns[bool(self._names) :]:
            if parts[-1] and width is not None and not fits(self._heading, rows, [*parts[-1], column], width):
                parts.append([])
            parts[-1].append(column)
        return [Table(self._heading, rows, tuple(part)) for part in parts]

    @property
    def columns(self) -> list[Column]:
        names = [Column("configuration", self._names, is_text=True)] if self._names else []
        return [*names, *(axis.column for axis in self.axes)]

    def _table(self, columns: Sequence[Column], width: int | None) -> Table | None:
        beside, above, known = list(self.axes), list[Axis](), self.columns
        names = known[: len(known) - len(beside)]
        while width is not None and not fits(
            self._heading, self._numbers, [*names, *(it.column for it in beside), *columns], width
        ):
            if names and not self._needs_names:
                names = []
                continue
            # The one that changes least often, and of these the widest.
            choice = sorted(beside, key=lambda axis: (len(_groups([*above, axis])), -axis.column.width))[:1]
            if not choice or len(_groups([*above, *choice])) > len(self._numbers) // 2:
                return None
            beside.remove(choice[0])
            above += choice
        above.sort(key=self.axes.index)
        shown = (*names, *(axis.column for axis in beside), *columns)
        if not above:
            return Table(self._heading, self._numbers, shown)
        order = [index for group in _groups(above) for index in group]
        shown = tuple(replace(column, cells=tuple(column.cells[index] for index in order)) for column in shown)
        sections = tuple(", ".join(axis.of(index) for axis in above) for index in order)
        return Table(self._heading, tuple(self._numbers[index] for index in order), shown, sections=sections)


def fits(heading: str, numbers: Sequence[str], columns: Iterable[Column], width: int) -> bool:
    names = min(max(map(text_width, numbers), default=1), NAME_MIN)
    first = max(names, *map(text_width, heading.split("\n")))
    return first + sum(GAP + column.width for column in columns) <= width


def _groups(axes: Sequence[Axis]) -> list[list[int]]:
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, values in enumerate(zip(*(axis.values for axis in axes), strict=True)):
        groups.setdefault(values, []).append(index)
    return list(groups.values())


def _texts(readers: Mapping[str, Callable[[Record], Any]], record: Record) -> dict[str, str]:
    found = {label: read(record) for label, read in readers.items()}
    return {label: str(value) for label, value in found.items() if value}


def _flatten(options: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for path, value in leaves(options):
        name = ".".join(map(str, path))
        if not isinstance(value, Mapping) and _is_setting(name):
            yield name, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "none"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
