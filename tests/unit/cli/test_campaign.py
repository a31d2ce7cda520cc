import json
import re
import shlex

import pytest

from lem.config.load import load_campaign
from lem.orchestration.plan import build_plan
from lem.record import write_record
from lem.results.store import Repository
from tests.campaign_rig import campaign_text
from tests.command_rig import run_lem
from tests.records import make_record


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    _write(campaign_text())
    return tmp_path


@pytest.fixture
def unchanged(here):
    """Fails if anything was written in the folder since the test called it."""
    before = {}

    def begin():
        before.update(_tree(here))

    yield begin
    assert _tree(here) == before


def _run(*words):
    return run_lem("campaign", *words)


def _tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def _write(text, name="c.yaml"):
    data = text if isinstance(text, bytes) else text.encode()
    with open(name, "wb") as stream:
        stream.write(data)


# --- plans


def test_validation_alone_shows_the_count_or_when_quiet_nothing_and_writes_nothing(unchanged):
    unchanged()
    counts = "Generated 2 experiments (0 filtered, 0 warnings)\n"
    assert _run("c.yaml", "--validate-only") == (0, "", counts)
    assert _run("c.yaml", "--validate-only", "-q") == (0, "", "")


@pytest.mark.parametrize("how", ["--dry-run", "--validate-only"])
def test_a_plan_is_one_json_document_when_asked(here, how):
    ended = _run("c.yaml", how, "--executor", "local", "--json")
    document = json.loads(ended.out)
    assert ended.code == 0
    assert (document["generated"], document["filtered"], document["warnings"]) == (2, [], [])
    assert [item["order_index"] for item in document["experiments"]] == list(range(len(document["experiments"])))
    assert document["experiments"][0]["loads_engine"] is True
    assert ("place" in document) == (how == "--dry-run")


@pytest.mark.parametrize("how", ["--dry-run", "--validate-only", "--yes"])
def test_with_nothing_valid_left_each_reason_is_told_and_nothing_is_written(unchanged, how):
    text = campaign_text().replace("[pytorch]", "[tensorrt]").replace("[4, 8]", "[4, 8]\n    fp_precision: [float32]")
    _write(text)
    unchanged()
    ended = _run("c.yaml", how)
    assert ended.code == 2
    assert "Generated 2 experiments (2 filtered, 0 warnings)" in ended.err
    assert re.search(r"filtered: .* × 2\n", ended.err)
    assert "no valid experiment is left" in ended.err


def test_an_experiment_without_a_model_is_filtered_with_that_reason_and_warnings_are_shown(here):
    more = "experiments: [{config_name: named, model: other, num_cycles: 4, max_output_tokens: 4}]\n"
    _write(campaign_text(more=more).replace("model: none\n", ""))
    ended = _run("c.yaml", "--dry-run")
    assert ended.code == 0
    assert "Generated 3 experiments (2 filtered, 1 warnings)" in ended.err
    assert "no model" in ended.err
    assert "warning: num_cycles is for lem experiment; in a campaign, execution.cycles decides" in ended.err
    assert "1 configuration × 2 cycles = 2" in ended.out


def test_a_dry_run_writes_nothing_and_options_win_over_the_file_and_set_over_both(unchanged):
    unchanged()
    words = ["--cycles", "5", "--structure", "shuffled", "--seed", "7", "--config-gap", "3", "-o", "elsewhere"]
    words += ["--set", "execution.cycles=4", "--set", "grid.shared.max_output_tokens=[16, 32]", "--force-cold-start"]
    ended = _run("c.yaml", "--dry-run", *words)
    found, following = ended.err.splitlines()
    assert (ended.code, found) == (0, "Generated 2 experiments (0 filtered, 0 warnings)")
    assert following == f"next: lem campaign c.yaml {shlex.join(words)}"
    for shown in (
        "2 configurations × 4 cycles = 8",
        "order:         shuffled, seed 7",
        "engine loads:  8 (reuse: none, cold start)",
        "results in:    elsewhere/demo",
        "pytorch-max_output_tokens=16",
        "3.0 s",
    ):
        assert shown in ended.out


