"""The options of each backend. Those without a default are left to the engine, whose own default is recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from lem.config.option import Section, option
from lem.config.problems import Problem

# ruff: noqa: RUF009 - `option` makes a dataclass field, as `dataclasses.field` does


BACKENDS = ("pytorch", "vllm", "tensorrt")

# The option of each backend that bounds how many requests are computed together.
WIDTH_OPTIONS: Mapping[str, str] = MappingProxyType(
    {"pytorch": "batch_size", "vllm": "max_num_seqs", "tensorrt": "max_batch_size"}
)

_MEMORY_SIZE = re.compile(r"[0-9]+(\.[0-9]+)? ?([KMG]i?B)")


def _check_memory_size(text: str) -> str | None:
    return None if _MEMORY_SIZE.fullmatch(text) else f"must be a size like 10GiB or 800MB, got {text!r}"


@dataclass(frozen=True)
class BeamSearchConfig(Section):
    """Beam search of `generate`."""

    switch: ClassVar[str | None] = "enabled"

    enabled: bool = option(False, description="Decode with beams.")
    num_beams: int | None = option(None, description="Number of beams.", minimum=2, maximum=64)
    length_penalty: float | None = option(
        None, description="Above 0 favours long outputs, below 0 short ones.", minimum=-10, maximum=10
    )
    early_stopping: bool | str | None = option(
        None,
        description="Stop when as many candidates as beams are complete; never: only when no better one can come.",
        choices=(False, True, "never"),
    )

    def check(self) -> Iterator[Problem]:
        if self.enabled and self.num_beams is None:
            yield Problem(("num_beams",), "is required while beam search is enabled; 4 is usual", is_about_key=True)


@dataclass(frozen=True)
class AssistedGenerationConfig(Section):
    """Speculative decoding of `generate`: a small model drafts, the model checks."""

    model: str | None = option(None, description="The drafting model: a name or a folder.", reload=True)
    num_tokens: int | None = option(
        None,
        description="Tokens to draft at a time; without a model they are looked up in the prompt (n-grams).",
        minimum=1,
        maximum=64,
    )


@dataclass(frozen=True)
class PyTorchConfig(Section):
    """Options of the pytorch backend (transformers)."""

    batch_size: int = option(
        1,
        description="Requests in a batch; with a dynamic strategy the most.",
        minimum=1,
        unit="requests",
    )
    batching_strategy: str = option(
        "static",
        description="How requests are put together: as they come or by a budget of tokens; sorted by length first.",
        choices=("static", "dynamic", "sorted_static", "sorted_dynamic"),
    )
    max_tokens_per_batch: int | None = option(
        None,
        description="Budget of a dynamic batch: its rows times its longest prompt and output, padding included.",
        minimum=1,
        unit="tokens",
    )
    parallelism_strategy: str | None = option(
        None,
        description="How a model is spread over several GPUs. Refused: it was never run on two GPUs.",
        choices=("device_map", "tensor_parallel"),
        reload=True,
    )
    parallelism_degree: int | None = option(
        None,
        description="GPUs to spread a model over. More than 1 is refused: it was never run on two GPUs.",
        minimum=1,
        unit="GPUs",
        reload=True,
    )
    load_in_4bit: bool | None = option(
        None, description="Quantize weights to 4 bit while loading (bitsandbytes).", reload=True
    )
    load_in_8bit: bool | None = option(
        None, description="Quantize weights to 8 bit while loading (bitsandbytes).", reload=True
    )
    bnb_4bit_compute_dtype: str | None = option(
        None,
        description="Type that 4-bit weights are computed in.",
        choices=("float16", "bfloat16", "float32"),
        reload=True,
    )
    bnb_4bit_quant_type: str | None = option(None, description="The 4-bit type.", choices=("nf4", "fp4"), reload=True)
    bnb_4bit_use_double_quant: bool | None = option(
        None, description="Quantize the constants of 4-bit quantization too.", reload=True
    )
    attn_implementation: str | None = option(
        None,
        description="Implementation of attention.",
        choices=("sdpa", "flash_attention_2", "eager"),
        reload=True,
    )
    torch_compile: bool | str = option(
        False,
        description="Compile the model, in this mode of torch.compile. On a GPU the last two record CUDA graphs and "
        "need a static cache.",
        choices=(False, "default", "reduce-overhead", "max-autotune"),
        reload=True,
    )
    torch_compile_backend: str | None = option(None, description="Backend of torch.compile.", reload=True)
    use_cache: bool | None = option(None, description="Keep keys and values of earlier tokens.")
    cache_implementation: str | None = option(
        None, description="Kind of key-value cache, as transformers names it (dynamic, static, …)."
    )
    low_cpu_mem_usage: bool | None = option(
        None, description="Load weights without a second copy in CPU memory.", reload=True
    )
    max_memory: Mapping[str, str] | None = option(
        None,
        description="Memory to use on each device while loading, e.g. {0: 20GiB, cpu: 60GiB}.",
        check=_check_memory_size,
        form="a size like 10GiB",
        reload=True,
    )
    min_p: float | None = option(
        None,
        description="Drop tokens less likely than this share of the likeliest.",
        minimum=0,
        maximum=1,
    )
    no_repeat_ngram_size: int | None = option(
        None, description="No n-gram of this size occurs twice; 0 is off.", minimum=0, unit="tokens"
    )
    beam_search: BeamSearchConfig = option(BeamSearchConfig(), description="Beam search.")
    assisted_generation: AssistedGenerationConfig = option(
        AssistedGenerationConfig(), description="Speculative decoding."
    )
    extra: Mapping[str, Any] = option({}, description="Further options, passed to `generate` as they are.")

    def check(self) -> Iterator[Problem]:
        if self.load_in_4bit and self.load_in_8bit:
            yield Problem(("load_in_8bit",), "cannot stand with load_in_4bit: a weight has 4 bits or 8")
        yield from self._check_parallelism()
        yield from self._check_companions()

    def _check_parallelism(self) -> Iterator[Problem]:
        reason = "is refused: the pytorch backend was not yet run on two GPUs"
        if self.parallelism_strategy is not None:
            yield Problem(("parallelism_strategy",), reason)
        if self.parallelism_degree not in (None, 1):
            yield Problem(("parallelism_degree",), reason)

    def _check_companions(self) -> Iterator[Problem]:
        """Options that do nothing without another one."""
        if not self.load_in_4bit:
            for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
                if getattr(self, name) is not None:
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
class VllmAttentionConfig(Section):
    """Attention of vLLM."""

    backend: str | None = option(
        None, description="Attention backend, as vLLM names it (FLASH_ATTN, FLASHINFER, …).", reload=True
    )
    flash_version: int | None = option(
        None, description="Version of flash attention.", minimum=2, maximum=4, reload=True
    )
    disable_sliding_window: bool | None = option(
        None, description="Attend to the whole context even where the model has a window.", reload=True
    )


@dataclass(frozen=True)
class VllmSpeculativeConfig(Section):
    """Speculative decoding of vLLM."""

    model: str | None = option(None, description="The drafting model.", reload=True)
    num_tokens: int | None = option(
        None, description="Tokens to draft at a time.", minimum=1, maximum=64, unit="tokens", reload=True
    )
    method: str | None = option(None, description="How to draft, as vLLM names it (ngram, eagle, …).", reload=True)
    prompt_lookup_min: int | None = option(
        None, description="Shortest n-gram to look up.", minimum=1, unit="tokens", reload=True
    )
    prompt_lookup_max: int | None = option(
        None, description="Longest n-gram to look up.", minimum=1, unit="tokens", reload=True
    )
    draft_tp_size: int | None = option(
        None, description="GPUs to spread the drafting model over.", minimum=1, unit="GPUs", reload=True
    )

    def check(self) -> Iterator[Problem]:
        given = [name for name, value in self.to_dict().items() if value is not None]
        if given and self.model is None and self.method is None:
            yield Problem((given[0],), "has no effect without method (such as ngram) or model beside it")
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        if low is not None and high is not None and low > high:
            yield Problem(("prompt_lookup_min",), f"{low} is above prompt_lookup_max, which is {high}")


@dataclass(frozen=True)
class VllmLoraConfig(Section):
    """LoRA adapters of vLLM."""

    switch: ClassVar[str | None] = "enabled"

    enabled: bool = option(False, description="Make room for LoRA adapters.", reload=True)
    max_loras: int | None = option(None, description="Adapters in one batch.", minimum=1, reload=True)
    max_rank: int | None = option(None, description="Highest rank of an adapter.", minimum=1, reload=True)


@dataclass(frozen=True)
class VllmConfig(Section):
    """Options of the vllm backend, checked against the engine's own arguments when it loads."""

    max_num_seqs: int = option(
        256, description="Requests worked on at a time.", minimum=1, unit="requests", reload=True
    )
    max_num_batched_tokens: int | None = option(
        None, description="Tokens in one step.", minimum=1, unit="tokens", reload=True
    )
    max_model_len: int | None = option(
        None,
        description="Longest sequence; max_input_tokens + max_output_tokens when not given.",
        minimum=1,
        unit="tokens",
        reload=True,
    )
    gpu_memory_utilization: float = option(
        0.9, description="Share of GPU memory to take.", minimum=0.5, maximum=0.99, reload=True
    )
    swap_space: float | None = option(
        None, description="CPU swap space of older engines.", minimum=0, unit="GiB", reload=True
    )
    cpu_offload_gb: float | None = option(
        None, description="Weights to keep in CPU memory.", minimum=0, unit="GiB", reload=True
    )
    tensor_parallel_size: int | None = option(
        None, description="GPUs to spread each layer over.", minimum=1, unit="GPUs", reload=True
    )
    pipeline_parallel_size: int | None = option(
        None, description="GPUs to spread the layers over.", minimum=1, unit="GPUs", reload=True
    )
    distributed_backend: str | None = option(
        None, description="What runs the processes of several GPUs.", choices=("mp", "ray"), reload=True
    )
    enable_prefix_caching: bool | None = option(None, description="Keep what prompts have in common.", reload=True)
    enable_chunked_prefill: bool | None = option(None, description="Split long prefills over steps.", reload=True)
    enforce_eager: bool | None = option(None, description="No CUDA graphs.", reload=True)
    disable_custom_all_reduce: bool | None = option(
        None, description="All-reduce by NCCL instead of vLLM's own.", reload=True
    )
    kv_cache_dtype: str | None = option(
        None, description="Type of the key-value cache.", choices=("auto", "fp8"), reload=True
    )
    block_size: int | None = option(
        None, description="Block of the key-value cache.", minimum=1, unit="tokens", reload=True
    )
    load_format: str | None = option(None, description="Format of the weights, as vLLM names it.", reload=True)
    quantization: str | None = option(
        None,
        description="Quantization the engine found accepts (awq, gptq, fp8, marlin, …).",
        reload=True,
    )
    min_p: float | None = option(
        None,
        description="Drop tokens less likely than this share of the likeliest.",
        minimum=0,
        maximum=1,
    )
    logprobs: int | None = option(
        None, description="Log probabilities to return for each token.", minimum=0, maximum=20
    )
    logit_bias: Mapping[str, float] | None = option(
        None, description="Bias of tokens by their id.", minimum=-100, maximum=100
    )
    attention: VllmAttentionConfig = option(VllmAttentionConfig(), description="Attention.")
    speculative: VllmSpeculativeConfig = option(VllmSpeculativeConfig(), description="Speculative decoding.")
    lora: VllmLoraConfig = option(VllmLoraConfig(), description="LoRA adapters.")
    extra: Mapping[str, Any] = option({}, description="Further options, passed to the engine as they are.", reload=True)

    def check(self) -> Iterator[Problem]:
        for key in self.logit_bias or {}:
            if not key.isdecimal():
                yield Problem(("logit_bias", key), "the id of a token is due, a whole number")


