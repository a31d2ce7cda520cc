"""Files, presets and overrides put together, with provenance, and problems in their places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import ConfigurationError
from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.config.load import complete_campaign, kind_of, load_campaign, load_campaign_of_files, load_experiment
from lem.config.problems import ConfigProblems
from tests.goldens import assert_golden


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory to write files in, named as a person names them."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def refusal(load: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(*arguments, **options)
    return caught.value.message


# Precedence and provenance


def test_command_line_over_file_over_preset_over_default(folder: Path):
    write(folder, e="model: gpt2\nmax_output_tokens: 7\n")
    loaded = load_experiment("e.yaml", ["max_input_tokens=5"], preset="quick-test")
    assert (loaded.config.max_input_tokens, loaded.config.max_output_tokens) == (5, 7)
    assert loaded.config.decoder.preset == "deterministic"
    expected = {
        "max_input_tokens": "command line",
        "max_output_tokens": "file",
        "model.name": "file",
        "decoder.preset": "preset",
        "decoder.temperature": "preset",
        "model.revision": "default",
        "warmup.enabled": "default",
        "pytorch": "default",
    }
    assert {key: loaded.provenance[key] for key in expected} == expected


def test_every_option_has_a_provenance(folder: Path):
    write(folder, e="model: gpt2\n", c="campaign_name: x\nconfigs: [e.yaml]\n")
    experiment, campaign = load_experiment("e.yaml"), load_campaign("c.yaml")
    assert set(experiment.provenance.values()) == {"file", "default"}
    assert campaign.provenance["configs"] == "file"
    assert campaign.provenance["execution.cycles"] == "default"


def test_what_replaces_a_section_leaves_no_provenance_of_the_old_one(folder: Path):
    write(folder, base="model: {name: one, revision: abc}\n", e="_extends: base.yaml\nmodel: two\n")
    loaded = load_experiment("e.yaml")
    assert (loaded.config.model.name, loaded.config.model.revision) == ("two", None)
    assert loaded.provenance["model.revision"] == "default"


def test_places_of_values(folder: Path):
    write(folder, base="model: gpt2\nrandom_seed: 3\n", e="_extends: base.yaml\n\ndecoder:\n  top_k: 3\n")
    source = load_experiment("e.yaml", ["streaming=true"]).source
    assert str(source.place(("decoder", "top_k"))) == "e.yaml:4:10"
    assert str(source.place(("random_seed",))) == "base.yaml:2:14"
    assert str(source.place(("streaming",))) == "--set streaming=true"


# _extends


def test_a_file_inherits_through_several(folder: Path):
    write(
        folder,
        sub__base="model: gpt2\nmax_output_tokens: 1\nmax_input_tokens: 1\nmin_output_tokens: 1\n",
        sub__middle="_extends: base.yaml\nmax_output_tokens: 2\nmax_input_tokens: 2\n",
        e="_extends: sub/middle.yaml\nmax_output_tokens: 3\n",
    )
    config = load_experiment("e.yaml").config
    assert (config.max_output_tokens, config.max_input_tokens, config.min_output_tokens) == (3, 2, 1)


def test_a_campaign_inherits_too_and_its_files_lie_beside_the_file_that_names_them(folder: Path):
    write(
        folder,
        shared__base="configs: [e.yaml]\nexecution: {cycles: 5}\n",
        shared__e="model: gpt2\n",
        c="_extends: shared/base.yaml\ncampaign_name: x\n",
    )
    loaded = load_campaign("c.yaml")
    assert loaded.config.execution.cycles == 5
    assert [one.path for one in loaded.listed] == [Path("shared/e.yaml")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_extends: e.yaml\n", "e.yaml:1:11: _extends: e.yaml inherits from itself"),
        ("_extends: nothing.yaml\n", "e.yaml:1:11: _extends: nothing.yaml: no such file"),
        ("_extends: [a.yaml, b.yaml]\n", "e.yaml:1:11: _extends: the name of one file is due"),
        ("_extends:\n", "e.yaml:1:10: _extends: the name of one file is due"),
    ],
)
def test_inheriting_that_cannot_be(folder: Path, text: str, message: str):
    write(folder, e=text + "model: gpt2\n")
    assert refusal(load_experiment, "e.yaml").startswith(message)


def test_inheriting_in_a_circle_is_refused(folder: Path):
    write(folder, a="_extends: b.yaml\nmodel: gpt2\n", b="_extends: a.yaml\n")
    assert refusal(load_experiment, "a.yaml").startswith("b.yaml:1:11: _extends: a.yaml inherits from itself")


def test_a_problem_in_an_inherited_file_is_told_there(folder: Path):
    write(folder, base="model: gpt2\n\nstreaming: maybe\n", e="_extends: base.yaml\n")
    assert refusal(load_experiment, "e.yaml").startswith("base.yaml:3:12: streaming: true or false is due")


def test_a_problem_is_told_where_the_value_in_force_was_written(folder: Path):
    write(folder, base="model: gpt2\ngpus: [0, 1]\n", e="_extends: base.yaml\ngpus: first\n")
    assert refusal(load_experiment, "e.yaml").startswith("e.yaml:2:7: gpus: an index like 0")
    write(folder, e="_extends: base.yaml\n")
    assert refusal(load_experiment, "e.yaml", ["gpus=first"]).startswith("--set gpus=first: gpus: an index")
    assert refusal(load_experiment, "e.yaml").startswith("base.yaml:2:7: gpus: pytorch runs on one GPU")


def test_an_overridden_value_of_an_inherited_file_is_not_held_against_it(folder: Path):
    write(folder, base="model: gpt2\nstreaming: maybe\n", e="_extends: base.yaml\nstreaming: true\n")
    assert load_experiment("e.yaml").config.streaming is True


# --set


def test_sets_of_every_shape(folder: Path):
    write(folder, c="campaign_name: x\ngrid: {backends: [vllm], shared: {fp_precision: [float16, bfloat16]}}\n")
    loaded = load_campaign(
        "c.yaml",
        [
            "grid.shared.fp_precision=[float16]",
            "grid.shared.decoder.preset=[deterministic, factual]",
            "grid.backend_overrides.vllm.attention.backend=FLASHINFER",
            "execution.cycles=1",
            ("execution.cycles", 2),
            "model=gpt2",
            "io.results_dir='no'",
        ],
    )
    grid = loaded.config.grid
    assert grid is not None
    assert grid.shared == {"fp_precision": ["float16"], "decoder.preset": ["deterministic", "factual"]}
    assert grid.backend_overrides == {"vllm": {"attention.backend": "FLASHINFER"}}
    assert loaded.config.execution.cycles == 2
    assert loaded.config.model is not None
    assert loaded.config.io.results_dir == "no"
    assert loaded.forced >= {"execution.cycles", "model.name", "io.results_dir"}
    assert "execution.seed" not in loaded.forced


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("execution.cycels=3", "--set execution.cycels=3: execution.cycels: unknown key (did you mean 'cycles'?)"),
        ("execution.cycles=30", "--set execution.cycles=30: execution.cycles: must be at most 20, got 30"),
        ("execution.cycles", "--set execution.cycles: KEY=VALUE is due"),
        ("=3", "--set =3: KEY=VALUE is due"),
        ("execution..cycles=3", "--set execution..cycles=3: KEY=VALUE is due"),
        ("execution=3", "--set execution=3: execution: a mapping is due, got the number 3"),
        ("execution.cycles=[3", "--set execution.cycles=[3: not YAML: expected"),
    ],
)
def test_sets_that_are_refused(folder: Path, item: str, message: str):
    write(folder, c="campaign_name: x\ngrid: {backends: [pytorch]}\n")
    assert refusal(load_campaign, "c.yaml", [item]).startswith(message)


def test_a_secret_is_shown_neither_from_a_file_nor_from_the_command_line(folder: Path):
    write(folder, c="campaign_name: x\ngrid: {backends: [pytorch]}\nnotification: {webhook_url: hunter2}\n")
    message = refusal(load_campaign, "c.yaml")
    assert message == "c.yaml:3:29: notification.webhook_url: a URL that begins with http:// or https:// is due"
    write(folder, c="campaign_name: x\ngrid: 3\nnotification: {on: x, webhook_url: https://hunter2}\n")
    assert "hunter2" not in refusal(load_campaign, "c.yaml")
    write(folder, c="notification: {webhook_url: https://hunter2}}\n")
    assert "hunter2" not in refusal(load_campaign, "c.yaml")
    write(folder, c="campaign_name: x\ngrid: {backends: [pytorch]}\n")
    message = refusal(load_campaign, "c.yaml", ["notification.webhook_url=hunter3"])
    assert message.startswith("--set notification.webhook_url=(hidden): ")
    assert "hunter" not in message


# Variables


def test_variables_give_values_of_every_kind_and_records_keep_the_reference(folder: Path):
    write(
        folder, e="model: ${MODEL}\nmax_output_tokens: ${TOKENS:-9}\nstreaming: ${S}\nextra_metadata: {who: '${WHO}'}\n"
    )
    environ = {"MODEL": "gpt2", "S": "true", "WHO": "5"}
    loaded = load_experiment("e.yaml", environ=environ)
    assert (loaded.config.model.name, loaded.config.max_output_tokens, loaded.config.streaming) == ("gpt2", 9, True)
    assert loaded.config.extra_metadata == {"who": "5"}
    assert loaded.source.unexpanded == {
        "model": {"name": "${MODEL}"},
        "max_output_tokens": "${TOKENS:-9}",
        "streaming": "${S}",
        "extra_metadata": {"who": "${WHO}"},
    }


def test_unset_variables_are_told_with_everything_else(folder: Path):
    write(folder, e="model: ${NOPE}\nmax_output_tokens: 0\n")
    message = refusal(load_experiment, "e.yaml", environ={})
    assert [line for line in message.splitlines() if line.startswith("e.yaml")] == [
        "e.yaml:1:8: model: the environment variable NOPE is not set; set it or write ${NOPE:-default}",
        "e.yaml:2:20: max_output_tokens: must be at least 1, got 0",
    ]


# Campaigns and the files they name


def test_the_experiments_that_a_campaign_lists_are_in_order(folder: Path):
    write(
        folder,
        a="model: opt\nmax_output_tokens: 1\n",
        sub__b="_extends: ../a.yaml\nconfig_name: second\n",
        c="campaign_name: x\nmodel: gpt2\nconfigs: [a.yaml, sub/b.yaml]\nexperiments:\n"
        "  - {config: a.yaml, overrides: {decoder.preset: factual, max_output_tokens: 2}}\n"
        "  - {max_output_tokens: 3}\n",
    )
    listed = load_campaign("c.yaml").listed
    assert [one.name for one in listed] == ["a", "second", "a", None]
    assert [one.mapping["max_output_tokens"] for one in listed] == [1, 1, 2, 3]
    assert [one.mapping["model"]["name"] for one in listed] == ["opt", "opt", "opt", "gpt2"]
    assert ExperimentConfig.from_dict(listed[2].mapping).decoder.temperature == 0.3


def test_a_campaign_made_in_python_lists_the_same_experiments(folder: Path):
    write(folder, a="model: opt\n")
    campaign = CampaignConfig.from_dict(
        {
            "campaign_name": "x",
            "configs": ["a.yaml"],
            "experiments": [{"config": "a.yaml", "overrides": {"streaming": True}}, {"model": "gpt2"}],
        }
    )
    configs = [ExperimentConfig.from_dict(one.mapping) for one in complete_campaign(campaign).listed]
    assert [(config.model.name, config.streaming) for config in configs] == [
        ("opt", False),
        ("opt", True),
        ("gpt2", False),
    ]


def test_a_preset_is_below_the_files_of_a_campaign(folder: Path):
    write(folder, a="model: opt\nmax_output_tokens: 1\n", c="campaign_name: x\nconfigs: [a.yaml]\n")
    loaded = load_campaign("c.yaml", preset="benchmark")
    config = ExperimentConfig.from_dict(loaded.listed[0].mapping)
    assert (config.max_input_tokens, config.max_output_tokens) == (2048, 1)
    assert loaded.preset["max_input_tokens"] == 2048


def test_an_experiment_without_a_model_is_no_error_of_the_file_but_does_not_validate(folder: Path):
    write(folder, a="max_output_tokens: 1\n", c="campaign_name: x\nconfigs: [a.yaml]\n")
    (one,) = load_campaign("c.yaml").listed
    with pytest.raises(ConfigProblems, match="model: is required"):
        ExperimentConfig.from_dict(one.mapping)


def test_a_problem_in_a_named_file_is_told_there_beside_those_of_the_campaign(folder: Path):
    write(
        folder,
        a="model: gpt2\nbackend: vllm\npytorch: {batch_size: 2}\n",
        c="campaign_name: x\nconfigs: [a.yaml, nothing.yaml]\nexecution: {cycles: 0}\n",
    )
    message = refusal(load_campaign, "c.yaml")
    assert message.splitlines()[0] == "3 problems in the configuration:"
    assert "c.yaml:2:19: configs[1]: nothing.yaml: no such file" in message
    assert "c.yaml:3:21: execution.cycles: must be at least 1, got 0" in message
    assert "a.yaml:3:1: pytorch: has no effect: the backend is vllm" in message


def test_a_named_file_that_is_no_yaml_is_told_with_its_place(folder: Path):
    write(folder, a="model: [\n", c="campaign_name: x\nconfigs: [a.yaml]\n")
    assert refusal(load_campaign, "c.yaml").startswith("a.yaml:2:1: not YAML")


def test_a_campaign_of_files(folder: Path):
    write(folder, a="model: gpt2\n", sub__b="model: gpt2\nmax_output_tokens: 1\n")
    loaded = load_campaign_of_files("many", ["a.yaml", "sub/b.yaml"], ["execution.cycles=1"])
    assert loaded.config.campaign_name == "many"
    assert loaded.config.execution.cycles == 1
    assert [one.name for one in loaded.listed] == ["a", "b"]
    assert refusal(load_campaign_of_files, "many", ["nothing.yaml"]).endswith("nothing.yaml: no such file")


@pytest.mark.parametrize(
    ("load", "text", "hint"),
    [
        (load_experiment, "campaign_name: c\nmodel: gpt2\n", "f.yaml is a campaign: lem campaign f.yaml"),
        (load_experiment, "model: gpt2\nbackend: cuda\n", ""),
        (load_experiment, "model: gpt2\nexecution: {cycles: 3}\n", ""),
        (load_campaign, "model: gpt2\n", "f.yaml is an experiment: lem experiment f.yaml, or --campaign-name NAME"),
        (load_campaign, "campaign_name: c\nexecution: {cycles: 0}\n", ""),
    ],
)
def test_a_file_of_the_other_kind_is_told_with_the_command_for_it(folder: Path, load: Any, text: str, hint: str):
    write(folder, f=text)
    with pytest.raises(ConfigurationError) as caught:
        load("f.yaml")
    assert caught.value.hint.startswith(hint)
    assert bool(caught.value.hint) == bool(hint)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("campaign_name: x\n", "campaign"),
        ("grid: {}\n", "campaign"),
        ("model: gpt2\nexecution: {}\n", "campaign"),
        ("model: gpt2\n", "experiment"),
        ("backend: pytorch\nnonsense: 1\n", "experiment"),
    ],
)
def test_campaigns_and_experiments_are_told_apart(folder: Path, text: str, kind: str):
    write(folder, f=text)
    assert kind_of("f.yaml") == kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "e.yaml:1:1: is empty; a configuration is due (`lem config new` writes one to start from)"),
        ("# nothing\n", "e.yaml:1:1: is empty"),
        ("- a\n", "e.yaml:1:1: a mapping (key: value) is due at the top, got a list"),
        ("hello\n", "e.yaml:1:1: a mapping (key: value) is due at the top, got plain text"),
    ],
)
def test_files_without_a_mapping(folder: Path, text: str, message: str):
    write(folder, e=text)
    assert refusal(load_experiment, "e.yaml").startswith(message)
    assert refusal(load_campaign, "e.yaml").startswith(message)


# The text of problems


BROKEN = """\
campaign_name: no
model: ${LEM_TEST_UNSET}
configs: [missing.yaml, bad.yaml]
grid:
    backends: [pytorch, cuda]
    shared:
        fp_precison: [float16]
        decoder.preset: [deterministic, crative]
    backend_overrides:
        vllm: {max_num_seqs: 8}
