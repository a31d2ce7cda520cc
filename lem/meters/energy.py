"""The energy, idle and efficiency sections of a record, from the sample log."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from lem.base import measurement as names
from lem.base.dataclass import dataclass, fields
from lem.base.measurement import Measured, is_counter, is_cpu_source, is_estimate, is_gpu_source, known, parts_of_source
from lem.base.reasons import Reason
from lem.meters import window
from lem.meters.attempt import AttemptLog, measured, need
from lem.meters.curve import NotMeasured, Span, update_period_s
from lem.meters.external import External, ExternalReadings, measure_external
from lem.meters.interference import describe_interference, holes, interference_warnings, refuse_foreign, waited_too_long
from lem.meters.machine import MachineFacts
from lem.meters.rapl import DRAM, PACKAGE
from lem.meters.uncertainty import budget_j, counter_lag_s, net_budget_j, net_energy_j
from lem.record import Efficiency, Energy, Gpu, Idle, Interference, Machine, Work

# Corrections of an external meter's clock and averaging above these limits are reported.
_CLOCK_NOTED_S, _MEAN_NOTED_S = 0.5, 1.5


@dataclass(frozen=True)
class EnergyFindings:
    energy: Energy
    gpus: tuple[Gpu, ...]
    idle: Idle
    interference: Interference
    machine: Machine
    power_change: float | None  # of the halves of the window, over their mean; None where unknown
    invalid_reasons: tuple[Reason, ...]  # why the window does not measure what it should
    warnings: tuple[Reason, ...]


def measure(
    attempt: AttemptLog,
    *,
    window_repeats: int,
    external: ExternalReadings | None = None,
    own_pids: Collection[int] | None = None,
) -> EnergyFindings:
    """The figures of one attempt, whose prompt set was run `window_repeats` times in the window."""
    # Its log goes some updates of the slowest meter beyond the last mark. Its marks are at least `WINDOW`, and its
    # guards unless it ended under load; one `PREFILL` for each pass of prefill alone. `external` are the readings of
    # the user's own meter, `own_pids` the processes of the experiment as the host numbers them; None if unknown.
    sources = attempt.sources
    gpus = tuple(window.describe_gpu(attempt, number) for number in range(len(sources.gpus)))
    idle = _idle(attempt)
    span = attempt.span(names.WINDOW)
    found = Interference.absent(Reason.of("no_window_mark"))
    if span is not None:
        found = describe_interference(attempt.log, span)
    plug: Measured[External] = known(None, sources.reasons.get("external", "external_empty"))
    if sources.is_external:
        plug = measured(lambda: measure_external(external, attempt.log, attempt.window, attempt.reference_curves()))
    energy = _energy(attempt, gpus, idle, plug, window_repeats, found)
    absent: Measured[Any] = known(None, sources.reasons.get("gpu", "gpu_unseen"))
    unseen = dict.fromkeys({item.name for item in fields(Gpu)} - {"uuid", "name", "null_reasons"}, absent)
    gpus += tuple(Gpu.of(uuid=uuid, name="unknown", **unseen) for uuid in sources.missing_uuids)
    return EnergyFindings(
        energy=energy,
        gpus=gpus,
        idle=idle,
        interference=found,
        machine=_machine(attempt.log.header.machine),
        power_change=measured(lambda: window.power_change(attempt, window_repeats)).value,
        invalid_reasons=(
            *window.invalid_reasons(attempt, own_pids),
            *(() if span is None else holes(attempt, span, found)),
            *waited_too_long(attempt, found),
        ),
        warnings=(
            *interference_warnings(attempt, found),
            *window.warnings_of(attempt, energy, idle),
            *_corrections(plug, energy),
        ),
    )


def _machine(facts: MachineFacts) -> Machine:
    reasons = {"ambient_temp_c": "no_ambient_sensor", "governor": "no_governor"}
    named = ((item.name, getattr(facts, item.name)) for item in fields(facts))
    return Machine.of(**{name: known(value, reasons.get(name, "not_shown")) for name, value in named})


def _corrections(plug: Measured[External], energy: Energy) -> Iterator[Reason]:
    if plug.value is not None and energy.external_energy_j is not None:
        ahead_s, mean_s = plug.value.ahead_s, plug.value.mean_s
        if abs(ahead_s) > _CLOCK_NOTED_S or mean_s > _MEAN_NOTED_S:
            yield Reason.of("external_corrected", source=plug.value.source, ahead_s=ahead_s, mean_s=mean_s)


def _energy(
    attempt: AttemptLog,
    gpus: Sequence[Gpu],
    idle: Idle,
    external: Measured[External],
    window_repeats: int,
    found: Interference,
) -> Energy:
    sources = attempt.sources
    gpu_j = measured(lambda: sum((need(gpu.measured("energy_j")) for gpu in gpus), start=0.0))
    if sources.gpu_method is None:
        gpu_j = known(None, sources.reasons["gpu"])
    parts = {
        "gpu_energy_j": gpu_j,
        "cpu_package_energy_j": measured(lambda: _domain_j(attempt, PACKAGE, found)),
        "dram_energy_j": measured(lambda: _domain_j(attempt, DRAM, found)),
        "sensor_energy_j": measured(lambda: _sensor_j(attempt, found)),
    }
    parts["external_energy_j"] = _external_j(attempt, external, parts)
    # The energy that counts: of the GPUs, else of CPU packages and memory, else by the user's own meter.
    if sources.primary is None:
        primary: Measured[float] = known(None, sources.reasons["primary"])
    else:
        without = {"dram_energy_j"} if attempt.why_no_dram else set()  # memory without a counter is left out
        counted = [name for name in parts_of_source(sources.primary) if name not in without]
        primary = measured(lambda: sum(need(parts[name]) for name in counted))
    crosscheck: Measured[float] = known(None, sources.reasons.get("gpu", "counter_absent"))
    period = crosscheck
    if is_counter(sources.gpu_method):
        crosscheck = measured(lambda: window.crosscheck_ratio(attempt))
        period = measured(lambda: _update_period_s(attempt))
    lag = measured(lambda: counter_lag_s(attempt))
    budget = measured(lambda: budget_j(attempt, need(primary), lag.value, crosscheck.value))
    net = measured(lambda: net_energy_j(need(gpu_j), idle, attempt.window.seconds))
    net_budget = measured(lambda: net_budget_j(need(budget), need(net), idle, attempt.window.seconds))
    return Energy.of(
        **parts,
        **_sensor_of(attempt),
        gpu_energy_net_j=net,
        # Power is sampled during the load as it is at rest.
        load_energy_j=_span_j(attempt, names.LOAD, "nothing_loaded", at_rest=True),
        warmup_energy_j=_span_j(attempt, names.WARMUP, "no_warmup"),
        **_phases(attempt, primary, window_repeats),
        energy_source=primary if primary.value is None else sources.primary,
        energy_scope=primary if primary.value is None else sources.scope,
        energy_crosscheck_ratio=crosscheck,
        counter_update_period_s=period,
        counter_lag_s=lag,
        energy_uncertainty_j=measured(lambda: math.hypot(*need(budget).values())),
        uncertainty_budget_j=budget,
        net_uncertainty_j=measured(lambda: math.hypot(*need(net_budget).values())),
        net_uncertainty_budget_j=net_budget,
        sample_gap_max_s=measured(lambda: window.sample_gap_max_s(attempt)),
    )


def _external_j(
    attempt: AttemptLog, external: Measured[External], parts: Mapping[str, Measured[float]]
) -> Measured[float]:
    if external.value is None:
        return known(None, external.null_reason or "no_reason")
    found_j = external.value.energy_j
    values_j = {name: 0.0 if part.value is None else part.value for name, part in parts.items()}
    sensor_j = values_j.pop("sensor_energy_j")  # may contain the others
    parts_j = max(sensor_j, 0.0 if is_estimate(attempt.sources.cpu_method) else sum(values_j.values()))
    if found_j < parts_j:
        return known(None, "external_below_parts", source=external.value.source, energy_j=found_j, parts_j=parts_j)
    return Measured(found_j)


def _domain_j(attempt: AttemptLog, domain: str, found: Interference) -> float:
    curves = attempt.cpu_curves(domain)
    refuse_foreign(attempt, found)
    is_only = attempt.sources.primary == attempt.sources.cpu_method and len(attempt.primary_curves()) == 1
    return sum(attempt.window_j(curve, 1.0 if is_only else None) for curve in curves)


def _sensor_j(attempt: AttemptLog, found: Interference) -> float:
    sources = attempt.sources
    if not sources.sensors:
        raise NotMeasured(sources.reasons.get("sensor", "sensor_not_used"))
    if not sources.gpus:
        refuse_foreign(attempt, found)
    window_s, curves = attempt.window.seconds, attempt.primary_curves()
    for curve in curves:
        window.check_read_often(curve, attempt.window)
    found_j = sum(attempt.window_j(curve, 1 / len(curves)) for curve in curves)
    if found_j <= 0:
        raise NotMeasured("no_energy_drawn", energy_j=found_j, window_s=window_s)
    return found_j


def _sensor_of(attempt: AttemptLog) -> dict[str, Measured[Any]]:
    """The names of the kernel's sensors that the energy comes from, and over what they average power."""
    sources = attempt.sources
    is_by_counter, places = is_counter(sources.primary), sources.sensors
    if is_gpu_source(sources.primary):
        places = sources.gpus
    devices = [attempt.log.header.devices[place] for place in places]
    names = dict.fromkeys(it.counter_sensor if is_by_counter else it.power_sensor for it in devices)
    sensor = ", ".join(name for name in names if name is not None)
    intervals_s = [it.power_interval_s for it in devices if it.power_interval_s is not None]
    no_sensor = Reason.of("no_kernel_sensor")
    why = no_sensor if not sensor else Reason.of("counter_averages_nothing" if is_by_counter else "interval_not_stated")
    interval_s = None if is_by_counter else max(intervals_s, default=None)
    return {"energy_sensor": known(sensor or None, no_sensor), "sensor_interval_s": known(interval_s, why)}


