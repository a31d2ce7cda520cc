"""`lem worker` as its host meets it: what goes over the channel, and what does not."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from lem import __version__
from lem.record import read_record
from lem.worker.channel import PROTOCOL_VERSION, encode_line
from tests.processes import children_of
from tests.worker_rig import PHASES, RawWorker, Rig

TOKEN = "hf_a_token_of_somebody"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig.leaving_nothing(tmp_path) as rig:
        yield rig


def test_hello_comes_first_and_says_who_speaks(rig: Rig):
    worker = RawWorker(rig)

    assert worker.hello["protocol"] == PROTOCOL_VERSION
    assert worker.hello["lem_version"] == __version__
    assert worker.hello["pid"] == worker.child.pid
    assert worker.hello["environment"]["python"] == platform.python_version()
    assert worker.close() == 0


def test_an_experiment_goes_through_its_phases_to_a_result_on_disk(rig: Rig):
    worker = RawWorker(rig)

    worker.send(rig.request("e").to_message())
    messages = [worker.receive()]
    while messages[-1]["type"] != "result":
        messages.append(worker.receive())

    assert [item["phase"] for item in messages if item["type"] == "phase"] == list(PHASES)
    record = read_record(rig.folder / "e" / "result.json")
    assert messages[-1]["exp_id"] == record.identity.experiment_id == "e"
    assert messages[-1]["engine_reused"] is record.validity.engine_reused is False
    assert record.work.output_tok == 8
    worker.close()


def test_the_next_experiment_with_the_same_engine_reuses_it(rig: Rig):
    worker = RawWorker(rig)
    worker.send(rig.request("e1").to_message())
    first = worker.until("result")

    worker.send(rig.request("e2", max_output_tokens=5).to_message())
    messages = [worker.receive()]
    while messages[-1]["type"] != "result":
        messages.append(worker.receive())

    assert first["engine_reused"] is False
    assert messages[-1]["engine_reused"] is True
    loads = [read_record(rig.folder / name / "result.json").validity.engine_load_id for name in ("e1", "e2")]
    assert loads[0] == loads[1]
    assert [item["phase"] for item in messages if item["type"] == "phase"] == [
        phase for phase in PHASES if phase != "load"
    ]
    worker.close()


def test_another_engine_is_loaded_in_a_process_of_its_own_after_the_first_has_left(rig: Rig):
    worker = RawWorker(rig)
    worker.send(rig.request("e1").to_message())
    first = worker.until("engine")
    worker.until("result")

    worker.send(rig.request("e2", fp_precision="float32").to_message())

    assert worker.until("engine")["pgid"] is None
    second = worker.until("engine")
    assert second["pgid"] not in (None, first["pgid"])
    assert worker.until("result")["engine_reused"] is False
    worker.close()


def test_unload_is_answered_when_the_engine_process_is_gone(rig: Rig):
    worker = RawWorker(rig)
    worker.send({"type": "unload"})
    worker.until("unloaded")  # nothing was loaded

    worker.send(rig.request("e").to_message())
    pgid = worker.until("engine")["pgid"]
    worker.until("result")
    worker.send({"type": "unload"})
    worker.until("unloaded")

    assert not Path(f"/proc/{pgid}").exists()
    worker.close()


def test_quit_ends_the_worker_and_what_comes_after_is_not_done(rig: Rig):
    worker = RawWorker(rig)

    worker.send_raw(encode_line({"type": "quit"}) + encode_line(rig.request("e").to_message()))

    assert worker.child.wait() == 0
    assert not (rig.folder / "e" / "log.txt").exists()
    worker.close()


@pytest.mark.parametrize("where", ["load", "generate"])
def test_what_an_engine_prints_goes_to_the_log_and_never_to_the_channel(rig: Rig, where: str):
    rig.rules = [{"at": where, "do": "print", "text": "from the engine"}]
    worker = RawWorker(rig)

    worker.send(rig.request("e").to_message())
    worker.until("result")  # every line before it was a message, or reading would have failed

    assert rig.log_of("e").splitlines() == [f"{way}: from the engine" for way in ("print", "write", "child")]
    worker.close()


def test_each_experiment_has_the_output_of_its_own(rig: Rig):
    rig.rules = [{"at": "generate", "do": "print", "text": "now"}, {"at": "configure", "do": "print", "text": "again"}]
    worker = RawWorker(rig)

    for name in ("e1", "e2"):
        worker.send(rig.request(name).to_message())
        worker.until("result")

    assert rig.log_of("e1").count("again") == 0
    assert rig.log_of("e1").count("now") == 3
    assert rig.log_of("e2").count("again") == 3
    assert rig.log_of("e2").count("now") == 3
    worker.close()


def test_a_child_started_for_one_experiment_prints_into_the_log_of_the_one_that_runs(rig: Rig):
    go, done = rig.folder / "go", rig.folder / "done"
    for fifo in (go, done):
        os.mkfifo(fifo)
    rig.rules = [
        {"at": "load", "do": "shell", "command": f"(read word < {go}; echo child says $word; echo > {done}) &"},
        {"at": "configure", "do": "shell", "command": f"echo hello > {go}; read word < {done}"},
    ]
    worker = RawWorker(rig)

    for name in ("e1", "e2"):
        worker.send(rig.request(name).to_message())
        worker.until("result")

    assert rig.log_of("e1") == ""
    assert rig.log_of("e2") == "child says hello\n"
    worker.close()


def test_an_engine_that_fails_is_an_error_with_its_kind_and_the_worker_goes_on(rig: Rig):
    rig.rules = [{"at": "generate", "do": "refuse", "text": "no such option", "when": {"max_output_tokens": 8}}]
    worker = RawWorker(rig)
    worker.send(rig.request("e1").to_message())
    worker.until("result")

    worker.send(rig.request("e2", max_output_tokens=8).to_message())
    error = worker.until("error")
    worker.send(rig.request("e3").to_message())

    assert (error["exp_id"], error["kind"], error["permanent"]) == ("e2", "option", True)
    assert error["message"] == "no such option"
    assert error["phase"] == "window"
    assert error["engine_lost"] is False
    assert worker.until("result", exp_id="e3")["engine_reused"] is True
    worker.close()


def test_after_an_unexpected_failure_the_engine_process_is_replaced(rig: Rig):
    rig.rules = [{"at": "generate", "do": "crash", "text": "device-side assert", "when": {"max_output_tokens": 8}}]
    worker = RawWorker(rig)

    worker.send(rig.request("e1", max_output_tokens=8).to_message())
    error = worker.until("error")
    worker.send(rig.request("e2").to_message())

    assert (error["kind"], error["permanent"], error["engine_lost"]) == ("engine", False, True)
    assert error["message"] == "RuntimeError: device-side assert"
    assert error["log_tail"].splitlines()[-1] == "RuntimeError: device-side assert"
    assert "Traceback" in rig.log_of("e1")
    assert not (rig.folder / "e1" / "result.json").exists()
    assert worker.until("result", exp_id="e2")["engine_reused"] is False
    worker.close()


@pytest.mark.parametrize(
    ("rule", "how"),
    [
        ({"do": "signal", "number": 11}, "was killed by SIGSEGV"),
        ({"do": "exit", "code": 0}, "ended with exit code 0"),
    ],
)
def test_an_engine_that_dies_is_told_with_how_and_its_last_lines(rig: Rig, rule: dict[str, object], how: str):
    rig.rules = [
        {"at": "generate", "do": "print", "text": "last words", "when": {"max_output_tokens": 8}},
        {"at": "generate", **rule, "when": {"max_output_tokens": 8}},
    ]
    worker = RawWorker(rig)

    worker.send(rig.request("e1", max_output_tokens=8).to_message())
    error = worker.until("error")
    worker.send(rig.request("e2").to_message())

    assert (error["exp_id"], error["kind"], error["permanent"], error["engine_lost"]) == ("e1", "died", False, True)
    assert error["message"] == f"the engine process {how} in phase window"
    assert "child: last words" in rig.log_of("e1")
    assert rig.log_of("e1").splitlines()[-1] == error["log_tail"].splitlines()[-1]
    assert worker.until("result", exp_id="e2")["engine_reused"] is False
    worker.close()


def test_garbage_and_impossible_orders_are_refused_and_the_worker_goes_on(rig: Rig):
    worker = RawWorker(rig)

    worker.send_raw(b"no message\n")
    assert worker.until("error", kind="channel")["exp_id"] is None
    worker.send({"type": "dance"})
    assert "dance" in worker.until("error", kind="channel")["message"]
    worker.send({"type": "run", "config": {}})
    assert "missing" in worker.until("error", kind="channel")["message"]

    worker.send(rig.request("e").to_message())
    worker.until("result")
    worker.close()


def test_a_result_folder_that_is_not_there_is_an_error_and_the_worker_goes_on(rig: Rig):
    worker = RawWorker(rig)
    request = rig.request("e1")
    message = {**request.to_message(), "result_dir": str(rig.folder / "missing")}

    worker.send(message)

    error = worker.until("error", exp_id="e1")
    assert error["kind"] == "engine"
    assert "No such file" in error["message"]
    worker.send(rig.request("e2").to_message())
    worker.until("result", exp_id="e2")
    worker.close()


def test_secrets_reach_the_engine_and_no_file_and_no_command_line(rig: Rig):
    rig.rules = [
        {"at": "load", "do": "print", "text": "login with {secret}"},
        {"at": "load", "do": "fail", "text": "the hub refused {secret}"},
    ]
    worker = RawWorker(rig)

    worker.send(rig.request("e", secrets={"HF_TOKEN": TOKEN}).to_message())
    error = worker.until("error")

    assert "login with [redacted]" in rig.log_of("e")
    assert TOKEN not in json.dumps(error)
    assert "the hub refused [redacted]" in error["message"]
    for path in (rig.folder / "e").iterdir():
        assert TOKEN not in path.read_text()
    for pid in (worker.child.pid, *children_of(worker.child.pid)):
        assert TOKEN.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    worker.close()


def test_while_an_engine_loads_what_it_prints_is_progress(rig: Rig):
    go_on = rig.folder / "go on"
    os.mkfifo(go_on)
    rig.rules = [
        {"at": "load", "do": "print", "text": "Loading shards 50%"},
        # Else the load may be over before the supervisor reads what was printed.
        {"at": "load", "do": "shell", "command": f"read word < '{go_on}'"},
    ]
    worker = RawWorker(rig)

    worker.send(rig.request("e").to_message())

    assert "Loading shards 50%" in worker.until("progress", exp_id="e")["text"]
    go_on.write_text("now\n")
    worker.until("result")
    worker.close()


def test_a_worker_without_a_host_ends_at_once(rig: Rig):
    with open(os.devnull, "rb") as nothing:
        child = rig.start(stdin=nothing.fileno())

    assert child.wait() == 0
