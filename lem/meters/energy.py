"""The energy and efficiency sections of a record, from the sample log."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean

from lem.base import measurement as names
from lem.base.measurement import CROSSCHECK_TOLERANCE, REST_TOLERANCE, EnergyScope, EnergySource
from lem.base.reasons import Reason
from lem.base.units import JOULES_PER_WATT_HOUR
from lem.config.experiment import MeasurementConfig
from lem.meters.checks import (
    crosscheck_ratio,
    foreign_pids,
    is_power_steady,
    meter_warnings,
    sample_gap_max_s,
    slowdowns,
)
from lem.meters.curve import Curve, NotMeasured, Span, update_period_s
from lem.meters.external import ExternalReadings, external_energy_j
from lem.meters.gpu_section import Figures, describe_gpu, describe_unseen_gpu, samples_in
from lem.meters.rapl import DRAM, PACKAGE
from lem.meters.samples import Mark, SampleLog
from lem.meters.sources import AttemptLog, Baselines, Sources
from lem.record import Carbon, Efficiency, Energy, Gpu, Idle, Measured, Work, parts_of_source

_FIELDS = ("prefill_energy_j", "decode_energy_j", "phase_method")


def split_phases(energy: Figures, attempt: AttemptLog, primary: Figures, window_repeats: int) -> None:
    """Fill the fields of the phases.

    The same prompts are run for their prefill alone, in a window of its own with its own guards; its energy per pass,
    times the passes of the main window, is that of prefill, and the rest of the main window is decode.
    """
    phases = Figures()
    prefill_j = phases.work_out("prefill", lambda: _prefill_j(attempt, primary, window_repeats))
    if prefill_j is None:
        for field in _FIELDS:
            energy.leave_out(field, phases.reasons["prefill"])
        return
    energy.values["prefill_energy_j"] = prefill_j
    energy.values["decode_energy_j"] = primary.values["energy_j"] - prefill_j
    passes = _passes(attempt)
    energy.values["phase_method"] = (
        f"differenced runs: {passes} {'pass' if passes == 1 else 'passes'} of prefill alone, scaled to the "
        f"{window_repeats} of the window; decode is the rest"
    )


def _prefill_j(attempt: AttemptLog, primary: Figures, window_repeats: int) -> float:
    prefill = attempt.span(names.PREFILL)
    if prefill is None:
        raise NotMeasured("energy by phases was not asked for (measurement.phases)")
    if attempt.is_steady_mode:
        raise NotMeasured("under traffic prefill and decode of different requests run at once")
    whole_j = float(primary.need("energy_j"))
    for span, what in ((attempt.window, "window"), (prefill, "window of prefill alone")):
        slowed = next(slowdowns(attempt, span, what), None)
        if slowed is not None:
            raise NotMeasured(slowed.text)
    found_j = _phase_window_j(attempt, prefill) * window_repeats / _passes(attempt)
    if not 0 < found_j < whole_j:
        raise NotMeasured(f"prefill alone took {found_j:.4g} J, which is no part of the window's {whole_j:.4g} J")
    return found_j


def _phase_window_j(attempt: AttemptLog, span: Span) -> float:
    curves = attempt.primary_curves()
    guards = (names.PREFILL_GUARD_BEFORE, names.PREFILL_GUARD_AFTER)
    return sum(attempt.energy_j(curve, span, guards, 1 / len(curves)) for curve in curves)


def _passes(attempt: AttemptLog) -> int:
    return sum(mark.name == names.PREFILL for mark in attempt.marks)


@dataclass(frozen=True)
class EnergyFindings:
    """Everything that the meters tell about one attempt.

    Attributes:
        power_steady: whether the halves of the window drew power alike; None for `power_steady_null_reason`.
        invalid_reasons: why the window is no measurement of what was meant.
        warnings: what to know about the figures.
    """

    energy: Energy
    gpus: tuple[Gpu, ...]
    idle: Idle
    power_steady: bool | None
    power_steady_null_reason: str | None
    invalid_reasons: tuple[Reason, ...]
    warnings: tuple[Reason, ...]


def measure(
    log: SampleLog,
    marks: Sequence[Mark],
    sources: Sources,
    baselines: Baselines,
    *,
    is_steady_mode: bool,
    window_repeats: int,
    external: ExternalReadings | None = None,
    own_pids: Collection[int] | None = None,
) -> EnergyFindings:
    """The figures of one attempt.

    Args:
        log: all of it, some updates of the slowest meter beyond the last mark.
        marks: at least `WINDOW`, and its guards unless `is_steady_mode`; one `PREFILL` for each pass of prefill alone.
        baselines: power at rest measured before, for where the marks have none.
        is_steady_mode: the window was opened and closed under load.
        window_repeats: how often the prompt set was run in it.
        external: the readings of the user's own meter.
        own_pids: the processes of the experiment as the host numbers them; None where that is not known.
    """
    attempt = AttemptLog(log, tuple(marks), sources, baselines, is_steady_mode)
    gpus = tuple(describe_gpu(attempt, number) for number in range(len(sources.gpus)))
    energy, idle, steady = Figures(), Figures(), Figures()
    _fill_idle(idle, attempt)
    _fill_gpu_energy(energy, attempt, gpus, idle)
    _fill_cpu_energy(energy, attempt)
    energy.work_out("external_energy_j", lambda: _external_j(attempt, external))
    primary = Figures()
    primary.work_out("energy_j", lambda: _primary_j(energy, attempt))
    _fill_spans(energy, attempt)
    split_phases(energy, attempt, primary, window_repeats)
    _fill_meter(energy, attempt, primary)
    steady.work_out("power", lambda: is_power_steady(attempt, window_repeats))
    unseen = sources.reasons.get("gpu", "the sampler does not see it")
    gpus += tuple(describe_unseen_gpu(uuid, "unknown", unseen) for uuid in sources.missing_uuids)
    return EnergyFindings(
        energy=energy.section(Energy),
        gpus=gpus,
        idle=idle.section(Idle),
        power_steady=steady.values["power"],
        power_steady_null_reason=steady.reasons.get("power"),
        invalid_reasons=_invalid_reasons(attempt, own_pids),
        warnings=_warnings(attempt, energy, idle),
    )


def mean_power_w(log: SampleLog, sources: Sources, span: Span) -> float:
    """The mean power of the primary source over a span, for whoever waits until it rests.

    Raises:
        NotMeasured: it has not been read over all of the span.
    """
    attempt = AttemptLog(log, (), sources, Baselines(), is_steady_mode=True)
    return sum(curve.mean_power_w(span) for curve in attempt.primary_curves(at_rest=True))


def _fill_idle(idle: Figures, attempt: AttemptLog) -> None:
    known = attempt.baselines
    for field, name, before_w, missing in (
        ("idle_bare_power_w", names.IDLE_BARE, known.bare_power_w, "power at rest without an engine was not measured"),
        ("idle_loaded_power_w", names.IDLE_LOADED, known.loaded_power_w, "power at rest was not measured"),
        ("idle_loaded_post_power_w", names.IDLE_POST, None, "power at rest was not measured after the window"),
    ):
        span = attempt.span(name)
        if span is None:
            idle.put(field, before_w, missing)
        else:
            idle.work_out(field, lambda span=span: _rest_w(attempt, span))  # type: ignore[misc]
    for field, name in (("idle_bare_temp_c", names.IDLE_BARE), ("idle_loaded_temp_c", names.IDLE_LOADED)):
        idle.work_out(field, lambda name=name: _rest_c(attempt, name))  # type: ignore[misc]
    if idle.values["idle_loaded_power_w"] is None:
        idle.leave_out("baseline_age_s", idle.reasons["idle_loaded_power_w"])
    elif attempt.span(names.IDLE_LOADED) is not None:
        idle.values["baseline_age_s"] = 0.0
    else:
        idle.put("baseline_age_s", known.age_s, "when it was measured is not known")


def _rest_w(attempt: AttemptLog, span: Span) -> float:
    return sum(curve.mean_power_w(span) for curve in attempt.primary_curves(at_rest=True))


def _rest_c(attempt: AttemptLog, name: str) -> float:
    """The mean temperature of the hottest GPU at rest."""
    span = attempt.span(name)
    if span is None:
        raise NotMeasured("it did not rest so in this experiment")
    if not attempt.sources.gpus:
        raise NotMeasured(attempt.sources.reasons.get("gpu", "no GPU is sampled"))
    means = []
    for place in attempt.sources.gpus:
        temps = [row.temp_c for row in samples_in(attempt.log.samples, place, span) if row.temp_c is not None]
        if not temps:
            raise NotMeasured("the temperature could not be read at rest")
        means.append(fmean(temps))
    return max(means)


def _fill_gpu_energy(energy: Figures, attempt: AttemptLog, gpus: Sequence[Gpu], idle: Figures) -> None:
    energy.work_out("gpu_energy_j", lambda: _sum_over_gpus(attempt, gpus))

    def net_j() -> float:
        gross_j: float = energy.need("gpu_energy_j")
        return gross_j - float(idle.need("idle_loaded_power_w")) * attempt.window.seconds

    energy.work_out("gpu_energy_net_j", net_j)


def _sum_over_gpus(attempt: AttemptLog, gpus: Sequence[Gpu]) -> float:
    """The energy of all GPUs, which are summed only when all were read."""
    if attempt.sources.gpu_method is None:
        raise NotMeasured(attempt.sources.reasons["gpu"])
    total_j = 0.0
    for gpu in gpus:
        if gpu.energy_j is None:
            raise NotMeasured(gpu.null_reasons["energy_j"])
        total_j += gpu.energy_j
    return total_j


def _fill_cpu_energy(energy: Figures, attempt: AttemptLog) -> None:
    for field, domain in (("cpu_package_energy_j", PACKAGE), ("dram_energy_j", DRAM)):
        energy.work_out(field, lambda domain=domain: _domain_j(attempt, domain))  # type: ignore[misc]


def _domain_j(attempt: AttemptLog, domain: str) -> float:
    return sum(_window_j(attempt, curve) for curve in attempt.cpu_curves(domain))


def _window_j(attempt: AttemptLog, curve: Curve) -> float:
    """The window's energy by a curve of the CPU, whose share of a power at rest measured before is not known."""
    only = attempt.sources.primary == attempt.sources.cpu_method and len(attempt.primary_curves()) == 1
    return attempt.window_j(curve, 1.0 if only else None)


