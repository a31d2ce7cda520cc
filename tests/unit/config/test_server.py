"""The options of the server backend: its forms, its options as axes, and what a dialect cannot honour."""

from __future__ import annotations

from typing import Any

import pytest

from lem.config import rules
from lem.config.campaign_config import CampaignGridConfig
from lem.config.dialects import DIALECTS
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import ConfigProblems, dotted
from lem.orchestration.grid import expand_campaign_grid, validate_campaign_grid

COMMAND = ["vllm", "serve", "{model}", "--port", "{port}"]
GREEDY = {"decoder": {"preset": "deterministic"}}


def served(server: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    section = {"engine": "vllm", "command": COMMAND} if server is None else server
    return {"model": "gpt2", "backend": "server", "server": section, **options}


def problems(tree: dict[str, Any]) -> list[str]:
    try:
        ExperimentConfig.from_dict(tree)
    except ConfigProblems as error:
        return [dotted(problem.path) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    "server",
    [
        {"command": COMMAND},
        {"command": COMMAND, "service": "vllm"},
        {"service": "llamacpp"},
        {"service": "llamacpp", "options": {"parallel": 4}, "env": {"A": "b", "N": 1}},
        {"url": "http://127.0.0.1:8000"},
        {"url": "http://127.0.0.1:8000/v1"},
        {"url": "https://models.example/v1"},
    ],
)
def test_a_server_has_one_form(server: dict[str, Any]) -> None:
    assert problems(served(server, **GREEDY)) == []


@pytest.mark.parametrize(
    ("server", "place"),
    [
        ({}, "server"),
        ({"engine": "vllm"}, "server"),
        ({"url": "http://h", "command": COMMAND}, "server.command"),
        ({"url": "http://h", "service": "vllm"}, "server.service"),
        ({"url": "http://h", "options": {"max_num_seqs": 8}}, "server.options"),
        ({"command": ["vllm", "serve", "{model}"]}, "server.command"),
        ({"command": [*COMMAND, "--api-key", "s"]}, "server.command"),
        ({"command": []}, "server.command"),
        ({"url": "http://h?a=b"}, "server.url"),
        ({"url": "http://user:word@h"}, "server.url"),
        ({"command": COMMAND, "options": {"port": 8000}}, "server.options.port"),
        ({"command": COMMAND, "options": {"api_key": "s"}}, "server.options.api_key"),
        ({"command": COMMAND, "options": {"--seed": 1}}, "server.options.--seed"),
        ({"command": COMMAND, "options": {"max_num_seqs": 1, "max-num-seqs": 2}}, "server.options.max-num-seqs"),
        ({"command": COMMAND, "env": {"A B": "c"}}, "server.env.A B"),
        ({"command": COMMAND, "env": {"CUDA_VISIBLE_DEVICES": "1"}}, "server.env.CUDA_VISIBLE_DEVICES"),
        ({"command": COMMAND, "request": {"temperature": 0}}, "server.request.temperature"),
        ({"command": COMMAND, "request": {"n": 2}}, "server.request.n"),
        ({"command": COMMAND, "ready_path": "health"}, "server.ready_path"),
    ],
)
def test_what_a_server_cannot_be_is_refused_at_its_place(server: dict[str, Any], place: str) -> None:
    assert problems(served(server, **GREEDY)) == [place]


# What each server honours by its documentation, of what goes beyond the API of OpenAI.
HONOURED = {
    "ignore_eos": {"vllm", "llamacpp", "sglang", "tensorrt"},
    "min_output_tokens": {"vllm", "sglang", "tensorrt"},
    "random_seed": {"openai", "vllm", "llamacpp", "tensorrt", "tgi", "ollama"},
    "decoder.top_k": {"vllm", "llamacpp", "sglang", "tensorrt"},
    "decoder.repetition_penalty": {"vllm", "llamacpp", "sglang", "tensorrt"},
}
WITH: dict[str, dict[str, Any]] = {
    "ignore_eos": {"ignore_eos": True, **GREEDY},
    "min_output_tokens": {"min_output_tokens": 4, **GREEDY},
    "random_seed": {"random_seed": 42, "decoder": {"top_k": 0}},  # the default, but written
    "decoder.top_k": {"random_seed": None, "decoder": {"top_k": 50}},
    "decoder.repetition_penalty": {"decoder": {"preset": "deterministic", "repetition_penalty": 1.1}},
}


@pytest.mark.parametrize("engine", DIALECTS)
@pytest.mark.parametrize("option", HONOURED)
def test_what_a_server_does_not_honour_is_refused(engine: str, option: str) -> None:
    found = problems(served({"engine": engine, "url": "http://h"}, **WITH[option]))
    assert found == ([] if engine in HONOURED[option] else [option])


@pytest.mark.parametrize("engine", DIALECTS)
def test_defaults_that_a_server_does_not_honour_are_left_out(engine: str) -> None:
    traffic = {"enabled": True, "target_qps": 4}
    config = ExperimentConfig.from_dict(served({"engine": engine, "command": COMMAND}, traffic_simulation=traffic))
    assert config.decoder.top_k == (50 if engine in HONOURED["decoder.top_k"] else 0)
    assert config.random_seed == (42 if engine in HONOURED["random_seed"] else None)
    # Arrivals are those of the other configurations.
    assert (config.traffic_simulation.seed if config.random_seed is None else config.random_seed) == 42
    assert ExperimentConfig.from_dict(config.to_dict()) == config  # as a worker gets it


def test_a_preset_is_written_by_the_user() -> None:
    creative = {"decoder": {"preset": "creative"}}
    assert problems(served({"url": "http://h"}, **creative)) == ["decoder.repetition_penalty"]


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"fp_precision": "bfloat16"}, "fp_precision"),
        ({"model": {"name": "gpt2", "revision": "main"}}, "model.revision"),
        ({"model": {"name": "gpt2", "adapter": "a/b"}}, "model.adapter"),
    ],
)
def test_what_the_command_of_a_server_decides_is_refused_elsewhere(options: dict[str, Any], place: str) -> None:
    assert problems({**served(**GREEDY), **options}) == [place]


