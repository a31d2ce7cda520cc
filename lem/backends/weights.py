"""Which weights a model has: their files, their hash, their number, the commit of a hub model. Imports no engine."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lem.durable import sha256_of

__all__ = ["commit_of", "count_embedding_parameters", "hash_files", "hash_weights", "weight_files"]

# In the order in which transformers looks for them: whole or in parts, safetensors before pickles.
_WHOLE = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_IN_PARTS = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SEARCH_ORDER = (_WHOLE[0], _IN_PARTS[0], _WHOLE[1], _IN_PARTS[1], *_WHOLE[2:])

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files transformers reads the weights from, by name; () when the folder has none that is known.

    Raises:
        OSError, ValueError: the index of weights in parts cannot be read.
    """
    for name in _SEARCH_ORDER:
        path = folder / name
        if not path.is_file():
            continue
        if name in _WHOLE:
            return (path,)
        parts = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        return tuple(folder / part for part in sorted(set(parts)))
    return ()


def hash_weights(folder: Path, adapter: Path | None = None) -> str | None:
    """The hash of a model's weights, an adapter's beside them; None when the folders have none that are known.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    names = {path: path.name for path in weight_files(folder)}
    if adapter is not None:
        names |= {path: f"adapter/{path.name}" for path in weight_files(adapter)}
    return hash_files(names)


def hash_files(names: Mapping[Path, str]) -> str | None:
    """SHA-256 over a line `<sha256 of the file>  <name>` for each file in name order; None for no files.

    The whole of every file is read, about a second a GB from a warm page cache, which a load leaves behind, and once
    a process. Large files in the hub's cache are not read: there a file is a link to a blob named by its SHA-256.

    Raises:
        OSError: a file cannot be read.
    """
    if not names:
        return None
    digest = hashlib.sha256()
    for path, name in sorted(names.items(), key=lambda item: item[1]):
        digest.update(f"{_hash_file(path)}  {name}\n".encode())
    return digest.hexdigest()


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache (`…/snapshots/<commit>`); None for any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if is_snapshot else None


def count_embedding_parameters(model: Any) -> int:
    """Parameters of the input embedding, and of the output embedding where it is not the same matrix.

    Args:
        model: as transformers builds it.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    count = int(inputs.weight.numel())
    if outputs is not None and outputs.weight is not inputs.weight:
        count += int(outputs.weight.numel())
    return count


def _hash_file(path: Path) -> str:
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    found = blob.stat()
    return _read_hash(blob, found.st_size, found.st_mtime_ns, found.st_ino)


@functools.lru_cache(maxsize=4096)
def _read_hash(path: Path, size: int, mtime_ns: int, inode: int) -> str:  # noqa: ARG001
    """Read once a process: every cycle loads the same weights again."""
    return sha256_of(path)
