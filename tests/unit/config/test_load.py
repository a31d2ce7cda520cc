"""Files, presets and overrides put together, with provenance, and problems in their places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import ConfigurationError
from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import ConfigProblems, dotted
from lem.config.load import complete_campaign, kind_of, load_campaign, load_campaign_of_files, load_experiment
from lem.config.sections import SyntheticPrompts
from lem.config.yamlfile import FileProblems, Mark, read_document


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


def refusal(load: Any, *arguments: Any, **options: Any) -> FileProblems:
    with pytest.raises(FileProblems) as caught:
        load(*arguments, **options)
    return caught.value


def problems(load: Any, *arguments: Any, **options: Any) -> list[str]:
    """The place and the option of each problem."""
    return [f"{place} {dotted(problem.path)}" for place, problem in refusal(load, *arguments, **options).located]


# Precedence and provenance


def test_command_line_over_file_over_preset_over_default(folder: Path):
    write(
        folder, base="model: {name: one, revision: abc}\n", e="_extends: base.yaml\nmodel: two\nmax_output_tokens: 7\n"
    )
    loaded = load_experiment("e.yaml", ["max_input_tokens=5"], preset="quick-test")
    assert (loaded.config.model.name, loaded.config.model.revision) == ("two", None)
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
    assert "max_input_tokens" in loaded.source.forced
    assert "max_output_tokens" not in loaded.source.forced


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
    write(folder, sub__c="configs: [base.yaml]\n", c="_extends: sub/c.yaml\ncampaign_name: x\n")
    loaded = load_campaign("c.yaml")
    assert [one.path for one in loaded.listed] == [Path("sub/base.yaml")]  # beside the file that names it


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("_extends: e.yaml\n", 11),
        ("_extends: nothing.yaml\n", 11),
        (f"_extends: {'x' * 300}.yaml\n", 11),
        ("_extends: [a.yaml, b.yaml]\n", 11),
        ("_extends:\n", 10),
    ],
)
def test_inheriting_that_is_refused(folder: Path, text: str, column: int) -> None:
    write(folder, e=text + "model: gpt2\n")
    assert problems(load_experiment, "e.yaml") == [f"e.yaml:1:{column} _extends"]


def test_inheriting_in_a_circle_is_refused(folder: Path) -> None:
    write(folder, a="_extends: b.yaml\nmodel: gpt2\n", b="_extends: a.yaml\n")
    assert problems(load_experiment, "a.yaml") == ["b.yaml:1:11 _extends"]


def test_a_problem_is_located_where_the_value_in_force_was_written(folder: Path) -> None:
    write(folder, base="model: gpt2\ngpus: [0, 1]\nstreaming: maybe\n", e="_extends: base.yaml\ngpus: first\n")
    assert problems(load_experiment, "e.yaml") == ["e.yaml:2:7 gpus", "base.yaml:3:12 streaming"]
    write(folder, e="_extends: base.yaml\nstreaming: true\n")
    assert problems(load_experiment, "e.yaml") == ["base.yaml:2:7 gpus"]
    assert problems(load_experiment, "e.yaml", ["gpus=first"]) == ["--set gpus=first gpus"]
    assert load_experiment("e.yaml", ["gpus=[]"]).config.streaming is True


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
    assert loaded.source.forced >= {"execution.cycles", "model.name", "io.results_dir"}
    assert "execution.seed" not in loaded.source.forced


@pytest.mark.parametrize(
    ("item", "option"),
    [
        ("execution.cycels=3", "execution.cycels"),
        ("execution.cycles=30", "execution.cycles"),
        ("execution=3", "execution"),
        ("execution.cycles=[3", ""),
        ("execution.cycles=${LEM_TEST_UNSET}", ""),
    ],
)
def test_sets_that_are_refused(folder: Path, item: str, option: str) -> None:
    write(folder, c="campaign_name: x\ngrid: {backends: [pytorch]}\n")
    assert problems(load_campaign, "c.yaml", [item], environ={}) == [f"--set {item} {option}"]
    for shapeless in ("execution.cycles", "=3", "execution..cycles=3"):
        with pytest.raises(ConfigurationError, match=f"^--set {shapeless}: expected KEY=VALUE"):
            load_campaign("c.yaml", [shapeless])


@pytest.mark.parametrize(
    ("text", "sets"),
    [
        ("campaign_name: x\ngrid: {backends: [pytorch]}\nnotification: {webhook_url: hunter2}\n", []),
        ("campaign_name: x\ngrid: 3\nnotification: {on: x, webhook_url: https://hunter2}\n", []),
        ("notification: {webhook_url: https://hunter2}}\n", []),
        ("campaign_name: x\nnotification: {webhook_url: 6666}\n", []),
        ("campaign_name: x\nnotification: {webhook_url: 6666.5}\n", []),
        ("campaign_name: x\nnotification: {webhook_url: [https://hunter2]}\n", []),
        ("campaign_name: x\nnotification: https://hunter2\n", []),
        ("campaign_name: x\nnotification: {webhook: https://hunter2}\n", []),
        ("campaign_name: x\nwebook_url: https://hunter2\n", []),
        ("campaign_name: x\nnotification:\n  webhook_url:\n    https://hunter2/${LEM_TEST_UNSET}\n", []),
        ("campaign_name: x\nnotification: {webhook_url: https://hunter2, webhook_url: https://hunter3}\n", []),
        ("campaign_name: x\nnotification: {webook_url: https://hunter2, webook_url: https://hunter3}\n", []),
        ("campaign_name: x\nnotification: {'webhook_url' : 'https://u:hunter2@h'}\n", []),
        *(
            (f"campaign_name: x\nnotification: {text}\n", [])
            for text in (
                "{webhook_url:\n  https://hunter2, on: x}",
                "{webhook_url:\nhttps://hunter2, on: [x}",
                "{webhook_url:\n\n  https://hunter2, on: [x}",
                "{webhook_url:\n  https://hunter2, on: *x}",
                '{webhook_url: "https://\n  hunter2", on: x}',
                '{webhook_url: "https://\n\n  hunter2", n: x, on: x}',
                "{webhook_url:\n  [a,\n  https://hunter2], on: x}",
                "{webhook_url:\n  {a: [\n  https://hunter2]}, on: x}",
                "{webhook_url: {https://hunter2}}",
                "{webhook_url: {a: {hunter2: 3}}}",
                "{webhook_url: {? [hunter2] : 3}}",
                "{webhook_url: {hunter2: 1, hunter2: 2}}",
                "{webhook_url: !hunter2 x}",
                "{webhook_url: *hunter2}",
                "{webhook_url: &hunter2 x, on: &hunter2 x, a: !hunter2!b x}",
                "{https://hunter2}",
                "{webook_url:\n  https://hunter2, on: x}",
                "{url:\n  https://hunter2, on: x}",
                "{webhook_url: a,\n  webhook_url:\n  https://hunter2, on: x}",
                "{on: [complete]}\nnotification: {webhook_url:\n  https://hunter2}",
                "{<<: {webhook_url:\n  https://hunter2}, on: x}",
                "\n  webhook_url: >\n    https://\n    hunter2\n  on: x",
            )
        ),
        ("campaign_name: &x\n  https://hunter2\nmodel: {a: *x}\nnotification: {webhook_url: *x}\n", []),
        ("campaign_name: x\nextra: {a: &x\n  https://hunter2, b: 1, b: 2}\nnotification: {webhook_url: *x}\n", []),
        ("campaign_name: x\ngrid: {backends: [pytorch]}\n", ["notification.webhook_url=*hunter2"]),
        ("campaign_name: x\ngrid: {backends: [pytorch]}\n", ["notification.webhook_url=hunter2"]),
        ("campaign_name: x\ngrid: {backends: [pytorch]}\n", ["notification=hunter2"]),
        ("campaign_name: x\ngrid: {backends: [pytorch]}\n", ["notification.webhook_url=6666"]),
    ],
)
def test_a_secret_is_shown_neither_from_a_file_nor_from_the_command_line(
    folder: Path, text: str, sets: list[str]
) -> None:
    write(folder, c=text)
    error = refusal(load_campaign, "c.yaml", sets)
    assert error.located
    shown = f"{error.message} {error.hint} {[problem.message for _, problem in error.located]}"
    assert "hunter" not in shown
    assert "6666" not in shown


def test_a_line_beside_a_secret_is_shown_as_far_as_the_secret(folder: Path) -> None:
    text = "campaign_name: x\nnotification: {on: x, webhook_url: &u\n  https://hunter2, # here\n  n: 1}\na: [}\n"
    write(folder, c=text.replace("a: [}\n", "a: 1\n"), d=text)
    shown = refusal(load_campaign, "c.yaml").message.splitlines()
    assert list(dict.fromkeys(line for line in shown if " | " in line and "^" not in line)) == [
        "    2 | notification: {on: x, webhook_url: (hidden)",
        "    4 |   n: (hidden)",
        "    5 | a: 1",
    ]
    assert refusal(load_campaign, "d.yaml").message.splitlines()[1] == "    5 | a: [}"


def test_secrets_in_a_list_are_hidden_and_so_are_those_it_only_names(folder: Path) -> None:
    write(folder, c="a: &x hunter2\nnotification: {webhook_url: [*x,\n  hunter3, # one\n  hunter4]}\nb: [*x, 5]\n")
    document = read_document(folder / "c.yaml", {})
    assert [document.at(Mark(line, 1)).line for line in range(1, 6)] == [
        "a: (hidden)",
        "notification: {webhook_url: (hidden)",
        "",
        "",
        "b: [*x, 5]",
    ]


WITH_HOOK = "campaign_name: x\ngrid: {{backends: [pytorch]}}\nnotification: {{webhook_url: {}}}\n"


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("https://user:hunter2@host/x", "user name or password"),
        ("https://hunter2@host/x", "user name or password"),
        ("http://host:99999/hunter2", "invalid host or port"),
        ("http://host:abc/hunter2", "invalid host or port"),
        ("http://host:-1/hunter2", "invalid host or port"),
        ("http://host:0/hunter2", "invalid port"),
        ("http://[::1/hunter2", "invalid host or port"),
        ("http://host..de/hunter2", "invalid host name"),
        (f"http://{'a' * 64}.de/hunter2", "invalid host name"),
        ("http:///hunter2", "no host"),
        ("http://:80/hunter2", "no host"),
        ("ftp://host/hunter2", "begins with http:// or https://"),
        ("hunter2", "begins with http:// or https://"),
        ("http:hunter2", "no host"),
        *((f"http://host/hunter2{char}x", "without spaces, control characters") for char in " \t\n\r\x1b\x7fü\u2028"),
        ("http://host/hunter2\0", "control character"),
    ],
)
def test_a_webhook_that_cannot_work_is_refused_at_its_place_without_its_url(
    folder: Path, url: str, complaint: str
) -> None:
    write(folder, c=WITH_HOOK.format(json.dumps(url)))
    error = refusal(load_campaign, "c.yaml")
    assert complaint in error.message
    assert error.message.splitlines()[0].startswith("c.yaml:3:29: notification.webhook_url: ")
    assert error.message.splitlines()[1:] == [
        "    3 | notification: {webhook_url: (hidden)",
        "      |                             ^",
    ]


@pytest.mark.parametrize(
    "url", ["https://h/x", "HTTP://h:8080", "http://[::1]:80/a?b=c%20d#e", "http://h:/x", "https://a-b.c.de/{}'|"]
)
def test_a_webhook_that_can_work_is_taken(folder: Path, url: str) -> None:
    write(folder, c=WITH_HOOK.format(json.dumps(url)))
    assert load_campaign("c.yaml").config.notification.webhook_url == url


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


def test_an_unset_variable_is_one_problem_beside_the_others(folder: Path) -> None:
    write(folder, e="model: ${NOPE}\nmax_output_tokens: 0\n")
    assert problems(load_experiment, "e.yaml", environ={}) == ["e.yaml:1:8 model", "e.yaml:2:20 max_output_tokens"]


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


@pytest.mark.parametrize("written", ["prompts: {type: file, path: own.txt}", "dataset: gsm8k"])
def test_own_prompts_replace_those_of_a_preset_or_of_the_file_below(folder: Path, written: str):
    write(folder, e=f"model: any\n{written}\n", child="_extends: e.yaml\nprompts: {type: synthetic, input_tokens: 8}\n")
    config = load_experiment("e.yaml", preset="ai-energy-score").config
    assert (config.dataset is None, config.prompts is None) == (written[0] == "p", written[0] == "d")
    assert (config.min_output_tokens, config.max_output_tokens) == (10, 10)
    sets = ["prompts.type=synthetic", "prompts.input_tokens=8"]
    for config in (load_experiment("child.yaml").config, load_experiment("e.yaml", sets).config):
        assert (config.dataset, config.prompts) == (None, SyntheticPrompts(input_tokens=8))


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


def test_problems_of_a_listed_file_are_located_there_beside_those_of_the_campaign(folder: Path) -> None:
    write(
        folder,
        a="model: gpt2\nbackend: vllm\npytorch: {batch_size: 2}\n",
        b="model: [\n",
        c="campaign_name: x\nconfigs: [a.yaml, b.yaml, nothing.yaml]\nexecution: {cycles: 0}\n",
    )
    assert sorted(problems(load_campaign, "c.yaml")) == [
        "a.yaml:3:1 pytorch",
        "b.yaml:2:1 ",
        "c.yaml:2:27 configs[2]",
        "c.yaml:3:21 execution.cycles",
    ]


def test_a_campaign_of_files(folder: Path):
    write(folder, a="model: gpt2\n", sub__b="model: gpt2\nmax_output_tokens: 1\n")
    loaded = load_campaign_of_files("many", ["a.yaml", "sub/b.yaml"], ["execution.cycles=1"])
    assert loaded.config.campaign_name == "many"
    assert loaded.config.execution.cycles == 1
    assert [one.name for one in loaded.listed] == ["a", "b"]
    assert problems(load_campaign_of_files, "many", ["nothing.yaml"]) == ["the command line configs[0]"]


@pytest.mark.parametrize(
    ("load", "text", "hint"),
    [
        (load_experiment, "model: gpt2\ngrid: {}\n", "run it with `lem campaign f.yaml`"),
        (load_experiment, "model: gpt2\nbackend: cuda\n", ""),
        (load_experiment, "model: gpt2\nexecution: {cycles: 3}\n", ""),
        (load_campaign, "model: gpt2\n", "run it with `lem experiment f.yaml`, or make a campaign of it"),
        (load_campaign, "model: gpt2\nbackend: vllm\nschedule: {at: '10:00'}\n", "run it with `lem experiment f.yaml`"),
        (load_campaign, "execution: {cycles: 3}\n", ""),
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
        ("configs: a.yaml\n", "campaign"),
        ("model: gpt2\nexperiments: []\n", "campaign"),
        ("model: gpt2\nexecution: {}\n", "experiment"),
        ("model: gpt2\nschedule: {at: '10:00'}\n", "experiment"),
        ("model: gpt2\n", "experiment"),
        ("backend: pytorch\nnonsense: 1\n", "experiment"),
    ],
)
def test_campaigns_and_experiments_are_told_apart(folder: Path, text: str, kind: str):
    write(folder, f=text)
    assert kind_of("f.yaml") == kind


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "hello\n"])
def test_files_without_a_mapping_are_refused(folder: Path, text: str) -> None:
    write(folder, e=text)
    assert problems(load_experiment, "e.yaml") == problems(load_campaign, "e.yaml") == ["e.yaml:1:1 "]


# Sections without values


EMPTY = "decoder:\nwarmup: null\nmeasurement: ~\nextra_metadata:\n"


def test_a_section_that_is_null_has_its_defaults(folder: Path):
    write(folder, e=f"model: gpt2\n{EMPTY}pytorch:\n")
    loaded = load_experiment("e.yaml")
    assert loaded.config == ExperimentConfig.from_dict({"model": "gpt2"})
    assert loaded.provenance["warmup.min_prompts"] == "default"


def test_a_null_section_of_a_campaign_and_of_its_experiments_has_its_defaults(folder: Path):
    write(folder, e=EMPTY, c="campaign_name: x\nmodel: gpt2\nconfigs: e.yaml\nexecution:\nio: null\nexperiments:\n")
    loaded = load_campaign("c.yaml", ["execution.warmup_prompts=7"])
    assert loaded.config.execution.cycles == 3
    assert loaded.provenance["io.results_dir"] == "default"
    assert loaded.listed[0].mapping["warmup"]["min_prompts"] == 7
    assert loaded.listed[0].mapping["model"]["name"] == "gpt2"


def test_a_null_section_replaces_the_one_it_inherits(folder: Path):
    write(folder, base="model: gpt2\ndecoder: {preset: factual}\n", e="_extends: base.yaml\ndecoder:\n")
    assert load_experiment("e.yaml").config.decoder.preset is None


@pytest.mark.parametrize("text", ["model:\n", "model: gpt2\nprompts: {type: file, path: }\n"])
def test_a_required_option_that_is_null_is_missing(folder: Path, text: str):
    write(folder, e=text)
    assert len(problems(load_experiment, "e.yaml")) == 1


# Options of all experiments of a campaign, from the command line


@pytest.mark.parametrize(
    ("sets", "shared", "overrides", "listed"),
    [
        (["measurement.min_window_sec=3"], {"measurement.min_window_sec": (3,)}, {}, (3, 3)),
        ([("measurement.min_window_sec", 3)], {"measurement.min_window_sec": (3,)}, {}, (3, 3)),
        (["pytorch.batch_size=4"], {"measurement.min_window_sec": (1, 2)}, {"pytorch": {"batch_size": (4,)}}, (10, 1)),
        (
            ["pytorch={batch_size: 4}"],
            {"measurement.min_window_sec": (1, 2)},
            {"pytorch": {"batch_size": (4,)}},
            (10, 1),
        ),
        (["vllm.max_num_seqs=4"], {"measurement.min_window_sec": (1, 2)}, {}, (10, 1)),
    ],
)
def test_an_option_of_experiments_set_for_a_campaign_applies_to_all_of_them(
    folder: Path, sets: Any, shared: Any, overrides: Any, listed: Any
):
    write(
        folder,
        e="backend: vllm\nmeasurement: {min_window_sec: 1}\n",
        c="campaign_name: x\nmodel: gpt2\ngrid: {backends: [pytorch], shared: {measurement.min_window_sec: [1, 2]}}\n"
        "experiments: [{backend: pytorch}, {config: e.yaml, overrides: {max_output_tokens: 9}}]\n",
    )
    loaded = load_campaign("c.yaml", sets)
    assert loaded.config.grid is not None
    assert (loaded.config.grid.shared, loaded.config.grid.backend_overrides) == (shared, overrides)
    configs = [ExperimentConfig.from_dict(one.mapping) for one in loaded.listed]
    assert tuple(config.measurement.min_window_sec for config in configs) == listed
    assert configs[1].max_output_tokens == 9
    assert [config.width for config in configs] == [
        4 if "batch_size" in str(sets) else 1,
        4 if "max_num_seqs" in str(sets) else 256,
    ]


def test_an_option_set_for_all_experiments_wins_over_files_of_a_campaign_without_a_grid(folder: Path):
    write(folder, e="model: gpt2\nmax_output_tokens: 5\n")
    loaded = load_campaign_of_files("x", ["e.yaml"], ["max_output_tokens=7", "decoder.preset=factual"])
    assert [one.mapping["max_output_tokens"] for one in loaded.listed] == [7]
    assert loaded.listed[0].mapping["decoder"] == {"preset": "factual"}
    found = refusal(load_campaign_of_files, "x", ["e.yaml"], ["max_output_tokens=0"])
    assert [place.label for place, _ in found.located] == ["--set max_output_tokens=0"]


def test_a_backend_set_for_a_campaign_is_that_of_its_grid_too(folder: Path):
    write(
        folder,
        c="campaign_name: x\nmodel: gpt2\ngrid: {backends: [pytorch]}\nexperiments: [{streaming: true}, {gpus: []}]\n",
    )
    loaded = load_campaign("c.yaml", ["backend=vllm"])
    assert loaded.config.grid is not None
    assert loaded.config.grid.backends == ("vllm",)
    assert [one.mapping.get("backend") for one in loaded.listed] == ["vllm", "vllm"]
    loaded = load_campaign("c.yaml", ["vllm.max_num_seqs=4", "backend=vllm"])  # in any order
    assert loaded.config.grid is not None
    assert loaded.config.grid.backend_overrides == {"vllm": {"max_num_seqs": (4,)}}
    assert [one.mapping["vllm"] for one in loaded.listed] == 2 * [{"max_num_seqs": 4}]


@pytest.mark.parametrize("rest", ["grid: {backends: [pytorch]}\n", "experiments: [{streaming: true}]\n"])
def test_an_option_of_a_backend_that_no_experiment_has_is_not_ignored(folder: Path, rest: str):
    write(folder, c=f"campaign_name: x\nmodel: gpt2\n{rest}")
    error = refusal(load_campaign, "c.yaml", ["vllm.max_num_seqs=4"])
    assert error.message == "--set vllm.max_num_seqs=4: has no effect: no experiment has the backend vllm"


# Many problems


def test_only_for_problems_that_are_shown_lem_looks_for_what_is_meant(folder: Path):
    write(folder, e="model: gpt2\n" + "".join(f"streamin_{number}: 1\nstreamin{number}: 1\n" for number in range(51)))
    found = refusal(load_experiment, "e.yaml").located
    assert len(found) == 102
    assert [item.suggestion for _, item in found if item.suggestion][:1] == ["streaming"]
    assert [item.suggestion for _, item in found[100:]] == [None, None]


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


EXPECTED = [
    "c.yaml:2 model",
    "c.yaml:3 configs[0]",
    "c.yaml:5 grid.backends[1]",
    "c.yaml:7 grid.shared.fp_precison",
    "c.yaml:8 grid.shared.decoder.preset[1]",
    "c.yaml:12 execution.cycels",
    "c.yaml:13 execution.cycles",
    "c.yaml:14 execution.structure",
    "c.yaml:15 execution.cycles",
    "c.yaml:17 daemon.at",
    "c.yaml:17 daemon.at",
    "c.yaml:18 daemon.interval",
    "c.yaml:20 experiments[0].overrides.decoder.temperature",
    "c.yaml:22 experiments[1].pytorch",
    "c.yaml:23 num_samples",
    "--set execution.sed=1:0 execution.sed",
    "bad.yaml:1 model",
    "bad.yaml:2 fp_precision",
    "bad.yaml:3 gpus[1]",
]
SUGGESTED = {
    "grid.shared.fp_precison": "fp_precision",
    "grid.shared.decoder.preset[1]": "creative",
    "execution.cycels": "cycles",
    "execution.sed": "seed",
    "fp_precision": "float16",
}


def test_all_problems_are_found_at_once_in_their_places(folder: Path) -> None:
    write(folder, c=BROKEN, good="model: gpt2\n", bad="model_name: 5\nfp_precision: fp16\ngpus: [0, first]\n")
    error = refusal(load_campaign, "c.yaml", ["execution.sed=1"], environ={})
    found = [f"{place.label}:{(place.mark or (0,))[0]} {dotted(problem.path)}" for place, problem in error.located]
    assert found == EXPECTED
    suggested = {dotted(problem.path): problem.suggestion for _, problem in error.located if problem.suggestion}
    assert suggested == SUGGESTED
    assert error.message.splitlines()[0] == f"{len(found)} problems in the configuration:"


def test_a_problem_is_shown_with_its_line_and_a_caret(folder: Path) -> None:
    write(folder, e="model: gpt2\ndecoder: {top_q: 1}\n")
    lines = refusal(load_experiment, "e.yaml").message.splitlines()
    assert lines[0].startswith("e.yaml:2:11: decoder.top_q: ")
    assert lines[1:] == ["    2 | decoder: {top_q: 1}", "      |           ^"]


def test_a_long_line_is_cut_around_the_place(folder: Path) -> None:
    write(folder, e="model: gpt2\ngpus: [" + "0," * 100 + " x]\n")
    shown, caret = refusal(load_experiment, "e.yaml").message.splitlines()[-2:]
    assert len(shown) < 130
    assert shown[caret.index("^")] == "x"


def test_hundreds_of_problems_are_counted_not_all_shown(folder: Path) -> None:
    write(folder, e="model: gpt2\n" + "".join(f"unknown{n}: 1\n" for n in range(250)))
    lines = refusal(load_experiment, "e.yaml").message.splitlines()
    assert lines[0].startswith("250 problems")
    assert lines[-1] == "and 150 more"
