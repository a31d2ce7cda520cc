"""Cycles added by `--until`, budgets, and `lem status`, with real processes that are killed and stopped."""

import json
import signal
from typing import Any

import pytest

from lem.base.errors import ExitCode
from tests.campaign_rig import CampaignRig, campaign_text

# No campaign is ever that narrow, so the cycles end at the most.
NEVER = ("--until", "ci=0.0001%:output_tok_per_s")
HANG = {"at": "generate", "do": "hang"}


@pytest.fixture
def rig(tmp_path):
    with CampaignRig(tmp_path, campaign_text(outputs=(4,))).cleaned() as rig:
        yield rig


def _hang_in_cycle(rig, cycle):
    """Hang in the first try at a cycle: its folder is there while it runs."""
    results = rig.folder / "results" / "demo"
    return {"at": "generate", "do": "shell", "command": f"ls {results}/* | grep -q -- -c{cycle} && sleep 1000 || true"}


def _status(rig, *words):
    ended = rig.lem("status", *words)
    assert (ended.code, ended.err) == (0, "")
    return ended.out


def _status_document(rig):
    document: dict[str, Any] = json.loads(_status(rig, "demo", "--json"))
    return document


def test_cycles_are_added_until_the_most_and_the_table_says_what_that_does_to_intervals(rig):
    ended = rig.run("--yes", *NEVER, "--max-cycles", "6")
    assert ended.code == 0, ended.err
    assert len(rig.records()) == 6
    assert rig.manifest().is_complete
    assert "Top-up: adding cycle 6" in ended.err
    assert "Top-up: 6 cycles is the maximum" in ended.err
    assert "so that they hold whenever the run stops" in " ".join(ended.out.split())


def test_killed_in_an_added_cycle_it_is_resumed_with_that_cycle(rig):
    running = rig.start("--yes", "--json", *NEVER, "--max-cycles", "7", rules=[_hang_in_cycle(rig, 6)])
    running.wait_for_event("experiment_started", cycle=6)
    running.send(signal.SIGKILL)
    running.wait()
    assert _status_document(rig)["state"] == "crashed"
    resumed = rig.run("--resume", *NEVER, "--max-cycles", "7")
    assert resumed.code == 0, resumed.err
    assert "Campaign changed" not in resumed.err
    assert [record.identity.cycle_index for record in rig.records()] == list(range(7))
    assert [record.identity.order_index for record in rig.records()] == list(range(7))
    assert _status_document(rig)["state"] == "done"


def test_a_budget_that_is_used_up_ends_with_its_own_code_and_says_how_to_go_on(rig):
    rig.write(campaign_text(outputs=(4,), cycles=3))
    ended = rig.run("--yes", "--budget", "0.001s")
    assert ended.code == ExitCode.BUDGET
    assert "time budget reached; resume with: " in ended.err
    assert "--resume" in ended.err
    assert "its deadline passed" in _status(rig, "demo")
    resumed = rig.run("--resume")
    assert resumed.code == 0
    assert len(rig.records()) == 3


def test_status_follows_a_campaign_from_another_shell_and_after_its_death(rig):
    assert _status(rig, "--json") == "[]\n"
    running = rig.start("--yes", "--json", rules=[HANG])
    running.wait_for_event("phase", phase="window")
    seen = _status_document(rig)
    assert (seen["state"], seen["left"]) == ("running", 2)
    assert seen["holder"]["pid"] == running.process.pid
    assert (seen["activity"]["doing"], seen["activity"]["phase"]) == ("experiment", "window")
    assert [item["status"] for item in seen["experiments"]] == ["running", "pending"]
    before = rig.tree()
    running.send(signal.SIGKILL)
    running.wait()
    shown = _status(rig, "demo")
    assert "demo · crashed" in shown
    assert f"process {running.process.pid} ended unexpectedly" in " ".join(shown.split())
    assert "measuring, since" in shown
    assert shown.rstrip().endswith("--resume")
    unchanged = {path: data for path, data in rig.tree().items() if path.startswith(".state")}
    assert unchanged.items() <= before.items()
