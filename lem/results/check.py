"""What weakens the numbers of a campaign: single results, meters, neighbours, unequal work, drift, too few cycles."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lem.base import measurement
from lem.base.dataclass import dataclass, replace
from lem.base.measurement import (
    CROSSCHECK_TOLERANCE,
    NET_SHIFT_TOLERANCE,
    REST_TOLERANCE,
    SHORT_WINDOW_S,
    UNSTEADY_BY_CHANCE,
    WINDOW_UPDATES,
    is_estimate,
)
from lem.base.reasons import Reason, alike, read_tables
from lem.base.units import percent, plain, plural, some_of
from lem.record import Record
from lem.results import trends
from lem.results.comparability import LENGTH_TOLERANCE, environment_changes, obstacles_to
from lem.results.compare import exclusion_reason, find_effect
from lem.results.metrics import Metric
from lem.results.run import REPLAYED, SHARED_LOAD, Configuration, Run
from lem.results.stats import AUTOCORRELATION_SOUGHT, CONFIDENCE, UNPLANNED, Effect, cycles_to_settle
from lem.results.stopping import MOST_CYCLES
from lem.results.student import POWER

# An interval wider than this cannot show a difference of a few percent.
_WIDE = 0.05
_LEAST_CYCLES = 3
_PAIRS_SHOWN = 5
_DAMAGE_SHOWN = 3
_CAPPED_FROM = 0.01
_THIN_FROM = 0.1

_SHARED = Reason.of("shared_loads", why=SHARED_LOAD)
_AT_CAP = Reason.of("gap_cap_reached")

_REST_MOVED = frozenset({"rest_power_fell", "rest_power_rose"})
# Warnings of records that a check here, or its own sentence, covers.
_COVERED = _REST_MOVED | {
    "crosscheck", "energy_estimated", "mixed_configurations", "unsteady", "warmup_too_few_steps", "warmup_unsettled",
}  # fmt: skip
# How large interference was, in the data of its reason.
_EXTENTS = frozenset({"share", "starved_s", "stopped_s", "suspended_s", "pause_s"})

# What to do about each kind of finding: of those that make numbers or verdicts unreliable, of the others, and about
# runs of programs, which no campaign has.
_WEAK, _NOTES, _OF_PROGRAMS = (
    {kind: text.format(short_s=SHORT_WINDOW_S, most_cycles=MOST_CYCLES) for kind, text in table.items()}
    for table in read_tables("lem.results", "remedies.txt").values()
)
KINDS = (*_WEAK, *_NOTES)
_NO_EFFECT = "ignore_eos was set but had no effect: the log.txt of the experiment may show why"
_ALONE = (
    "end the other programs (lem doctor names them) or raise the CPU limit, and reserve the machine while it measures"
)
_STOPPED = "stop or pause nothing that is measured, nor lem: signals, Ctrl-Z, debuggers, docker pause"
_SUSPENDED = "keep the machine from suspending, as with systemd-inhibit"
# What kept an engine from its work, as warnings and invalid results have it, with what to do about it.
INTERFERENCE: Mapping[str, str] = {
    "engine_waited_too_long": _ALONE,
    "engine_waited": _ALONE,
    "foreign_cpu": _ALONE,
    "engine_starved": _ALONE,
    "sampler_starved": _ALONE,
    "engine_stopped": _STOPPED,
    "lem_stopped": _STOPPED,
    "host_suspended": _SUSPENDED,
}

_NO_RESUME = "no manifest in the state folder (--state-dir) continues this run: a new run measures all of it"


@dataclass(frozen=True)
class Finding:
    kind: str  # a short stable word
    is_weak: bool  # numbers or verdicts are unreliable because of it; else it is something to know about them
    reason: Reason
    remedy: str
    configurations: tuple[str, ...] = ()  # those it concerns; () for the campaign as a whole

    @property
    def text(self) -> str:
        """In words; those of other programs, which warnings pass on, may end in a full stop."""
        return self.reason.text.rstrip(".") if self.kind == "warning" else self.reason.text


Found = Iterable[Finding]
_Seen = Sequence[tuple[Configuration, Any]]


@dataclass(frozen=True)
class _OfEach:
    """A check of each configuration by itself."""

    see: Callable[[Configuration], Any]  # what is wrong with it; nothing and 0 where all is well
    find: Callable[[_Seen], Found]  # what follows from it


def check_run(run: Run) -> tuple[Finding, ...]:
    # All checks see one configuration before the next: the results of thousands do not fit into a processor's cache.
    of_each = [check for check in _CHECKS if isinstance(check, _OfEach)]
    seen: dict[_OfEach, list[tuple[Configuration, Any]]] = {check: [] for check in of_each}
    for item in run.with_results:
        for check in of_each:
            if what := check.see(item):
                seen[check].append((item, what))
    found = (check.find(seen[check]) if isinstance(check, _OfEach) else check(run) for check in _CHECKS)
    findings = list(itertools.chain.from_iterable(found))
    if run.with_results and all(item.is_program for item in run.with_results):
        findings = [replace(it, remedy=_OF_PROGRAMS.get(it.kind, it.remedy)) for it in findings]
    return tuple(sorted(findings, key=lambda item: not item.is_weak))


def _of_results(kind: str, what: Reason, concerns: Callable[[Record], object]) -> _OfEach:
    def see(item: Configuration) -> list[Record]:
        return [record for record in item.used if concerns(record)]

    def find(seen: _Seen) -> Found:
        if seen:
            count, total = sum(len(records) for _, records in seen), sum(len(item.used) for item, _ in seen)
            reason = Reason.of("some_results", what=what, count=count, total=total)
            yield _finding(kind, reason, [item.name for item, _ in seen])

    return _OfEach(see, find)


def _of_configurations(kind: str, size: Callable[[Configuration], float], what: Callable[[float], Reason]) -> _OfEach:
    def find(seen: _Seen) -> Found:
        if seen:
            yield _finding(kind, what(max(amount for _, amount in seen)), [item.name for item, _ in seen])

    return _OfEach(size, find)


def _finding(
    kind: str, reason: Reason, whom: Iterable[str] = (), *, is_weak: bool | None = None, remedy: str | None = None
) -> Finding:
    weak = kind in _WEAK if is_weak is None else is_weak
    remedy = {**_WEAK, **_NOTES}[kind] if remedy is None else remedy
    return Finding(kind, weak, reason, remedy, tuple(dict.fromkeys(whom)))


def _interference(run: Run) -> Found:
    seen: dict[str, list[tuple[Reason, Record]]] = {}
    for record in run.records:
        validity = record.validity
        for why in validity.invalid_reasons + validity.warnings:
            if why.code in INTERFERENCE:
                seen.setdefault(INTERFERENCE[why.code], []).append((why, record))
    for remedy, found in seen.items():
        worst = max((why for why, _ in found), key=_extent)
        records = {record.identity.key: record for _, record in found}
        what = Reason.of("interfered", count=len(records), total=len(run.records), worst=worst)
        yield _finding("interference", what, _names(records.values()), remedy=remedy)


def _extent(why: Reason) -> float:
    return max(float(value) for name, value in why.data.items() if name in _EXTENTS)


def _missing(run: Run) -> Found:
    more = run.remedy or _NO_RESUME
    damaged = [f"{item.path} ({item.kind})" for item in run.problems if item.kind != "missing"]
    if damaged:
        reason = Reason.of("results_damaged", named=some_of(damaged, _DAMAGE_SHOWN))
        yield _finding("damaged", reason, remedy=f"{_WEAK['damaged']}; {more}")
    for kind, code, counts in (("failed", "results_missing", run.failed), ("unfinished", "results_left", run.left)):
        if counts:
            reason = Reason.of(code, experiments=plural(sum(counts.values()), "experiment"))
            yield _finding(kind, reason, counts, remedy="; ".join(filter(None, (_WEAK[kind], more))))
    if not run.records:
        yield _finding("no_results", Reason.of("no_results"))


def _exclusions(run: Run) -> Found:
    if reason := exclusion_reason(*run.with_results):
        yield _finding("unequal_exclusions", Reason.of("no_overall_verdict", why=reason))
    invalid = [record for record in run.records if not record.validity.valid and not _is_slowed(record)]
    for found in alike(
        (why, record) for record in invalid for why in record.validity.invalid_reasons if why.code not in INTERFERENCE
    ):
        what = Reason.of("results_invalid", count=len(found), total=len(run.records), why=found[0][0])
        yield _finding("invalid", what, _names(record for _, record in found), is_weak=bool(reason))


def _throttling(run: Run) -> Found:
    slowed = [record for record in run.records if _is_slowed(record)]
    if slowed:
        longest_s = max((gpu.throttle_thermal_s or 0.0 for item in slowed for gpu in item.gpus), default=0.0)
        data = {"count": len(slowed), "total": len(run.records)}
        what = Reason.of("throttled_for", **data, longest_s=longest_s) if longest_s else Reason.of("throttled", **data)
        yield _finding("throttled", what, _names(slowed))


def _removed(run: Run) -> Found:
    if run.removed:
        names = [item.name for item in run.removed]
        yield _finding("removed", Reason.of("removed", names=some_of(names, _DAMAGE_SHOWN)), names)


def _unsteady(run: Run) -> Found:
    """Windows that were not steady, unless they are as few as chance gives under traffic."""
    moved = [_is_open_loop(record) for record in run.used if record.validity.steady is False]
    if all(moved) and trends.is_chance(len(moved), sum(map(_is_open_loop, run.used)), UNSTEADY_BY_CHANCE):
        return
    yield from _MOVED.find([(item, records) for item in run.with_results if (records := _MOVED.see(item))])


_MOVED = _of_results("unsteady", Reason.of("window_moved"), lambda item: item.validity.steady is False)


def _is_open_loop(record: Record) -> bool:
    return record.window.traffic_mode != "closed_batch"


def _work(run: Run) -> Found:
    measured = [item for item in run.with_results if item.used and not item.is_program]
    free = tuple(item.name for item in measured if item.used[0].requested.get("ignore_eos") is not True)
    by_limit: dict[object, dict[str, float]] = {}
    for item in measured:
        by_limit.setdefault(item.used[0].requested.get("max_output_tokens"), {})[item.name] = _length(item.used)
    is_alike = True
    for lengths in by_limit.values():
        low, high = min(lengths.values()), max(lengths.values())
        if high <= (1 + LENGTH_TOLERANCE) * low:
            continue
        is_alike = False
        code, remedy = "free_lengths_differ", _WEAK["output_lengths"]
        if not any(name in free for name in lengths):
            code, remedy = "lengths_differ", _NO_EFFECT
        yield _finding("output_lengths", Reason.of(code, low=low, high=high), lengths, remedy=remedy)
    if free and is_alike:
        yield _finding("output_lengths", Reason.of("free_lengths"), free, is_weak=False)


def _obstacles(run: Run) -> Found:
    first, *others = [item for item in run.with_results if item.used] or [Configuration("")]
    seen: dict[Reason, list[str]] = {}
    find = obstacles_to(first.used)
    for other in others:
        for obstacle in find(other.used, other.conditions):
            if obstacle.reason.code != "other_output_lengths":
                seen.setdefault(obstacle.reason, []).append(other.name)
    for reason, names in seen.items():
        yield _finding("not_comparable", Reason.of("not_comparable", name=first.name, why=reason), names)


def _changes(item: Configuration) -> str:
    if len(item.conditions) < 2:
        return ""
    parts = environment_changes(item.used)
    is_changed = parts or len({record.environment.fingerprint for record in item.used}) > 1
    return ("; ".join(parts) or "versions, image or GPUs") if is_changed else ""


def _environment(seen: _Seen) -> Found:
    changed: dict[str, list[str]] = {}
    for item, what in seen:
        changed.setdefault(what, []).append(item.name)
    for what, names in changed.items():
        yield _finding("environment_changed", Reason.of("environment_changed", what=what), names)


def _own_warnings(item: Configuration) -> list[Reason]:
    return [reason for reason in item.warnings if reason.code not in _COVERED and reason.code not in INTERFERENCE]


def _warnings(seen: _Seen) -> Found:
    for found in alike((reason, item.name) for item, reasons in seen for reason in reasons):
        yield _finding("warning", found[0][0], dict.fromkeys(name for _, name in found))


def _over_time(run: Run) -> Found:
    courses = {metric: trends.course_of(run, metric) for metric in trends.WATCHED}
    for metric, course in courses.items():
        yield from _moves("drift", metric, course.drift)
    yield from _order(run, courses[run.primary_metric])
    yield from _autocorrelation(courses[run.primary_metric])


def _moves(kind: str, metric: Metric, drift: trends.Drift | None) -> Found:
    if drift is not None and drift.is_found:
        about = {"metric": metric.label, "moved": drift.moved, "interval": drift.interval}
        yield _finding(kind, Reason.of(kind, **about, rate=percent(trends.FALSE_ALARMS)))


def _order(run: Run, course: trends.Course) -> Found:
    if later := trends.ran_later(run):
        yield _finding("grouped", trends.BLOCKS, [item.name for item in later])
        return
    if trends.is_same_order(run):
        yield _finding("same_order", trends.SAME_ORDER)
        return
    yield from _moves("order_effect", course.metric, course.position_effect)


def _autocorrelation(course: trends.Course) -> Found:
    found = course.autocorrelation
    if found is not None:
        data = {"lag_1": found.lag_1, "n": found.n, "sought": AUTOCORRELATION_SOUGHT, "power": percent(found.power)}
        reason = Reason.of("autocorrelation", metric=course.metric.label, rate=percent(trends.FALSE_ALARMS), **data)
        yield _finding("autocorrelation", reason, is_weak=found.p_value < trends.FALSE_ALARMS)


def _wide_intervals(run: Run) -> Found:
    metric = run.primary_metric
    enough = [item for item in run.with_results if item.n_cycles >= _LEAST_CYCLES]
    wide = {item.name: width for item in enough if (width := item.estimate(metric).half_width or 0.0) > _WIDE}
    if wide:
        widest = percent(max(wide.values()))
        yield _finding("wide_interval", Reason.of("wide_interval", metric=metric.lower_label, width=widest), wide)


def _pairs(run: Run) -> Found:
    metric = run.primary_metric
    known = [(value, item) for item in run.with_results if (value := item.estimate(metric).value)]
    ranked = [item for _, item in sorted(known, key=lambda entry: entry[0])]
    found = ((pair, _open_interval(metric, *pair)) for pair in itertools.pairwise(ranked))
    open_pairs = [(pair, it) for pair, it in found if it is not None]
    yield from (_open_pair(metric, *pair, *it) for pair, it in open_pairs[:_PAIRS_SHOWN])
    if (more := len(open_pairs) - _PAIRS_SHOWN) > 0:
        yield _finding("indistinguishable", Reason.of("more_pairs", count=more), remedy="lem compare lists them")


def _level(lower: Configuration, upper: Configuration) -> float:
    return 1 - (1 - CONFIDENCE) * min(lower.share, upper.share)


def _open_interval(
    metric: Metric, lower: Configuration, upper: Configuration
) -> tuple[Effect, tuple[float, float]] | None:
    """The effect between two configurations with its interval, if that contains 1."""
    effect, reason = find_effect(metric, lower, upper)
    if effect is None or reason or trends.ran_apart(lower, upper):
        return None
    interval = effect.interval(_level(lower, upper))
    return None if interval is None or not interval[0] <= 1 <= interval[1] else (effect, interval)


def _open_pair(
    metric: Metric, lower: Configuration, upper: Configuration, effect: Effect, interval: tuple[float, float]
) -> Finding:
    further = cycles_to_settle(effect, 0.0, 1 - (1 - _level(lower, upper)) / UNPLANNED)
    n_cycles, names = min(effect.n_cycles), (lower.name, upper.name)
    low, high = (plain(100 * (bound - 1), "+.2g") for bound in interval)
    data = {"more": upper.name, "less": lower.name, "metric": metric.lower_label, "low": low, "high": high}
    found = Reason.of("pair_open", **data, difference=percent(effect.ratio - 1), cycles=n_cycles)
    if further is None or n_cycles + further > MOST_CYCLES:
        return _finding("indistinguishable", found, names)
    command = f"lem campaign … --resume --cycles {n_cycles + further}"
    odds = f"with {percent(POWER)} power, if the difference stays the same"
    remedy = f"{further} more cycles would separate them {odds}: {command}"
    return _finding("too_few_cycles", found, names, remedy=remedy)


def _stopping(run: Run) -> Found:
    if (rule := run.stopping) is not None and run.records:
        yield _finding("stopping", Reason.of("cycles_added", rule=rule.describe(), correction=rule.correction))


def _is_slowed(record: Record) -> bool:
    return any(gpu.was_slowed for gpu in record.gpus)


def _capped_share(configuration: Configuration) -> float:
    """The largest share of a window at the power limit; 0 where it is negligible."""
    shares = (
        min(1.0, gpu.throttle_power_s / record.window.window_s)
        for record in configuration.used
        for gpu in record.gpus
        if gpu.throttle_power_s and record.window.window_s
    )
    most = max(shares, default=0.0)
    return most if most > _CAPPED_FROM else 0.0


def _thin_share(configuration: Configuration) -> float:
    """The largest share of a closed batch in which it fills or drains; 0 where it is small."""
    batches = (record.window for record in configuration.used if record.window.traffic_mode == "closed_batch")
    most = max((window.fill_drain_ratio or 0.0 for window in batches), default=0.0)
    return most if most > _THIN_FROM else 0.0


def _is_integrated(record: Record) -> bool:
    return measurement.is_integrated_power(record.energy.source)


def _is_short(record: Record) -> bool:
    window_s, period_s = record.window.window_s, record.energy.counter_update_period_s
    return window_s < SHORT_WINDOW_S or (period_s is not None and window_s < WINDOW_UPDATES * period_s)


def _meters_differ(record: Record) -> bool:
    ratio = record.energy.energy_crosscheck_ratio
    return ratio is not None and abs(ratio - 1) > CROSSCHECK_TOLERANCE


def _rest_changed(record: Record) -> bool:
    return any(reason.code in _REST_MOVED for reason in record.validity.warnings)


def _rest_spread(configuration: Configuration) -> float:
    """How far the loaded idle power of the cycles is apart; 0 within the tolerance."""
    rest_w = [power_w for item in configuration.used if (power_w := item.idle.idle_loaded_power_w)]
    is_apart = bool(rest_w) and max(rest_w) > (1 + REST_TOLERANCE) * min(rest_w)
    return max(rest_w) / min(rest_w) - 1 if is_apart else 0.0


def _length(records: Sequence[Record]) -> float:
    requests = sum(item.work.requests_ok or 0 for item in records)
    return sum(item.work.output_tok or 0 for item in records) / requests if requests else 0.0


def _names(records: Iterable[Record]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item.identity.config_name for item in records))


# In the order in which findings of the same weight are shown.
_CHECKS: tuple[Callable[[Run], Found] | _OfEach, ...] = (
    _interference,
    _missing,
    _exclusions,
    _of_configurations("no_valid_result", lambda item: not item.cycles, lambda _: Reason.of("no_valid_result")),
    _unsteady,
    _of_results("warmup", Reason.of("warmup_did_not_settle"), lambda item: item.validity.warmup_converged is False),
    _of_results("short_window", Reason.of("window_short", least_s=SHORT_WINDOW_S, updates=WINDOW_UPDATES), _is_short),
    _of_configurations("fill_drain", _thin_share, lambda most: Reason.of("filled_and_drained", share=percent(most))),
    _of_results("none_good", Reason.of("none_good"), lambda item: item.work.requests_good == 0),
    _of_results("failed_requests", Reason.of("few_requests_failed"), lambda item: item.work.requests_failed),
    _throttling,
    _of_configurations("power_capped", _capped_share, lambda most: Reason.of("power_capped", share=percent(most))),
    _of_results("gap_too_short", Reason.of("gap_ended_at_cap"), lambda item: item.window.gap_end_reason == _AT_CAP),
    _of_results("foreign_processes", Reason.of("others_on_gpu"), lambda item: item.environment.other_gpu_processes),
    _of_results("crosscheck", Reason.of("meters_apart", tolerance=percent(CROSSCHECK_TOLERANCE)), _meters_differ),
    _of_results(
        "baseline_drift", Reason.of("rest_power_changed", tolerance=percent(NET_SHIFT_TOLERANCE)), _rest_changed
    ),
    _of_configurations("baselines_apart", _rest_spread, lambda by: Reason.of("baselines_apart", spread=percent(by))),
    _of_results("estimate", Reason.of("estimate_only"), lambda item: is_estimate(item.energy.source)),
    _of_results("integrated_power", Reason.of("power_integrated"), _is_integrated),
    _of_configurations("shared_loads", lambda it: it.is_load_shared, lambda _: _SHARED),
    _of_configurations("replayed", lambda it: it.is_replayed, lambda _: REPLAYED),
    _work,
    _obstacles,
    _OfEach(_changes, _environment),
    _OfEach(_own_warnings, _warnings),
    _over_time,
    _of_configurations(
        "few_cycles",
        lambda item: item.n_cycles if item.n_cycles < _LEAST_CYCLES else 0,
        lambda most: Reason.of("only_one_cycle" if most == 1 else "only_two_cycles"),
    ),
    _wide_intervals,
    _pairs,
    _stopping,
    _removed,
)
