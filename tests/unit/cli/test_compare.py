from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lem.base.doc import text_width
from lem.base.measurement import Measured
from lem.record import read_record, write_record
from lem.results.stopping import StoppingRule, parse_target, write_stopping_rule
from tests.command_rig import Output, run_lem
from tests.goldens import assert_golden
from tests.records import completed
from tests.synthetic_campaign import Campaign, Configuration

PYTORCH = Configuration("pytorch-bfloat16", backend="pytorch", energy_per_output_tok_j=0.5, output_tok_per_s=900)
VLLM = Configuration("vllm-bfloat16", energy_per_output_tok_j=0.205, output_tok_per_s=2200, ttft_s=0.12)
FLOAT16 = Configuration("vllm-float16", precision="float16", energy_per_output_tok_j=0.2052, output_tok_per_s=2190)
LARGE = Configuration("vllm-bfloat16-64", batch_size=64, energy_per_output_tok_j=0.216, output_tok_per_s=2300)
BASE = Campaign((PYTORCH, VLLM, FLOAT16, LARGE), cycle_sd=0.01, load_sd=0.005, has_samples=False)


def based(**changes: Any) -> Campaign:
    return dataclasses.replace(BASE, **changes)


def each(*configurations: Configuration, **changes: Any) -> tuple[Configuration, ...]:
    return tuple(dataclasses.replace(item, **changes) for item in configurations)


BEFORE, AFTER = {"name": "before"}, {"name": "after", "run_id": "20260801T100000Z-0b0b"}
TROUBLE = (
    PYTORCH,
    *each(VLLM, throttled_cycles=(1, 3)),
    *each(FLOAT16, failed_cycles=(0, 1, 2, 3, 4)),
    *each(LARGE, prompts="b" * 64, options={"max_output_tokens": 64}),
)
CHANGED = (PYTORCH, *each(VLLM, energy_per_output_tok_j=0.23), FLOAT16)
# Each lies in a results folder of its own, so that one does not change what another finds.
CAMPAIGNS: dict[str, tuple[Campaign, ...]] = {
    "demo": (BASE,),
    "two": (based(configurations=(PYTORCH, VLLM)),),
    "single": (based(cycles=1),),
    "no-meter": (based(configurations=each(PYTORCH, VLLM, energy_per_output_tok_j=None)),),
    "trouble": (based(configurations=TROUBLE),),
    "days": (
        based(**BEFORE, day_sd=0.01),
        based(**AFTER, day_sd=0.01, driver="580.65", gpu_serial=7, configurations=CHANGED),
    ),
    "apart": (based(**BEFORE, configurations=(PYTORCH, VLLM)), based(**AFTER, configurations=(FLOAT16, LARGE))),
    "strangers": (based(**BEFORE, configurations=(PYTORCH,)), based(**AFTER, configurations=(VLLM,))),
}

