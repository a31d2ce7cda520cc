"""What a configuration names for its engine to find: models, tokenizers and adapters, in folders or on the hub."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from urllib.parse import urlsplit

from lem.base import durable
from lem.base.dataclass import dataclass
from lem.base.errors import EngineError, OptionRefused
from lem.config.backends import ServerConfig
from lem.config.experiment import ExperimentConfig
from lem.engines.common import look_up, model_error

TOKENIZER, ADAPTER, DRAFTER = "tokenizer", "adapter", "drafter"
_CONNECT_S = 5.0


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
    # A server finds its model itself.
    wanted = (TOKENIZER,) if config.backend == "server" else tuple(found)
    return {what: item for what, item in found.items() if item.name and what in wanted}


def address_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def find_server_problem(config: ExperimentConfig) -> EngineError | None:
    """Why a server cannot be started here, or is not there; None also where a service is the server."""
    section = config.section
    if not isinstance(section, ServerConfig):
        return None
    if section.command is not None:
        program = section.command[0]
        if shutil.which(program, path=section.env.get("PATH")) is not None:
            return None
        hint = "install it, put its folder on PATH, or name server.service, in whose container it is"
        return EngineError(f"server.command: {program}: no such program", hint, kind="option", is_permanent=True)
    if section.url is None:
        return None
    try:
        socket.create_connection(address_of(section.url), _CONNECT_S).close()
    except OSError as error:
        text = f"server.url: {section.url} does not answer: {error.strerror or error}"
        return EngineError(
            text, "start the server, or let lem start it: server.command", kind="model", is_permanent=True
        )
    return None
