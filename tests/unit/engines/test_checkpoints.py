"""A checkpoint is told as far as it can be; what transformers cannot build, another engine may run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import EngineError

pytestmark = [pytest.mark.needs("torch"), pytest.mark.needs("transformers")]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
}


def checkpoint(folder: Path, text: str) -> Any:
    from lem.engines.checkpoints import locate

    (folder / "config.json").write_text(text, encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    return locate(str(folder), marker="config.json", revision=None, token=None, option="model")


def test_parameters_are_counted_without_weights_in_memory(tmp_path: Path) -> None:
    from lem.engines.checkpoints import identify

    found = identify(checkpoint(tmp_path, json.dumps(LLAMA)))
    assert (found.parameters, found.embedding_parameters) == (95_040, 12_800)
    assert found.weights_sha256 is not None


BROKEN = {
    "no JSON": "{",
    "an unknown kind": json.dumps({"model_type": "of no kind that is known"}),
    "a kind that writes no text": json.dumps({"model_type": "vit"}),
    "code of its own": json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "c.C"}}),
    "no heads": json.dumps({**LLAMA, "num_attention_heads": 0}),
    "a size in quotes": json.dumps({**LLAMA, "hidden_size": "64"}),
    "a negative size": json.dumps({**LLAMA, "hidden_size": -4}),
    "an unknown activation": json.dumps({**LLAMA, "hidden_act": "of no kind that is known"}),
    "an unknown type": json.dumps({**LLAMA, "dtype": "of no kind that is known"}),
    "padding outside of the vocabulary": json.dumps({**LLAMA, "pad_token_id": 1000}),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_parameters_that_cannot_be_counted_are_unknown_and_no_error(tmp_path: Path, text: str) -> None:
    from lem.engines.checkpoints import identify

    found = identify(checkpoint(tmp_path, text))
    assert (found.parameters, found.embedding_parameters) == (None, None)
    assert found.weights_sha256 is not None


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_what_cannot_be_loaded_is_an_error_of_the_model_that_would_come_again(tmp_path: Path, text: str) -> None:
    from lem.config.experiment import ExperimentConfig
    from lem.engines.pytorch import load

    source = checkpoint(tmp_path, text)
    experiment = ExperimentConfig.from_dict({"model": source.name, "gpus": [], "fp_precision": "float32"})
    with pytest.raises(EngineError) as caught:
        load(experiment, {})
    assert (caught.value.kind, caught.value.is_permanent) == ("model", True)


def test_an_index_of_weights_that_is_broken_is_an_error_of_the_model(tmp_path: Path) -> None:
    from lem.engines.checkpoints import identify

    source = checkpoint(tmp_path, json.dumps(LLAMA))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [1]}', encoding="utf-8")
    with pytest.raises(EngineError, match="weight_map") as caught:
        identify(source)
    assert (caught.value.kind, caught.value.is_permanent) == ("model", True)


def test_only_what_a_call_is_known_to_raise_is_explained() -> None:
    from lem.engines.checkpoints import WEIGHT_FAILURES, explained

    with pytest.raises(EngineError, match="weights of m: a file"), explained("weights of m", WEIGHT_FAILURES):
        raise OSError("a file")
    with pytest.raises(TypeError), explained("weights of m", WEIGHT_FAILURES):
        raise TypeError("a bug of lem")