def test_experiment_files_make_a_campaign_with_a_name(here):
    for name, tokens in (("one.yaml", 4), ("two.yaml", 8)):
        _write(f"model: none\nmax_output_tokens: {tokens}\n", name)
    ended = _run("one.yaml", "two.yaml", "--campaign-name", "Pair", "--dry-run", "-c", "1")
    assert ended.code == 0
    assert "campaign:      Pair" in ended.out
    assert [line.split()[:2] for line in ended.out.splitlines()[-2:]] == [["1", "one"], ["2", "two"]]
    nameless = _run("one.yaml", "two.yaml", "--dry-run")
    assert (nameless.code, "--campaign-name" in nameless.err) == (2, True)


# --- top-ups and budgets


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--until", "2%"], "expected a target such as ci=2%"),
        (["--until", "ci=2%:watts"], "unknown metric 'watts'"),
        (["--until", "ci=2%:co2e_g"], "shown but not compared; use co2e_per_output_tok_g"),
        (["--until", "ci=2%", "--max-cycles", "4"], "5 to 20"),
        (["--until", "ci=2%", "--max-cycles", "7", "--cycles", "9"], "more than --max-cycles 7"),
        (["--until", "ci=2%", "--structure", "grouped"], "AAA BBB"),
        (["--until", "ci=2%", "--set", "execution.reuse=campaign"], "execution.reuse=cycle"),
        (["--until", "ci=2%", "--set", "daemon.enabled=true"], "daemon"),
        (["--until", "ci=2%", "--shard", "1/2"], "cannot be combined with --shard"),
        (["--max-cycles", "9"], "--until"),
        (["--gate", "energy=3%"], "--gate requires --dry-run"),
        (["--dry-run", "--gate", "energy=3"], "add the % sign"),
        (["--budget", "8"], "write it like 90s"),
        (["--budget", "8h", "--set", "daemon.enabled=true"], "total_duration"),
        (["--set", "cold_start.restart_container=true"], "cold_start.force_cold_start"),
    ],
)
def test_what_does_not_go_together_is_refused_and_nothing_is_written(unchanged, here, words, complaint):
    unchanged()
    ended = _run("c.yaml", "--executor", "local", *words)
    assert (ended.code, ended.out) == (2, "")
    assert complaint in " ".join(ended.err.split())


def _dry_run(*words):
    code, out, _ = _run("c.yaml", "--executor", "local", "--dry-run", *words)
    assert code == 0
    return " ".join(out.split())


def test_a_dry_run_shows_what_top_up_and_budget_would_take_by_earlier_results(here):
    shown = _dry_run("--until", "ci=2%:e2e_p50_s", "--max-cycles", "8", "--cycles", "2", "--budget", "1h")
    assert "2 configurations × 5 cycles = 10" in shown
    assert "until every ratio is within ±2 % in e2e_p50_s (5 cycles at least, 8 at most)" in shown
    assert "how much of the plan fits is unknown before the first run" in shown
    loaded = load_campaign("c.yaml")
    for item in build_plan(loaded.config, loaded.listed).configurations:
        record = make_record(config_name=item.config_name, config_hash=item.config_hash)
        attempt = Repository(here / "results", "demo").prepare_attempt(record.identity.run_id, item.exp_id)
        write_record(attempt.result_path, record)
    # 1.5 s of warm-up and 10 s of window each, 0.8 s a load: five cycles of two, then ten.
    shown = _dry_run("--until", "ci=2%", "--max-cycles", "10")
    assert "expected time: about 1m 59s (measuring 1m 55s, loading 4.0 s" in shown
    assert "at most 3m 58s" in shown
    assert "1h 00m, enough for the whole plan" in _dry_run("--budget", "1h")
    assert "20.0 s, enough to start about 2 of 4 experiments" in _dry_run("--budget", "20s")


# --- bad input, and manifests in the way; refused before a worker is started


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "c.yaml"),
        (b"\x00\x01\x02\xff", "found binary data"),
        (campaign_text().replace("cycles", "cycels"), "execution.cycels: unknown key (did you mean 'cycles'?)"),
        (campaign_text(more="configs: [missing.yaml]\n"), "missing.yaml"),
        (campaign_text(more="schedule: {at: '25:00'}\n"), "schedule.at"),
        (b"campaign_name: demo\nmodel: none\n", "nothing to run"),
        (campaign_text().replace("synthetic, input_tokens: 3, sample_size: 2", "file, path: no.txt"), "no.txt"),
    ],
)
def test_a_bad_campaign_file_is_told_by_place_and_writes_nothing(unchanged, content, complaint):
    _write(b"\n\n", "no.txt")
    _write(content)
    unchanged()
    ended = _run("c.yaml", "--yes")
    assert (ended.code, complaint in ended.err, "Traceback" in ended.err) == (2, True, False)
    assert ended.err.startswith("error: c.yaml")


