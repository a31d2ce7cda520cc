"""Where model, tokenizer and adapter come from, and what a failure to get them means. Imports transformers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from transformers.utils import cached_file

from lem.backends.refusals import shortened
from lem.backends.weights import commit_of
from lem.errors import EngineError, OptionRefused

__all__ = ["MODEL_FAILURES", "Source", "explained", "is_out_of_memory", "locate"]

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
