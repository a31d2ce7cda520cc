"""Signals from a shell and from a terminal: what runs is stopped, what was measured is kept, a resume completes it."""

import re
import signal
import subprocess
from datetime import datetime

import pytest

from tests.campaign_rig import EIGHT, campaign_text
from tests.processes import wait_for

HANG_AT_EIGHT = {"at": "generate", "do": "hang", "when": {"max_output_tokens": 8}}


def _resume_command(text):
    found = re.search(r"^stopped; resume with: (.*)$", text, re.MULTILINE)
    assert found, text
    return found[1]


def test_ctrl_c_stops_the_experiment_keeps_the_rest_and_says_a_command_that_completes_it(rig):
    rig.write(campaign_text(cycles=1))
    running = rig.start("--yes", "--fresh", "--json", rules=[HANG_AT_EIGHT])
    running.wait_for_event("phase", phase="window", done=1)
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130
    rig.assert_no_process_left()
    assert rig.statuses() == ["completed", "pending"]
    assert rig.manifest().experiments[1].error == "interrupted"
    (kept,) = rig.results().items()
    assert [event["event"] for event in ended.events()[-3:]] == [
        "experiment_interrupted",
        "campaign_finished",
        "summary",
    ]
    assert "1 completed, 0 failed, 1 left" in ended.err
    # The command as it was printed, in a shell, where it was printed.
    command = _resume_command(ended.err)
    again = subprocess.run(["bash", "-c", command], cwd=rig.folder, env=rig.environ(), capture_output=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "--fresh" not in command
    assert rig.statuses() == ["completed", "completed"]
    assert kept in rig.results().items()
    assert len(rig.results()) == 2


def test_ctrl_c_while_models_are_looked_for_starts_nothing_and_leaves_nothing(rig):
    running = rig.start(
        "--yes", rules=[{"at": "check", "do": "shell", "command": "touch asked"}, {"at": "check", "do": "hang"}]
    )
    wait_for(lambda: (rig.folder / "asked").exists() or None)
    running.send(signal.SIGINT)
    assert running.wait().code == 130
    rig.assert_no_process_left()
    assert not (rig.folder / ".state" / "demo" / "campaign_manifest.json").exists()


@pytest.mark.parametrize("rule", [{"at": "load", "do": "hang"}, {"at": "load", "do": "hold_gil"}])
def test_sigterm_while_loading_ends_it_with_its_own_exit_code(rig, rule):
    running = rig.start("--yes", "--json", rules=[rule])
    running.wait_for_event("phase", phase="load")
    running.send(signal.SIGTERM)
    ended = running.wait()
    assert ended.code == 143
    rig.assert_no_process_left()
    assert rig.statuses() == ["pending"] * 4
    assert "--resume" in _resume_command(ended.err)


def test_a_second_signal_kills_what_does_not_go(rig):
    # An engine that neither answers TERM nor gives the interpreter back is waited for, until somebody insists.
    announce = {"at": "generate", "do": "shell", "command": "touch stubborn"}
    rules = [{"at": "generate", "do": "ignore_term"}, announce, {"at": "generate", "do": "hold_gil"}]
    running = rig.start("--yes", "--json", rules=rules)
    wait_for(lambda: (rig.folder / "stubborn").exists() or None)
    running.send(signal.SIGINT)
    running.wait_for_text("a second signal kills")
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130
    rig.assert_no_process_left()
    assert rig.statuses() == ["pending"] * 4
    assert "--resume" in _resume_command(ended.err)


def test_ctrl_c_on_a_terminal_reaches_lem_alone_and_the_worker_through_it(rig):
    rig.write(campaign_text(cycles=1))
    terminal = rig.terminal("--yes", rules=[HANG_AT_EIGHT])
    terminal.read_until("output_tokens=8 · pytorch · cycle 1/1 · measuring")
    terminal.type("\x03")
    assert terminal.wait() == 130
    rig.assert_no_process_left()
    assert f"interrupted\x1b[0m {EIGHT}" in terminal.shown
    assert _resume_command(terminal.shown.replace("\r", "")).endswith("campaign c.yaml --yes --resume")
    assert rig.statuses() == ["completed", "pending"]


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_terminal_that_is_closed_stops_the_campaign_in_order(rig, options):
    rig.write(campaign_text(cycles=1))
    terminal = rig.terminal("--yes", *options, rules=[HANG_AT_EIGHT])
    measuring = (
        ['"experiment_completed"', '"window"'] if options else ["output_tokens=8 · pytorch · cycle 1/1 · measuring"]
    )
    for text in measuring:
        terminal.read_until(text)
    assert terminal.close() == 129
    rig.assert_no_process_left()
    assert rig.statuses() == ["completed", "pending"]
    assert rig.manifest().experiments[1].error == "interrupted"
    assert rig.run("--resume").code == 0


def test_a_person_is_asked_about_an_unfinished_campaign(rig):
    rig.write(campaign_text(cycles=1))
    assert rig.run("--yes", rules=[{**HANG_AT_EIGHT, "do": "refuse"}]).code == 1
    run_id = rig.manifest().run_id
    asked = rig.terminal()
    asked.read_until("campaign demo is not finished: 1 remaining (1 completed, 1 failed)")
    asked.read_until("[Y/n] ")
    asked.type("\x03")
    assert asked.wait() == 130
    assert rig.statuses() == ["completed", "failed"]
    answered = rig.terminal()
    answered.read_until("[Y/n] ")
    answered.type("perhaps\n")
    answered.read_until("[Y/n] ")
    answered.type("\n")
    assert answered.wait() == 0, answered.shown
    assert "Resuming: 1 remaining (1 completed, 1 failed)" in answered.shown
    assert (rig.manifest().run_id, rig.statuses()) == (run_id, ["completed", "completed"])


def test_a_person_may_begin_anew_or_walk_away(rig):
    rig.write(campaign_text(outputs=(4,), cycles=1))
    assert rig.run("--yes", rules=[{"at": "load", "do": "refuse"}]).code == 1
    run_id = rig.manifest().run_id
    left = rig.terminal()
    left.read_until("[Y/n] ")
    left.type("\x04")
    assert left.wait() == 2
    assert "--resume" in left.shown
    anew = rig.terminal()
    anew.read_until("[Y/n] ")
    anew.type("n\n")
    assert anew.wait() == 0, anew.shown
    assert rig.manifest().run_id != run_id
    assert "The earlier manifest is now" in anew.shown


def test_a_signal_while_waiting_for_the_schedule_measures_nothing(rig):
    # Neither of the two is now, whenever the test runs.
    at = "03:00" if datetime.now().astimezone().hour >= 12 else "23:00"
    rig.write(campaign_text(more=f"schedule: {{at: '{at}'}}\n"))
    running = rig.start("--yes")
    running.wait_for_text(f"Schedule: waiting until {at} to start campaign")
    # Nobody else may begin it in the meantime.
    assert rig.run("--yes").code == 5
    running.send(signal.SIGTERM)
    ended = running.wait()
    assert ended.code == 143
    rig.assert_no_process_left()
    assert "stopped before the campaign started" in ended.err
    assert rig.results() == {}
