"""The options of each backend, and presets of them.

Options without a default are left to the engine, whose own default is recorded.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from lem.base.dataclass import dataclass, replace
from lem.base.errors import ConfigurationError, did_you_mean
from lem.base.variables import GPU_VARIABLE
from lem.config.dialects import DIALECTS, SALT, Dialect
from lem.config.kinds import Problem, check_url
from lem.config.option import Matching, Section, declarations, option

BACKENDS = ("pytorch", "vllm", "tensorrt", "server")

_check_memory_size = Matching(r"[0-9]+(\.[0-9]+)? ?([KMG]i?B)", "a size such as 10GiB or 800MB")


@dataclass(frozen=True)
class BeamSearchConfig(Section, switch="enabled"):
    enabled: bool = option(False, "Decode with beams.")
    num_beams: int | None = option(None, "Number of beams.", min=2, max=64)
    length_penalty: float | None = option(None, "Above 0 favours long outputs, below 0 short.", min=-10, max=10)
    early_stopping: bool | str | None = option(
        None, "Stop at num_beams candidates; never: when none can improve.", choices=(False, True, "never")
    )

    def check(self) -> Iterator[Problem]:
        if self.enabled and self.num_beams is None:
            yield Problem(("num_beams",), "is required when beam search is enabled; 4 is common", is_about_key=True)


@dataclass(frozen=True)
class AssistedGenerationConfig(Section):
    """Speculative decoding of `generate`: a small model drafts, the model checks."""

    model: str | None = option(None, "The drafting model: a name or a folder.", reload=True)
    num_tokens: int | None = option(
        None, "Tokens to draft per step; without a model, n-grams of the prompt.", min=1, max=64
    )


@dataclass(frozen=True)
class PyTorchConfig(Section):
    """Options of the pytorch backend (transformers)."""

    batch_size: int = option(
        1, "Requests in a batch; the most with a dynamic strategy.", min=1, unit="requests", is_width=True
    )
    batching_strategy: str = option(
        "static",
        "static: fixed size; dynamic: by tokens; sorted_: by length first.",
        choices=("static", "dynamic", "sorted_static", "sorted_dynamic"),
    )
    max_tokens_per_batch: int | None = option(
        None, "Most tokens of a dynamic batch, padding included.", min=1, unit="tokens"
    )
    parallelism_strategy: str | None = option(
        None,
        "How to spread a model over GPUs. Refused: not tested.",
        choices=("device_map", "tensor_parallel"),
        reload=True,
    )
    parallelism_degree: int | None = option(
        None, "GPUs to spread a model over. More than 1 is refused.", min=1, unit="GPUs", reload=True
    )
    load_in_4bit: bool | None = option(None, "Quantize weights to 4 bit while loading (bitsandbytes).", reload=True)
    load_in_8bit: bool | None = option(None, "Quantize weights to 8 bit while loading (bitsandbytes).", reload=True)
    bnb_4bit_compute_dtype: str | None = option(
        None, "Type for computing with 4-bit weights.", choices=("float16", "bfloat16", "float32"), reload=True
    )
    bnb_4bit_quant_type: str | None = option(None, "The 4-bit type.", choices=("nf4", "fp4"), reload=True)
    bnb_4bit_use_double_quant: bool | None = option(None, "Quantize the 4-bit constants too.", reload=True)
    attn_implementation: str | None = option(
        None, "Implementation of attention.", choices=("sdpa", "flash_attention_2", "eager"), reload=True
    )
    torch_compile: bool | str = option(
        False,
        "Mode of torch.compile; on a GPU the last two need a static cache.",
        choices=(False, "default", "reduce-overhead", "max-autotune"),
        reload=True,
    )
    torch_compile_backend: str | None = option(None, "Backend of torch.compile.", reload=True)
    use_cache: bool | None = option(None, "Keep keys and values of earlier tokens.")
    cache_implementation: str | None = option(None, "Key-value cache, as transformers names it (dynamic, …).")
    low_cpu_mem_usage: bool | None = option(None, "Load weights without a second copy in CPU memory.", reload=True)
    max_memory: Mapping[str, str] | None = option(
        None,
        "Memory to use per device, such as {0: 20GiB, cpu: 60GiB}.",
        check=_check_memory_size,
        form="a size like 10GiB",
        reload=True,
    )
    min_p: float | None = option(None, "Drop tokens below this share of the likeliest.", min=0, max=1)
    no_repeat_ngram_size: int | None = option(
        None, "Size of n-grams that must not repeat; 0 is off.", min=0, unit="tokens"
    )
    beam_search: BeamSearchConfig = option(BeamSearchConfig(), "Beam search.")
    assisted_generation: AssistedGenerationConfig = option(AssistedGenerationConfig(), "Speculative decoding.")
    extra: Mapping[str, Any] = option({}, "Further options, passed to `generate` unchanged.")

    def check(self) -> Iterator[Problem]:
        if self.load_in_4bit and self.load_in_8bit:
            yield Problem(("load_in_8bit",), "conflicts with load_in_4bit: a weight has 4 bits or 8")
        for name in ("parallelism_strategy", "parallelism_degree"):
            if getattr(self, name) not in (None, 1):
                yield Problem((name,), "not supported: the pytorch backend was not tested on two GPUs")
        for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
            if getattr(self, name) is not None and not self.load_in_4bit:
                yield Problem((name,), "has no effect without load_in_4bit: true")
        if self.torch_compile_backend is not None and self.torch_compile is False:
            yield Problem(("torch_compile_backend",), "has no effect without torch_compile")
        is_dynamic = self.batching_strategy.endswith("dynamic")
        if is_dynamic and self.max_tokens_per_batch is None:
            yield Problem(("batching_strategy",), f"{self.batching_strategy} needs max_tokens_per_batch")
        if not is_dynamic and self.max_tokens_per_batch is not None:
            yield Problem(
                ("max_tokens_per_batch",), "has no effect without batching_strategy: dynamic or sorted_dynamic"
            )


@dataclass(frozen=True)
class VllmAttentionConfig(Section, reloads=True):
    backend: str | None = option(None, "Attention backend, as vLLM names it (FLASH_ATTN, FLASHINFER, …).")
    flash_version: int | None = option(None, "Version of flash attention.", min=2, max=4)
    disable_sliding_window: bool | None = option(None, "Ignore the window of the model.")


@dataclass(frozen=True)
class VllmSpeculativeConfig(Section, reloads=True):
    model: str | None = option(None, "The drafting model.")
    num_tokens: int | None = option(None, "Tokens to draft per step.", min=1, max=64, unit="tokens")
    method: str | None = option(None, "How to draft, as vLLM names it (ngram, eagle, …).")
    prompt_lookup_min: int | None = option(None, "Shortest n-gram to look up.", min=1, unit="tokens")
    prompt_lookup_max: int | None = option(None, "Longest n-gram to look up.", min=1, unit="tokens")
    draft_tp_size: int | None = option(None, "GPUs to spread the drafting model over.", min=1, unit="GPUs")

    def check(self) -> Iterator[Problem]:
        given = [name for name, value in self.to_dict().items() if value is not None]
        if given and self.model is None and self.method is None:
            yield Problem((given[0],), "has no effect without method (such as ngram) or model")
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        if low is not None and high is not None and low > high:
            yield Problem(("prompt_lookup_min",), f"{low} is above prompt_lookup_max, {high}")


@dataclass(frozen=True)
class VllmLoraConfig(Section, switch="enabled", reloads=True):
    enabled: bool = option(False, "Make room for LoRA adapters.")
    max_loras: int | None = option(None, "Adapters in one batch.", min=1)
    max_rank: int | None = option(None, "Highest rank of an adapter.", min=1)


@dataclass(frozen=True)
class VllmConfig(Section, reloads=True):
    """Options of the vllm backend, checked against the engine's own arguments when it loads."""

    max_num_seqs: int = option(256, "Requests computed together.", min=1, unit="requests", is_width=True)
    max_num_batched_tokens: int | None = option(None, "Tokens in one step.", min=1, unit="tokens")
    max_model_len: int | None = option(
        None, "Longest sequence; null: the input and output limits together.", min=1, unit="tokens"
    )
    gpu_memory_utilization: float = option(0.9, "Share of GPU memory to use.", min=0.5, max=0.99)
    swap_space: float | None = option(None, "CPU swap space of older engines.", min=0, unit="GiB")
    cpu_offload_gb: float | None = option(None, "Weights to keep in CPU memory.", min=0, unit="GiB")
    tensor_parallel_size: int | None = option(None, "GPUs to spread each layer over.", min=1, unit="GPUs")
    pipeline_parallel_size: int | None = option(None, "GPUs to spread the layers over.", min=1, unit="GPUs")
    distributed_backend: str | None = option(None, "Launcher of the processes of several GPUs.", choices=("mp", "ray"))
    enable_prefix_caching: bool | None = option(None, "Cache common prefixes of prompts.")
    enable_chunked_prefill: bool | None = option(None, "Split long prefills over steps.")
    enforce_eager: bool | None = option(None, "Do not use CUDA graphs.")
    disable_custom_all_reduce: bool | None = option(None, "All-reduce by NCCL instead of vLLM's own.")
    kv_cache_dtype: str | None = option(None, "Type of the key-value cache.", choices=("auto", "fp8"))
    block_size: int | None = option(None, "Block of the key-value cache.", min=1, unit="tokens")
    load_format: str | None = option(None, "Format of the weights, as vLLM names it.")
    quantization: str | None = option(None, "Quantization, as vLLM names it (awq, gptq, fp8, …).")
    min_p: float | None = option(None, "Drop tokens below this share of the likeliest.", min=0, max=1, reload=False)
    logprobs: int | None = option(None, "Log probabilities per token.", min=0, max=20, reload=False)
    logit_bias: Mapping[str, float] | None = option(
        None, "Bias of tokens by their id.", min=-100, max=100, reload=False
    )
    attention: VllmAttentionConfig = option(VllmAttentionConfig(), "Attention.")
    speculative: VllmSpeculativeConfig = option(VllmSpeculativeConfig(), "Speculative decoding.")
    lora: VllmLoraConfig = option(VllmLoraConfig(), "LoRA adapters.")
    extra: Mapping[str, Any] = option({}, "Further options, passed to the engine unchanged.")

    def check(self) -> Iterator[Problem]:
        for key in self.logit_bias or {}:
            if not key.isdecimal():
                yield Problem(("logit_bias", key), "expected a token id (an integer)")


