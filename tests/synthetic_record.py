"""The record of a synthetic attempt, its figures consistent with each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lem.base.reasons import Reason
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
    Latency,
    Record,
    Throughput,
    Validity,
    Window,
    Work,
)
from tests.records import make_distribution, make_environment, reasons, told
from tests.synthetic_log import EVENT_POWER_CAP, EVENT_THERMAL

if TYPE_CHECKING:
    from tests.synthetic_campaign import Configuration

__all__ = ["Run", "make_run_record"]

_IDLE_BARE_W = 70.0
_IDLE_LOADED_W = 90.0
_INPUT_TOK = 256
_ENGINE = {"pytorch": ("transformers", "5.23.0"), "vllm": ("vllm", "0.32.0"), "tensorrt": ("tensorrt_llm", "1.2.0")}
_NO_METER = "no energy meter could be used"


@dataclass(frozen=True)
class Run:
    """One attempt: what it saw, and its record once `make_run_record` has made it."""

    identity: Identity
    configuration: Configuration
    requested: Mapping[str, Any]
    energy_per_output_tok_j: float | None
    output_tok_per_s: float
    is_valid: bool
    is_throttled: bool
    load_id: str
    is_engine_reused: bool
    load_s: float
    gpus: Sequence[GpuHeader]
    prompts: str
    requests: int
    output_tok_per_request: int
    window_s: float
    made: Record | None = None

    @property
    def record(self) -> Record:
        """What was made."""
        assert self.made is not None
        return self.made


def make_run_record(run: Run) -> Run:
    """The run with its record."""
    output_tok, repeats = _work_of(run)
    window_s = output_tok / run.output_tok_per_s
    return dataclasses.replace(run, made=_Maker(run, output_tok, repeats, window_s).record())


def _work_of(run: Run) -> tuple[int, int]:
    """Tokens of whole repeats of the prompt set that fill the window at the configuration's true speed."""
    each = max(round(run.requests * run.output_tok_per_request * run.configuration.output_tok_ratio), 1)
    repeats = math.ceil(run.window_s * run.configuration.output_tok_per_s / each)
    return each * repeats, repeats


