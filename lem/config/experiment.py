"""One experiment: a model, a backend, the work it is given, and how it is measured."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar

from lem.base.dataclass import dataclass, replace
from lem.base.measurement import is_estimate
from lem.config.backends import (
    BACKENDS,
    SECTIONS,
    WIDTH_OPTIONS,
    PyTorchConfig,
    ServerConfig,
    TensorRTConfig,
    VllmConfig,
    flag_name,
)
from lem.config.dialects import Dialect
from lem.config.kinds import REQUIRED, Option, Problem
from lem.config.option import Matching, Memo, Section, declared, identity_text, of_class, option, plain
from lem.config.sections import (
    BaselineConfig,
    DatasetConfig,
    DecoderConfig,
    ExperimentIOConfig,
    FilePrompts,
    GpuConfig,
    HuggingFacePrompts,
    MeasurementConfig,
    ModelConfig,
    SyntheticPrompts,
    TimeseriesConfig,
    TrafficConfig,
    WarmupConfig,
    _above,
)

# Values of chat_template; any other is a file.
NO_TEMPLATE, OWN_TEMPLATE = "none", "model"
_check_gpu = Matching(
    r"[0-9]+|(GPU|MIG)-[0-9A-Za-z/-]+|[0-9A-Fa-f]{4,}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-7]",
    "an index such as 0, a UUID such as GPU-8c7a…, or a PCI address such as 0000:03:00.0",
)
_check_image = Matching(r"[a-zA-Z0-9][a-zA-Z0-9_.:/@-]*", "the name of an image, such as vllm/vllm-openai:v0.11.0")
_ENGINE_KEY_LENGTH = 12

# By backend: options whose product is the number of GPUs for one copy of the model; options that make it draft tokens,
# and the one with their number; lengths that an engine is built for, and the options of the experiment whose sum they
# are where they are not given.
_DEGREES: Mapping[str, tuple[str, ...]] = {
    "pytorch": ("parallelism_degree",),
    "vllm": ("tensor_parallel_size", "pipeline_parallel_size"),
    "tensorrt": ("tp_size", "pp_size"),
    "server": (),
}
_DRAFTERS: Mapping[str, tuple[str, ...]] = {
    "pytorch": ("assisted_generation.model", "assisted_generation.num_tokens"),
    "vllm": ("speculative.method", "speculative.model"),
    "tensorrt": ("draft_model",),
    "server": (),
}
_DRAFT_LENGTHS: Mapping[str, str] = {
    "pytorch": "assisted_generation.num_tokens",
    "vllm": "speculative.num_tokens",
    "tensorrt": "num_draft_tokens",
}
ENGINE_LENGTHS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "pytorch": {},
    "vllm": {"max_model_len": ("max_input_tokens", "max_output_tokens")},
    "tensorrt": {"max_input_len": ("max_input_tokens",), "max_output_len": ("max_output_tokens",)},
    "server": {},
}
# What the command of a server decides, with the values that are left alone.
_SERVER_DECIDES: Mapping[str, Any] = {
    "fp_precision": "float16",
    "model.revision": None,
    "model.adapter": None,
    "model.trust_remote_code": False,
}
_DRAFTING = r"(?a)(spec|draft|model-draft|lookup)\b.*"


def _honoured_defaults(dialect: Dialect, given: Mapping[str, Any]) -> dict[str, Any]:
    """In place of defaults that a server does not honour; what the user wrote is left, to be refused."""
    decoder, traffic = given.get("decoder", DecoderConfig()), given.get("traffic_simulation", TrafficConfig())
    found: dict[str, Any] = {}
    if decoder.is_greedy:
        return found
    if dialect.field_of("decoder.top_k") is None and not decoder.is_given("top_k"):
        found["decoder"] = replace(decoder, top_k=0)
    if dialect.field_of("random_seed") is None and "random_seed" not in given:
        found["random_seed"] = None
        # All configurations of a cycle have the same arrivals.
        if traffic.enabled and traffic.mode != "closed" and traffic.seed is None:
            found["traffic_simulation"] = replace(traffic, seed=declared(ExperimentConfig)["random_seed"].default)
    return found


@dataclass(frozen=True)
class ExperimentConfig(Section, aliases={"model_name": "model"}, exclusive=("dataset", "prompts")):
    """An experiment, validated and with every default filled in."""

    model: ModelConfig = option(REQUIRED, "The model, or just its name.", reload=True)
    backend: str = option("pytorch", "The engine.", choices=BACKENDS, reload=True)
    config_name: str | None = option(None, "Name in tables; null: made from the options that vary.", identity=False)
    max_input_tokens: int = option(512, "Longer prompts are truncated.", min=1, unit="tokens")
    max_output_tokens: int = option(128, "Tokens to generate at most.", min=1, unit="tokens")
    min_output_tokens: int = option(0, "Tokens to generate at least.", min=0, unit="tokens")
    fp_precision: str = option(
        "float16", "Type of the weights.", choices=("float16", "float32", "bfloat16"), reload=True
    )
    gpus: tuple[str, ...] | None = option(
        None,
        "GPUs by index or UUID; null is GPU 0 if there is one, else the CPU; [] is the CPU.",
        check=_check_gpu,
        form="index or UUID",
        takes_scalar=True,
        takes_integer=True,
        is_unique=True,
        reload=True,
    )
    image: str | None = option(
        None,
        "Image of the container, in place of that of the service; null: as the compose file has it.",
        check=_check_image,
        form="an image",
        reload=True,
        is_added=True,
    )
    ignore_eos: bool = option(False, "Continue past the end of a text, for equal output lengths.")
    random_seed: int | None = option(42, "Seed of sampling; null is unseeded.", min=0, max=2**32 - 1)
    streaming: bool = option(
        False, "Run requests one by one where token times need it (TTFT, ICL); server needs no such run."
    )
    num_cycles: int = option(1, "Repetitions of `lem experiment`.", min=1, max=10, identity=False)
    save_outputs: bool = option(False, "Keep the generated texts beside the result.", identity=False)
    dataset: DatasetConfig | None = option(None, "Prompts from a dataset: an alias or a mapping.")
    prompts: FilePrompts | SyntheticPrompts | HuggingFacePrompts | None = option(
        None, "Prompts from a file (its path is enough) or elsewhere; default: the bundled synthetic set."
    )
    chat_template: str = option(
        NO_TEMPLATE,
        "Template for prompts: none, model (the tokenizer's own), or a Jinja file, relative to the file that names it.",
        is_added=True,
    )
    decoder: DecoderConfig = option(DecoderConfig(), "How the next token is chosen.")
    traffic_simulation: TrafficConfig = option(TrafficConfig(), "Requests that arrive over time.")
    warmup: WarmupConfig = option(WarmupConfig(), "Warm-up.")
    baseline: BaselineConfig = option(BaselineConfig(), "Power at rest.")
    timeseries: TimeseriesConfig = option(TimeseriesConfig(), "Samples over time.")
    measurement: MeasurementConfig = option(MeasurementConfig(), "The window and the meters.")
    gpu: GpuConfig = option(GpuConfig(), "Settings of the GPUs while it runs.", is_added=True)
    io: ExperimentIOConfig = option(ExperimentIOConfig(), "Where results go.", identity=False)
    extra_metadata: Mapping[str, Any] = option({}, "Copied to the record.", identity=False)
    pytorch: PyTorchConfig | None = option(None, "Options of pytorch.", backends=("pytorch",))
    vllm: VllmConfig | None = option(None, "Options of vllm.", backends=("vllm",))
    tensorrt: TensorRTConfig | None = option(None, "Options of tensorrt.", backends=("tensorrt",))
    server: ServerConfig | None = option(None, "Options of server.", backends=("server",))

    def derive(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        server = given.get("server") if given.get("backend") == "server" else None
        if server is None:
            return {}
        own = {"chat_template": OWN_TEMPLATE} if server.api == "chat" and "chat_template" not in given else {}
        return {**own, **_honoured_defaults(server.dialect, given)}

    def check(self) -> Iterator[Problem]:
        if self.min_output_tokens > self.max_output_tokens:
            yield _above("min_output_tokens", self.min_output_tokens, "max_output_tokens", self.max_output_tokens)
        for backend in BACKENDS:
            if backend != self.backend and getattr(self, backend) is not None:
                yield Problem.of(backend, "other_backend", backend=self.backend, is_about_key=True)
        for name in ("window_size", "min_prompts"):
            if (value := getattr(self.warmup, name)) > self.warmup.max_prompts:
                yield _above(f"warmup.{name}", value, "max_prompts", self.warmup.max_prompts)
        yield from self._check_backend()
        if self.prompts is not None and self.dataset is not None:
            yield Problem.of("prompts", "two_prompt_sources", is_about_key=True)
        for name, limit_name in (("input_tokens", "max_input_tokens"), ("output_tokens", "max_output_tokens")):
            wanted, limit = getattr(self.prompts, name, None), getattr(self, limit_name)
            if wanted is not None and wanted > limit:
                yield _above(f"prompts.{name}", wanted, limit_name, limit)
        yield from self._check_measurement()
        for name in self.gpu.changed():
            if self.gpus == ():
                yield Problem.of(f"gpu.{name}", "needs_a_gpu")
            elif not self.timeseries.enabled:
                yield Problem.of(f"gpu.{name}", "needs_timeseries")

    def _check_backend(self) -> Iterator[Problem]:
        section, gpus = self.section, self.gpus
        if isinstance(section, TensorRTConfig):
            if self.fp_precision == "float32":
                yield Problem.of("fp_precision", "tensorrt_precision")
            if gpus == ():
                yield Problem.of("gpus", "tensorrt_gpu")
        if isinstance(section, PyTorchConfig):
            if gpus is not None and len(gpus) > 1:
                yield Problem.of("gpus", "pytorch_one_gpu", count=len(gpus))
            if section.beam_search.enabled and (self.streaming or self.traffic_simulation.enabled):
                yield Problem.of("pytorch.beam_search", "beams_untimed")
        if isinstance(section, ServerConfig):
            yield from self._check_server(section)
        if gpus is not None and self.parallel_degree > max(len(gpus), 1):
            name = f"{self.backend}.{_DEGREES[self.backend][0]}"
            yield Problem.of(name, "gpus_not_named", needed=self.parallel_degree, named=len(gpus))

    def _check_server(self, section: ServerConfig) -> Iterator[Problem]:
        if section.command is None and section.url is None and section.service is None:
            yield Problem.of("server", "no_server", is_about_key=True)
        if self.image is not None and section.service is None:
            yield Problem.of("image", "image_unused")
        if self.is_chat and self.chat_template != OWN_TEMPLATE:
            yield Problem.of("chat_template", "server_templates")
        for name, untouched in _SERVER_DECIDES.items():
            if attrgetter(name)(self) != untouched:
                yield Problem.of(name, "server_decides")
        decoder, dialect = self.decoder, section.dialect
        wanted = {  # and what leaves it to the server
            "ignore_eos": (self.ignore_eos, "false"),
            "min_output_tokens": (self.min_output_tokens > 0 and not self.ignore_eos, "0"),
            "random_seed": (self.random_seed is not None and not decoder.is_greedy, "null"),
            "decoder.top_k": (decoder.top_k != 0 and not decoder.is_greedy, "0"),
            "decoder.repetition_penalty": (decoder.repetition_penalty != 1, "1"),
        }
        for name, (is_wanted, neutral) in wanted.items():
            if is_wanted and dialect.field_of(name) is None:
                yield Problem.of(name, "dialect_lacks", server=dialect.server, neutral=neutral)

    def _check_measurement(self) -> Iterator[Problem]:
        measurement = self.measurement
        if measurement.phases and self.traffic_simulation.enabled:
            yield Problem.of("measurement.phases", "phases_under_traffic")
        if measurement.agreement and not self.decoder.is_greedy:
            yield Problem.of("measurement.agreement", "agreement_sampled")
        if measurement.energy == "none" and measurement.phases:
            yield Problem.of("measurement.phases", "needs_energy")
        if self.baseline.required and not measurement.has_rest:
            yield Problem.of("baseline.required", "needs_energy" if measurement.energy == "none" else "needs_rest")
        if self.baseline.required and not self.baseline.enabled:
            yield Problem.of("baseline.required", "needs_baseline")
        if measurement.cpu_tdp_w is not None and not is_estimate(measurement.energy):
            yield Problem.of("measurement.cpu_tdp_w", "tdp_unused", energy=measurement.energy)

    @property
    def is_templated(self) -> bool:
        """Whether the prompts are made from messages by a chat template, so that these are kept."""
        return self.chat_template != NO_TEMPLATE

    @property
    def is_chat(self) -> bool:
        """Whether a server gets the messages themselves, and applies its own template."""
        return isinstance(self.section, ServerConfig) and self.section.api == "chat"

    @property
    def parallel_degree(self) -> int:
        """The number of GPUs that one copy of the model is spread over."""
        return math.prod(getattr(self.section, name) or 1 for name in _DEGREES[self.backend])

    @property
    def is_speculative(self) -> bool:
        """Whether the engine drafts tokens and verifies them."""
        if isinstance(self.section, ServerConfig):
            return any(re.match(_DRAFTING, flag_name(name)) for name in self.section.options)
        return any(attrgetter(name)(self.section) is not None for name in _DRAFTERS[self.backend])

    @property
    def drafted_tok(self) -> int | None:
        """The tokens that are drafted in each step, if their number is fixed."""
        name = _DRAFT_LENGTHS.get(self.backend)
        drafted: int | None = None if name is None else attrgetter(name)(self.section)
        return drafted

    @property
    def section(self) -> PyTorchConfig | VllmConfig | TensorRTConfig | ServerConfig:
        """The options of the chosen backend; its defaults where nothing is given."""
        section: PyTorchConfig | VllmConfig | TensorRTConfig | ServerConfig
        section = getattr(self, self.backend) or _defaults_of(self.backend)
        return section

    @property
    def width_option(self) -> str | None:
        """The option that bounds how many requests are computed together; None for a server without one."""
        if not isinstance(self.section, ServerConfig):
            return f"{self.backend}.{WIDTH_OPTIONS[self.backend]}"
        name = self.section.width_name
        return None if name is None else f"server.options.{name}"

    @property
    def width(self) -> int | None:
        """The most requests that the engine computes together; None where only the server knows."""
        section = self.section
        if not isinstance(section, ServerConfig):
            return int(getattr(section, WIDTH_OPTIONS[self.backend]))
        found = section.options.get(section.width_name or "")
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    @property
    def runs_alone(self) -> bool:
        """Whether each request runs alone, so that its tokens can be timed; a server always times its tokens."""
        return self.streaming and self.backend != "server"

    @property
    def has_running_engine(self) -> bool:
        """Whether lem starts no engine, so that cycles share one load: that of `server.url`."""
        return isinstance(self.section, ServerConfig) and self.section.url is not None

    @property
    def uses_dataset(self) -> bool:
        """Whether prompts come from a data set, which is resolved where its package is."""
        return self.dataset is not None or isinstance(self.prompts, HuggingFacePrompts)

    def most_at_once(self, prompts: int | None) -> int | None:
        """The most requests that are there at once, of that many prompts; None where it is not known before the run."""
        traffic = self.traffic_simulation
        if traffic.enabled:
            return traffic.concurrency if traffic.mode == "closed" else None
        return 1 if self.runs_alone else prompts

    @property
    def name(self) -> str:
        """`config_name`, else the model's short name and the backend."""
        if self.config_name is not None:
            return self.config_name
        return f"{self.model.name.rstrip('/').rpartition('/')[2] or self.model.name}-{self.backend}"

    def identity(self, *, is_first: bool = False) -> dict[str, Any]:
        """What can change a measured number, the chosen backend's section filled in, as plain JSON values."""
        out = {name: value for name, value in super().identity(is_first=is_first).items() if name not in BACKENDS}
        out[self.backend] = self.section.identity(is_first=is_first)
        if self._has_template_file:
            out["chat_template"] = "file"
        return out

    def identity_texts(self, *, is_first: bool = False) -> dict[str, str]:
        found = super().identity_texts(is_first=is_first)
        for backend in BACKENDS:
            if backend != self.backend:
                del found[backend]
        found[self.backend] = f'"{self.backend}":{identity_text(self.section, is_first=is_first)}'
        if self._has_template_file:
            found["chat_template"] = '"chat_template":"file"'
        return found

    @property
    def _has_template_file(self) -> bool:
        """Whether its template is known by its content, as a file of prompts."""
        return self.is_templated and self.chat_template != OWN_TEMPLATE

    def engine_key(self) -> str:
        """12 hex digits over everything whose change needs another engine load."""
        section = self.section
        options = [(name, getattr(self, name)) for name in _reloading(ExperimentConfig)[0] if name != "model"]
        # Else it would find the prompts of the one before it in the cache.
        is_own = isinstance(section, ServerConfig) and section.url is None and section.keeps_prompts
        whole = _KEY_ENCODER.encode(self.to_dict()) if is_own else None
        lengths = tuple(self.engine_lengths().items())
        return _ENGINE_KEYS(section, _RELOAD_TEXTS(self.model), self.backend, tuple(options), lengths, whole)

    def engine_lengths(self) -> dict[str, int]:
        """The lengths that the engine is built for, given or derived, by the option of its section."""
        return {
            name: getattr(self.section, name) or sum(getattr(self, source) for source in sources)
            for name, sources in ENGINE_LENGTHS[self.backend].items()
        }