# Where, the words after `lem compare`, the exit code, and parts of what is printed, its lines joined.
ANSWERS = r"""
demo // demo // 0 // vllm-float16 (3) uses 0.41 × the energy // (1), 95 % // Of 3: 3 better. // Holm over 9
  // 2 vllm bfloat16 32 0.206 0.41 0.40–0.42 <0.001 2.45 ~ 1.00 // all 9 hold together with 95 % (each 99.44 %)
demo // demo pytorch-bfloat16 vllm-bfloat16 // 0 // 2 configurations
  // token, J 0.5029 0.206 0.41 0.40–0.41 <0.001 Output
demo // demo 2 3 // 0 // No difference in energy per output token between vllm-float16 (3) and vllm-bfloat16 (2)
demo // demo/2 demo/batch_size=64 // 0 // vllm-bfloat16-64 (4) uses 1.05
demo // demo --by backend // 0 // backend=vllm uses 0.41 × the energy per output token of backend=pytorch
  // along backend, held equal: precision, batch_size · // without a counterpart (backend=vllm): vllm-float16;
demo // demo --by batch_size --baseline 64 --metric energy --gate energy=3% // 0 // batch_size=32 uses 0.95
two // pytorch-bfloat16 vllm-bfloat16 // 0 // (2) uses 0.41 × the energy per output token of pytorch
demo // demo --baseline vllm-bfloat16 --gate energy=3% --gate throughput=2% // 3
  // _tok_j=3%: worse: 1 pytorch-bfloat16, 4 vllm-bfloat16-64; within 3%: 3 vllm-float16 gate
  // inconclusive: 3 vllm-float16 (about 24 more cycles would settle it); better: 4 vllm-bfloat16-64
  // Holm over 6 comparisons
demo // demo vllm-bfloat16 vllm-float16 --gate energy=0.5% // 4
  // No difference in energy per output token between vllm-float16 (3) and vllm-bfloat16 (2) was found // about 60 more
demo // demo vllm-bfloat16 vllm-bfloat16-64 --gate energy=3% --markdown // 3
  // **gate energy\_per\_output\_tok\_j=3%: worse: 4 vllm-bfloat16-64**
  // | 0.2169 | 1.05 | 1.04–1.07 | &lt;0.001 | worse |
single // demo --metric energy // 0 // No verdict on energy per output token for any of 3 // use --cycles 3+
  // 2 vllm-bfloat16 vllm bfloat16 32 0.2088 ? 0.41 –
no-meter // demo // 0 // makes 2.45 × the output tokens per second of
  // Output throughput, tok/s 895.5 2195 2.45 // End-to-end latency, median 2.513 s
trouble // demo --markdown // 0 // - **not comparable (3 vllm-bfloat16-64): other prompts
  // invalid ones too, in energy per output token: 2 vllm-bfloat16 0.426.
days // before after --gate energy=3% // 3 // vllm-bfloat16 in after uses 1.12 ×
  // worse: vllm-bfloat16; within 3%: vllm-float16 // 0.2026 0.2318 1.12 1.11–1.14 <0.001 worse
days // before/vllm-bfloat16 20260801/vllm-bfloat16 // 0 // 95 % 1.11–1.14, 5 and 5 cycles, over the anchor pytorch
  // not compared in time to first token, median: not measured
days // before after --anchor vllm-float16 --metric energy // 0 // anchor: vllm-float16, itself 1.018 × in energy
apart // before after // 0 // Nothing can be compared: the runs have no configuration in common
strangers // before after --gate energy=3% --lenient // 0 // no verdict: no unchanged configuration
  // vllm-bfloat16 in after vllm
"""

