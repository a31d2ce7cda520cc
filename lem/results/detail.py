"""One result as people read it: what was measured, how, and why what is missing is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lem import units
from lem.log import WIDTH
from lem.record import Distribution, Record
from lem.results.layout import Column, columns, paint, wrapped
from lem.results.metrics import LATENCIES

__all__ = ["render_record"]

_LABEL_WIDTH = 12
_PERCENTILES = ("mean", "p50", "p90", "p95", "p99")


def render_record(record: Record, *, is_colour: bool = False, width: int = WIDTH) -> str:
    """The result as text that ends in a newline; the whole of it is in its JSON."""
    identity = record.identity
    title = f"{identity.config_name} · cycle {identity.cycle_index + 1} · attempt {identity.attempt}"
    where = f"{identity.campaign_name} · run {identity.run_id} · {identity.host} · {identity.start_utc}"
    lines = [paint(line, "bold", is_colour=is_colour) for line in wrapped(title, width)]
    lines += [paint(line, "dim", is_colour=is_colour) for line in wrapped(where, width)]
    lines.append("")
    for label, text in _facts(record):
        lines += wrapped(text, width, label.ljust(_LABEL_WIDTH))
    lines += ["", *_latency_lines(record, width)]
    lines += [""] if record.validity.warnings else []
    for reason in record.validity.warnings:
        first, *rest = wrapped(reason.text, width, "warning: ")
        lines += [paint("warning:", "yellow", is_colour=is_colour) + first[len("warning:") :], *rest]
    return "\n".join(lines) + "\n"


def _facts(record: Record) -> Iterable[tuple[str, str]]:
    validity, window, work, environment = record.validity, record.window, record.work, record.environment
    yield "valid", "yes" if validity.valid else "no: " + "; ".join(map(str, validity.invalid_reasons))
    yield "model", f"{record.identity.model} on {record.identity.backend}"
    yield "engine", f"{environment.engine_name} {environment.engine_version} on {environment.device}"
    yield "load", _load(record)
    yield "warm-up", _warmup(record)
    repeats = {0: "not every prompt once", 1: "all prompts once"}.get(
        window.window_repeats, f"all prompts {window.window_repeats} times"
    )
    mode, steady = window.traffic_mode.replace("_", " "), ", not steady" if validity.steady is False else ""
    yield "window", f"{units.format_duration(window.window_s)}, {mode}, {repeats}{steady}"
    requests = f"{work.requests_ok} requests, {work.requests_failed} failed"
    yield "work", f"{requests}; {work.input_tok} tokens in, {work.output_tok} out ({work.token_source})"
    yield "throughput", _throughput(record)
    yield "energy", _energy(record)
    yield (
        "memory",
        _or_reason(record.compute.peak_memory_b, units.format_bytes, record.compute.null_reasons.get("peak_memory_b")),
    )


def _load(record: Record) -> str:
    validity, window = record.validity, record.window
    if validity.engine_reused:
        return f"none, engine reused: {validity.engine_load_id}"
    took = _or_reason(window.load_s, units.format_duration, window.null_reasons.get("load_s"))
    compiled = "" if window.compile_s is None else f", compiled in {units.format_duration(window.compile_s)}"
    return f"{took}{compiled}, fresh engine: {validity.engine_load_id}"


def _warmup(record: Record) -> str:
    window = record.window
    took = _or_reason(window.warmup_s, units.format_duration, window.null_reasons.get("warmup_s"))
    converged = {True: ", converged", False: ", not converged", None: ""}[record.validity.warmup_converged]
    return f"{took}, {window.warmup_prompts} prompts{converged}"


def _throughput(record: Record) -> str:
    throughput = record.throughput
    output = _or_reason(throughput.output_tok_per_s, units.format_rate, throughput.null_reasons.get("output_tok_per_s"))
    if throughput.total_tok_per_s is None or throughput.requests_per_s is None:
        return f"output {output}"
    total, requests = (
        units.format_rate(throughput.total_tok_per_s),
        units.format_quantity(throughput.requests_per_s, "requests/s"),
    )
    return f"output {output}, with input {total}, {requests}"


def _energy(record: Record) -> str:
    energy_j, per_tok = record.energy.primary_j, record.efficiency.energy_per_output_tok_j
    if energy_j.value is None:
        return _or_reason(None, units.format_energy, energy_j.null_reason)
    parts = [units.format_energy(energy_j.value) + (" (an estimate)" if energy_j.is_estimate else "")]
    parts += [f"{per_tok:.4g} J per output token"] if per_tok is not None else []
    return ", ".join([*parts, f"by {energy_j.source}"])


def _latency_lines(record: Record, width: int) -> list[str]:
    latency = record.latency
    kinds = {name: getattr(latency, f"{name}_s") for name in LATENCIES}
    seen: dict[str, Distribution] = {name: value for name, value in kinds.items() if value is not None}
    lines: list[str] = []
    if seen:
        table = [
            Column(name, tuple(units.format_latency(getattr(value, name)) for value in seen.values()))
            for name in _PERCENTILES
        ]
        table.append(Column("n", tuple(str(value.n) for value in seen.values())))
        lines = columns("latency", list(seen), table, width)
    by_reason: dict[str, list[str]] = {}
    for name, value in kinds.items():
        if value is None:
            by_reason.setdefault(latency.null_reasons.get(f"{name}_s", ""), []).append(name)
    for reason, names in by_reason.items():
        lines += wrapped(f"{', '.join(names)}: not measured: {reason}", width)
    return lines


def _or_reason(value: float | None, form: Callable[[float], str], reason: str | None) -> str:
    return form(value) if value is not None else f"not measured: {reason}"
