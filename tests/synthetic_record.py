"""The record of a synthetic attempt, its figures consistent with each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lem.meters.samples import GpuHeader
from lem.record import (
    Carbon,
    Compute,
    Efficiency,
    Energy,
    Environment,
    Gpu,
    Identity,
    Idle,
    Record,
    Throughput,
    Validity,
    Window,
    Work,
)
from tests.records import NO_SLO, NO_TOKEN_TIMES, completed, make_environment, make_latency, reasons, sentences
from tests.synthetic_log import EVENT_POWER_CAP, EVENT_THERMAL

_IDLE_BARE_W = 70.0
_IDLE_LOADED_W = 90.0
_INPUT_TOK = 256
_ENGINE = {"pytorch": ("transformers", "5.23.0"), "vllm": ("vllm", "0.32.0"), "tensorrt": ("tensorrt_llm", "1.2.0")}
_LOAD_S = {"pytorch": 18.0, "vllm": 42.0, "tensorrt": 60.0}
_NO_METER = "no energy meter could be used"


@dataclass(frozen=True)
class Configuration:
    """One configuration and what is true of it."""

    name: str
    backend: str = "vllm"
    model: str = "meta-llama/Llama-3.1-8B-Instruct"
    precision: str = "bfloat16"
    batch_size: int = 32  # the backend's own option for it
    options: Mapping[str, Any] = field(default_factory=dict)  # more options, as a file would have them
    energy_per_output_tok_j: float | None = 0.3  # gross, of all GPUs; None when no meter could be used
    energy_source: str = "nvml_counter"  # as in the record; `tdp_estimate` is an estimate
    output_tok_per_s: float = 1800.0
    e2e_s: float = 2.5
    ttft_s: float | None = None  # median; None when token times were not observed
    # By cycle, how many attempts were invalid before the one that counts; 2 leaves none that does.
    invalid_attempts: Mapping[int, int] = field(default_factory=dict)
    throttled_cycles: tuple[int, ...] = ()  # whose first attempt was slowed by heat, and is invalid
    failed_cycles: tuple[int, ...] = ()  # without a result, with the error `error`
    error: str = "CUDA out of memory: tried to allocate 24.0 GiB"
    capped_ratio: float = 0.0  # share of the window at the power limit, which is no fault
    is_steady: bool = True  # False for windows whose halves differ
    output_tok_ratio: float = 1.0  # of `max_output_tokens`; under 1 the engine ended some answers itself
    prompts: str | None = None  # SHA-256 of its own prompts; None for those of the campaign
    warnings: tuple[str, ...] = ()  # of each of its results
    engine_version: str | None = None  # None: the usual one


@dataclass(frozen=True)
class Run:
    """One attempt: what it saw, and the record that follows from it."""

    identity: Identity
    configuration: Configuration
    requested: Mapping[str, Any]
    energy_per_output_tok_j: float | None
    output_tok_per_s: float
    is_valid: bool
    is_throttled: bool
    load_id: str
    is_engine_reused: bool
    gpus: Sequence[GpuHeader]
    prompts: str  # their SHA-256
    requests: int
    least_window_s: float

    @cached_property
    def record(self) -> Record:
        """Whole repeats of the prompt set that fill the window at the configuration's true speed."""
        requested, configuration = self.requested, self.configuration
        limit = requested["max_output_tokens"]
        each = max(round(self.requests * limit * configuration.output_tok_ratio), 1)
        repeats = math.ceil(self.least_window_s * configuration.output_tok_per_s / each)
        requests, output_tok = self.requests * repeats, each * repeats
        input_tok, window_s = _INPUT_TOK * requests, output_tok / self.output_tok_per_s
        total_tok = input_tok + output_tok
        energy_j = None if self.energy_per_output_tok_j is None else self.energy_per_output_tok_j * output_tok
        source = {"kind": "synthetic", "name": "synthetic", "sha256": self.prompts, "count": self.requests}
        slower, ttft_s = configuration.output_tok_per_s / self.output_tok_per_s, configuration.ttft_s
        tpot_s = None if ttft_s is None else slower * (configuration.e2e_s - ttft_s) / max(limit - 1, 1)
        ttft_s = None if ttft_s is None else slower * ttft_s
        bare_w, loaded_w = _IDLE_BARE_W * len(self.gpus), _IDLE_LOADED_W * len(self.gpus)
        idle = Idle(None if self.is_engine_reused else bare_w, loaded_w, loaded_w, loaded_w, baseline_age_s=0.0)
        return completed(
            Record(
                identity=self.identity,
                validity=self._validity(window_s),
                window=self._window(window_s, repeats),
                energy=self._energy(energy_j, window_s),
                gpus=tuple(self._gpu(gpu, energy_j, window_s) for gpu in self.gpus),
                idle=reasons(Idle(), _NO_METER) if energy_j is None else reasons(idle, "the engine was loaded already"),
                work=reasons(Work(requests, 0, input_tok, output_tok, 0, "engine_ids", source), NO_SLO),
                throughput=reasons(
                    Throughput(self.output_tok_per_s, total_tok / window_s, requests / window_s), NO_TOKEN_TIMES
                ),
                latency=make_latency(requests, output_tok, ttft_s, tpot_s, configuration.e2e_s * slower),
                compute=Compute(
                    2 * 7.5e9 * total_tok, "2 x parameters x tokens", "medium", 8_030_261_248, 60 << 30, 8_030_261_248
                ),
                efficiency=Efficiency(),
                carbon=Carbon(),
                environment=self._environment(),
                requested=requested,
            )
        )

    def _throttled_s(self, window_s: float) -> float:
        return 0.3 * window_s if self.is_throttled else 0.0

    def _validity(self, window_s: float) -> Validity:
        why = "another process used the GPU during the window"
        if self.is_throttled:
            slowed_s = self._throttled_s(window_s)
            why = f"{self.gpus[0].uuid}: thermal slowdown for {slowed_s:.1f} s of the window"
        return Validity(
            valid=self.is_valid,
            invalid_reasons=() if self.is_valid else sentences(why),
            warnings=sentences(*self.configuration.warnings),
            warmup_converged=True,
            steady=self.configuration.is_steady,
            engine_reused=self.is_engine_reused,
            engine_load_id=self.load_id,
        )

    def _window(self, window_s: float, repeats: int) -> Window:
        load_s = None if self.is_engine_reused else _LOAD_S[self.configuration.backend]
        (gap_end_reason,) = sentences("temperature and power are back")
        section = Window("closed_batch", window_s, repeats, 5.0, 8, load_s, None, 12.0, gap_end_reason, 8.0, 8, 0.1)
        nothing, loaded = sentences(
            "nothing was compiled for this experiment", f"the engine was loaded before (load {self.load_id})"
        )
        null_reasons = {"compile_s": nothing, **({} if load_s is not None else {"load_s": loaded})}
        return dataclasses.replace(section, null_reasons=null_reasons)

    def _energy(self, energy_j: float | None, window_s: float) -> Energy:
        source = self.configuration.energy_source
        if energy_j is None:
            return reasons(Energy(), _NO_METER)
        if source in ("rapl", "tdp_estimate"):
            measured = Energy(cpu_package_energy_j=energy_j, energy_source=source, energy_scope="cpu_package")
            return reasons(measured, "no GPU was used")
        measured = Energy(
            gpu_energy_j=energy_j,
            gpu_energy_net_j=energy_j - _IDLE_LOADED_W * len(self.gpus) * window_s,
            energy_source=source,
            energy_scope="gpu",
            energy_crosscheck_ratio=1.004,
            counter_update_period_s=0.1,
            sample_gap_max_s=0.11,
        )
        return reasons(measured, "not measured")

    def _gpu(self, gpu: GpuHeader, energy_j: float | None, window_s: float) -> Gpu:
        if energy_j is None:
            return reasons(Gpu(gpu.uuid, gpu.name), _NO_METER)
        each_j = energy_j / len(self.gpus)
        capped_s, throttled_s = self.configuration.capped_ratio * window_s, self._throttled_s(window_s)
        warmer_c = 12.0 if self.is_throttled else 0.0
        found = Gpu(
            uuid=gpu.uuid,
            name=gpu.name,
            energy_j=each_j,
            power_mean_w=each_j / window_s,
            power_max_w=1.03 * each_j / window_s,
            power_limit_w=gpu.power_limit_w,
            temp_start_c=41.0,
            temp_end_c=66.0 + warmer_c,
            temp_max_c=68.0 + warmer_c,
            sm_clock_mean_hz=1.7e9 if self.is_throttled else 1.98e9,
            throttle_power_s=capped_s,
            throttle_thermal_s=throttled_s,
            event_reasons_mask=EVENT_POWER_CAP * bool(capped_s) | EVENT_THERMAL * bool(throttled_s),
            util_mean_ratio=0.98,
            mem_peak_b=60 << 30,
            persistence_mode=gpu.persistence_mode,
            mig_mode=gpu.mig_mode,
        )
        return reasons(found, "not told by this driver")

    def _environment(self) -> Environment:
        engine, usual = _ENGINE[self.configuration.backend]
        version = self.configuration.engine_version or usual
        section = dataclasses.replace(
            make_environment(),
            engine_name=engine,
            engine_version=version,
            versions={"python": "3.11.7", "torch": "2.13.0", engine: version, "driver": self.gpus[0].driver},
            device="cuda:0",
            gpu_uuids=tuple(gpu.uuid for gpu in self.gpus),
            vbios=tuple(gpu.vbios or "" for gpu in self.gpus),
            model_revision="5206a32e0bd3067aef1ce90f5528ade7d866253f",
            other_gpu_processes=(),
            engine_effective={"fp_precision": self.configuration.precision},
            governor="performance",
            null_reasons={},
        )
        return reasons(section, "no container")
