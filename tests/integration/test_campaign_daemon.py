"""Daemons in real time, for some seconds, and what a person learns before a wait begins."""

import json
import re
import sys

from tests.campaign_rig import CampaignRig, campaign_text
from tests.webhook import serving_webhook


def run_daemon(rig, total_s):
    """A daemon's folder, how it ended, and the run ids that have results."""
    folder = rig.folder / str(total_s)
    folder.mkdir()
    daemon = f"daemon: {{enabled: true, interval: 1s, total_duration: {total_s}s}}\n"
    case = CampaignRig(folder, campaign_text(outputs=(4,), cycles=1, more=daemon))
    ended = case.start("--yes", LEMTEST_MARKER=rig.marker.value).wait()
    assert ended.code == 0, ended.err
    # A run that the end of the time meets before its first experiment has a folder, but no result.
    return case, ended, sorted({path.parents[2].name for path in (folder / "results" / "demo").rglob("result.json")})


def test_a_daemon_repeats_under_new_run_ids_until_its_time_is_up_and_ends_well(rig):
    # How many runs there are in a time is up to the machine; only a slow one has to be given more of it.
    total_s = 8
    case, ended, runs = run_daemon(rig, total_s)
    if len(runs) < 2:
        total_s = 60
        case, ended, runs = run_daemon(rig, total_s)
    rig.assert_no_process_left()
    assert len(runs) >= 2
    assert len(case.results()) == len(runs)
    # Each run has a manifest, also one without a result.
    manifests = [json.loads(path.read_text()) for path in (case.folder / ".state" / "demo").glob("*.json")]
    begun = sorted(manifest["run_id"] for manifest in manifests)
    assert case.manifest().run_id == begun[-1]
    assert begun[: len(runs)] == runs
    assert len(begun) - len(runs) in (0, 1)
    # A daemon is quiet unless told otherwise: what happens goes to the log, when it runs is on the screen.
    lines = ended.err.splitlines()
    assert "quiet: logging to .state/demo/lem.log" in lines
    assert any(re.fullmatch(r"Daemon: next run of the campaign in (1\.0|0\.\d) s", line) for line in lines)
    assert f"Daemon: total duration {total_s}s reached, stopping after {len(runs)} cycles" in lines
    assert not any("starting" in line for line in lines)
    log = (case.folder / ".state" / "demo" / "lem.log").read_text()
    assert len(re.findall(r"\[1/1\] ok", log)) == len(runs)
    assert f"Daemon: total duration {total_s}s reached, stopping after {len(runs)} cycles" in log
    assert ended.out.count("Single cycle: use --cycles 3+ for confidence intervals") == len(runs)


def test_a_daemon_whose_next_run_cannot_begin_ends_and_the_webhook_hears_of_it(rig):
    more = "daemon: {enabled: true, interval: 1s}\nnotification: {webhook_url: '${HOOK}'}\n"
    rig.write(campaign_text(outputs=(4,), cycles=1, more=more))
    # The configurations are written when a run starts, so the run during which this happens goes on.
    block = {"at": "load", "do": "shell", "command": "rm -r configs; echo in the way > configs"}
    with serving_webhook() as hook:
        running = rig.start("--yes", rules=[block], HOOK=hook.url)
        _, _, first = hook.next()
        _, _, second = hook.next()
    ended = running.wait()
    assert ended.code == 2
    rig.assert_no_process_left()
    assert first["event"] == "complete"
    assert (second["event"], second["run_id"]) == ("failure", None)
    assert "configs" in second["error"]
    assert second["error"] in ended.err
    assert second["error"] in (rig.folder / ".state" / "demo" / "lem.log").read_text()


def test_what_could_not_run_at_its_time_is_refused_before_the_wait(rig):
    rig.write(campaign_text(more="schedule: {at: '03:00'}\n"))
    wrapper = rig.folder / "bare-python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    wrapper.chmod(0o755)
    ended = rig.run("--yes", "--python", "./bare-python")
    assert ended.code == 2
    assert "torch and transformers are not installed" in ended.err
    assert "pip install torch transformers" in ended.err
    assert "waiting" not in ended.err
    rig.assert_no_process_left()
    assert not (rig.folder / ".state" / "demo" / "campaign_manifest.json").exists()
