"""One experiment: a model, a backend, the work it is given, and how it is measured."""
# ruff: noqa: RUF009 - `option` makes a dataclass field, as `dataclasses.field` does

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

from lem.base.measurement import SHORT_WINDOW_S, EnergySource, is_estimate
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
from lem.config.kinds import REQUIRED, Problem
from lem.config.option import Matching, Section, declared, option, plain

# Values of chat_template; any other is a file.
NO_TEMPLATE, OWN_TEMPLATE = "none", "model"
_check_gpu = Matching(r"[0-9]+|(GPU|MIG)-[0-9A-Za-z/-]+", "an index such as 0 or a UUID such as GPU-8c7a…")
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
_DRAFTING = re.compile(r"(spec|draft|model-draft|lookup)\b.*", re.ASCII)


@dataclass(frozen=True)
class DatasetAlias:
    """A dataset known by a short name: where it is on the hub, and which text of a row is the prompt."""

    path: str
    columns: tuple[str, ...]  # joined in their order
    subset: str | None = None
    split: str = "train"


DATASET_ALIASES: Mapping[str, DatasetAlias] = {
    "ai_energy_score": DatasetAlias("AIEnergyScore/text_generation", ("text",)),
    "alpaca": DatasetAlias("tatsu-lab/alpaca", ("instruction", "input")),
    "sharegpt": DatasetAlias("anon8231489123/ShareGPT_Vicuna_unfiltered", ("conversations",)),
    "gsm8k": DatasetAlias("openai/gsm8k", ("question",), subset="main"),
    "mmlu": DatasetAlias("cais/mmlu", ("question", "choices"), subset="all", split="test"),
}

_DECODER_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "deterministic": {"temperature": 0.0},
    "standard": {"temperature": 1.0, "top_p": 0.95},
    "creative": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1},
    "factual": {"temperature": 0.3},
}


def _above(name: str, value: int, limit_name: str, limit: int) -> Problem:
    return Problem.of(name, "above_limit", value=value, limit_name=limit_name, limit=limit)


@dataclass(frozen=True)
class ModelConfig(Section, shorthand="name", reloads=True):
    name: str = option(REQUIRED, "Name on the hub, or a local folder.")
    revision: str | None = option(None, "Commit, tag or branch.")
    tokenizer: str | None = option(None, "Tokenizer, where it is not the model's own.")
    adapter: str | None = option(None, "LoRA adapter: a name on the hub or a local folder.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")


_SIZE = {"num_samples": "sample_size"}


@dataclass(frozen=True)
class DatasetConfig(Section, shorthand="name", aliases=_SIZE):
    """Prompts from a dataset; looked for in the folder LEM_DATASETS_DIR first, then on the hub."""

    name: str = option(REQUIRED, f"An alias ({', '.join(DATASET_ALIASES)}), a name on the hub, or a folder.")
    sample_size: int | None = option(None, "Prompts to take; null takes all.", min=1, unit="prompts")
    split: str | None = option(None, "Split; the alias knows its own, else train.")
    column: str | None = option(None, "Column of the prompt; the alias knows its own.")


@dataclass(frozen=True)
class FilePrompts(Section, shorthand="path", aliases=_SIZE):
    type: str = option("file", "Where prompts come from.", choices=("file",))
    # Not `identity`: an experiment is known by what the file holds, not by where it lies.
    path: str = option(
        REQUIRED,
        "A .txt file with a prompt per line, or .jsonl or .json with rows; relative to the file that names it.",
        identity=False,
    )
    sample_size: int | None = option(None, "Prompts to take from the start; null takes all.", min=1, unit="prompts")


# The synthetic prompts that are measured when neither dataset nor prompts is given. Changing them changes what old
# campaigns mean.
BUNDLED_INPUT_TOKENS = 128
BUNDLED_SAMPLE_SIZE = 32
BUNDLED_SEED = 42
BUNDLED_DISTRIBUTION = "lognormal"


@dataclass(frozen=True)
class SyntheticPrompts(Section, aliases=_SIZE):
    """Made-up prompts of chosen lengths."""

    type: str = option("synthetic", "Where prompts come from.", choices=("synthetic",))
    input_tokens: int = option(BUNDLED_INPUT_TOKENS, "Length of a prompt.", min=1, unit="tokens")
    output_tokens: int | None = option(None, "Most tokens to generate; null: max_output_tokens.", min=1, unit="tokens")
    sample_size: int = option(BUNDLED_SAMPLE_SIZE, "Prompts to make; 32 if not set.", min=1, unit="prompts")
    seed: int = option(BUNDLED_SEED, "Seed of text and lengths; each cycle draws others.", min=0)
    distribution: str = option("fixed", "Distribution of the lengths.", choices=("fixed", "uniform", "lognormal"))


