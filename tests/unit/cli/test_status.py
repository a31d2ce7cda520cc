import dataclasses
import json
import re
import shutil
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import pytest

from lem.cli.status import Viewer, render_status
from lem.orchestration.locks import Holder
from lem.orchestration.manifest import Attempt, CampaignManifest, CampaignManifestEntry
from lem.orchestration.status import Activity, CampaignStatus, remainder_of
from tests.campaign_doubles import Place, make_campaign
from tests.command_rig import run_lem
from tests.goldens import assert_golden
from tests.processes import ordinary_user

NOW = datetime(2026, 7, 14, 12, 30, tzinfo=timezone.utc)
VIEWER = Viewer(NOW, timezone.utc)
HOLDER = Holder(4711, "lab1", "demo", "2026-07-14T10:00:00.000000Z")
NAMES = ("pytorch-float16-batch_size=8", "vllm-float16-max_num_seqs=256", "vllm-float16-max_num_seqs=512")
RESUME = "lem campaign c.yaml --resume"
LOG = "results/demo/20260714T100000Z-3fa1/29a3920c1781-c1/attempt-2/log.txt"


def _entry(config, cycle, status, **more):
    at = f"2026-07-14T1{cycle}:0{config}:00.000000Z"
    attempts = (Attempt(1, result_path="r", valid=True, started_at=at, log_path=LOG),) if status != "pending" else ()
    result = "r" if status == "completed" else None
    more = {"attempts": attempts, "result_path": result, **more}
    exp_id = f"{config}-c{cycle + 1}"
    return CampaignManifestEntry(exp_id, NAMES[config], "", "", "vllm", None, cycle, status, **more)


def _manifest(running="running"):
    out_of_memory = "out of memory while the engine was loaded: 139 GiB of 141 GiB are in use by another process"
    experiments = [
        _entry(0, 0, "completed"),
        _entry(1, 0, "completed", attempts=(Attempt(1, result_path="r", valid=False),)),
        _entry(2, 0, "failed", error=out_of_memory),
        _entry(0, 1, "completed"),
        _entry(1, 1, running),
        *(_entry(config, 2, "pending") for config in range(3)),
        _entry(2, 1, "skipped"),
    ]
    created, updated = "2026-07-14T10:00:00.000000Z", "2026-07-14T12:29:00.000000Z"
    notes = [{"kind": "environment_change", "at": "", "changes": ["driver: 570.1 before, 580.2 now"]}]
    manifest = CampaignManifest("fe01ce2a", "Demo of backends", created, updated, "", 9, experiments, notes=notes)
    manifest.run_id = "20260714T100000Z-3fa1"
    return manifest


def _activity(**changes):
    known = {
        "run_id": "20260714T100000Z-3fa1",
        "pid": 4711,
        "host": "lab1",
        "started_at": "2026-07-14T10:00:00.000000Z",
        "updated_at": "2026-07-14T12:29:58.000000Z",
        "go_on": RESUME,
        "cwd": "/home/ada/my bench",
        "doing": "experiment",
        "since": "2026-07-14T12:26:55.000000Z",
        "exp_id": "1-c2",
        "config_name": NAMES[1],
        "phase": "window",
        "phase_done": 12,
        "phase_total": 100,
    }
    return Activity(**{**known, **changes})


def _status(state, **more):
    given = {"manifest": _manifest(), "activity": _activity(), **more}
    return CampaignStatus("Demo of backends", Path(".state/demo"), state, **given)


CRASH = "process 4711 ended without a word after 2026-07-14T12:29:58Z: killed, out of memory, or a bug"
BROKEN = "the manifest .state/demo/campaign_manifest.json is broken: Expecting value: line 1 column 1 (char 0)"


RUNNING = _status("running", holder=HOLDER, left_s=2100.0)
CRASHED = _status("crashed", reason=CRASH, hint="the kernel's log names what it killed", left_s=2100.0)
UNREADABLE = _status("unreadable", manifest=None, activity=None, reason=BROKEN, hint="--fresh sets it aside")


def _shown(status):
    """The lines as paragraphs: wrapped ones in one piece."""
    return re.sub(r"\n +", " ", render_status(status, VIEWER)).splitlines()


def test_a_crashed_campaign_as_it_is_shown():
    assert_golden("status/crashed.txt", render_status(CRASHED, VIEWER))


GAP = _activity(doing="gap", exp_id=None, phase=None, gap_ends_in_s=290.0)
ENDED = _activity(doing="ended", stopped="signal", exp_id=None)


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        (
            RUNNING,
            {
                "Demo of backends · running since 10:00",
                "run 20260714T100000Z-3fa1, process 4711 on lab1",
                "ends at 13:05, in 35m 00s",
                f"now        {NAMES[1]} · cycle 2 · measuring 12 of 100, since 12:26 (3m 05s)",
            },
        ),
        (
            _status(
                "running",
                manifest=_manifest("pending"),
                activity=GAP,
                holder=HOLDER,
            ),
            {"now        gap between experiments, at most 4m 50s more"},
        ),
        (
            _status(
                "stopped",
                manifest=_manifest("pending"),
                activity=ENDED,
                reason="a signal stopped it",
                left_s=100_000.0,
            ),
            {
                "about 1d 04h left",
                "why        a signal stopped it",
                "resume with: cd '/home/ada/my bench' && " + RESUME,
            },
        ),
        (
            _status("stopped", activity=_activity(doing="gap", exp_id=None, phase=None)),
            {"last       gap between experiments, since 12:26"},
        ),
        (
            _status("running", activity=None, holder=HOLDER, left_s=None),
            {f"now        {NAMES[1]} · cycle 2 · phase unknown, since 11:01 (1h 29m)"},
        ),
        (UNREADABLE, {"Demo of backends · unreadable", f"why        {BROKEN}", "remedy     --fresh sets it aside"}),
    ],
)
def test_a_campaign_shows_what_it_does_and_what_can_be_done(status, shown):
    lines = _shown(status)
    assert shown <= set(lines)
    assert any("resume with" in line for line in lines) == (status.state == "stopped")


