"""The result record: what `result.json` holds, and how it is written and read."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lem.base import durable
from lem.base.codec import shown
from lem.base.measurement import SLOWDOWN_MASK, EnergySource, is_estimate
from lem.base.reasons import Reason, recognise

# The files of an attempt, beside its sample log (lem/meters/samples.py).
RESULT_FILE = "result.json"
CONFIG_FILE = "config.json"
PROMPTS_FILE = "prompts.jsonl"
OUTPUTS_FILE = "outputs.jsonl"
LOG_FILE = "log.txt"

# Fewer observations than this leave a percentile to one or two values, so it is None.
OBSERVATIONS_NEEDED = types.MappingProxyType({"p90": 10, "p95": 20, "p99": 100})

# The fields of `Energy` that add up to the energy that counts, by the meter it comes from.
_PARTS: Final[Mapping[str, tuple[str, ...]]] = types.MappingProxyType(
    {
        EnergySource.COUNTER: ("gpu_energy_j",),
        EnergySource.INSTANT_POWER: ("gpu_energy_j",),
        EnergySource.AVERAGE_POWER: ("gpu_energy_j",),
        EnergySource.RAPL: ("cpu_package_energy_j", "dram_energy_j"),
        EnergySource.TDP_ESTIMATE: ("cpu_package_energy_j",),
        EnergySource.EXTERNAL: ("external_energy_j",),
    }
)

ResultKey = tuple[str, str, str, int, int]
"""What no two results share: run, host, experiment, cycle, attempt."""


@dataclass(frozen=True)
class Measured:
    """A value, or None with the reason why it is absent.

    Attributes:
        source, scope: of an energy: the meter it comes from (`Energy.energy_source`) and what that meter covers.
    """

    value: float | None
    null_reason: str | None = None
    source: str | None = None
    scope: str | None = None

    @property
    def is_estimate(self) -> bool:
        """Whether no meter measured it."""
        return is_estimate(self.source)


def parts_of_source(source: str) -> tuple[str, ...]:
    """The fields of `Energy` that add up to the energy that counts when it comes from this meter.

    The memory's part (`dram_energy_j`) is optional: not every machine has a counter for it.
    """
    return _PARTS.get(source, ())


@dataclass(frozen=True)
class Distribution:
    """Percentiles of one latency in seconds; None where `OBSERVATIONS_NEEDED` were not there."""

    mean: float
    p50: float
    p90: float | None
    p95: float | None
    p99: float | None
    n: int

    @property
    def null_reasons(self) -> Mapping[str, str]:
        """Why percentiles are None: always too few observations."""
        return {
            name: f"needs {needed} observations, there are {self.n}"
            for name, needed in OBSERVATIONS_NEEDED.items()
            if getattr(self, name) is None
        }


@dataclass(frozen=True)
class Identity:
    """Which attempt this is.

    Attributes:
        experiment_id: one configuration in one cycle; names the folder.
        config_name, config_hash: the configuration, for people and for programs.
        cycle_index, order_index: from 0.
        attempt: from 1.
        shuffle_seed: None when the order was not shuffled.
    """

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

    @property
    def key(self) -> ResultKey:
        """What tells this result from every other."""
        return (self.run_id, self.host, self.experiment_id, self.cycle_index, self.attempt)

    @property
    def null_reasons(self) -> Mapping[str, str]:
        """Why there is no shuffle seed."""
        return {} if self.shuffle_seed is not None else {"shuffle_seed": "the order was not shuffled"}


@dataclass(frozen=True)
class Validity:
    """Whether the numbers may be used, and what to know about them."""

    valid: bool
    invalid_reasons: tuple[Reason, ...]
    warnings: tuple[Reason, ...]
    warmup_converged: bool | None
    steady: bool | None
    engine_reused: bool
    engine_load_id: str
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Window:
    """The measured window and what stood around it.

    Attributes:
        traffic_mode: `closed_batch`, `poisson`, `constant` or `closed`.
        window_repeats: how often the prompt set was run to fill the window; under traffic requests completed over
            prompts, rounded down.
        gap_s, gap_end_reason: the gap before this experiment.
    """

    traffic_mode: str
    window_s: float
    window_repeats: int
    warmup_s: float | None
    warmup_prompts: int
    load_s: float | None
    compile_s: float | None
    gap_s: float | None
    gap_end_reason: Reason | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Energy:
    """Energy of the window in joules, gross; net is gross less loaded idle over the same time.

    Attributes:
        external_energy_j: what a meter of the user's own, at the machine's plug for instance, says of the window.
        energy_source: the meter of the energy that counts (`primary_j`): `nvml_counter`, `power_instant_integral`,
            `power_average_integral`, `rapl`, `tdp_estimate` or `external_csv`; None when that energy is absent.
        energy_scope: what that meter sees: `gpu`, `module`, `cpu_package`, `machine`.
        energy_crosscheck_ratio: integrated power over the counter's energy.
    """

    gpu_energy_j: float | None = None
    gpu_energy_net_j: float | None = None
    cpu_package_energy_j: float | None = None
    dram_energy_j: float | None = None
    external_energy_j: float | None = None
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

    @property
    def primary_j(self) -> Measured:
        """The energy that counts, in joules: efficiency, carbon and everything shown to people use this one."""
        if self.energy_source is None:
            return Measured(None, self.null_reasons.get("energy_source", "no reason given"))
        parts = parts_of_source(self.energy_source)
        if not parts:
            return Measured(None, f"energy_source is {self.energy_source}, which this lem does not know")
        values = [getattr(self, name) for name in parts]
        if values[0] is None:
            return Measured(None, self.null_reasons.get(parts[0], "no reason given"))
        total_j = sum(value for value in values if value is not None)
        return Measured(total_j, None, self.energy_source, self.energy_scope)


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

    @property
    def was_slowed(self) -> bool:
        """Whether heat or the hardware slowed its clocks in the window; its power limit is not meant."""
        mask = self.event_reasons_mask or 0
        return bool(self.throttle_thermal_s) or bool(mask & SLOWDOWN_MASK)


@dataclass(frozen=True)
class Idle:
    """Power at rest: before the load, with the engine loaded, and loaded after the window.

    Attributes:
        idle_bare_temp_c, idle_loaded_temp_c: mean temperature of the hottest GPU meanwhile, where it was measured
            in this experiment.
        baseline_age_s: how long before this experiment the loaded idle was measured; 0 when in it.
    """

    idle_bare_power_w: float | None = None
    idle_loaded_power_w: float | None = None
    idle_loaded_post_power_w: float | None = None
    idle_bare_temp_c: float | None = None
    idle_loaded_temp_c: float | None = None
    baseline_age_s: float | None = None
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


SCHEMA_VERSION = 2

_REASON = "_null_reason"
_CODED = "_coded"


class RecordError(ValueError):
    """A document that is not a whole record of this schema."""


def encode_record(record: Record) -> dict[str, Any]:
    """The record as JSON values, `schema_version` first.

    Raises:
        RecordError: a value is None and its section gives no reason, a reason stands beside a value, or a value has
            another type than declared (NaN and infinity are no numbers here).
    """
    document: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if item.name == "gpus":
            document["gpus"] = [_encode_section(gpu, f"gpus[{index}]") for index, gpu in enumerate(value)]
        elif dataclasses.is_dataclass(value):
            document[item.name] = _encode_section(value, item.name)
        else:
            document[item.name] = _plain(value, item.name)
    decode_record(document)  # The writer knows best what to do about a wrong type, so it meets it, not the reader.
    return document


def decode_record(document: Any) -> Record:
    """The record in a JSON document.

    Raises:
        RecordError: another schema version, a missing or unknown field, a null without a reason, or a value of the
            wrong type.
    """
    if not isinstance(document, dict):
        raise RecordError("a record is a JSON object")
    if document.get("schema_version") == 1:
        document = _from_version_1(document)
    if document.get("schema_version") != SCHEMA_VERSION:
        said = shown(document.get("schema_version"))
        raise RecordError(f"schema_version is {said}, this lem reads 1 to {SCHEMA_VERSION}")
    hints = _hints(Record)
    _check_names("record", set(document) - {"schema_version"}, set(hints))
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        value = document[name]
        if name == "gpus":
            if not isinstance(value, list):
                raise RecordError(f"gpus: a list is due, got {shown(value)}")
            values[name] = tuple(_decode_section(Gpu, gpu, f"gpus[{index}]") for index, gpu in enumerate(value))
        else:
            values[name] = _convert(hint, value, name)
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
    try:
        return decode_record(document)
    except RecursionError as error:
        raise RecordError("not a record: nested too deeply") from error


def _encode_section(section: Any, where: str) -> dict[str, Any]:
    reasons = dict(section.null_reasons)
    out: dict[str, Any] = {}
    for item in dataclasses.fields(section):
        if item.name == "null_reasons":
            continue
        value = getattr(section, item.name)
        path = f"{where}.{item.name}"
        out[item.name] = _encode_section(value, path) if isinstance(value, Distribution) else _plain(value, path)
        if value is not None and item.name in _reason_fields(section.__class__):
            out[item.name + _CODED] = _codes(value, path)
        reason = reasons.pop(item.name, None)
        if value is None:
            out[item.name + _REASON] = reason
        elif reason is not None:
            raise RecordError(f"{path} has a value and a reason for having none: {shown(reason)}")
    if reasons:
        raise RecordError(f"{where}: reasons for unknown fields {', '.join(sorted(reasons))}")
    return out


def _decode_section(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise RecordError(f"{where}: an object is due, got {shown(value)}")
    hints = dict(_hints(kind))
    keeps_reasons = hints.pop("null_reasons", None) is not None
    reasons = {key[: -len(_REASON)]: text for key, text in value.items() if key.endswith(_REASON)}
    coded = {key[: -len(_CODED)]: item for key, item in value.items() if key.endswith(_CODED)}
    plain = {key: item for key, item in value.items() if not key.endswith((_REASON, _CODED))}
    _check_names(where, set(plain), set(hints))
    for name, item in plain.items():
        if item is None and not (isinstance(reasons.get(name), str) and reasons[name]):
            raise RecordError(f"{where}.{name} is null without a reason")
    for name in reasons:
        if plain.get(name, name) is not None:
            raise RecordError(f"{where}: {shown(name + _REASON)} stands beside a value, or beside nothing")
    for name in _reason_fields(kind):
        plain[name] = _decode_reasons(hints[name], plain[name], coded.pop(name, None), f"{where}.{name}")
    if coded:
        raise RecordError(f"{where}: unexpected {shown(next(iter(coded)) + _CODED)}: the field holds no reasons")
    scalars = _scalars(kind)
    out = {
        name: plain[name]
        if name in _reason_fields(kind) or (type(plain[name]) in scalars[name] and _is_finite(plain[name]))
        else _convert(hint, plain[name], f"{where}.{name}")
        for name, hint in hints.items()
    }
    return kind(**out, null_reasons=reasons) if keeps_reasons else kind(**out)


@functools.cache
def _hints(kind: Any) -> Mapping[str, Any]:
    """Names and types of the fields; resolving annotations costs more than all the rest of decoding."""
    hints = typing.get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


@functools.cache
def _reason_fields(kind: Any) -> tuple[str, ...]:
    reasons = (Reason | None, tuple[Reason, ...])
    return tuple(name for name, hint in _hints(kind).items() if hint in reasons)


def _codes(value: Any, where: str) -> Any:
    if isinstance(value, Reason):
        return {"code": value.code, "data": _plain(value.data, f"{where}.data")}
    return [_codes(item, where) for item in value]


def _decode_reasons(hint: Any, sentences: Any, coded: Any, where: str) -> Any:
    """The reasons of a field, from its sentences and their codes."""
    if typing.get_origin(hint) is not tuple:
        said = _convert(str | None, sentences, where)
        return None if said is None and coded is None else _decode_reason(said, coded, where)
    sentences = _convert(tuple[str, ...], sentences, where)
    if not isinstance(coded, list) or len(coded) != len(sentences):
        raise RecordError(f"{where}: expected codes of {len(sentences)} sentences, got {shown(coded)}")
    return tuple(_decode_reason(said, code, where) for said, code in zip(sentences, coded, strict=True))


def _decode_reason(sentence: str, coded: Any, where: str) -> Reason:
    """The reason; that of a newer lem with the same schema is known by its sentence alone."""
    if isinstance(coded, Reason):  # of a record of version 1
        return coded
    if not isinstance(coded, dict) or coded.keys() != {"code", "data"} or not isinstance(coded["data"], dict):
        raise RecordError(f"{where}: expected code and data, got {shown(coded)}")
    code, data = _scalar(str, coded["code"], where), _plain(coded["data"], f"{where}.data")
    try:
        return Reason.of(code, **data)
    except ValueError:
        return Reason.of("said", text=sentence)


def _from_version_1(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document as version 2 has it; what is wrong with it stays for the reader to find."""
    document = {**document, "schema_version": 2}
    for section, name in (("validity", "invalid_reasons"), ("validity", "warnings"), ("window", "gap_end_reason")):
        values = document.get(section)
        if isinstance(values, dict) and values.get(name) is not None:
            document[section] = {**values, name + _CODED: _recognised(values[name])}
    return document