@dataclass(frozen=True)
class TensorRTCalibrationConfig(Section, reloads=True):
    dataset: str | None = option(None, "Dataset to calibrate on. Refused: calibrate when the checkpoint is made.")
    split: str | None = option(None, "Split of that dataset. Refused.")
    num_samples: int | None = option(None, "Samples to take. Refused.", min=1, unit="prompts")
    max_length: int | None = option(None, "Longest sample. Refused.", min=1, unit="tokens")


@dataclass(frozen=True)
class TensorRTConfig(Section, reloads=True):
    """Options of the tensorrt backend (`LLM` of TensorRT-LLM in its PyTorch flow); not yet tested on hardware."""

    engine_path: str | None = option(None, "A folder with a built engine. Refused: the PyTorch flow builds none.")
    engine_cache_dir: str | None = option(None, "Cache of built engines. Refused: the PyTorch flow builds none.")
    force_rebuild: bool | None = option(None, "Ignore that cache. Refused: the PyTorch flow builds none.")
    max_batch_size: int = option(8, "Requests computed together.", min=1, unit="requests", is_width=True)
    max_input_len: int | None = option(None, "Longest prompt; null: max_input_tokens.", min=1, unit="tokens")
    max_output_len: int | None = option(None, "Longest output; null: max_output_tokens.", min=1, unit="tokens")
    max_num_tokens: int | None = option(None, "Tokens in one step.", min=1, unit="tokens")
    builder_opt_level: int | None = option(
        None, "Optimisation level. Refused: the PyTorch flow builds none.", min=0, max=5
    )
    tp_size: int | None = option(None, "GPUs to spread each layer over.", min=1, unit="GPUs")
    pp_size: int | None = option(None, "GPUs to spread the layers over.", min=1, unit="GPUs")
    quantization: str | None = option(
        None,
        "Quantization that the checkpoint must have.",
        choices=("none", "fp8", "int8_sq", "int8_weight_only", "int4_awq", "int4_gptq"),
    )
    calibration: TensorRTCalibrationConfig = option(TensorRTCalibrationConfig(), "Calibration of the quantization.")
    kv_cache_type: str | None = option(None, "Type of the key-value cache, as the engine names it.")
    enable_chunked_context: bool | None = option(None, "Split long prefills over steps.")
    enable_kv_cache_reuse: bool | None = option(None, "Cache common prefixes of prompts.")
    gpu_memory_utilization: float = option(0.9, "Share of free GPU memory for the cache.", min=0.5, max=0.99)
    draft_model: str | None = option(None, "The drafting model.")
    num_draft_tokens: int | None = option(None, "Tokens to draft per step.", min=1, unit="tokens")
    extra_build_args: Mapping[str, Any] = option({}, "Build options. Refused: the PyTorch flow builds none.")
    extra_runtime_args: Mapping[str, Any] = option({}, "Further arguments of the engine's LLM, passed unchanged.")

    def check(self) -> Iterator[Problem]:
        if (self.draft_model is None) != (self.num_draft_tokens is None):
            name = "num_draft_tokens" if self.draft_model is None else "draft_model"
            yield Problem((name,), "draft_model and num_draft_tokens require each other")
        is_quantized = self.quantization not in (None, "none")
        if not is_quantized and self.calibration != TensorRTCalibrationConfig():
            yield Problem(("calibration",), "has no effect without quantization")


