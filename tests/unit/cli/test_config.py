from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_rig import run_lem

EXPERIMENT = "model: ${MODEL_OF_TEST:-gpt2}\ndecoder: {preset: creative, top_p: 0.5}\n"
CAMPAIGN = """\
campaign_name: demo
model: gpt2
grid:
  backends: [pytorch, tensorrt]
  shared: {fp_precision: [float16, float32]}
  backend_overrides: {pytorch: {batch_size: [1, 4]}}
execution: {cycles: 2}
notification: {webhook_url: "https://host/hunter2"}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.yaml").write_text(EXPERIMENT, encoding="utf-8")
    (tmp_path / "c.yaml").write_text(CAMPAIGN, encoding="utf-8")
    (tmp_path / "bad.yaml").write_text("model: gpt2\nbackend: cuda\n", encoding="utf-8")
    return tmp_path


def test_valid_files_are_told_with_their_warnings_and_what_is_filtered():
    code, out, err = run_lem("config", "validate", "e.yaml", "c.yaml")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "e.yaml: valid experiment gpt2-pytorch"
    assert lines[1].startswith("  warning: decoder.top_p: ")
    assert lines[2:4] == ["c.yaml: valid campaign demo", "  Generated 6 experiments (1 filtered, 0 warnings)"]
    assert lines[4].startswith("  filtered: ")
    assert lines[4].endswith(" × 1")


def test_what_cannot_differ_is_told_without_a_run(folder: Path):
    prompts = "prompts: {type: synthetic, sample_size: 3}\n"
    (folder / "e.yaml").write_text(f"model: gpt2\n{prompts}pytorch: {{batch_size: 4}}\n", encoding="utf-8")
    shared = "{fp_precision: [float16], prompts: [{type: synthetic, sample_size: 3}]}"
    grid = CAMPAIGN.replace("{fp_precision: [float16, float32]}", shared).replace("[1, 4]", "[3, 4]")
    (folder / "c.yaml").write_text(grid, encoding="utf-8")
    code, out, _ = run_lem("config", "validate", "e.yaml", "c.yaml")
    unreached = "pytorch.batch_size: 4 acts as 3, since there are never more requests at once"
    assert code == 0
    assert out.splitlines()[1] == f"  warning: {unreached}"
    assert f"  warning: {unreached} × 1" in out
    assert "differs only in pytorch.batch_size" in out


def test_a_campaign_of_which_nothing_is_left_is_not_valid(folder: Path):
    (folder / "c.yaml").write_text(CAMPAIGN.replace("model: gpt2\n", ""), encoding="utf-8")
    code, _, err = run_lem("config", "validate", "c.yaml")
    assert code == 2
    assert "c.yaml:2:1: grid: no valid experiment is left: no model" in err


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("model:\ngrid: {backends: [pytorch]}", "2:7: model: no valid experiment is left: no model"),
        ("grid:\n  backends: [pytorch]\n  models:", "4:10: grid.models: no valid experiment is left: no model"),
        ("experiments:\n  - streaming: true", "3:5: experiments[0]: no valid experiment is left: no model"),
        (
            "model: gpt2\ngrid:\n  backends: pytorch\n  shared: {measurement.energy: rapl, measurement.cpu_tdp_w: [6]}",
            "5:61: grid.shared.measurement.cpu_tdp_w: no valid experiment is left: measurement.cpu_tdp_w: has no",
        ),
        (
            "model: gpt2\ngrid:\n  backends: pytorch\n  backend_overrides: {pytorch: {max_tokens_per_batch: 5}}",
            "5:55: grid.backend_overrides.pytorch.max_tokens_per_batch: no valid experiment is left: pytorch.max",
        ),
    ],
)
def test_what_leaves_no_experiment_is_shown_where_it_is(folder: Path, text: str, place: str):
    (folder / "c.yaml").write_text(f"campaign_name: x\n{text}\n", encoding="utf-8")
    code, _, err = run_lem("config", "validate", "c.yaml")
    assert (code, f"c.yaml:{place}" in err) == (2, True), err


def test_validation_as_json():
    code, out, err = run_lem("config", "validate", "bad.yaml", "nothing.yaml", "e.yaml", "--json")
    assert (code, err) == (2, "")
    bad, missing, good = json.loads(out)
    (problem,) = bad["problems"]
    assert problem.pop("message")
    assert problem == {"at": "bad.yaml", "line": 2, "column": 10, "key": "backend", "suggestion": None}
    assert (missing["valid"], missing["problems"][0].keys()) == (False, {"message", "hint"})
    assert (good["valid"], good["kind"], good["name"]) == (True, "experiment", "gpt2-pytorch")


def test_a_resolved_experiment_with_where_each_value_comes_from():
    code, out, err = run_lem("config", "show", "e.yaml", "--set", "gpus=[]", "--preset", "pytorch-optimized")
    assert (code, err) == (0, "")
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert lines >= {
        "name: gpt2 # e.yaml:1",
        "backend: pytorch # preset pytorch-optimized",
        "gpus: [] # command line",
        "ignore_eos: false # default",
        "preset: creative # e.yaml:2",
        "temperature: 0.8 # decoder.preset creative",
        "attn_implementation: flash_attention_2 # preset pytorch-optimized",
    }


def test_what_is_shown_can_be_read_again(folder: Path):
    (folder / "again.yaml").write_text(run_lem("config", "show", "e.yaml").out, encoding="utf-8")
    first, again = (json.loads(run_lem("config", "show", name, "--json").out) for name in ("e.yaml", "again.yaml"))
    assert again["config"] == first["config"]


def test_a_number_from_a_variable_is_shown_as_a_number_in_an_axis_and_in_an_option_of_any_kind(folder: Path):
    text = "campaign_name: c\nmodel: m\ngrid:\n  backends: [pytorch]\n  shared: {max_output_tokens: [8, ${N:-16}]}\n"
    (folder / "n.yaml").write_text(f"{text}  backend_overrides: {{pytorch: {{extra: {{top_h: ${{H:-0.5}}}}}}}}\n")
    shown = json.loads(run_lem("config", "show", folder / "n.yaml", "--json").out)["config"]["grid"]
    assert shown["shared"] == {"max_output_tokens": [8, 16]}
    assert shown["backend_overrides"]["pytorch"]["extra"] == {"top_h": 0.5}


def test_show_as_json_and_a_secret_from_a_variable_as_written(folder: Path, monkeypatch: pytest.MonkeyPatch):
    document = json.loads(run_lem("config", "show", "c.yaml", "--json").out)
    assert (document["kind"], document["config"]["execution"]["cycles"]) == ("campaign", 2)
    assert document["provenance"]["execution.cycles"] == {"from": "file", "at": "c.yaml:7"}
    assert document["provenance"]["execution.seed"] == {"from": "default", "at": None}
    assert document["config"]["notification"]["webhook_url"] == "(hidden)"
    monkeypatch.setenv("HOOK_OF_TEST", "https://host/hunter2")
    (folder / "c.yaml").write_text(CAMPAIGN.replace("https://host/hunter2", "${HOOK_OF_TEST}"), encoding="utf-8")
    out = run_lem("config", "show", "c.yaml").out
    assert ("hunter2" in out, '"${HOOK_OF_TEST}"' in out) == (False, True)


@pytest.mark.parametrize("written", ["${HOOK_OF_TEST}/hunter2", "${NONE_OF_TEST:-https://host/hunter2}"])
def test_a_secret_beside_or_in_a_variable_is_hidden(
    folder: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setenv("HOOK_OF_TEST", "https://host")
    (folder / "c.yaml").write_text(CAMPAIGN.replace("https://host/hunter2", written), encoding="utf-8")
    assert json.loads(run_lem("config", "show", "c.yaml", "--json").out)["config"]["notification"]["webhook_url"] == (
        "(hidden)"
    )


@pytest.mark.parametrize("backend", ["pytorch", "vllm", "tensorrt"])
@pytest.mark.parametrize("kind", ["campaign", "experiment"])
def test_a_new_file_is_valid_and_has_a_schema(folder: Path, kind: str, backend: str):
    code, out, _ = run_lem("config", "new", kind, "--backend", backend)
    assert code == 0
    (folder / "new.yaml").write_text(out, encoding="utf-8")
    assert run_lem("config", "validate", "new.yaml").code == 0
    assert json.loads(run_lem("config", "schema", kind).out)["title"] == f"lem {kind}"


@pytest.mark.parametrize("command", ["new", "fields"])
def test_an_unknown_backend_is_refused_with_the_nearest(command: str):
    code, _, err = run_lem("config", command, "--backend", "vlm")
    assert (code, "did you mean 'vllm'?" in err) == (2, True)


def test_fields_of_one_kind_of_both_and_of_a_backend():
    both = run_lem("config", "fields")[1]
    assert both.startswith("CAMPAIGN\n\ncampaign_name  text; required\n")
    assert "\nEXPERIMENT\n\n" in both
    of_vllm = run_lem("config", "fields", "--backend", "vllm")[1]
    assert "vllm.max_num_seqs  integer; default 256; ≥ 1, requests\n    Requests computed together." in of_vllm
    assert "pytorch.batch_size" not in of_vllm
    assert set(json.loads(run_lem("config", "fields", "campaign", "--json")[1])) == {"campaign"}


def test_presets_are_listed_in_80_columns_and_one_is_shown_as_a_file_has_it():
    code, out, _ = run_lem("presets")
    assert (code, max(map(len, out.splitlines())) <= 80) == (0, True)
    assert "vllm-low-latency       512/128   vLLM with few requests" in out
    assert run_lem("presets", "vllm-low-latency").out == (
        "# vllm-low-latency: vLLM with few requests at a time and no CUDA graphs.\n"
        "max_input_tokens: 512\nmax_output_tokens: 128\ndecoder:\n  preset: deterministic\n"
        "backend: vllm\nvllm:\n  max_num_seqs: 32\n  enforce_eager: true\n"
    )
    assert list(json.loads(run_lem("presets", "quick-test", "--json").out)) == ["quick-test"]
    assert run_lem("presets", "nothing").code == 2


@pytest.mark.parametrize(
    ("rest", "place"),
    [
        (
            "grid:\n  backends: [pytorch]\n  shared:\n    prompts: [{type: file, path: none.txt}]\n",
            "c.yaml:6:14: grid.shared.prompts.path: ",
        ),
        ("experiments:\n- prompts: {type: file, path: none.txt}\n", "c.yaml:4:31: experiments[0].prompts.path: "),
    ],
)
def test_prompts_that_cannot_be_read_are_told_where_they_are_named(folder: Path, rest: str, place: str):
    (folder / "c.yaml").write_text(f"campaign_name: x\nmodel: gpt2\n{rest}", encoding="utf-8")
    for words in (("config", "validate"), ("campaign", "--dry-run")):
        code, _, err = run_lem(*words, "c.yaml")
        assert code == 2
        assert f"error: {place}none.txt: cannot be read" in err
