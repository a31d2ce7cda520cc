"""The table of a run, and one result in full."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lem.base import units
from lem.base.doc import NAMES_SHOWN, Column, Doc, columns, printable
from lem.base.log import WIDTH
from lem.base.measurement import ENERGY_COUNTED, Distribution
from lem.base.reasons import alike
from lem.base.units import ABSENT, SIGNIFICANT_DIGITS, plural, some_of, with_decimals
from lem.config.backends import ENERGY_SCORE_RULES
from lem.config.experiment import DATASET_ALIASES
from lem.record import Energy, Gpu, Record
from lem.results.axes import Key
from lem.results.bootstrap import bootstrap_coverage_label
from lem.results.metrics import LATENCIES, METRIC_BY_NAME, READABLE_LATENCIES
from lem.results.run import (
    ENERGY,
    REPLAYED,
    SHARED_LOAD,
    SINGLE_CYCLE,
    Configuration,
    Estimate,
    Run,
    coverage_notes,
    estimate_note,
)
from lem.results.stats import CONFIDENCE
from lem.results.trends import BLOCKS, SAME_ORDER, is_same_order, ran_later
from lem.results.uncertainty import COMBINED_NOTE, budget_table, why_unknown

_LATENCIES = (("TTFT", "ttft_p50_s"), ("e2e", "e2e_p50_s"))
_INTERVALS = (("Output throughput", "output_tok_per_s"), ("Energy per output token", "energy_per_output_tok_j"))
_GOODPUT = (("Goodput", "good_requests_per_s"), ("Energy per good request", "energy_per_good_request_j"))
_CONFIDENCE = f"{100 * CONFIDENCE:g} %"
_LABEL_WIDTH = 12
_NUMBERS_SHOWN = 12
_PERCENTILES = ("mean", "p50", "p90", "p95", "p99")


def render_run(run: Run, *, has_budget: bool = False, is_colour: bool = False, width: int = WIDTH) -> str:
    """The table as text that ends in a newline: throughput, energy, latency, counts, and what weakens the numbers.

    With `has_budget`, also what the uncertainty of each energy consists of.
    """
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

    def render(self, *, has_budget: bool) -> str:
        self._heading()
        self._estimates("output_tok_per_s", "Output throughput, tok/s")
        note = estimate_note(self._configurations)
        self._estimates("energy_per_output_tok_j", f"Energy per output token, J {note}".rstrip())
        if any(_is_of_energy_score(record) for item in self._configurations for record in item.records):
            self._estimates("energy_per_1000_requests_wh", f"Energy per 1,000 prompts, Wh {note}".rstrip())
        self._estimates("good_requests_per_s", "Goodput, good requests/s")
        self._estimates("energy_per_good_request_j", f"Energy per good request, J {note}".rstrip())
        self._outcomes()
        if has_budget:
            self._budgets()
        self._notes()
        self._warnings()
        self._doc.block()
        if self._run.is_single_cycle:
            self._doc.lines([SINGLE_CYCLE])
        return self._doc.render()

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

    def _estimates(self, metric: str, heading: str) -> None:
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
            combined = estimate.combined.value if estimate.combined else None
            shown = ABSENT if combined is None else combined.text
            rows.append((str(estimate.n), _number(estimate.value, decimals), *intervals, shown))
            if whole is not None:
                every.append(f"{item.number} {_number(whole.geometric_mean, decimals)} (n = {whole.n_cycles})")
        headings = ["n", "geom.\nmean", f"{_CONFIDENCE}\nt interval", "bootstrap\ninterval"]
        if any(estimate.combined and estimate.combined.value for estimate in estimates):
            headings.append("combined")
        cells = zip(*rows, strict=True)
        self._table([Column(text, tuple(column)) for text, column in zip(headings, cells, strict=False)], heading)
        if every:
            self._every.append(f"{heading}, over all attempts, invalid ones too: {some_of(every, NAMES_SHOWN)}.")

    def _table(self, columns: Sequence[Column], title: str) -> None:
        """Add a table, the first one with names and axes, others where there is room for them."""
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
        latencies = [
            Column(f"{label}\np50", tuple(units.format_latency(item.estimate(metric).value) for item in configurations))
            for label, metric in _LATENCIES
            if any(item.estimate(metric).values for item in configurations)
        ]
        counts = [
            Column("valid", tuple(str(len(item.records) - item.n_invalid) for item in configurations)),
            Column("invalid", tuple(str(item.n_invalid) for item in configurations)),
            Column("failed", tuple(str(item.n_failed) for item in configurations)),
        ]
        self._table([*latencies, *counts], "Latency, results" if latencies else "Results")

    def _notes(self) -> None:
        notes = [*self._interval_notes(), *self._every]
        if any(item.estimate(metric).values for item in self._configurations for _, metric in _LATENCIES):
            notes.append("Latency: median over the requests of a cycle, geometric mean over the cycles.")
        if any(item.is_by_board_sensors for item in self._configurations):
            notes.append(
                "Energy: board sensors are off by up to ±5 % per card: compare configurations on one card, not cards."
            )
        has_slo = any(record.work.requests_good is not None for it in self._configurations for record in it.used)
        for label, metric in (*_LATENCIES, *_INTERVALS, *(_GOODPUT if has_slo else ())):
            notes += self._gaps(label, metric)
        self._doc.block()
        for note in notes:
            self._doc.text(note, "dim", lead="  ")

    def _interval_notes(self) -> Iterable[str]:
        shared = [item for item in self._configurations if item.is_load_shared]
        if shared:
            yield f"No interval{self._of(shared, 'for')}: {SHARED_LOAD}."
        others = (item.n_cycles for item in self._configurations if not item.is_load_shared)
        sizes = sorted({n_cycles for n_cycles in others if n_cycles > 1})
        if sizes:
            yield (
                f"t interval: Student t on the logs of n cycles, around their geometric mean; it covers {_CONFIDENCE} "
                "at any n."
            )
            yield from coverage_notes(self._configurations)
            coverage = ", ".join(f"{bootstrap_coverage_label(size)} with {plural(size, 'cycle')}" for size in sizes)
            yield (
                "Bootstrap interval: percentiles of the resampled arithmetic mean; nominal coverage "
                f"{_CONFIDENCE}, true coverage {coverage}."
            )
        energies = [item.estimate(ENERGY).combined for item in self._configurations]
        if any(found and found.value for found in energies):
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

    def _gaps(self, label: str, metric: str) -> Iterable[str]:
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
            yield f"{label}{of}: {reason.rstrip('.')}."

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
        empty = [item for item in self._configurations if not item.n_cycles]
        if empty:
            named = [f"{item.number} {item.name}" for item in empty]
            self._doc.labelled("no valid result: ", some_of(named, NAMES_SHOWN, "; "), "red")

    def _of(self, members: Sequence[Configuration], preposition: str) -> str:
        return "" if len(members) == len(self._configurations) else f" {preposition} {self._names(members)}"

    def _names(self, members: Sequence[Configuration]) -> str:
        numbers = some_of([str(item.number) for item in members], _NUMBERS_SHOWN)
        return f"configuration {numbers}" if len(members) == 1 else f"configurations {numbers}"


def _common_decimals(estimates: Sequence[Estimate]) -> int | None:
    """The decimals of all numbers of a table, so that intervals show; None if each number needs its own."""
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


def render_record(record: Record, *, is_colour: bool = False, width: int = WIDTH) -> str:
    """The result as text that ends in a newline; all of it is in its JSON."""
    identity = record.identity
    doc = Doc(width, is_colour=is_colour)
    doc.text(f"{identity.config_name} · cycle {identity.cycle_index + 1} · attempt {identity.attempt}", "bold")
    doc.text(f"{identity.campaign_name} · run {identity.run_id} · {identity.host} · {identity.start_utc}", "dim")
    doc.block()
    for label, text in _facts(record):
        doc.text(text, lead=label.ljust(_LABEL_WIDTH))
    doc.block()
    _add_latency(doc, record)
    doc.block()
    for reason in record.validity.warnings:
        doc.labelled("warning: ", reason.text, "yellow")
    return doc.render()


def _facts(record: Record) -> Iterable[tuple[str, str]]:
    validity, window, work, environment = record.validity, record.window, record.work, record.environment
    yield "valid", "yes" if validity.valid else "no: " + "; ".join(map(str, validity.invalid_reasons))
    yield "model", f"{record.identity.model} on {record.identity.backend}"
    yield "engine", f"{environment.engine_name} {environment.engine_version} on {environment.device}"
    if validity.engine_reused:
        yield "load", f"none, engine reused: {validity.engine_load_id}"
    else:
        took = _measured(window, "load_s", units.format_duration)
        compiled = "" if window.compile_s is None else f", compiled in {units.format_duration(window.compile_s)}"
        yield "load", f"{took}{compiled}, fresh engine: {validity.engine_load_id}"
    converged = {True: ", converged", False: ", not converged", None: ""}[validity.warmup_converged]
    took = _measured(window, "warmup_s", units.format_duration)
    yield "warm-up", f"{took}, {window.warmup_prompts} prompts{converged}"
    n = window.window_repeats
    repeats = {0: "not every prompt once", 1: "all prompts once"}.get(n, f"all prompts {n} times")
    mode, steady = window.traffic_mode.replace("_", " "), ", not steady" if validity.steady is False else ""
    yield "window", f"{units.format_duration(window.window_s)}, {mode}, {repeats}{steady}"
    if window.in_flight_mean is not None and window.fill_drain_ratio is not None:
        thin = f"under 90 % of the peak for {units.percent(window.fill_drain_ratio)} of the window"
        yield "in flight", f"{window.in_flight_mean:.3g} requests on average, {window.in_flight_peak} at most; {thin}"
    good = "" if work.requests_good is None else f", {work.requests_good} good"
    requests = f"{work.requests_ok} requests{good}, {work.requests_failed} failed"
    yield "work", f"{requests}; {work.input_tok} tokens in, {work.output_tok} out ({work.token_source})"
    yield "throughput", _throughput(record)
    yield "energy", _energy(record)
    if (energy_j := record.energy.primary_j.value) is not None:
        yield "uncertainty", _uncertainty(record.energy, energy_j, "energy_uncertainty_j", "uncertainty_budget_j")
    if (net_j := record.energy.gpu_energy_net_j) is not None:
        spread = _uncertainty(record.energy, net_j, "net_uncertainty_j", "net_uncertainty_budget_j")
        yield "net of idle", f"{units.format_energy(net_j)}, {spread}"
    elif (why := record.energy.why_none("gpu_energy_net_j")).code == "net_shifted":
        yield "net of idle", f"not measured: {why}"
    disturbed = record.interference
    if disturbed.wait_ratio is not None and disturbed.foreign_ratio is not None:
        waited, others = units.percent(disturbed.wait_ratio), units.percent(disturbed.foreign_ratio)
        yield "CPU", f"waited for {waited} of its time; other programs were {others} of the load"
    if (carbon := _carbon(record)) is not None:
        yield "carbon", carbon
    yield "memory", _measured(record.compute, "peak_memory_b", units.format_bytes)
    yield "machine", _disclosed(MACHINE_SETTINGS + MACHINE_STATE, record)
    for gpu in record.gpus:
        yield "GPU", f"{gpu.name} {gpu.uuid}: {_disclosed(GPU_SETTINGS, gpu)}"


# What can change the numbers and is not what was asked for, as found before the experiment: the section of the record,
# the field, and what it is called.
MACHINE_SETTINGS = (
    ("environment", "governor", "governor"),
    ("machine", "turbo", "turbo"),
    ("machine", "smt", "SMT"),
    ("machine", "numa_nodes", "NUMA nodes"),
)
MACHINE_STATE = (("machine", "load_1min", "load before"), ("machine", "ambient_temp_c", "ambient temperature"))
GPU_SETTINGS = (
    ("gpus", "power_limit_w", "power limit"),
    ("gpus", "power_limit_default_w", "default power limit"),
    ("gpus", "sm_clock_max_hz", "highest SM clock"),
    ("gpus", "sm_clock_app_hz", "application SM clock"),
    ("gpus", "clocks_set", "clock limit by a setting"),
    ("gpus", "persistence_mode", "persistence mode"),
    ("gpus", "ecc_mode", "ECC"),
    ("gpus", "pcie_gen", "PCIe generation"),
    ("gpus", "pcie_width", "PCIe lanes"),
    ("gpus", "pcie_width_max", "PCIe lanes at most"),
    ("gpus", "nvlinks", "NVLinks"),
    ("gpus", "numa_node", "NUMA node"),
)


def setting_text(name: str, value: Any) -> str:
    """A value of these, by the unit in its name."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if name.endswith("_hz"):
        return f"{value / 1e6:.0f} MHz"
    return units.format_power(value) if name.endswith("_w") else f"{value:g} °C" if name.endswith("_c") else str(value)