def _span_j(attempt: AttemptLog, mark: str, missing: str, *, at_rest: bool = False) -> Measured[float]:
    span = attempt.span(mark)
    if span is None:
        return known(None, missing)
    return measured(lambda: sum(curve.between_j(span) for curve in attempt.primary_curves(at_rest=at_rest)))


def _update_period_s(attempt: AttemptLog) -> float:
    """Of the slowest counter, under load: in the window, and in the warm-up before it."""
    warmup = attempt.span(names.WARMUP)
    span = attempt.window if warmup is None else Span(warmup.opened_ns, attempt.window.closed_ns)
    return max(update_period_s(attempt.log.counters, place, span) for place in attempt.sources.gpus)


def _phases(attempt: AttemptLog, primary: Measured[float], window_repeats: int) -> dict[str, Any]:
    """The fields of the phases."""
    # The same prompts are run for their prefill alone, in a window of its own with its own guards; its energy per pass,
    # times the passes of the main window, is that of prefill, and the rest of the main window is decode.
    prefill = measured(lambda: _prefill_j(attempt, primary, window_repeats))
    if prefill.value is None or primary.value is None:
        return dict.fromkeys(("prefill_energy_j", "decode_energy_j", "phase_method"), prefill)
    passes = _passes(attempt)
    return {
        "prefill_energy_j": prefill,
        "decode_energy_j": primary.value - prefill.value,
        "phase_method": (
            f"differenced runs: {passes} {'pass' if passes == 1 else 'passes'} of prefill alone, scaled to the "
            f"{window_repeats} of the window; decode is the rest"
        ),
    }


