"""A transformers model: loading it, and the experiments that run on it one after another. Imports torch."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lem.base.errors import OptionRefused
from lem.base.reasons import Reason
from lem.base.variables import TOKEN_VARIABLE
from lem.config.backends import PyTorchConfig
from lem.config.experiment import ExperimentConfig
from lem.engines import common
from lem.engines.checkpoints import (
    Identity,
    Source,
    builder_of,
    count_active_parameters,
    count_embedding_parameters,
    explained,
    hash_weights,
    locate,
    positions_of,
)
from lem.engines.common import section_of
from lem.engines.named import ADAPTER, DRAFTER, NamedModel, named_models
from lem.engines.protocol import Completion, EngineReport, OnProgress, RequestQueue, TokenRequest, say_nothing
from lem.engines.pytorch import options
from lem.engines.pytorch.generation import GENERATION_META, BatchRunner, LoadedModel, describe_effective, try_out
from lem.engines.pytorch.options import EngineFacts, SpecialTokens
from lem.engines.texts import TextSession

# Distributions that can change the numbers, or that an option needs.
_PACKAGES = (
    *("accelerate", "bitsandbytes", "flash-attn", "huggingface-hub", "kernels", "numpy", "optimum-quanto", "peft"),
    *("safetensors", "tokenizers", "torch", "transformers", "triton"),
)
_RECOMPILE_LIMIT = 64


class Session(TextSession):
    def __init__(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> None:
        transformers.utils.logging.disable_progress_bar()
        self._token = secrets.get(TOKEN_VARIABLE) or None
        self._uuids = common.visible_gpus(torch)
        self._facts = _find_facts(config, next(iter(common.pick_gpus(config.gpus, self._uuids)), None))
        options.check(config, self._facts)
        if self._facts.gpu_index is not None:
            torch.cuda.set_device(self._facts.gpu_index)
        self._engine_key = config.engine_key()
        loaded = self._loaded = _load_model(config, self._facts, self._token)
        self._tokenizer, self._known_ids = loaded.tokenizer, _rows(loaded.model)
        _compile(loaded.model, section_of(config, PyTorchConfig), self._facts.device)
        trial_s = self._set_up(config)
        began_ns = time.monotonic_ns()
        parameters = int(loaded.model.num_parameters())
        self._identity = Identity(
            loaded.source.commit,
            hash_weights(loaded.source, loaded.adapter),
            parameters,
            count_embedding_parameters(loaded.model),
            count_active_parameters(loaded.model, parameters),
        )
        hashing_s = common.seconds_since(began_ns)
        self._checks_s = hashing_s if self._compile_s is not None else hashing_s + trial_s

    def configure(self, config: ExperimentConfig) -> None:
        common.check_same_engine(config, self._engine_key)
        options.check(config, self._facts)
        # An experiment must not depend on the one before: on its compiled shapes, fragmented memory or static cache.
        vars(self._loaded.model).pop("_previous_max_cache_length", None)
        free_memory()
        _set_assistant(self._loaded, config, self._facts, self._token)
        self._set_up(config)

    @property
    def report(self) -> EngineReport:
        loaded, gpu_index = self._loaded, self._facts.gpu_index
        idle = (*self._trial_warnings, *options.idle_options(self._config))
        return EngineReport(
            engine_name="transformers",
            engine_version=self._facts.versions["transformers"],
            versions=self._facts.versions,
            device=self._facts.device,
            gpu_uuids=() if gpu_index is None else (self._uuids[gpu_index],),
            effective=describe_effective(self._config, loaded, self._runner.settings, self._cache),
            **vars(self._identity),
            warnings=(*common.idle_gpu(self._config.gpus, self._uuids), *loaded.warnings, *idle),
            compile_s=self._compile_s,
            checks_s=self._checks_s,
            longest_tok=loaded.positions,
        )

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        self._seed(requests)
        batches = [(item,) for item in requests] if observe_tokens else options.plan_batches(requests, self._section)
        completions: list[Completion] = []
        for batch in batches:
            completions += self._runner.run(batch, observe=observe_tokens)
            on_progress(len(completions))
        return completions

    def serve(self, queue: RequestQueue) -> None:
        self._seed(())
        while waiting := queue.take(self._section.batch_size):
            for batch in options.plan_batches(waiting, self._section):
                for completion in self._runner.run(batch, observe=True):
                    queue.complete(completion)

    def synchronize(self) -> None:
        if self._facts.gpu_index is not None:
            torch.cuda.synchronize(self._facts.gpu_index)

    def reset_peak_memory(self) -> None:
        if self._facts.gpu_index is not None:
            torch.cuda.reset_peak_memory_stats(self._facts.gpu_index)

    def peak_memory_b(self) -> int | None:
        """See `Engine`; bytes in tensors, model included."""
        index = self._facts.gpu_index
        return None if index is None else int(torch.cuda.max_memory_allocated(index))

    def close(self) -> None:
        vars(self).clear()  # nothing else holds the weights
        free_memory()

    def _set_up(self, config: ExperimentConfig) -> float:
        self._config = config
        section = self._section = section_of(config, PyTorchConfig)
        settings = options.generation_settings(config, self._loaded.tokens, self._facts.device)
        if options.compiles_steps(section, self._facts.device):
            settings["compile_config"] = transformers.CompileConfig(mode=str(section.torch_compile))
        self._runner = BatchRunner(self._loaded, settings)
        began_ns = time.monotonic_ns()
        self._cache, self._trial_warnings = try_out(self._runner, section, self._facts)
        if config.random_seed is None:
            # PyTorch starts every process with the same seed.
            torch.seed()
        trial_s = common.seconds_since(began_ns)
        self._compile_s = trial_s if section.torch_compile else None
        return trial_s

    def _seed(self, requests: Sequence[TokenRequest]) -> None:
        """Seed by experiment and first request: only the same requests draw the same numbers."""
        if self._config.random_seed is not None:
            torch.manual_seed(self._config.random_seed + (requests[0].index if requests else 0))


def free_memory(failure: BaseException | None = None) -> None:
    """Free what a dropped session held, compiled code included, and the weights that frames of a `failure` hold."""
    while failure is not None:
        traceback.clear_frames(failure.__traceback__)
        failure = failure.__cause__ or failure.__context__
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _find_facts(config: ExperimentConfig, gpu_index: int | None) -> EngineFacts:
    return EngineFacts(
        common.installed_versions(torch, _PACKAGES, has_gpu=gpu_index is not None),
        "cpu" if gpu_index is None else "cuda",
        gpu_index,
        # Asking for them imports the compiler, which takes a second.
        tuple(torch.compiler.list_backends(exclude_tags=())) if section_of(config, PyTorchConfig).torch_compile else (),
        tuple(name for name in vars(GenerationConfig()) if name not in GENERATION_META),
    )


def _compile(model: Any, section: PyTorchConfig, device: str) -> None:
    if not section.torch_compile:
        return
    from torch._dynamo import config as dynamo_config

    # Past its limit of shapes (8) dynamo silently continues uncompiled. Batches of one and of more, with and without
    # padding, prefill and decode are 8 already; beyond a higher limit an experiment fails instead.
    dynamo_config.recompile_limit = _RECOMPILE_LIMIT
    dynamo_config.fail_on_recompile_limit_hit = True
    if not options.compiles_steps(section, device):
        backend = section.torch_compile_backend or "inductor"
        model.forward = torch.compile(model.forward, mode=section.torch_compile, backend=backend)


# --- loading


def _load_model(config: ExperimentConfig, facts: EngineFacts, token: str | None) -> LoadedModel:
    device = torch.device("cpu" if facts.gpu_index is None else f"cuda:{facts.gpu_index}")
    asked = config.model
    source = locate(named_models(config)["model"], token)
    access = {"token": token, "trust_remote_code": asked.trust_remote_code}
    name, revision = (source.name, source.commit) if asked.tokenizer is None else (asked.tokenizer, None)
    with explained(f"model.tokenizer: {asked.tokenizer}" if asked.tokenizer else f"tokenizer of {source.name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **access)
    model, warnings = _load_weights(config, source, device, facts, access)
    tokens, positions, left_out = _special_tokens(model, tokenizer), positions_of(model.config), _own_settings(model)
    loaded = LoadedModel(model, tokenizer, source, device, tokens, positions, left_out, warnings=warnings)
    # A model has its own settings for sampling and length; `generate` would fill every gap from them.
    model.generation_config = GenerationConfig()
    if asked.adapter is not None:
        loaded.adapter = _add_adapter(loaded, named_models(config)[ADAPTER], token)
    _check_dtype(model, config)
    _set_assistant(loaded, config, facts, token)
    return loaded


def _set_assistant(loaded: LoadedModel, config: ExperimentConfig, facts: EngineFacts, token: str | None) -> None:
    name = section_of(config, PyTorchConfig).assisted_generation.model
    if name is None:
        loaded.assistant = loaded.assistant_tokenizer = loaded.assistant_name = None
        return
    if loaded.assistant_name != name:
        source = locate(named_models(config)[DRAFTER], token)
        access = {"token": token, "trust_remote_code": config.model.trust_remote_code, "revision": source.commit}
        arguments = {**access, **_dtype_option(config, facts)}
        with explained(f"assisted_generation.model: {name}"):
            loaded.assistant = AutoModelForCausalLM.from_pretrained(source.name, **arguments).to(loaded.device)
        loaded.assistant_name, loaded.assistant_tokenizer = None, None
        if _rows(loaded.assistant) != _rows(loaded.model):
            with explained(f"assisted_generation.model: {name}"):
                loaded.assistant_tokenizer = AutoTokenizer.from_pretrained(source.name, **access)
        loaded.assistant_name = name
    loaded.assistant.generation_config = GenerationConfig(**options.assistant_settings(config))


def _load_weights(
    config: ExperimentConfig, source: Source, device: torch.device, facts: EngineFacts, access: Mapping[str, Any]
) -> tuple[Any, tuple[Reason, ...]]:
    section = section_of(config, PyTorchConfig)
    arguments = {**access, **_dtype_option(config, facts), **_placement(section, device, facts)}
    model, info = _from_pretrained(section, source, facts, arguments)
    if "device_map" not in arguments:
        with explained(f"model: {source.name}"):
            model = model.to(device)
    model.eval()
    found = getattr(model.config, "_attn_implementation", None)
    if section.attn_implementation not in {None, found}:
        raise OptionRefused(f"pytorch.attn_implementation: {facts} uses {found} for {source.name}")
    missing = sorted(info.get("missing_keys") or ())
    if not missing:
        return model, ()
    return model, (Reason.of("weights_missing", count=len(missing), model=source.name, first=missing[0]),)


def _from_pretrained(section: PyTorchConfig, source: Source, facts: EngineFacts, arguments: Mapping[str, Any]) -> Any:
    access = {name: arguments[name] for name in ("token", "trust_remote_code")}
    with explained(f"model: {source.name}"):
        shape = AutoConfig.from_pretrained(source.name, revision=source.commit, **access)
    builder = builder_of(shape)
    with explained(f"model: {source.name}"):
        try:
            return builder.from_pretrained(source.name, revision=source.commit, output_loading_info=True, **arguments)
        except (ImportError, ValueError) as error:
            if section.attn_implementation is None or "attention" not in str(error).lower():
                raise
            refusal = error
    raise OptionRefused(f"pytorch.attn_implementation: {facts}: {common.shortened(refusal)}") from refusal


def _dtype_option(config: ExperimentConfig, facts: EngineFacts) -> dict[str, Any]:
    # `torch_dtype` until transformers 4.56, `dtype` since.
    return {"dtype" if facts.release >= (4, 56) else "torch_dtype": getattr(torch, config.fp_precision)}


def _placement(section: PyTorchConfig, device: torch.device, facts: EngineFacts) -> dict[str, Any]:
    arguments = common.given_options(section, ("attn_implementation", "low_cpu_mem_usage"))
    if facts.release >= (5, 0):
        arguments.pop("low_cpu_mem_usage", None)
    if section.load_in_4bit or section.load_in_8bit:
        quantization: dict[str, Any] = {"load_in_8bit": True}
        if section.load_in_4bit:
            quantization = {"load_in_4bit": True, **common.given_options(section, options.FOUR_BIT_OPTIONS)}
        arguments["quantization_config"] = transformers.BitsAndBytesConfig(**quantization)
        arguments["device_map"] = {"": device}
    if section.max_memory is not None:
        limits = {("cpu" if key == "cpu" else int(key)): value for key, value in section.max_memory.items()}
        limits.setdefault(device.index, torch.cuda.mem_get_info(device)[1])
        arguments |= {"max_memory": limits, "device_map": "auto"}
    return arguments


def _add_adapter(loaded: LoadedModel, named: NamedModel, token: str | None) -> Source:
    source, name = locate(named, token), named.name
    with explained(f"model.adapter: {name}"):
        info = loaded.model.load_adapter(source.name, adapter_kwargs={"token": token, "revision": source.commit})
    mismatched = sorted({*(getattr(info, "missing_keys", None) or ()), *(getattr(info, "unexpected_keys", None) or ())})
    if mismatched:
        differing = f"{len(mismatched)} weights differ, {mismatched[0]} first"
        text = f"model.adapter: {name} does not match {loaded.source.name}: {differing}"
        raise common.model_error(text, "use the model that the adapter was trained on")
    loaded.model.eval()
    return source


def _check_dtype(model: Any, config: ExperimentConfig) -> None:
    """Most weights must have the requested precision; a model may keep a few in float32."""
    if getattr(model, "hf_quantizer", None) is not None:
        return
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    most = counts.most_common(1)[0][0]
    if most != getattr(torch, config.fp_precision):
        raise OptionRefused(f"fp_precision: {config.fp_precision}: the weights were loaded as {most}")


def _special_tokens(model: Any, tokenizer: Any) -> SpecialTokens:
    ends = model.generation_config.eos_token_id
    for other in (getattr(model.config, "eos_token_id", None), tokenizer.eos_token_id):
        ends = other if ends is None else ends
    end_ids = tuple(ends) if isinstance(ends, (list, tuple)) else () if ends is None else (int(ends),)
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *end_ids, 0)
    usable = [token for token in candidates if token is not None and 0 <= token < _rows(model)]
    # In a prompt, an id that also ends a sequence could be mistaken for its end.
    pad_id = next((token for token in usable if token not in end_ids), usable[0])
    return SpecialTokens(pad_id, end_ids)


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _own_settings(model: Any) -> dict[str, Any]:
    try:
        values: dict[str, Any] = model.generation_config.to_diff_dict()
    except (AttributeError, ValueError) as error:
        text = f"the model's generation config cannot be read: {common.shortened(error)}"
        raise common.model_error(text) from error
    known = {"bos_token_id", "eos_token_id", "pad_token_id", *GENERATION_META}
    return {name: value for name, value in values.items() if name not in known}
