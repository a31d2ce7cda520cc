"""What weakens single results: windows, meters, devices, neighbours, unequal work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lem.measurement import (
    CROSSCHECK_TOLERANCE,
    REST_TOLERANCE,
    SHORT_WINDOW_S,
    WINDOW_UPDATES,
    is_integrated_power,
)
from lem.record import Record
from lem.results.aggregation import SHARED_LOAD
from lem.results.comparability import LENGTH_TOLERANCE, find_obstacles
from lem.results.compare import RunResults, exclusion_reason
from lem.results.findings import Finding, Found, among_results
from lem.units import percent

__all__ = ["check_results"]

_CAPPED_FROM = 0.01
_GAP_CAP_REACHED = "cap reached"

# Warnings of records that a check here, or its own sentence, says already.
_TOLD = re.compile(
    r"integrated power is|power at rest|energy is an estimate|warm-up did not settle|the halves of the window differ|"
    r"results of \d+ configurations"
)
_NUMBER = re.compile(r"[0-9]+(?:[.][0-9]+)?")


def check_results(run: RunResults, records: Sequence[Record]) -> Found:
    """Everything about single results.

    Args:
        records: of all attempts.
    """
    yield from _exclusions(run, records)
    yield from _windows(run)
    yield from _devices(run, records)
    yield from _meters(run)
    yield from _loads(run)
    yield from _work(run)
    yield from _mixtures(run)
    yield from _warnings(run)


def _exclusions(run: RunResults, records: Sequence[Record]) -> Found:
    reason = exclusion_reason(*run.subjects)
    if reason:
        yield Finding(
            "unequal_exclusions",
            True,
            f"no verdict between all configurations: {reason}",
            "find the cause and measure again: what always throttles or fails is a finding, not an outlier",
        )
    by_reason: dict[str, list[Record]] = {}
    for record in records:
        for text in () if record.validity.valid or _is_slowed(record) else record.validity.invalid_reasons:
            by_reason.setdefault(_NUMBER.sub("#", text), []).append(record)
    for alike in by_reason.values():
        text = next(iter(alike[0].validity.invalid_reasons))
        yield Finding(
            "invalid",
            bool(reason),
            f"{len(alike)} of {len(records)} results are invalid and left out: {text}",
            "see lem results show RUN/EXPERIMENT for what was measured, and remove the cause",
            _names(alike),
        )
    empty = tuple(item.name for item in run.subjects if not item.cycles)
    if empty:
        yield Finding("no_valid_result", True, "no valid result at all", "remove the cause, then --resume", empty)


def _windows(run: RunResults) -> Found:
    yield from among_results(
        run,
        "unsteady",
        "throughput or power moved by 2 % or more within the window",
        "raise measurement.min_window_sec, let warm-up run longer, and see what else the machine does",
        lambda item: item.validity.steady is False,
    )
    yield from among_results(
        run,
        "warmup",
        "warm-up did not settle",
        "raise warmup.max_prompts or warmup.timeout_seconds",
        lambda item: item.validity.warmup_converged is False,
    )
    yield from among_results(
        run,
        "short_window",
        f"a window under {SHORT_WINDOW_S:g} s or {WINDOW_UPDATES} updates of the energy counter",
        f"set measurement.min_window_sec to {SHORT_WINDOW_S:g} or more, or give more prompts",
        _is_short,
        is_weak=False,
    )
    yield from among_results(
        run,
        "failed_requests",
        "requests failed (1 % or less of a window)",
        "the experiment's log.txt says why; failed requests cost energy and give no tokens",
        lambda item: item.work.requests_failed > 0,
        is_weak=False,
    )


def _devices(run: RunResults, records: Sequence[Record]) -> Found:
    slowed = [record for record in records if _is_slowed(record)]
    if slowed:
        longest_s = max((gpu.throttle_thermal_s or 0.0 for item in slowed for gpu in item.gpus), default=0.0)
        lasted = f", for up to {longest_s:.3g} s of a window" if longest_s else ""
        yield Finding(
            "throttled",
            True,
            f"the GPU was slowed down by heat or hardware in {len(slowed)} of {len(records)} results{lasted}",
            "cool it better, lower its power limit, or lengthen execution.config_gap_seconds",
            _names(slowed),
        )
    capped = [share for item in run.subjects for record in item.used if (share := _capped_share(record)) > _CAPPED_FROM]
    if capped:
        yield Finding(
            "power_capped",
            False,
            f"the GPU ran at its power limit for up to {percent(max(capped))} of a window",
            "normal under load; compare only at the same limit, which the record keeps (power_limit_w)",
            tuple(item.name for item in run.subjects if any(_capped_share(it) > _CAPPED_FROM for it in item.used)),
        )
    yield from among_results(
        run,
        "gap_too_short",
        "the gap before it ended at its cap, before the device was back at rest",
        "raise execution.config_gap_seconds and execution.cycle_gap_seconds",
        lambda item: (item.window.gap_end_reason or "").startswith(_GAP_CAP_REACHED),
        is_weak=False,
    )
    yield from among_results(
        run,
        "foreign_processes",
        "other programs were on the GPU",
        "stop them, or keep the machine to yourself while it measures (lem doctor names them)",
        lambda item: bool(item.environment.other_gpu_processes),
    )


def _meters(run: RunResults) -> Found:
    yield from among_results(
        run,
        "crosscheck",
        f"counter and integrated power are more than {percent(CROSSCHECK_TOLERANCE)} apart",
        "an A100 or H100 sensor sees part of the time only: trust the counter; elsewhere look at sample_gap_max_s",
        lambda item: _is_off(item.energy.energy_crosscheck_ratio, CROSSCHECK_TOLERANCE),
    )
    yield from among_results(
        run,
        "baseline_drift",
        f"power at rest changed by over {percent(REST_TOLERANCE)} in the experiment, so its net energy is uncertain",
        "let the device rest longer before it (gaps), and see what else draws power; gross energy stands",
        lambda item: _rest_change(item) > REST_TOLERANCE,
        is_weak=False,
    )
    yield from _baselines_apart(run)
    yield from among_results(
        run,
        "estimate",
        "energy is an estimate from the CPU's design power, not a measurement",
        "make RAPL readable (lem doctor says how), or give an external meter's readings (measurement.external_csv)",
        lambda item: item.energy.primary_j.is_estimate,
    )
    yield from among_results(
        run,
        "integrated_power",
        "energy is integrated from power samples, since there is no energy counter",
        "a sensor that looks part of the time is off under a load with a rhythm: raise measurement.min_window_sec",
        lambda item: is_integrated_power(item.energy.primary_j.source),
        is_weak=False,
    )


def _baselines_apart(run: RunResults) -> Found:
    """Loaded idle power of one configuration that is not the same in all cycles."""
    apart = {}
    for subject in run.subjects:
        rest_w = [item.idle.idle_loaded_power_w for item in subject.used if item.idle.idle_loaded_power_w]
        if rest_w and max(rest_w) > (1 + REST_TOLERANCE) * min(rest_w):
            apart[subject.name] = max(rest_w) / min(rest_w) - 1
    if apart:
        yield Finding(
            "baselines_apart",
            False,
            f"power at rest with the engine loaded differs by up to {percent(max(apart.values()))} between cycles",
            "net energies are not alike then; compare gross energy, and see what else draws power",
            tuple(apart),
        )


def _loads(run: RunResults) -> Found:
    shared = tuple(item.name for item in run.subjects if item.aggregate.is_load_shared)
    if shared:
        yield Finding(
            "shared_loads",
            True,
            SHARED_LOAD.removesuffix(": no interval") + ", and there is no interval",
            "set execution.reuse to cycle, which loads engines anew in every cycle",
            shared,
        )


def _work(run: RunResults) -> Found:
    """Whether all did the same work: those that may give as many tokens gave as many."""
    measured = [item for item in run.subjects if item.used]
    free = tuple(item.name for item in measured if item.used[0].requested.get("ignore_eos") is not True)
    remedy = "set ignore_eos: true and min_output_tokens = max_output_tokens, so that all do the same work"
    by_limit: dict[object, dict[str, float]] = {}
    for item in measured:
        by_limit.setdefault(item.used[0].requested.get("max_output_tokens"), {})[item.name] = _length(item.used)
    unlike = [
        group for group in by_limit.values() if max(group.values()) > (1 + LENGTH_TOLERANCE) * min(group.values())
    ]
    for group in unlike:
        low, high = min(group.values()), max(group.values())
        is_free = any(name in free for name in group)
        yield Finding(
            "output_lengths",
            True,
            f"output lengths {'are free and ' if is_free else ''}differ: {low:.4g} to {high:.4g} tokens a request",
            remedy if is_free else "ignore_eos was set and did not hold: the experiment's log.txt may say why",
            tuple(group),
        )
    if free and not unlike:
        yield Finding("output_lengths", False, "output lengths are free, though they came out alike", remedy, free)


def _mixtures(run: RunResults) -> Found:
    """What is not the same in all of it."""
    with_results = [item for item in run.subjects if item.used]
    seen: dict[str, list[str]] = {}
    for other in with_results[1:]:
        for obstacle in find_obstacles(with_results[0].used, other.used):
            if "output lengths" not in obstacle.text:
                seen.setdefault(obstacle.text, []).append(other.name)
    for text, names in seen.items():
        yield Finding(
            "not_comparable",
            True,
            f"not all is comparable with {with_results[0].name}: {text}",
            "measure them alike, or compare only what is alike",
            tuple(names),
        )
    changed = tuple(item.name for item in with_results if len({it.environment.fingerprint for it in item.used}) > 1)
    if changed:
        yield Finding(
            "environment_changed",
            True,
            "cycles of one configuration were measured with different engines, drivers, images or GPUs",
            "measure it anew in one environment (--fresh)",
            changed,
        )


def _warnings(run: RunResults) -> Found:
    """What the results say themselves, texts that differ in numbers alone once."""
    found: dict[str, tuple[str, list[str]]] = {}
    for subject in run.subjects:
        for text in subject.aggregate.warnings:
            if not _TOLD.match(text):
                found.setdefault(_NUMBER.sub("#", text), (text, []))[1].append(subject.name)
    for text, names in found.values():
        yield Finding("warning", False, text.rstrip("."), "", tuple(dict.fromkeys(names)))


def _is_slowed(record: Record) -> bool:
    return any(gpu.was_slowed for gpu in record.gpus)


def _capped_share(record: Record) -> float:
    """The share of the window at the power limit; no window is cut into more than all of it."""
    longest_s = max((gpu.throttle_power_s or 0.0 for gpu in record.gpus), default=0.0)
    return min(1.0, longest_s / record.window.window_s) if record.window.window_s else 0.0


def _is_short(record: Record) -> bool:
    period_s = record.energy.counter_update_period_s
    needed_s = max(SHORT_WINDOW_S, WINDOW_UPDATES * period_s if period_s else 0.0)
    return record.window.window_s < needed_s


def _is_off(ratio: float | None, tolerance: float) -> bool:
    return ratio is not None and abs(ratio - 1) > tolerance


def _rest_change(record: Record) -> float:
    before_w, after_w = record.idle.idle_loaded_power_w, record.idle.idle_loaded_post_power_w
    return abs(after_w / before_w - 1) if before_w and after_w is not None else 0.0


def _length(records: Iterable[Record]) -> float:
    """Output tokens a request, over all of them."""
    known = list(records)
    requests = sum(item.work.requests_ok for item in known)
    return sum(item.work.output_tok for item in known) / requests if requests else 0.0


def _names(records: Iterable[Record]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item.identity.config_name for item in records))
