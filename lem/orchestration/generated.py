"""The files of experiments that have none of their own, so that each can be looked at and run alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lem import durable
from lem.config.scalars import Expanded, simple
from lem.durable import json_text, make_folder
from lem.errors import UserError
from lem.orchestration.plan import CampaignExperiment

__all__ = ["encode_config", "write_configs"]


def write_configs(configurations: Iterable[CampaignExperiment]) -> int:
    """How many files were written; one that is there already and says the same is left alone.

    Args:
        configurations: as `Plan.configurations`; those with a file of their own are passed over.

    Raises:
        UserError: the folder is not writable or full.
    """
    written = 0
    for item in configurations:
        if item.is_generated:
            path = Path(item.config_path)
            content = encode_config({**item.config_dict, "config_name": item.config_name})
            try:
                written += _write(path, content)
            except OSError as error:
                raise UserError(
                    f"cannot write {path}: {error.strerror}", "make the folder writable, or set io.configs_dir"
                ) from error
    return written


def encode_config(config_dict: Mapping[str, Any]) -> str:
    """The configuration as JSON, which is YAML too; `${VAR}` as it was written, so that no secret lands in a file."""
    return json_text(_as_yaml(config_dict))


def _write(path: Path, content: str) -> bool:
    data = durable.utf8(content)
    try:
        if path.read_bytes() == data:
            return False
    except FileNotFoundError:
        make_folder(path.parent)
    # What a power cut spoils is another file the next time, and written anew; syncing 10,000 took 12 s.
    durable.write_bytes(path, data, is_synced=False)
    return True


def _as_yaml(value: Any) -> Any:
    """The value so that reading it gives the same again."""
    if isinstance(value, Mapping):
        return {key: _as_yaml(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_yaml(item) for item in value]
    if isinstance(value, Expanded):
        # In quotes a reference is text; one that stood for a number or a truth value is written as that.
        plain = simple(value)
        return value.written if isinstance(plain, str) else plain
    return value.replace("${", "$${") if isinstance(value, str) else value