def _external_j(attempt: AttemptLog, external: ExternalReadings | None) -> float:
    if not attempt.sources.is_external:
        raise NotMeasured(attempt.sources.reasons["external"])
    if external is None:
        raise NotMeasured("the readings of measurement.external_csv were not to be had")
    return external_energy_j(external, attempt.log, attempt.window)


def _primary_j(energy: Figures, attempt: AttemptLog) -> float:
    """The energy that counts: of the GPUs, else of CPU packages and memory, else what the user's own meter says."""
    sources = attempt.sources
    if sources.primary is None:
        raise NotMeasured(sources.reasons["primary"])
    parts = parts_of_source(sources.primary)
    if "dram" in sources.reasons:  # there is no counter for the memory, which is then left out
        parts = tuple(name for name in parts if name != "dram_energy_j")
    return sum(float(energy.need(name)) for name in parts)


def _fill_spans(energy: Figures, attempt: AttemptLog) -> None:
    for field, name, at_rest, missing in (
        ("load_energy_j", names.LOAD, True, "nothing was loaded for this experiment"),  # sampled as rest is
        ("warmup_energy_j", names.WARMUP, False, "there was no warm-up"),
    ):
        span = attempt.span(name)
        if span is None:
            energy.leave_out(field, missing)
        else:
            energy.work_out(field, lambda span=span, at_rest=at_rest: _primary_span_j(attempt, span, at_rest))  # type: ignore[misc]


