import dataclasses
import json

from lem.cli.check import render_check
from lem.results.check import check_run
from lem.results.run import make_run
from tests.command_rig import run_lem
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
    assert "WEAK unsteady: throughput or power moved by 2 % or more within the window in 3 of 3 results (vllm" in shown
    assert "do: raise measurement.min_window_sec" in shown
    assert "note warning: 3 of 128 prompts were cut to 512 tokens (vllm" in shown
    assert "\x1b[31mWEAK\x1b[0m" in render_check(run, check_run(run), is_colour=True)
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
