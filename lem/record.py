"""The result record: what `result.json` holds, and how it is written and read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from lem.base import durable
from lem.base.codec import DecodeError, complete, decode, encode, shown
from lem.base.dataclass import dataclass, field, fields
from lem.base.measurement import SLOWDOWN_MASK, Distribution, Measured, Section, known, parts_of_source
from lem.base.reasons import Reason
from lem.base.units import JOULES_PER_WATT_HOUR
from lem.identities import violations

# The files of an attempt, beside its sample log (lem/meters/samples.py).
RESULT_FILE = "result.json"
CONFIG_FILE = "config.json"
PROMPTS_FILE = "prompts.jsonl"
OUTPUTS_FILE = "outputs.jsonl"
LOG_FILE = "log.txt"
TEMPLATE_FILE = "chat_template.jinja"


ResultKey = tuple[str, str, str, int, int]
"""What no two results share: run, host, experiment, cycle, attempt."""

_NOT_RECORDED = Reason.of("not_recorded")
_J_PER_KWH = 1000 * JOULES_PER_WATT_HOUR


@dataclass(frozen=True)
class Identity:
    experiment_id: str  # one configuration in one cycle; names the folder
    config_name: str  # the configuration, for people
    config_hash: str  # and for programs
    campaign_id: str
    campaign_name: str
    run_id: str
    host: str
    backend: str
    model: str
    cycle_index: int  # from 0
    order_index: int  # from 0
    attempt: int  # from 1
    shuffle_seed: int | None  # None when the order was not shuffled
    start_utc: str
    lem_version: str
    node: str = ""  # the machine that measured, which need not be the plan's host; empty in results of older builds

    @property
    def machine(self) -> str:
        """One node of a host, which may move from one to another; unique in a run."""
        return self.host if self.node in ("", self.host) else f"{self.host} on {self.node}"

    @property
    def key(self) -> ResultKey:
        return (self.run_id, self.host, self.experiment_id, self.cycle_index, self.attempt)

    @property
    def null_reasons(self) -> Mapping[str, Reason]:
        return {} if self.shuffle_seed is not None else {"shuffle_seed": Reason.of("not_shuffled")}


@dataclass(frozen=True)
class Validity(Section):
    valid: bool
    invalid_reasons: tuple[Reason, ...]
    warnings: tuple[Reason, ...]
    warmup_converged: bool | None
    steady: bool | None
    engine_reused: bool
    engine_load_id: str


@dataclass(frozen=True)
class Window(Section):
    traffic_mode: str  # `closed_batch`, `poisson`, `constant`, `closed`, or `program`
    window_s: float
    window_repeats: int  # runs of the prompt set; under traffic, requests completed over prompts, rounded down
    warmup_s: float | None
    warmup_prompts: int
    load_s: float | None
    compile_s: float | None
    gap_s: float | None  # the gap before this experiment
    gap_end_reason: Reason | None
    in_flight_mean: float | None = None  # requests that the engine worked on at once, over the time of the window
    in_flight_peak: int | None = None
    fill_drain_ratio: float | None = None  # share of the window with fewer than 90 % of the peak


@dataclass(frozen=True)
class Energy(Section):
    """Energy of the window in joules, gross; net is gross less `Idle.idle_net_power_w` over the same time."""

    gpu_energy_j: float | None = None
    gpu_energy_net_j: float | None = None
    cpu_package_energy_j: float | None = None
    dram_energy_j: float | None = None
    external_energy_j: float | None = None  # by a meter of the user's own, for instance at the machine's plug
    sensor_energy_j: float | None = None  # by hwmon sensors of a module, of CPUs or of the machine
    load_energy_j: float | None = None
    warmup_energy_j: float | None = None
    prefill_energy_j: float | None = None
    decode_energy_j: float | None = None
    phase_method: str | None = None
    energy_source: str | None = None  # an `EnergySource`: the meter of `primary_j`; None when that is absent
    energy_scope: str | None = None  # an `EnergyScope`: what that meter covers
    energy_sensor: str | None = None  # the name of that meter's sensor, where the kernel has one (hwmon)
    sensor_interval_s: float | None = None  # the time over which it averages power, as its driver says
    energy_crosscheck_ratio: float | None = None  # integrated power over the counter's energy
    counter_update_period_s: float | None = None
    counter_lag_s: float | None = None  # by how much later than it was drawn the counter shows energy
    sample_gap_max_s: float | None = None
    energy_uncertainty_j: float | None = None  # standard (k = 1), of `primary_j`; without the spread of cycles
    uncertainty_budget_j: Mapping[str, float] | None = None  # it by cause, which add up as squares
    net_uncertainty_j: float | None = None  # the same of `gpu_energy_net_j`
    net_uncertainty_budget_j: Mapping[str, float] | None = None

    @property
    def total_j(self) -> float | None:
        """`primary_j` as a field, for metrics."""
        return self.primary_j.value

    def why_none(self, name: str) -> Reason:
        return (self.primary_j.null_reason if name == "total_j" else None) or super().why_none(name)

    @property
    def source(self) -> str | None:
        """That of `primary_j`; None when that is absent."""
        first = next(iter(parts_of_source(self.energy_source or "")), None)
        return None if first is None or getattr(self, first) is None else self.energy_source

    @property
    def primary_j(self) -> Measured[float]:
        """The energy that counts, in joules: efficiency, carbon and everything shown to people use this one."""
        if self.energy_source is None:
            return known(None, self.why_none("energy_source"))
        parts = parts_of_source(self.energy_source)
        if not parts:
            return known(None, "unknown_source", source=self.energy_source)
        values = [getattr(self, name) for name in parts]
        if values[0] is None:
            return known(None, self.why_none(parts[0]))
        total_j = sum(value for value in values if value is not None)
        return Measured(total_j, None, self.energy_source, self.energy_scope)


@dataclass(frozen=True)
class Gpu(Section):
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
    slowdown_min_s: float | None = None  # the shortest slowdown that is surely seen between two samples
    event_reasons_mask: int | None = None
    util_mean_ratio: float | None = None
    mem_peak_b: int | None = None
    persistence_mode: bool | None = None
    mig_mode: bool | None = None
    # Settings, as found before the experiment; see `lem.meters.machine.GpuSettings`.
    power_limit_default_w: float | None = None
    power_limit_set_w: float | None = None
    sm_clock_max_hz: float | None = None
    sm_clock_app_hz: float | None = None
    clocks_set: bool | None = None  # a setting (application or locked clocks) limited its clocks in the window
    ecc_mode: bool | None = None
    pcie_gen: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    nvlinks: int | None = None
    numa_node: int | None = None

    @property
    def was_slowed(self) -> bool:
        return bool(self.throttle_thermal_s) or bool((self.event_reasons_mask or 0) & SLOWDOWN_MASK)


@dataclass(frozen=True)
class Machine(Section):
    governor: str | None = None
    turbo: bool | None = None
    smt: bool | None = None
    numa_nodes: int | None = None
    load_1min: float | None = None
    ambient_temp_c: float | None = None


@dataclass(frozen=True)
class Interference(Section):
    wait_ratio: float | None = None  # of the time its threads were ready or ran: without a CPU
    wait_by_others_ratio: float | None = None  # the same without the competition of its own threads
    foreign_ratio: float | None = None  # CPU time of programs other than the engine and lem, of all busy CPU time
    steal_ratio: float | None = None  # CPU time that the hypervisor gave to others, of all
    throttled_s: float | None = None  # a CPU limit of its cgroup held threads back, summed over CPUs
    stopped_s: float | None = None  # a process of the engine was stopped, or its container paused
    suspended_s: float | None = None  # the machine was
    sampler_pause_max_s: float | None = None  # the longest time without any reading, its edges included


@dataclass(frozen=True)
class Idle(Section):
    """Power at rest: before the load, with the engine loaded, and loaded after the window."""

    idle_bare_power_w: float | None = None
    idle_loaded_power_w: float | None = None
    idle_loaded_post_power_w: float | None = None
    idle_net_power_w: float | None = None  # that net energy leaves out: the mean of loaded before and, if read, after
    idle_bare_temp_c: float | None = None  # mean of the hottest GPU, where it was measured in this experiment
    idle_loaded_temp_c: float | None = None
    baseline_age_s: float | None = None  # how long before this experiment loaded idle was measured; 0 when in it


@dataclass(frozen=True)
class Work(Section):
    """What was done in the window. Tokens are counted from ids; padding is never input."""

    requests_ok: int | None  # None, as the next three, for a program that does not report it
    requests_failed: int | None
    input_tok: int | None
    output_tok: int | None
    padding_tok: int | None  # padding that the engine computed beside the input
    # `engine_ids`, `retokenized`, or as a server (`usage`; `chunks` if it reports none) or a measured program
    # (`program`) reports; None without a completed request of a server.
    token_source: str | None
    prompt_source: Mapping[str, Any]  # where the prompts came from: kind, revision, sha256, count, and the draw
    requests_good: int | None = None  # completed requests that met `traffic_simulation.slo`
    output_ids_sha256: str | None = None  # of the file with them, which `measurement.agreement` keeps

    @property
    def why_uncounted(self) -> Reason | None:
        """Why a program's work is not known; None where it is."""
        whys = filter(None, map(self.null_reasons.get, ("output_tok", "input_tok", "requests_ok")))
        # A file that tells nothing comes before what was not asked for.
        return min(whys, key=lambda why: why.code == "work_not_given", default=None)

    @property
    def tried(self) -> int:
        return (self.requests_ok or 0) + (self.requests_failed or 0)

    @property
    def total_tok(self) -> int | None:
        return None if self.input_tok is None or self.output_tok is None else self.input_tok + self.output_tok