def _primary_span_j(attempt: AttemptLog, span: Span, at_rest: bool) -> float:
    return sum(curve.between_j(span) for curve in attempt.primary_curves(at_rest=at_rest))


def _fill_meter(energy: Figures, attempt: AttemptLog, primary: Figures) -> None:
    sources = attempt.sources
    reason = primary.reasons.get("energy_j", "")
    energy.put("energy_source", None if reason else sources.primary, reason)
    energy.put("energy_scope", None if reason else sources.scope, reason)
    energy.work_out("sample_gap_max_s", lambda: sample_gap_max_s(attempt))
    if sources.gpu_method == EnergySource.COUNTER:
        energy.work_out("energy_crosscheck_ratio", lambda: crosscheck_ratio(attempt))
        energy.work_out("counter_update_period_s", lambda: _update_period_s(attempt))
    else:
        no_counter = sources.reasons.get("gpu", "the energy counter cannot be read; energy is integrated power")
        energy.leave_out("energy_crosscheck_ratio", no_counter)
        energy.leave_out("counter_update_period_s", no_counter)


def _update_period_s(attempt: AttemptLog) -> float:
    """Of the slowest counter, under load: in the window, and in the warm-up before it."""
    warmup, window = attempt.span(names.WARMUP), attempt.window
    span = window if warmup is None else Span(warmup.opened_ns, window.closed_ns)
    return max(update_period_s(attempt.log.counters, place, span) for place in attempt.sources.gpus)