def _prefill_j(attempt: AttemptLog, primary: Measured[float], window_repeats: int) -> float:
    prefill = attempt.span(names.PREFILL)
    if prefill is None:
        raise NotMeasured("phases_off")
    if attempt.is_steady_mode:
        raise NotMeasured("phases_overlap")
    whole_j = need(primary)
    for span, what in ((attempt.window, "window"), (prefill, "window of prefill alone")):
        slowed = next(window.slowdowns(attempt, span, what), None)
        if slowed is not None:
            raise NotMeasured(slowed)
    found = describe_interference(attempt.log, prefill)
    for hole in holes(attempt, prefill, found):
        raise NotMeasured(hole)
    if is_cpu_source(attempt.sources.primary):
        refuse_foreign(attempt, found)
    curves = attempt.primary_curves()
    alone_j = sum(attempt.window_j(curve, 1 / len(curves), names.PREFILL) for curve in curves)
    found_j = alone_j * window_repeats / _passes(attempt)
    if not 0 < found_j < whole_j:
        raise NotMeasured("prefill_not_part", alone_j=found_j, whole_j=whole_j)
    return found_j


def _passes(attempt: AttemptLog) -> int:
    return sum(mark.name == names.PREFILL for mark in attempt.marks)


def _idle(attempt: AttemptLog) -> Idle:
    before = attempt.baselines
    loaded = _rest_w(attempt, names.IDLE_LOADED, before.loaded_power_w, "rest_not_measured")
    after = _rest_w(attempt, names.IDLE_POST, None, "post_not_measured")
    both = loaded if after.value is None else measured(lambda: fmean((need(loaded), need(after))))
    age_s: Measured[float] = known(before.age_s, "rest_age_unknown")
    if loaded.value is None:
        age_s = loaded
    elif attempt.span(names.IDLE_LOADED) is not None:
        age_s = Measured(0.0)
    return Idle.of(
        idle_bare_power_w=_rest_w(attempt, names.IDLE_BARE, before.bare_power_w, "bare_not_measured"),
        idle_loaded_power_w=loaded,
        idle_loaded_post_power_w=after,
        idle_net_power_w=both,
        idle_bare_temp_c=measured(lambda: _rest_c(attempt, names.IDLE_BARE)),
        idle_loaded_temp_c=measured(lambda: _rest_c(attempt, names.IDLE_LOADED)),
        baseline_age_s=age_s,
    )


