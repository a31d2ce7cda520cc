"""A worker that starts a server: what is recorded, and that nothing is left whichever process is killed."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lem.meters.requestlog import read_requests
from lem.record import read_record
from tests.processes import wait_for, wait_until_ended
from tests.worker_rig import DOUBLES, RawWorker, Rig

FOREVER = ("--token-s", "1000")
PATIENCE_S = 30


def served(folder: Path, *words: str, **options: Any) -> dict[str, Any]:
    double = (sys.executable, str(DOUBLES / "openai_server.py"), "--port", "{port}")
    server = {"engine": "vllm", "command": [*double, *words], **options.pop("server", {})}
    usual = {"model": str(folder), "decoder": {"preset": "deterministic"}, "ignore_eos": True}
    return {**usual, "backend": "server", "server": server, **options}


def parts_of(rig: Rig, worker: RawWorker, guardian: int) -> Mapping[str, int]:
    """The processes of a worker whose request is under way, by what they are."""

    def find() -> Mapping[str, int] | None:
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in rig.marker.pids()}
        has = {
            "client": [pid for pid, words in commands.items() if b"--load" in words],
            "guardian of the server": [pid for pid, words in commands.items() if b"--program" in words],
            "server": [
                pid
                for pid, words in commands.items()
                if str(DOUBLES / "openai_server.py").encode() in words and b"--program" not in words
            ],
            "engine process": [pid for pid, words in commands.items() if b"--engine" in words and pid != guardian],
        }
        return {what: pids[0] for what, pids in has.items()} if all(map(len, has.values())) else None

    found = wait_for(find)
    assert found is not None
    return {**found, "supervisor": worker.child.pid, "guardian": guardian}


PARTS = ("supervisor", "guardian", "engine process", "guardian of the server", "server", "client")


@pytest.mark.parametrize("killed", PARTS)
def test_nothing_of_a_server_is_left_whichever_process_is_killed(rig: Rig, tmp_path: Path, killed: str) -> None:
    worker = RawWorker(rig)
    worker.send(rig.request("e", **served(tmp_path, *FOREVER)).to_message())
    guardian = worker.until("engine")["pgid"]
    worker.until("phase", phase="window")
    parts = parts_of(rig, worker, guardian)

    os.kill(parts[killed], signal.SIGKILL)

    if killed != "supervisor":
        worker.until("error", exp_id="e-c1")
        worker.hang_up()
    for what in PARTS:
        assert wait_until_ended(parts[what], PATIENCE_S), what


@pytest.mark.parametrize(
    ("killed", "said"),
    [("server", "the server was killed by SIGKILL"), ("client", "the load client was killed by SIGKILL")],
)
def test_what_was_killed_is_named(rig: Rig, tmp_path: Path, killed: str, said: str) -> None:
    worker = RawWorker(rig)
    worker.send(rig.request("e", **served(tmp_path, *FOREVER)).to_message())
    guardian = worker.until("engine")["pgid"]
    worker.until("phase", phase="window")

    os.kill(parts_of(rig, worker, guardian)[killed], signal.SIGKILL)

    assert said in worker.until("error", exp_id="e-c1")["message"]


def test_the_record_holds_what_server_and_client_report(rig: Rig, tmp_path: Path) -> None:
    worker = RawWorker(rig)
    messages = worker.run(rig.request("e", **served(tmp_path, warmup={"enabled": True, "min_prompts": 2})))

    assert messages[-1]["type"] == "result", messages[-1]
    record = read_record(rig.folder / "e" / "result.json")
    assert (record.work.output_tok, record.work.input_tok, record.work.token_source) == (8, 12, "engine_ids")
    assert record.served["counted"] == {"input_tok": 12, "output_tok": 8}  # without the warm-up
    assert record.served["reported"]["output_tok"] == 8
    assert record.served["client"][0]["pid"] > 0
    assert record.served["outcomes"] == {"ok": 2}
    assert (record.environment.engine_name, record.environment.engine_version) == ("vllm", "0.32.0")
    assert record.environment.engine_effective["settings"]["block_size"] == "128"


def test_the_set_is_repeated_until_the_window_is_long_enough(rig: Rig, tmp_path: Path) -> None:
    options = served(tmp_path, "--token-s", "0.01", measurement={"min_window_sec": 0.5})
    RawWorker(rig).run(rig.request("e", **options))

    record, log = read_record(rig.folder / "e/result.json"), read_requests(rig.folder / "e/requests.jsonl.gz")
    assert record.window.window_repeats == len(log.passes_ns) > 2
    assert record.window.window_s >= 0.5
    assert record.work.requests_ok == 2 * len(log.passes_ns)
    pauses_ns = [after[0] - before[1] for before, after in itertools.pairwise(log.passes_ns)]
    assert min(pauses_ns) >= 0  # a pass begins when the one before is answered
    assert len(record.served["client"]) == 1


def test_an_engine_that_stays_loaded_keeps_its_server(rig: Rig, tmp_path: Path) -> None:
    worker = RawWorker(rig)
    options = served(tmp_path)
    first = worker.run(rig.request("a", **options))[-1]
    chat = {**options, "server": {**options["server"], "api": "chat"}, "chat_template": "model"}
    second = worker.run(rig.request("b", **chat))[-1]

    assert (first["engine_reused"], second["engine_reused"]) == (False, True)
    loads = {read_record(rig.folder / name / "result.json").validity.engine_load_id for name in "ab"}
    assert len(loads) == 1
    record = read_record(rig.folder / "b" / "result.json")
    assert (record.served["api"], record.work.token_source) == ("chat", "usage")


def test_traffic_over_a_server_is_a_window_of_its_client(rig: Rig, tmp_path: Path) -> None:
    traffic = {"enabled": True, "mode": "poisson", "target_qps": 40.0}
    options = served(tmp_path, "--token-s", "0.01", traffic_simulation=traffic, measurement={"min_window_sec": 0.5})
    messages = RawWorker(rig).run(rig.request("e", **options))

    assert messages[-1]["type"] == "result", messages[-1]
    record = read_record(rig.folder / "e" / "result.json")
    assert record.window.traffic_mode == "poisson"
    assert record.work.requests_ok is not None
    assert record.work.requests_ok > 5
    assert record.latency.ttft_s is not None
    assert record.latency.queue_s is not None
