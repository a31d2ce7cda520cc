"""Load model, tokenizer, adapter and assistant as an experiment asks, and refuse what came out otherwise.

Imports torch and transformers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lem.base.errors import EngineError, OptionRefused
from lem.base.reasons import Reason
from lem.config.backends import PyTorchConfig
from lem.config.experiment import ExperimentConfig
from lem.engines.checkpoints import Source, explained, locate
from lem.engines.common import shortened
from lem.engines.pytorch.options import EngineFacts, SpecialTokens, assistant_settings, section_of


@dataclass
class LoadedModel:
    """What is in memory.

    Attributes:
        source, adapter: where the weights came from.
        device: where inputs go.
        tokens: the special ids.
        positions: the longest sequence the model has positions for; None when it does not say.
        left_out: the values of the model's own generation config that are not used.
        assistant, assistant_name, assistant_tokenizer: of assisted generation; the tokenizer only where it differs.
        warnings: what a person should know about the weights.
    """

    model: Any
    tokenizer: Any
    source: Source
    device: torch.device
    tokens: SpecialTokens
    positions: int | None
    left_out: Mapping[str, Any]
    adapter: Source | None = None
    assistant: Any = None
    assistant_name: str | None = None
    assistant_tokenizer: Any = None
    warnings: tuple[Reason, ...] = ()


def load_model(config: ExperimentConfig, facts: EngineFacts, token: str | None) -> LoadedModel:
    """Everything in memory, on its device, ready to generate.

    Raises:
        EngineError: kinds `model` and `out_of_memory`.
        OptionRefused: the model came out otherwise than asked for.
    """
    device = torch.device("cpu" if facts.gpu_index is None else f"cuda:{facts.gpu_index}")
    wanted = config.model
    source = locate(wanted.name, marker="config.json", revision=wanted.revision, token=token, option="model")
    access = {"token": token, "trust_remote_code": wanted.trust_remote_code}
    tokenizer = _load_tokenizer(config, source, access)
    model, warnings = _load_weights(config, source, device, facts, access)
    loaded = LoadedModel(
        model, tokenizer, source, device, _special_tokens(model, tokenizer), _positions(model), _own_settings(model)
    )
    loaded.warnings = warnings
    # A model brings settings of its own for sampling and length; `generate` fills every gap from them.
    model.generation_config = GenerationConfig()
    if wanted.adapter is not None:
        loaded.adapter = _add_adapter(loaded, wanted.adapter, token)
    _check_dtype(model, config)
    set_assistant(loaded, config, facts, token)
    return loaded


def set_assistant(loaded: LoadedModel, config: ExperimentConfig, facts: EngineFacts, token: str | None) -> None:
    """Load the assistant the experiment names, or give up the one that is there.

    Raises:
        EngineError: kinds `model` and `out_of_memory`.
    """
    section = section_of(config)
    name = section.assisted_generation.model
    if name is None:
        loaded.assistant = loaded.assistant_tokenizer = loaded.assistant_name = None
        return
    if loaded.assistant is None or loaded.assistant_name != name:
        source = locate(name, marker="config.json", revision=None, token=token, option="assisted_generation.model")
        is_trusted = config.model.trust_remote_code
        access = {"token": token, "trust_remote_code": is_trusted, "revision": source.commit}
        options = {**access, **_dtype_option(config, facts)}
        with explained(f"assisted_generation.model: {name}"):
            loaded.assistant = AutoModelForCausalLM.from_pretrained(source.name, **options).to(loaded.device)
        loaded.assistant_name, loaded.assistant_tokenizer = None, None
        if _rows(loaded.assistant) != _rows(loaded.model):
            with explained(f"assisted_generation.model: {name}"):
                loaded.assistant_tokenizer = AutoTokenizer.from_pretrained(source.name, **access)
        loaded.assistant_name = name
    loaded.assistant.generation_config = GenerationConfig(**assistant_settings(section))


def _load_tokenizer(config: ExperimentConfig, source: Source, access: Mapping[str, Any]) -> Any:
    own = config.model.tokenizer
    name, revision = (source.name, source.commit) if own is None else (own, None)
    with explained(f"model.tokenizer: {own}" if own else f"tokenizer of {source.name}"):
        return AutoTokenizer.from_pretrained(name, revision=revision, **access)


def _load_weights(
    config: ExperimentConfig, source: Source, device: torch.device, facts: EngineFacts, access: Mapping[str, Any]
) -> tuple[Any, tuple[Reason, ...]]:
    section = section_of(config)
    options = {**access, **_dtype_option(config, facts), **_placement_options(section, device, facts)}
    model, info = _from_pretrained(section, source, facts, options)
    if "device_map" not in options:
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


def _from_pretrained(section: PyTorchConfig, source: Source, facts: EngineFacts, options: Mapping[str, Any]) -> Any:
    """The model, and what transformers says about its load."""
    with explained(f"model: {source.name}"):
        try:
            return AutoModelForCausalLM.from_pretrained(
                source.name, revision=source.commit, output_loading_info=True, **options
            )
        except (ImportError, ValueError) as error:
            if section.attn_implementation is None or "attention" not in str(error).lower():
                raise
            refusal = error
    raise OptionRefused(f"pytorch.attn_implementation: {facts}: {shortened(refusal)}") from refusal


def _dtype_option(config: ExperimentConfig, facts: EngineFacts) -> dict[str, Any]:
    # `torch_dtype` until transformers 4.56, `dtype` since.
    return {"dtype" if facts.release >= (4, 56) else "torch_dtype": getattr(torch, config.fp_precision)}


def _placement_options(section: PyTorchConfig, device: torch.device, facts: EngineFacts) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    if section.low_cpu_mem_usage is not None and facts.release < (5, 0):
        options["low_cpu_mem_usage"] = section.low_cpu_mem_usage
    if section.load_in_4bit or section.load_in_8bit:
        options |= {"quantization_config": _quantization(section), "device_map": {"": device}}
    if section.max_memory is not None:
        limits = {("cpu" if key == "cpu" else int(key)): value for key, value in section.max_memory.items()}
        limits.setdefault(device.index, torch.cuda.mem_get_info(device)[1])
        options |= {"max_memory": limits, "device_map": "auto"}
    return options


def _quantization(section: PyTorchConfig) -> Any:
    options: dict[str, Any] = {"load_in_8bit": True}
    if section.load_in_4bit:
        names = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        options = {name: getattr(section, name) for name in names if getattr(section, name) is not None}
        options["load_in_4bit"] = True
    return transformers.BitsAndBytesConfig(**options)


def _add_adapter(loaded: LoadedModel, name: str, token: str | None) -> Source:
    source = locate(name, marker="adapter_config.json", revision=None, token=token, option="model.adapter")
    with explained(f"model.adapter: {name}"):
        info = loaded.model.load_adapter(source.name, adapter_kwargs={"token": token, "revision": source.commit})
    strays = sorted({*(getattr(info, "missing_keys", None) or ()), *(getattr(info, "unexpected_keys", None) or ())})
    if strays:
        raise EngineError(
            f"model.adapter: {name} does not fit {loaded.source.name}: {len(strays)} weights, among them {strays[0]}",
            "name the model that the adapter was trained on",
            kind="model",
            is_permanent=True,
        )
    loaded.model.eval()
    return source


def _check_dtype(model: Any, config: ExperimentConfig) -> None:
    """Most weights must have the precision asked for; a model may keep a few in float32."""
    if getattr(model, "hf_quantizer", None) is not None:
        return
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    most = counts.most_common(1)[0][0]
    if most != getattr(torch, config.fp_precision):
        raise OptionRefused(f"fp_precision: {config.fp_precision}: the weights came out as {most}")


def _special_tokens(model: Any, tokenizer: Any) -> SpecialTokens:
    ends = model.generation_config.eos_token_id
    for other in (getattr(model.config, "eos_token_id", None), tokenizer.eos_token_id):
        ends = other if ends is None else ends
    end_ids = tuple(ends) if isinstance(ends, (list, tuple)) else () if ends is None else (int(ends),)
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *end_ids, 0)
    usable = [token for token in candidates if token is not None and 0 <= token < _rows(model)]
    # An id that also ends a sequence would be taken for an end by what looks back at the prompt.
    pad_id = next((token for token in usable if token not in end_ids), usable[0])
    return SpecialTokens(pad_id, end_ids)


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _positions(model: Any) -> int | None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    positions = getattr(config, "max_position_embeddings", None)
    return int(positions) if isinstance(positions, int) and positions > 0 else None


def _own_settings(model: Any) -> dict[str, Any]:
    """What the model's generation config sets beside special tokens, as JSON values."""
    try:
        values: dict[str, Any] = model.generation_config.to_diff_dict()
    except (AttributeError, ValueError) as error:
        raise EngineError(f"the model's generation config cannot be read: {shortened(error)}", kind="model") from error
    known = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
    return {name: value for name, value in values.items() if name not in known}