def _check_server_url(text: str) -> str | None:
    if (complaint := check_url(text)) is not None:
        return complaint
    parts = urllib.parse.urlsplit(text)
    return "expected a URL without ? and #" if parts.query or parts.fragment else None


_check_variable = Matching(r"[A-Za-z_][A-Za-z0-9_]*", "the name of an environment variable")
_check_path = Matching(r"/[!-~]*", "a path that begins with /")
_OPTION_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_REFUSED_FLAGS: Mapping[str, str] = {
    "port": "write it into the command: --port {port}",
    "host": "write it into the command",
    "api-key": "the command line is visible to every user of the machine; use api_key_env",
}

# Fields of the body that lem sets itself, and by what; they are refused in `request`.
_SET_FIELDS: Mapping[str, str] = {
    **dict.fromkeys(("model", "prompt", "messages", "stream", "stream_options"), "lem"),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "n_predict"), "max_output_tokens"),
    **dict.fromkeys(("min_tokens", "ignore_eos"), "ignore_eos and min_output_tokens"),
    **dict.fromkeys(("temperature", "top_p", "top_k", "seed"), "decoder and random_seed"),
    **dict.fromkeys(("repetition_penalty", "repeat_penalty"), "decoder.repetition_penalty"),
    **dict.fromkeys(("return_token_ids", "return_tokens", "cache_salt", "cache_prompt"), "lem"),
    **dict.fromkeys(("n", "best_of", "stop", "echo"), "lem, which asks for one whole answer"),
}


