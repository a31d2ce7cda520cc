"""The table of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lem.base.doc import NAMES_SHOWN, Column, Doc, printable
from lem.base.log import WIDTH
from lem.base.reasons import alike
from lem.base.units import ABSENT, SIGNIFICANT_DIGITS, fmean, plural, some_of, with_decimals
from lem.results.axes import Key
from lem.results.bootstrap import bootstrap_coverage_label, coverage_notes
from lem.results.detail import SCORE, is_of_energy_score
from lem.results.limits import find_sweeps, limit_notes, limit_tables
from lem.results.load import GOOD_SHARE, find_series, knee_notes, knee_tables, share_text
from lem.results.metrics import METRIC_BY_NAME, PROGRAM_METRICS, Metric
from lem.results.run import (
    ENERGY,
    REPLAYED,
    THROUGHPUT,
    Configuration,
    Estimate,
    Run,
    estimate_note,
)
from lem.results.stats import CONFIDENCE
from lem.results.trends import BLOCKS, SAME_ORDER, is_same_order, ran_later
from lem.results.uncertainty import COMBINED_NOTE, budget_table, why_unknown

_GOODPUT = (METRIC_BY_NAME["good_requests_per_s"], METRIC_BY_NAME["energy_per_good_request_j"])
# Without intervals, beside the counts of results, by a short heading.
_NET = {"net\nJ/tok": METRIC_BY_NAME["gpu_energy_net_per_output_tok_j"]}
_LATENCIES = {"TTFT\np50": METRIC_BY_NAME["ttft_p50_s"], "e2e\np50": METRIC_BY_NAME["e2e_p50_s"]}
_CONFIDENCE = f"{100 * CONFIDENCE:g} %"
_NUMBERS_SHOWN = 12


def render_run(run: Run, *, has_budget: bool = False, is_colour: bool = False, width: int = WIDTH) -> str:
    if not run.configurations:
        return "No results.\n"
    return _RunTable(run, Doc(width, is_colour=is_colour)).render(has_budget=has_budget)


class _RunTable:
    def __init__(self, run: Run, doc: Doc) -> None:
        self._run = run
        self._configurations = run.configurations
        self._doc = doc
        numbers = [str(item.number) for item in run.configurations]
        settings, names = zip(*((item.settings, item.name) for item in run.configurations), strict=True)
        self._key = Key(numbers, settings, names)
        self._has_key = False  # a table showed it
        self._every: list[str] = []  # what the estimates over all attempts are
        self._series = find_series(run.with_results)
        self._sweeps = find_sweeps(run.with_results)

    def render(self, *, has_budget: bool) -> str:
        self._heading()
        is_scored = any(is_of_energy_score(record) for item in self._configurations for record in item.records)
        for metric in (*self._of_program, THROUGHPUT, ENERGY, *([SCORE] if is_scored else []), *_GOODPUT):
            self._estimates(metric)
        self._outcomes()
        for table in knee_tables(self._series):
            self._doc.block()
            self._doc.table(table)
        for table in limit_tables(self._sweeps):
            self._doc.block()
            self._doc.table(table)
        if has_budget:
            self._budgets()
        self._notes()
        self._warnings()
        self._doc.block()
        self._doc.lines(filter(None, [self._run.single_cycle]))
        return self._doc.render()

    @property
    def _of_program(self) -> Sequence[Metric]:
        is_program = any(item.is_program for item in self._configurations)
        return (*PROGRAM_METRICS, METRIC_BY_NAME["energy_per_request_j"]) if is_program else ()

    def _heading(self) -> None:
        run = self._run
        runs = f"run {run.run_id}" if len(run.run_ids) == 1 else f"{len(run.run_ids)} runs"
        cycles = {item.n_cycles for item in self._configurations}
        most = plural(max(cycles), "cycle") if max(cycles) else "no valid result"
        count = plural(len(self._configurations), "configuration")
        title = [run.campaign_name, runs if run.run_ids else "", count, most if len(cycles) == 1 else f"up to {most}"]
        self._doc.text(_listed(title), "bold")
        shared = _listed([*run.shared.values(), *(run.hosts if len(run.hosts) == 1 else ())])
        for text in filter(None, (shared, self._key.explanation)):
            self._doc.text(text, "dim")

    def _estimates(self, metric: Metric) -> None:
        note = estimate_note(self._configurations) if metric.group == "energy" else ""
        heading = f"{metric.heading} {note}".rstrip()
        estimates = [item.estimate(metric) for item in self._configurations]
        if not any(estimate.values or estimate.all_attempts for estimate in estimates):
            return
        decimals = _common_decimals(estimates)
        rows: list[tuple[str, ...]] = []
        every: list[str] = []
        for item, estimate in zip(self._configurations, estimates, strict=True):
            bootstrap, whole = estimate.bootstrap, estimate.all_attempts
            low, high = (bootstrap.ci_lower, bootstrap.ci_upper) if bootstrap else (None, None)
            intervals = (_interval(estimate.low, estimate.high, decimals), _interval(low, high, decimals))
            combined = estimate.combined.value
            counted = (str(estimate.n), _number(estimate.value, decimals))
            rows.append((*counted, *intervals, ABSENT if combined is None else combined.text))
            if whole is not None:
                every.append(f"{item.number} {_number(whole.geometric_mean, decimals)} (n = {whole.n_cycles})")
        headings = ["n", "geom.\nmean", f"{_CONFIDENCE}\nt interval", "bootstrap\ninterval"]
        if any(estimate.combined.value for estimate in estimates):
            headings.append("combined")
        cells = zip(*rows, strict=True)
        self._table([Column(text, tuple(column)) for text, column in zip(headings, cells, strict=False)], heading)
        if every:
            self._every.append(f"{heading}, over all attempts, invalid ones too: {some_of(every, NAMES_SHOWN)}.")

    def _has(self, metric: Metric) -> bool:
        return any(item.estimate(metric).values for item in self._configurations)

    def _table(self, columns: Sequence[Column], title: str) -> None:
        key = self._key
        if self._has_key and key.n_above(columns, self._doc.width) != 0:
            key = key.without_axes()
        self._has_key = True
        for table in key.tables(columns, self._doc.width, title):
            self._doc.block()
            self._doc.table(table)

    def _budgets(self) -> None:
        named = [(str(item.number), item.estimate(ENERGY).combined) for item in self._configurations]
        table = budget_table(named, "Uncertainty of the energy per output token, % (k = 1)")
        self._doc.block()
        if table is not None:
            self._doc.table(table)

    def _outcomes(self) -> None:
        configurations = self._configurations
        beside = [
            Column(heading, tuple(metric.shown(item.estimate(metric).value) for item in configurations))
            for heading, metric in (_NET | _LATENCIES).items()
            if self._has(metric)
        ]
        if self._has(GOOD_SHARE):
            shares = ([*item.values(GOOD_SHARE).values()] for item in configurations)
            beside.append(Column("good", tuple(share_text(fmean(each)) if each else ABSENT for each in shares)))
        counts = [
            Column("valid", tuple(str(len(item.records) - item.n_invalid) for item in configurations)),
            Column("invalid", tuple(str(item.n_invalid) for item in configurations)),
            Column("failed", tuple(str(item.n_failed) for item in configurations)),
        ]
        self._table([*beside, *counts], "Results")

    def _notes(self) -> None:
        notes = [*self._interval_notes(), *self._every, *knee_notes(self._series), *limit_notes(self._sweeps)]
        if any(map(self._has, _LATENCIES.values())):
            notes.append("Latency: median over the requests of a cycle, geometric mean over the cycles.")
        if any(map(self._has, _NET.values())):
            notes.append("net: GPU energy less what the GPU draws at rest with the engine loaded.")
        if any(item.is_by_board_sensors for item in self._configurations):
            notes.append(
                "Energy: board sensors are off by up to ±5 % per card: compare configurations on one card, not cards."
            )
        has_slo = any(record.work.requests_good is not None for it in self._configurations for record in it.used)
        of_engine = (*_LATENCIES.values(), THROUGHPUT, ENERGY, *(_GOODPUT if has_slo else ()))
        for metric in self._of_program[1:] or of_engine:
            notes += self._gaps(metric)
        self._doc.block()
        for note in notes:
            self._doc.text(note, "dim", lead="  ")

    def _interval_notes(self) -> Iterable[str]:
        shared: dict[str, list[Configuration]] = {}
        for item in self._configurations:
            if item.no_interval is not None:
                shared.setdefault(str(item.no_interval.data["why"]), []).append(item)
        for reason, items in shared.items():
            yield f"No interval{self._of(items, 'for')}: {reason}."
        others = (item.n_cycles for item in self._configurations if item.no_interval is None)
        sizes = sorted({n_cycles for n_cycles in others if n_cycles > 1})
        if sizes:
            yield (
                f"t interval: Student t on the logs of n cycles, around their geometric mean; it covers {_CONFIDENCE} "
                "at any n."
            )
            yield from coverage_notes(record.window for item in self._configurations for record in item.used)
            coverage = ", ".join(f"{bootstrap_coverage_label(size)} with {plural(size, 'cycle')}" for size in sizes)
            yield (
                "Bootstrap interval: percentiles of the resampled arithmetic mean; nominal coverage "
                f"{_CONFIDENCE}, true coverage {coverage}."
            )
        energies = [item.estimate(ENERGY).combined for item in self._configurations]
        if any(found.value for found in energies):
            yield COMBINED_NOTE
        if why := why_unknown(energies):
            yield f"Combined uncertainty of the energy not known: {'; '.join(why)}."
        if replayed := [item for item in self._configurations if item.is_replayed]:
            yield f"Traffic{self._of(replayed, 'of')}: {REPLAYED}."
        if later := ran_later(self._run):
            yield f"No verdict{self._of(later, 'on')}: {BLOCKS}."
        elif is_same_order(self._run):
            yield f"{SAME_ORDER.text.capitalize()}."
        if self._run.stopping is not None:
            yield f"Cycles were added {self._run.stopping.describe()}: {self._run.stopping.correction}."

    def _gaps(self, metric: Metric) -> Iterable[str]:
        """Why numbers are missing, one line per reason; configurations without a valid result are named elsewhere."""
        measurable = [item for item in self._configurations if item.n_cycles]
        by_reason: dict[str, list[Configuration]] = {}
        for item in measurable:
            estimate = item.estimate(metric)
            not_measured = "" if estimate.null_reason is None else f"not measured: {estimate.null_reason}"
            no_mean = estimate.t_log.warning if estimate.t_log is not None and estimate.value is None else None
            for reason in filter(None, (not_measured, estimate.warning, no_mean)):
                by_reason.setdefault(reason, []).append(item)
        for reason, members in by_reason.items():
            of = "" if len(members) == len(measurable) else self._of(members, "for")
            yield f"{metric.label}{of}: {reason.rstrip('.')}."

    def _warnings(self) -> None:
        self._doc.block()
        invalid = [(why, (item, n)) for item in self._configurations for why, n in item.invalid_reasons.items()]
        warnings = [(why, (item, n)) for item in self._configurations for why, n in item.warnings.items()]
        for lead, style, reasons in (("invalid: ", "red", invalid), ("warning: ", "yellow", warnings)):
            # Reasons that differ only in their numbers are one line, with the text of the first.
            for found in alike(reasons):
                members = list({item.name: item for _, (item, _) in found}.values())
                total = plural(sum(len(item.records) for item in members), "result")
                where = f"{sum(n for _, (_, n) in found)} of {total}{self._of(members, 'of')}"
                varied = "; numbers differ" if len({why for why, _ in found}) > 1 else ""
                self._doc.labelled(lead, f"{found[0][0]} ({where}{varied})", style)
        if left := sum(self._run.left.values()):
            remedy = f": {self._run.remedy}" if self._run.remedy else ""
            self._doc.labelled("left: ", f"{plural(left, 'experiment')} not measured yet{remedy}", "yellow")
        if named := [f"{item.number} {item.name}" for item in self._configurations if not item.n_cycles]:
            self._doc.labelled("no valid result: ", some_of(named, NAMES_SHOWN, "; "), "red")

    def _of(self, members: Sequence[Configuration], preposition: str) -> str:
        return "" if len(members) == len(self._configurations) else f" {preposition} {self._names(members)}"

    def _names(self, members: Sequence[Configuration]) -> str:
        numbers = some_of([str(item.number) for item in members], _NUMBERS_SHOWN)
        return f"configuration {numbers}" if len(members) == 1 else f"configurations {numbers}"


def _common_decimals(estimates: Sequence[Estimate]) -> int | None:
    values = [value for estimate in estimates for value in estimate.values if value > 0]
    if not values or max(values) > 30 * min(values):
        return None
    decimals = max(0, SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(min(values))))
    found = [item for estimate in estimates for item in (estimate.t_log, estimate.bootstrap)]
    intervals = [(item.ci_lower, item.ci_upper) for item in found if item and item.ci_lower != item.ci_upper]
    for _ in range(3):
        if any(_number(low, decimals) == _number(high, decimals) for low, high in intervals):
            decimals += 1
    return decimals


def _number(value: float | None, decimals: int | None) -> str:
    return ABSENT if value is None else with_decimals(value, decimals)


def _interval(lower: float | None, upper: float | None, decimals: int | None) -> str:
    is_known = lower is not None and upper is not None
    return f"{_number(lower, decimals)} – {_number(upper, decimals)}" if is_known else ABSENT


def _listed(parts: Iterable[str]) -> str:
    return " · ".join(printable(part) for part in parts if part)