@dataclass(frozen=True)
class TensorRTCalibrationConfig(Section):
    """Calibration of a quantization."""

    dataset: str | None = option(
        None, description="Dataset to calibrate on. Refused: calibrate when the checkpoint is made.", reload=True
    )
    split: str | None = option(None, description="Its split. Refused.", reload=True)
    num_samples: int | None = option(
        None, description="Samples to take. Refused.", minimum=1, unit="prompts", reload=True
    )
    max_length: int | None = option(None, description="Longest sample. Refused.", minimum=1, unit="tokens", reload=True)


@dataclass(frozen=True)
class TensorRTConfig(Section):
    """Options of the tensorrt backend (`LLM` of TensorRT-LLM in its PyTorch flow); it awaits a run on hardware."""

    engine_path: str | None = option(
        None, description="A folder with a built engine. Refused: the PyTorch flow builds none.", reload=True
    )
    engine_cache_dir: str | None = option(
        None, description="Where built engines are kept. Refused: the PyTorch flow builds none.", reload=True
    )
    force_rebuild: bool | None = option(
        None,
        description="Build even where the cache has the engine. Refused: the PyTorch flow builds none.",
        reload=True,
    )
    max_batch_size: int = option(
        8, description="Requests worked on at a time.", minimum=1, unit="requests", reload=True
    )
    max_input_len: int | None = option(
        None,
        description="Longest prompt; max_input_tokens when not given.",
        minimum=1,
        unit="tokens",
        reload=True,
    )
    max_output_len: int | None = option(
        None,
        description="Longest output; max_output_tokens when not given.",
        minimum=1,
        unit="tokens",
        reload=True,
    )
    max_num_tokens: int | None = option(None, description="Tokens in one step.", minimum=1, unit="tokens", reload=True)
    builder_opt_level: int | None = option(
        None,
        description="How hard the builder optimises. Refused: the PyTorch flow builds none.",
        minimum=0,
        maximum=5,
        reload=True,
    )
    tp_size: int | None = option(
        None, description="GPUs to spread each layer over.", minimum=1, unit="GPUs", reload=True
    )
    pp_size: int | None = option(
        None, description="GPUs to spread the layers over.", minimum=1, unit="GPUs", reload=True
    )
    quantization: str | None = option(
        None,
        description="Quantization that the checkpoint must have; the PyTorch flow quantizes nothing.",
        choices=("none", "fp8", "int8_sq", "int8_weight_only", "int4_awq", "int4_gptq"),
        reload=True,
    )
    calibration: TensorRTCalibrationConfig = option(
        TensorRTCalibrationConfig(), description="Calibration of the quantization."
    )
    kv_cache_type: str | None = option(
        None, description="Type of the key-value cache, as the engine names it.", reload=True
    )
    enable_chunked_context: bool | None = option(None, description="Split long prefills over steps.", reload=True)
    enable_kv_cache_reuse: bool | None = option(None, description="Keep what prompts have in common.", reload=True)
    gpu_memory_utilization: float = option(
        0.9,
        description="Share of free GPU memory for the key-value cache.",
        minimum=0.5,
        maximum=0.99,
        reload=True,
    )
    draft_model: str | None = option(None, description="The drafting model.", reload=True)
    num_draft_tokens: int | None = option(
        None, description="Tokens to draft at a time.", minimum=1, unit="tokens", reload=True
    )
    extra_build_args: Mapping[str, Any] = option(
        {}, description="Further options of the build. Refused: the PyTorch flow builds none.", reload=True
    )
    extra_runtime_args: Mapping[str, Any] = option(
        {}, description="Further options of the engine (arguments of its LLM), passed as they are.", reload=True
    )

    def check(self) -> Iterator[Problem]:
        if (self.draft_model is None) != (self.num_draft_tokens is None):
            name = "num_draft_tokens" if self.draft_model is None else "draft_model"
            yield Problem((name,), "has no effect alone: draft_model and num_draft_tokens belong together")
        is_quantized = self.quantization not in (None, "none")
        if not is_quantized and self.calibration != TensorRTCalibrationConfig():
            yield Problem(("calibration",), "has no effect without quantization")
