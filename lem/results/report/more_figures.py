"""What else is known of every configuration: net energy, power, load, carbon."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from lem import units
from lem.record import Gpu, Record
from lem.results.report.content import Entry, Report
from lem.results.report.figures import absent, count_cell
from lem.results.report.markup import Cell, Markup, details, scroller, table

__all__ = ["more_figures"]

_LABEL = "More figures of every configuration"


@dataclass(frozen=True)
class _Figure:
    """A column: its heading, its value, the reason where it is absent, and whether it is energy or follows from it."""

    heading: str
    read: Callable[[Record], float | None]
    why: Callable[[Record], str | None] = lambda _: None
    is_energy: bool = False


def _net_per_token(record: Record) -> float | None:
    net, tokens = record.energy.gpu_energy_net_j, record.work.output_tok
    return None if net is None or not tokens else net / tokens


def _of_gpus(
    read: Callable[[Gpu], float | None], fold: Callable[[list[float]], float]
) -> Callable[[Record], float | None]:
    """One value of all GPUs, where each of them has one."""

    def of(record: Record) -> float | None:
        values = [value for gpu in record.gpus if (value := read(gpu)) is not None]
        return fold(values) if values and len(values) == len(record.gpus) else None

    return of


_FIGURES = (
    _Figure(
        "Net energy per output token, J",
        _net_per_token,
        lambda record: record.energy.null_reasons.get("gpu_energy_net_j"),
        is_energy=True,
    ),
    _Figure(
        "Energy per request, J",
        lambda record: record.efficiency.energy_per_request_j,
        lambda record: record.efficiency.null_reasons.get("energy_per_request_j"),
        is_energy=True,
    ),
    _Figure("Prefill, J", lambda record: record.energy.prefill_energy_j, is_energy=True),
    _Figure("Decode, J", lambda record: record.energy.decode_energy_j, is_energy=True),
    _Figure("CPU packages, J", lambda record: record.energy.cpu_package_energy_j, is_energy=True),
    _Figure("GPU power, mean, W", _of_gpus(lambda gpu: gpu.power_mean_w, math.fsum)),
    _Figure("GPU temperature, greatest, °C", _of_gpus(lambda gpu: gpu.temp_max_c, max)),
    _Figure(
        "Engine load, s",
        lambda record: record.window.load_s,
        lambda record: record.window.null_reasons.get("load_s"),
    ),
    _Figure("CO₂e, g", lambda record: record.carbon.co2e_g, is_energy=True),
    _Figure("Cost", lambda record: record.carbon.cost, is_energy=True),
)


def more_figures(report: Report) -> Markup:
    """A folded table of what any configuration has; nothing where none has any of it.

    The figures are geometric means over the cycles that measured them.
    """
    known = [
        figure
        for figure in _FIGURES
        if any(figure.read(item) is not None for entry in report.entries for item in entry.used)
    ]
    if not known:
        return Markup()
    head = ["No.", "Configuration", *(f"{item.heading}{_estimate(item, report)}" for item in known)]
    rows: list[list[Cell | str]] = [
        [count_cell(entry.number), entry.label, *(_cell(entry, item) for item in known)] for entry in report.entries
    ]
    return details(_LABEL, scroller(_LABEL, table(_LABEL, head, rows, row_head=1)))


def _estimate(figure: _Figure, report: Report) -> str:
    return report.estimate_note if figure.is_energy else ""


def _cell(entry: Entry, figure: _Figure) -> Cell:
    values = [value for record in entry.used if (value := figure.read(record)) is not None]
    if not values:
        return absent(next((reason for record in entry.used if (reason := figure.why(record))), None))
    is_positive = min(values) > 0
    mean = math.exp(statistics.fmean(map(math.log, values))) if is_positive else statistics.fmean(values)
    return Cell(units.format_quantity(mean), mean, is_number=True)