@dataclass(frozen=True)
class HuggingFacePrompts(Section, aliases=_SIZE):
    """Prompts from a dataset on the hub, with all its options."""

    type: str = option("huggingface", "Where prompts come from.", choices=("huggingface",))
    dataset: str = option(REQUIRED, "Name on the hub, an alias, or a folder.")
    split: str | None = option(None, "Split; the alias knows its own, else train.")
    subset: str | None = option(None, "Configuration of the dataset.")
    column: str | None = option(None, "Column of the prompt; the alias knows its own.")
    sample_size: int | None = option(None, "Prompts to take; null takes all.", min=1, unit="prompts")
    shuffle: bool = option(False, "Shuffle before taking.")
    seed: int = option(42, "Seed of the shuffle; each cycle draws another.", min=0)


@dataclass(frozen=True)
class DecoderConfig(Section):
    preset: str | None = option(
        None,
        "Defaults of the other options. deterministic: greedy; standard: temperature 1, top_p 0.95; creative: "
        "temperature 0.8, top_p 0.9, repetition_penalty 1.1; factual: temperature 0.3.",
        choices=tuple(_DECODER_PRESETS),
        identity=False,
    )
    temperature: float = option(1.0, "0 is greedy.", min=0, max=2)
    do_sample: bool = option(True, "Sample; false is greedy. Defaults to false at temperature 0.")
    top_k: int = option(50, "Sample from the k likeliest tokens; 0 is off.", min=0, unit="tokens")
    top_p: float = option(1.0, "Sample from the likeliest tokens of this total probability.", min=0, max=1)
    repetition_penalty: float = option(1.0, "Above 1 makes repeated tokens less likely.", min=0.1, max=10)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return not self.do_sample

    def derive(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        preset = _DECODER_PRESETS.get(given.get("preset") or "", {})
        values = {name: value for name, value in preset.items() if name not in given}
        if "do_sample" not in given:
            # Greedy is what temperature 0 means, also where a temperature given beside the preset replaces that 0.
            values["do_sample"] = {"temperature": 1.0, **preset, **given}["temperature"] != 0
        return values

    def check(self) -> Iterator[Problem]:
        if self.do_sample and self.temperature == 0:
            yield Problem(("do_sample",), "conflicts with temperature 0, which is greedy; remove one of them")


SLO_LIMITS = ("ttft_ms", "tpot_ms", "e2e_ms")


@dataclass(frozen=True)
class SloConfig(Section):
    """Service levels: a request is good if it meets all that are given.

    They change no measurement, only what is counted in it: results are counted again when they change.
    """

    ttft_ms: float | None = option(None, "Time to the first token, at most.", above=0, unit="ms")
    tpot_ms: float | None = option(None, "Time per output token after the first, at most.", above=0, unit="ms")
    e2e_ms: float | None = option(None, "End-to-end latency, at most.", above=0, unit="ms")
    attainment_pct: float = option(
        99.0, "Share of good requests that a load must reach to keep the SLO, for the knee.", above=0, max=100, unit="%"
    )

    @property
    def limits_ms(self) -> dict[str, float]:
        """Those that are given, by name."""
        found = {name: getattr(self, name) for name in SLO_LIMITS}
        return {name: limit for name, limit in found.items() if limit is not None}

    def check(self) -> Iterator[Problem]:
        if self.changed() and not self.limits_ms:
            yield Problem(("attainment_pct",), f"has no effect without a limit: {', '.join(SLO_LIMITS)}")


@dataclass(frozen=True)
class TrafficConfig(Section, switch="enabled"):
    enabled: bool = option(False, "Let requests arrive over time.")
    mode: str = option(
        "poisson",
        "poisson, constant: arrivals at target_qps, latency from the scheduled time; closed: concurrency in flight.",
        choices=("poisson", "constant", "closed"),
    )
    target_qps: float = option(1.0, "Mean arrivals (poisson, constant).", above=0, unit="requests/s")
    concurrency: int = option(1, "Requests in flight (closed).", min=1, unit="requests")
    seed: int | None = option(None, "Seed of the arrivals, of which each cycle draws others; null: random_seed.", min=0)
    burstiness: float = option(
        1.0, "Shape of the gamma gaps between arrivals (poisson); below 1 burstier.", min=0.01, max=1000, is_added=True
    )
    allow_overload: bool = option(
        False, "Accept a queue that grows throughout the window (poisson, constant).", is_added=True
    )
    slo: SloConfig = option(SloConfig(), "Service levels, for goodput and the knee.", identity=False)


@dataclass(frozen=True)
class WarmupConfig(Section):
    """What runs before the window, on prompts that are not measured."""

    enabled: bool = option(True, "Warm up.")
    convergence_detection: bool = option(True, "Continue until latencies settle; false: exactly min_prompts.")
    cv_threshold: float = option(0.05, "Coefficient of variation below which latencies are settled.", above=0, max=1)
    min_prompts: int = option(
        5, "Prompts at least, and at least twice the concurrency.", min=0, max=200, unit="prompts"
    )
    max_prompts: int = option(
        50, "Prompts at most, unless window_size steps need more.", min=1, max=200, unit="prompts"
    )
    window_size: int = option(5, "Latencies to compare.", min=3, max=20, unit="prompts")
    timeout_seconds: float = option(30.0, "Time at most; 0 sets no limit.", min=0, unit="s", is_dropped=True)


@dataclass(frozen=True)
class BaselineConfig(Section):
    enabled: bool = option(True, "Measure power at rest.")
    required: bool = option(False, "Refuse to measure without it.")
    duration_sec: float = option(30.0, "Length of the measurement.", min=0.5, max=120, unit="s")
    cache_ttl_sec: float = option(3600.0, "Time for which a baseline is reused.", min=0, unit="s", is_dropped=True)
    sample_interval_ms: int = option(100, "Time between samples.", min=20, max=1000, unit="ms")


@dataclass(frozen=True)
class TimeseriesConfig(Section):
    enabled: bool = option(True, "Sample.")
    save: bool = option(True, "Keep the samples beside the result.", identity=False)
    sample_interval_ms: int = option(100, "Time between samples.", min=20, max=5000, unit="ms")


@dataclass(frozen=True)
class MeasurementConfig(Section):
    min_window_sec: float = option(
        SHORT_WINDOW_S, "Length of the window; prompts repeat to fill it.", min=0, max=3600, unit="s"
    )
    energy: str = option(
        "auto",
        "Meter of energy; auto takes the best available.",
        choices=("auto", "nvml", EnergySource.RAPL.value, EnergySource.TDP_ESTIMATE.value, "none"),
    )
    phases: bool = option(False, "Separate energy of prefill and decode, by differenced runs.")
    cpu_tdp_w: float | None = option(
        None, "Design power of all CPU packages, for tdp_estimate; null asks the kernel.", min=1, max=10000, unit="W"
    )
    max_wait_pct: float | None = option(
        20.0,
        "Most of its time that the engine may wait for a CPU; null: no limit.",
        min=0,
        max=100,
        unit="%",
        is_added=True,
    )
    max_foreign_pct: float | None = option(
        20.0,
        "Most CPU time of other programs, for energy of the CPU; null: no limit.",
        min=0,
        max=100,
        unit="%",
        is_added=True,
    )
    external_csv: str | None = option(None, "File with readings of an external meter: UTC time, power.")
    external_unit: str | None = option(
        None, "Unit of its power; null: as its first line says.", choices=("W", "kW", "mW"), identity=False
    )
    grid_g_per_kwh: float | None = option(None, "Carbon intensity of the grid.", min=0, unit="g/kWh", is_dropped=True)
    pue: float | None = option(None, "Power usage effectiveness of the site.", min=1, max=10, is_dropped=True)
    price_per_kwh: float | None = option(
        None, "Price of energy, in any currency.", min=0, unit="1/kWh", is_dropped=True
    )


@dataclass(frozen=True)
class ExperimentIOConfig(Section):
    results_dir: str | None = option(None, "Folder of results; null: the campaign's, else results.")


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
    io: ExperimentIOConfig = option(ExperimentIOConfig(), "Where results go.", identity=False)
    extra_metadata: Mapping[str, Any] = option({}, "Copied to the record.", identity=False)
    pytorch: PyTorchConfig | None = option(None, "Options of pytorch.", backends=("pytorch",))
    vllm: VllmConfig | None = option(None, "Options of vllm.", backends=("vllm",))
    tensorrt: TensorRTConfig | None = option(None, "Options of tensorrt.", backends=("tensorrt",))
    server: ServerConfig | None = option(None, "Options of server.", backends=("server",))

    def derive(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        server = given.get("server")
        is_chat = given.get("backend") == "server" and server is not None and server.api == "chat"
        return {"chat_template": OWN_TEMPLATE} if is_chat and "chat_template" not in given else {}

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
        if measurement.energy == "none" and measurement.phases:
            yield Problem.of("measurement.phases", "needs_energy")
        if measurement.energy == "none" and self.baseline.required:
            yield Problem.of("baseline.required", "needs_energy")
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
            return any(_DRAFTING.match(flag_name(name)) for name in self.section.options)
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
        section = getattr(self, self.backend) or _DEFAULTS[self.backend]
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

    def make_identity(self, *, is_first: bool) -> dict[str, Any]:
        """What can change a measured number, the chosen backend's section filled in, as plain JSON values."""
        out = {name: value for name, value in super().make_identity(is_first=is_first).items() if name not in BACKENDS}
        out[self.backend] = self.section.identity(is_first=is_first)
        if self.is_templated and self.chat_template != OWN_TEMPLATE:
            out["chat_template"] = "file"  # known by its content, as a file of prompts
        return out

    def engine_key(self) -> str:
        """12 hex digits over everything whose change needs another engine load."""
        options = {name: getattr(self, name) for name, item in declared(ExperimentConfig).items() if item.reload}
        options["model"] = _reload_options(self.model)
        options[self.backend] = {**_reload_options(self.section), **self.engine_lengths()}
        text = json.dumps(options, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:_ENGINE_KEY_LENGTH]

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

_DEFAULTS: Mapping[str, Any] = {backend: section() for backend, section in SECTIONS.items()}


def _reload_options(section: Section) -> dict[str, Any]:
    """The options of a section, nested ones included, whose change needs a reload."""
    out: dict[str, Any] = {}
    for name, item in declared(type(section)).items():
        value = getattr(section, name)
        if item.reload:
            out[name] = plain(value)
        elif isinstance(value, Section):
            out[name] = _reload_options(value)
    return out