def _disclosed(settings: Iterable[tuple[str, str, str]], owner: Record | Gpu) -> str:
    """`turbo off, SMT on; not known: governor (the kernel exposes none)`."""
    seen: list[str] = []
    unknown: dict[str, list[str]] = {}
    for section, name, label in settings:
        found = (owner if isinstance(owner, Gpu) else getattr(owner, section)).measured(name)
        if found.value is None:
            unknown.setdefault(str(found.null_reason), []).append(label)
        else:
            seen.append(f"{label} {setting_text(name, found.value)}")
    parts = [", ".join(seen)] if seen else []
    return "; ".join([*parts, *(f"not known: {', '.join(labels)} ({why})" for why, labels in unknown.items())])


def _is_of_energy_score(record: Record) -> bool:
    """Whether it has the prompts or follows the rules of AI Energy Score, whose unit is Wh per 1,000 prompts."""
    rules, asked = ENERGY_SCORE_RULES, record.requested
    is_by_rules = all(asked.get(name) == value for name, value in rules.items())
    return is_by_rules or record.work.prompt_source.get("hub_name") == DATASET_ALIASES["ai_energy_score"].path


def _throughput(record: Record) -> str:
    throughput = record.throughput
    output = f"output {_measured(throughput, 'output_tok_per_s', units.format_rate)}"
    if throughput.total_tok_per_s is None or throughput.requests_per_s is None:
        return output
    requests = units.format_quantity(throughput.requests_per_s, "requests/s")
    parts = [output, f"with input {units.format_rate(throughput.total_tok_per_s)}", requests]
    if throughput.good_requests_per_s is not None:
        parts.append(f"goodput {units.format_quantity(throughput.good_requests_per_s, 'requests/s')}")
    if throughput.draft_accepted_ratio is not None and throughput.tok_per_step is not None:
        accepted = units.percent(throughput.draft_accepted_ratio)
        parts.append(f"{throughput.tok_per_step:.3g} tokens per step, {accepted} of drafts accepted")
    return ", ".join(parts)