@dataclass(frozen=True)
class ServerConfig(Section, reloads=True, exclusive=("command", "url")):
    """Options of the server backend: any server that speaks the completions or chat API of OpenAI."""

    engine: str = option(
        "openai", "What it speaks; openai is the subset that all servers share.", choices=tuple(DIALECTS)
    )
    command: tuple[str, ...] | None = option(
        None, "Command that starts it; {model}, {port} and {gpus} are filled in.", min_items=1
    )
    service: str | None = option(
        None, "Compose service in whose container the command runs; without a command, the server itself."
    )
    url: str | None = option(
        None, "Address of a server that is already running.", check=_check_server_url, form="a URL"
    )
    options: Mapping[str, Any] = option(
        {},
        "Options of the command: true is --name, false --no-name, null none; a list repeats; a mapping is JSON.",
    )
    env: Mapping[str, str] = option({}, "Environment variables of the server.", takes_integer=True)
    api: str = option("completions", "API to measure.", choices=("completions", "chat"), reload=False)
    served_name: str | None = option(None, "Name of the model in requests; null: the one that the server lists.")
    ready_path: str | None = option(
        None, "Path that answers 200 once the server is ready; null: by engine.", check=_check_path, identity=False
    )
    api_key_env: str | None = option(
        None, "Environment variable with the API key.", check=_check_variable, identity=False
    )
    request: Mapping[str, Any] = option({}, "Further fields of every request.", reload=False)
    metrics_path: str | None = option(
        None, "Path of its Prometheus metrics; null: by engine.", check=_check_path, identity=False
    )

    @property
    def dialect(self) -> Dialect:
        return DIALECTS[self.engine]

    @property
    def width_name(self) -> str | None:
        """The name in `options` of the one that bounds how many requests are computed together, if it is given."""
        return next((name for name in self.options if flag_name(name) == flag_name(self.dialect.width or "")), None)

    @property
    def wants_cache(self) -> bool:
        """Whether its command asks for the prefix cache, which requests are otherwise kept out of."""
        flag = self.dialect.cache_option
        is_option = any(flag_name(name) == flag and value is True for name, value in self.options.items())
        return is_option or f"--{flag}" in (self.command or ())

    @property
    def keeps_prompts(self) -> bool:
        """Whether its cache may hold the prompts of an earlier experiment of the same load."""
        fields = self.dialect.uncached
        return not fields or (self.wants_cache and SALT not in fields.values())

    def check(self) -> Iterator[Problem]:
        for name in ("command", "service", "options", "env") if self.url is not None else ():
            if getattr(self, name):
                yield Problem((name,), "has no effect with url: that server is already running", is_about_key=True)
        yield from self._check_command()
        for name in self.env:
            complaint = "set gpus instead" if name == GPU_VARIABLE else _check_variable(name)
            if complaint is not None:
                yield Problem(("env", name), complaint, is_about_key=True)
        for name in self.request:
            if name in _SET_FIELDS:
                yield Problem(("request", name), f"is set by {_SET_FIELDS[name]}", is_about_key=True)

    def _check_command(self) -> Iterator[Problem]:
        words = self.command or ("{port}",)
        if not any("{port}" in word for word in words):
            yield Problem(("command",), "needs {port}, since lem chooses a free port; such as --port {port}")
        if any(word.partition("=")[0] == "--api-key" for word in words):
            yield Problem(("command",), _REFUSED_FLAGS["api-key"])
        seen: set[str] = set()
        for name in self.options:
            flag = flag_name(name)
            if not re.fullmatch(_OPTION_NAME, name):
                yield Problem(("options", name), "expected a name without leading dashes", is_about_key=True)
            elif flag in _REFUSED_FLAGS or flag in seen:
                remedy = _REFUSED_FLAGS.get(flag, f"duplicate option: --{flag}")
                yield Problem(("options", name), remedy, is_about_key=True)
            seen.add(flag)


