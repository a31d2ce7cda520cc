import io
import json
import shlex
from pathlib import Path

import pytest

from lem.base import log
from lem.base.errors import EngineError, InfrastructureError, OptionRefused, UserError
from lem.cli.campaign_run import (
    check_still_there,
    closing_lines,
    exit_code_of_outcome,
    resume_command,
    show_results,
    webhook_message,
)
from lem.config.campaign_config import CampaignNotificationConfig
from lem.orchestration.manifest import CampaignManifest, CampaignManifestEntry
from lem.orchestration.resume import RunOptions
from lem.orchestration.schedule import CampaignOutcome, Stopped
from lem.results.run import read_run
from lem.results.store import Repository
from tests.campaign_doubles import Place, make_campaign

HOOK = "http://localhost/secret"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    return Place(tmp_path)


def _outcome(*statuses, stopped=None, error=None):
    entries = [
        CampaignManifestEntry(f"e{index}", "n", "p", "h", "pytorch", None, 0, status)
        for index, status in enumerate(statuses)
    ]
    manifest = CampaignManifest("id", "demo", "", "", "hash", len(entries), entries, run_id="20260714T100000Z-3fa1")
    return CampaignOutcome(manifest, stopped, error)


HIDDEN = "python -m lem campaign c.yaml --set 'notification.webhook_url=(hidden)' --resume"


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        ("/usr/bin/python3 lem.pyz campaign c.yaml", "/usr/bin/python3 lem.pyz campaign c.yaml --resume"),
        ("python3 -I -S lem.pyz campaign c.yaml", "python3 -I -S lem.pyz campaign c.yaml --resume"),
        ("python -m lem campaign --fresh c.yaml", "python -m lem campaign c.yaml --resume"),
        ("python lem.pyz campaign c.yaml --resume -y", "python lem.pyz campaign c.yaml -y --resume"),
        ("python lem.pyz campaign c.yaml --no-resume", "python lem.pyz campaign c.yaml --resume"),
        ("python lem.pyz campaign -q -- -c.yaml", "python lem.pyz campaign -q --resume -- -c.yaml"),
        ("python -m lem campaign 'c d' --set 'a=[1, 2]'", "python -m lem campaign 'c d' --set 'a=[1, 2]' --resume"),
        (f"python -m lem campaign c.yaml --set notification.webhook_url={HOOK}", HIDDEN),
        (f"python -m lem campaign c.yaml --set=notification.webhook_url={HOOK}", HIDDEN.replace("--set '", "'--set=")),
        (f"python -m lem campaign c.yaml --set 'notification={{a: {HOOK}}}'", HIDDEN.replace(".webhook_url", "")),
    ],
)
def test_the_resume_command_is_the_one_that_was_typed_with_resume_and_without_secrets(typed, command):
    assert resume_command(shlex.split(typed)) == command


def test_a_script_on_the_path_is_called_by_its_name(tmp_path, monkeypatch):
    script = tmp_path / "lem"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert resume_command(["/venv/bin/python", str(script), "campaign", "c.yaml"]) == "lem campaign c.yaml --resume"
    elsewhere = resume_command(["/venv/bin/python", "/elsewhere/lem", "campaign", "c.yaml"])
    assert elsewhere == "/venv/bin/python /elsewhere/lem campaign c.yaml --resume"


def _repository(campaign):
    return Repository(Path(campaign.io.results_dir), campaign.slug)


def test_the_closing_lines_count_what_is_left_and_tell_what_stood_in_the_way_and_how_to_resume(tmp_path):
    full = InfrastructureError("the disk is full", "make room")
    outcome = _outcome("completed", "failed", "pending", "running", "skipped", error=full)
    *lines, how_to_resume = closing_lines(_repository(make_campaign(tmp_path)), outcome, log.Console(io.StringIO()))
    assert lines == [
        f"1 completed, 1 failed, 2 left; results in {tmp_path}/results/demo/20260714T100000Z-3fa1",
        "error: the disk is full",
        "hint: make room",
    ]
    assert how_to_resume.startswith("some experiments failed; resume with: ")
    late = _outcome("pending", stopped=Stopped.DEADLINE)
    *_, how_to_resume = closing_lines(_repository(make_campaign(tmp_path)), late, log.Console(io.StringIO()))
    assert how_to_resume.startswith("time budget reached; resume with: ")


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (_outcome("completed", "skipped"), 0),
        (_outcome("completed", "failed"), 1),
        (_outcome("completed", "pending", error=InfrastructureError("the disk is full")), 1),
        (_outcome("completed", "pending", stopped=Stopped.DEADLINE), 124),
        (_outcome(), 0),
    ],
)
def test_the_exit_code_says_whether_something_failed(outcome, code):
    assert exit_code_of_outcome(outcome) == code