def _recognised(sentences: Any) -> Any:
    if isinstance(sentences, list):
        return [_recognised(item) for item in sentences]
    return recognise(sentences if isinstance(sentences, str) else "")


@functools.cache
def _scalars(kind: Any) -> Mapping[str, tuple[type[Any], ...]]:
    """Per field the types of values that are as they should be; the rest is looked at closely."""
    return {name: _scalars_of(hint) for name, hint in _hints(kind).items()}


def _scalars_of(hint: Any) -> tuple[type[Any], ...]:
    is_optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if is_optional else (hint,)
    return tuple(kind for kind in kinds if kind in (str, bool, int, float, types.NoneType))


def _is_finite(value: Any) -> bool:
    return type(value) is not float or math.isfinite(value)


def _check_names(where: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        parts = [f"missing {', '.join(sorted(expected - found))}"] * bool(expected - found)
        parts += [f"unknown {', '.join(map(shown, sorted(found - expected)[:5]))}"] * bool(found - expected)
        raise RecordError(f"{where}: {'; '.join(parts)}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the declared type `hint` wants it."""
    origin = typing.get_origin(hint)
    if origin is types.UnionType or origin is typing.Union:
        if value is None:
            return None
        (inner,) = (item for item in typing.get_args(hint) if item is not type(None))
        return _convert(inner, value, where)
    if dataclasses.is_dataclass(hint):
        return _decode_section(hint, value, where)
    if hint is Any:
        return _plain(value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise RecordError(f"{where}: a list is due, got {shown(value)}")
        return tuple(_convert(typing.get_args(hint)[0], item, where) for item in value)
    if origin is not None:  # Mapping[…]
        if not isinstance(value, dict):
            raise RecordError(f"{where}: an object is due, got {shown(value)}")
        inner = typing.get_args(hint)[1]
        return {key: _convert(inner, item, f"{where}.{key}") for key, item in value.items()}
    return _scalar(hint, value, where)


def _scalar(kind: type[Any], value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise RecordError(f"{where}: a finite number is due, got {shown(value)}") from error
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecordError(f"{where}: {kind.__name__} is due, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"{where}: a finite number is due, got {value}")
    return value


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON values."""
    if isinstance(value, Reason):
        return value.text
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RecordError(f"{where}: a finite number is due, got {value}")
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise RecordError(f"{where}: {type(value).__name__} has no form in JSON")