execution:
    cycels: 3
    cycles: 25
    structure: yes
    cycles: 4
daemon:
    at: 7:30
    interval: 6 hours
experiments:
    - {config: good.yaml, overrides: {decoder.temperature: 9}}
    - backend: vllm
      pytorch: {batch_size: 3}
num_samples: "10"
"""


def test_all_problems_are_shown_at_once_in_their_places(folder: Path):
    write(folder, c=BROKEN, good="model: gpt2\n", bad="model_name: 5\nfp_precision: fp16\ngpus: [0, first]\n")
    message = refusal(load_campaign, "c.yaml", ["execution.sed=1"], environ={})
    assert_golden("config/problems.txt", message + "\n")


def test_problems_are_sorted_by_place(folder: Path):
    write(folder, e="max_output_tokens: 0\nmodel: 5\nfp_precision: x\nbackend: y\nmax_input_tokens: 0\n")
    lines = [
        line.split(":")[1] for line in refusal(load_experiment, "e.yaml").splitlines() if line.startswith("e.yaml")
    ]
    assert lines == ["1", "2", "3", "4", "5"]


def test_a_long_line_is_cut_around_the_place(folder: Path):
    write(folder, e="model: gpt2\nextra_metadata: {" + "a" * 300 + ": 1}\ngpus: [" + "0," * 100 + " x]\n")
    message = refusal(load_experiment, "e.yaml")
    assert max(len(line) for line in message.splitlines()) < 130
    shown, caret = message.splitlines()[-2:]
    assert shown[caret.index("^")] == "x"


def test_hundreds_of_problems_are_counted_not_all_shown(folder: Path):
    write(folder, e="model: gpt2\n" + "".join(f"unknown{n}: 1\n" for n in range(250)))
    lines = refusal(load_experiment, "e.yaml").splitlines()
    assert lines[0] == "250 problems in the configuration:"
    assert lines[-1] == "and 150 more"
