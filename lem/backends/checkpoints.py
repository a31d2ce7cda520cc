"""Checkpoints for engines that are given folders: bring all of one here, and tell which one it is.

Imports torch, transformers and the hub's client.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import constants as hub_constants
from transformers import AutoConfig, AutoModelForCausalLM

from lem.backends.model_sources import MODEL_FAILURES, Source, explained, locate
from lem.backends.refusals import shortened
from lem.backends.weights import WEIGHT_FAILURES, count_embedding_parameters, hash_weights

__all__ = ["OTHER_WEIGHTS", "WEIGHTS", "Identity", "fetch", "identify"]

_logger = logging.getLogger(__name__)

# Copies of weights in other formats, which would be fetched for nothing.
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*", "onnx/*")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", *OTHER_WEIGHTS)


@dataclass(frozen=True)
class Identity:
    """Which weights; None what cannot be told.

    Attributes:
        weights_sha256: as `EngineReport.weights_sha256`.
        parameters, embedding_parameters: of the model as transformers builds it.
    """

    weights_sha256: str | None
    parameters: int | None
    embedding_parameters: int | None


def fetch(
    name: str,
    *,
    marker: str,
    option: str,
    revision: str | None = None,
    token: str | None,
    ignored: Sequence[str] = OTHER_WEIGHTS,
) -> Source:
    """Where a checkpoint lies, all of it on this machine.

    Engines that download for themselves take the token from the environment, which their processes would then carry
    around; given a folder they need none, and the folder says which commit it is.

    Args:
        marker: the file that makes a folder one of these.
        option: the option that named it, for messages.
        ignored: patterns of files that are not fetched; those of weights in other formats are, where there are no
            safetensors.

    Raises:
        EngineError: kind `model`.
        OptionRefused: a revision of a folder.
    """
    source = locate(name, marker=marker, revision=revision, token=token, option=option)
    if source.commit is None:
        return source
    if ignored == OTHER_WEIGHTS and not hub_constants.HF_HUB_OFFLINE:
        with explained(f"{option}: {name}"):
            files = HfApi(token=token).list_repo_files(name, revision=source.commit)
        ignored = OTHER_WEIGHTS if any(file.endswith(".safetensors") for file in files) else ("original/*",)
    with explained(f"{option}: {name}"):
        folder = snapshot_download(name, revision=source.commit, token=token, ignore_patterns=list(ignored))
    return dataclasses.replace(source, folder=Path(folder))


def identify(source: Source, adapter: Source | None = None) -> Identity:
    """Which weights these are, adapters beside the model's.

    Raises:
        EngineError: a file of the weights cannot be read.
    """
    with explained(f"weights of {source.name}", WEIGHT_FAILURES):
        digest = hash_weights(source.folder, None if adapter is None else adapter.folder)
    return Identity(digest, *_count_parameters(source.folder))


def _count_parameters(folder: Path) -> tuple[int | None, int | None]:
    """Parameters and those of embeddings, of the model as transformers builds it, without memory for its weights.

    The engines do not tell, and their own layers differ: fused, padded, quantized. None for a model that this version
    of transformers cannot build, which need not keep another engine from running it.
    """
    try:
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, trust_remote_code=False)
        parameters = int(model.num_parameters())
        embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    except (*MODEL_FAILURES, ImportError) as error:
        _logger.info("transformers cannot count the parameters of %s: %s", folder, shortened(error))
        return None, None
    return parameters, count_embedding_parameters(*embeddings)