def _energy(record: Record) -> str:
    energy_j, per_tok = record.energy.primary_j, record.efficiency.energy_per_output_tok_j
    if energy_j.value is None:
        return f"not measured: {energy_j.null_reason}"
    parts = [units.format_energy(energy_j.value) + (" (an estimate)" if energy_j.is_estimate else "")]
    parts += [f"{per_tok:.4g} J per output token"] if per_tok is not None else []
    per_thousand_wh, _ = METRIC_BY_NAME["energy_per_1000_requests_wh"].read(record)
    if per_thousand_wh is not None and _is_of_energy_score(record):
        parts.append(f"{per_thousand_wh:.4g} Wh per 1,000 prompts")
    per_good = record.efficiency.energy_per_good_request_j
    parts += [f"{per_good:.4g} J per good request"] if per_good is not None else []
    return ", ".join([*parts, f"by {energy_j.source}"])


def _carbon(record: Record) -> str | None:
    """Emissions and cost with what they contain; None where the user gave no figures for them."""
    carbon = record.carbon
    parts = [] if carbon.co2e_g is None else [f"{units.format_quantity(carbon.co2e_g, 'g')} CO₂e"]
    parts += [] if carbon.cost is None else [f"cost {units.format_quantity(carbon.cost)}"]
    basis = ENERGY_COUNTED.get(record.energy.energy_scope or "", "energy")
    return f"{', '.join(parts)}: {basis} × PUE {carbon.pue:g}" if parts else None


