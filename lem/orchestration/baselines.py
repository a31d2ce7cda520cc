"""Power at rest as the experiments of a run have found it: for the next experiments, and for the gaps between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lem.measurement import is_gpu_source
from lem.meters.attempt_log import Baselines
from lem.record import Record

__all__ = ["BARE", "BaselineBook", "Reference"]

# The state of a device without an engine; with one, the state is the engine's key.
BARE = ""


@dataclass(frozen=True)
class Reference:
    """A device at rest: power in watts and the temperature of its hottest GPU in °C; None without a sensor for it."""

    power_w: float
    temp_c: float | None


class _Place(NamedTuple):
    """What rested, how, and by which meter: the power of a GPU says nothing of that of a CPU."""

    gpus: tuple[str, ...]
    state: str
    source: str


@dataclass(frozen=True)
class _Entry:
    power_w: float
    measured_s: float


@dataclass
class BaselineBook:
    """What is known of power at rest, by the devices, the engine that is loaded on them, and the meter.

    Times are seconds of one monotonic clock.
    """

    _entries: dict[_Place, _Entry] = field(default_factory=dict)
    _references: dict[tuple[tuple[str, ...], str], Reference] = field(default_factory=dict)

    def note(self, record: Record, engine_key: str, now_s: float) -> None:
        """Take in what an experiment has measured itself; what it was given is known already."""
        idle, source, gpus = record.idle, record.energy.energy_source, record.environment.gpu_uuids
        if source is None:
            return
        if idle.idle_bare_power_w is not None and not record.validity.engine_reused:
            self._put(_Place(gpus, BARE, source), idle.idle_bare_power_w, idle.idle_bare_temp_c, now_s)
        if idle.idle_loaded_power_w is not None and idle.baseline_age_s == 0.0:
            self._put(_Place(gpus, engine_key, source), idle.idle_loaded_power_w, idle.idle_loaded_temp_c, now_s)

    def known(self, gpus: Sequence[str], engine_key: str, *, ttl_s: float, now_s: float) -> dict[str, Baselines]:
        """The baselines of these devices that are not older than `ttl_s`, by what measured them (`energy_source`)."""
        found = {}
        for source in dict.fromkeys(place.source for place in self._entries):
            places = (_Place(tuple(gpus), state, source) for state in (BARE, engine_key))
            bare, loaded = (self._fresh(place, ttl_s, now_s) for place in places)
            if bare is not None or loaded is not None:
                found[source] = Baselines(
                    bare_power_w=None if bare is None else bare.power_w,
                    loaded_power_w=None if loaded is None else loaded.power_w,
                    age_s=None if loaded is None else now_s - loaded.measured_s,
                )
        return found

    def reference(self, gpus: Sequence[str], state: str) -> Reference | None:
        """What the devices were like at their first baseline in this state; None where no meter of theirs told."""
        return self._references.get((tuple(gpus), state))

    def _put(self, place: _Place, power_w: float, temp_c: float | None, now_s: float) -> None:
        entry = self._entries.get(place)
        if entry is not None and entry.power_w == power_w:
            return  # to the last bit what was handed on: not measured again, so as old as before
        self._entries[place] = _Entry(power_w, now_s)
        if is_gpu_source(place.source):  # what a gap watches is the power of GPUs
            self._references.setdefault((place.gpus, place.state), Reference(power_w, temp_c))

    def _fresh(self, place: _Place, ttl_s: float, now_s: float) -> _Entry | None:
        entry = self._entries.get(place)
        return entry if entry is not None and now_s - entry.measured_s <= ttl_s else None