PROGRAM = "program"  # in place of a backend, in records of `lem measure`


@dataclass(frozen=True)
class ProgramConfig(Section):
    """A program that `lem measure` runs, and how it is measured."""

    command: tuple[Any, ...] = option(REQUIRED, "The program and its arguments, which may be empty.", min_items=1)
    work: tuple[str, ...] = option((), "Files in which it reports its work.", identity=False)
    whole_machine: bool = option(False, "Count what every process of this machine does as the program's.")
    gpus: tuple[str, ...] | None = option(
        None,
        "GPUs by index or UUID; null is all that the program sees.",
        check=_check_gpu,
        form="index or UUID",
        is_unique=True,
    )
    baseline: BaselineConfig = option(BaselineConfig(), "Power at rest.")
    timeseries: TimeseriesConfig = option(TimeseriesConfig(), "Samples over time.")
    measurement: MeasurementConfig = option(MeasurementConfig(), "The meters.")

    traffic_simulation: ClassVar[TrafficConfig] = TrafficConfig()

    def check(self) -> Iterator[Problem]:
        wanted = self.measurement
        if wanted.cpu_tdp_w is not None and not is_estimate(wanted.energy):
            yield Problem.of("measurement.cpu_tdp_w", "tdp_unused", energy=wanted.energy)
        if self.whole_machine and wanted.max_foreign_pct != MeasurementConfig().max_foreign_pct:
            yield Problem(("measurement", "max_foreign_pct"), "has no effect with whole_machine")


