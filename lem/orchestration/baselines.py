"""Power at rest as the experiments of a run have found it: for the next experiments, and for the gaps between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lem.meters.energy import Baselines
from lem.record import Record

__all__ = ["BARE", "BaselineBook", "Reference"]

# The state of a device without an engine; with one, the state is the engine's key.
BARE = ""


@dataclass(frozen=True)
class Reference:
    """A device at rest: power in watts and the temperature of its hottest GPU in °C; None without a sensor for it."""

    power_w: float
    temp_c: float | None


@dataclass(frozen=True)
class _Entry:
    source: str
    power_w: float
    measured_s: float


@dataclass
class BaselineBook:
    """What is known of power at rest, by the devices and the engine that is loaded on them.

    Times are seconds of one monotonic clock.
    """

    _entries: dict[tuple[tuple[str, ...], str], _Entry] = field(default_factory=dict)
    _references: dict[tuple[tuple[str, ...], str], Reference] = field(default_factory=dict)

    def note(self, record: Record, engine_key: str, now_s: float) -> None:
        """Take in what an experiment has measured itself; what it was given is known already."""
        idle, source, gpus = record.idle, record.energy.energy_source, record.environment.gpu_uuids
        if source is None:
            return
        if idle.idle_bare_power_w is not None and not record.validity.engine_reused:
            self._put(gpus, BARE, source, idle.idle_bare_power_w, idle.idle_bare_temp_c, now_s)
        if idle.idle_loaded_power_w is not None and idle.baseline_age_s == 0.0:
            self._put(gpus, engine_key, source, idle.idle_loaded_power_w, idle.idle_loaded_temp_c, now_s)

    def known(self, gpus: Sequence[str], engine_key: str, *, ttl_s: float, now_s: float) -> Baselines:
        """The baselines of these devices that are not older than `ttl_s`."""
        bare, loaded = (self._fresh(gpus, state, ttl_s, now_s) for state in (BARE, engine_key))
        return Baselines(
            bare_power_w=None if bare is None else bare.power_w,
            loaded_power_w=None if loaded is None else loaded.power_w,
            age_s=None if loaded is None else now_s - loaded.measured_s,
        )

    def reference(self, gpus: Sequence[str], state: str) -> Reference | None:
        """What the devices were like at their first baseline in this state."""
        return self._references.get((tuple(gpus), state))

    def _put(
        self, gpus: tuple[str, ...], state: str, source: str, power_w: float, temp_c: float | None, now_s: float
    ) -> None:
        self._entries[gpus, state] = _Entry(source, power_w, now_s)
        self._references.setdefault((gpus, state), Reference(power_w, temp_c))

    def _fresh(self, gpus: Sequence[str], state: str, ttl_s: float, now_s: float) -> _Entry | None:
        entry = self._entries.get((tuple(gpus), state))
        return entry if entry is not None and now_s - entry.measured_s <= ttl_s else None