@dataclass(frozen=True)
class Throughput(Section):
    output_tok_per_s: float | None
    total_tok_per_s: float | None
    requests_per_s: float | None
    good_requests_per_s: float | None = None  # goodput
    good_requests_ratio: float | None = None  # of all requests, failed ones included
    tok_per_step: float | None = None  # tokens of a request in one step of the engine, its first step left out
    draft_accepted_ratio: float | None = None  # accepted draft tokens over `num_tokens` of every step


@dataclass(frozen=True)
class Latency(Section):
    """Latencies in seconds; a token time that was not observed makes None.

    TPOT = (e2e - ttft) / (output_tok - 1), one for each request. ICL is the time between successive chunks of a
    request, where a chunk is what one step of the engine gave it: one token or several.
    """

    ttft_s: Distribution | None
    tpot_s: Distribution | None
    e2e_s: Distribution | None
    queue_s: Distribution | None
    icl_s: Distribution | None = None
    itl_s: Distribution | None = None  # read only: until version 2, the time between tokens, 0 within a chunk


@dataclass(frozen=True)
class Compute(Section):
    flops_total: float | None
    flops_method: str | None
    flops_confidence: str | None
    model_parameters: int | None
    peak_memory_b: int | None
    active_parameters: int | None = None  # of them, those that a token uses: of a mixture of experts, some experts