REFUSALS: list[tuple[str, str, str]] = [
    ("demo", "dmo", "no campaign, run or experiment 'dmo' in results (did you mean 'demo'?)"),
    ("demo", "demo pytorch", "demo: nothing to compare pytorch-bfloat16 with"),
    ("demo", "demo nothing pytorch", "has no configuration 'nothing'"),
    ("demo", "demo vllm pytorch", "'vllm' is ambiguous: 2 vllm-bfloat16; 3 vllm-float16; 4 vllm-bfloat16-64"),
    ("demo", "demo --gate energi=3%", "unknown metric 'energi' (did you mean 'energy'?)"),
    ("demo", "demo --gate energy=3% --gate energy_per_output_tok_j=5%", "two gates for the same metric"),
    ("demo", "demo --gate gpu_energy_j=3%", "use energy_per_output_tok_j or energy_per_total_tok_j"),
    ("demo", "demo --metric co2e_g", "co2e_g grows with the work in a window, so it is shown but not compared"),
    (
        "demo",
        "demo 1 batch_size=32",
        "'batch_size=32' is ambiguous: 1 pytorch-bfloat16; 2 vllm-bfloat16; 3 vllm-float16",
    ),
    ("demo", "demo 7", "has no configuration '7'"),
    ("demo", "demo --by nothing", "no axis 'nothing'"),
    ("demo", "demo 1 2 --by precision", "--by compares all configurations"),
    ("days", "before after --by precision", "--by requires a single run"),
    ("demo", "demo --strict", "--strict requires --gate"),
    ("demo", "demo --lenient", "--lenient requires --gate"),
    ("demo", "demo --gate energy=3% --lenient --strict", "not allowed with argument"),
    ("demo", "demo demo", "both name the same run"),
    ("demo", "demo --anchor pytorch-bfloat16", "--anchor requires two runs"),
    ("demo", "no nor-this", "'no', 'nor-this': no such campaigns"),
    ("days", "pytorch-bfloat16 vllm-bfloat16", "name the campaign first"),
    ("days", "before nothing after", "has no configuration 'nothing'"),
    ("days", "before after nothing", "no campaign, run or experiment 'nothing'"),
    ("days", "before after/vllm-bfloat16", "a run cannot be compared with a configuration"),
    ("days", "before/vllm after/vllm-float16 before/pytorch", "expected at most two configurations of different runs"),
    ("days", "before after --baseline vllm", "--baseline requires a single run"),
    ("days", "before after --anchor-tolerance 0.05", "add the % sign"),
    ("days", "before after --anchor-tolerance 5", "add the % sign"),
    ("days", "before after --anchor-tolerance much", "expected a percentage"),
    ("days", "before after --anchor-tolerance 0%", "more than 0%"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, campaigns in CAMPAIGNS.items():
        folder = tmp_path_factory.mktemp(name)
        for campaign in campaigns:
            folders[name] = campaign.write(folder).results_dir
    return folders


def compare(folder: Path, *words: str) -> Output:
    ended = run_lem("compare", *words, "--results-dir", folder)
    return ended._replace(err=ended.err.replace(str(folder), "results"))


@pytest.mark.parametrize(
    ("name", "place", "words"),
    [
        ("trouble", "trouble", "demo --gate energy=3% --strict"),
        ("anchored_markdown", "days", "before after --gate energy=3% --markdown"),
    ],
)
def test_both_streams_are_the_golden_ones(name: str, place: str, words: str, places: dict[str, Path]) -> None:
    code, out, err = compare(places[place], *words.split())
    assert_golden(f"compare/{name}.txt", f"$ lem compare {words}\n{out}--- stderr\n{err}--- exit {code}\n")


@pytest.mark.parametrize("answer", ANSWERS.strip().replace("\n  //", " //").splitlines())
def test_the_answer_fits_the_screen(answer: str, places: dict[str, Path]) -> None:
    place, words, code, *parts = answer.split(" // ")
    ended, out, err = compare(places[place], *words.split())
    assert str(ended) == code
    assert err in ("", "next: lem report demo --results-dir results\n")
    shown = " ".join(out.split())
    assert [part for part in parts if part not in shown] == []
    is_text = "--markdown" not in words
    assert [line for line in out.splitlines() if is_text and (text_width(line) > 80 or line != line.rstrip())] == []


@pytest.mark.parametrize(("place", "words", "message"), REFUSALS)
def test_what_cannot_be_compared_is_refused(place: str, words: str, message: str, places: dict[str, Path]) -> None:
    code, out, err = compare(places[place], *words.split())
    assert (code, out) == (2, "")
    assert message in err


def test_the_document_holds_what_the_text_shows(places: dict[str, Path]) -> None:
    code, out, err = compare(places["demo"], "demo", "--baseline", "vllm-bfloat16", "--gate", "energy=3%", "--json")
    document = json.loads(out)
    text = compare(places["demo"], "demo", "--baseline", "vllm-bfloat16", "--gate", "energy=3%")[1]
    assert (document["exit_code"], document["schema_version"], err) == (code, 1, "")
    assert document["sentence"] in " ".join(text.split())
    pair = next(item for item in document["pairs"] if item["other"]["config_name"] == "pytorch-bfloat16")
    energy = pair["metrics"]["energy_per_output_tok_j"]
    assert energy["ratio"] == pytest.approx(0.5 / 0.205, rel=0.02)
    assert energy["ci_lower"] < energy["ratio"] < energy["ci_upper"]
    assert energy["p_value"] <= energy["p_holm"] < 0.001
    assert energy["gate"] == {"threshold": 0.03, "verdict": "worse", "reason": None, "further_cycles": None}
    assert code == 3


def test_the_document_also_holds_the_metrics_that_the_text_leaves_out(places: dict[str, Path]) -> None:
    document = json.loads(compare(places["demo"], "demo", "--json")[1])
    metrics = document["pairs"][0]["metrics"]
    assert document["n_compared"] == 9
    assert metrics["energy_per_output_tok_j"]["p_holm"] < 0.001
    further = metrics["gpu_energy_net_per_output_tok_j"]
    assert further["ci_lower"] < further["ratio"] < further["ci_upper"]
    assert (further["p_holm"], further["reason_code"], "--metric" in further["reason"]) == (None, "not_asked", True)
    assert "Net GPU energy" not in compare(places["demo"], "demo")[1]
    assert "Net GPU energy" in compare(places["demo"], "demo", "--metric", "net")[1]


def test_a_gate_on_what_was_not_measured_is_an_error_beside_the_comparison(places: dict[str, Path]) -> None:
    code, out, err = compare(places["no-meter"], "demo", "--gate", "energy=3%", "--lenient")
    assert code == 2
    assert "Nothing can be compared: not measured for pytorch-bfloat16" in " ".join(out.split())
    assert "gate on a metric that was not measured: energy_per_output_tok_j" in err


def test_the_document_of_two_runs_names_its_anchor(places: dict[str, Path]) -> None:
    document = json.loads(compare(places["days"], "before", "after", "--json")[1])
    assert document["anchor"]["name"] == "pytorch-bfloat16"
    assert [run["campaign_name"] for run in document["runs"]] == ["before", "after"]
    assert document["missing"] == ["only in 20260714T100000Z-3fa1: vllm-bfloat16-64"]


def test_a_campaign_of_one_configuration_says_that_there_is_nothing_to_compare(tmp_path: Path) -> None:
    folder = based(configurations=(VLLM,)).write(tmp_path).results_dir
    code, out, err = compare(folder, "demo")
    assert (code, out) == (2, "")
    assert "nothing to compare " in err
    for path in folder.rglob("result.json"):
        path.unlink()
    assert "no complete result" in compare(folder, "demo")[2]


def test_cycles_that_were_added_are_told_of(tmp_path: Path) -> None:
    written = based(configurations=(PYTORCH, VLLM)).write(tmp_path)
    rule = StoppingRule(parse_target("ci=2%"), 5, 20, looks=(5,))
    write_stopping_rule(written.results_dir / written.campaign / written.run_id, rule)
    out = " ".join(compare(written.results_dir, "demo")[1].split())
    assert "Cycles were added until every ratio is within ±2 % (5 cycles at least, 20 at most)" in out
    assert "intervals and p values are taken at 1.8 % instead of 5 %" in out


def test_a_value_of_zero_has_no_ratio(tmp_path: Path) -> None:
    folder = based(configurations=(PYTORCH, VLLM)).write(tmp_path).results_dir
    for path in folder.rglob("result.json"):
        record = read_record(path)
        is_bad = record.identity.config_name == VLLM.name and record.identity.cycle_index == 2
        good = 0 if is_bad else record.work.requests_ok or 0
        work = record.work.having(requests_good=Measured(good))
        per_s, whys = good / record.window.window_s, dict(record.throughput.null_reasons)
        whys.pop("good_requests_per_s")
        rates = dataclasses.replace(record.throughput, good_requests_per_s=per_s, null_reasons=whys)
        write_record(path, completed(dataclasses.replace(record, work=work, throughput=rates)))
    code, out, _ = compare(folder, "demo", "--gate", "goodput=3%", "--strict")
    assert code == 4
    assert "1 of 5 cycles have no ratio, because a value is zero or negative (cycle 3)" in " ".join(out.split())
