"""`lem check`: for people, programs and shells."""

import dataclasses
import json

import pytest

from lem.cli.check import render_check
from lem.results.check import check_run
from lem.results.run import make_run
from tests.command_rig import run_lem
from tests.records import make_record
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


def _shown(run, **look):
    return render_check(run, check_run(run), **look)


def _trouble(**look):
    """Two configurations with most of what there is to find, on plain numbers."""
    names = (
        "pytorch-bfloat16-batch_size=8-max_output_tokens=128",
        "vllm-bfloat16-max_num_seqs=256-max_output_tokens=128",
    )
    records = []
    for cycle in range(3):
        for place, name in enumerate(names):
            record = make_record(
                config_name=name,
                config_hash=f"{place:016x}",
                cycle=cycle,
                order=2 * cycle + place,
                output_tok_per_s=100.0 + 2 * cycle + place,
                warnings=(f"{cycle + 1} of 128 prompts were cut to 512 tokens",) if place else (),
            )
            validity = dataclasses.replace(record.validity, steady=place == 0, warmup_converged=cycle > 0)
            records.append(dataclasses.replace(record, validity=validity))
    return _shown(make_run(records, failed={names[1]: 1}), **look)


def test_findings_are_shown_with_what_to_do_the_weak_ones_first():
    lines = _trouble().splitlines()
    assert lines[0] == "demo · run 20260714T100000Z-3fa1 · 2 configurations · 3 cycles"
    labels = [line.split()[0] for line in lines if line.startswith(("WEAK", "note"))]
    assert labels == sorted(labels)
    shown = " ".join(" ".join(lines).split())
    assert "WEAK unsteady: throughput or power moved by 2 % or more within the window in 3 of 3 results (vllm" in shown
    assert "do: raise warmup.max_prompts or warmup.timeout_seconds" in shown
    assert "note warning: 1 of 128 prompts were cut to 512 tokens (vllm" in shown
    assert "\x1b[31mWEAK\x1b[0m" in _trouble(is_colour=True)
    assert max(map(len, lines)) <= 80
    assert max(map(len, _trouble(width=100).splitlines())) > 80


def test_nothing_found_is_one_sentence():
    records = [make_record(cycle=cycle, requested={"ignore_eos": True}, output_tok_per_s=100.0) for cycle in range(5)]
    assert _shown(make_run(records)).splitlines()[2:] == ["Nothing was found that weakens the numbers."]


@pytest.mark.parametrize(("campaign", "code"), [(FINE, 0), (WEAK, 4)])
def test_the_exit_code_says_whether_something_is_weak(tmp_path, campaign, code):
    campaign.write(tmp_path)
    assert _check(tmp_path, "demo")[::2] == (code, "")


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


def test_a_campaign_that_is_not_there_is_told(tmp_path):
    code, out, err = _check(tmp_path, "nothing")
    assert (code, out) == (2, "")
    assert "'nothing': no results in" in err


def test_a_damaged_result_is_named_and_the_rest_looked_at(tmp_path):
    written = FINE.write(tmp_path)
    path = min(written.results_dir.rglob("result.json"))
    path.write_bytes(path.read_bytes()[:100])
    code, out, _ = _check(tmp_path, "demo")
    assert code == 4
    assert "damaged" in out
    assert path.parent.parent.name in out.replace("\n", "").replace(" ", "")