@dataclass(frozen=True)
class Efficiency(Section):
    energy_per_output_tok_j: float | None = None
    energy_per_total_tok_j: float | None = None
    energy_per_request_j: float | None = None
    energy_per_good_request_j: float | None = None
    output_tok_per_j: float | None = None


@dataclass(frozen=True)
class Carbon(Section):
    """Emissions and cost, from values the user gave and nothing else."""

    grid_g_per_kwh: float | None = None
    pue: float | None = None
    price_per_kwh: float | None = None
    co2e_g: float | None = None
    cost: float | None = None


RATES = ("grid_g_per_kwh", "pue", "price_per_kwh")


def carbon_of(energy_j: Measured[float], rates: Any) -> Carbon:
    """Emissions and cost of the window's energy, by the `RATES` of a `measurement` or another `Carbon`."""
    # co2e_g = kWh × PUE × g/kWh, and the cost likewise. Without a PUE there is neither: 1 would be a claim about the
    # user's site.
    given = {name: known(getattr(rates, name), "option_not_given", option=f"measurement.{name}") for name in RATES}
    pue = known(rates.pue, "pue_not_given")

    def at(rate: Measured[float]) -> Measured[float]:
        for item in (energy_j, pue, rate):
            if item.value is None:
                return Measured(None, item.null_reason)
        return Measured((energy_j.value or 0.0) / _J_PER_KWH * (pue.value or 0.0) * (rate.value or 0.0))

    return Carbon.of(**given, co2e_g=at(given["grid_g_per_kwh"]), cost=at(given["price_per_kwh"]))


