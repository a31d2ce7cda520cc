"""The energy meters there are: none yet. Energy is null with its reason, and an experiment that demands it refused."""

from __future__ import annotations

import dataclasses

from lem.config.experiment_config import ExperimentConfig
from lem.errors import OptionRefused
from lem.record import Energy, Gpu, Idle

__all__ = ["MeterRefused", "energy_reasons"]

_HINT = "leave measurement.energy at auto or none; energy is then null in the record, with this reason"


class MeterRefused(OptionRefused):
    """An option that needs a meter that is not there."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind = "meter"


def energy_reasons(config: ExperimentConfig) -> dict[str, str]:
    """{field: why it is null} for every field of `record.Energy`, `Idle` and `Gpu` that no meter fills.

    Raises:
        MeterRefused: the experiment demands energy that nothing here can measure; accepted options must take effect.
    """
    _refuse_demands(config)
    reason = (
        "energy is not measured (measurement.energy: none)"
        if config.measurement.energy == "none"
        else "this version of lem has no energy meter"
    )
    return dict.fromkeys(_measured_fields(), reason)


def _refuse_demands(config: ExperimentConfig) -> None:
    measurement = config.measurement
    demands = {
        f"measurement.energy: {measurement.energy}": measurement.energy not in ("auto", "none"),
        "measurement.phases: true": measurement.phases,
        f"measurement.external_csv: {measurement.external_csv}": measurement.external_csv is not None,
        "baseline.required: true": config.baseline.required,
    }
    refused = [text for text, is_demanded in demands.items() if is_demanded]
    if refused:
        raise MeterRefused(f"{', '.join(refused)}: this version of lem has no energy meter", _HINT)


def _measured_fields() -> tuple[str, ...]:
    names = [item.name for section in (Energy, Idle, Gpu) for item in dataclasses.fields(section)]
    return tuple(name for name in names if name not in ("null_reasons", "uuid", "name"))