def _uncertainty(energy: Energy, whole_j: float, name: str, budget_name: str) -> str:
    """`±3.1 % (k = 1): sensor 2.9 %, lag 1 %`, the largest cause first."""
    total_j, budget = getattr(energy, name), getattr(energy, budget_name)
    if total_j is None or not budget or not whole_j:
        return f"uncertainty not known: {energy.why_none(name)}"
    parts = sorted(((part_j / abs(whole_j), cause) for cause, part_j in budget.items()), reverse=True)
    causes = ", ".join(f"{cause.replace('_', ' ')} {units.percent(share)}" for share, cause in parts)
    return f"±{units.percent(total_j / abs(whole_j))} (k = 1): {causes}"


def _add_latency(doc: Doc, record: Record) -> None:
    latency = record.latency
    kinds = {name: getattr(latency, f"{name}_s") for name in (READABLE_LATENCIES if latency.itl_s else LATENCIES)}
    seen: dict[str, Distribution] = {name: value for name, value in kinds.items() if value is not None}
    if seen:
        found = seen.values()
        table = [Column(name, tuple(units.format_latency(getattr(it, name)) for it in found)) for name in _PERCENTILES]
        table.append(Column("n", tuple(str(value.n) for value in found)))
        doc.lines(columns("latency", list(seen), table, doc.width))
    by_reason: dict[str, list[str]] = {}
    for name, value in kinds.items():
        if value is None:
            by_reason.setdefault(latency.why_none(f"{name}_s").text, []).append(name)
    for reason, names in by_reason.items():
        doc.text(f"{', '.join(names)}: not measured: {reason}")


def _measured(section: Any, name: str, form: Callable[[float], str]) -> str:
    value = getattr(section, name)
    return form(value) if value is not None else f"not measured: {section.null_reasons.get(name)}"
