"""Daemons in real time, for some seconds, and what a person learns before a wait begins."""

import json
import re
import sys

import pytest

from tests.campaign_rig import CampaignRig, campaign_text
from tests.webhook import serving_webhook

DAEMON = "daemon: {enabled: true, interval: 1s, total_duration: 8s}\n"


@pytest.fixture
def rig(tmp_path):
    with CampaignRig(tmp_path).cleaned() as rig:
        yield rig


def test_a_daemon_repeats_under_new_run_ids_until_its_time_is_up_and_ends_well(rig):
    rig.write(campaign_text(outputs=(4,), cycles=1, more=DAEMON))
    ended = rig.run("--yes")
    assert ended.code == 0, ended.err
    rig.assert_no_process_left()
    runs = sorted(path.name for path in (rig.folder / "results" / "demo").iterdir())
    assert len(runs) >= 2
    assert len(rig.results()) == len(runs)
    # Each run has a manifest; one that the end of the time met before its first experiment has no result.
    manifests = [json.loads(path.read_text()) for path in (rig.folder / ".state" / "demo").glob("*.json")]
    begun = sorted(manifest["run_id"] for manifest in manifests)
    assert rig.manifest().run_id == begun[-1]
    assert begun[: len(runs)] == runs
    assert len(begun) - len(runs) in (0, 1)
    # A daemon is quiet unless told otherwise: what happens goes to the log, when it runs is on the screen.
    lines = ended.err.splitlines()
    assert "quiet: what happens is written to .state/demo/lem.log" in lines
    assert "Daemon: next run of the campaign in 1.0 s" in lines
    assert f"Daemon: total duration 8s reached, stopping after {len(runs)} cycles" in lines
    assert not any("starting" in line for line in lines)
    log = (rig.folder / ".state" / "demo" / "lem.log").read_text()
    assert len(re.findall(r"\[1/1\] ok", log)) == len(runs)
    assert f"Daemon: total duration 8s reached, stopping after {len(runs)} cycles" in log
    assert ended.out.count("Single cycle: use --cycles 3+ for confidence intervals") == len(runs)


def test_a_daemon_whose_next_run_cannot_begin_ends_and_the_webhook_hears_of_it(rig):
    more = "daemon: {enabled: true, interval: 1s}\nnotification: {webhook_url: '${HOOK}'}\n"
    rig.write(campaign_text(outputs=(4,), cycles=1, more=more))
    with serving_webhook() as hook:
        running = rig.start("--yes", HOOK=hook.url)
        _, _, first = hook.next()
        (rig.folder / "results").rename(rig.folder / "before")
        (rig.folder / "results").write_text("in the way")
        _, _, second = hook.next()
    ended = running.wait()
    assert ended.code == 2
    rig.assert_no_process_left()
    assert first["event"] == "complete"
    assert (second["event"], second["run_id"]) == ("failure", None)
    assert "results" in second["error"]
    assert second["error"] in ended.err
    assert second["error"] in (rig.folder / ".state" / "demo" / "lem.log").read_text()


def test_what_could_not_run_at_its_time_is_refused_before_the_wait(rig):
    rig.write(campaign_text(more="schedule: {at: '03:00'}\n"))
    wrapper = rig.folder / "bare-python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    wrapper.chmod(0o755)
    ended = rig.run("--yes", "--python", "./bare-python")
    assert ended.code == 2
    assert "has no torch" in ended.err
    assert "waiting" not in ended.err
