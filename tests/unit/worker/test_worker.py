from __future__ import annotations

import os
import signal

import pytest

from tests.worker_rig import RawWorker, Rig

LOADING = {"at": "load"}
IN_THE_WINDOW = {"at": "generate", "when": {"max_output_tokens": 8}}


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
        worker.run(rig.request(name))

    assert (rig.log_of("e1"), rig.log_of("e2")) == ("", "child says hello\n")
    worker.close()


def test_an_engine_that_refuses_is_kept_and_one_that_crashes_is_replaced(rig: Rig):
    rig.rules = [
        {"at": "generate", "do": "refuse", "text": "no such option", "when": {"max_output_tokens": 7}},
        {**IN_THE_WINDOW, "do": "crash", "text": "device-side assert"},
    ]
    worker = RawWorker(rig)
    worker.run(rig.request("e1"))

    refused = worker.run(rig.request("e2", max_output_tokens=7))[-1]
    again = worker.run(rig.request("e3"))[-1]
    crashed = worker.run(rig.request("e4", max_output_tokens=8))[-1]
    after = worker.until("engine")["pgid"], worker.run(rig.request("e5"))[-1]

    assert [refused[name] for name in ("type", "exp_id", "kind", "permanent", "phase", "engine_lost")] == [
        "error", "e2-c1", "option", True, "window", False
    ]  # fmt: skip
    assert refused["message"] == "no such option"
    assert again["engine_reused"] is True
    assert [crashed[name] for name in ("exp_id", "kind", "permanent", "engine_lost")] == [
        "e4-c1", "engine", False, True
    ]  # fmt: skip
    assert crashed["message"] == crashed["log_tail"].splitlines()[-1] == "RuntimeError: device-side assert"
    assert "Traceback" in rig.log_of("e4")
    assert not (rig.folder / "e4" / "result.json").exists()
    assert (after[0], after[1]["engine_reused"]) == (None, False)
    worker.close()


@pytest.mark.parametrize(
    ("at", "number", "permanent", "hint"),
    [
        (LOADING, signal.SIGSEGV, True, "see the last lines of its log"),
        (IN_THE_WINDOW, signal.SIGILL, True, "float32"),
        (IN_THE_WINDOW, signal.SIGSEGV, False, "see the last lines of its log"),
        (LOADING, signal.SIGKILL, False, "out of memory"),
    ],
)
def test_a_signal_that_the_same_work_would_bring_again_is_permanent(rig: Rig, at, number, permanent, hint):
    rig.rules = [{**at, "do": "signal", "number": int(number)}]
    worker = RawWorker(rig)
    worker.send(rig.request("e1", max_output_tokens=8).to_message())
    error = worker.until("error")
    assert (error["kind"], error["permanent"]) == ("died", permanent)
    assert f"was killed by {number.name} in phase" in error["message"]
    assert hint in error["hint"]
    worker.close()


def test_an_engine_that_dies_is_told_with_how_and_its_last_lines(rig: Rig):
    rig.rules = [
        {**IN_THE_WINDOW, "do": "print", "text": "last words"},
        {**IN_THE_WINDOW, "do": "signal", "number": 11},
    ]
    worker = RawWorker(rig)

    worker.send(rig.request("e1", max_output_tokens=8).to_message())
    error = worker.until("error")

    assert (error["exp_id"], error["kind"], error["permanent"], error["engine_lost"]) == ("e1-c1", "died", False, True)
    assert error["message"] == "the engine process was killed by SIGSEGV in phase window"
    assert "child: last words" in rig.log_of("e1")
    assert rig.log_of("e1").splitlines()[-1] == error["log_tail"].splitlines()[-1]
    assert worker.run(rig.request("e2"))[-1]["engine_reused"] is False
    worker.close()


def test_garbage_and_impossible_orders_are_refused_and_the_worker_goes_on(rig: Rig):
    worker = RawWorker(rig)

    worker.send({"type": "unload"})
    worker.until("unloaded")  # nothing was loaded
    worker.send_raw(b"no message\n")
    assert worker.until("error", kind="channel")["exp_id"] is None
    worker.send({"type": "dance"})
    assert "dance" in worker.until("error", kind="channel")["message"]
    worker.send({"type": "run", "config": {}})
    assert "missing" in worker.until("error", kind="channel")["message"]
    worker.send({**rig.request("e1").to_message(), "result_dir": str(rig.folder / "missing")})
    assert "No such file" in worker.until("error", exp_id="e1-c1", kind="engine")["message"]

    assert worker.run(rig.request("e2"))[-1]["type"] == "result"
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

    assert "Loading shards 50%" in worker.until("progress", exp_id="e-c1")["text"]
    go_on.write_text("now\n")
    worker.until("result")
    worker.close()


def test_a_worker_without_a_host_ends_at_once(rig: Rig):
    with open(os.devnull, "rb") as nothing:
        child = rig.start(stdin=nothing.fileno())

    assert child.wait() == 0