def flag_name(name: str) -> str:
    """The flag of an option of a server, without its dashes."""
    return name.replace("_", "-")


SECTIONS: Mapping[str, type[Section]] = dict(
    zip(BACKENDS, (PyTorchConfig, VllmConfig, TensorRTConfig, ServerConfig), strict=True)
)

# The option of each backend that bounds how many requests are computed together; that of a server depends on it.
WIDTH_OPTIONS: Mapping[str, str] = {
    backend: name
    for backend, section in SECTIONS.items()
    for name, item in declarations(section).items()
    if item.is_width
}


@dataclass(frozen=True)
class Preset:
    """Values that an experiment starts from, under a name."""

    name: str
    description: str
    values: Mapping[str, Any]  # as an experiment file would have them


# AI Energy Score v0.1 for text generation without reasoning (`index.md` and `reasoning_helpers.py` of
# huggingface/AIEnergyScore at commit a5b9a04): batches of one, exactly 10 tokens, and their 1,000 prompts.
ENERGY_SCORE_RULES: Mapping[str, Any] = {
    "backend": "pytorch",
    "pytorch": {"batch_size": 1},
    "min_output_tokens": 10,
    "max_output_tokens": 10,
    "ignore_eos": True,
}
_ENERGY_SCORE_PROMPTS = {"name": "ai_energy_score", "sample_size": 1000}


