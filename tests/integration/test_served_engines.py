"""Campaigns over real servers: vLLM's and llama.cpp's, started, measured, killed and ended."""

from __future__ import annotations

import json
import os
import secrets
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import lem
from lem.record import Record
from tests.campaign_rig import Ended
from tests.lab.places import Places
from tests.lab.servers import VLLM_ENVIRONMENT, VLLM_MODULE
from tests.processes import wait_until_ended
from tests.records import codes
from tests.served_rig import (
    EXPERIMENT,
    INPUT_TOK,
    OUTPUT_TOK,
    RUN_TIMEOUT_S,
    Options,
    ServedContainersRig,
    ServedRig,
    llamacpp,
    rate,
    served,
    served_campaign,
    vllm,
)

pytestmark = [pytest.mark.needs("environments"), pytest.mark.timeout(900)]

RATES = (2, 4)
LLAMACPP = [
    served(f"llamacpp-{slots}-at-{qps}", llamacpp(options={"parallel": slots}), traffic_simulation=rate(qps))
    for slots in (2, 4)
    for qps in RATES
]
VLLM = [
    served(f"vllm-{width}-at-{qps}", vllm(options={"max_num_seqs": width}), traffic_simulation=rate(qps))
    for width in (4, 8)
    for qps in RATES
]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ServedRig]:
    with ServedRig(tmp_path).cleaned() as rig:
        assert isinstance(rig, ServedRig)
        yield rig


