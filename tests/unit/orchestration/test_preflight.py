"""What is looked for before the first cycle, and how all that is missing is reported at once."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import UserError
from lem.config.campaign_config import CampaignGridConfig
from lem.orchestration.docker import ContainerError
from lem.orchestration.plan import build_plan
from lem.orchestration.preflight import Findings, foresee, gap_advice
from lem.orchestration.preflight import Problem as Found
from lem.orchestration.resume import RunOptions
from lem.worker.channel import Failure, Problem, Result
from tests.campaign_doubles import ENVIRONMENT, make_campaign

RELATIVE = f"relative paths start at {Path.cwd()}"
DONE = Result("check", engine_reused=False)


def _grid(*models, backends=("pytorch",), **shared):
    shared = {"gpus": [[]], "max_output_tokens": [4], **shared}
    return CampaignGridConfig(backends=backends, models=models, shared=shared)


def _model(folder: Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return str(folder)


def _start(place, *, findings=(DONE,), name="local", prepare_error=None, environment=ENVIRONMENT, **campaign):
    runner = place.runner(make_campaign(place.folder, **campaign), environment=environment)
    executor = place.executor
    executor.name, executor.prepare_error, executor.worker.findings = name, prepare_error, list(findings)
    with pytest.raises(UserError) as caught:
        runner.run()
    assert (caught.value.exit_code, place.requests) == (2, [])
    assert not (place.folder / "state" / "demo" / "campaign_manifest.json").exists()
    return caught.value


def test_everything_that_is_missing_is_one_error_and_nothing_was_run(place, tmp_path):
    grid = _grid(str(tmp_path / "nowhere"), _model(tmp_path / "tiny"), "owner/gone", dataset=["owner/rows"])
    findings = [
        Problem("check", 0, f"model: no such folder: {tmp_path / 'nowhere'}", RELATIVE, is_certain=True),
        Problem("check", 1, "data set owner/rows: not found", "check its name", is_certain=True),
        Problem("check", 2, "model: owner/gone: not found", "check the spelling", is_certain=True),
        Problem("check", 2, "data set owner/rows: not found", "check its name", is_certain=True),
        DONE,
    ]
    error = _start(place, findings=findings, grid=grid)
    asked = [item["model"]["name"] for item in place.executor.worker.checks[0].configs]
    assert asked == [str(tmp_path / "nowhere"), str(tmp_path / "tiny"), "owner/gone"]
    first, *listed = error.message.split("\n  - ")
    assert first == "3 problems, so nothing was run"
    names = [item.config_name for item in build_plan(make_campaign(tmp_path, grid=grid)).given]
    assert [item.split("\n    ") for item in listed] == [
        [
            f"model: no such folder: {tmp_path / 'nowhere'} (1 of 3 configurations: {names[0]})",
            RELATIVE,
        ],
        [f"data set owner/rows: not found (2 of 3 configurations: {names[1]}, {names[2]})", "check its name"],
        [f"model: owner/gone: not found (1 of 3 configurations: {names[2]})", "check the spelling"],
    ]


def test_an_image_without_the_engine_is_named_with_its_configurations(tmp_path):
    grid = _grid("gpt2", image=[None, "own/engine:2"])
    items = build_plan(make_campaign(tmp_path, grid=grid)).given
    (other,) = [item for item in items if item.config.image]
    found = Findings(items)
    without = {**ENVIRONMENT, "transformers": None}
    assert found.look_for_engine("docker", "pytorch", ENVIRONMENT, "pytorch")
    assert not found.look_for_engine("docker", "pytorch", without, other.place)
    (problem,) = found.problems
    assert "in service pytorch with image own/engine:2: transformers is not installed" in problem.message
    assert problem.concerns == f"1 of 2 configurations: {other.config_name}"
    assert "(image)" in problem.hint


@pytest.mark.parametrize(
    ("shape", "is_refused"),
    [
        ({"max_position_embeddings": 512}, True),
        ({"n_positions": 512}, True),
        ({"text_config": {"max_position_embeddings": 512}, "max_position_embeddings": 9999}, True),
        ({"max_position_embeddings": 516}, False),
        ({"max_position_embeddings": 512, "rope_scaling": {"factor": 2.0}}, False),
        ({}, False),
    ],
)
def test_lengths_that_a_model_on_this_host_has_no_positions_for_are_found_without_its_engine(
    tmp_path: Path, shape: dict[str, Any], is_refused: bool
) -> None:
    model = _model(tmp_path / "tiny")
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(shape))
    prompts = {"type": "synthetic", "input_tokens": 512}
    grid = _grid(model, prompts=[prompts], max_input_tokens=[512])
    found = Findings(build_plan(make_campaign(tmp_path, grid=grid)).experiments)
    found.look_here()
    words = "prompts.input_tokens: 512 and max_output_tokens: 4: 516 tokens exceed the 512 positions of the model"
    assert [item.message for item in found.problems] == ([words] if is_refused else [])


def test_one_problem_of_all_configurations_is_said_in_one_line_with_its_own_hint(place):
    error = _start(place, findings=[Problem("check", 0, "model: none: not found", "check it", is_certain=True), DONE])
    assert (error.message, error.hint) == ("model: none: not found", "check it")


def test_no_container_is_started_where_the_host_alone_finds_a_problem(place, tmp_path):
    missing = ContainerError("image a of service pytorch is missing", "pull it", kind="image")
    error = _start(place, name="docker", prepare_error=missing, grid=_grid(str(tmp_path / "nowhere")))
    assert place.executor.worker.opened == 0
    assert error.message.count("\n  - ") == 2
    assert "image a of service pytorch" in error.message


def test_missing_packages_and_folders_are_reported_together(place, tmp_path):
    environment = {**ENVIRONMENT, "torch": None}
    error = _start(place, environment=environment, grid=_grid(str(tmp_path / "nowhere"), "owner/name"))
    assert ("no such folder" in error.message, "torch is not installed" in error.message) == (True, True)
    assert place.executor.worker.checks == []  # it could not look for a model without its packages


@pytest.mark.parametrize(
    ("findings", "words"),
    [
        (
            [Problem("check", 0, "model: none: no route", "", is_certain=False), DONE],
            "does not mean that it is missing",
        ),
        ([], "no answer in time"),
        ([Failure("check", "died", "the engine process crashed", "", False, None, True)], "the engine process crashed"),
    ],
    ids=["hub not reached", "slow hub", "crash"],
)
def test_what_cannot_be_found_out_is_warned_about_and_the_campaign_runs(place, caplog, findings, words):
    runner = place.runner(make_campaign(place.folder))
    place.executor.worker.findings = findings
    with caplog.at_level(logging.WARNING):
        assert runner.run().stopped is None
    assert words in caplog.text
    assert place.statuses() == ["completed"] * 4


def test_folders_alone_need_no_check_in_the_worker(place, tmp_path):
    place.run(grid=_grid(_model(tmp_path / "tiny")), execution={"cycles": 1})
    assert (place.statuses(), place.executor.worker.checks) == (["completed"], [])


def test_configurations_of_other_lengths_are_looked_at_each(place):
    prompts = [{"type": "synthetic", "input_tokens": 4, "sample_size": 2}]
    place.run(grid=_grid("owner/a", prompts=prompts, max_output_tokens=[4, 5]), execution={"cycles": 1})
    assert [item["max_output_tokens"] for item in place.executor.worker.checks[0].configs] == [4, 5]
    place.run(grid=_grid("owner/b", max_output_tokens=[4, 5]), execution={"cycles": 1})  # only known after the load
    assert len(place.executor.worker.checks[0].configs) == 1


def test_a_resume_checks_what_is_left(place, tmp_path):
    grid = _grid("owner/a", "owner/b")
    place.run(grid=grid, execution={"cycles": 1})
    assert len(place.executor.worker.checks[0].configs) == 2
    place.run(grid=grid, execution={"cycles": 1}, options=RunOptions(resume=True))
    assert place.executor.worker.checks == []  # nothing is left
    more = _grid("owner/a", "owner/b", "owner/c")
    place.run(grid=more, execution={"cycles": 1}, options=RunOptions(resume=True))
    assert [item["model"]["name"] for item in place.executor.worker.checks[0].configs] == ["owner/c"]


def test_a_check_before_a_scheduled_start_finds_the_same(place):
    runner = place.runner(make_campaign(place.folder))
    place.executor.worker.findings = [Problem("check", 0, "model: none: not found", "", is_certain=True), DONE]
    with pytest.raises(UserError, match="model: none: not found"):
        runner.check()


def test_each_named_folder_is_looked_for_with_what_it_must_hold(tmp_path):
    (tmp_path / "empty").mkdir()
    shared = {
        "model.tokenizer": ["./tokenizer"],
        "model.adapter": [str(tmp_path / "empty")],
        "pytorch.assisted_generation.model": ["/no/drafter"],
        "dataset": [str(tmp_path / "empty")],
    }
    plan = build_plan(make_campaign(tmp_path, grid=_grid(_model(tmp_path / "tiny"), **shared)))
    findings = Findings(plan.experiments)
    findings.look_here()
    found = [item.message for item in findings.problems]
    assert found[:3] == [
        "model.tokenizer: no such folder: tokenizer",
        f"model.adapter: {tmp_path / 'empty'} has no adapter_config.json",
        "pytorch.assisted_generation.model: no such folder: /no/drafter",
    ]
    assert [str(tmp_path / "empty") in text for text in found[3:]] == [True]


def test_a_dry_run_reports_folders_packages_and_images(tmp_path):
    plan = build_plan(make_campaign(tmp_path, grid=_grid(str(tmp_path / "nowhere"))))
    folder = Found(f"model: no such folder: {tmp_path / 'nowhere'}", RELATIVE)
    assert foresee(plan, "local", "python3") == [folder]  # another Python would have to be started
    tensorrt = build_plan(make_campaign(tmp_path, grid=_grid("owner/name", backends=("tensorrt",), gpus=[["0"]])))
    (package,) = foresee(tensorrt, "local", None)
    assert "tensorrt_llm is not installed" in package.message
    assert "--executor local --python PROGRAM" in package.hint
    compose = replace(plan.campaign.io, compose_file=(str(tmp_path / "none.yml"),))
    in_container = replace(plan, campaign=replace(plan.campaign, io=compose))
    first, *others = foresee(in_container, "docker", None)
    assert first == folder
    assert any("none.yml: no such compose file" in item.message for item in others)


def test_gaps_that_nothing_can_end_early_are_announced_with_shorter_ones(tmp_path):
    def advice(gpu_error, **execution):
        return gap_advice(build_plan(make_campaign(tmp_path, execution=execution)), gpu_error)

    told = advice("no driver", config_gap_seconds=60, cycle_gap_seconds=300)
    assert "3 gaps last their full time, 7m 00s" in told
    assert "--config-gap 10 --cycle-gap 30" in told
    assert advice(None, config_gap_seconds=60, cycle_gap_seconds=300) == told.replace("no driver", "no GPU is used")
    assert "--cycle-gap" not in advice(None, config_gap_seconds=60, cycle_gap_seconds=30)
    assert advice(None, config_gap_seconds=10, cycle_gap_seconds=30) is None
    on_gpu = build_plan(make_campaign(tmp_path, shared={"gpus": [["0"]]}, execution={"cycle_gap_seconds": 300}))
    assert gap_advice(on_gpu, None) is None
    assert "(no driver)" in str(gap_advice(on_gpu, "no driver"))