def _preset(name: str, description: str, tokens: tuple[int, int], **engine: Mapping[str, Any]) -> Preset:
    values: dict[str, Any] = {
        "max_input_tokens": tokens[0],
        "max_output_tokens": tokens[1],
        "decoder": {"preset": "deterministic"},  # all are greedy, so that two runs do the same work
    }
    for backend, options in engine.items():
        values.update({"backend": backend, backend: options})
    return Preset(name, description, values)


_PRESETS = (
    _preset("quick-test", "Short prompts and outputs, for a first test.", (64, 32)),
    _preset("benchmark", "Long prompts and outputs, for results to compare.", (2048, 512)),
    _preset("throughput", "Medium lengths, for tokens per second.", (512, 256)),
    _preset(
        "vllm-throughput",
        "vLLM with many requests at a time, chunked prefill and prefix caching.",
        (2048, 512),
        vllm={"max_num_seqs": 256, "enable_chunked_prefill": True, "enable_prefix_caching": True},
    ),
    _preset(
        "vllm-speculative",
        "vLLM drafting 5 tokens at a time from n-grams of the prompt.",
        (2048, 256),
        vllm={"speculative": {"method": "ngram", "num_tokens": 5, "prompt_lookup_max": 4}},
    ),
    _preset("vllm-memory-efficient", "vLLM with an fp8 key-value cache.", (4096, 512), vllm={"kv_cache_dtype": "fp8"}),
    _preset(
        "vllm-low-latency",
        "vLLM with few requests at a time and no CUDA graphs.",
        (512, 128),
        vllm={"max_num_seqs": 32, "enforce_eager": True},
    ),
    _preset(
        "pytorch-optimized",
        "transformers with flash attention 2, compiled.",
        (2048, 512),
        pytorch={"attn_implementation": "flash_attention_2", "torch_compile": "default"},
    ),
    _preset(
        "pytorch-speculative",
        "transformers drafting 5 tokens at a time from n-grams of the prompt.",
        (2048, 256),
        pytorch={"assisted_generation": {"num_tokens": 5}},
    ),
    _preset(
        "pytorch-compatible",
        "transformers with eager attention, which runs every model.",
        (512, 128),
        pytorch={"attn_implementation": "eager"},
    ),
)

_SCORE = _preset(
    "ai-energy-score",
    "AI Energy Score v0.1, text generation: 1,000 prompts one by one, 10 tokens each; needs their data set.",
    (2048, 10),
    pytorch={"batch_size": 1},
)
_SCORE = replace(
    _SCORE,
    values={**_SCORE.values, **ENERGY_SCORE_RULES, "dataset": _ENERGY_SCORE_PROMPTS, "fp_precision": "bfloat16"},
)

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in (*_PRESETS, _SCORE)}


def find_preset(name: str) -> Preset:
    """The preset of that name; ConfigurationError where there is none."""
    found = PRESETS.get(name)
    if found is None:
        near = did_you_mean(name, list(PRESETS))
        raise ConfigurationError(f"unknown preset {name!r}{near}", f"one of: {', '.join(PRESETS)}")
    return found
