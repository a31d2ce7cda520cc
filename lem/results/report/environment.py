"""Where and with what it was measured, how each number came about, and what the numbers do not say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lem.base import units
from lem.base.measurement import EnergySource, is_estimate
from lem.base.units import plural
from lem.record import Environment, Record
from lem.results.report.content import Report
from lem.results.report.markup import NOT_MEASURED, Cell, Markup, details, join, scroller, table, tag

_SOURCES: dict[str, str] = {
    EnergySource.COUNTER: "the GPU's own energy counter (NVML), read at its changes inside the window",
    EnergySource.INSTANT_POWER: "instantaneous GPU power (NVML field 186), integrated over the window",
    EnergySource.AVERAGE_POWER: "averaged GPU power (NVML), integrated over the window",
    EnergySource.RAPL: "the CPU packages' energy counters (RAPL)",
    EnergySource.TDP_ESTIMATE: "an estimate: design power (TDP) of the CPU times its load, not a measurement",
    EnergySource.EXTERNAL: "a meter of the user's own, aligned by its clock",
}
_VALUES_SHOWN = 6


def environment_section(report: Report) -> Markup:
    """What all results share, and what differs between them."""
    records = report.records
    if not records:
        return tag("p", "No whole result, so nothing is known of the environment.", class_="absent")
    shared, differing = [], []
    for label, read in _FACTS.items():
        found: dict[str, list[Record]] = {}
        for record in records:
            found.setdefault(read(record.environment, record), []).append(record)
        if len(found) == 1:
            shared.append([label, next(iter(found))])
        else:
            differing += [[label, value, _whose(members, report)] for value, members in _largest_first(found)]
    parts = [tag("h3", "The same for every result"), scroller("Shared environment", table(
        "What all results share", ["What", "Value"], [row for row in shared if row[1]]))]  # fmt: skip
    if differing:
        head = ["What", "Value", "Results"]
        parts += [
            tag("h3", "Different between results"),
            tag("p", "Results are comparable only where these are what was meant to differ."),
            scroller("Differing environment", table("What differs between results", head, differing)),
        ]
    return join([*parts, _requested_or_effective(records)])


def methods_section(report: Report) -> Markup:
    """How each number was measured, and how far it can be trusted."""
    rows = [*_methods(report)]
    content = table("How each number was measured", ["Number", "How", "Remarks"], rows)
    return join([scroller("How each number was measured", content), *(tag("p", text) for text in _cautions(report))])


def _text(value: Any, reason: str | None = None) -> str:
    if value is None or value == ():
        return f"{NOT_MEASURED}: {reason}" if reason else ""
    return value if isinstance(value, str) else str(value)


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _why(name: str) -> Callable[[Environment, Record], str]:
    def read(environment: Environment, _: Record) -> str:
        value = getattr(environment, name)
        shown = _listed(value) if isinstance(value, tuple) else value
        if value == () and name == "other_gpu_processes":
            return "none seen"
        return _text(shown, environment.null_reasons.get(name)) if value is not None else (
            f"not known: {environment.null_reasons.get(name, 'no reason given')}"
        )  # fmt: skip

    return read


_FACTS: Mapping[str, Callable[[Environment, Record], str]] = {
    "Host": lambda _, record: record.identity.host,
    "Run": lambda _, record: record.identity.run_id,
    "GPU": lambda _, record: _listed(gpu.name for gpu in record.gpus),
    "GPU UUID": lambda environment, _: _listed(environment.gpu_uuids),
    "GPU power limit": lambda _, record: _listed(
        units.format_power(gpu.power_limit_w) for gpu in record.gpus if gpu.power_limit_w is not None
    ),
    "Persistence mode": lambda _, record: _listed(
        "on" if gpu.persistence_mode else "off" for gpu in record.gpus if gpu.persistence_mode is not None
    ),
    "VBIOS": _why("vbios"),
    "Other processes on the GPU": _why("other_gpu_processes"),
    "Device": lambda environment, _: environment.device,
    "CPU": lambda environment, _: f"{environment.cpu}, {plural(environment.cpu_count, 'logical processor')}",
    "Memory": lambda environment, _: units.format_bytes(environment.memory_b),
    "Governor": _why("governor"),
    "Operating system": lambda environment, _: f"{environment.os}, kernel {environment.kernel}",
    "Executor": lambda environment, _: environment.executor,
    "Image": _why("image"),
    "Engine": lambda environment, _: f"{environment.engine_name} {environment.engine_version}",
    "Versions": lambda environment, _: _listed(f"{name} {version}" for name, version in environment.versions.items()),
    "lem": lambda _, record: record.identity.lem_version,
    "Model": lambda _, record: record.identity.model,
    "Model revision": _why("model_revision"),
    "Weights SHA-256": _why("weights_sha256"),
    "Prompts": lambda _, record: _prompts(record),
}


def _prompts(record: Record) -> str:
    source = record.work.prompt_source
    parts = [f"{key} {source[key]}" for key in ("kind", "name", "count", "sha256") if source.get(key) is not None]
    return ", ".join(parts)


def _largest_first(found: Mapping[str, Sequence[Record]]) -> list[tuple[str, Sequence[Record]]]:
    ranked = sorted(found.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    shown = [(value or "not given", members) for value, members in ranked[:_VALUES_SHOWN]]
    if len(ranked) > _VALUES_SHOWN:
        rest = [record for _, members in ranked[_VALUES_SHOWN:] for record in members]
        shown.append((f"{len(ranked) - _VALUES_SHOWN} other values", rest))
    return shown


def _whose(members: Sequence[Record], report: Report) -> str:
    keys = {record.identity.config_name for record in members}
    numbers = [str(entry.number) for entry in report.entries if entry.aggregate.name in keys]
    of = ", ".join(numbers[:8]) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"{plural(len(members), 'result')} of {'configuration' if len(numbers) == 1 else 'configurations'} {of}"


def _requested_or_effective(records: Sequence[Record]) -> Markup:
    """Options that the engine did not take as asked."""
    found: dict[tuple[str, str], int] = {}
    for record in records:
        for option, pair in record.environment.engine_differs.items():
            key = (str(option), json.dumps(pair, ensure_ascii=False, default=str))
            found[key] = found.get(key, 0) + 1
    if not found:
        return Markup()
    rows = []
    for (option, pair), count in found.items():
        values = json.loads(pair)
        both = values if isinstance(values, list) and len(values) == 2 else [values, ""]
        rows.append([option, *(json.dumps(value, ensure_ascii=False) for value in both), str(count)])
    content = table("Options not taken as asked", ["Option", "Requested", "In effect", "Results"], rows)
    label = f"Options that the engine did not take as asked: {len(found)}"
    return details(label, scroller("Options not taken as asked", content))


def _methods(report: Report) -> Iterable[list[Cell | str]]:
    used = [record for entry in report.entries for record in entry.used]
    for source in dict.fromkeys(record.energy.primary_j.source for record in used):
        own = [record for record in used if record.energy.primary_j.source == source]
        if source is None:
            reasons = _listed(str(record.energy.primary_j.null_reason) for record in own)
            yield ["Energy", NOT_MEASURED, f"{reasons} ({plural(len(own), 'result')})"]
            continue
        kind = "Energy, estimated" if is_estimate(source) else "Energy"
        scope = _listed(record.energy.primary_j.scope or "not told" for record in own)
        yield [kind, _SOURCES.get(source, source), "; ".join(_energy_remarks(own, scope))]
    yield ["Net energy", *_net(used)]
    yield ["Throughput", "output tokens of the window over its length, from the engine's token ids", _tokens(used)]
    yield [
        "Latency",
        "stamped as the engine hands tokens out; TPOT = (end to end less TTFT) / (output tokens less 1)",
        "",
    ]
    yield ["Window", _window(used), _repeats(used)]
    yield ["Warm-up", _range("", (record.window.warmup_s for record in used), units.format_duration), _converged(used)]
    yield ["Engine load", _range("", (record.window.load_s for record in used), units.format_duration), _reused(used)]


def _energy_remarks(records: Sequence[Record], scope: str) -> Iterable[str]:
    yield f"{plural(len(records), 'result')}, scope {scope}"
    periods = [record.energy.counter_update_period_s for record in records]
    if any(period is not None for period in periods):
        yield f"counter updated every {_range('', periods, units.format_latency)}"
    ratios = [record.energy.energy_crosscheck_ratio for record in records]
    if any(ratio is not None for ratio in ratios):
        yield f"integrated power over it: {_range('', ratios, lambda value: f'{value:.3f}')}"
    holes = [record.energy.sample_gap_max_s for record in records]
    if any(hole is not None for hole in holes):
        yield f"longest hole in the samples {units.format_latency(max(hole for hole in holes if hole is not None))}"


def _net(records: Sequence[Record]) -> tuple[str, str]:
    measured = [record for record in records if record.energy.gpu_energy_net_j is not None]
    if not measured:
        reasons = _listed(str(record.energy.null_reasons.get("gpu_energy_net_j", "")) for record in records)
        return NOT_MEASURED, reasons
    idle = _range("", (record.idle.idle_loaded_power_w for record in measured), units.format_power)
    return "gross less the power at rest with the engine loaded, over the same time", f"at rest {idle}"


def _range(label: str, values: Iterable[float | None], form: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return NOT_MEASURED
    low, high = form(min(known)), form(max(known))
    return label + (low if low == high else f"{low} to {high}")


def _tokens(records: Sequence[Record]) -> str:
    sources = {"engine_ids": "counted from token ids", "retokenized": "counted by tokenizing the text again"}
    return _listed(sources.get(record.work.token_source, record.work.token_source) for record in records)


def _window(records: Sequence[Record]) -> str:
    modes = _listed(record.window.traffic_mode.replace("_", " ") for record in records)
    return f"{modes}, {_range('', (record.window.window_s for record in records), units.format_duration)}"


def _repeats(records: Sequence[Record]) -> str:
    return f"prompt set run {_range('', (float(record.window.window_repeats) for record in records), _count)} times"


def _count(value: float) -> str:
    return f"{value:.0f}"


def _converged(records: Sequence[Record]) -> str:
    lacking = sum(record.validity.warmup_converged is False for record in records)
    return f"did not settle in {plural(lacking, 'result')}" if lacking else ""


def _reused(records: Sequence[Record]) -> str:
    reused = sum(record.validity.engine_reused for record in records)
    return f"{plural(reused, 'result')} with an engine that was loaded before" if reused else ""


def _cautions(report: Report) -> Iterable[str]:
    if report.has_energy and any(entry.aggregate.is_by_board_sensors for entry in report.entries):
        yield (
            "What ±5 % between cards means: the power sensor of each board reads up to 5 % too high or low, always "
            "the same way. Configurations measured on one card share its error, so their ratios are fair. Two cards "
            "may differ by 10 % on the same work without any difference between them: absolute joules, and comparisons "
            "between cards, carry that on top of the intervals shown here, which only say how much repeats vary."
        )
    if any(entry.is_estimate for entry in report.entries):
        yield "Estimated energy is no measurement: it follows the CPU's load and knows nothing of what it drew."
    yield (
        "Energy is gross, the idle power included; net energy is beside it in the records. “Not measured” means that "
        "no value is known, for the reason given; a zero stands only where zero was observed."
    )
