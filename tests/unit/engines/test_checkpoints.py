"""Checkpoints are identified as far as possible; the hash of weights changes with each byte and with nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lem.base.errors import EngineError
from lem.config.experiment import ExperimentConfig
from lem.engines.named import NamedModel
from lem.engines.pytorch import load
from tests.needs import Late

checkpoints: Any = Late("lem.engines.checkpoints")

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
    (folder / "config.json").write_text(text, encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    return checkpoints.locate(NamedModel("model", str(folder), "config.json"), None)


def test_parameters_are_counted_without_weights_in_memory(tmp_path: Path) -> None:
    found = checkpoints.identify(checkpoint(tmp_path, json.dumps(LLAMA)))
    assert (found.model_parameters, found.embedding_parameters) == (95_040, 12_800)
    assert found.active_parameters == 95_040
    assert found.weights_sha256 is not None


SMALL = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 4}
# Of each layer: the parameters of an expert (three matrices of 8 x 16), experts, and those that a token uses.
MIXTURES = {
    "mixtral": ({"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, 4 - 2),
    "qwen2_moe": (
        {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 4, "num_key_value_heads": 2},
        2,
    ),
    "granitemoe": ({"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 1}, 7),
    "deepseek_v3": (
        {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 1, "first_k_dense_replace": 1},
        3,
    ),
    "llama": ({}, 0),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_of_a_mixture_of_experts_those_count_that_a_token_uses(kind: str, tmp_path: Path) -> None:
    options, unused = MIXTURES[kind]
    found = checkpoints.identify(checkpoint(tmp_path, json.dumps({"model_type": kind, **SMALL, **options})))
    assert found.model_parameters is not None
    assert found.active_parameters is not None
    layers = 1 if kind == "deepseek_v3" else 2
    assert found.model_parameters - found.active_parameters == layers * unused * 3 * 8 * 16


@pytest.mark.parametrize(
    "shape",
    [
        {"model_type": "deepseek_v2", "n_routed_experts": 4, "num_experts_per_tok": None},
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 8},
        {"model_type": "doge", "num_experts": 4, "num_experts_per_tok": 2},  # experts that are rows of an embedding
    ],
)
def test_experts_that_cannot_be_counted_leave_the_active_parameters_unknown(shape: Any, tmp_path: Path) -> None:
    found = checkpoints.identify(checkpoint(tmp_path, json.dumps({**SMALL, **shape})))
    assert (found.model_parameters or 0) > 0
    assert found.active_parameters is None


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
def test_a_broken_model_has_unknown_parameters_and_does_not_load(tmp_path: Path, text: str) -> None:
    source = checkpoint(tmp_path, text)
    found = checkpoints.identify(source)
    assert (found.model_parameters, found.embedding_parameters) == (None, None)
    assert found.weights_sha256 is not None
    experiment = ExperimentConfig.from_dict({"model": source.name, "gpus": [], "fp_precision": "float32"})
    with pytest.raises(EngineError) as caught:
        load(experiment, {})
    assert (caught.value.kind, caught.value.is_permanent) == ("model", True)


def test_only_what_a_call_is_known_to_raise_is_explained() -> None:
    with (
        pytest.raises(EngineError, match="weights of m: a file"),
        checkpoints.explained("weights of m", (OSError, ValueError)),
    ):
        raise OSError("a file")
    with pytest.raises(TypeError), checkpoints.explained("weights of m", (OSError, ValueError)):
        raise TypeError("a bug of lem")


# Weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def source(folder: Path) -> Any:
    return checkpoints.Source(folder.name, folder, None)


def write(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def index_of(*parts: str) -> bytes:
    return json.dumps({"weight_map": {f"layer{number}": part for number, part in enumerate(parts)}}).encode()


def test_weights_are_searched_for_as_transformers_does(tmp_path: Path) -> None:
    assert (checkpoints.weight_files(tmp_path), checkpoints.hash_weights(source(tmp_path))) == ((), None)
    write(tmp_path, pytorch_model__bin=b"old", model__safetensors=b"new")
    (tmp_path / "model.safetensors.index.json").write_bytes(index_of("part-1"))
    assert checkpoints.weight_files(tmp_path) == (tmp_path / "model.safetensors",)


def test_weights_in_parts_are_those_of_the_index_and_no_others(tmp_path: Path) -> None:
    write(tmp_path, **{"part-2": b"2", "part-1": b"1", "stray.safetensors": b"x"})
    (tmp_path / "model.safetensors.index.json").write_bytes(index_of("part-2", "part-1", "part-2"))
    assert checkpoints.weight_files(tmp_path) == (tmp_path / "part-1", tmp_path / "part-2")


@pytest.mark.parametrize(
    "text", ["{", "[1]", "{}", '{"weight_map": ["part-1"]}', '{"weight_map": {"layer0": 1}}', "[" * 100_000]
)
def test_an_index_of_another_shape_is_an_error_of_the_model(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(EngineError, match=r"weight_map|Expecting|nested") as caught:
        checkpoints.hash_weights(source(tmp_path))
    assert (caught.value.kind, caught.value.is_permanent) == ("model", True)


@pytest.mark.parametrize(
    ("inputs", "outputs", "count"),
    [((2, 3), None, 6), ((2, 3), (4, 5), 26), ((2, 3), "the same", 6), (None, None, None), ((2, 3), "packed", None)],
)
def test_parameters_of_embeddings_are_counted_where_they_are_matrices(inputs: Any, outputs: Any, count: Any) -> None:
    first = None if inputs is None else layer(*inputs)
    second = first if outputs == "the same" else SimpleNamespace() if outputs == "packed" else None
    if isinstance(outputs, tuple):
        second = layer(*outputs)
    model = SimpleNamespace(get_input_embeddings=lambda: first, get_output_embeddings=lambda: second)
    assert checkpoints.count_embedding_parameters(model) == count


def layer(rows: int, columns: int) -> Any:
    return SimpleNamespace(weight=SimpleNamespace(numel=lambda: rows * columns))


def test_the_hash_is_over_lines_of_hash_and_name_also_of_an_adapter(tmp_path: Path) -> None:
    model = source(write(tmp_path / "model", model__safetensors=b"model"))
    adapter = source(write(tmp_path / "adapter", adapter_model__safetensors=b"adapter"))
    # What `sha256sum adapter/* *.safetensors | sha256sum` prints.
    lines = [f"{hashlib.sha256(name).hexdigest()}  " for name in (b"adapter", b"model")]
    both = f"{lines[0]}adapter/adapter_model.safetensors\n{lines[1]}model.safetensors\n"
    assert checkpoints.hash_weights(model, adapter) == hashlib.sha256(both.encode()).hexdigest()
    assert checkpoints.hash_weights(model) == hashlib.sha256(f"{lines[1]}model.safetensors\n".encode()).hexdigest()


def test_one_changed_byte_changes_the_hash_and_the_folder_does_not(tmp_path: Path) -> None:
    contents = {"here": b"0" * 5_000_000, "there": b"0" * 5_000_000, "other": b"0" * 4_999_999 + b"1"}
    folders = [write(tmp_path / name, model__safetensors=content) for name, content in contents.items()]
    here, there, other = (checkpoints.hash_weights(source(folder)) for folder in folders)
    assert here == there != other


def test_a_file_that_changed_since_it_was_hashed_is_read_again(tmp_path: Path) -> None:
    first = checkpoints.hash_weights(source(write(tmp_path, model__safetensors=b"first")))
    (write(tmp_path, other=b"other") / "other").replace(tmp_path / "model.safetensors")
    assert checkpoints.hash_weights(source(tmp_path)) != first


def test_a_large_file_of_the_hubs_cache_is_taken_at_the_name_of_its_blob(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    blobs = write(tmp_path / "blobs", **{digest: b"weights"})
    snapshot = write(tmp_path / "snapshots" / COMMIT)
    (snapshot / "model.safetensors").symlink_to(blobs / digest)
    expected = checkpoints.hash_weights(source(write(tmp_path / "plain", model__safetensors=b"weights")))
    assert checkpoints.hash_weights(source(snapshot)) == expected
    (blobs / digest).write_bytes(b"not read")
    assert checkpoints.hash_weights(source(snapshot)) == expected


def test_a_link_elsewhere_is_read(tmp_path: Path) -> None:
    # A name like a hash outside a cache of the hub proves nothing.
    name = "0" * 64
    write(tmp_path / "elsewhere", **{name: b"content"})
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "elsewhere" / name)
    plain = write(tmp_path / "plain", model__safetensors=b"content")
    assert checkpoints.hash_weights(source(tmp_path)) == checkpoints.hash_weights(source(plain))


@pytest.mark.parametrize(
    ("folder", "commit"),
    [
        (Path("/cache/models--a--b/snapshots") / COMMIT, COMMIT),
        (Path("/home/me") / COMMIT, None),
        (Path("/cache/models--a--b/snapshots/main"), None),
    ],
)
def test_the_commit_is_the_name_of_a_snapshot(folder: Path, commit: str | None) -> None:
    assert checkpoints.commit_of(folder) == commit
