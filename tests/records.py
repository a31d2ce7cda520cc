"""Whole result records for tests, as the worker would leave them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from lem.base.codec import recognise
from lem.base.measurement import EnergySource, is_gpu_source
from lem.base.reasons import Reason
from lem.config.experiment import MeasurementConfig
from lem.meters.energy import EnergyFindings, carbon_of, efficiency_of
from lem.record import (
    Carbon,
    Compute,
    Distribution,
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

NO_METER = "no energy meter was used"
NO_GPU = "no GPU was used"
NO_TOKEN_TIMES = "the engine gave no time for each token"

CONFIG_HASH = "0123456789abcdef"


if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Section = TypeVar("_Section", bound="DataclassInstance")


def reasons(section: _Section, reason: str) -> _Section:
    """The section with the same reason for every value that is None."""
    names = [item.name for item in dataclasses.fields(section) if getattr(section, item.name) is None]
    return dataclasses.replace(section, null_reasons=dict.fromkeys(names, recognise(reason)))


def told(*sentences: str) -> tuple[Reason, ...]:
    """The reasons behind sentences, as those of a record of schema version 1 are read."""
    return tuple(map(recognise, sentences))


def codes(found: Iterable[Reason]) -> list[str]:
    """The codes of reasons."""
    return [item.code for item in found]


def make_record(
    *,
    config_name: str = "small",
    config_hash: str = CONFIG_HASH,
    cycle: int = 0,
    order: int | None = None,
    attempt: int = 1,
    run_id: str = "20260714T100000Z-3fa1",
    host: str = "lab1",
    is_valid: bool = True,
    invalid_reasons: tuple[str, ...] = (),
    warnings: tuple[str, ...] = (),
    load_id: str | None = None,
    output_tok_per_s: float | None = 100.0,
    energy_per_output_tok_j: float | None = None,
    energy_source: str = EnergySource.COUNTER.value,
    e2e_p50_s: float = 0.25,
    ttft_p50_s: float | None = None,
    n_requests: int = 8,
    requested: Mapping[str, Any] | None = None,
    model: str = "/srv/models/tiny-llama",
) -> Record:
    """A record of one attempt on a CPU without an energy meter; `cycle` is from 0."""
    return Record(
        identity=Identity(
            experiment_id=f"{config_hash[:12]}-c{cycle + 1}",
            config_name=config_name,
            config_hash=config_hash,
            campaign_id="fe01ce2a",
            campaign_name="demo",
            run_id=run_id,
            host=host,
            backend="pytorch",
            model=model,
            cycle_index=cycle,
            order_index=cycle if order is None else order,
            attempt=attempt,
            shuffle_seed=None,
            start_utc="2026-07-14T10:00:00.000000Z",
            lem_version="0.1.0",
        ),
        validity=Validity(
            valid=is_valid,
            invalid_reasons=told(*invalid_reasons),
            warnings=told(*warnings),
            warmup_converged=True,
            steady=True,
            engine_reused=False,
            engine_load_id=f"{run_id}-{config_hash}-{cycle}-{attempt}" if load_id is None else load_id,
        ),
        window=reasons(
            Window("closed_batch", 10.0, 3, 1.5, 5, 0.8, None, 0.4, recognise("temperature and power are back")),
            "nothing was compiled for this experiment",
        ),
        energy=_energy(energy_per_output_tok_j, energy_source),
        gpus=(),
        idle=reasons(Idle(), NO_METER),
        work=Work(n_requests, 0, 512, 1000, 12, "engine_ids", {"kind": "synthetic", "count": n_requests}),
        throughput=reasons(
            Throughput(output_tok_per_s, None if output_tok_per_s is None else 1.5 * output_tok_per_s, 0.8),
            "the window holds no output",
        ),
        latency=reasons(
            Latency(
                ttft_s=None if ttft_p50_s is None else make_distribution(ttft_p50_s, n_requests),
                tpot_s=None,
                itl_s=None,
                e2e_s=make_distribution(e2e_p50_s, n_requests),
                queue_s=None,
            ),
            NO_TOKEN_TIMES,
        ),
        compute=reasons(Compute(2e12, "2 x parameters x tokens", "estimate", 25_000_000, None), NO_GPU),
        efficiency=_efficiency(energy_per_output_tok_j),
        carbon=reasons(Carbon(), "no grid intensity was given"),
        environment=make_environment(),
        requested={"fp_precision": "float32", "max_output_tokens": 32} if requested is None else requested,
        extra_metadata={"note": "Grüße"},
    )


def with_measured(record: Record, found: EnergyFindings, measurement: MeasurementConfig | None = None) -> Record:
    """The record with the sections that the meters fill, as `compose_record` fills them."""
    return dataclasses.replace(
        record,
        energy=found.energy,
        gpus=found.gpus,
        idle=found.idle,
        validity=dataclasses.replace(
            record.validity,
            valid=not found.invalid_reasons,
            invalid_reasons=found.invalid_reasons,
            warnings=found.warnings,
        ),
        efficiency=efficiency_of(found.energy.primary_j, record.work),
        carbon=carbon_of(found.energy.primary_j, measurement or MeasurementConfig()),
        environment=dataclasses.replace(record.environment, gpu_uuids=tuple(gpu.uuid for gpu in found.gpus)),
    )


def make_distribution(p50: float, n: int) -> Distribution:
    """A distribution around a median, with the percentiles that `n` observations allow."""
    return Distribution(
        mean=1.1 * p50,
        p50=p50,
        p90=1.5 * p50 if n >= 10 else None,
        p95=1.7 * p50 if n >= 20 else None,
        p99=2.0 * p50 if n >= 100 else None,
        n=n,
    )


def make_environment() -> Environment:
    """The environment of a machine without a GPU."""
    return Environment(
        fingerprint="5f0c",
        executor="local",
        os="Debian GNU/Linux 12",
        kernel="6.1.0",
        cpu="x86-64",
        cpu_count=2,
        memory_b=8 << 30,
        governor=None,
        image=None,
        engine_name="transformers",
        engine_version="5.23.0",
        versions={"python": "3.11.7", "torch": "2.13.0"},
        device="cpu",
        gpu_uuids=(),
        vbios=None,
        model_revision=None,
        weights_sha256="ab" * 32,
        other_gpu_processes=None,
        engine_effective={"attn_implementation": "sdpa", "batch_size": 1},
        engine_differs={},
        null_reasons={
            "governor": recognise("not told by this kernel"),
            "image": recognise("no container"),
            "vbios": recognise(NO_GPU),
            "model_revision": recognise("a local folder"),
            "other_gpu_processes": recognise(NO_GPU),
        },
    )


def make_gpu() -> Gpu:
    """A GPU of which nothing but the power was measured."""
    return reasons(Gpu(uuid="GPU-1", name="H200", power_mean_w=412.5), "not told by this driver")


def _energy(energy_per_output_tok_j: float | None, source: str) -> Energy:
    if energy_per_output_tok_j is None:
        return reasons(Energy(), NO_METER)
    energy_j, is_gpu = 1000 * energy_per_output_tok_j, is_gpu_source(source)
    measured = Energy(
        gpu_energy_j=energy_j if is_gpu else None,
        cpu_package_energy_j=None if is_gpu else energy_j,
        energy_source=source,
        energy_scope="gpu" if is_gpu else "cpu_package",
    )
    return reasons(measured, "not measured")


def _efficiency(energy_per_output_tok_j: float | None) -> Efficiency:
    per_j = None if energy_per_output_tok_j is None else 1 / energy_per_output_tok_j
    return reasons(Efficiency(energy_per_output_tok_j, None, None, per_j), NO_METER)