def test_results_that_vanish_when_all_is_written_are_no_success(tmp_path):
    outcome = _outcome("completed", "completed", "failed")
    for entry in outcome.manifest.get_by_status("completed"):
        entry.result_path = str(tmp_path / entry.exp_id)
        (tmp_path / entry.exp_id).write_bytes(b"{}")
    assert check_still_there(outcome) is outcome
    (tmp_path / "e1").unlink()
    ended = check_still_there(outcome)
    assert (ended.manifest.completed_count, ended.stopped) == (1, Stopped.INFRASTRUCTURE)
    assert str(ended.error) == f"1 result missing, or not as measured: {tmp_path}/e1"
    assert exit_code_of_outcome(ended) == 1


def _hooked(tmp_path, on):
    return make_campaign(tmp_path, notification=CampaignNotificationConfig(webhook_url=HOOK, on=on))


@pytest.mark.parametrize(
    ("outcome", "on", "heard"),
    [
        (_outcome("completed", "completed"), ("complete", "failure"), ("complete", 2, 0, None)),
        (_outcome("completed", "failed"), ("complete", "failure"), ("failure", 1, 1, None)),
        (_outcome("pending", error=InfrastructureError("full")), ("failure",), ("failure", 0, 1, "full")),
        (_outcome("completed"), ("failure",), None),
        (_outcome("failed"), ("complete",), None),
        (_outcome("pending", stopped=Stopped.SIGNAL), ("complete", "failure"), None),
        (UserError("not writable"), ("failure",), ("failure", 0, None, "not writable")),
        (UserError("not writable"), ("complete",), None),
    ],
)
def test_a_webhook_hears_what_it_asked_for_and_nothing_of_a_person_who_stops_it(tmp_path, outcome, on, heard):
    message = webhook_message(_hooked(tmp_path, on), outcome)
    assert HOOK not in json.dumps(message)
    keys = ("event", "completed", "remaining", "error")
    assert (None if message is None else tuple(message[key] for key in keys)) == heard


def _shown(campaign, outcome, *, is_json=False):
    out = io.StringIO()
    show_results(_repository(campaign), outcome, out, is_json=is_json)
    return out.getvalue()


def test_the_table_holds_the_results_of_this_run_and_of_the_plan_alone(place):
    place.runner(make_campaign(place.folder, outputs=(4, 8))).run()
    place.clock.elapsed_s += 60
    outcome = place.runner(make_campaign(place.folder), options=RunOptions(resume=False)).run()
    document = json.loads(_shown(make_campaign(place.folder), outcome, is_json=True))
    assert (document["event"], len(document["run_ids"])) == ("summary", 1)
    assert [item["n_cycles"] for item in document["configurations"]] == [2, 2]
    edited = make_campaign(place.folder, outputs=(8, 16))
    outcome = place.runner(edited, options=RunOptions(resume=True)).run()
    text = _shown(edited, outcome)
    assert "max_output_tokens=8" in text
    assert "max_output_tokens=4" not in text


def test_a_configuration_keeps_its_number_when_the_grid_is_edited(place):
    place.runner(make_campaign(place.folder, outputs=(8, 16))).run()
    edited = make_campaign(place.folder, outputs=(4, 8))
    outcome = place.runner(edited, options=RunOptions(resume=True)).run()
    document = json.loads(_shown(edited, outcome, is_json=True))
    assert {item["config_name"]: item["number"] for item in document["configurations"]} == {
        "pytorch-max_output_tokens=8": 1,
        "pytorch-max_output_tokens=4": 3,
    }
    run = read_run(place.folder / "results", "demo", str(outcome.manifest.run_id))
    assert [(item.number, item.is_removed) for item in run.configurations] == [(1, False), (3, False), (2, True)]
    assert [run.select(word).number for word in ("2", "max_output_tokens=4")] == [2, 3]
    again = make_campaign(place.folder, outputs=(16, 8))
    outcome = place.runner(again, options=RunOptions(resume=True)).run()
    run = read_run(place.folder / "results", "demo", str(outcome.manifest.run_id))
    assert [(item.name, item.number) for item in run.with_results] == [
        ("pytorch-max_output_tokens=8", 1),
        ("pytorch-max_output_tokens=16", 2),
    ]


@pytest.mark.parametrize(
    ("size", "error", "shown"),
    [
        (8, OptionRefused("no"), "no valid result: 2 pytorch-max_output_tokens=8"),
        (4, EngineError("full", kind="full"), ""),  # which stops the campaign at its first experiment
    ],
)
def test_a_configuration_that_only_failed_is_in_the_table_and_without_any_result_there_is_none(
    place, size, error, shown
):
    campaign = make_campaign(place.folder)
    text = _shown(campaign, place.runner(campaign, {f"pytorch-max_output_tokens={size}": [error]}).run())
    assert (shown in text, bool(text)) == (True, bool(shown))
