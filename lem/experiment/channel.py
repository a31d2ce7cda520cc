"""The worker channel: JSON lines between the host and a worker, one object a line, versioned by `hello`.

Host to worker: `run`, `unload`, `quit`; end of file means quit.
Worker to host: `hello`, `phase`, `progress`, `heartbeat`, `result`, `error`, `unloaded`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PHASES", "PROTOCOL_VERSION", "ChannelError", "RunRequest", "decode_line", "encode_line"]

PROTOCOL_VERSION = 1

# In order; `load` is skipped when the engine is reused.
PHASES = ("prepare", "load", "idle", "warmup", "window", "cooldown", "write")

# A line longer than this is garbage, not a message; prompts travel as files.
MAX_LINE_B = 8 * 1024 * 1024


class ChannelError(ValueError):
    """A line that is not a message of this protocol."""


@dataclass(frozen=True)
class RunRequest:
    """What the worker needs to run one attempt. The result folder exists and holds `config.json`.

    Attributes:
        config: the resolved experiment (`ExperimentConfig.to_dict`).
        identity: fields of `record.Identity` that the host knows (all but start_utc and lem_version).
        result_dir: absolute path as the worker sees it.
        engine_key: hash of the options that need a reload.
        keep_engine: leave the engine loaded afterwards.
        gap_s, gap_end_reason: the gap that came before, for the record.
        executor: `local` or `docker`.
        image: image id of the container; None without one.
        secrets: {"HF_TOKEN": …}; never on argv, never in a file.
    """

    config: Mapping[str, Any]
    identity: Mapping[str, Any]
    result_dir: str
    engine_key: str
    keep_engine: bool
    gap_s: float | None = None
    gap_end_reason: str | None = None
    executor: str = "local"
    image: str | None = None
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    def to_message(self) -> dict[str, Any]:
        """The `run` message."""
        return {"type": "run", **dataclasses.asdict(self)}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> RunRequest:
        """The request in a `run` message.

        Raises:
            ChannelError: a field is missing or unknown.
        """
        fields = {key: value for key, value in message.items() if key != "type"}
        try:
            return cls(**fields)
        except TypeError as error:
            raise ChannelError(f"run: {error}") from error


def encode_line(message: Mapping[str, Any]) -> bytes:
    """The message as one line."""
    return json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8") + b"\n"


def decode_line(line: bytes) -> dict[str, Any]:
    """The message in one line.

    Raises:
        ChannelError: not a JSON object with a `type`.
    """
    try:
        message = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise ChannelError(f"not a message: {line[:120]!r}") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ChannelError(f"not a message: {line[:120]!r}")
    return message
