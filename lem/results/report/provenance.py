"""The tables of the report that say where, with what and how it was measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

from lem.base.measurement import EnergySource, Section, is_estimate
from lem.base.units import format_bytes, format_duration, format_latency, format_power, plural, some_of
from lem.record import Record
from lem.results.detail import GPU_SETTINGS, MACHINE_SETTINGS, MACHINE_STATE, setting_text
from lem.results.report import plot
from lem.results.report.content import Report
from lem.results.report.plot import Markup, Row, details, join, paragraphs, scroller, table, tag

_VALUES_SHOWN = 6


def environment_section(report: Report) -> Markup:
    if not report.records:
        return tag("p", "There is no complete result, so nothing is known about the environment.", class_="absent")
    shared, differing = [], []
    groups = _alike(report.records)
    for label, read in _FACTS.items():
        found: dict[str, list[Record]] = {}
        for group in groups:
            found.setdefault(read(group[0]), []).extend(group)
        if len(found) == 1:
            shared += [[label, value] for value in found if value]
        else:
            ranked = sorted(found.items(), key=lambda pair: (-len(pair[1]), pair[0]))
            if others := ranked[_VALUES_SHOWN:]:
                rest = [record for _, members in others for record in members]
                ranked[_VALUES_SHOWN:] = [(f"{len(others)} other values", rest)]
            differing += [[label, value or "not given", _results_of(them, report)] for value, them in ranked]
    shared += [[_capital(label), _machine_range(name, groups)] for _, name, label in MACHINE_STATE]
    same = table("What all results share", ["Property", "Value"], shared)
    parts = [tag("h3", "Same for every result"), scroller("Shared environment", same)]
    if differing:
        content = table("What differs between results", ["Property", "Value", "Results"], differing)
        parts += [
            tag("h3", "Differs between results"),
            tag("p", "Results are comparable only if these are the differences you intended."),
            scroller("Differing environment", content),
        ]
    return join([*parts, _options_changed(groups)])


_OF_IDENTITY = attrgetter("host", "run_id", "lem_version", "model")
_OF_GPU = attrgetter("name", *(name for _, name, _ in GPU_SETTINGS))
_OF_MACHINE = attrgetter(*(name for section, name, _ in MACHINE_SETTINGS if section == "machine"))


def _alike(records: Iterable[Record]) -> list[list[Record]]:
    """Records of which all facts are the same: most of thousands are."""
    found: dict[Hashable, list[Record]] = {}
    for record in records:
        machine = record.machine
        gpus = tuple([(id(gpu.null_reasons), *_OF_GPU(gpu)) for gpu in record.gpus])
        key = (_OF_IDENTITY(record.identity), id(record.environment), _prompts(record), gpus)
        found.setdefault((*key, id(machine.null_reasons), _OF_MACHINE(machine)), []).append(record)
    return list(found.values())


def _capital(label: str) -> str:
    return label[0].upper() + label[1:]


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _fact(name: str, section: str = "environment") -> Callable[[Record], str]:
    def read(record: Record) -> str:
        owners = record.gpus if section == "gpus" else (getattr(record, section),)
        return _listed(_known_or_why(owner, name) for owner in owners)

    return read


def _known_or_why(owner: Section, name: str) -> str:
    found = owner.measured(name)
    if found.value is None:
        return f"not known: {found.null_reason}"
    if found.value == ():
        return "none seen"
    return _listed(found.value) if isinstance(found.value, tuple) else setting_text(name, found.value)


def _machine_range(name: str, groups: Iterable[Sequence[Record]]) -> str:
    values = [getattr(record.machine, name) for group in groups for record in group]
    if all(value is None for value in values):
        return _listed(_known_or_why(group[0].machine, name) for group in groups)
    return _range(values, partial(setting_text, name))


def _prompts(record: Record) -> str:
    source = record.work.prompt_source
    # Where every cycle draws its own, the seed of the draws names them.
    seeds = [key for key in ("seed", "shuffle_seed") if source.get(key) is not None] if "draw" in source else []
    keys = ("kind", "name", "count", *(seeds or ["sha256"])[:1])
    return ", ".join([f"{key} {source[key]}" for key in keys if source.get(key) is not None])


_FACTS: Mapping[str, Callable[[Record], str]] = {
    "Host": lambda record: record.identity.host,
    "Run": lambda record: record.identity.run_id,
    "GPU": lambda record: _listed(gpu.name for gpu in record.gpus),
    "GPU UUID": lambda record: _listed(record.environment.gpu_uuids),
    **{f"GPU {label}": _fact(name, section) for section, name, label in GPU_SETTINGS},
    "VBIOS": _fact("vbios"),
    "Other processes on the GPU": _fact("other_gpu_processes"),
    "Device": _fact("device"),
    "CPU": lambda record: f"{record.environment.cpu}, {plural(record.environment.cpu_count, 'logical processor')}",
    "Memory": lambda record: format_bytes(record.environment.memory_b),
    **{_capital(label): _fact(name, section) for section, name, label in MACHINE_SETTINGS},
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


def _options_changed(groups: Iterable[Sequence[Record]]) -> Markup:
    found: dict[tuple[str, ...], int] = {}
    for group in groups:
        for option, pair in group[0].environment.engine_differs.items():
            both = pair if isinstance(pair, list) and len(pair) == 2 else (pair, "")
            key = (option, *(json.dumps(value, ensure_ascii=False) for value in both))
            found[key] = found.get(key, 0) + len(group)
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
    EnergySource.HWMON_COUNTER: "the GPU's energy counter (hwmon), read when it changes inside the window",
    EnergySource.HWMON_POWER: "GPU power (hwmon), integrated over the window",
    EnergySource.HWMON_SENSOR: "power of the module, the CPUs or the machine (hwmon), integrated over the window",
}
_TOKEN_SOURCES = {
    "engine_ids": "counted from token ids",
    "retokenized": "counted by tokenizing the text again",
    "usage": "as the server counts them",
    "chunks": "counted by chunks, which may hold several tokens",
}


def methods_section(report: Report) -> Markup:
    used = [record for entry in report.entries for record in entry.used]
    name = "How each number was measured"
    content = table(name, ["Number", "How", "Remarks"], [*_energy_methods(used), *_other_methods(used)])
    return join([scroller(name, content), *paragraphs(_cautions(report))])


def _energy_methods(used: Sequence[Record]) -> Iterator[Row]:
    by_source: dict[str | None, list[Record]] = {}
    for record in used:
        by_source.setdefault(record.energy.primary_j.source, []).append(record)
    for source, own in by_source.items():
        if source is None:
            reasons = _listed(str(record.energy.primary_j.null_reason) for record in own)
            yield ["Energy", plot.NOT_MEASURED, f"{reasons} ({plural(len(own), 'result')})"]
        else:
            kind = "Energy, estimated" if is_estimate(source) else "Energy"
            yield [kind, _SOURCES.get(source, source), "; ".join(_energy_remarks(own))]
    net = [record for record in used if record.energy.gpu_energy_net_j is not None]
    if net:
        # Until schema version 2, power at rest before the window counted alone.
        rest_w = (
            it.idle.idle_loaded_power_w if it.idle.idle_net_power_w is None else it.idle.idle_net_power_w for it in net
        )
        idle = _range(rest_w, format_power)
        how = "gross minus the idle power with the engine loaded, over the same time"
        yield ["Net energy", how, f"idle power {idle}"]
    else:
        reasons = _listed(str(record.energy.null_reasons.get("gpu_energy_net_j", "")) for record in used)
        yield ["Net energy", plot.NOT_MEASURED, reasons]


def _energy_remarks(records: Sequence[Record]) -> Iterator[str]:
    scopes, periods_s, ratios, holes_s = _columns(
        *(records, "energy.energy_scope", "energy.counter_update_period_s"),
        *("energy.energy_crosscheck_ratio", "energy.sample_gap_max_s"),
    )
    yield f"{plural(len(records), 'result')}, scope {_listed(scope or 'unknown' for scope in dict.fromkeys(scopes))}"
    if any(period_s is not None for period_s in periods_s):
        yield f"counter updated every {_range(periods_s, format_latency)}"
    if any(ratio is not None for ratio in ratios):
        yield f"integrated power divided by the counter: {_range(ratios, '{:.3f}'.format)}"
    if known := [hole_s for hole_s in holes_s if hole_s is not None]:
        yield f"longest pause between samples {format_latency(max(known))}"


def _other_methods(used: Sequence[Record]) -> Iterator[Row]:
    sources, modes, repeats, lengths_s, warmups_s, loads_s, converged, are_reused = _columns(
        *(used, "work.token_source", "window.traffic_mode", "window.window_repeats", "window.window_s"),
        *("window.warmup_s", "window.load_s", "validity.warmup_converged", "validity.engine_reused"),
    )
    tokens = _listed(_TOKEN_SOURCES.get(source, source) for source in dict.fromkeys(filter(None, sources)))
    yield ["Throughput", "output tokens of the window divided by its length", tokens]
    tpot = "TPOT = (end-to-end latency minus TTFT) / (output tokens minus 1)"
    yield ["Latency", f"timestamped when the engine returns tokens; {tpot}", ""]
    traffic = _listed(mode.replace("_", " ") for mode in dict.fromkeys(modes))
    times = _range(repeats, "{:.0f}".format)
    how = f"{traffic}, {_range(lengths_s, format_duration)}"
    yield ["Window", how, f"prompt set run {times} {'time' if times == '1' else 'times'}"]
    unsettled = converged.count(False)
    remark = f"did not converge in {plural(unsettled, 'result')}" if unsettled else ""
    yield ["Warm-up", _range(warmups_s, format_duration), remark]
    reused = sum(are_reused)
    remark = f"{plural(reused, 'result')} with an engine that was already loaded" if reused else ""
    yield ["Engine load", _range(loads_s, format_duration), remark]


def _columns(records: Iterable[Record], *names: str) -> Sequence[tuple[Any, ...]]:
    """The values of these fields, `section.field`, in one pass over the records."""
    return [*zip(*map(attrgetter(*names), records), strict=True)] or [()] * len(names)


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
