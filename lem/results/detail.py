"""One result in full."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from typing import Any

from lem.base import units
from lem.base.doc import Column, Doc, columns
from lem.base.log import WIDTH
from lem.base.measurement import ENERGY_COUNTED, Distribution
from lem.config.backends import ENERGY_SCORE_RULES
from lem.config.experiment import PROGRAM
from lem.config.sections import DATASET_ALIASES
from lem.record import Energy, Gpu, Record
from lem.results.metrics import LATENCIES, METRIC_BY_NAME, READABLE_LATENCIES

SCORE = METRIC_BY_NAME["energy_per_1000_requests_wh"]  # in the unit of AI Energy Score
_LABEL_WIDTH = 12
_PERCENTILES = ("mean", "p50", "p90", "p95", "p99")


def render_record(record: Record, *, is_colour: bool = False, width: int = WIDTH) -> str:
    identity = record.identity
    doc = Doc(width, is_colour=is_colour)
    doc.text(f"{identity.config_name} · cycle {identity.cycle_index + 1} · attempt {identity.attempt}", "bold")
    doc.text(f"{identity.campaign_name} · run {identity.run_id} · {identity.host} · {identity.start_utc}", "dim")
    doc.block()
    for label, text in _facts(record):
        doc.text(text, lead=label.ljust(_LABEL_WIDTH))
    doc.block()
    if record.identity.backend != PROGRAM:
        _add_latency(doc, record)
        doc.block()
    for reason in record.validity.warnings:
        doc.labelled("warning: ", reason.text, "yellow")
    return doc.render()


def _facts_of_program(record: Record) -> Iterable[tuple[str, str]]:
    from lem.base import process  # imported here to keep the start-up fast

    work, environment = record.work, record.environment
    yield "command", shlex.join(map(str, record.requested.get("command", ())))
    yield "ended", process.describe_exit(environment.engine_effective.get("exit_code", 0))
    yield "time", units.format_duration(record.window.window_s)
    names = {
        "requests_ok": "requests",
        "requests_failed": "failed",
        "input_tok": "tokens in",
        "output_tok": "tokens out",
    }
    known = ", ".join(f"{count} {words}" for name, words in names.items() if (count := getattr(work, name)) is not None)
    # What was not asked for is named only where nothing was.
    whys = [(names[name], why) for name, why in work.null_reasons.items() if name in names]
    parts = [known, *(f"{words} not measured: {why}" for words, why in whys if why.code != "work_not_given")]
    yield "work", "; ".join(parts) if known else f"not measured: {work.why_uncounted}"


def _facts(record: Record) -> Iterable[tuple[str, str]]:
    validity = record.validity
    yield "valid", "yes" if validity.valid else "no: " + "; ".join(map(str, validity.invalid_reasons))
    is_program = record.identity.backend == PROGRAM
    yield from (_facts_of_program if is_program else _facts_of_engine)(record)
    if not is_program or record.throughput.requests_per_s is not None or record.throughput.output_tok_per_s is not None:
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
    if not is_program:
        yield "memory", _measured(record.compute, "peak_memory_b", units.format_bytes)
    yield "machine", _disclosed(MACHINE_SETTINGS + MACHINE_STATE, record)
    for gpu in record.gpus:
        yield "GPU", f"{gpu.name} {gpu.uuid}: {_disclosed(GPU_SETTINGS, gpu)}"


def _facts_of_engine(record: Record) -> Iterable[tuple[str, str]]:
    validity, window, work, environment = record.validity, record.window, record.work, record.environment
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
        average = f"{units.plain(window.in_flight_mean, '.3g')} requests on average"
        yield "in flight", f"{average}, {window.in_flight_peak} at most; {thin}"
    good = "" if work.requests_good is None else f", {work.requests_good} good"
    requests = f"{work.requests_ok} requests{good}, {work.requests_failed} failed"
    source = "" if work.token_source is None else f" ({work.token_source})"
    yield "work", f"{requests}; {work.input_tok} tokens in, {work.output_tok} out{source}"


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
    ("gpus", "power_limit_set_w", "power limit that was set"),
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
    if isinstance(value, bool):
        return "on" if value else "off"
    if name.endswith("_hz"):
        return f"{value / 1e6:.0f} MHz"
    return units.format_power(value) if name.endswith("_w") else f"{value:g} °C" if name.endswith("_c") else str(value)


def _disclosed(settings: Iterable[tuple[str, str, str]], owner: Record | Gpu) -> str:
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


def is_of_energy_score(record: Record) -> bool:
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
        parts.append(f"{units.plain(throughput.tok_per_step, '.3g')} tokens per step, {accepted} of drafts accepted")
    return ", ".join(parts)


def _energy(record: Record) -> str:
    energy_j, per_tok = record.energy.primary_j, record.efficiency.energy_per_output_tok_j
    if energy_j.value is None:
        return f"not measured: {energy_j.null_reason}"
    parts = [units.format_energy(energy_j.value) + (" (an estimate)" if energy_j.is_estimate else "")]
    parts += [f"{units.plain(per_tok, '.4g')} J per output token"] if per_tok is not None else []
    if record.identity.backend == PROGRAM and (per_request := record.efficiency.energy_per_request_j) is not None:
        parts.append(f"{units.plain(per_request, '.4g')} J per request")
    per_thousand_wh, _ = SCORE.read(record)
    if per_thousand_wh is not None and is_of_energy_score(record):
        parts.append(f"{units.plain(per_thousand_wh, '.4g')} Wh per 1,000 prompts")
    per_good = record.efficiency.energy_per_good_request_j
    parts += [f"{units.plain(per_good, '.4g')} J per good request"] if per_good is not None else []
    sensor = record.energy.energy_sensor
    named = "" if sensor is None else f" ({sensor}, which covers: {record.energy.energy_scope})"
    return ", ".join([*parts, f"by {energy_j.source}{named}"])


def _carbon(record: Record) -> str | None:
    carbon = record.carbon
    parts = [] if carbon.co2e_g is None else [f"{units.format_quantity(carbon.co2e_g, 'g')} CO₂e"]
    parts += [] if carbon.cost is None else [f"cost {units.format_quantity(carbon.cost)}"]
    basis = ENERGY_COUNTED.get(record.energy.energy_scope or "", "energy")
    return f"{', '.join(parts)}: {basis} × PUE {carbon.pue:g}" if parts else None


def _uncertainty(energy: Energy, whole_j: float, name: str, budget_name: str) -> str:
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
        parts = {name: [getattr(value, name) for value in seen.values()] for name in _PERCENTILES}
        table = [Column(name, tuple(map(units.format_latency, values))) for name, values in parts.items()]
        table.append(Column("n", tuple(str(value.n) for value in seen.values())))
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
