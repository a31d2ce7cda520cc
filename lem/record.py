"""The result record: what `result.json` holds, shared by the worker that writes it and the host that reads it.

A value that was not measured is None and has a reason in `null_reasons` of its section; zero is only ever observed.
`lem.record_codec` writes and reads it.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from lem.measurement import SLOWDOWN_MASK, EnergySource, is_estimate
from lem.reasons import Reason

__all__ = [
    "CONFIG_FILE",
    "LOG_FILE",
    "OBSERVATIONS_NEEDED",
    "OUTPUTS_FILE",
    "PROMPTS_FILE",
    "RESULT_FILE",
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
    "Measured",
    "Record",
    "ResultKey",
    "Throughput",
    "Validity",
    "Window",
    "Work",
    "parts_of_source",
]

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
