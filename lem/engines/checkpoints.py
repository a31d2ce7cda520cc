"""Models on disk and on the hub: sources, revisions, weights and their hashes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from lem.base import durable
from lem.base.durable import sha256_of
from lem.base.errors import EngineError, OptionRefused
from lem.engines.common import shortened

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


# A field of another type than declared; older versions of the hub's client check none.
_StrictError: type[Exception] = getattr(hub_errors, "StrictDataclassError", ValueError)

# What transformers and its helpers raise over a model that is not there, not whole, or not known. A configuration is
# read by the code of its model, and each of these was seen with one (transformers 5.23): no heads divide by zero,
# padding outside of the vocabulary fails an assertion, an unknown name of an activation is a KeyError.
MODEL_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    _StrictError,
)
_UNREACHABLE = (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Source:
    """A model as transformers is to load it.

    Attributes:
        name: what `from_pretrained` takes.
        folder: the folder with its files, in the hub's cache or the user's own.
        commit: of a model of a hub; None for the user's own folder.
    """

    name: str
    folder: Path
    commit: str | None


def locate(name: str, *, marker: str, revision: str | None, token: str | None, option: str) -> Source:
    """Where the model `name` lies; a model of a hub is fetched as far as its `marker` file.

    Args:
        marker: the file that makes a folder a model: `config.json`, `adapter_config.json`.
        option: the option that named it, for messages.

    Raises:
        EngineError: kind `model`, no such folder, no such model, or a folder that is none.
        OptionRefused: a revision of a folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / marker).is_file():
            hint = "name the folder that `save_pretrained` wrote, or a model of a hub"
            raise _no_model(f"{option}: {folder} has no {marker}", hint)
        if revision is not None:
            raise OptionRefused(f"model.revision: {revision}: {folder} is a folder, which has no revisions")
        return Source(str(folder), folder, None)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise _no_model(f"{option}: there is no folder {folder}", f"relative paths start at {Path.cwd()}")
    with explained(f"{option}: {name}"):
        path = cached_file(name, marker, revision=revision, token=token)
    if path is None:
        raise _no_model(f"{option}: {name} has no {marker}", "name a model that transformers can load")
    return Source(name, Path(path).parent, commit_of(Path(path).parent))


@contextmanager
def explained(what: str, failures: tuple[type[Exception], ...] = MODEL_FAILURES) -> Iterator[None]:
    """Say what a failure of transformers to load something means, and whether it would come again.

    The block holds one call and no code of lem beside it: a bug there would be taken for a fault of the model.

    Args:
        failures: what the call raises, beside ImportError and MemoryError.

    Raises:
        EngineError: kind `model` or `out_of_memory`.
    """
    raised: tuple[type[Exception], ...] = (*failures, MemoryError)
    try:
        yield
    except ImportError as error:
        raise _no_model(f"{what}: {shortened(error)}", "install the package that it names") from error
    except raised as error:
        if is_out_of_memory(error):
            raise EngineError(
                f"{what}: out of memory while loading: {shortened(error)}",
                "use a smaller model, a lower fp_precision, quantization, or a device with more memory",
                kind="out_of_memory",
                is_permanent=True,
            ) from error
        raise _explain(what, error) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether device or host ran out of memory; the allocator of the CPU says so in words alone."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _explain(what: str, error: BaseException) -> EngineError:
    causes = tuple(_chain(error))
    text = str(error)
    is_permanent = True
    if any(isinstance(cause, hub_errors.GatedRepoError) for cause in causes):
        hint = "set HF_TOKEN to a token of an account that was given access"
    elif any(isinstance(cause, hub_errors.RevisionNotFoundError) for cause in causes):
        hint = "check model.revision"
    elif any(isinstance(cause, hub_errors.RepositoryNotFoundError) for cause in causes):
        hint = f"check the spelling; relative folders start at {Path.cwd()}; a private model needs HF_TOKEN"
    elif any(isinstance(cause, _UNREACHABLE) for cause in causes) or "couldn't connect" in text:
        # A network that is down may be up for the retry; an offline mode that is set stays set.
        is_permanent = bool(hub_constants.HF_HUB_OFFLINE)
        where = "offline mode is set (HF_HUB_OFFLINE)" if is_permanent else "the hub cannot be reached"
        hint = (
            f"it is no folder under {Path.cwd()} and not in the hub's cache, and {where}: "
            "name a folder that has it, or fetch it beforehand"
        )
    elif "trust_remote_code" in text:
        hint = "set model.trust_remote_code: true if you trust the code that the model brings along"
    else:
        hint = "is it a causal language model, whole, of a kind that this version of transformers knows?"
    return EngineError(f"{what}: {shortened(error)}", hint, kind="model", is_permanent=is_permanent)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _no_model(message: str, hint: str) -> EngineError:
    return EngineError(message, hint, kind="model", is_permanent=True)


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
