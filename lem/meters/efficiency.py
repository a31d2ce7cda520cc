"""Energy per unit of work, and what it emits and costs: quotients of the energy that counts and nothing else."""

from __future__ import annotations

from lem.config.experiment_config import MeasurementConfig
from lem.meters.curve import NotMeasured
from lem.meters.figures import Figures
from lem.record import Carbon, Efficiency, Measured, Work
from lem.units import JOULES_PER_WATT_HOUR

__all__ = ["carbon_of", "efficiency_of"]

_J_PER_KWH = 1000 * JOULES_PER_WATT_HOUR


def efficiency_of(energy_j: Measured, work: Work) -> Efficiency:
    """The energy per token and request; a zero denominator is None."""
    primary_j = energy_j.value
    figures = Figures()
    for field, count, what in (
        ("energy_per_output_tok_j", work.output_tok, "output tokens"),
        ("energy_per_total_tok_j", work.input_tok + work.output_tok, "tokens"),
        ("energy_per_request_j", work.requests_ok, "completed requests"),
    ):
        if primary_j is None:
            figures.leave_out(field, str(energy_j.null_reason))
        else:
            figures.put(field, primary_j / count if count else None, f"the window holds no {what}")
    if primary_j is None:
        figures.leave_out("output_tok_per_j", str(energy_j.null_reason))
    else:
        figures.put("output_tok_per_j", work.output_tok / primary_j if primary_j else None, "the energy is zero")
    return figures.section(Efficiency)


def carbon_of(energy_j: Measured, measurement: MeasurementConfig) -> Carbon:
    """Emissions and cost of the window's energy, from what the user says of grid, site and price alone.

    co2e_g = kWh × PUE × g/kWh, and the cost likewise. Without a PUE there is neither: 1 would be a claim about the
    user's site.
    """
    given = {
        "grid_g_per_kwh": measurement.grid_g_per_kwh,
        "pue": measurement.pue,
        "price_per_kwh": measurement.price_per_kwh,
    }
    figures = Figures()
    for field, value in given.items():
        figures.put(field, value, f"measurement.{field} is not given")
    for field, factor in (("co2e_g", "grid_g_per_kwh"), ("cost", "price_per_kwh")):
        figures.work_out(field, lambda factor=factor: _site_kwh(figures, energy_j) * figures.need(factor))  # type: ignore[misc]
    return figures.section(Carbon)


def _site_kwh(figures: Figures, energy_j: Measured) -> float:
    """What the site drew for it, in kWh."""
    pue = figures.values["pue"]
    if energy_j.value is None:
        raise NotMeasured(str(energy_j.null_reason))
    if pue is None:
        raise NotMeasured("measurement.pue is not given; 1 counts what was measured and nothing around it")
    return energy_j.value / _J_PER_KWH * float(pue)
