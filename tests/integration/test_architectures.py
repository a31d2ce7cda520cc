"""Models of many architectures on the pytorch backend: each answers as the class of transformers itself does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import EngineError
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import TokenRequest
from lem.engines.pytorch import load
from lem.worker.requests import encode_prompts
from lem.worker.shapes import Prompt
from tests.integration.engine_answers import experiment, loaded, outputs, prompts
from tests.tiny_models import KINDS, POSITIONS, make_model

pytestmark = [pytest.mark.needs("torch"), pytest.mark.needs("transformers"), pytest.mark.timeout(600)]

# The others run with `make test-long`.
ALWAYS = ("bloom", "gemma3", "gpt2", "llava", "mamba", "mixtral", "qwen2_5_vl")
# The text model in each model that takes images: a token of text uses the same parameters of both.
TEXT_PARTS = {"gemma3": "gemma3_text", "llava": "llama", "qwen2_5_vl": "qwen2", "qwen2_vl": "qwen2"}
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"


def plain_generate(model: Path, class_name: str, requests: list[TokenRequest]) -> list[tuple[int, ...]]:
    """What `generate` of transformers makes of requests, one at a time."""
    import torch
    import transformers

    loaded_model: Any = getattr(transformers, class_name).from_pretrained(model, dtype=torch.float32)
    found = []
    for request in requests:
        ids = torch.tensor([request.token_ids])
        made = loaded_model.eval().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_output_tokens,
            do_sample=False,
        )
        found.append(tuple(made[0, len(request.token_ids) :].tolist()))
    return found


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.long) for name in KINDS]
)
def test_a_model_of_this_architecture_answers_as_transformers_does(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / name, name)
    with loaded(experiment(model, chat_template="model", pytorch={"batch_size": 2})) as there:
        report = there.report
        assert report.longest_tok == (POSITIONS if KINDS[name].has_positions else None)
        found = outputs(there, prompts())
        config = experiment(model)
        (request,), _ = encode_prompts([Prompt("The sea is wide.")], there, config, TEMPLATE)
        assert there.decode(request.token_ids) == "<user>The sea is wide.<assistant>"
        assert outputs(there, [request])[0]
    assert found == plain_generate(model, report.effective["model_class"], prompts())
    has_counts = None not in (report.model_parameters, report.embedding_parameters, report.active_parameters)
    assert has_counts
    if KINDS[name].has_images:
        assert report.active_parameters < report.model_parameters


@pytest.mark.long
@pytest.mark.parametrize(("name", "text"), TEXT_PARTS.items())
def test_a_token_of_text_uses_the_parameters_of_the_text_model_alone(name: str, text: str, tmp_path: Path) -> None:
    counts = []
    for kind in (name, text):
        with loaded(experiment(make_model(tmp_path / kind, kind))) as there:
            counts.append((there.report.active_parameters, there.report.embedding_parameters))
    assert counts[0] == counts[1]


def test_a_model_that_only_encodes_is_refused_as_before(tmp_path: Path) -> None:
    make_model(tmp_path / "llama", "llama")
    (tmp_path / "llama/config.json").write_text('{"model_type": "t5"}')
    config: ExperimentConfig = experiment(tmp_path / "llama")
    with pytest.raises(EngineError, match="AutoModelForCausalLM") as caught:
        load(config, {})
    assert caught.value.is_permanent


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "vllm", "max_input_tokens": 500}, "max_input_tokens: 500 and max_output_tokens: 16: 516 tokens"),
        ({"backend": "vllm", "vllm": {"max_model_len": 513}}, "vllm.max_model_len: 513: 513 tokens"),
        (
            {"prompts": {"type": "synthetic", "input_tokens": 500}, "max_input_tokens": 500},
            "prompts.input_tokens: 500 and max_output_tokens: 16: 516 tokens",
        ),
        # Whether prompts of other sources are too long shows once they are tokenized.
        ({"max_input_tokens": 500}, None),
        ({"backend": "vllm", "max_input_tokens": 496}, None),
        ({"backend": "vllm", "vllm": {"extra": {"hf_overrides": {"max_position_embeddings": 1024}}}}, None),
    ],
)
def test_lengths_that_the_model_has_no_positions_for_are_found_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str | None
) -> None:
    from lem.engines.checkpoints import find_problems

    model = make_model(tmp_path / "llama", "llama")
    found = [error.message for error in find_problems(experiment(model, **options), None)]
    assert found == ([] if words is None else [f"{words} exceed the 512 positions of the model"])
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    if "vllm" in options:
        assert not list(find_problems(experiment(model, **options), None))