def _rest_w(attempt: AttemptLog, mark: str, before_w: float | None, missing: str) -> Measured[float]:
    span = attempt.span(mark)
    return known(before_w, missing) if span is None else measured(lambda: attempt.rest_power_w(span))


def _rest_c(attempt: AttemptLog, mark: str) -> float:
    span = attempt.span(mark)
    if span is None:
        raise NotMeasured("rest_temp_not_measured")
    if not attempt.sources.gpus:
        raise NotMeasured(attempt.sources.reasons.get("gpu", "gpus_not_sampled"))
    means = []
    for place in attempt.sources.gpus:
        temps = [row.temp_c for row in window.samples_in(attempt.log.samples, place, span) if row.temp_c is not None]
        if not temps:
            raise NotMeasured("rest_temp_not_read")
        means.append(fmean(temps))
    return max(means)


def efficiency_of(energy_j: Measured[float], work: Work) -> Efficiency:
    total_j = energy_j.value
    if total_j is None:
        return Efficiency.of(**{item.name: energy_j for item in fields(Efficiency) if item.name != "null_reasons"})

    def per(name: str, what: str) -> Measured[float]:
        count = getattr(work, name)
        why = work.null_reasons.get(name, work.why_uncounted) if count is None else None
        return known(total_j / count if count else None, why or Reason.of("no_work", what=what))

    return Efficiency.of(
        energy_per_output_tok_j=per("output_tok", "output tokens"),
        energy_per_total_tok_j=per("total_tok", "tokens"),
        energy_per_request_j=per("requests_ok", "completed requests"),
        energy_per_good_request_j=(
            known(None, work.why_none("requests_good"))
            if work.requests_good is None
            else per("requests_good", "good requests")
        ),
        output_tok_per_j=known(
            work.output_tok / total_j if total_j and work.output_tok is not None else None,
            work.null_reasons.get("output_tok") or Reason.of("zero_energy"),
        ),
    )
