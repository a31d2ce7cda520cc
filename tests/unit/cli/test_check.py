import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from lem.base.errors import EngineError
from lem.cli.check import render_check
from lem.orchestration.locks import Holder, campaign_lock, hold_locks
from lem.orchestration.resume import RunOptions
from lem.results.check import check_run
from lem.results.run import make_run
from tests.campaign_doubles import EIGHT, FOUR, Place
from tests.command_rig import on_terminal, run_lem
from tests.synthetic_campaign import Campaign, Configuration

FINE = Campaign(
    configurations=(
        Configuration("pytorch", backend="pytorch", energy_per_output_tok_j=0.5, output_tok_per_s=900),
        Configuration("vllm", energy_per_output_tok_j=0.2),
    ),
    load_sd=0.002,
    run_sd=0.001,
    structure="shuffled",
    has_samples=False,
)
WEAK = dataclasses.replace(FINE, structure="grouped")


def _check(folder, *words):
    return run_lem("check", "--results-dir", folder / "results", *words)


TROUBLE = Campaign(
    configurations=(
        Configuration("pytorch-bfloat16-batch_size=8-max_output_tokens=128", backend="pytorch"),
        Configuration(
            "vllm-bfloat16-max_num_seqs=256-max_output_tokens=128",
            is_steady=False,
            warnings=("3 of 128 prompts were cut to 512 tokens",),
        ),
    ),
    cycles=3,
    has_samples=False,
)


def test_findings_are_shown_with_what_to_do_the_weak_ones_first():
    run = make_run(TROUBLE.records())
    narrow, wide = (render_check(run, check_run(run), width=width).splitlines() for width in (80, 100))
    labels = [line.split()[0] for line in narrow if line.startswith(("WEAK", "note"))]
    assert labels == sorted(labels)
    shown = " ".join(" ".join(narrow).split())
    assert "WEAK unsteady: throughput or power moved by 2 % or more within the window (under traffic" in shown
    assert "do: raise measurement.min_window_sec" in shown
    assert "note warning: 3 of 128 prompts were cut to 512 tokens (2 vllm" in shown
    assert "\x1b[31mWEAK\x1b[0m" in on_terminal(render_check(run, check_run(run), is_colour=True))
    assert max(map(len, narrow)) <= 80 < max(map(len, wide))


def test_a_campaign_that_is_not_there_is_told(tmp_path):
    code, out, err = _check(tmp_path, "nothing")
    assert (code, out) == (2, "")
    assert "'nothing': no results in" in err


def test_notes_alone_are_no_weakness(tmp_path):
    dataclasses.replace(FINE, structure="interleaved").write(tmp_path)
    code, out, _ = _check(tmp_path, "demo")
    assert code == 0
    assert "note  same order" in out
    assert out.endswith("Nothing was found that weakens the numbers; 1 note.\n")


def test_as_json_each_finding_is_an_object(tmp_path):
    WEAK.write(tmp_path)
    code, out, _ = _check(tmp_path, "demo", "--json")
    document = json.loads(out)
    assert (code, document["weak"], document["results"]) == (4, True, 10)
    assert [(item["kind"], item["weak"]) for item in document["findings"]] == [("grouped", True)]
    assert document["findings"][0]["remedy"]


REFUSED = EngineError("refused", kind="option", is_permanent=True)


def _die(_request):
    raise KeyboardInterrupt  # as little is written as at a SIGKILL


def _counted(folder: Path) -> list[dict[str, int]]:
    """What status, results list and check each say of the run: experiments done, failed and left."""
    results, state = ("--results-dir", folder / "results"), ("--state-dir", folder / "state")
    status = json.loads(run_lem("status", "demo", *state, "--json").out)
    listed = json.loads(run_lem("results", "list", *results, *state, "--json").out)[-1]
    checked = json.loads(run_lem("check", "demo", *results, *state, "--json").out)
    texts = {item["kind"]: item["text"] for item in checked["findings"]}
    found = {kind: int(texts[kind].split()[0]) for kind in ("failed", "unfinished") if kind in texts}
    return [
        {"done": status["completed"], "failed": status["failed"], "left": status["left"]},
        {"done": listed["valid"], "failed": listed["failed"], "left": listed["left"]},
        {"done": checked["results"], "failed": found.get("failed", 0), "left": found.get("unfinished", 0)},
    ]


def _remedy(folder: Path, kind: str, *words: str) -> str:
    results, state = ("--results-dir", folder / "results"), ("--state-dir", folder / "state")
    findings = json.loads(run_lem("check", *(words or ("demo",)), *results, *state, "--json").out)["findings"]
    return next((item["remedy"] for item in findings if item["kind"] == kind), "")


@pytest.mark.parametrize(
    ("signal_at_s", "answers", "counts"),
    [
        (15.0, {}, {"done": 1, "failed": 0, "left": 3}),
        (float("inf"), {EIGHT: [REFUSED]}, {"done": 2, "failed": 2, "left": 0}),
        (float("inf"), {EIGHT: [_die]}, {"done": 1, "failed": 0, "left": 3}),
        (35.0, {FOUR: [REFUSED, "ok"]}, {"done": 2, "failed": 1, "left": 1}),
    ],
    ids=["interrupted", "failed", "killed", "failed and interrupted"],
)
def test_status_results_and_check_agree_on_what_is_left_and_the_resume_they_recommend_does_it(
    tmp_path, signal_at_s, answers, counts
):
    place = Place(tmp_path, signal_at_s=signal_at_s)
    with contextlib.suppress(KeyboardInterrupt):
        place.run(answers)
    assert _counted(tmp_path) == [counts] * 3
    remedy = _remedy(tmp_path, "unfinished" if counts["left"] else "failed")
    assert "lem campaign … --resume continues the run (lem status demo shows the whole command)" in remedy
    Place(tmp_path).run(options=RunOptions(resume=True))
    assert _counted(tmp_path) == [{"done": 4, "failed": 0, "left": 0}] * 3


def test_no_resume_is_recommended_where_it_would_do_nothing(tmp_path):
    Place(tmp_path, signal_at_s=15.0).run()
    (earlier,) = (tmp_path / "results" / "demo").iterdir()
    Place(tmp_path).run(options=RunOptions(resume=False))
    assert "--resume" not in _remedy(tmp_path, "failed", earlier.name)
    assert "a new run measures all of it" in _remedy(tmp_path, "failed", earlier.name)
    status = json.loads(run_lem("status", "demo", "--state-dir", tmp_path / "state", "--json").out)
    last, gone = status["run_id"], status["experiments"][0]["exp_id"]
    shutil.rmtree(tmp_path / "results" / "demo" / last / gone)
    with hold_locks([campaign_lock(tmp_path / "state" / "demo", "demo")], Holder(1, "here", "demo", "2026-07-14T12")):
        assert _remedy(tmp_path, "unfinished", last) == "wait: the campaign is running (lem status)"
    assert "--resume continues" in _remedy(tmp_path, "unfinished", last)  # a result that is gone is measured again


def test_a_result_that_is_invalid_for_good_is_not_to_be_resumed(tmp_path):
    Place(tmp_path).run({FOUR: ["invalid"]})
    assert _remedy(tmp_path, "no_valid_result") == "remove the cause, then measure again (--fresh)"


def test_a_configuration_that_had_no_turn_yet_is_named_too():
    run = dataclasses.replace(make_run(FINE.records()), left={"never": 2})
    assert "unfinished: 2 experiments" in (text := " ".join(render_check(run, check_run(run)).split()))
    assert "(never)" in text
