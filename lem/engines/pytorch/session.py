"""A loaded transformers model: batches of prompts in, timed tokens out."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from lem.base.variables import TOKEN_VARIABLE
from lem.config.backends import PyTorchConfig
from lem.config.experiment import ExperimentConfig
from lem.engines.checkpoints import WEIGHT_FAILURES, count_embedding_parameters, explained, hash_weights
from lem.engines.common import (
    check_ids,
    check_same_engine,
    describe_decoder,
    idle_gpu,
    installed_versions,
    pick_gpu,
    plain,
    seconds_since,
    visible_gpus,
)
from lem.engines.protocol import Completion, EngineReport, OnProgress, RequestQueue, TokenRequest, say_nothing
from lem.engines.pytorch.generation import BatchRunner, Trial, engine_settings, try_out
from lem.engines.pytorch.loading import LoadedModel, load_model, set_assistant
from lem.engines.pytorch.options import (
    EngineFacts,
    batch_rules,
    check_options,
    compiles_steps,
    generation_settings,
    idle_options,
    plan_batches,
    section_of,
)

# Distributions that can change the numbers, or that an option needs.
_PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "flash-attn",
    "huggingface-hub",
    "kernels",
    "numpy",
    "optimum-quanto",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
)
# Fields of GenerationConfig that say nothing about how tokens are generated.
GENERATION_META = ("transformers_version", "_from_model_config")


def find_versions() -> dict[str, str]:
    """The versions of the packages that are installed, by distribution."""
    return {**installed_versions(_PACKAGES), "torch": str(torch.__version__)}


def describe_effective(
    config: ExperimentConfig, loaded: LoadedModel, settings: Mapping[str, Any], trial: Trial
) -> dict[str, Any]:
    """The engine configuration as it is, as JSON values: the options as they took effect, then the rest."""
    generation = _generation(settings, config)
    model = loaded.model
    return {
        "pytorch": _section(section_of(config), loaded, generation, trial),
        "decoder": describe_decoder(config.decoder, generation, is_sampling=bool(generation["do_sample"])),
        "fp_precision": str(model.dtype).removeprefix("torch."),
        "ignore_eos": config.ignore_eos or not loaded.tokens.end_ids,
        "random_seed": config.random_seed,
        "generation": generation,
        "generation_left_out": dict(loaded.left_out),
        "model_class": type(model).__name__,
        "attention": getattr(model.config, "_attn_implementation", None),
        "device_map": {str(key): str(value) for key, value in (getattr(model, "hf_device_map", None) or {}).items()},
        "eos_token_ids": list(loaded.tokens.end_ids),
        "pad_token_id": loaded.tokens.pad_id,
        "positions": loaded.positions,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }


def _generation(settings: Mapping[str, Any], config: ExperimentConfig) -> dict[str, Any]:
    """Every field of the generation config that is in effect, the defaults of transformers included."""
    given = engine_settings(settings, config.max_output_tokens, config.min_output_tokens).to_dict()
    defaults: dict[str, Any] = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    both = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    # The lengths of a batch follow from max_new_tokens and its prompts; how steps are compiled is in the section.
    skipped = {*GENERATION_META, "max_length", "min_length", "compile_config"}
    return {name: value for name, value in sorted(both.items()) if value is not None and name not in skipped}


def _section(
    section: PyTorchConfig, loaded: LoadedModel, generation: Mapping[str, Any], trial: Trial
) -> dict[str, Any]:
    model = loaded.model
    is_4bit = bool(getattr(model, "is_loaded_in_4bit", False))
    quantization = getattr(model.config, "quantization_config", None) if is_4bit else None
    assistant = loaded.assistant.generation_config if loaded.assistant is not None else None
    has_beams = generation["num_beams"] > 1
    return {
        **section.to_dict(),
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "torch_compile_backend": (section.torch_compile_backend or "inductor") if section.torch_compile else None,
        "use_cache": trial.cache is not None,
        "cache_implementation": trial.cache,
        # Since transformers 5 the only way there is.
        "low_cpu_mem_usage": True if section.low_cpu_mem_usage is None else section.low_cpu_mem_usage,
        "load_in_4bit": is_4bit,
        "load_in_8bit": bool(getattr(model, "is_loaded_in_8bit", False)),
        **{
            name: plain(getattr(quantization, name, None))
            for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        },
        "min_p": generation.get("min_p"),
        "no_repeat_ngram_size": generation["no_repeat_ngram_size"],
        "beam_search": {
            "enabled": has_beams,
            "num_beams": generation["num_beams"],
            "length_penalty": generation["length_penalty"] if has_beams else None,
            "early_stopping": generation["early_stopping"] if has_beams else None,
        },
        "assisted_generation": {
            "model": loaded.assistant_name,
            "num_tokens": getattr(assistant, "num_assistant_tokens", None)
            or generation.get("prompt_lookup_num_tokens")
            or (generation["num_assistant_tokens"] if assistant is not None else None),
        },
    }


RECOMPILE_LIMIT = 64


class Session:
    """A loaded model with the experiment that is set up on it."""

    def __init__(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> None:
        """Load.

        Raises:
            OptionRefused, EngineError: as for `Engine`.
        """
        transformers.utils.logging.disable_progress_bar()
        self._token = secrets.get(TOKEN_VARIABLE) or None
        self._uuids = visible_gpus(torch)
        self._facts = self._find_facts(config)
        check_options(config, self._facts)
        if self._facts.gpu_index is not None:
            torch.cuda.set_device(self._facts.gpu_index)
        self._engine_key = config.engine_key()
        self._loaded = load_model(config, self._facts, self._token)
        self._compile(config)
        trial_s = self._set_up(config)
        self._compile_s = trial_s if section_of(config).torch_compile else None
        began_ns = time.monotonic_ns()
        folder, adapter = self._loaded.source.folder, self._loaded.adapter
        with explained(f"weights of {config.model.name}", WEIGHT_FAILURES):
            self._weights_sha256 = hash_weights(folder, None if adapter is None else adapter.folder)
        hashing_s = seconds_since(began_ns)
        self._checks_s = hashing_s if self._compile_s is not None else hashing_s + trial_s

    def configure(self, config: ExperimentConfig) -> None:
        """Set another experiment up on the same model.

        Raises:
            OptionRefused: as for `Engine`.
        """
        check_same_engine(config, self._engine_key)
        check_options(config, self._facts)
        # What an experiment finds must not depend on the one before: neither the shapes it compiled for, nor the
        # memory it left cut up, nor the length of its static cache, which transformers goes on using.
        vars(self._loaded.model).pop("_previous_max_cache_length", None)
        free_memory()
        set_assistant(self._loaded, config, self._facts, self._token)
        trial_s = self._set_up(config)
        self._compile_s = trial_s if section_of(config).torch_compile else None

    @property
    def report(self) -> EngineReport:
        """What is loaded and in effect."""
        loaded, gpu_index = self._loaded, self._facts.gpu_index
        versions = dict(self._facts.versions)
        if gpu_index is not None:
            versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        return EngineReport(
            engine_name="transformers",
            engine_version=versions["transformers"],
            versions=versions,
            device=self._facts.device,
            gpu_uuids=() if gpu_index is None else (self._uuids[gpu_index],),
            effective=describe_effective(self._config, loaded, self._runner.settings, self._trial),
            model_revision=loaded.source.commit,
            weights_sha256=self._weights_sha256,
            model_parameters=int(loaded.model.num_parameters()),
            embedding_parameters=count_embedding_parameters(
                loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
            ),
            warnings=(
                *idle_gpu(self._config.gpus, self._uuids),
                *loaded.warnings,
                *self._trial.warnings,
                *idle_options(self._config),
            ),
            compile_s=self._compile_s,
            checks_s=self._checks_s,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids as the tokenizer makes them, special ones included."""
        ids: list[int] = self._loaded.tokenizer.encode(text, verbose=False)
        return check_ids(ids, int(self._loaded.model.get_input_embeddings().weight.shape[0]))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special ones left out."""
        text: str = self._loaded.tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        """A completion for each request."""
        self._seed(requests)
        batches = [(request,) for request in requests] if observe_tokens else plan_batches(requests, self._rules)
        completions: list[Completion] = []
        for batch in batches:
            completions += self._runner.run(batch, observe=observe_tokens)
            on_progress(len(completions))
        return completions

    def serve(self, queue: RequestQueue) -> None:
        """Work the queue off, as many requests at a time as there are and a batch holds."""
        self._seed(())
        while waiting := queue.take(self._rules.batch_size):
            for batch in plan_batches(waiting, self._rules):
                for completion in self._runner.run(batch, observe=True):
                    queue.complete(completion)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._facts.gpu_index is not None:
            torch.cuda.synchronize(self._facts.gpu_index)

    def reset_peak_memory(self) -> None:
        """Start a new peak."""
        if self._facts.gpu_index is not None:
            torch.cuda.reset_peak_memory_stats(self._facts.gpu_index)

    def peak_memory_b(self) -> int | None:
        """Bytes in tensors at the peak, model included; None on the CPU."""
        if self._facts.gpu_index is None:
            return None
        return int(torch.cuda.max_memory_allocated(self._facts.gpu_index))

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        vars(self).clear()
        free_memory()

    def _find_facts(self, config: ExperimentConfig) -> EngineFacts:
        gpu_index = pick_gpu(config.gpus, self._uuids)
        return EngineFacts(
            find_versions(),
            "cpu" if gpu_index is None else "cuda",
            gpu_index,
            # Asking for them imports the compiler, which takes a second.
            tuple(torch.compiler.list_backends(exclude_tags=())) if section_of(config).torch_compile else (),
            tuple(name for name in vars(GenerationConfig()) if name not in GENERATION_META),
        )

    def _compile(self, config: ExperimentConfig) -> None:
        section = section_of(config)
        if not section.torch_compile:
            return
        from torch._dynamo import config as dynamo_config

        # Past its limit of shapes (8) dynamo goes on uncompiled without a word. Batches of one and of more, with and
        # without padding, prefill and decode are 8 already; beyond a higher limit an experiment fails instead.
        dynamo_config.recompile_limit = RECOMPILE_LIMIT
        dynamo_config.fail_on_recompile_limit_hit = True
        if compiles_steps(section, self._facts.device):
            return
        backend = section.torch_compile_backend or "inductor"
        forward = self._loaded.model.forward
        self._loaded.model.forward = torch.compile(forward, mode=section.torch_compile, backend=backend)

    def _set_up(self, config: ExperimentConfig) -> float:
        """Seconds the trial took."""
        section = section_of(config)
        self._config = config
        self._rules = batch_rules(config)
        settings = generation_settings(config, self._loaded.tokens, self._facts.device)
        if compiles_steps(section, self._facts.device):
            settings["compile_config"] = transformers.CompileConfig(mode=str(section.torch_compile))
        self._runner = BatchRunner(self._loaded, settings)
        began_ns = time.monotonic_ns()
        self._trial: Trial = try_out(self._runner, section, self._facts)
        if config.random_seed is None:
            # PyTorch starts every process with the same seed.
            torch.seed()
        return seconds_since(began_ns)

    def _seed(self, requests: Sequence[TokenRequest]) -> None:
        """Seed by the experiment and the first request: the same requests draw the same numbers, others do not."""
        if self._config.random_seed is not None:
            torch.manual_seed(self._config.random_seed + (requests[0].index if requests else 0))


def free_memory(failure: BaseException | None = None) -> None:
    """Give back what a dropped session held, compiled code included.

    Args:
        failure: what kept a session from being made; the frames of its traceback still hold the weights.
    """
    while failure is not None:
        traceback.clear_frames(failure.__traceback__)
        failure = failure.__cause__ or failure.__context__
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
