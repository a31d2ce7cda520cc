#!/usr/bin/env python3
"""Create a Llama with random weights and its own tokenizer, so that a measurement needs no download.

    python3 make_demo_model.py FOLDER [--size demo|tiny]

The tokenizer is trained on the texts next to this file, and the weights come from a fixed seed, so the same versions of
torch and transformers create the same model. Its output is nonsense, but its speed is real. A folder that already
contains the complete model is left unchanged. Requires torch, transformers and tokenizers.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

TEXT_DIR = Path(__file__).resolve().parent / "text"
STAMP_NAME = "made.json"
STAMP_VERSION = 1
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")


@dataclass(frozen=True)
class Shape:
    """The dimensions of the model.

    `spread` is the standard deviation of the weights. It is well above the usual 0.02, so that the logits differ enough
    that the order of additions does not change the most likely token.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    positions: int
    spread: float
    seed: int = 20240229


SHAPES = {
    "demo": Shape(1500, 448, 1216, 8, 7, 7, 2048, 0.05),
    "tiny": Shape(1000, 64, 128, 2, 4, 2, 512, 0.25),
}


def main(argv: list[str] | None = None) -> int:
    """Create the model and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the model")
    parser.add_argument("--size", choices=tuple(SHAPES), default="demo", help="demo has 21 M parameters, tiny 0.2 M")
    options = parser.parse_args(argv)
    recipe = describe_recipe(SHAPES[options.size])
    if is_made(options.folder, recipe):
        print(f"{options.folder}: already exists")
        return 0
    if options.folder.exists() and not (options.folder / STAMP_NAME).is_file() and any(options.folder.iterdir()):
        print(f"{options.folder} contains other files; choose an empty or new folder", file=sys.stderr)
        return 2
    parameters = make(options.folder, SHAPES[options.size], recipe)
    print(f"{options.folder}: Llama of {parameters / 1e6:.1f} M parameters with random weights")
    return 0


def describe_recipe(shape: Shape) -> dict[str, object]:
    """Everything the model depends on, as JSON values: the shape, the texts, the versions."""
    texts = {path.name: hash_file(path) for path in sorted(TEXT_DIR.glob("*.txt"))}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    return {"stamp_version": STAMP_VERSION, "shape": asdict(shape), "texts": texts, "versions": versions}


def is_made(folder: Path, recipe: dict[str, object]) -> bool:
    """Whether the folder contains the model of this recipe, with every file unchanged."""
    try:
        stamp = json.loads((folder / STAMP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    files = stamp.get("files", {})
    return stamp.get("recipe") == recipe and all(
        (folder / name).is_file() and hash_file(folder / name) == digest for name, digest in files.items()
    )


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def make(folder: Path, shape: Shape, recipe: dict[str, object]) -> int:
    """Create the model atomically and return its number of parameters."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        vocabulary = save_tokenizer(scratch, shape)
        parameters = save_model(scratch, shape, vocabulary)
        # safetensors writes with mode 0600, but a container or another user must be able to read the model.
        for path in scratch.iterdir():
            path.chmod(0o644)
        scratch.chmod(0o755)
        files = {path.name: hash_file(path) for path in sorted(scratch.iterdir())}
        stamp = json.dumps({"recipe": recipe, "files": files}, indent=1) + "\n"
        (scratch / STAMP_NAME).write_text(stamp, encoding="utf-8")
        (scratch / STAMP_NAME).chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return parameters


def save_tokenizer(folder: Path, shape: Shape) -> int:
    """Save a byte-level BPE tokenizer and return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pad, begin, end = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(TEXT_DIR.glob("*.txt"))], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=begin,
        eos_token=end,
        model_max_length=shape.positions,
    )
    fast.save_pretrained(folder)
    return len(fast)


def save_model(folder: Path, shape: Shape, vocabulary: int) -> int:
    """Save the model and return its number of parameters."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    pad_id, begin_id, end_id = range(len(SPECIAL_TOKENS))
    torch.manual_seed(shape.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            max_position_embeddings=shape.positions,
            initializer_range=shape.spread,
            tie_word_embeddings=False,
            pad_token_id=pad_id,
            bos_token_id=begin_id,
            eos_token_id=end_id,
        )
    )
    model.generation_config = GenerationConfig(bos_token_id=begin_id, eos_token_id=end_id, pad_token_id=pad_id)
    model.save_pretrained(folder)
    return int(model.num_parameters())


if __name__ == "__main__":
    sys.exit(main())
