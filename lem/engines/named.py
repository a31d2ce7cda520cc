"""What a configuration names for its engine to find: models, tokenizers and adapters, in folders or on the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lem.base import durable
from lem.base.errors import OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.engines.common import look_up, model_error

TOKENIZER, ADAPTER, DRAFTER = "tokenizer", "adapter", "drafter"


@dataclass(frozen=True)
class NamedModel:
    """A model, tokenizer or adapter that a configuration names, in a folder or on the hub."""

    option: str
    name: str
    marker: str  # the file that shows that it is there; "" where any file may do
    revision: str | None = None

    def find_folder(self) -> Path | None:
        """The folder, None if on the hub; EngineError without a model in it, OptionRefused for its revision."""
        folder = durable.in_home(self.name)
        if not os.path.isdir(folder):  # noqa: PTH112 - False also for a name too long
            if self.name.startswith(("/", ".", "~")) or self.name.count("/") > 1:
                raise model_error(f"{self.option}: no such folder: {folder}", f"relative paths start at {Path.cwd()}")
            return None
        if self.marker and not (folder / self.marker).is_file():
            text = f"{self.option}: {folder} has no {self.marker}"
            raise model_error(text, "use a `save_pretrained` folder, or a hub model")
        if self.revision is not None:
            raise OptionRefused(f"model.revision: {self.revision}: not supported for a folder ({folder})")
        return folder


# The option that names a model beside the main one, which drafts tokens.
_DRAFTERS = {"pytorch": "assisted_generation.model", "vllm": "speculative.model", "tensorrt": "draft_model"}


def named_models(config: ExperimentConfig) -> dict[str, NamedModel]:
    """What the engine of a configuration has to find: `model`, and TOKENIZER, ADAPTER and DRAFTER if it has them."""
    model, option = config.model, _DRAFTERS.get(config.backend, "")
    # transformers also reads a tokenizer without this file, which the other engines need.
    tokenizer = "" if config.backend == "pytorch" else "tokenizer_config.json"
    found = {
        "model": NamedModel("model", model.name or "", "config.json", model.revision),
        TOKENIZER: NamedModel("model.tokenizer", model.tokenizer or "", tokenizer),
        ADAPTER: NamedModel("model.adapter", model.adapter or "", "adapter_config.json"),
        DRAFTER: NamedModel(f"{config.backend}.{option}", look_up(config.section, option) or "", "config.json"),
    }
    return {what: item for what, item in found.items() if item.name}