@pytest.mark.parametrize("words", [["--yes"], ["--resume"], []])
def test_a_broken_manifest_is_never_started_over(here, words):
    path = here / ".state" / "demo" / "campaign_manifest.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"[" * 100_000)
    ended = _run("c.yaml", *words)
    assert (ended.code, path.read_bytes()) == (2, b"[" * 100_000)
    assert ".state/demo/campaign_manifest.json" in ended.err
    assert "--fresh" in ended.err


# --- an experiment without a file


def test_an_experiment_needs_no_file(unchanged):
    unchanged()
    words = ["--model", "org/Model", "--set", "max_output_tokens=8", "-n", "4", "-o", "out"]
    document = json.loads(run_lem("experiment", *words, "--dry-run", "--json").out)
    assert (document["name"], document["results_dir"], document["cycles"]) == ("Model", "out/model", 1)
    found = document["config"]
    assert (found["model"]["name"], found["max_output_tokens"], found["prompts"]["sample_size"]) == ("org/Model", 8, 4)
    ended = run_lem("experiment", *words, "--dry-run")
    assert ended.err.splitlines()[-1] == f"next: lem experiment {shlex.join(words)}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected an experiment file, or --model NAME"),
        (["--set", "max_output_tokens=8"], "expected an experiment file, or --model NAME"),
        (["--model", "gpt2", "--set", "max_output_tokns=8"], "did you mean 'max_output_tokens'?"),
    ],
)
def test_what_is_wrong_without_a_file_is_named(words, message):
    ended = run_lem("experiment", *words, "--dry-run")
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err


def test_a_suggested_command_hides_secrets_and_what_was_for_the_dry_run_alone(here):
    url = "notification.webhook_url=https://hooks.example.org/secret"
    ended = _run("c.yaml", "--dry-run", "--gate", "energy=3%", "--set", url, "-c", "2")
    assert ended.err.splitlines()[-1] == ("next: lem campaign c.yaml --set 'notification.webhook_url=(hidden)' -c 2")


def test_a_plan_that_cannot_run_here_is_not_suggested(here):
    (here / "no-model").mkdir()
    ended = _run("c.yaml", "--dry-run", "--executor", "local", "--model", "./no-model", "--set", "grid.models=null")
    assert "problem: " in ended.err
    assert "next: " not in ended.err


@pytest.mark.parametrize(("model", "name"), [(".", "mine"), ("./", "mine"), ("..", None), ("/", "experiment")])
def test_an_experiment_without_a_file_is_called_as_the_folder_of_its_model(here, monkeypatch, model, name):
    (here / "mine").mkdir()
    monkeypatch.chdir(here / "mine")
    ended = run_lem("experiment", "--model", model, "--dry-run", "--json")
    assert json.loads(ended.out)["name"] == (name or here.name)


# --- stored plans


@pytest.mark.parametrize("before", [(), ("-v",)])
@pytest.mark.parametrize("beginning", ["--fresh", "--no-resume"])
def test_a_stored_plan_has_the_options_that_each_part_needs_and_suggests_them(here, before, beginning):
    options = ["c.yaml", "--cycles", "4", "--python", "python3"]
    words = [*before, "campaign", *options, beginning, "--write-plan", "p.json", "--hosts", "a,b"]
    ended = run_lem(*words)
    assert json.loads((here / "p.json").read_text())["arguments"] == options
    assert ended.err.splitlines()[-1] == f"next: lem campaign {shlex.join(options)} --plan p.json --shard 1/2"


@pytest.mark.parametrize("option", ["--dry-run", "--validate-only"])
def test_what_writes_nothing_stores_no_plan(unchanged, option):
    unchanged()
    ended = _run("c.yaml", option, "--write-plan", "p.json", "--hosts", "a,b")
    assert (ended.code, ended.out) == (2, "")
    assert f"--write-plan and {option} cannot be combined" in ended.err