@dataclass(frozen=True)
class Environment(Section):
    fingerprint: str  # over the parts that make two runs incomparable (image, engine, driver, GPU UUIDs)
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
    versions: Mapping[str, str]  # {"python": …, "torch": …, "driver": …}
    device: str
    gpu_uuids: tuple[str, ...]
    vbios: tuple[str, ...] | None
    model_revision: str | None
    weights_sha256: str | None
    other_gpu_processes: tuple[str, ...] | None
    engine_effective: Mapping[str, Any]  # the engine configuration found at load
    engine_differs: Mapping[str, Any]  # {option: [requested, effective]} where they differ


@dataclass(frozen=True)
class Record:
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
    interference: Interference = field(default_factory=lambda: Interference.absent(_NOT_RECORDED))
    machine: Machine = field(default_factory=lambda: Machine.absent(_NOT_RECORDED))
    served: Mapping[str, Any] = field(default_factory=dict)  # of a server: what its client and it itself report

    @classmethod
    def lazily(cls, load: Callable[[str], Any]) -> Record:
        record = object.__new__(cls)
        record.__dict__["_load"] = load
        return record

    def with_sections(self, **others: Any) -> Record:
        return Record.lazily(lambda name: others[name] if name in others else self.section(name))

    def section(self, name: str) -> Any:
        """The section, which the record does not keep: of thousands of them, all would fill the memory."""
        found = vars(self)
        return found[name] if name in found else found["_load"](name)


class _LateSection:
    """Makes a section of a lazy record when it is first asked for, in a third of the time of `__getattr__`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, record: Record | None, owner: type[Record]) -> Any:
        if record is None:
            return self
        found, name = record.__dict__, self._name
        found[name] = section = found["_load"](name)
        return section


for _field in fields(Record):
    setattr(Record, _field.name, _LateSection(_field.name))


SCHEMA_VERSION = 5

ITL_REPLACED = Reason.of("itl_replaced")
_NO_ITL: Final = {
    "itl_s": None,
    "itl_s_null_reason": ITL_REPLACED.text,
    "itl_s_null_reason_coded": {"code": ITL_REPLACED.code, "data": {}},
}


class RecordError(ValueError):
    """A document that is not a whole record of this schema."""


def encode_record(record: Record) -> dict[str, Any]:
    try:
        document = {"schema_version": SCHEMA_VERSION, **encode(record, "")}
    except DecodeError as error:
        raise RecordError(str(error)) from error
    latency = document["latency"]
    if record.latency.null_reasons.get("itl_s") == ITL_REPLACED:  # no longer written
        document["latency"] = {key: item for key, item in latency.items() if not key.startswith("itl_s")}
    decode_record(document)  # The writer knows best what to do about a wrong type, so it meets it, not the reader.
    return document


def decode_record(document: Any) -> Record:
    if not isinstance(document, dict):
        raise RecordError("a record is a JSON object")
    version = document.get("schema_version")
    values = {name: value for name, value in document.items() if name != "schema_version"}
    if isinstance(version, bool) or version not in range(1, SCHEMA_VERSION + 1):
        raise RecordError(f"schema_version is {shown(version)}, this lem reads 1 to {SCHEMA_VERSION}")
    # Version 1 has sentences without their codes; later ones have more fields, but since version 3 no `itl_s`.
    if isinstance(latency := values.get("latency"), dict) and "itl_s" not in latency:
        values["latency"] = {**latency, **_NO_ITL}
    try:
        whole = values if version == SCHEMA_VERSION else complete(Record, values, _NOT_RECORDED)
        record = decode(Record, whole, "")
        violated = next(violations(record), None)
    except DecodeError as error:
        raise RecordError(str(error)) from error
    if violated is not None:
        raise RecordError(violated)
    return record


def write_record(path: Path, record: Record) -> None:
    durable.write_json(path, encode_record(record))


def read_record(path: Path) -> Record:
    return read_with_digest(path)[0]


def read_with_digest(path: Path) -> tuple[Record, str]:
    data = durable.read_bytes(path)
    return parse_record(data), hashlib.sha256(data).hexdigest()


def parse_record(data: bytes) -> Record:
    try:
        document = durable.parse_json(data)
    except ValueError as error:
        raise RecordError(f"not JSON: {error}") from error
    try:
        return decode_record(document)
    except RecursionError as error:
        raise RecordError("not a record: nested too deeply") from error