MeteredConfig = ExperimentConfig | ProgramConfig


@functools.cache
def _defaults_of(backend: str) -> Any:
    return SECTIONS[backend]()


_KEY_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


@functools.lru_cache(4096)  # so that equal keys are one text, and are computed once
def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:_ENGINE_KEY_LENGTH]


def _engine_key(
    section: Section, model: str, backend: str, given: Sequence[tuple[str, Any]], lengths: Any, whole: str | None
) -> str:
    reloading = _reloading(ExperimentConfig)[0]
    options = {name: value for name, value in given if value != reloading[name].default or not reloading[name].is_added}
    options |= {"model": json.loads(model), backend: {**_reload_options(section), **dict(lengths)}}
    if whole is not None:
        options["experiment"] = json.loads(whole)
    return _short_digest(_KEY_ENCODER.encode(options))


def _reload_options(section: Section) -> dict[str, Any]:
    """The options of a section, nested ones included, whose change needs a reload."""
    options, others = _reloading(type(section))
    out = {name: plain(vars(section).get(name, item.default)) for name, item in options.items()}
    for name in others:
        if isinstance(value := getattr(section, name), Section):
            out[name] = _reload_options(value)
    return out


@of_class
def _reloading(section: type[Section]) -> tuple[Mapping[str, Option], tuple[str, ...]]:
    """The options of a section whose change needs a reload, and those that may be sections with such options."""
    options = declared(section)
    others = tuple(name for name, item in options.items() if not item.reload and item.kind.sections)
    return {name: item for name, item in options.items() if item.reload}, others


_RELOAD_TEXTS = Memo[str](lambda section: _KEY_ENCODER.encode(_reload_options(section)))
_ENGINE_KEYS = Memo[str](_engine_key)
