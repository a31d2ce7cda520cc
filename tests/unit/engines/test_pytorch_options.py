"""What an experiment asks of `generate`: everything named, nothing left to what a model brings along."""

from __future__ import annotations

from typing import Any

import pytest

from lem.config.experiment import ExperimentConfig
from lem.engines.pytorch.options import (
    EngineFacts,
    SpecialTokens,
    assistant_settings,
    batch_rules,
    compiles_steps,
    generation_settings,
    idle_options,
    section_of,
)

TOKENS = SpecialTokens(pad_id=0, end_ids=(2, 7))
GREEDY = {"preset": "deterministic"}


def experiment(**options: Any) -> ExperimentConfig:
    return ExperimentConfig.from_dict({"model": "m", **options})


def settings(device: str = "cpu", **options: Any) -> dict[str, Any]:
    return generation_settings(experiment(**options), TOKENS, device)


def test_sampling_values_are_those_of_the_decoder() -> None:
    decoder = {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.2}
    found = settings(decoder=decoder)
    assert found["do_sample"] is True
    # top_k 0 is given as 0: left out, it would be transformers' 50.
    assert {name: found[name] for name in decoder} == decoder


@pytest.mark.parametrize(
    "decoder", [GREEDY, {"temperature": 0}, {"do_sample": False}, {"preset": "standard", "temperature": 0}]
)
def test_greedy_decoding_leaves_sampling_values_out(decoder: dict[str, Any]) -> None:
    found = settings(decoder=decoder, pytorch={"min_p": 0.1})
    assert found["do_sample"] is False
    assert not {"temperature", "top_k", "top_p", "min_p"} & set(found)


def test_every_end_of_the_model_ends_a_sequence_unless_it_is_ignored() -> None:
    assert settings()["eos_token_id"] == [2, 7]
    assert "eos_token_id" not in settings(ignore_eos=True)


def test_a_model_without_an_end_has_none() -> None:
    assert "eos_token_id" not in generation_settings(experiment(), SpecialTokens(0, ()), "cpu")


def test_lengths_are_left_to_the_requests() -> None:
    assert not [name for name in settings(max_output_tokens=9, min_output_tokens=3) if "max_" in name or "min_" in name]


def test_beams_are_passed_while_they_are_enabled() -> None:
    beams = {"enabled": True, "num_beams": 4, "length_penalty": 0.5, "early_stopping": "never"}
    found = settings(pytorch={"beam_search": beams})
    assert (found["num_beams"], found["length_penalty"], found["early_stopping"]) == (4, 0.5, "never")
    assert "num_beams" not in settings()


def test_rows_of_a_beam_search_share_one_bound_and_others_need_not() -> None:
    beams = {"beam_search": {"enabled": True, "num_beams": 2}}
    assert batch_rules(experiment(pytorch=beams)).has_one_bound
    assert not batch_rules(experiment()).has_one_bound


def test_tokens_are_looked_up_in_the_prompt_without_an_assistant() -> None:
    assert settings(pytorch={"assisted_generation": {"num_tokens": 5}})["prompt_lookup_num_tokens"] == 5
    with_model = {"assisted_generation": {"num_tokens": 5, "model": "small"}}
    assert "prompt_lookup_num_tokens" not in settings(pytorch=with_model)


def test_an_assistant_drafts_exactly_the_tokens_asked_for() -> None:
    section = section_of(experiment(pytorch={"assisted_generation": {"num_tokens": 5, "model": "small"}}))
    assert assistant_settings(section) == {
        "num_assistant_tokens": 5,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }


def test_an_assistant_is_left_to_transformers_without_a_number() -> None:
    assert assistant_settings(section_of(experiment(pytorch={"assisted_generation": {"model": "small"}}))) == {}


def test_extra_arguments_go_to_whoever_reads_them() -> None:
    # A list stays a list: transformers takes no tuple for one.
    extra = {"suppress_tokens": [5], "assistant_confidence_threshold": 0.2}
    options = {"assisted_generation": {"model": "small"}, "extra": extra}
    assert settings(pytorch=options)["suppress_tokens"] == [5]
    assert "assistant_confidence_threshold" not in settings(pytorch=options)
    assert assistant_settings(section_of(experiment(pytorch=options))) == {"assistant_confidence_threshold": 0.2}


def test_transformers_does_not_compile_beside_torch_compile() -> None:
    assert settings(pytorch={"torch_compile": "default"})["disable_compile"] is True
    assert "disable_compile" not in settings()


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_transformers_compiles_what_is_recorded_as_cuda_graphs(mode: str) -> None:
    options = {"torch_compile": mode, "cache_implementation": "static"}
    assert "disable_compile" not in settings("cuda", pytorch=options)
    assert compiles_steps(section_of(experiment(pytorch=options)), "cuda")
    assert not compiles_steps(section_of(experiment(pytorch=options)), "cpu")
    assert not compiles_steps(section_of(experiment(pytorch={"torch_compile": "default"})), "cuda")


def test_min_p_under_greedy_decoding_is_told() -> None:
    assert idle_options(experiment(decoder=GREEDY, pytorch={"min_p": 0.1})) != ()
    assert idle_options(experiment(pytorch={"min_p": 0.1})) == ()
    assert idle_options(experiment(decoder=GREEDY)) == ()


def test_an_experiment_without_a_section_has_the_defaults() -> None:
    assert section_of(experiment()).batch_size == 1


def test_an_experiment_of_another_backend_is_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match="vllm"):
        section_of(experiment(backend="vllm"))


@pytest.mark.parametrize(("version", "release"), [("5.23.0", (5, 23)), ("4.57.1", (4, 57)), ("5.24.0.dev0", (5, 24))])
def test_the_release_of_transformers_is_read(version: str, release: tuple[int, int]) -> None:
    assert EngineFacts({"transformers": version, "torch": "2.13.0"}, "cpu").release == release
