"""Makes a Llama with random weights where no network is: what it writes means nothing, what it draws is real.

    python -m tests.gpu.models FOLDER SHAPE [--device cuda]

A process of its own, so that no CUDA context is left. The weights are made on the device and saved in bfloat16; the
tokenizer is that of examples/make_demo_model.py, whose ids are the first of a vocabulary as large as that of the models
these shapes are taken from.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.make_demo_model import Shape as TokenizerShape
from examples.make_demo_model import save_tokenizer

STAMP_NAME = "made.json"
TOKENIZER_WORDS, POSITIONS = 1500, 2048


@dataclass(frozen=True)
class LlamaShape:
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    is_tied: bool


SHAPES = {
    # As the config.json of Llama 3.2 1B and Llama 3.1 8B.
    "llama-1b": LlamaShape(128256, 2048, 8192, 16, 32, 8, is_tied=True),
    "llama-8b": LlamaShape(128256, 4096, 14336, 32, 32, 8, is_tied=False),
    # For a rehearsal on a CPU.
    "tiny": LlamaShape(1600, 64, 128, 2, 4, 2, is_tied=True),
}


def main() -> int:
    """0; the folder holds the model afterwards, and the last line of stdout is its stamp."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    folder, shape = options.folder, SHAPES[options.shape]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_tokenizer(folder, TokenizerShape(TOKENIZER_WORDS, 0, 0, 0, 0, 0, POSITIONS, 0.0))
    stamp = {"shape": asdict(shape), "parameters": _save_model(folder, shape, options.device)}
    text = json.dumps(stamp)
    (folder / STAMP_NAME).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def made(folder: Path, name: str) -> int | None:
    """The number of parameters of the model of that shape in the folder; None when it is not there, whole."""
    try:
        stamp = json.loads((folder / STAMP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return int(stamp["parameters"]) if stamp.get("shape") == asdict(SHAPES[name]) else None


def _save_model(folder: Path, shape: LlamaShape, device: str) -> int:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=shape.is_tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(20240229)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    return int(model.num_parameters())


if __name__ == "__main__":
    sys.exit(main())
