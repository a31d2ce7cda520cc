from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lem.base.measurement import Measured, known
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import EngineReport
from lem.worker.channel import RunRequest
from lem.worker.recording import (
    describe_environment,
    differing_options,
    fingerprint_of,
    read_host,
)

HOST: dict[str, Any] = {
    "os": "Debian 12",
    "kernel": "6.1.0",
    "cpu": "A CPU",
    "cpu_count": 8,
    "memory_b": 16 << 30,
    "governor": "performance",
}
REPORT = EngineReport("transformers", "5.0", {"torch": "2.0"}, "cuda", ("GPU-b", "GPU-a"))

NO_GPU: dict[str, Measured[tuple[str, ...]]] = dict.fromkeys(
    ("vbios", "other_gpu_processes"), known(None, "no_gpu_in_use")
)


def request(**options: Any) -> RunRequest:
    return RunRequest({}, {"experiment_id": "e"}, "attempt", "key", True, **options)


def config(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "any", **options})


def test_host_is_read_from_where_linux_shows_it(tmp_path: Path) -> None:
    for name, content in {
        "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
        "proc/cpuinfo": "processor\t: 0\nmodel\t\t: 79\nmodel name\t: Example CPU @ 2 GHz\n",
        "proc/meminfo": "MemFree: 1 kB\nMemTotal:       2048 kB\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "performance\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    host = read_host(tmp_path)
    assert (host["os"], host["cpu"]) == ("Debian GNU/Linux 12 (bookworm)", "Example CPU @ 2 GHz")
    assert (host["memory_b"].value, host["governor"].value) == (2048 * 1024, "performance, powersave")
    assert host["kernel"] == platform.release()
    assert host["cpu_count"] >= 1
    assert read_host()["memory_b"].value, "this machine can be read"


def test_everything_unknown_has_a_reason(tmp_path: Path) -> None:
    host = read_host(tmp_path)
    assert host["cpu"], "what Python knows where the kernel shows nothing"
    found = describe_environment(request(), host, REPORT, config(), NO_GPU)
    unknown = ("memory_b", "governor", "image", "model_revision", "weights_sha256", "vbios", "other_gpu_processes")
    assert {name: getattr(found, name) for name in found.null_reasons} == dict.fromkeys(unknown)


def test_what_is_known_has_none() -> None:
    report = replace(REPORT, model_revision="abc", weights_sha256="def", device="cpu", gpu_uuids=())
    found = describe_environment(request(executor="docker", image="sha256:1"), HOST, report, config(), NO_GPU)
    assert set(found.null_reasons) == {"vbios", "other_gpu_processes"}
    assert found.null_reasons["vbios"].code == "no_gpu_in_use"
    assert found.versions["python"] == platform.python_version()
    assert found.versions["torch"] == "2.0"


@pytest.mark.parametrize(
    ("host", "report", "versions", "image"),
    [
        (HOST, REPORT, {"torch": "2.1"}, None),
        (HOST, REPORT, {"torch": "2.0", "driver": "1"}, None),
        (HOST, REPORT, {"torch": "2.0"}, "sha256:1"),
        (HOST, replace(REPORT, engine_version="5.1"), {"torch": "2.0"}, None),
        (HOST, replace(REPORT, gpu_uuids=("GPU-a",)), {"torch": "2.0"}, None),
        ({**HOST, "cpu": "Another CPU"}, REPORT, {"torch": "2.0"}, None),
    ],
)
def test_fingerprint_changes_with_what_makes_runs_incomparable(
    host: dict[str, Any], report: EngineReport, versions: dict[str, str], image: str | None
) -> None:
    assert fingerprint_of(host, report, versions, image) != fingerprint_of(HOST, REPORT, {"torch": "2.0"}, None)


def test_fingerprint_does_not_change_with_what_an_experiment_chooses_or_with_the_kernel() -> None:
    other = replace(REPORT, effective={"pytorch": {"batch_size": 9}}, gpu_uuids=("GPU-a", "GPU-b"))
    host = {**HOST, "kernel": "6.2.0", "memory_b": 1}
    assert fingerprint_of(host, other, {}, None) == fingerprint_of(HOST, REPORT, {}, None)


GREEDY = {"temperature": 0.0, "do_sample": False}
NO_SAMPLING = {"decoder": {**GREEDY, "top_k": None, "top_p": None}}


@pytest.mark.parametrize(
    ("chosen", "effective", "told"),
    [
        (
            {"pytorch": {"batch_size": 8}, "fp_precision": "float16"},
            {"pytorch": {"batch_size": 4, "use_cache": False}, "fp_precision": "float32", "positions": 2048},
            {"fp_precision": ["float16", "float32"], "pytorch.batch_size": [8, 4]},
        ),
        ({}, {"pytorch": {"batch_size": 4}}, {"pytorch.batch_size": [1, 4]}),
        ({}, {"pytorch": {"attn_implementation": "sdpa"}}, {}),
        ({"backend": "vllm", "vllm": {"logit_bias": {}}}, {"vllm": {"logit_bias": None}}, {}),
        ({"decoder": GREEDY}, NO_SAMPLING, {}),
        ({"decoder": {**GREEDY, "top_k": 7}}, NO_SAMPLING, {"decoder.top_k": [7, None]}),
    ],
    ids=[
        "chosen",
        "default",
        "left to the engine",
        "empty",
        "default that does not apply",
        "chosen that does not apply",
    ],
)
def test_options_that_took_effect_otherwise_are_told_with_both_values(
    chosen: dict[str, Any], effective: dict[str, Any], told: dict[str, Any]
) -> None:
    assert differing_options(config(**chosen), effective) == told
