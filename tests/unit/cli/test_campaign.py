"""`lem campaign` up to the first process: options, plans, and everything a person may have written wrongly."""

import json
import re

import pytest

from tests.campaign_rig import EIGHT, FOUR, campaign_text
from tests.command_rig import run_lem


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a campaign, in which commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    (tmp_path / "c.yaml").write_text(campaign_text())
    return tmp_path


def _run(*words):
    return run_lem("campaign", *words)


def _tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def _write(text, name="c.yaml"):
    data = text if isinstance(text, bytes) else text.encode()
    with open(name, "wb") as stream:
        stream.write(data)


# --- plans


def test_a_dry_run_shows_the_plan_and_writes_nothing(here):
    before = _tree(here)
    ended = _run("c.yaml", "--dry-run", "--executor", "local")
    assert ended.code == 0
    assert _tree(here) == before
    assert ended.err == "Generated 2 experiments (0 filtered, 0 warnings)\n"
    assert "experiments:   2 configurations × 2 cycles = 4" in ended.out
    assert "engine loads:  2 (reuse: cycle)" in ended.out
    assert "unknown before the first run" in ended.out
    assert [line.split()[0] for line in ended.out.splitlines() if line.startswith("pytorch-")] == [FOUR, EIGHT] * 2


def test_validation_alone_says_nothing_more_and_writes_nothing(here):
    before = _tree(here)
    ended = _run("c.yaml", "--validate-only")
    assert (ended.code, ended.out) == (0, "")
    assert _tree(here) == before


@pytest.mark.parametrize("how", ["--dry-run", "--validate-only", "--yes"])
def test_with_nothing_valid_left_each_reason_is_told_and_nothing_is_written(here, how):
    text = campaign_text().replace("[pytorch]", "[tensorrt]").replace("[4, 8]", "[4, 8]\n    fp_precision: [float32]")
    _write(text)
    before = _tree(here)
    ended = _run("c.yaml", how)
    assert ended.code == 2
    assert "Generated 2 experiments (2 filtered, 0 warnings)" in ended.err
    assert "filtered: " in ended.err
    assert "× 2" in ended.err
    assert "no valid experiment is left" in ended.err
    assert _tree(here) == before


def test_an_experiment_without_a_model_is_filtered_with_that_reason_and_the_rest_is_planned(here):
    more = "experiments: [{config_name: named, model: other, max_output_tokens: 4}]\n"
    _write(campaign_text(more=more).replace("model: none\n", ""))
    ended = _run("c.yaml", "--dry-run")
    assert ended.code == 0
    assert "Generated 3 experiments (2 filtered, 0 warnings)" in ended.err
    assert "no model" in ended.err
    assert "1 configuration × 2 cycles = 2" in ended.out


def test_warnings_are_shown_and_counted_apart(here):
    _write(campaign_text(more="experiments: [{config_name: named, num_cycles: 4, max_output_tokens: 2}]\n"))
    ended = _run("c.yaml", "--validate-only")
    assert ended.code == 0
    assert "Generated 3 experiments (0 filtered, 1 warnings)" in ended.err
    assert "warning: num_cycles is for lem experiment; in a campaign, execution.cycles decides" in ended.err


def test_quiet_validation_is_silent(here):
    ended = _run("c.yaml", "--validate-only", "-q")
    assert (ended.code, ended.out, ended.err) == (0, "", "")


def test_options_win_over_the_file_and_set_over_both(here):
    words = ["--cycles", "5", "--structure", "shuffled", "--seed", "7", "--config-gap", "3", "-o", "elsewhere"]
    ended = _run("c.yaml", "--dry-run", *words, "--set", "execution.cycles=4", "--force-cold-start")
    assert "2 configurations × 4 cycles = 8" in ended.out
    assert "order:         shuffled, seed 7" in ended.out
    assert "engine loads:  8 (reuse: none, cold start)" in ended.out
    assert "results in:    elsewhere/demo" in ended.out
    assert "3.0 s" in ended.out


def test_one_axis_can_be_set(here):
    ended = _run("c.yaml", "--dry-run", "--set", "grid.shared.max_output_tokens=[16]")
    assert "1 configuration × 2 cycles = 2" in ended.out


def test_experiment_files_make_a_campaign_with_a_name(here):
    _write("model: none\nmax_output_tokens: 4\n", "one.yaml")
    _write("model: none\nmax_output_tokens: 8\n", "two.yaml")
    ended = _run("one.yaml", "two.yaml", "--campaign-name", "Pair", "--dry-run", "-c", "1")
    assert ended.code == 0
    assert "campaign:      Pair" in ended.out
    assert [line.split()[0] for line in ended.out.splitlines()[-2:]] == ["one", "two"]
    nameless = _run("one.yaml", "two.yaml", "--dry-run")
    assert nameless.code == 2
    assert "--campaign-name" in nameless.err


def test_what_needs_containers_is_refused_without_them(here):
    _write(campaign_text(more="cold_start: {restart_container: true}\n"))
    ended = _run("c.yaml", "--executor", "local", "--dry-run")
    assert ended.code == 2
    assert "cold_start.force_cold_start" in ended.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["c.yaml", "--resume", "--fresh"], "--fresh"),
        (["c.yaml", "--no-resume", "--fresh"], "--fresh"),
        (["c.yaml", "--res"], "unknown option '--res'"),
        (["c.yaml", "--cycles", "many"], "'many'"),
        ([], "FILE"),
    ],
)
def test_usage_errors_take_two_lines(here, words, expected):
    ended = _run(*words)
    assert ended.code == 2
    error, hint = ended.err.splitlines()
    assert error.startswith("error: lem campaign: ")
    assert expected in error
    assert hint == "hint: see `lem campaign --help`"


