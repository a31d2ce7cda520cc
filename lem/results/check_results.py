"""What weakens single results: windows, meters, devices, neighbours, unequal work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lem.base.measurement import (
    CROSSCHECK_TOLERANCE,
    REST_TOLERANCE,
    SHORT_WINDOW_S,
    WINDOW_UPDATES,
    is_integrated_power,
)
from lem.base.reasons import Reason, alike
from lem.base.units import percent
from lem.record import Record
from lem.results.aggregation import SHARED_LOAD
from lem.results.compare import RunResults, exclusion_reason
from lem.results.metrics import LENGTH_TOLERANCE, find_obstacles


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        kind: a short stable word.
        is_weak: numbers or verdicts are not to be relied on for it; else it is something to know about them.
        reason: what, with its figures.
        remedy: what to do.
        configurations: whom it concerns; () for the campaign as a whole.
    """

    kind: str
    is_weak: bool
    reason: Reason
    remedy: str
    configurations: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """It in words; those of other programs, which warnings pass on, may end in a full stop."""
        return self.reason.text.rstrip(".") if self.kind == "warning" else self.reason.text


Found = Iterable[Finding]


def among_results(
    run: RunResults,
    kind: str,
    what: Reason,
    remedy: str,
    concerns: Callable[[Record], bool],
    *,
    is_weak: bool = True,
) -> Found:
    """A finding about the used results for which `concerns` holds, with how many; none where there are none."""
    looked_at = {subject.name: subject.used for subject in run.subjects}
    counts = {name: sum(map(concerns, records)) for name, records in looked_at.items()}
    concerned = tuple(name for name, count in counts.items() if count)
    if concerned:
        total = sum(len(looked_at[name]) for name in concerned)
        reason = Reason.of("some_results", what=what, count=sum(counts.values()), total=total)
        yield Finding(kind, is_weak, reason, remedy, concerned)


_CAPPED_FROM = 0.01

# Warnings of records that a check here, or its own sentence, says already.
_TOLD = frozenset(
    {
        "crosscheck",
        "energy_estimated",
        "mixed_configurations",
        "rest_power_fell",
        "rest_power_rose",
        "unsteady",
        "warmup_too_few_steps",
        "warmup_unsettled",
    }
)


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
            Reason.of("no_overall_verdict", why=reason),
            "find the cause and measure again: what always throttles or fails is a finding, not an outlier",
        )
    invalid = [record for record in records if not record.validity.valid and not _is_slowed(record)]
    for found in alike((why, record) for record in invalid for why in record.validity.invalid_reasons):
        first = found[0][1].validity.invalid_reasons[0]
        yield Finding(
            "invalid",
            bool(reason),
            Reason.of("results_invalid", count=len(found), total=len(records), why=first),
            "see lem results show RUN/EXPERIMENT for what was measured, and remove the cause",
            _names(record for _, record in found),
        )
    empty = tuple(item.name for item in run.subjects if not item.cycles)
    if empty:
        yield Finding("no_valid_result", True, Reason.of("no_valid_result"), "remove the cause, then --resume", empty)


def _windows(run: RunResults) -> Found:
    yield from among_results(
        run,
        "unsteady",
        Reason.of("window_moved"),
        "raise measurement.min_window_sec, let warm-up run longer, and see what else the machine does",
        lambda item: item.validity.steady is False,
    )
    yield from among_results(
        run,
        "warmup",
        Reason.of("warmup_did_not_settle"),
        "raise warmup.max_prompts or warmup.timeout_seconds",
        lambda item: item.validity.warmup_converged is False,
    )
    yield from among_results(
        run,
        "short_window",
        Reason.of("window_short", least_s=SHORT_WINDOW_S, updates=WINDOW_UPDATES),
        f"set measurement.min_window_sec to {SHORT_WINDOW_S:g} or more, or give more prompts",
        _is_short,
        is_weak=False,
    )
    yield from among_results(
        run,
        "failed_requests",
        Reason.of("few_requests_failed"),
        "the experiment's log.txt says why; failed requests cost energy and give no tokens",
        lambda item: item.work.requests_failed > 0,
        is_weak=False,
    )