def test_many_failures_are_cut_short():
    manifest = _manifest()
    manifest.experiments += [_entry(0, cycle % 10, "failed", error="no") for cycle in range(12)]
    lines = _shown(_status("running", manifest=manifest))
    assert sum(line.startswith("failed ") for line in lines) == 10
    assert "and 3 more failed: --json lists all" in lines


def test_of_the_cycles_added_the_last_is_told():
    manifest = _manifest()
    manifest.notes += [{"kind": "top_up", "cycles": number, "reason": f"cycle {number} is added"} for number in (6, 7)]
    notes = [line.split(maxsplit=1)[1] for line in _shown(_status("running", manifest=manifest)) if "note " in line]
    assert notes == ["environment change: driver: 570.1 before, 580.2 now", "cycle 7 is added"]


# --- the command


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path)
    place.runner(make_campaign(tmp_path)).run()
    return place


def _run_status(*words):
    return run_lem("status", *words)


def test_a_folder_without_campaigns_says_so(here):
    assert _run_status() == (0, "", "no campaigns in .state\n")
    assert _run_status("--json") == (0, "[]\n", "")


@pytest.mark.parametrize("name", ["demo", "Demo", "state/demo", "c.yaml"])
def test_a_campaign_is_named_by_its_name_folder_or_file(here, name):
    (here.folder / "c.yaml").write_text(
        "campaign_name: demo\nmodel: none\ngrid: {backends: [pytorch]}\nio: {state_dir: state}\n"
    )
    code, out, _ = _run_status(name, "--state-dir", "state")
    assert (code, out.splitlines()[0].split(" · ")[:2]) == (0, ["demo", "done"])


def test_a_campaign_that_is_not_there_is_told_with_those_that_are(here):
    code, out, err = _run_status("dmeo", "--state-dir", "state")
    assert (code, out) == (2, "")
    assert "no campaign 'dmeo' in state (did you mean 'demo'?)\nhint: campaigns: demo;" in err


def test_as_json_every_experiment_is_there(here):
    code, out, _ = _run_status("demo", "--state-dir", "state", "--json")
    document = json.loads(out)
    assert (code, document["state"], document["completed"], document["left"]) == (0, "done", 4, 0)
    found = [(item["cycle"], item["status"]) for item in document["experiments"]]
    assert found == [(cycle, "completed") for cycle in (1, 1, 2, 2)]
    assert document["activity"]["doing"] == "ended"


def test_every_campaign_of_the_folder_has_a_line_and_damage_in_one_does_not_hide_the_others(here):
    broken = here.folder / "state" / "broken"
    broken.mkdir()
    (broken / "campaign_manifest.json").write_text("{")
    code, out, err = _run_status("--state-dir", "state")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["campaign", "state", "done", "failed", "left", "ends", "at", "last", "update"]
    assert [rows[1][:2], rows[2][:5]] == [["broken", "unreadable"], ["demo", "done", "4", "0", "0"]]


def test_a_state_folder_that_may_not_be_entered_hides_neither_the_others_nor_the_results(here, monkeypatch):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are private
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(here.folder / "state", folder / "state")
        shutil.copytree(here.folder / "results", folder / "results")
        shutil.copytree(folder / "state" / "demo", folder / "state" / "private")
        (folder / "state" / "private").chmod(0)
        monkeypatch.chdir(folder)
        with ordinary_user():
            code, out, err = _run_status("--state-dir", "state")
            assert (code, err) == (0, "")
            rows = [line.split() for line in out.splitlines()]
            assert [row[:2] for row in rows[1:3]] == [["demo", "done"], ["private", "unreadable"]]
            assert "permission denied" in out.lower()


def test_a_run_that_is_dated_in_the_future_is_noted():
    early = Viewer(NOW.replace(year=2025), timezone.utc)
    note = "note       run 20260714T100000Z-3fa1 is dated in the future: the clock was wrong"
    assert note in " ".join(re.sub(r"\n +", " ", render_status(CRASHED, early)).splitlines())
    assert "dated in the future" not in render_status(CRASHED, VIEWER)


def test_what_is_left_of_a_part_names_the_part():
    whole = remainder_of(dataclasses.replace(CRASHED, folder=Path(".state/demo-of-backends")))
    part = remainder_of(dataclasses.replace(CRASHED, folder=Path(".state/demo-of-backends/part-2")))
    assert "(lem status demo-of-backends shows" in whole.remedy
    assert "(lem status demo-of-backends/part-2 shows" in part.remedy
