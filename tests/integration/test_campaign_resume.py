"""Going on after the host was killed, and who may run at the same time."""

import signal
import socket

from tests.campaign_rig import campaign_text

HANG_AT_EIGHT = {"at": "generate", "do": "hang", "when": {"max_output_tokens": 8}}


def test_a_killed_campaign_is_resumed_and_every_experiment_is_measured_once(rig):
    running = rig.start("--yes", "--json", rules=[HANG_AT_EIGHT])
    running.wait_for_event("phase", phase="window", done=1)
    # While it runs nobody else may run it, and the error says who does.
    second = rig.run("--yes")
    assert second.code == 5
    holder = f"pid {running.process.pid} on {socket.gethostname()}, campaign demo"
    assert holder in second.err
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    rig.assert_no_process_left()
    assert rig.statuses() == ["completed", "running", "pending", "pending"]
    (kept,) = rig.results().items()
    run_id = rig.manifest().run_id
    # Off a terminal nobody can be asked, and nothing is decided for a person.
    unsaid = rig.run()
    assert unsaid.code == 2
    assert "demo is not finished: 3 remaining (1 completed, 0 failed)" in unsaid.err
    assert "--resume" in unsaid.err
    assert "--fresh" in unsaid.err
    assert rig.statuses() == ["completed", "running", "pending", "pending"]
    resumed = rig.run("--resume")
    assert resumed.code == 0, resumed.err
    assert "Resuming: 3 remaining (1 completed, 0 failed)" in resumed.err
    manifest = rig.manifest()
    assert (manifest.run_id, manifest.is_complete) == (run_id, True)
    assert kept in rig.results().items()
    assert len({record.identity.experiment_id for record in rig.records()}) == len(rig.records()) == 4
    assert [record.identity.attempt for record in rig.records()] == [1, 2, 1, 1]


def test_a_completed_campaign_shows_its_table_again_and_measures_nothing(rig):
    rig.write(campaign_text(outputs=(4,), cycles=2))
    assert rig.run("--yes").code == 0
    results, run_id = rig.results(), rig.manifest().run_id
    again = rig.run("--resume", "-v")
    assert again.code == 0
    assert "Resuming: 0 remaining (2 completed, 0 failed)" in again.err
    assert "worker" not in again.err
    assert "t interval" in again.out
    assert (rig.results(), rig.manifest().run_id) == (results, run_id)


def test_a_python_that_is_no_python_is_refused(rig):
    assert "no such program" in (ended := rig.run("--yes", "--python", "nothing")).err
    assert ended.code == 2
    ended = rig.run("--yes", "--python", "/bin/false")
    assert ended.code == 2
    assert "the worker did not start" in ended.err
    assert "Traceback" not in ended.err
