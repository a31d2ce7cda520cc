"""The tables of the report: validity, results, environment, and how each number was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from lem.base.measurement import EnergySource, is_estimate
from lem.base.reasons import Reason, alike
from lem.base.units import format_bytes, format_duration, format_latency, format_power, plural, some_of
from lem.record import Gpu, Record
from lem.results.bootstrap import bootstrap_coverage_label
from lem.results.report import plot
from lem.results.report.content import Entry, Report, verdict_of
from lem.results.report.figures import mean_of
from lem.results.report.plot import Cell, Markup, Row, details, join, paragraphs, scroller, table, tag
from lem.results.run import ENERGY
from lem.results.store import UNACCOUNTED

# --- how many results can be used, and what weakens them

_SHOWN = 8
_PROBLEMS_SHOWN = 200
# Findings that the verdict, the invalid results and the plots show as well.
_SHOWN_ELSEWHERE = frozenset({"damaged", "indistinguishable", "unequal_exclusions", "invalid"})
_KINDS = ("missing", "half-written", "corrupt", "foreign", "unreadable")
_AFTER_A_COUNT = {"missing": "without a result"}  # where it is not the kind itself


def validity_section(report: Report) -> Markup:
    items = [*_findings(report)]
    shown = [tag("p", "lem found nothing that weakens these numbers.")]
    if items:
        shown = [tag("ul", *items[:_SHOWN], class_="findings")]
    if more := items[_SHOWN:]:
        shown.append(details(f"{len(more)} more", tag("ul", *more, class_="findings")))
    return join([_tiles(report), *shown, _problems(report)])


def _n_damaged(report: Report) -> int:
    return sum(problem.kind != "missing" for problem in report.run.problems)


def _tiles(report: Report) -> Markup:
    configurations = [entry.configuration for entry in report.entries]
    results, invalid = sum(len(item.records) for item in configurations), sum(item.n_invalid for item in configurations)
    tiles = (
        (f"{results - invalid} of {results}", "results valid", invalid),
        (str(invalid), "invalid", invalid),
        (str(failed := sum(item.n_failed for item in configurations)), "experiments failed", failed),
        (str(damaged := _n_damaged(report)), "files left out", damaged),
    )
    items = (tag("li", tag("b", value), label, class_="bad" if bad else "good") for value, label, bad in tiles)
    return tag("ul", *items, class_="tiles")


def _findings(report: Report) -> Iterator[Markup]:
    """Why results are invalid, then the findings of `lem check`, each with its remedy."""
    found = ((why, (entry, n)) for entry in report.entries for why, n in entry.configuration.invalid_reasons.items())
    for same in alike(found):
        text = same[0][0].text + ("; numbers differ" if len({reason for reason, _ in same}) > 1 else "")
        members = list({entry.number: entry for _, (entry, _) in same}.values())
        count, total = sum(n for _, (_, n) in same), sum(len(entry.configuration.records) for entry in members)
        yield _finding("bad", "invalid", f"{text} ({count} of {plural(total, 'result')}: {_members(members, report)})")
    for item in report.findings:
        if item.kind == "damaged":
            text = f"{plural(_n_damaged(report), 'result')} cannot be used and were left out; they are listed below"
            yield _finding("bad", "damaged", text, item.remedy)
    by_name = {entry.configuration.name: entry for entry in report.entries}
    for item in report.findings:
        if item.kind not in _SHOWN_ELSEWHERE:
            entries = (by_name[name] for name in item.configurations if name in by_name)
            members = sorted(entries, key=lambda entry: entry.number)
            concerned = f" ({_members(members, report)})" if members and len(report.entries) > 1 else ""
            kind, label = "bad" if item.is_weak else "warn", item.kind.replace("_", " ")
            yield _finding(kind, label, f"{item.text}{concerned}", item.remedy)
    if not report.has_energy and report.entries:
        reasons = dict.fromkeys(entry.configuration.estimate(ENERGY).null_reason or "" for entry in report.entries)
        why = "; ".join(filter(None, reasons)) or "no reason given"
        yield _finding("warn", "no energy", f"not measured: {why}. This page shows throughput instead.")


def _finding(kind: str, label: str, text: str, remedy: str = "") -> Markup:
    what_to_do = [tag("div", f"→ {remedy}", class_="remedy")] if remedy else []
    return tag("li", tag("span", label, class_=f"tag {kind}"), text, *what_to_do)


def _members(members: Sequence[Entry], report: Report) -> str:
    if len(members) == len(report.entries):
        return "all configurations" if len(members) > 1 else "the only configuration"
    return some_of([f"{entry.number} {entry.label}" for entry in members], 4)


def _problems(report: Report) -> Markup:
    """What was left out, by name: a page that is silent about damage looks complete."""
    problems = report.run.problems
    if not problems:
        return Markup()
    kinds = [problem.kind for problem in problems]
    found = ((kinds.count(kind), _AFTER_A_COUNT.get(kind, kind)) for kind in _KINDS)
    counts = ", ".join(f"{count} {words}" for count, words in found if count)
    rows = [[it.kind, "/".join(PurePath(it.path).parts[-4:]), it.message] for it in problems[:_PROBLEMS_SHOWN]]
    content = table("Attempts that were left out", ["Kind", "File", "Problem"], rows, row_head=None)
    left = len(problems) - len(rows)
    more = tag("p", f"And {left} more: `lem results list --json` lists all of them.") if left else Markup()
    label = f"Left out: {plural(len(problems), 'attempt')} ({counts})"
    is_open = _n_damaged(report) > 0 and len(rows) <= _SHOWN
    return details(label, scroller("Attempts that were left out", content), more, is_open=is_open)


# --- the verdict, and the table it is based on

# A longer table scrolls in a box of its own, so that the plots stay in reach.
_TALL_FROM = 40


def results_section(report: Report) -> Markup:
    """The answer in a sentence, how far it goes, and the table of all configurations with what its numbers mean."""
    verdict = verdict_of(report)
    answer = tag("div", tag("p", verdict.sentence, class_="verdict"), *paragraphs(verdict.remarks))
    content = _overview(report, has_winner=verdict.has_winner)
    class_ = "scroll tall" if len(report.entries) > _TALL_FROM else "scroll"
    overview = scroller("Table of all configurations", content, class_)
    return join([answer, overview, *paragraphs(_explanations(report)), _more_figures(report)])


def _overview(report: Report, *, has_winner: bool) -> Markup:
    decimals = {metric: plot.decimals_of(entry.centre(metric) for entry in report.entries) for metric in report.metrics}
    latencies = [
        (label, name)
        for label, name in (("TTFT p50", "ttft_p50_s"), ("End-to-end p50", "e2e_p50_s"))
        if any(entry.configuration.estimate(name).values for entry in report.entries)
    ]
    head = ["No.", "Configuration"]
    for metric in report.metrics:
        note = report.estimate_note if metric is ENERGY else ""
        head += [f"{metric.label}, {metric.unit}{note}", "95 % intervals"]
    head += [*(label for label, _ in latencies), "Cycles"]
    rows: list[Row] = []
    for entry in report.entries:
        row: list[Cell | str | int] = [entry.number, Cell(_name(entry))]
        for metric, digits in decimals.items():
            is_estimated = entry.is_estimate and metric is ENERGY
            row += plot.interval_cells(entry.configuration.estimate(metric), digits, is_estimate=is_estimated)
        for _, name in latencies:
            estimate = entry.configuration.estimate(name)
            row.append(plot.number_cell(estimate.value, estimate.null_reason, format_latency))
        rows.append([*row, entry.configuration.n_cycles])
    caption = f"Every configuration of {report.run.campaign_name}, sortable by each column"
    sorted_by = (2, "ascending" if report.has_energy else "descending")
    return table(caption, head, rows, row_head=1, sorted_by=sorted_by, best=0 if has_winner else None)


def _name(entry: Entry) -> Markup:
    configuration = entry.configuration
    badges = [
        (configuration.n_failed, f"{configuration.n_failed} failed", "bad"),
        (configuration.n_invalid, f"{configuration.n_invalid} invalid", "bad"),
        (configuration.is_load_shared, "shared load", "bad"),
        (any(record.validity.steady is False for record in entry.used), "not steady", "warn"),
        (len(configuration.warnings), plural(len(configuration.warnings), "warning"), "warn"),
    ]
    shown = [tag("span", text, class_=f"tag {kind}") for is_there, text, kind in badges if is_there]
    swatch = tag("i", class_=f"dot g{entry.group}")
    return join([swatch, plot.breakable(entry.name), tag("div", *shown) if shown else Markup()])


def _explanations(report: Report) -> Iterator[str]:
    if report.run.stopping is not None:
        yield f"Cycles were added {report.run.stopping.describe()}: {UNACCOUNTED}."
    sizes = sorted({entry.configuration.n_cycles for entry in report.entries if entry.span(report.headline)})
    if not sizes:
        return
    labels = ((size, bootstrap_coverage_label(size)) for size in sizes)
    covers = ", ".join(f"{label} with {plural(size, 'cycle')}" for size, label in labels if label)
    yield (
        "Means are geometric means over the cycles of a configuration. The t interval is Student's t on log values and "
        "covers 95 % at any number of cycles. The bootstrap interval is for the arithmetic mean, nominally 95 %"
        + (f"; its actual coverage is {covers}." if covers else ".")
    )
    estimates = (entry.configuration.estimate(metric) for entry in report.entries for metric in report.metrics)
    if any(estimate.all_attempts for estimate in estimates):
        yield "“All attempts” is the mean including invalid results; it is shown where it differs and never used."


@dataclass(frozen=True)
class _Figure:
    heading: str
    read: Callable[[Record], float | None]
    why: Callable[[Record], Reason | None] = lambda _: None  # it is absent
    is_energy: bool = False  # or follows from it


def _net_per_token(record: Record) -> float | None:
    net, tokens = record.energy.gpu_energy_net_j, record.work.output_tok
    return None if net is None or not tokens else net / tokens


def _of_gpus(record: Record, read: Callable[[Gpu], float | None], fold: Callable[[list[float]], float]) -> float | None:
    values = [value for gpu in record.gpus if (value := read(gpu)) is not None]
    return fold(values) if values and len(values) == len(record.gpus) else None


def _field(heading: str, section: str, name: str, *, is_energy: bool = False) -> _Figure:
    def part(record: Record) -> Any:
        return getattr(record, section)

    return _Figure(heading, lambda r: getattr(part(r), name), lambda r: part(r).null_reasons.get(name), is_energy)


_FIGURES = (
    _Figure(
        "Net energy per output token, J", _net_per_token, lambda r: r.energy.null_reasons.get("gpu_energy_net_j"), True
    ),
    _field("Energy per request, J", "efficiency", "energy_per_request_j", is_energy=True),
    _field("Energy per good request, J", "efficiency", "energy_per_good_request_j", is_energy=True),
    _field("Goodput, good requests/s", "throughput", "good_requests_per_s"),
    _field("Tokens per step", "throughput", "tok_per_step"),
    _field("Drafts accepted, ratio", "throughput", "draft_accepted_ratio"),
    _field("Requests in flight, mean", "window", "in_flight_mean"),
    _field("Filling or draining, ratio", "window", "fill_drain_ratio"),
    _Figure("Prefill, J", lambda r: r.energy.prefill_energy_j, is_energy=True),
    _Figure("Decode, J", lambda r: r.energy.decode_energy_j, is_energy=True),
    _Figure("CPU packages, J", lambda r: r.energy.cpu_package_energy_j, is_energy=True),
    _Figure("GPU power, mean, W", lambda r: _of_gpus(r, lambda gpu: gpu.power_mean_w, math.fsum)),
    _Figure("GPU temperature, maximum, °C", lambda r: _of_gpus(r, lambda gpu: gpu.temp_max_c, max)),
    _field("Engine load, s", "window", "load_s"),
    _Figure("CO₂e, g", lambda r: r.carbon.co2e_g, is_energy=True),
    _Figure("Cost", lambda r: r.carbon.cost, is_energy=True),
)


def _more_figures(report: Report) -> Markup:
    used = [record for entry in report.entries for record in entry.used]
    figures = [figure for figure in _FIGURES if any(figure.read(record) is not None for record in used)]
    if not figures:
        return Markup()
    rows: list[Row] = []
    for entry in report.entries:
        row: list[Cell | str | int] = [entry.number, entry.label]
        for figure in figures:
            values = [value for record in entry.used if (value := figure.read(record)) is not None]
            reason = next(filter(None, map(figure.why, entry.used)), None)
            row.append(plot.number_cell(mean_of(values) if values else None, reason))
        rows.append(row)
    heads = (item.heading + (report.estimate_note if item.is_energy else "") for item in figures)
    label = "More figures of every configuration"
    return details(label, scroller(label, table(label, ["No.", "Configuration", *heads], rows, row_head=1)))


# --- where and with what it was measured

_VALUES_SHOWN = 6


def environment_section(report: Report) -> Markup:
    if not report.records:
        return tag("p", "There is no complete result, so nothing is known about the environment.", class_="absent")
    shared, differing = [], []
    for label, read in _FACTS.items():
        found: dict[str, list[Record]] = {}
        for record in report.records:
            found.setdefault(read(record), []).append(record)
        if len(found) == 1:
            shared += [[label, value] for value in found if value]
        else:
            ranked = sorted(found.items(), key=lambda pair: (-len(pair[1]), pair[0]))
            if others := ranked[_VALUES_SHOWN:]:
                rest = [record for _, members in others for record in members]
                ranked[_VALUES_SHOWN:] = [(f"{len(others)} other values", rest)]
            differing += [[label, value or "not given", _results_of(them, report)] for value, them in ranked]
    same = table("What all results share", ["Property", "Value"], shared)
    parts = [tag("h3", "Same for every result"), scroller("Shared environment", same)]
    if differing:
        content = table("What differs between results", ["Property", "Value", "Results"], differing)
        parts += [
            tag("h3", "Differs between results"),
            tag("p", "Results are comparable only if these are the differences you intended."),
            scroller("Differing environment", content),
        ]
    return join([*parts, _options_changed(report.records)])


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _fact(name: str) -> Callable[[Record], str]:
    """A field of the environment, or why it is not known."""

    def read(record: Record) -> str:
        value: Any = getattr(record.environment, name)
        if value is None:
            return f"not known: {record.environment.null_reasons.get(name) or 'no reason given'}"
        if value == ():
            return "none seen"
        return _listed(value) if isinstance(value, tuple) else str(value)

    return read


def _prompts(record: Record) -> str:
    parts = ((key, record.work.prompt_source.get(key)) for key in ("kind", "name", "count", "sha256"))
    return ", ".join(f"{key} {value}" for key, value in parts if value is not None)


_FACTS: Mapping[str, Callable[[Record], str]] = {
    "Host": lambda record: record.identity.host,
    "Run": lambda record: record.identity.run_id,
    "GPU": lambda record: _listed(gpu.name for gpu in record.gpus),
    "GPU UUID": lambda record: _listed(record.environment.gpu_uuids),
    "GPU power limit": lambda record: _listed(
        format_power(gpu.power_limit_w) for gpu in record.gpus if gpu.power_limit_w is not None
    ),
    "Persistence mode": lambda record: _listed(
        "on" if gpu.persistence_mode else "off" for gpu in record.gpus if gpu.persistence_mode is not None
    ),
    "VBIOS": _fact("vbios"),
    "Other processes on the GPU": _fact("other_gpu_processes"),
    "Device": _fact("device"),
    "CPU": lambda record: f"{record.environment.cpu}, {plural(record.environment.cpu_count, 'logical processor')}",
    "Memory": lambda record: format_bytes(record.environment.memory_b),
    "Governor": _fact("governor"),
    "Operating system": lambda record: f"{record.environment.os}, kernel {record.environment.kernel}",
    "Executor": _fact("executor"),
    "Image": _fact("image"),
    "Engine": lambda record: f"{record.environment.engine_name} {record.environment.engine_version}",
    "Versions": lambda record: _listed(f"{name} {version}" for name, version in record.environment.versions.items()),
    "lem": lambda record: record.identity.lem_version,
    "Model": lambda record: record.identity.model,
    "Model revision": _fact("model_revision"),
    "Weights SHA-256": _fact("weights_sha256"),
    "Prompts": _prompts,
}


def _results_of(members: Sequence[Record], report: Report) -> str:
    names = {record.identity.config_name for record in members}
    numbers = [str(entry.number) for entry in report.entries if entry.configuration.name in names]
    noun = "configuration" if len(numbers) == 1 else "configurations"
    return f"{plural(len(members), 'result')} of {noun} {some_of(numbers, 8)}"


def _options_changed(records: Sequence[Record]) -> Markup:
    found: dict[tuple[str, ...], int] = {}
    for record in records:
        for option, pair in record.environment.engine_differs.items():
            both = pair if isinstance(pair, list) and len(pair) == 2 else (pair, "")
            key = (option, *(json.dumps(value, ensure_ascii=False) for value in both))
            found[key] = found.get(key, 0) + 1
    if not found:
        return Markup()
    name = "Options changed by the engine"
    rows = [[*key, str(count)] for key, count in found.items()]
    content = table(name, ["Option", "Requested", "In effect", "Results"], rows)
    return details(f"Options changed by the engine: {len(found)}", scroller(name, content))


# --- how each number was measured, and how far it can be trusted

_SOURCES: Mapping[str, str] = {
    EnergySource.COUNTER: "the GPU's energy counter (NVML), read when it changes inside the window",
    EnergySource.INSTANT_POWER: "instantaneous GPU power (NVML field 186), integrated over the window",
    EnergySource.AVERAGE_POWER: "averaged GPU power (NVML), integrated over the window",
    EnergySource.RAPL: "the CPU packages' energy counters (RAPL)",
    EnergySource.TDP_ESTIMATE: "an estimate: design power (TDP) of the CPU times its load, not a measurement",
    EnergySource.EXTERNAL: "an external meter, aligned by its clock",
}
_TOKEN_SOURCES = {"engine_ids": "counted from token ids", "retokenized": "counted by tokenizing the text again"}


def methods_section(report: Report) -> Markup:
    used = [record for entry in report.entries for record in entry.used]
    name = "How each number was measured"
    content = table(name, ["Number", "How", "Remarks"], [*_energy_methods(used), *_other_methods(used)])
    return join([scroller(name, content), *paragraphs(_cautions(report))])


def _energy_methods(used: Sequence[Record]) -> Iterator[Row]:
    for source in dict.fromkeys(record.energy.primary_j.source for record in used):
        own = [record for record in used if record.energy.primary_j.source == source]
        if source is None:
            reasons = _listed(str(record.energy.primary_j.null_reason) for record in own)
            yield ["Energy", plot.NOT_MEASURED, f"{reasons} ({plural(len(own), 'result')})"]
        else:
            kind = "Energy, estimated" if is_estimate(source) else "Energy"
            yield [kind, _SOURCES.get(source, source), "; ".join(_energy_remarks(own))]
    net = [record for record in used if record.energy.gpu_energy_net_j is not None]
    if net:
        idle = _range((record.idle.idle_loaded_power_w for record in net), format_power)
        how = "gross minus the idle power with the engine loaded, over the same time"
        yield ["Net energy", how, f"idle power {idle}"]
    else:
        reasons = _listed(str(record.energy.null_reasons.get("gpu_energy_net_j", "")) for record in used)
        yield ["Net energy", plot.NOT_MEASURED, reasons]


def _energy_remarks(records: Sequence[Record]) -> Iterator[str]:
    scope = _listed(record.energy.primary_j.scope or "unknown" for record in records)
    yield f"{plural(len(records), 'result')}, scope {scope}"
    periods = [record.energy.counter_update_period_s for record in records]
    ratios = [record.energy.energy_crosscheck_ratio for record in records]
    holes = [hole for record in records if (hole := record.energy.sample_gap_max_s) is not None]
    if any(period is not None for period in periods):
        yield f"counter updated every {_range(periods, format_latency)}"
    if any(ratio is not None for ratio in ratios):
        yield f"integrated power divided by the counter: {_range(ratios, '{:.3f}'.format)}"
    if holes:
        yield f"longest pause between samples {format_latency(max(holes))}"


def _other_methods(used: Sequence[Record]) -> Iterator[Row]:
    tokens = _listed(_TOKEN_SOURCES.get(record.work.token_source, record.work.token_source) for record in used)
    yield ["Throughput", "output tokens of the window divided by its length, from the engine's token ids", tokens]
    tpot = "TPOT = (end-to-end latency minus TTFT) / (output tokens minus 1)"
    yield ["Latency", f"timestamped when the engine returns tokens; {tpot}", ""]
    windows = [record.window for record in used]
    modes = _listed(window.traffic_mode.replace("_", " ") for window in windows)
    repeats = _range((float(window.window_repeats) for window in windows), "{:.0f}".format)
    lengths = _range((window.window_s for window in windows), format_duration)
    yield ["Window", f"{modes}, {lengths}", f"prompt set run {repeats} {'time' if repeats == '1' else 'times'}"]
    unsettled = sum(record.validity.warmup_converged is False for record in used)
    remark = f"did not converge in {plural(unsettled, 'result')}" if unsettled else ""
    yield ["Warm-up", _range((window.warmup_s for window in windows), format_duration), remark]
    reused = sum(record.validity.engine_reused for record in used)
    remark = f"{plural(reused, 'result')} with an engine that was already loaded" if reused else ""
    yield ["Engine load", _range((window.load_s for window in windows), format_duration), remark]


def _range(values: Iterable[float | None], form: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return plot.NOT_MEASURED
    low, high = form(min(known)), form(max(known))
    return low if low == high else f"{low} to {high}"


def _cautions(report: Report) -> Iterator[str]:
    if report.has_energy and any(entry.configuration.is_by_board_sensors for entry in report.entries):
        yield (
            "What ±5 % between cards means: the power sensor of each board reads up to 5 % too high or too low, always "
            "in the same direction. Configurations measured on one card share its error, so their ratios are fair. Two "
            "cards may differ by 10 % on the same work without a real difference: absolute joules and comparisons "
            "between cards have this error in addition to the intervals, which only show how much repeats vary."
        )
    if any(entry.is_estimate for entry in report.entries):
        yield "Estimated energy is not a measurement: it follows the load of the CPU, not the power that it drew."
    yield (
        "Energy is gross: it includes the idle power; the records also contain the net energy. “Not measured” means "
        "that the value is unknown for the reason given; zero is shown only if zero was observed."
    )