def _devices(run: RunResults, records: Sequence[Record]) -> Found:
    slowed = [record for record in records if _is_slowed(record)]
    if slowed:
        longest_s = max((gpu.throttle_thermal_s or 0.0 for item in slowed for gpu in item.gpus), default=0.0)
        code, lasted = ("throttled_for", {"longest_s": longest_s}) if longest_s else ("throttled", {})
        yield Finding(
            "throttled",
            True,
            Reason.of(code, count=len(slowed), total=len(records), **lasted),
            "cool it better, lower its power limit, or lengthen execution.config_gap_seconds",
            _names(slowed),
        )
    capped = [share for item in run.subjects for record in item.used if (share := _capped_share(record)) > _CAPPED_FROM]
    if capped:
        yield Finding(
            "power_capped",
            False,
            Reason.of("power_capped", share=percent(max(capped))),
            "normal under load; compare only at the same limit, which the record keeps (power_limit_w)",
            tuple(item.name for item in run.subjects if any(_capped_share(it) > _CAPPED_FROM for it in item.used)),
        )
    yield from among_results(
        run,
        "gap_too_short",
        Reason.of("gap_ended_at_cap"),
        "raise execution.config_gap_seconds and execution.cycle_gap_seconds",
        lambda item: item.window.gap_end_reason == Reason.of("gap_cap_reached"),
        is_weak=False,
    )
    yield from among_results(
        run,
        "foreign_processes",
        Reason.of("others_on_gpu"),
        "stop them, or keep the machine to yourself while it measures (lem doctor names them)",
        lambda item: bool(item.environment.other_gpu_processes),
    )


def _meters(run: RunResults) -> Found:
    yield from among_results(
        run,
        "crosscheck",
        Reason.of("meters_apart", tolerance=percent(CROSSCHECK_TOLERANCE)),
        "an A100 or H100 sensor sees part of the time only: trust the counter; elsewhere look at sample_gap_max_s",
        lambda item: _is_off(item.energy.energy_crosscheck_ratio, CROSSCHECK_TOLERANCE),
    )
    yield from among_results(
        run,
        "baseline_drift",
        Reason.of("rest_power_changed", tolerance=percent(REST_TOLERANCE)),
        "let the device rest longer before it (gaps), and see what else draws power; gross energy stands",
        lambda item: _rest_change(item) > REST_TOLERANCE,
        is_weak=False,
    )
    yield from _baselines_apart(run)
    yield from among_results(
        run,
        "estimate",
        Reason.of("estimate_only"),
        "make RAPL readable (lem doctor says how), or give an external meter's readings (measurement.external_csv)",
        lambda item: item.energy.primary_j.is_estimate,
    )
    yield from among_results(
        run,
        "integrated_power",
        Reason.of("power_integrated"),
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
            Reason.of("baselines_apart", spread=percent(max(apart.values()))),
            "net energies are not alike then; compare gross energy, and see what else draws power",
            tuple(apart),
        )


def _loads(run: RunResults) -> Found:
    shared = tuple(item.name for item in run.subjects if item.aggregate.is_load_shared)
    if shared:
        yield Finding(
            "shared_loads",
            True,
            Reason.of("shared_loads", why=SHARED_LOAD),
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
            Reason.of("free_lengths_differ" if is_free else "lengths_differ", low=low, high=high),
            remedy if is_free else "ignore_eos was set and did not hold: the experiment's log.txt may say why",
            tuple(group),
        )
    if free and not unlike:
        yield Finding("output_lengths", False, Reason.of("free_lengths"), remedy, free)


def _mixtures(run: RunResults) -> Found:
    """What is not the same in all of it."""
    with_results = [item for item in run.subjects if item.used]
    seen: dict[Reason, list[str]] = {}
    for other in with_results[1:]:
        for obstacle in find_obstacles(with_results[0].used, other.used):
            if obstacle.reason.code != "other_output_lengths":
                seen.setdefault(obstacle.reason, []).append(other.name)
    for reason, names in seen.items():
        yield Finding(
            "not_comparable",
            True,
            Reason.of("not_comparable", name=with_results[0].name, why=reason),
            "measure them alike, or compare only what is alike",
            tuple(names),
        )
    changed = tuple(item.name for item in with_results if len({it.environment.fingerprint for it in item.used}) > 1)
    if changed:
        yield Finding(
            "environment_changed",
            True,
            Reason.of("environment_changed"),
            "measure it anew in one environment (--fresh)",
            changed,
        )


def _warnings(run: RunResults) -> Found:
    """What the results say themselves, each kind once."""
    told = ((reason, subject.name) for subject in run.subjects for reason in subject.aggregate.warnings)
    for found in alike((reason, name) for reason, name in told if reason.code not in _TOLD):
        yield Finding("warning", False, found[0][0], "", tuple(dict.fromkeys(name for _, name in found)))


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