@dataclass(frozen=True)
class _Maker:
    run: Run
    output_tok: int
    repeats: int
    window_s: float

    def record(self) -> Record:
        run = self.run
        return Record(
            identity=run.identity,
            validity=self._validity(),
            window=self._window(),
            energy=self._energy(),
            gpus=self._gpus(),
            idle=self._idle(),
            work=Work(
                self._requests,
                0,
                self._input_tok,
                self.output_tok,
                0,
                "engine_ids",
                {"kind": "synthetic", "name": "synthetic", "sha256": run.prompts, "count": run.requests},
            ),
            throughput=Throughput(
                run.output_tok_per_s,
                (self.output_tok + self._input_tok) / self.window_s,
                self._requests / self.window_s,
            ),
            latency=self._latency(),
            compute=Compute(
                2 * 7.5e9 * (self.output_tok + self._input_tok),
                "2 x parameters x tokens",
                "medium",
                8_030_261_248,
                60 << 30,
            ),
            efficiency=self._efficiency(),
            carbon=reasons(Carbon(), "no grid intensity was given"),
            environment=self._environment(),
            requested=run.requested,
        )

    @property
    def _requests(self) -> int:
        return self.run.requests * self.repeats

    @property
    def _input_tok(self) -> int:
        return _INPUT_TOK * self._requests

    @property
    def _energy_j(self) -> float | None:
        each = self.run.energy_per_output_tok_j
        return None if each is None else each * self.output_tok

    @property
    def _throttled_s(self) -> float:
        return 0.3 * self.window_s if self.run.is_throttled else 0.0

    def _validity(self) -> Validity:
        run = self.run
        invalid: tuple[str, ...] = ()
        if run.is_throttled and not run.is_valid:
            invalid = (f"{run.gpus[0].uuid}: thermal slowdown for {self._throttled_s:.1f} s of the window",)
        elif not run.is_valid:
            invalid = ("another process used the GPU during the window",)
        return Validity(
            valid=run.is_valid,
            invalid_reasons=told(*invalid),
            warnings=told(*run.configuration.warnings),
            warmup_converged=True,
            steady=run.configuration.is_steady,
            engine_reused=run.is_engine_reused,
            engine_load_id=run.load_id,
        )

    def _window(self) -> Window:
        load_s = None if self.run.is_engine_reused else self.run.load_s
        (gap_end_reason,) = told("temperature and power are back")
        section = Window("closed_batch", self.window_s, self.repeats, 5.0, 8, load_s, None, 12.0, gap_end_reason)
        return dataclasses.replace(
            section,
            null_reasons={
                "compile_s": Reason.of("nothing_compiled"),
                **({} if load_s is not None else {"load_s": Reason.of("engine_was_loaded", load_id=self.run.load_id)}),
            },
        )

    def _energy(self) -> Energy:
        source, energy_j = self.run.configuration.energy_source, self._energy_j
        if energy_j is None:
            return reasons(Energy(), _NO_METER)
        if source in ("rapl", "tdp_estimate"):
            measured = Energy(cpu_package_energy_j=energy_j, energy_source=source, energy_scope="cpu_package")
            return reasons(measured, "no GPU was used")
        measured = Energy(
            gpu_energy_j=energy_j,
            gpu_energy_net_j=energy_j - _IDLE_LOADED_W * len(self.run.gpus) * self.window_s,
            energy_source=source,
            energy_scope="gpu",
            energy_crosscheck_ratio=1.004,
            counter_update_period_s=0.1,
            sample_gap_max_s=0.11,
        )
        return reasons(measured, "not measured")

    def _gpus(self) -> tuple[Gpu, ...]:
        energy_j = self._energy_j
        if energy_j is None:
            return tuple(reasons(Gpu(gpu.uuid, gpu.name), _NO_METER) for gpu in self.run.gpus)
        each_j = energy_j / len(self.run.gpus)
        capped_s = self.run.configuration.capped_ratio * self.window_s
        warmer_c = 12.0 if self.run.is_throttled else 0.0
        return tuple(
            Gpu(
                uuid=gpu.uuid,
                name=gpu.name,
                energy_j=each_j,
                power_mean_w=each_j / self.window_s,
                power_max_w=1.03 * each_j / self.window_s,
                power_limit_w=gpu.power_limit_w,
                temp_start_c=41.0,
                temp_end_c=66.0 + warmer_c,
                temp_max_c=68.0 + warmer_c,
                sm_clock_mean_hz=1.7e9 if self.run.is_throttled else 1.98e9,
                throttle_power_s=capped_s,
                throttle_thermal_s=self._throttled_s,
                event_reasons_mask=EVENT_POWER_CAP * bool(capped_s) | EVENT_THERMAL * bool(self._throttled_s),
                util_mean_ratio=0.98,
                mem_peak_b=60 << 30,
                persistence_mode=gpu.persistence_mode,
                mig_mode=gpu.mig_mode,
            )
            for gpu in self.run.gpus
        )

    def _idle(self) -> Idle:
        if self._energy_j is None:
            return reasons(Idle(), _NO_METER)
        bare_w = None if self.run.is_engine_reused else _IDLE_BARE_W
        section = Idle(bare_w, _IDLE_LOADED_W, _IDLE_LOADED_W + 1, 0.0)
        return reasons(section, "the engine was loaded already")

    def _latency(self) -> Latency:
        configuration = self.run.configuration
        slower = configuration.output_tok_per_s / self.run.output_tok_per_s
        ttft_s = configuration.ttft_s
        tpot_s = (configuration.e2e_s - (ttft_s or 0)) / max(self.run.output_tok_per_request - 1, 1)
        is_observed = ttft_s is not None
        section = Latency(
            ttft_s=make_distribution(ttft_s * slower, self._requests) if ttft_s is not None else None,
            tpot_s=make_distribution(tpot_s * slower, self._requests) if is_observed else None,
            itl_s=make_distribution(tpot_s * slower, self.output_tok) if is_observed else None,
            e2e_s=make_distribution(configuration.e2e_s * slower, self._requests),
            queue_s=None,
        )
        return reasons(section, "the engine gave no time for each token")

    def _efficiency(self) -> Efficiency:
        each, energy_j = self.run.energy_per_output_tok_j, self._energy_j
        if each is None or energy_j is None:
            return reasons(Efficiency(), "no energy was measured")
        return Efficiency(each, energy_j / (self.output_tok + self._input_tok), energy_j / self._requests, 1 / each)

    def _environment(self) -> Environment:
        run = self.run
        engine, version = _ENGINE[run.configuration.backend]
        driver = run.gpus[0].driver
        section = dataclasses.replace(
            make_environment(),
            fingerprint="5f0c",
            engine_name=engine,
            engine_version=version,
            versions={"python": "3.11.7", "torch": "2.13.0", engine: version, "driver": driver},
            device="cuda:0",
            gpu_uuids=tuple(gpu.uuid for gpu in run.gpus),
            vbios=tuple(gpu.vbios or "" for gpu in run.gpus),
            model_revision="5206a32e0bd3067aef1ce90f5528ade7d866253f",
            other_gpu_processes=(),
            engine_effective={"fp_precision": run.configuration.precision},
            governor="performance",
            null_reasons={},
        )
        return reasons(section, "no container")
