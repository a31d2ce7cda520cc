"""Models of several architectures on a real vLLM: they answer as transformers does, and their lengths are checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lem.base.errors import OptionRefused
from lem.engines.vllm import load
from lem.worker.requests import encode_prompts
from lem.worker.shapes import Prompt
from tests.integration.engine_answers import loaded, outputs, prompts
from tests.integration.engine_answers import vllm_experiment as experiment
from tests.integration.test_architectures import TEMPLATE, plain_generate
from tests.tiny_models import POSITIONS, make_model

pytestmark = [pytest.mark.needs("vllm"), pytest.mark.timeout(600)]

# The class of transformers for each; the first is always run, the others by `make test-long`.
CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "bloom": "BloomForCausalLM",
    "falcon": "FalconForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "granite": "GraniteForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "opt": "OPTForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}


@pytest.fixture(autouse=True)
def in_process() -> Iterator[None]:
    """The engine in this process, where it loads in seconds; and no more memory than it needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name != "qwen3" else []) for name in CLASSES]
)
def test_a_model_of_this_architecture_answers_as_transformers_does(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / name, name)
    config = experiment(model)
    expected = plain_generate(model, CLASSES[name], prompts())  # before vLLM changes some of these classes
    with loaded(config) as there:
        report = there.report
        assert report.longest_tok == config.max_input_tokens + config.max_output_tokens
        assert report.active_parameters is not None
        found = outputs(there, prompts())
        (request,), _ = encode_prompts([Prompt("The sea is wide.")], there, config, TEMPLATE)
        assert there.decode(request.token_ids) == "<user>The sea is wide.<assistant>"
        ids = there.encode("The sea is wide.")
        assert there.encode("<s>The sea is wide.") == ids == [1, *there.encode("The sea is wide.", is_whole=False)]
    assert found == expected


def test_lengths_beyond_the_positions_are_refused_by_their_names_before_the_load(tmp_path: Path) -> None:
    model = make_model(tmp_path / "llama", "llama")
    with pytest.raises(OptionRefused) as caught:
        load(experiment(model, max_input_tokens=POSITIONS, max_output_tokens=16), {})
    assert caught.value.message == (
        "max_input_tokens: 512 and max_output_tokens: 16: 528 tokens exceed the 512 positions of the model"
    )
    with pytest.raises(OptionRefused, match=r"vllm\.max_model_len: 600: 600 tokens exceed"):
        load(experiment(model, {"max_model_len": 600}), {})
