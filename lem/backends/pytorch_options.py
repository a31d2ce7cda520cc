"""What an experiment asks of transformers, in the words of `generate`; imports no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lem.backends.pytorch_batching import BatchRules
from lem.config.backend_config import PyTorchConfig
from lem.config.experiment_config import ExperimentConfig
from lem.reasons import Reason

__all__ = [
    "ASSISTANT_ARGUMENTS",
    "CUDA_GRAPH_MODES",
    "EngineFacts",
    "SpecialTokens",
    "assistant_settings",
    "batch_rules",
    "compiles_steps",
    "generation_settings",
    "idle_options",
    "is_assisted",
    "section_of",
]

# Arguments that transformers reads from the assistant's own generation config and nowhere else.
ASSISTANT_ARGUMENTS = (
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
)

# Modes of torch.compile that record CUDA graphs where there is a GPU (its reference, torch.compile, mode).
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class EngineFacts:
    """What was found.

    Attributes:
        versions: of the packages that matter, by distribution: `transformers`, `torch`, `accelerate`, …
        device: `cpu` or `cuda`.
        gpu_index: the CUDA device in use.
        compile_backends: names that torch.compile takes.
        generate_arguments: names of the fields of GenerationConfig.
    """

    versions: Mapping[str, str]
    device: str
    gpu_index: int | None = None
    compile_backends: tuple[str, ...] = ()
    generate_arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"transformers {self.versions['transformers']} with torch {self.versions['torch']} on {self.device}"

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor number of transformers."""
        major, minor = self.versions["transformers"].split(".")[:2]
        return int(major), int(minor)

    def lacks(self, *packages: str) -> str | None:
        """What must be installed; None when it is."""
        missing = [name for name in packages if name not in self.versions]
        return f"needs {' and '.join(missing)} (pip install {' '.join(missing)})" if missing else None


@dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning. `end_ids` end a sequence; padding is masked, so its id only fills the rectangle."""

    pad_id: int
    end_ids: tuple[int, ...]


def section_of(config: ExperimentConfig) -> PyTorchConfig:
    """The options of this backend, defaults where the experiment gives none."""
    section = config.section
    if not isinstance(section, PyTorchConfig):
        raise TypeError(f"an experiment of the backend {config.backend} came to pytorch")
    return section


def is_assisted(section: PyTorchConfig) -> bool:
    """Whether tokens are drafted, by an assistant or from n-grams of the prompt, before the model checks them."""
    return section.assisted_generation.model is not None or section.assisted_generation.num_tokens is not None


def idle_options(config: ExperimentConfig) -> tuple[Reason, ...]:
    """What the experiment asks for in vain; the rules across fields tell of the decoder's own values."""
    if section_of(config).min_p is not None and config.decoder.is_greedy:
        return (Reason.of("min_p_unused", backend="pytorch"),)
    return ()


def batch_rules(config: ExperimentConfig) -> BatchRules:
    """How the requests of this experiment are put together."""
    section = section_of(config)
    return BatchRules(
        section.batching_strategy,
        section.batch_size,
        section.max_tokens_per_batch,
        # A beam search has one bound for all its rows; other ways of decoding can end each row at its own.
        has_one_bound=section.beam_search.enabled,
    )


def compiles_steps(section: PyTorchConfig, device: str) -> bool:
    """Whether transformers compiles the steps that follow the prompt, instead of lem the whole model.

    CUDA graphs replay on tensors that stay where they are. A whole model makes its cache within the first of its
    graphs, and the next one writes over it: torch 2.11 says so and stops.
    """
    return device != "cpu" and section.torch_compile in CUDA_GRAPH_MODES


def generation_settings(config: ExperimentConfig, tokens: SpecialTokens, device: str) -> dict[str, Any]:
    """Arguments of GenerationConfig without the bounds on the output, which come with the requests.

    Nothing is left to the generation config that a model brings along: what is not named here has the default of
    transformers.
    """
    section, decoder = section_of(config), config.decoder
    settings: dict[str, Any] = {
        "do_sample": not config.decoder.is_greedy,
        "repetition_penalty": decoder.repetition_penalty,
        "pad_token_id": tokens.pad_id,
        "eos_token_id": None if config.ignore_eos or not tokens.end_ids else list(tokens.end_ids),
        "use_cache": section.use_cache,
        "cache_implementation": section.cache_implementation,
        "no_repeat_ngram_size": section.no_repeat_ngram_size,
    }
    if settings["do_sample"]:
        settings |= {name: getattr(decoder, name) for name in ("temperature", "top_k", "top_p")}
        settings["min_p"] = section.min_p
    if section.beam_search.enabled:
        settings |= {
            name: getattr(section.beam_search, name) for name in ("num_beams", "length_penalty", "early_stopping")
        }
    if section.torch_compile and not compiles_steps(section, device):
        # With a static cache on a GPU transformers would compile once more, in a mode of its own.
        settings["disable_compile"] = True
    if section.assisted_generation.model is None:
        settings["prompt_lookup_num_tokens"] = section.assisted_generation.num_tokens
    settings |= {name: value for name, value in _extra(section).items() if name not in ASSISTANT_ARGUMENTS}
    return {name: value for name, value in settings.items() if value is not None}


def assistant_settings(section: PyTorchConfig) -> dict[str, Any]:
    """Arguments of the GenerationConfig of an assistant.

    With `num_tokens` the assistant drafts exactly so many tokens at each step: no schedule changes their number, and
    it does not stop early when it is unsure of itself (transformers' own threshold is 0.4).
    """
    settings: dict[str, Any] = {}
    if section.assisted_generation.num_tokens is not None:
        settings = {
            "num_assistant_tokens": section.assisted_generation.num_tokens,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0.0,
        }
    return settings | {name: value for name, value in _extra(section).items() if name in ASSISTANT_ARGUMENTS}


def _extra(section: PyTorchConfig) -> dict[str, Any]:
    """The extra arguments as JSON has them: a section freezes lists into tuples, which transformers does not take."""
    extra: dict[str, Any] = section.to_dict()["extra"]
    return extra