def test_the_chat_api_has_the_template_of_the_server() -> None:
    chat = {"engine": "vllm", "url": "http://h", "api": "chat"}
    assert ExperimentConfig.from_dict(served(chat, **GREEDY)).chat_template == "model"
    assert problems(served(chat, chat_template="model", **GREEDY)) == []
    for template in ("none", "t.jinja"):
        assert problems(served(chat, chat_template=template, **GREEDY)) == ["chat_template"]


def test_streaming_has_no_effect_on_a_server_and_is_noted() -> None:
    config = ExperimentConfig.from_dict(served(streaming=True, **GREEDY))
    assert [dotted(found.path) for found in rules.warnings(config)] == ["streaming"]
    assert config.most_at_once(32) == 32


def test_options_of_a_server_are_axes_that_need_a_restart() -> None:
    by_override = CampaignGridConfig(
        backends=("server",),
        shared={"max_output_tokens": [8, 16]},
        backend_overrides={"server": {"engine": "vllm", "command": [COMMAND], "options.max_num_seqs": [2, 4]}},
    )
    shared = {"server.options.max_num_seqs": [2, 4], "server.engine": ["vllm"], "server.command": [COMMAND]}
    for grid in (by_override, CampaignGridConfig(backends=("server",), shared=shared)):
        found = expand_campaign_grid(grid, {"model": "gpt2", **GREEDY})
        assert not validate_campaign_grid(found).filtered_configs
        configs = [ExperimentConfig.from_dict(one) for one in found]
        widths = [config.width for config in configs]
        assert widths == sorted(widths, key=lambda width: width or 0)
        assert {*widths} == {2, 4}
        assert len({config.engine_key() for config in configs}) == 2


def test_the_api_is_an_axis_without_a_restart_and_the_path_of_readiness_changes_no_number() -> None:
    base, chat = (
        ExperimentConfig.from_dict(served({"url": "http://h", "api": api}, **GREEDY)) for api in ("completions", "chat")
    )
    assert base.engine_key() == chat.engine_key()
    assert base.identity() != chat.identity()
    other = ExperimentConfig.from_dict(served({"url": "http://h", "ready_path": "/x"}, **GREEDY))
    assert other.identity() == base.identity()


@pytest.mark.parametrize("name", ["max_num_seqs", "max-num-seqs"])
def test_a_width_beyond_the_prompts_is_noted(name: str) -> None:
    config = ExperimentConfig.from_dict(served({"engine": "vllm", "command": COMMAND, "options": {name: 64}}, **GREEDY))
    found = rules.width_warning(config, 8)
    assert found is not None
    assert dotted(found.path) == f"server.options.{name}"
    assert rules.width_warning(config, 64) is None
