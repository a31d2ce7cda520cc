"""The runs of a campaign in order: each configuration relative to an anchor, change points, and what changed with them.

A change point is tested against the variation between runs, not within one: the runs of a night share its conditions,
so intervals over the cycles of a run are too narrow to compare nights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from lem.base.dataclass import dataclass, replace
from lem.base.doc import NAMES_SHOWN
from lem.base.errors import UserError
from lem.base.reasons import Reason
from lem.base.units import fixed, fmean, hash_label, plain, plural, some_of
from lem.results.comparability import facts_of
from lem.results.compare import find_effect, software_of
from lem.results.configurations import bare_name, group_of
from lem.results.metrics import Metric
from lem.results.run import Configuration, Run, estimate_note
from lem.results.student import student_t_cdf
from lem.results.trends import FALSE_ALARMS, WATCHED
from lem.results.views import ESTIMATED

# With fewer, too few degrees of freedom are left for the variation.
LEAST_RUNS = 4
# What differs by less is the same up to rounding.
_SAME = 1e-9

_Key = tuple[str, str]
_Facts = Mapping[str, str]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Cut:
    place: int  # of the first value after it
    p_value: float  # of no change among the values between its neighbours


def find_cuts(logs: Sequence[float], alpha: float, begin: int = 0) -> list[Cut]:
    """Where the level of a series of logs changes, in order; if it never does, a probability of at most `alpha` of any.

    The values of a level are taken to be independent and normal. The largest t statistic of all places of one change is
    tested with the Bonferroni bound on its probability [Worsley 1979, JASA 74:365]; so is that of all spells, in which
    the level changes and returns, since one change cannot describe them. Each gets half of `alpha`. What is found
    divides the series, and its parts are tested in the same way.
    """
    n = len(logs)
    if n < LEAST_RUNS:
        return []
    singles = [(place, n) for place in range(1, n)]
    spells = [(first, end) for first in range(1, n - 1) for end in range(first + 1, n)]
    for spans in (singles, spells):
        (first, end), t = _largest(logs, spans)
        p_value = min(1.0, 2 * len(spans) * 2 * student_t_cdf(-t, n - 2))
        if p_value < alpha:
            places = [first, *([end] if end < n else [])]
            edges = [0, *places, n]
            inner = [find_cuts(logs[one:two], alpha, begin + one) for one, two in itertools.pairwise(edges)]
            found = [Cut(begin + place, p_value) for place in places]
            return sorted([*found, *itertools.chain.from_iterable(inner)], key=lambda cut: cut.place)
    return []


def _largest(logs: Sequence[float], spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], float]:
    """The span whose values differ most from the others, and its t statistic."""
    n, mean = len(logs), fmean(logs)
    sums = [0.0, *itertools.accumulate(value - mean for value in logs)]
    total = math.fsum((value - mean) ** 2 for value in logs)
    best, most = spans[0], -1.0
    for span in spans:
        first, end = span
        count = end - first
        inside = sums[end] - sums[first]
        between = inside * inside * n / (count * (n - count))  # of the mean's square sum, as the sums are about it
        if between > most:
            best, most = span, between
    if most <= n * _SAME**2:
        return best, 0.0
    within = total - most
    return best, math.inf if within <= most * _SAME**2 else math.sqrt(most / (within / (n - 2)))


@dataclass(frozen=True)
class Point:
    run_id: str
    value: float  # geometric mean over the cycles of the run
    log: float  # of the value, or of its ratio to the anchor


@dataclass(frozen=True)
class Change:
    before: str  # the run before it
    run_id: str  # the first run after it
    ratio: float  # of the levels, after it over before it
    p_value: float  # of no change in any series; adjusted for their number
    place: int  # of its first point in the series
    versions: tuple[str, ...] = ()  # what else changed with it


@dataclass(frozen=True)
class Series:
    metric: Metric
    name: str
    config_hash: str
    number: int | None  # in the tables of the last run; None where that does not have it
    points: tuple[Point, ...]
    is_anchor: bool = False
    is_relative: bool = False  # to the anchor
    changes: tuple[Change, ...] = ()
    missing: Reason | None = None  # why runs have no point, or why no change can be found
    estimate: str = ""  # that its energy is, or is partly, no measurement

    @property
    def heading(self) -> str:
        return f"{self.metric.heading} {ESTIMATED}" if self.estimate else self.metric.heading

    @property
    def stretches(self) -> list[tuple[Point, ...]]:
        """The points between change points."""
        return _divided(self.points, [item.place for item in self.changes])

    @property
    def levels(self) -> list[float]:
        """The mean log of each stretch."""
        return _levels(self.stretches)

    @property
    def spread(self) -> float | None:
        """The standard deviation of the logs from run to run, about their levels; None with too few runs."""
        freedom = len(self.points) - len(self.changes) - 1
        if freedom < 1:
            return None
        pairs = zip(self.stretches, self.levels, strict=True)
        squares = math.fsum((item.log - level) ** 2 for points, level in pairs for item in points)
        return math.sqrt(squares / freedom)


def _divided(points: tuple[Point, ...], places: Sequence[int]) -> list[tuple[Point, ...]]:
    return [points[one:two] for one, two in itertools.pairwise([0, *places, len(points)])]


def _levels(stretches: Sequence[tuple[Point, ...]]) -> list[float]:
    return [fmean(item.log for item in points) for points in stretches if points]


@dataclass(frozen=True)
class Versions:
    run_id: str  # the first run with them
    names: tuple[str, ...]  # the configurations
    texts: tuple[str, ...]  # `transformers 5.22.0 → 5.23.0`


@dataclass(frozen=True)
class History:
    campaign_name: str
    run_ids: tuple[str, ...]
    metrics: tuple[Metric, ...]
    series: tuple[Series, ...]
    versions: tuple[Versions, ...]  # every change of them, with and without a change point
    anchor: str | None = None  # its name
    anchor_moved: bool = False  # its own software changed, which changes every ratio to it

    @property
    def changes(self) -> list[tuple[Series, Change]]:
        """In the order of runs."""
        found = [(series, change) for series in self.series for change in series.changes]
        return sorted(found, key=lambda item: (self.run_ids.index(item[1].run_id), item[1].p_value))

    @property
    def n_tested(self) -> int:
        return sum(len(item.points) >= LEAST_RUNS for item in self.series)

    @property
    def unexplained(self) -> list[Versions]:
        """Changes of versions without a change point."""
        # Also in a run that has no value between the two runs of a change point.
        moved = {
            (run_id, text)
            for _, it in self.changes
            for run_id in self.run_ids[self.run_ids.index(it.before) + 1 : self.run_ids.index(it.run_id) + 1]
            for text in it.versions
        }
        rests = [replace(it, texts=tuple(text for text in it.texts if (it.run_id, text) not in moved))
                 for it in self.versions]  # fmt: skip
        return [item for item in rests if item.texts]


def make_history(runs: Sequence[Run], metrics: Sequence[Metric] = (), anchor: str = "") -> History:
    """The configurations of one campaign over its runs, which are in order; UserError for an unknown anchor."""
    known = [{_key(item): item for item in run.with_results if item.used} for run in runs]
    runs_used = [(run, items) for run, items in zip(runs, known, strict=True) if items]
    if not runs_used:
        raise UserError("no run of this campaign has a valid result", "see `lem results list`")
    by_key: dict[_Key, dict[str, Configuration]] = {}
    for run, items in runs_used:
        for key, item in items.items():
            by_key.setdefault(key, {})[run.run_id] = item
    run_ids = tuple(run.run_id for run, _ in runs_used)
    last = runs_used[-1][1]
    keys = sorted(by_key, key=lambda key: (key not in last, last[key].number if key in last else 0))
    chosen, has_moved = _choose_anchor(by_key, keys, anchor, run_ids)
    shown = tuple(metrics) or tuple(
        metric
        for metric in WATCHED
        if any(item.estimate(metric).values for items in by_key.values() for item in items.values())
    )
    if not shown:
        unmeasured = " nor ".join(metric.lower_label for metric in WATCHED)
        raise UserError(f"neither {unmeasured} was measured", "name another metric with --metric")
    found = [
        _series(metric, by_key[key], _of_anchor(by_key, key, chosen), last.get(key)) for metric in shown for key in keys
    ]
    found = [replace(item, is_anchor=chosen is not None and not item.is_relative) for item in found]
    tested = sum(len(item.points) >= LEAST_RUNS for item in found)
    facts = {key: {run_id: facts_of(item.used) for run_id, item in items.items()} for key, items in by_key.items()}
    done = tuple(
        _with_changes(item, facts[key], _of_anchor(facts, key, chosen), tested)
        for item, key in zip(found, keys * len(shown), strict=True)
    )
    names = {key: _last(by_key[key]).name for key in keys}
    name = _bare_name(_last(by_key[chosen])) if chosen else None
    versions = tuple(_version_changes(run_ids, facts, names))
    return History(runs_used[-1][0].campaign_name, run_ids, shown, done, versions, name, has_moved)


def _key(item: Configuration) -> _Key:
    return group_of(item.records[0].identity)


def _of_anchor(known: Mapping[_Key, Mapping[str, _T]], key: _Key, chosen: _Key | None) -> Mapping[str, _T] | None:
    """What is known of the anchor of a configuration, by run; None for an anchor, and without one."""
    if chosen is None or key[0] == chosen[0]:
        return None
    return known.get((chosen[0], key[1]), {})  # each host has its own, since hosts share no cycles


def _bare_name(item: Configuration) -> str:
    return bare_name(item.records[0].identity)


def _last(items: Mapping[str, Configuration]) -> Configuration:
    return list(items.values())[-1]


def _choose_anchor(
    by_key: Mapping[_Key, Mapping[str, Configuration]], keys: Sequence[_Key], name: str, run_ids: Sequence[str]
) -> tuple[_Key | None, bool]:
    """The named configuration, else the first with the same software in all runs; and whether its software changed."""

    def has_moved(key: _Key) -> bool:
        first, *others = (software_of(item.used) for item in by_key[key].values())
        return any(other != first for other in others)

    if name:
        lasts = {key: _last(by_key[key]) for key in keys}
        named = [key for key, it in lasts.items() if name in (it.name, str(it.number), _bare_name(it))]
        if not named:
            names = ", ".join(_last(by_key[key]).name for key in keys)
            raise UserError(f"no configuration {name!r} in these runs", f"configurations: {names}")
        return named[0], has_moved(named[0])
    whole = (key for key in keys if len(by_key[key]) == len(run_ids) and not has_moved(key))
    return (next(whole, None) if len(keys) > 1 else None), False


def _series(
    metric: Metric, items: Mapping[str, Configuration], anchors: Mapping[str, Configuration] | None,
    now: Configuration | None,
) -> Series:  # fmt: skip
    points, reasons = [], []
    for run_id, item in items.items():
        value, why = item.estimate(metric).value, None
        if anchors is None:
            log = math.log(value) if value and value > 0 else None
        elif run_id in anchors:  # pair by pair, as a comparison of configurations
            effect, why = find_effect(metric, anchors[run_id], item)
            log = None if effect is None else effect.log_ratio
        else:
            log, why = None, Reason.of("anchor_absent")
        if value is None or log is None:
            null_reason = item.estimate(metric).null_reason
            unknown = Reason.of("no_ratio") if null_reason is None else Reason.of("verbatim", text=null_reason)
            reasons.append(unknown if value is None else why or unknown)
        else:
            points.append(Point(run_id, value, log))
    missing = reasons[0] if reasons else None
    if len(items) < LEAST_RUNS:
        missing = Reason.of("few_runs", count=len(points), least=LEAST_RUNS)
    number, last = None if now is None else now.number, _last(items)
    found = Series(metric, last.name, last.config_hash, number, tuple(points), is_relative=anchors is not None)
    estimate = estimate_note(items.values()).strip("()") if metric.group == "energy" else ""
    return replace(found, missing=missing, estimate=estimate)


def _with_changes(
    series: Series, own: Mapping[str, _Facts], anchors: Mapping[str, _Facts] | None, tested: int
) -> Series:
    cuts = find_cuts([point.log for point in series.points], FALSE_ALARMS / max(tested, 1))
    levels = _levels(_divided(series.points, [cut.place for cut in cuts]))
    changes = []
    for index, cut in enumerate(cuts):
        before, after = series.points[cut.place - 1].run_id, series.points[cut.place].run_id
        texts = differing_facts(own[before], own[after])
        if anchors is not None:
            of_anchor = differing_facts(anchors[before], anchors[after])
            texts += [f"anchor: {text}" for text in of_anchor if text not in texts]
        ratio, p_value = math.exp(levels[index + 1] - levels[index]), min(1.0, cut.p_value * tested)
        changes.append(Change(before, after, ratio, p_value, cut.place, tuple(texts)))
    return replace(series, changes=tuple(changes))


def differing_facts(before: _Facts, after: _Facts) -> list[str]:
    return [
        f"{name} {before.get(name, 'none')} → {after.get(name, 'none')}"
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    ]


def _version_changes(
    run_ids: Sequence[str], facts: Mapping[_Key, Mapping[str, _Facts]], names: Mapping[_Key, str]
) -> Iterator[Versions]:
    found: dict[tuple[str, str], list[str]] = {}
    for key, by_run in facts.items():
        for (_, before), (run_id, after) in itertools.pairwise(by_run.items()):
            for text in differing_facts(before, after):
                found.setdefault((run_id, text), []).append(names[key])
    together: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (run_id, text), those in found.items():
        together.setdefault((run_id, tuple(those)), []).append(text)
    for (run_id, who), what in sorted(together.items(), key=lambda item: run_ids.index(item[0][0])):
        yield Versions(run_id, who, tuple(what))


def started(run_id: str) -> str:
    """When a run began, for a person: `2026-07-14 10:00`; its name where that is no time."""
    date, _, rest = run_id.partition("T")
    if len(date) == 8 and date.isdecimal() and rest[:6].isdecimal():
        return f"{date[:4]}-{date[4:6]}-{date[6:]} {rest[:2]}:{rest[2:4]}"
    return run_id


_VERSIONS_SHOWN = 6
NOTHING_ELSE = "no version or setting that lem records"


def change_text(ratio: float) -> str:
    return f"{fixed(100 * (ratio - 1), 1, '+')} %"


def versions_text(texts: Sequence[str]) -> str:
    return some_of(list(texts), _VERSIONS_SHOWN, "; ")


def chance_text(p_value: float) -> str:
    return "< 0.0001" if p_value < 1e-4 else plain(p_value, ".1g")


def anchor_note(history: History) -> str:
    if history.anchor is None:
        return (
            "No anchor: no second configuration has the same software in all runs, so what a day did to the machine "
            "looks like a change."
        )
    moved = "; its own software changed, which changes every ratio" if history.anchor_moved else ""
    return f"Anchor: {history.anchor}{moved}. The spread is that from run to run, a standard deviation."


def notes(history: History) -> Iterator[str]:
    for text in dict.fromkeys(item.estimate for item in history.series if item.estimate):
        yield f"{ESTIMATED}: {text}, not a measurement."
    tested = history.n_tested
    if tested:
        share = f"{100 * FALSE_ALARMS:g} %"
        yield (
            f"If nothing changed and runs vary independently, at most {share} of such tables show a change point "
            f"({tested} series tested together)."
        )
    for item in history.unexplained:
        names = "all" if len(set(item.names)) == len({it.name for it in history.series}) else ""
        whom = names or some_of(list(item.names), NAMES_SHOWN)
        what = versions_text(item.texts)
        yield f"Changed at {started(item.run_id)} without a change point: {what} ({whom})."
    short = [item for item in history.series if len(item.points) < LEAST_RUNS]
    if short:
        names = some_of(list(dict.fromkeys(item.name for item in short)), NAMES_SHOWN)
        yield f"Too few values to find a change point, which needs {LEAST_RUNS}: {names}."
    partly = [item for item in history.series if item.missing is not None and item.missing.code != "few_runs"]
    for one in partly:
        left = len(history.run_ids) - len(one.points)
        yield f"{one.name}: {plural(left, 'run')} without a value of {one.metric.lower_label}: {one.missing}."


def history_document(history: History) -> dict[str, object]:
    return {
        "schema_version": 1,
        "campaign": history.campaign_name,
        "runs": list(history.run_ids),
        "anchor": history.anchor,
        "anchor_versions_changed": history.anchor_moved,
        "false_alarms": FALSE_ALARMS,
        "series_tested": history.n_tested,
        "series": [_series_document(item) for item in history.series],
        "version_changes": [
            {"run_id": it.run_id, "configurations": list(it.names), "changes": list(it.texts)}
            for it in history.versions
        ],
    }


def _series_document(series: Series) -> dict[str, object]:
    return {
        "metric": series.metric.name,
        "unit": series.metric.unit,
        "configuration": series.name,
        "config_hash": hash_label(series.config_hash),
        "number": series.number,
        "is_anchor": series.is_anchor,
        "is_relative": series.is_relative,
        "runs": [
            {
                "run_id": point.run_id,
                "value": point.value,
                "anchor_ratio": math.exp(point.log) if series.is_relative else None,
            }
            for point in series.points
        ],
        "between_run_sd_ratio": series.spread,
        "changes": [
            {
                "before": it.before,
                "run_id": it.run_id,
                "ratio": it.ratio,
                "p_value": it.p_value,
                "versions": list(it.versions),
            }
            for it in series.changes
        ],
        "estimate": series.estimate or None,
        "missing": series.missing and series.missing.text,
        "missing_code": series.missing and series.missing.code,
    }
