"""The result record: what `result.json` holds, shared by the worker that writes it and the host that reads it.

A value that was not measured is None and has a reason in `null_reasons` of its section; zero is only ever observed.
On disk a section is an object with its fields, and `<field>_null_reason` beside each null.

Schema history:
    1: first version.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lem import durable

__all__ = [
    "SCHEMA_VERSION",
    "Carbon",
    "Compute",
    "Distribution",
    "Efficiency",
    "Energy",
    "Environment",
    "Gpu",
    "Identity",
    "Idle",
    "Latency",
    "Record",
    "RecordError",
    "Throughput",
    "Validity",
    "Window",
    "Work",
    "decode_record",
    "encode_record",
    "read_record",
    "write_record",
]

SCHEMA_VERSION = 1


class RecordError(ValueError):
    """A document that is not a whole record of this schema."""


@dataclass(frozen=True)
class Distribution:
    """Percentiles of one latency in seconds; p95 needs 20 and p99 100 observations, else None."""

    mean: float
    p50: float
    p90: float | None
    p95: float | None
    p99: float | None
    n: int


@dataclass(frozen=True)
class Identity:
    """Which experiment this is. `experiment_id` names one configuration in one cycle; `config_hash` the configuration."""

    experiment_id: str
    config_name: str
    config_hash: str
    campaign_id: str
    campaign_name: str
    run_id: str
    host: str
    backend: str
    model: str
    cycle_index: int
    order_index: int
    attempt: int
    shuffle_seed: int | None
    start_utc: str
    lem_version: str


@dataclass(frozen=True)
class Validity:
    """Whether the numbers may be used, and what to know about them."""

    valid: bool
    invalid_reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    warmup_converged: bool | None
    steady: bool | None
    engine_reused: bool
    engine_load_id: str
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Window:
    """The measured window and what stood around it. `traffic_mode` is `closed_batch`, `poisson`, `constant` or `closed`."""

    traffic_mode: str
    window_s: float
    window_repeats: int
    warmup_s: float | None
    warmup_prompts: int
    load_s: float | None
    gap_s: float | None
    gap_end_reason: str | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Energy:
    """Energy of the window in joules, gross; net is gross less loaded idle over the same time."""

    gpu_energy_j: float | None = None
    gpu_energy_net_j: float | None = None
    cpu_package_energy_j: float | None = None
    dram_energy_j: float | None = None
    load_energy_j: float | None = None
    warmup_energy_j: float | None = None
    prefill_energy_j: float | None = None
    decode_energy_j: float | None = None
    phase_method: str | None = None
    energy_source: str | None = None
    energy_scope: str | None = None
    energy_crosscheck_ratio: float | None = None
    counter_update_period_s: float | None = None
    sample_gap_max_s: float | None = None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Gpu:
    """One GPU over the window."""

    uuid: str
    name: str
    energy_j: float | None = None
    power_mean_w: float | None = None
    power_max_w: float | None = None
    power_limit_w: float | None = None
    temp_start_c: float | None = None
    temp_end_c: float | None = None
    temp_max_c: float | None = None
    sm_clock_mean_hz: float | None = None
    throttle_power_s: float | None = None
    throttle_thermal_s: float | None = None
    event_reasons_mask: int | None = None
    util_mean_ratio: float | None = None
    mem_peak_b: int | None = None
    persistence_mode: bool | None = None
    mig_mode: bool | None = None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Idle:
    """Power at rest: before the load, with the engine loaded, and loaded after the window."""

    idle_bare_power_w: float | None = None
    idle_loaded_power_w: float | None = None
    idle_loaded_post_power_w: float | None = None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What was done in the window. Tokens are counted from ids; padding is never input.

    Attributes:
        token_source: `engine_ids` or `retokenized`.
        prompt_source: where the prompts came from: kind, revision, sha256, count.
        padding_tok: padding the engine computed on beside the input, which is not counted as input.
    """

    requests_ok: int
    requests_failed: int
    input_tok: int
    output_tok: int
    padding_tok: int | None
    token_source: str
    prompt_source: Mapping[str, Any]
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Throughput:
    """Rates over the window."""

    output_tok_per_s: float | None
    total_tok_per_s: float | None
    requests_per_s: float | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Latency:
    """Latencies in seconds. TPOT = (e2e - ttft) / (output_tok - 1); a token time not observed makes None."""

    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    e2e_s: Distribution | None
    queue_s: Distribution | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Compute:
    """Work in floating-point operations, and memory."""

    flops_total: float | None
    flops_method: str | None
    flops_confidence: str | None
    model_parameters: int | None
    peak_memory_b: int | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Efficiency:
    """Energy per unit of work; a zero denominator is None."""

    energy_per_output_tok_j: float | None = None
    energy_per_total_tok_j: float | None = None
    energy_per_request_j: float | None = None
    output_tok_per_j: float | None = None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Carbon:
    """Emissions and cost, from values the user gave and nothing else."""

    grid_g_per_kwh: float | None = None
    pue: float | None = None
    price_per_kwh: float | None = None
    co2e_g: float | None = None
    cost: float | None = None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Environment:
    """Everything about host, engine and model that can change the numbers.

    Attributes:
        fingerprint: hash over the parts that make two runs incomparable (image, engine, driver, GPU UUIDs).
        versions: {"python": …, "torch": …, "driver": …}.
        engine_effective: the engine configuration found at load.
        engine_differs: {option: [requested, effective]} where they differ.
    """

    fingerprint: str
    executor: str
    os: str
    kernel: str
    cpu: str
    cpu_count: int
    memory_b: int | None
    governor: str | None
    image: str | None
    engine_name: str
    engine_version: str
    versions: Mapping[str, str]
    device: str
    gpu_uuids: tuple[str, ...]
    vbios: tuple[str, ...] | None
    model_revision: str | None
    weights_sha256: str | None
    other_gpu_processes: tuple[str, ...] | None
    engine_effective: Mapping[str, Any]
    engine_differs: Mapping[str, Any]
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One attempt at one experiment, as measured."""

    identity: Identity
    validity: Validity
    window: Window
    energy: Energy
    gpus: tuple[Gpu, ...]
    idle: Idle
    work: Work
    throughput: Throughput
    latency: Latency
    compute: Compute
    efficiency: Efficiency
    carbon: Carbon
    environment: Environment
    requested: Mapping[str, Any]
    extra_metadata: Mapping[str, Any] = field(default_factory=dict)


def encode_record(record: Record) -> dict[str, Any]:
    """The record as JSON values, `schema_version` first.

    Raises:
        RecordError: a value is None and its section gives no reason, or a reason stands beside a value.
    """
    document: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if item.name == "gpus":
            document["gpus"] = [_encode_section(gpu, f"gpus[{index}]") for index, gpu in enumerate(value)]
        elif dataclasses.is_dataclass(value):
            document[item.name] = _encode_section(value, item.name)
        else:
            document[item.name] = _plain(value)
    return document


def decode_record(document: Any) -> Record:
    """The record in a JSON document.

    Raises:
        RecordError: another schema version, a missing or unknown field, or a value of the wrong type.
    """
    if not isinstance(document, dict):
        raise RecordError("a record is a JSON object")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise RecordError(f"schema_version is {document.get('schema_version')!r}, this lem reads {SCHEMA_VERSION}")
    hints = typing.get_type_hints(Record)
    names = {item.name for item in dataclasses.fields(Record)}
    _check_names("record", set(document) - {"schema_version"}, names)
    values: dict[str, Any] = {}
    for name in names:
        value = document[name]
        if name == "gpus":
            if not isinstance(value, list):
                raise RecordError("gpus: a list is due")
            values[name] = tuple(_decode_section(Gpu, gpu, f"gpus[{index}]") for index, gpu in enumerate(value))
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = _decode_section(hints[name], value, name)
        else:
            values[name] = _convert(hints[name], value, name)
    return Record(**values)


def write_record(path: Path, record: Record) -> None:
    """Write `result.json`, whole or not at all.

    Raises:
        RecordError: as `encode_record`.
        OSError: as `durable.write_bytes`.
    """
    durable.write_json(path, encode_record(record))


def read_record(path: Path) -> Record:
    """The record in a file.

    Raises:
        RecordError: the file is not a whole record.
        OSError: the file cannot be read.
    """
    try:
        document = durable.read_json(path)
    except ValueError as error:
        raise RecordError(f"not JSON: {error}") from error
    return decode_record(document)


def _encode_section(section: Any, where: str) -> dict[str, Any]:
    reasons = dict(getattr(section, "null_reasons", {}))
    has_reasons = any(item.name == "null_reasons" for item in dataclasses.fields(section))
    out: dict[str, Any] = {}
    for item in dataclasses.fields(section):
        if item.name == "null_reasons":
            continue
        value = getattr(section, item.name)
        reason = reasons.pop(item.name, None)
        out[item.name] = _encode_section(value, f"{where}.{item.name}") if isinstance(value, Distribution) else _plain(value)
        if value is None and has_reasons:
            if not reason:
                raise RecordError(f"{where}.{item.name} is null without a reason")
            out[f"{item.name}_null_reason"] = reason
        elif reason is not None:
            raise RecordError(f"{where}.{item.name} has a value and a reason for having none")
    if reasons:
        raise RecordError(f"{where}: reasons for unknown fields {sorted(reasons)}")
    return out


def _decode_section(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise RecordError(f"{where}: an object is due")
    hints = typing.get_type_hints(kind)
    names = {item.name for item in dataclasses.fields(kind)} - {"null_reasons"}
    reasons = {key[: -len(_REASON)]: text for key, text in value.items() if key.endswith(_REASON)}
    plain = {key: item for key, item in value.items() if not key.endswith(_REASON)}
    _check_names(where, set(plain), names)
    out = {name: _convert(hints[name], plain[name], f"{where}.{name}") for name in names}
    if "null_reasons" in hints:
        out["null_reasons"] = reasons
    return kind(**out)


_REASON = "_null_reason"


def _check_names(where: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, unknown = sorted(expected - found), sorted(found - expected)
        parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
        raise RecordError(f"{where}: {'; '.join(parts)}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is types.UnionType or origin is typing.Union:
        if value is None:
            return None
        (inner,) = (item for item in typing.get_args(hint) if item is not type(None))
        return _convert(inner, value, where)
    if dataclasses.is_dataclass(hint):
        return _decode_section(typing.cast(type, hint), value, where)
    if hint is Any:
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise RecordError(f"{where}: a list is due")
        return tuple(_convert(typing.get_args(hint)[0], item, where) for item in value)
    if origin is not None:  # Mapping[...]
        if not isinstance(value, dict):
            raise RecordError(f"{where}: an object is due")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise RecordError(f"{where}: {hint.__name__} is due, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
