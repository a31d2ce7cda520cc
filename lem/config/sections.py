"""The sections of an experiment: its model, its prompts, the decoder, the traffic, and how it is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lem.base.dataclass import dataclass
from lem.base.measurement import SHORT_WINDOW_S, EnergySource
from lem.config.kinds import REQUIRED, Problem
from lem.config.option import Section, option


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
        choices=("auto", "nvml", EnergySource.RAPL.value, "hwmon", EnergySource.TDP_ESTIMATE.value, "none"),
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
    agreement: bool = option(
        False, "Keep the output ids of greedy runs, to compare the answers of configurations.", identity=False
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

    @property
    def has_rest(self) -> bool:
        """Whether its meter can measure power at rest."""
        return self.energy not in ("none", EnergySource.TDP_ESTIMATE)


@dataclass(frozen=True)
class GpuConfig(Section):
    """Settings of the GPUs during an experiment. They need permission; the former ones are restored after it."""

    power_limit_w: float | None = option(None, "Power limit of each GPU; null: as it is.", above=0, unit="W")
    lock_clock_mhz: int | None = option(None, "Clock that the SMs are locked to; null: as it is.", min=1, unit="MHz")


@dataclass(frozen=True)
class ExperimentIOConfig(Section):
    results_dir: str | None = option(None, "Folder of results; null: the campaign's, else results.")