@pytest.mark.parametrize(
    ("experiments", "cycles"),
    [
        pytest.param(LLAMACPP, 3, id="llama.cpp"),
        pytest.param(VLLM[:2], 1, id="vLLM, one start"),
        pytest.param([*LLAMACPP, *VLLM], 3, id="both", marks=pytest.mark.long),
    ],
)
def test_rates_and_options_are_measured_with_fresh_servers_in_every_cycle(rig, experiments, cycles):
    rig.write(served_campaign(experiments, cycles=cycles))
    ended = rig.run()
    assert ended.code == 0, ended.err
    rig.assert_no_process_left()
    assert rig.statuses() == ["completed"] * len(experiments) * cycles
    records = rig.records()
    assert_fresh(records, len(experiments) * cycles, len(experiments) // len(RATES) * cycles)
    for record in records:
        assert_measured(rig, record)


def assert_fresh(records: Sequence[Record], experiments: int, loads: int) -> None:
    """Each load belongs to one option in one cycle, and the rates of that option share it."""
    found: dict[str, set[tuple[int, str]]] = {}
    for record in records:
        options = json.dumps(record.requested["server"]["options"])
        found.setdefault(record.validity.engine_load_id, set()).add((record.identity.cycle_index, options))
    assert all(len(places) == 1 for places in found.values())
    assert len({record.identity.experiment_id for record in records}) == experiments
    # An attempt that is not valid is measured once more, with a new server.
    assert loads <= len(found) <= loads + len(records) - experiments


def assert_measured(rig: ServedRig, record: Record) -> None:
    """What the record of requests with OUTPUT_TOK output tokens each has to say."""
    # On a machine that other tests use, the client may have been late; it says so then.
    assert codes(record.validity.invalid_reasons) in ([], ["client_bound"])
    good = [it for it in rig.requests(record) if it["finished_ns"] is not None]
    assert {(it["input_tok"], it["output_tok"], it["error"]) for it in good} == {(INPUT_TOK, OUTPUT_TOK, None)}
    served = record.served
    assert set(served["outcomes"]) == {"ok"}
    # What was counted from the answers is what the server counted itself, and no prompt came from its cache.
    assert served["counted"] == {name: served["reported"][name] for name in served["counted"]}
    assert served["reported"]["cached_tok"] == 0
    # llama.cpp omits the ids of tokens that make half a character: its own count of such an answer is used.
    differing = [it.data["count"] for it in record.validity.warnings if it.code == "ids_differ"]
    assert [served["token_sources"].get("usage", 0)] == (differing or [0])
    assert served["server"] == "llama.cpp" or not differing
    assert record.latency.ttft_s is not None
    assert record.latency.icl_s is not None


def one(server: Options) -> str:
    """One experiment whose window lasts until it is disturbed, in two cycles."""
    measurement = {**EXPERIMENT["measurement"], "min_window_sec": 3.0}
    return served_campaign([served("one", server, measurement=measurement, traffic_simulation=rate(4))], cycles=2)


SERVERS = [
    pytest.param(llamacpp(), id="llama.cpp"),
    pytest.param(vllm(), id="vLLM", marks=pytest.mark.long),
]


@pytest.mark.parametrize("server", SERVERS)
def test_a_killed_host_leaves_no_server_and_a_resume_measures_the_rest(rig, server):
    rig.write(one(server))
    running = rig.start()
    running.wait_for_event("phase", phase="window", done=1)
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    rig.assert_no_process_left()
    kept = rig.results()
    resumed = rig.run("--resume")
    assert resumed.code == 0, resumed.err
    rig.assert_no_process_left()
    assert rig.statuses() == ["completed", "completed"]
    assert kept.items() <= rig.results().items()
    first, *_, last = rig.records()
    # The attempt that was interrupted counts.
    assert (first.identity.cycle_index, last.identity.cycle_index, last.identity.attempt > 1) == (0, 1, True)


@pytest.mark.parametrize("victim", [("worker",), ("worker", "--engine")], ids=["supervisor", "engine"])
@pytest.mark.parametrize("server", SERVERS)
def test_a_killed_worker_leaves_no_server_and_the_experiment_is_measured_again(rig, server, victim):
    rig.write(one(server))
    running = rig.start()
    running.wait_for_event("phase", phase="window")
    first = rig.pid_of_server()
    os.kill(rig.marker.pid_of(*victim, without="--sampler"), signal.SIGKILL)
    assert wait_until_ended(first)
    assert_measured_again(rig, running.wait(RUN_TIMEOUT_S))


@pytest.mark.parametrize("server", SERVERS)
def test_a_killed_server_is_named_with_its_signal_and_the_experiment_is_measured_again(rig, server):
    rig.write(one(server))
    running = rig.start()
    running.wait_for_event("phase", phase="window")
    os.kill(rig.pid_of_server(), signal.SIGKILL)
    assert_measured_again(rig, running.wait(RUN_TIMEOUT_S))


def assert_measured_again(rig: ServedRig, ended: Ended) -> None:
    assert ended.code == 0, ended.err
    rig.assert_no_process_left()
    assert rig.statuses() == ["completed", "completed"]
    failed, completed = rig.manifest().experiments[0].attempts
    assert "SIGKILL" in str(failed.error)
    assert completed.error is None
    for record in rig.records():
        assert_measured(rig, record)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_vllm_serve_gives_the_tokens_of_the_vllm_backend_at_a_rate_within_their_intervals(rig):
    most = {"max_num_seqs": 8, "max_model_len": 256, "enforce_eager": True, "enable_prefix_caching": False}
    own = {**most, "extra": {"num_gpu_blocks_override": 64}}
    whole = {"save_outputs": True, "measurement": {**EXPERIMENT["measurement"], "min_window_sec": 10.0}}
    in_process = {"config_name": "in-process", "backend": "vllm", "fp_precision": "float32", "vllm": own}
    server = served("served", vllm(options={"max_num_seqs": 8, "num_gpu_blocks_override": 64}), **whole)
    rig.write(served_campaign([{**EXPERIMENT, **whole, **in_process}, server], cycles=3))
    python = str(Places.of().environment("vllm") / "bin/python")

    ended = rig.start("--python", python, **VLLM_ENVIRONMENT).wait(2 * RUN_TIMEOUT_S)

    assert ended.code == 0, ended.err
    rig.assert_no_process_left()
    ids: dict[str, dict[int, list[list[int]]]] = {}
    for record in rig.records():
        found = [output["output_ids"] for output in rig.outputs(record)]
        ids.setdefault(record.identity.config_name, {})[record.identity.cycle_index] = found
    assert {len(tokens) for cycle in ids["served"].values() for tokens in cycle} == {OUTPUT_TOK}
    assert ids["in-process"] == ids["served"]
    assert len({json.dumps(cycle) for cycle in ids["served"].values()}) == 3  # each draws its own prompts
    run = lem.read(rig.folder / "results", "demo")
    estimates = [item.estimate("output_tok_per_s") for item in run.configurations]
    assert [item.n for item in estimates] == [3, 3]
    ends = sorted(
        (end, is_high) for it in estimates for end, is_high in ((it.low or 0.0, False), (it.high or 0.0, True))
    )
    assert [is_high for _, is_high in ends] == [False, False, True, True], estimates  # they overlap


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[ServedContainersRig]:
    with ServedContainersRig(tmp_path).cleaned() as rig:
        yield rig


@pytest.mark.needs("lab")
def test_a_compose_service_is_the_server_in_a_new_container_for_each_load(containers):
    section = {"engine": "llamacpp", "service": "llamacpp"}
    options = {"model": "/opt/huggingface/demo.gguf", "threads": 1, "metrics": True}
    containers.write(
        served_campaign(
            [
                served(
                    f"slots-{slots}", section | {"options": options | {"parallel": slots}}, traffic_simulation=rate(2)
                )
                for slots in (2, 4)
            ],
            cycles=2,
            campaign_name=f"served-{secrets.token_hex(4)}",
        )
    )
    ended = containers.run()
    assert ended.code == 0, ended.err
    assert containers.containers() == []
    containers.assert_no_process_left()
    records = containers.records()
    assert_fresh(records, 4, 4)
    for record in records:
        assert_measured(containers, record)


@pytest.mark.needs("lab")
@pytest.mark.long
def test_vllm_serve_runs_in_the_container_of_its_service(containers):
    command = ["python3", "-m", VLLM_MODULE, "--model", "/opt/huggingface/tiny", "--port", "{port}"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    section = {"engine": "vllm", "service": "vllm", "command": command}
    containers.write(
        served_campaign(
            [served(f"at-{qps}", section, traffic_simulation=rate(qps)) for qps in RATES],
            campaign_name=f"served-{secrets.token_hex(4)}",
        )
    )
    ended = containers.run()
    assert ended.code == 0, ended.err
    assert containers.containers() == []
    containers.assert_no_process_left()
    for record in containers.records():
        assert_measured(containers, record)
        assert record.environment.executor == "docker"