# --- bad input


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "c.yaml"),
        (b"# nothing\n", "c.yaml"),
        (b"\x00\x01\x02\xff", "found binary data"),
        (b"\xff\xfec\x00", "is UTF-16"),
        (b"name: \xe4\xf6\n", "is not UTF-8"),
        (b"campaign_name: [1, 2\n", "not YAML"),
        (b"campaign_name: a\n\tmodel: b\n", "indent with spaces"),
        (b"- a\n- b\n", "c.yaml"),
        (
            campaign_text().replace("cycles", "cycels").encode(),
            "execution.cycels: unknown key (did you mean 'cycles'?)",
        ),
        (campaign_text(more="model: again\n").encode(), "duplicate key"),
        (campaign_text(cycles="many").encode(), "execution.cycles"),
        (campaign_text(cycles=21).encode(), "execution.cycles"),
        (campaign_text(structure="mixed").encode(), "execution.structure"),
        (campaign_text(more="configs: [missing.yaml]\n").encode(), "missing.yaml"),
        (campaign_text().replace("campaign_name: demo", "campaign_name: ''").encode(), "campaign_name"),
        (b"campaign_name: demo\nmodel: none\n", "nothing to run"),
        (campaign_text(more="daemon: {enabled: true, interval: 6 hours}\n").encode(), "daemon.interval"),
        (campaign_text(more="schedule: {at: '25:00'}\n").encode(), "schedule.at"),
        (campaign_text(more="notification: {webhook_url: not-a-url}\n").encode(), "notification.webhook_url"),
    ],
)
def test_a_bad_campaign_file_is_told_by_place_and_writes_nothing(here, content, complaint):
    _write(content)
    before = _tree(here)
    ended = _run("c.yaml", "--yes")
    assert ended.code == 2
    assert complaint in ended.err
    assert ended.err.startswith("error: c.yaml")
    assert "Traceback" not in ended.err
    assert _tree(here) == before


def test_every_problem_is_told_at_once_with_line_and_column(here):
    _write(campaign_text(cycles=0, structure="mixed", more="health_check: {max_restarts: -1}\n"))
    ended = _run("c.yaml", "--yes")
    assert ended.code == 2
    assert re.findall(r"^(?:error: )?(c\.yaml:\d+):\d+: ([\w.]+)", ended.err, re.MULTILINE) == [
        ("c.yaml:11", "execution.cycles"),
        ("c.yaml:11", "execution.structure"),
        ("c.yaml:12", "health_check.max_restarts"),
    ]


@pytest.mark.parametrize(("name", "complaint"), [("missing.yaml", "no such file"), (".", "found a folder")])
def test_a_campaign_file_that_is_not_there_is_told(here, name, complaint):
    ended = _run(name, "--yes")
    assert ended.code == 2
    assert complaint in ended.err


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_prompts_without_any_are_told_before_anything_starts(here, content):
    _write(content, "prompts.txt")
    _write(
        campaign_text().replace("{type: synthetic, input_tokens: 3, sample_size: 2}", "{type: file, path: prompts.txt}")
    )
    before = _tree(here)
    ended = _run("c.yaml", "--yes")
    assert ended.code == 2
    assert "prompts.txt" in ended.err
    assert _tree(here) == before


# --- folders and manifests in the way; refused before a worker is started


@pytest.mark.parametrize("folder", ["results", ".state"])
def test_a_file_where_a_folder_is_due_is_told(here, folder):
    (here / folder).write_text("in the way")
    ended = _run("c.yaml", "--yes")
    assert ended.code == 2
    assert folder in ended.err
    assert "Traceback" not in ended.err
    assert (here / folder).read_text() == "in the way"


def _manifest(here, content):
    path = here / ".state" / "demo" / "campaign_manifest.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [b"", b'{"schema_version": 1, "campaign', b"[]", b"\xff\xfe", b'{"schema_version": 99}', b"[" * 100_000],
)
@pytest.mark.parametrize("words", [["--yes"], ["--resume"], []])
def test_a_broken_manifest_is_never_started_over(here, content, words):
    path = _manifest(here, content)
    ended = _run("c.yaml", *words)
    assert ended.code == 2
    assert ".state/demo/campaign_manifest.json" in ended.err
    assert "--fresh" in ended.err
    assert path.read_bytes() == content


def test_the_manifest_of_another_campaign_is_refused(here):
    # Both names have the same folder.
    document = {
        "schema_version": 1,
        "campaign_id": "12345678",
        "campaign_name": "DEMO",
        "created_at": "2026-07-14T10:00:00.000000Z",
        "updated_at": "2026-07-14T10:00:00.000000Z",
        "config_hash": "0123456789abcdef",
        "total_experiments": 0,
        "run_id": "20260714T100000Z-0000",
        "shuffle_seed": None,
        "environment": {},
        "notes": [],
        "experiments": [],
    }
    path = _manifest(here, json.dumps(document).encode())
    before = path.read_bytes()
    ended = _run("c.yaml", "--yes")
    assert ended.code == 2
    assert "belongs to another campaign, 'DEMO'" in ended.err
    assert path.read_bytes() == before


@pytest.mark.parametrize("how", ["--dry-run", "--validate-only"])
def test_a_plan_is_one_json_document_when_asked(here, how):
    ended = _run("c.yaml", how, "--executor", "local", "--json")
    document = json.loads(ended.out)
    assert ended.code == 0
    assert (document["generated"], document["filtered"], document["warnings"]) == (2, [], [])
    assert [item["order_index"] for item in document["experiments"]] == list(range(len(document["experiments"])))
    assert document["experiments"][0]["loads_engine"] is True
    assert ("place" in document) == (how == "--dry-run")
