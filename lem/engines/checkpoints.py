"""Models in folders and on the hub: their weights, and what keeps one from loading. Imports torch and transformers."""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file

from lem.base import durable
from lem.base.dataclass import dataclass, replace
from lem.base.durable import sha256_of
from lem.base.errors import EngineError
from lem.base.variables import DOWNLOAD_ONCE, is_cache_read_only
from lem.config.experiment import ExperimentConfig
from lem.engines.common import Folders, model_error, out_of_memory, shortened
from lem.engines.named import ADAPTER, DRAFTER, TOKENIZER, NamedModel, named_models
from lem.engines.texts import check_lengths

_logger = logging.getLogger(__name__)

# The order in which transformers looks for weights: whole files or an index of parts, safetensors before pickles.
_SEARCH_ORDER = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("adapter_model.safetensors", "adapter_model.bin"),
)
# Weights in other formats, which need not be fetched.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*", "onnx/*")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", *_OTHER_WEIGHTS)
# A field of the wrong type; older versions of the hub's client check none.
_StrictError: type[Exception] = getattr(hub_errors, "StrictDataclassError", ValueError)

# What transformers and its helpers raise for a model that is missing, incomplete or unknown (seen with 5.23): no heads
# divide by zero, padding outside of the vocabulary fails an assertion, an unknown activation is a KeyError.
MODEL_FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError),
    *(SafetensorError, TypeError, ValueError, pickle.UnpicklingError, _StrictError),
)
_UNREACHABLE = (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


# --- weights


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files transformers reads the weights from, by name; () without known ones; raises OSError, ValueError."""
    path = next((folder / name for name in _SEARCH_ORDER if (folder / name).is_file()), None)
    if path is None:
        return ()
    if not path.name.endswith(".index.json"):
        return (path,)
    document = durable.read_json(path)
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not all(isinstance(part, str) for part in places.values()):
        raise ValueError(f"{path}: expected an object whose weight_map names the file of each weight")
    return tuple(folder / part for part in sorted(set(places.values())))


def hash_weights(source: Source, adapter: Source | None = None) -> str | None:
    """SHA-256 over a line `<sha256 of the file>  <name>` per file of the weights in name order; None for no files."""
    # Each file is read once per process, about a second per GB after a load, which leaves it in the page cache. Large
    # files in the hub's cache are not read: they are links to blobs named by their SHA-256.
    with explained(f"weights of {source.name}", (OSError, ValueError)):
        files = [(path.name, path) for path in weight_files(source.folder)]
        if adapter is not None:
            files += [(f"adapter/{path.name}", path) for path in weight_files(adapter.folder)]
        lines = "".join(f"{_hash_file(path)}  {name}\n" for name, path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest() if files else None


def _hash_file(path: Path) -> str:
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    found = blob.stat()
    return _read_hash(blob, found.st_size, found.st_mtime_ns, found.st_ino)


@functools.lru_cache(maxsize=4096)
def _read_hash(path: Path, size: int, mtime_ns: int, inode: int) -> str:  # noqa: ARG001
    return sha256_of(path)


def count_embedding_parameters(model: Any) -> int | None:
    """Parameters of the input and output embedding layers, which may share a matrix; None without plain matrices."""
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    matrices: list[Any] = [getattr(layer, "weight", None) for layer in layers if layer is not None]
    if not matrices or any(matrix is None for matrix in matrices):
        return None
    return sum(int(matrix.numel()) for matrix in {id(matrix): matrix for matrix in matrices}.values())


# The fields of model configurations (transformers 5.23) with the number of routed experts of a layer, and with how many
# of them a token is routed to.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_USED = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")


def count_active_parameters(model: Any, parameters: int) -> int | None:
    """Of all the parameters of a model, those that a token of text uses; None for experts that cannot be counted."""
    shape = text_shape(model.config)
    if shape is not model.config and hasattr(model, "get_decoder"):
        parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
        found = (item for part in parts if part is not None for item in part.parameters())
        parameters = sum(_size_of(item) for item in {id(item): item for item in found}.values())
    routed = {
        id(parameter): _size_of(parameter)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts")
        for parameter in module.parameters()
    }
    experts, used = (
        next((value for name in names if isinstance(value := getattr(shape, name, None), int)), 0)
        for names in (_EXPERTS, _USED)
    )
    total = sum(routed.values())
    if not total and experts < 2:
        return parameters
    has_empty_experts = bool(getattr(shape, "zero_expert_num", 0))  # LongCat: a token may be routed to nothing
    if not 0 < used <= experts or not total or total % experts or has_empty_experts:
        return None
    return parameters - total // experts * (experts - used)


def text_shape(shape: Any) -> Any:
    return shape.get_text_config() if hasattr(shape, "get_text_config") else shape


def positions_of(shape: Any) -> int | None:
    positions = getattr(text_shape(shape), "max_position_embeddings", None)
    return int(positions) if isinstance(positions, int) and positions > 0 else None


def _size_of(parameter: Any) -> int:
    """Its number of values; bitsandbytes packs two of them into a byte."""
    packed = 2 * int(parameter.element_size()) if type(parameter).__name__ == "Params4bit" else 1
    return packed * int(parameter.numel())


# The classes of models that take images or sound beside text; older versions of transformers lack the last.
_OTHER_BUILDERS = (
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "AutoModelForImageTextToText"),
    ("MODEL_FOR_MULTIMODAL_LM_MAPPING", "AutoModelForMultimodalLM"),
)


def builder_of(shape: Any) -> Any:
    usual, kind = transformers.AutoModelForCausalLM, type(shape)
    has_own_code = "AutoModelForCausalLM" in (getattr(shape, "auto_map", None) or {})
    if has_own_code or kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or getattr(shape, "is_encoder_decoder", False):
        return usual
    found = (name for mapping, name in _OTHER_BUILDERS if kind in getattr(transformers, mapping, ()))
    return getattr(transformers, next(found, ""), usual)


# --- sources


@dataclass(frozen=True)
class Source:
    name: str  # what `from_pretrained` takes
    folder: Path  # with its files, in the hub's cache or the user's own
    commit: str | None  # of a model on the hub; None for the user's own folder


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache (`…/snapshots/<commit>`); None for any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if is_snapshot else None


def locate(named: NamedModel, token: str | None) -> Source:
    name, marker = named.name, named.marker
    folder = named.find_folder()
    if folder is not None:
        return Source(str(folder), folder, None)
    with explained(f"{named.option}: {name}"):
        path = cached_file(name, marker, revision=named.revision, token=token)
    if path is None:
        raise model_error(f"{named.option}: {name} has no {marker}", "use a model that transformers can load")
    return Source(name, Path(path).parent, commit_of(Path(path).parent))


def find_problems(config: ExperimentConfig, token: str | None) -> Iterator[EngineError]:
    """What `locate` raises for all that a configuration names, and lengths beyond the positions of its model."""
    access = {"token": token, "trust_remote_code": config.model.trust_remote_code}
    for named in named_models(config).values():
        try:
            if named.marker:
                source = locate(named, token)
                if named.option == "model":
                    check_lengths(config, source.folder)
            elif named.find_folder() is None:
                with explained(f"{named.option}: {named.name}"):
                    AutoTokenizer.from_pretrained(named.name, **access)
        except EngineError as error:  # noqa: PERF203 (each one is reported)
            yield error


def fetch_all(
    config: ExperimentConfig,
    token: str | None,
    *,
    all_formats: bool = False,
    check: Callable[[Path], None] | None = None,
) -> tuple[Source, Source | None, Folders]:
    """The model, its adapter, and the folders of all that an engine is to read, with their files fetched."""
    # An engine that downloads for itself would take the token from the environment, where all its processes would have
    # it; with a folder it needs none. With `all_formats` weights are fetched in all formats, also beside safetensors.
    # `check` may refuse the model before anything else is fetched.
    named, ignored = named_models(config), ("original/*",) if all_formats else _OTHER_WEIGHTS

    def fetch(what: str) -> Source | None:
        if what not in named:
            return None
        skipped = _WEIGHTS if what == TOKENIZER else ignored
        return _fetch(locate(named[what], token), token, named[what].option, skipped)

    source = _fetch(locate(named["model"], token), token, "model", ignored)
    if check is not None:
        check(source.folder)
    adapter, tokenizer, drafter = map(fetch, (ADAPTER, TOKENIZER, DRAFTER))
    folders = [None if found is None else str(found.folder) for found in (tokenizer, drafter)]
    return source, adapter, Folders(str(source.folder), *folders)


def _fetch(source: Source, token: str | None, option: str, ignored: Sequence[str]) -> Source:
    if source.commit is None:
        return source
    if ignored == _OTHER_WEIGHTS and not hub_constants.HF_HUB_OFFLINE:
        with explained(f"{option}: {source.name}"):
            files = HfApi(token=token).list_repo_files(source.name, revision=source.commit)
        ignored = _OTHER_WEIGHTS if any(file.endswith(".safetensors") for file in files) else ("original/*",)
    with explained(f"{option}: {source.name}"):
        folder = snapshot_download(source.name, revision=source.commit, token=token, ignore_patterns=list(ignored))
    return replace(source, folder=Path(folder))


@dataclass(frozen=True)
class Identity:
    model_revision: str | None
    weights_sha256: str | None
    model_parameters: int | None = None
    embedding_parameters: int | None = None
    active_parameters: int | None = None


def count_parameters(source: Source) -> Identity:
    """The number of parameters of a model, in an identity without a hash."""
    # Engines do not report the number of parameters, and their own layers differ: fused, padded, quantized. So they are
    # counted in the model as transformers builds it, without memory for the weights; another engine may run a model
    # that this version of transformers cannot build.
    try:
        shape = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (*MODEL_FAILURES, ImportError) as error:
        return _uncounted(source, error)
    builder = builder_of(shape)
    try:
        with torch.device("meta"):
            model = builder.from_config(shape, trust_remote_code=False)
        parameters = int(model.num_parameters())
    except (*MODEL_FAILURES, ImportError) as error:
        return _uncounted(source, error)
    embeddings, active = count_embedding_parameters(model), count_active_parameters(model, parameters)
    return Identity(source.commit, None, parameters, embeddings, active)


def _uncounted(source: Source, error: Exception) -> Identity:
    _logger.info("transformers cannot count the parameters of %s: %s", source.folder, shortened(error))
    return Identity(source.commit, None)


def identify(source: Source, adapter: Source | None = None) -> Identity:
    return replace(count_parameters(source), weights_sha256=hash_weights(source, adapter))


# --- failures


@contextmanager
def explained(what: str, failures: tuple[type[Exception], ...] = MODEL_FAILURES) -> Iterator[None]:
    """Raises the explanation of what transformers raises, and whether it would happen again."""
    # The block must hold only the calls that raise `failures`, ImportError or MemoryError: a bug of lem in it would be
    # blamed on the model.
    raised: tuple[type[Exception], ...] = (*failures, ImportError, MemoryError)
    try:
        yield
    except raised as error:
        raise _explain(what, error) from error


def is_out_of_memory(error: BaseException) -> bool:
    is_named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _explain(what: str, error: BaseException) -> EngineError:
    text, causes = f"{what}: {shortened(error)}", tuple(_chain(error))
    if is_out_of_memory(error):
        hint = "use a smaller model, a lower fp_precision, quantization, or a device with more memory"
        return out_of_memory(f"{what}: out of memory while loading: {shortened(error)}", hint)

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    is_permanent = True
    if isinstance(error, ImportError):
        hint = "install the missing package"
    elif has(hub_errors.GatedRepoError):
        hint = "set HF_TOKEN to a token of an account with access"
    elif has(hub_errors.RevisionNotFoundError):
        hint = "check model.revision"
    elif has(hub_errors.RepositoryNotFoundError):
        hint = f"check the spelling; relative paths start at {Path.cwd()}; a private model needs HF_TOKEN"
    elif has(*_UNREACHABLE) or "couldn't connect" in str(error):
        # A network that is down may be up for the retry; offline mode stays set.
        is_permanent = bool(hub_constants.HF_HUB_OFFLINE)
        where = "offline mode is set (HF_HUB_OFFLINE)" if is_permanent else "the hub cannot be reached"
        remedy = DOWNLOAD_ONCE if is_cache_read_only() else "download the model first"
        hint = f"not a folder in {Path.cwd()}, not in the hub's cache, and {where}: {remedy}"
    elif any(isinstance(cause, OSError) and cause.errno == errno.EROFS for cause in causes):
        hint = DOWNLOAD_ONCE if is_cache_read_only() else "make the hub's cache writable, or download the model first"
    elif "trust_remote_code" in str(error):
        hint = "set model.trust_remote_code: true if you trust the code that comes with the model"
    else:
        hint = "check that it is a complete causal language model that this version of transformers supports"
    return EngineError(text, hint, kind="model", is_permanent=is_permanent)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
