"""The figures of one GPU over the window, from the looks that were taken at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from lem.marks import WINDOW
from lem.measurement import POWER_CAP_BIT, THERMAL_BITS, EnergySource
from lem.meters.attempt_log import AttemptLog
from lem.meters.checks import check_plausible, check_sampled
from lem.meters.curve import HOLE_PERIODS, NotMeasured, Span
from lem.meters.figures import Figures
from lem.meters.samples import GpuHeader, GpuSample
from lem.record import Gpu
from lem.units import NS_PER_S

__all__ = [
    "describe_gpu",
    "describe_unseen_gpu",
    "samples_in",
]


@dataclass(frozen=True)
class _Look:
    """A sample and how much of the window it stands for: half-way to both its neighbours."""

    sample: GpuSample
    seconds: float


def describe_gpu(attempt: AttemptLog, number: int) -> Gpu:
    """One GPU of the experiment, counted in its order."""
    place = attempt.sources.gpus[number]
    header = attempt.log.header.gpus[place]
    figures = Figures(uuid=header.uuid, name=header.name)
    _fill_constants(figures, header)
    window = attempt.span(WINDOW)
    looks = _looks(attempt, place, window) if window else []
    nothing = header.power_error if header.power_error and not looks else "nothing was sampled in the window"
    if not attempt.sources.is_watched:
        nothing = "GPUs were not looked at in the window (timeseries.enabled: false)"
    _fill_energy(figures, attempt, number, looks, nothing)
    _fill_looks(figures, looks, nothing)
    return figures.section(Gpu)


def describe_unseen_gpu(uuid: str, name: str, reason: str) -> Gpu:
    """A GPU that could not be sampled."""
    figures = Figures(uuid=uuid, name=name)
    for item in fields(Gpu):
        if item.name not in ("uuid", "name", "null_reasons"):
            figures.leave_out(item.name, reason)
    return figures.section(Gpu)


def samples_in(samples: Iterable[GpuSample], place: int, span: Span) -> list[GpuSample]:
    """The looks at a GPU within the span, its edges included."""
    return [row for row in samples if row.gpu == place and span.opened_ns <= row.at_ns <= span.closed_ns]


def _looks(attempt: AttemptLog, place: int, span: Span) -> list[_Look]:
    """Each look with the time it stands for, which is never more than a hole."""
    rows = samples_in(attempt.log.samples, place, span)
    longest_ns = HOLE_PERIODS * attempt.sources.sample_period_s * NS_PER_S
    between = ((before.at_ns + after.at_ns) / 2 for before, after in pairwise(rows))
    edges = [span.opened_ns, *between, span.closed_ns]
    return [
        _Look(row, (min(end_ns, row.at_ns + longest_ns) - max(start_ns, row.at_ns - longest_ns)) / NS_PER_S)
        for row, start_ns, end_ns in zip(rows, edges, edges[1:], strict=False)
    ]


def _fill_constants(figures: Figures, header: GpuHeader) -> None:
    for field, value in (
        ("power_limit_w", header.power_limit_w),
        ("persistence_mode", header.persistence_mode),
        ("mig_mode", header.mig_mode),
    ):
        figures.put(field, value, "the driver does not tell")


def _fill_energy(figures: Figures, attempt: AttemptLog, number: int, looks: Sequence[_Look], nothing: str) -> None:
    def energy_j() -> float:
        curve = attempt.gpu_curve(number)
        if attempt.sources.gpu_method != EnergySource.COUNTER:
            check_sampled(curve, attempt.window)
        found_j = attempt.window_j(curve, 1 / len(attempt.sources.gpus))
        header = attempt.log.header.gpus[attempt.sources.gpus[number]]
        check_plausible(found_j, attempt.window, header)
        return found_j

    found_j = figures.work_out("energy_j", energy_j)
    if found_j is not None:
        figures.values["power_mean_w"] = found_j / attempt.window.seconds
    else:
        figures.work_out("power_mean_w", lambda: _mean(looks, lambda sample: sample.power_w, nothing))
    powers = [look.sample.power_w for look in looks if look.sample.power_w is not None]
    figures.put("power_max_w", max(powers, default=None), nothing if not looks else "power cannot be read")


def _fill_looks(figures: Figures, looks: Sequence[_Look], nothing: str) -> None:
    silent = "the driver does not tell" if looks else nothing
    temps = [look.sample.temp_c for look in looks if look.sample.temp_c is not None]
    figures.put("temp_start_c", temps[0] if temps else None, silent)
    figures.put("temp_end_c", temps[-1] if temps else None, silent)
    figures.put("temp_max_c", max(temps, default=None), silent)
    figures.work_out("sm_clock_mean_hz", lambda: _mean(looks, lambda sample: sample.sm_clock_hz, silent))
    figures.work_out("util_mean_ratio", lambda: _mean(looks, lambda sample: sample.util_ratio, silent))
    memory = [look.sample.memory_b for look in looks if look.sample.memory_b is not None]
    figures.put("mem_peak_b", max(memory, default=None), silent)
    _fill_events(figures, looks, silent)


def _fill_events(figures: Figures, looks: Sequence[_Look], silent: str) -> None:
    known = [(look.sample.event_mask, look.seconds) for look in looks if look.sample.event_mask is not None]
    mask = 0
    for seen, _ in known:
        mask |= seen
    figures.put("event_reasons_mask", mask if known else None, silent)
    for field, bits in (("throttle_power_s", POWER_CAP_BIT), ("throttle_thermal_s", THERMAL_BITS)):
        seconds = sum((length for seen, length in known if seen & bits), start=0.0)
        figures.put(field, seconds if known else None, silent)


def _mean(looks: Sequence[_Look], value_of: Callable[[GpuSample], float | None], nothing: str) -> float:
    """The mean over time.

    Raises:
        NotMeasured: no look has the value.
    """
    known = [(value, look.seconds) for look in looks if (value := value_of(look.sample)) is not None]
    total_s = sum(seconds for _, seconds in known)
    if total_s <= 0:
        raise NotMeasured(nothing)
    return sum(value * seconds for value, seconds in known) / total_s
