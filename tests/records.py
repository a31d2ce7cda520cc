"""Whole result records for tests, as the worker would leave them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from lem.base.codec import recognise
from lem.base.measurement import PROMPTS_NEEDED, Distribution, EnergySource, is_gpu_source, known
from lem.base.reasons import Reason
from lem.config.experiment import ExperimentConfig
from lem.config.sections import MeasurementConfig
from lem.meters.energy import EnergyFindings, efficiency_of
from lem.meters.requestlog import RequestLog
from lem.meters.work import describe_work, goodput_of
from lem.orchestration.grid import experiment_id
from lem.record import (
    ITL_REPLACED,
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
    carbon_of,
)
from lem.worker.prompts import fingerprint
from lem.worker.shapes import Prompt

NO_METER = "no energy meter was used"
NO_GPU = "no GPU was used"
NO_SLO = "no service level is given (traffic_simulation.slo)"
NO_TOKEN_TIMES = "the engine gave no time for each token"

CONFIG_HASH = "0123456789abcdef"
_INPUT_TOK, _OUTPUT_TOK = 512, 1000


if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Section = TypeVar("_Section", bound="DataclassInstance")


def reasons(section: _Section, reason: str) -> _Section:
    """The section with the same reason for every value that is None."""
    names = [item.name for item in dataclasses.fields(section) if getattr(section, item.name) is None]
    return dataclasses.replace(section, null_reasons=dict.fromkeys(names, recognise(reason, is_null=True)))


def sentences(*texts: str) -> tuple[Reason, ...]:
    """The reasons behind sentences, as those of a record of schema version 1 are read."""
    return tuple(map(recognise, texts))


def codes(found: Iterable[Reason]) -> list[str]:
    """The codes of reasons."""
    return [item.code for item in found]


@dataclass(frozen=True)
class Described:
    """What a fixture record says of its attempt; everything else in it follows, or is the same in all."""

    config_name: str = "small"
    config_hash: str = ""  # by default follows from the name
    model: str = "/srv/models/tiny-llama"
    cycle: int = 0  # from 0
    order: int | None = None  # by default the cycle
    attempt: int = 1
    run_id: str = "20260714T100000Z-3fa1"
    host: str = "lab1"
    is_valid: bool = True
    invalid_reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    load_id: str | None = None  # by default a load of its own
    n_requests: int = 8
    output_tok_per_s: float | None = 100.0
    energy_per_output_tok_j: float | None = None
    energy_source: str = EnergySource.COUNTER.value
    e2e_p50_s: float = 0.25
    ttft_p50_s: float | None = None
    requested: Mapping[str, Any] = field(default_factory=lambda: {"fp_precision": "float32", "max_output_tokens": 32})


def make_record(**fields: Any) -> Record:
    """A record of one attempt on a CPU, by default without an energy meter; `fields` are those of `Described`."""
    given = Described(**fields)
    if not given.config_hash:
        digest = CONFIG_HASH if given.config_name == "small" else hashlib.sha256(given.config_name.encode()).hexdigest()
        given = dataclasses.replace(given, config_hash=digest[: len(CONFIG_HASH)])
    load_id = f"{given.run_id}-{given.config_hash}-{given.cycle}-{given.attempt}"
    rate = given.output_tok_per_s
    output_tok = 0 if rate == 0 else _OUTPUT_TOK
    window_s = output_tok / rate if rate else 10.0
    record = Record(
        identity=_identity(given),
        validity=Validity(
            valid=given.is_valid,
            invalid_reasons=sentences(*(given.invalid_reasons or (() if given.is_valid else ("unfit",)))),
            warnings=sentences(*given.warnings),
            warmup_converged=True,
            steady=True,
            engine_reused=False,
            engine_load_id=load_id if given.load_id is None else given.load_id,
        ),
        window=_window(window_s),
        energy=_energy(given.energy_per_output_tok_j, given.energy_source),
        gpus=(),
        idle=reasons(Idle(), NO_METER),
        work=reasons(
            Work(
                given.n_requests,
                0,
                _INPUT_TOK,
                output_tok,
                12,
                "engine_ids",
                {"kind": "synthetic", "count": given.n_requests},
            ),
            NO_SLO,
        ),
        throughput=reasons(
            Throughput(
                rate, None if rate is None else (_INPUT_TOK + output_tok) / window_s, given.n_requests / window_s
            ),
            "the window holds no output",
        ),
        latency=make_latency(given.n_requests, given.n_requests, given.ttft_p50_s, None, given.e2e_p50_s),
        compute=reasons(Compute(2e12, "2 x parameters x tokens", "estimate", 25_000_000, None, 25_000_000), NO_GPU),
        efficiency=Efficiency(),
        carbon=Carbon(),
        environment=make_environment(),
        requested=given.requested,
        extra_metadata={"note": "Grüße"},
    )
    return completed(record)


def under_load(record: Record, load: float, good: int | None, mode: str = "poisson", **options: Any) -> Record:
    """The record as of traffic at that load, of whose requests so many met a limit on TTFT."""
    named = {"closed": "concurrency"}.get(mode, "target_qps")
    traffic = {"enabled": True, "mode": mode, named: load, "slo": {"ttft_ms": 200}, **options}
    counted, work = known(good, "tokens_not_observed"), record.work
    rates = goodput_of(counted, work.tried, record.window.window_s)
    return completed(
        dataclasses.replace(
            record,
            requested={**record.requested, "traffic_simulation": traffic},
            window=dataclasses.replace(record.window, traffic_mode=mode),
            work=work.having(requests_good=counted),
            throughput=record.throughput.having(**rates),
        )
    )


def load_sweep(knees: Mapping[int, float], loads: Sequence[float], cycles: int = 3, **options: Any) -> list[Record]:
    """Records of loads around the knee of each width; twice above it the queue grows, and the result is invalid."""
    found: list[Record] = []
    for cycle, (width, knee), load in itertools.product(range(cycles), knees.items(), loads):
        name = f"width={width}-load={load:g}"
        rate, is_grown = 20.0 * min(load, knee), load > 2 * knee
        chosen = {"fp_precision": "float16", "vllm": {"max_num_seqs": width}}
        found.append(
            under_load(
                make_record(
                    config_name=name,
                    cycle=cycle,
                    order=len(found),
                    n_requests=200,
                    requested=chosen,
                    output_tok_per_s=rate,
                    is_valid=not is_grown,
                    ttft_p50_s=0.05,
                    energy_per_output_tok_j=(0.2 + 0.8 / min(load, knee)) * (1 + 0.01 * cycle),
                    invalid_reasons=(Reason.of("queue_grew", before=3, after=90).text,) if is_grown else (),
                ),
                load,
                200 if load <= knee else 150 - cycle,
                **options,
            )
        )
    return found


def _window(window_s: float) -> Window:
    """Beside it no requests are kept, as beside the records of earlier versions."""
    why = recognise("temperature and power are back")
    window = reasons(Window("closed_batch", window_s, 1, 1.5, 5, 0.8, None, 0.4, why), "nothing was compiled")
    unknown = dict.fromkeys(("in_flight_mean", "in_flight_peak", "fill_drain_ratio"), Reason.of("not_recorded"))
    nothing = recognise("nothing was compiled for this experiment", is_null=True)
    return dataclasses.replace(window, null_reasons={"compile_s": nothing, **unknown})


def completed(record: Record, measurement: MeasurementConfig | None = None) -> Record:
    """The record with what follows from its energy and its work."""
    energy_j = record.energy.primary_j
    carbon = carbon_of(energy_j, measurement or MeasurementConfig())
    return dataclasses.replace(record, efficiency=efficiency_of(energy_j, record.work), carbon=carbon)


def _identity(given: Described) -> Identity:
    return Identity(
        experiment_id=experiment_id(given.config_hash, given.cycle),
        config_name=given.config_name,
        config_hash=given.config_hash,
        campaign_id="fe01ce2a",
        campaign_name="demo",
        run_id=given.run_id,
        host=given.host,
        backend="pytorch",
        model=given.model,
        cycle_index=given.cycle,
        order_index=given.cycle if given.order is None else given.order,
        attempt=given.attempt,
        shuffle_seed=None,
        start_utc="2026-07-14T10:00:00.000000Z",
        lem_version="0.1.0",
    )


def with_measured(record: Record, found: EnergyFindings, measurement: MeasurementConfig | None = None) -> Record:
    """The record with the sections that the meters fill, as `compose_record` fills them."""
    validity = dataclasses.replace(
        record.validity,
        valid=not found.invalid_reasons,
        invalid_reasons=found.invalid_reasons,
        warnings=found.warnings,
    )
    environment = dataclasses.replace(record.environment, gpu_uuids=tuple(gpu.uuid for gpu in found.gpus))
    sections = {"energy": found.energy, "gpus": found.gpus, "idle": found.idle}
    replaced: dict[str, Any] = {**sections, "validity": validity, "environment": environment}
    return completed(dataclasses.replace(record, **replaced), measurement)


def with_requests(
    record: Record,
    log: RequestLog,
    prompts: Sequence[Prompt],
    config: ExperimentConfig,
    output_ids_sha256: str | None = None,
) -> Record:
    """The record with the sections that follow from its requests and prompts, as `compose_record` fills them."""
    done = describe_work(log, config)
    source = {"kind": "bundled", "sha256": fingerprint(prompts), "count": len(prompts)}
    given = {item.name for item in dataclasses.fields(Window)} - {"null_reasons"}
    window = Window.of(**{**{name: record.window.measured(name) for name in given}, **done.window})
    kept = {"output_ids_sha256": known(output_ids_sha256, "agreement_off")}
    work = Work.of(**done.work, **kept, token_source="engine_ids", prompt_source=source)
    return dataclasses.replace(record, window=window, work=work, throughput=done.throughput, latency=done.latency)


def make_latency(n: int, n_tok: int, ttft_s: float | None, tpot_s: float | None, e2e_s: float) -> Latency:
    """Latencies around their medians, of `n` requests and `n_tok` tokens; None where token times were not observed."""
    ttft, tpot, icl = (
        None if p50 is None else _distribution(p50, count, n)
        for p50, count in ((ttft_s, n), (tpot_s, n), (tpot_s, n_tok))
    )
    found = reasons(Latency(ttft, tpot, _distribution(e2e_s, n, n), None, icl), NO_TOKEN_TIMES)
    return dataclasses.replace(found, null_reasons={**found.null_reasons, "itl_s": ITL_REPLACED})


def _distribution(p50: float, n: int, prompts: int) -> Distribution:
    """With the percentiles that the prompts allow."""
    factors = {"p90": 1.5, "p95": 1.7, "p99": 2.0}
    allowed = {name: p50 * factor if prompts >= PROMPTS_NEEDED[name] else None for name, factor in factors.items()}
    return Distribution(mean=1.1 * p50, p50=p50, n=n, n_prompts=prompts, **allowed)


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
            "governor": recognise("not told by this kernel", is_null=True),
            "image": recognise("no container", is_null=True),
            "vbios": recognise(NO_GPU, is_null=True),
            "model_revision": recognise("a local folder", is_null=True),
            "other_gpu_processes": recognise(NO_GPU, is_null=True),
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


def limit_sweep(energies_j: Mapping[float | None, float], cycles: int = 5, spread: float = 0.01) -> list[Record]:
    """Records by the power limit of their GPU, None for its own of 700 W; a lower one costs some throughput."""
    found: list[Record] = []
    for cycle, (limit_w, energy_j) in itertools.product(range(cycles), energies_j.items()):
        set_w = 700.0 if limit_w is None else limit_w
        record = make_record(
            config_name=f"limit={limit_w}",
            cycle=cycle,
            order=len(found),
            requested={"fp_precision": "float16", "gpu": {"power_limit_w": limit_w}},
            output_tok_per_s=100.0 * (0.9 + 0.1 * set_w / 700),
            energy_source="nvml_counter",
            energy_per_output_tok_j=energy_j * (1 + spread * ((cycle * 7 + len(found) * 3) % 5 - 2)),
        )
        gpu = Gpu("GPU-1", "NVIDIA Double", power_limit_w=set_w, power_limit_set_w=set_w)
        found.append(dataclasses.replace(record, gpus=(reasons(gpu, NO_METER),)))
    return found
