"""Which weights a model has: their files, their hash, their number, the commit of a hub model. Imports no engine."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lem import durable
from lem.durable import sha256_of

__all__ = ["WEIGHT_FAILURES", "commit_of", "count_embedding_parameters", "hash_files", "hash_weights", "weight_files"]

# In the order in which transformers looks for them: whole or in parts, safetensors before pickles.
_WHOLE = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_IN_PARTS = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SEARCH_ORDER = (_WHOLE[0], _IN_PARTS[0], _WHOLE[1], _IN_PARTS[1], *_WHOLE[2:])

# What the functions here raise over files that cannot be read.
WEIGHT_FAILURES = (OSError, ValueError)

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
        return tuple(folder / part for part in sorted(_parts_of(path)))
    return ()


def _parts_of(path: Path) -> set[str]:
    """The names of files in an index of weights.

    Raises:
        OSError, ValueError: it cannot be read, or is no such index.
    """
    document = durable.read_json(path)
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not all(isinstance(part, str) for part in places.values()):
        raise ValueError(f"{path}: expected an object whose weight_map names the file of each weight")
    return set(places.values())


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


def count_embedding_parameters(inputs: Any, outputs: Any) -> int | None:
    """Parameters of the input embedding, and of the output embedding where it is not the same matrix.

    Args:
        inputs, outputs: as `get_input_embeddings` and `get_output_embeddings` of transformers give them.

    Returns:
        None where they are not plain matrices.
    """
    matrices: list[Any] = [getattr(layer, "weight", None) for layer in (inputs, outputs) if layer is not None]
    if not matrices or any(matrix is None for matrix in matrices):
        return None
    return sum(int(matrix.numel()) for matrix in {id(matrix): matrix for matrix in matrices}.values())


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
