"""A record whose figures contradict each other is refused, in words that name the identity."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lem.record import RecordError, decode_record, encode_record, read_record
from tests.synthetic_campaign import Campaign, Configuration

RECORDED = Path(__file__).parents[1] / "recorded"


@functools.cache
def whole() -> Any:
    (record, *_) = Campaign((Configuration("one", ttft_s=0.05),), cycles=1, has_samples=False, gpu_count=2).records()
    return json.loads(json.dumps(encode_record(record)))


def times(factor: float, *path: str | int) -> Callable[[Any], None]:
    def damage(document: Any) -> None:
        *parents, last = path
        for part in parents:
            document = document[part]
        document[last] *= factor

    return damage


def put(value: Any, *path: str | int) -> Callable[[Any], None]:
    def damage(document: Any) -> None:
        *parents, last = path
        for part in parents:
            document = document[part]
        document[last] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (put(0.0, "window", "window_s"), "window.window_s is 0.0: expected more than 0"),
        (put(-1.0, "window", "window_s"), "window.window_s is -1.0: expected more than 0"),
        (times(1.001, "throughput", "output_tok_per_s"), "but output_tok / window_s is"),
        (times(10, "throughput", "total_tok_per_s"), "throughput.total_tok_per_s is .*, but"),
        (times(0.5, "throughput", "requests_per_s"), "but requests_ok / window_s is"),
        (times(2, "work", "input_tok"), "throughput.total_tok_per_s is .*, but"),
        (times(1.01, "gpus", 1, "energy_j"), "energy.gpu_energy_j is"),
        (times(1.01, "energy", "gpu_energy_net_j"), "gpu_energy_net_j \\+ idle_net_power_w x window_s is"),
        (times(1.01, "gpus", 0, "power_mean_w"), r"gpus\[0\].power_mean_w is"),
        (times(1.01, "efficiency", "energy_per_output_tok_j"), "but energy / output_tok is"),
        (times(1.01, "efficiency", "energy_per_request_j"), "but energy / requests_ok is"),
        (times(1.01, "efficiency", "output_tok_per_j"), "but output_tok / energy is"),
        (put(0.01, "latency", "e2e_s", "p99"), "latency.e2e_s: expected 0 <= p50 <= p90 <= p95 <= p99"),
        (put(-0.01, "latency", "ttft_s", "mean"), "latency.ttft_s: "),
        (put(-1, "work", "requests_failed"), "work.requests_failed is -1: expected at least 0"),
        (put(1, "work", "requests_failed"), "prompts x "),
        (put(-2.0, "gpus", 0, "throttle_power_s"), r"gpus\[0\].throttle_power_s is -2.0: expected at least 0"),
        (put(20.0, "gpus", 0, "temp_max_c"), r"gpus\[0\].temp_max_c is 20.0, but it was 66.0 at an edge"),
        (put(False, "validity", "valid"), "validity.valid is False with 0 invalid_reasons"),
        (put(1, "identity", "cycle_index"), "identity.experiment_id '.*' does not match config_hash"),
        (put("0" * 16, "identity", "config_hash"), "identity.experiment_id '.*' does not match config_hash"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(damage: Callable[[Any], None], told: str) -> None:
    document = copy.deepcopy(whole())
    decode_record(document)
    damage(document)
    with pytest.raises(RecordError, match=told):
        decode_record(document)


def test_every_result_of_the_first_build_still_reads() -> None:
    paths = sorted(RECORDED.rglob("result.json"))
    assert len(paths) > 25
    for path in paths:
        read_record(path)
