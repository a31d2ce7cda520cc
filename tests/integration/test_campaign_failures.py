"""Engines and disks that fail in every way: what is measured is kept, what may work again is tried, the rest told."""

import os
import signal

import pytest

from tests.campaign_rig import campaign_text
from tests.doubles.fault_injector import VARIABLE, Fault, read_journal
from tests.processes import wait_for
from tests.webhook import serving_webhook


def _at(outputs, at, do, **more):
    return {"at": at, "do": do, "when": {"max_output_tokens": outputs}, **more}


def test_each_failure_has_its_own_end_and_the_rest_of_the_campaign_goes_on(rig):
    rig.write(campaign_text(outputs=(1, 2, 3, 4, 5, 6, 7), cycles=1, reuse="none"))
    rules = [
        _at(1, "load", "refuse", text="torch_compile is not for this engine"),
        _at(2, "load", "fail", text="out of memory", kind="out_of_memory", permanent=True),
        _at(3, "load", "crash", text="a library broke"),
        _at(4, "generate", "crash", text="broke once", once="crashed"),
        _at(5, "generate", "signal", number=signal.SIGKILL, once="killed"),
        _at(6, "generate", "print", text='{"type": "result"} is printed by engines too'),
    ]
    ended = rig.run("--yes", "--json", rules=rules)
    assert ended.code == 1
    rig.assert_no_process_left()
    events = ended.events()
    failed = {event["config_name"]: event for event in events if event["event"] == "experiment_failed"}
    names = [f"pytorch-max_output_tokens={outputs}" for outputs in range(1, 8)]
    assert sorted(failed) == names[:3]
    assert failed[names[0]]["error"] == "torch_compile is not for this engine"
    assert failed[names[0]]["error_kind"] == "option"
    assert failed[names[1]]["error_kind"] == "out_of_memory"
    assert "a library broke" in failed[names[2]]["error"]
    assert "RuntimeError: a library broke" in (rig.folder / failed[names[2]]["log"]).read_text()
    retried = [event["config_name"] for event in events if event["event"] == "experiment_retried"]
    assert retried == [names[2], names[3], names[4]]
    entries = {entry.config_name: entry for entry in rig.manifest().experiments}
    assert [entries[name].status for name in names] == ["failed"] * 3 + ["completed"] * 4
    assert [entries[name].retry_count for name in names] == [0, 0, 1, 1, 1, 0, 0]
    assert "SIGKILL" in str(entries[names[4]].attempts[0].error)
    # What an engine prints goes to the experiment's log, wherever it wrote it.
    log = (rig.folder / str(entries[names[5]].attempts[0].log_path)).read_text()
    assert [line.split(":")[0] for line in log.splitlines() if "printed by engines" in line][:3] == [
        "print",
        "write",
        "child",
    ]
    assert events[-1]["event"] == "summary"
    assert "4 completed, 3 failed, 0 left" in ended.err
    assert "some experiments failed; resume with: " in ended.err


def test_what_is_missing_is_reported_at_once_before_anything_is_measured(rig):
    text = campaign_text(outputs=(1, 2, 3), cycles=2).replace("model: none", "model: owner/name")
    rig.write(text.replace("    gpus:", "    model.revision: [v1, v2, v3]\n    gpus:"))
    rules: list[dict[str, object]] = [{"at": "load", "do": "shell", "command": "touch loaded"}]
    for revision in ("v1", "v3"):
        failure = {"text": f"model: no revision {revision}", "kind": "model", "permanent": True}
        rules.append({"at": "check", "do": "fail", "when": {"model.revision": revision}, **failure})
    ended = rig.run("--yes", rules=rules)
    assert ended.code == 2
    assert "2 problems, so nothing was run" in ended.err
    assert "  - model: no revision v1 (3 of 9 configurations: " in ended.err
    assert "  - model: no revision v3 (3 of 9 configurations: " in ended.err
    assert not (rig.folder / "loaded").exists()
    assert not (rig.folder / ".state" / "demo" / "campaign_manifest.json").exists()
    rig.assert_no_process_left()


@pytest.mark.parametrize("victim", [("worker",), ("worker", "--engine")], ids=["supervisor", "engine"])
def test_a_worker_that_is_killed_is_replaced_and_the_experiment_tried_again(rig, victim):
    rig.write(campaign_text(outputs=(4,), cycles=1))
    rules = [{"at": "generate", "do": "hang", "once": "hung"}]
    running = rig.start("--yes", "--json", rules=rules, is_warm=False)  # victims are known by their command lines
    running.wait_for_event("phase", phase="window")
    wait_for(lambda: (rig.folder / "hung").exists() or None)  # else the next attempt hangs, for the first time
    os.kill(rig.marker.pid_of(*victim, without="--sampler"), signal.SIGKILL)
    ended = running.wait()
    assert ended.code == 0, ended.err
    rig.assert_no_process_left()
    (entry,) = rig.manifest().experiments
    assert (entry.status, entry.retry_count) == ("completed", 1)
    assert "SIGKILL" in str(entry.attempts[0].error)


@pytest.mark.parametrize(
    ("process", "nth", "where"), [("engine", 6, "result.json"), ("host", 15, "campaign_manifest.json")]
)
def test_a_full_disk_stops_with_the_rest_pending_and_the_resume_completes_it(rig, process, nth, where):
    fault = Fault(str(rig.folder / "journal"), process, "lem.write", nth, "enospc")
    ended = rig.run("--yes", **{VARIABLE: fault.to_json()})
    struck = [entry.detail for entry in read_journal(rig.folder / "journal") if entry.action]
    assert [path.endswith(where) for path in struck] == [True]
    assert ended.code == 1
    rig.assert_no_process_left()
    assert "no space left on device" in ended.err.lower()
    assert "--resume" in ended.err
    assert "stopped; resume with: " in ended.err
    assert "Traceback" not in ended.err
    kept = rig.results()
    assert 0 < len(kept) < 4
    resumed = rig.run("--resume")
    assert resumed.code == 0, resumed.err
    assert rig.statuses() == ["completed"] * 4
    assert kept.items() <= rig.results().items()
    assert len(rig.results()) == 4


def test_fail_fast_ends_after_the_first_failure_and_the_webhook_hears_of_it(rig):
    rig.write(campaign_text(more="notification: {webhook_url: '${HOOK}', on: failure}\n"))
    rules = [_at(4, "load", "refuse", text="not for this engine")]
    with serving_webhook() as hook:
        ended = rig.run("--yes", "--fail-fast", rules=rules, HOOK=hook.url)
        _, _, message = hook.next()
    assert ended.code == 1
    assert (message["event"], message["failed"], message["remaining"]) == ("failure", 1, 4)
    assert rig.statuses() == ["failed", "pending", "pending", "pending"]
    assert "0 completed, 1 failed, 3 left" in ended.err
    assert "stopped; resume with: " in ended.err
