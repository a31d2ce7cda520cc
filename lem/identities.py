"""What must hold between the figures of one record; checked whenever a record is read or written.

Nothing here is a matter of judgement: each identity is how lem computes the figure, so a record that violates one was
altered or cut after it was written. `Record` is not imported, since its module needs this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any, Final

from lem.base.units import JOULES_PER_WATT_HOUR

_TOLERANCE = 1e-9  # both sides are computed from the same numbers

# What cannot be negative, by section.
_COUNTS: Final[Mapping[str, tuple[str, ...]]] = {
    "identity": ("cycle_index", "order_index"),
    "window": (
        "in_flight_mean",
        "fill_drain_ratio",
        "window_repeats",
        "warmup_s",
        "warmup_prompts",
        "load_s",
        "compile_s",
        "gap_s",
    ),
    "work": ("requests_ok", "requests_failed", "requests_good", "input_tok", "output_tok", "padding_tok"),
    "compute": ("flops_total", "model_parameters", "peak_memory_b"),
    "energy": ("gpu_energy_j", "sensor_energy_j", "counter_update_period_s", "sample_gap_max_s"),
    "environment": ("cpu_count", "memory_b"),
}
_GPU_COUNTS = (
    "energy_j", "power_mean_w", "power_max_w", "power_limit_w", "sm_clock_mean_hz", "throttle_power_s",
    "throttle_thermal_s", "event_reasons_mask", "util_mean_ratio", "mem_peak_b",
)  # fmt: skip
_LATENCIES = ("ttft_s", "tpot_s", "icl_s", "itl_s", "e2e_s", "queue_s")


def violations(record: Any) -> Iterator[str]:
    if not record.window.window_s > 0:
        yield f"window.window_s is {record.window.window_s}: expected more than 0"
        return
    yield from _impossible(record)
    for name, formula, compute in _IDENTITIES:
        found, expected = attrgetter(name)(record), compute(record)
        if found is not None and expected is not None and not _is_same(found, expected):
            yield f"{name.removesuffix('.value')} is {found}, but {formula} is {expected}"
    for place, gpu in enumerate(record.gpus):
        mean_w = None if gpu.energy_j is None else gpu.energy_j / record.window.window_s
        if mean_w is not None and gpu.power_mean_w is not None and not _is_same(gpu.power_mean_w, mean_w):
            yield f"gpus[{place}].power_mean_w is {gpu.power_mean_w}, but energy_j / window_s is {mean_w}"
        temps = [item for item in (gpu.temp_start_c, gpu.temp_end_c) if item is not None]
        if gpu.temp_max_c is not None and max(temps, default=gpu.temp_max_c) > gpu.temp_max_c:
            yield f"gpus[{place}].temp_max_c is {gpu.temp_max_c}, but it was {max(temps)} at an edge of the window"


def _impossible(record: Any) -> Iterator[str]:
    identity, validity, window, work = record.identity, record.validity, record.window, record.work
    sections = [(name, getattr(record, name), names) for name, names in _COUNTS.items()]
    sections += [(f"gpus[{place}]", gpu, _GPU_COUNTS) for place, gpu in enumerate(record.gpus)]
    for where, section, names in sections:
        for name in names:
            value = getattr(section, name)
            if value is not None and value < 0:
                yield f"{where}.{name} is {value}: expected at least 0"
    start, _, cycle = identity.experiment_id.rpartition("-c")
    if not start or not identity.config_hash.startswith(start) or cycle != str(identity.cycle_index + 1):
        found = f"{identity.config_hash!r:.40} and cycle_index {identity.cycle_index}"
        yield f"identity.experiment_id {identity.experiment_id!r:.60} does not match config_hash {found}"
    if validity.valid == bool(validity.invalid_reasons):
        yield f"validity.valid is {validity.valid} with {len(validity.invalid_reasons)} invalid_reasons"
    prompts = work.prompt_source.get("count")
    requests = work.tried
    if window.traffic_mode == "closed_batch" and type(prompts) is int and requests != prompts * window.window_repeats:
        yield f"work: {requests} requests, but {prompts} prompts x {window.window_repeats} repeats"
    for name in _LATENCIES:
        found = getattr(record.latency, name)
        if found is None:
            continue
        ordered = [value for value in (0.0, found.p50, found.p90, found.p95, found.p99) if value is not None]
        if ordered != sorted(ordered) or found.mean < 0 or found.n < 1:
            yield f"latency.{name}: expected 0 <= p50 <= p90 <= p95 <= p99, a mean of at least 0 and n of at least 1"


def _is_same(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=_TOLERANCE)


def _over_tried(work: Any) -> float | None:
    return work.requests_good / work.tried if work.tried else None


def _sum_of(gpus: Any) -> float | None:
    each = [gpu.energy_j for gpu in gpus]
    return None if not each or None in each else sum(each)


def _gross_j(record: Any) -> float | None:
    net_j, rest_w = record.energy.gpu_energy_net_j, record.idle.idle_net_power_w
    if rest_w is None and record.idle.why_none("idle_net_power_w").code == "not_recorded":
        rest_w = record.idle.idle_loaded_power_w
    return None if net_j is None or rest_w is None else net_j + rest_w * record.window.window_s


def _phases_j(energy: Any) -> float | None:
    parts = energy.prefill_energy_j, energy.decode_energy_j
    return None if None in parts else sum(parts)


def _rate(record: Any, count: int | None) -> float | None:
    return None if count is None else count / record.window.window_s


def _per(record: Any, count: int | None) -> float | None:
    total_j = record.energy.primary_j.value
    return total_j / count if total_j is not None and count else None


def _over(count: int | None, record: Any) -> float | None:
    total_j = record.energy.primary_j.value
    return count / total_j if total_j and count is not None else None


def _at_site(record: Any, per_kwh: float | None) -> float | None:
    total_j, pue = record.energy.primary_j.value, record.carbon.pue
    return None if None in (total_j, pue, per_kwh) else total_j / (1000 * JOULES_PER_WATT_HOUR) * pue * per_kwh


# Each figure, what it is computed from, and how; nothing is compared where one of them has no value.
_IDENTITIES: Final[tuple[tuple[str, str, Callable[[Any], float | None]], ...]] = (
    ("throughput.output_tok_per_s", "output_tok / window_s", lambda it: _rate(it, it.work.output_tok)),
    ("throughput.total_tok_per_s", "(input_tok + output_tok) / window_s", lambda it: _rate(it, it.work.total_tok)),
    ("throughput.requests_per_s", "requests_ok / window_s", lambda it: _rate(it, it.work.requests_ok)),
    ("throughput.good_requests_per_s", "requests_good / window_s", lambda it: _rate(it, it.work.requests_good)),
    (
        "throughput.good_requests_ratio",
        "requests_good / (requests_ok + requests_failed)",
        lambda it: None if it.work.requests_good is None else _over_tried(it.work),
    ),
    ("energy.gpu_energy_j", "the sum of energy_j of the GPUs", lambda it: _sum_of(it.gpus)),
    ("energy.gpu_energy_j", "gpu_energy_net_j + idle_net_power_w x window_s", _gross_j),
    ("energy.primary_j.value", "prefill_energy_j + decode_energy_j", lambda it: _phases_j(it.energy)),
    ("efficiency.energy_per_output_tok_j", "energy / output_tok", lambda it: _per(it, it.work.output_tok)),
    ("efficiency.energy_per_total_tok_j", "energy / (input_tok + output_tok)", lambda it: _per(it, it.work.total_tok)),
    ("efficiency.energy_per_request_j", "energy / requests_ok", lambda it: _per(it, it.work.requests_ok)),
    ("efficiency.energy_per_good_request_j", "energy / requests_good", lambda it: _per(it, it.work.requests_good or 0)),
    ("efficiency.output_tok_per_j", "output_tok / energy", lambda it: _over(it.work.output_tok, it)),
    ("carbon.co2e_g", "energy x pue x grid_g_per_kwh", lambda it: _at_site(it, it.carbon.grid_g_per_kwh)),
    ("carbon.cost", "energy x pue x price_per_kwh", lambda it: _at_site(it, it.carbon.price_per_kwh)),
)