def _invalid_reasons(attempt: AttemptLog, own_pids: Collection[int] | None) -> tuple[Reason, ...]:
    window = attempt.span(names.WINDOW)
    if window is None:
        return ()
    reasons = list(slowdowns(attempt, window))
    for place in attempt.sources.gpus:
        pids = foreign_pids(attempt.log, place, window, own_pids)
        if pids:
            uuid = attempt.log.header.gpus[place].uuid
            reasons.append(Reason.of("foreign_process", uuid=uuid, pids=", ".join(map(str, pids))))
    return tuple(reasons)


def _warnings(attempt: AttemptLog, energy: Figures, idle: Figures) -> tuple[Reason, ...]:
    found = []
    if attempt.sources.gpus and not attempt.sources.is_watched:
        found.append(Reason.of("clocks_unwatched"))
    if attempt.sources.is_estimate and energy.values["cpu_package_energy_j"] is not None:
        found.append(Reason.of("energy_estimated"))
    if attempt.sources.scope == EnergyScope.MODULE:
        found.append(Reason.of("energy_of_module"))
    ratio = energy.values["energy_crosscheck_ratio"]
    if ratio is not None and abs(ratio - 1) > CROSSCHECK_TOLERANCE:
        found.append(Reason.of("crosscheck", ratio=ratio))
    before_w, after_w = idle.values["idle_loaded_power_w"], idle.values["idle_loaded_post_power_w"]
    if before_w and after_w is not None and abs(after_w / before_w - 1) > REST_TOLERANCE:
        code = "rest_power_rose" if after_w > before_w else "rest_power_fell"
        change_percent = 100 * abs(after_w / before_w - 1)
        found.append(Reason.of(code, before_w=before_w, after_w=after_w, change_percent=change_percent))
    if attempt.span(names.WINDOW) is not None:
        found += meter_warnings(attempt, energy.values["sample_gap_max_s"])
    return tuple(found)


_J_PER_KWH = 1000 * JOULES_PER_WATT_HOUR


def efficiency_of(energy_j: Measured[float], work: Work) -> Efficiency:
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


def carbon_of(energy_j: Measured[float], measurement: MeasurementConfig) -> Carbon:
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


def _site_kwh(figures: Figures, energy_j: Measured[float]) -> float:
    """What the site drew for it, in kWh."""
    pue = figures.values["pue"]
    if energy_j.value is None:
        raise NotMeasured(str(energy_j.null_reason))
    if pue is None:
        raise NotMeasured("measurement.pue is not given; 1 counts what was measured and nothing around it")
    return energy_j.value / _J_PER_KWH * float(pue)
