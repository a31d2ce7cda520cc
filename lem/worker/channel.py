"""The channel between host and worker, and the log that keeps the engine's own output."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, NoneType
from typing import Any

from lem.base.codec import shown
from lem.base.units import KIB, MIB

PROTOCOL_VERSION = 1

# In order; `load` is skipped when the engine is reused.
PHASES = ("prepare", "load", "idle", "warmup", "window", "cooldown", "write")

# The phases that `load_timeout_seconds` bounds; `experiment_timeout_seconds` bounds the rest.
LOAD_PHASE = "load"
LOADING_PHASES = ("prepare", LOAD_PHASE)

# A line longer than this is garbage, not a message; prompts travel as files.
MAX_LINE_B = 8 * MIB

# What a pipe holds on Linux, and so the most that one read can bring.
READ_B = 64 * KIB

# What a run must hold before its experiment is looked at.
_REQUEST_FIELDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "config": (dict,),
        "identity": (dict,),
        "result_dir": (str,),
        "engine_key": (str,),
        "keep_engine": (bool,),
        "samples_path": (str, NoneType),
        "sampled_gpus": (list, tuple),
        "meter_errors": (dict,),
        "baselines": (dict,),
        "secrets": (dict,),
    }
)

# What a worker's messages must hold; more is allowed.
_REPORT_FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = MappingProxyType(
    {
        "hello": {"protocol": (int,), "lem_version": (str,), "pid": (int,), "environment": (dict,)},
        "engine": {"pgid": (int, NoneType), "started_ticks": (int, NoneType)},
        "phase": {"exp_id": (str,), "phase": (str,)},
        "progress": {"exp_id": (str,), "done": (int,), "total": (int, NoneType), "text": (str,)},
        "heartbeat": {},
        "result": {
            "exp_id": (str,),
            "valid": (bool,),
            "engine_load_id": (str,),
            "engine_reused": (bool,),
            "summary": (dict,),
        },
        "error": {
            "exp_id": (str, NoneType),
            "kind": (str,),
            "message": (str,),
            "hint": (str,),
            "permanent": (bool,),
            "phase": (str, NoneType),
            "engine_lost": (bool,),
        },
        "unloaded": {},
    }
)


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
        gap_s, gap_end_code: the gap that came before, and the code of why it ended, for the record.
        executor: `local` or `docker`.
        image: image id of the container; None without one.
        samples_path: the log that a sampler writes, as the worker sees it; None where nothing is sampled.
        is_sampler_due: the host cannot read the meters, so the worker starts that sampler.
        sampled_gpus: UUIDs of the GPUs to sample.
        meter_errors: {"gpu": why, "rapl": why} of meters that the host knows cannot be read.
        baselines: what the host knows of power at rest: fields of `meters.attempt_log.Baselines` by `energy_source`.
        secrets: {"HF_TOKEN": …}; never on argv, never in a file.
    """

    config: Mapping[str, Any]
    identity: Mapping[str, Any]
    result_dir: str
    engine_key: str
    keep_engine: bool
    gap_s: float | None = None
    gap_end_code: str | None = None
    executor: str = "local"
    image: str | None = None
    samples_path: str | None = None
    is_sampler_due: bool = False
    sampled_gpus: Sequence[str] = ()
    meter_errors: Mapping[str, str] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def exp_id(self) -> str:
        """The experiment's id, which every message about it carries."""
        return str(self.identity["experiment_id"])

    def to_message(self) -> dict[str, Any]:
        """The `run` message."""
        return {"type": "run", **dataclasses.asdict(self)}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> RunRequest:
        """The request in a `run` message.

        Raises:
            ChannelError: a field is missing, unknown or of another type.
        """
        fields = {"secrets": {}, **{key: value for key, value in message.items() if key != "type"}}
        known = {item.name for item in dataclasses.fields(cls)}
        strange = sorted((fields.keys() - known) | (_required_fields() - fields.keys()))
        if strange:
            raise ChannelError(f"run: missing or unknown: {', '.join(map(shown, strange[:5]))}")
        request = cls(**fields)
        for name, kinds in _REQUEST_FIELDS.items():
            if not isinstance(getattr(request, name), kinds):
                raise ChannelError(f"run: {name} is of the wrong type")
        texts = (*request.secrets.values(), *request.meter_errors.values(), *request.sampled_gpus)
        if not all(isinstance(text, str) for text in texts):
            raise ChannelError("run: secrets, meter_errors and sampled_gpus hold texts")
        request = dataclasses.replace(request, sampled_gpus=tuple(request.sampled_gpus))
        if "experiment_id" not in request.identity:
            raise ChannelError("run: identity has no experiment_id")
        return request


def _required_fields() -> set[str]:
    missing = dataclasses.MISSING
    return {
        item.name
        for item in dataclasses.fields(RunRequest)
        if item.default is missing and item.default_factory is missing
    }


def encode_line(message: Mapping[str, Any]) -> bytes:
    """The message as one line, in ASCII, so that a path that is not UTF-8 survives as its escapes.

    Raises:
        ValueError: a NaN or an infinity, which JSON does not have.
    """
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def decode_line(line: bytes) -> dict[str, Any]:
    """The message in one line.

    Raises:
        ChannelError: not a JSON object with a `type`.
    """
    try:
        message = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ChannelError(f"not a message: {line[:120]!r}") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ChannelError(f"not a message: {line[:120]!r}")
    return message


def decode_report(line: bytes) -> dict[str, Any]:
    """The message of a worker in one line, with every field that its type must have.

    Raises:
        ChannelError: anything else.
    """
    message = decode_line(line)
    due = _REPORT_FIELDS.get(message["type"])
    if due is None:
        raise ChannelError(f"no message of a worker: {line[:120]!r}")
    for name, kinds in due.items():
        value = message.get(name, _MISSING)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ChannelError(f"{message['type']}: {name} is missing or of the wrong type: {line[:120]!r}")
    return message


_MISSING = object()


class LineBuffer:
    """Bytes in, whole lines out."""

    def __init__(self, max_line_b: int = MAX_LINE_B) -> None:
        self._max_line_b = max_line_b
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their ends; blank ones are left out.

        Raises:
            ChannelError: a line longer than any message.
        """
        self._buffer += data
        lines: list[bytes] = []
        if b"\n" in data:
            *lines, rest = bytes(self._buffer).split(b"\n")
            self._buffer = bytearray(rest)
        if len(self._buffer) > self._max_line_b:
            raise ChannelError(f"a line of more than {self._max_line_b} bytes: {bytes(self._buffer[:120])!r}")
        return [line for line in lines if line.strip()]


class Outbox:
    """Messages on their way into a descriptor that is never waited for."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._buffer = bytearray()
        os.set_blocking(descriptor, False)

    @property
    def is_pending(self) -> bool:
        """Whether something waits until the descriptor can be written."""
        return bool(self._buffer)

    def put(self, message: Mapping[str, Any], *, is_droppable: bool = False) -> None:
        """Send a message, or keep it until `flush`; a droppable one is dropped when others wait already.

        Raises:
            BrokenPipeError: nobody reads the other end any more.
        """
        if is_droppable and self._buffer:
            return
        self._buffer += encode_line(message)
        self.flush()

    def flush(self) -> None:
        """Write what the descriptor takes now.

        Raises:
            BrokenPipeError: nobody reads the other end any more.
        """
        while self._buffer:
            try:
                written = os.write(self.descriptor, self._buffer)
            except BlockingIOError:
                return
            del self._buffer[:written]

    def drop(self) -> None:
        """Forget what was not written."""
        self._buffer.clear()


REDACTED = b"[redacted]"

# A secret shorter than this is a word that may stand in a log for another reason.
SHORTEST_SECRET = 6

TAIL_LINES = 30
_TAIL_B = 8 * KIB


class Redactor:
    """Takes secrets out of a stream of bytes, also where one is cut in two by the chunks it comes in."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets = tuple(secret.encode() for secret in secrets if len(secret) >= SHORTEST_SECRET)
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What can be passed on; the beginning of what may turn out to be a secret is held back."""
        data = self._held + data
        for secret in self._secrets:
            data = data.replace(secret, REDACTED)
        held = max((_overlap(data, secret) for secret in self._secrets), default=0)
        cut = len(data) - held
        self._held = data[cut:]
        return data[:cut]

    def flush(self) -> bytes:
        """What was held back and is no secret after all."""
        held, self._held = self._held, b""
        return held


def redact(text: str, secrets: Iterable[str]) -> str:
    """The text without the secrets."""
    for secret in secrets:
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, REDACTED.decode())
    return text


def _overlap(data: bytes, secret: bytes) -> int:
    """How many bytes at the end of `data` are the beginning of `secret`."""
    for length in range(min(len(secret) - 1, len(data)), 0, -1):
        if data.endswith(secret[:length]):
            return length
    return 0


class EngineLog:
    """The log of one experiment.

    A log that can no longer be written (the disk is full) costs its lines and nothing else.

    Attributes:
        path: the file.
    """

    def __init__(self, path: str, secrets: Iterable[str] = ()) -> None:
        """Open the log.

        Raises:
            OSError: it cannot be opened.
        """
        self.path = path
        self._redactor = Redactor(secrets)
        self._tail = bytearray()
        self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes) -> None:
        """Append what was printed."""
        self._append(self._redactor.feed(data))

    def close(self) -> None:
        """Write what is left and close the file; the last lines stay."""
        self._append(self._redactor.flush())
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, data: bytes) -> None:
        self._tail += data
        del self._tail[:-_TAIL_B]
        view = memoryview(data)
        with contextlib.suppress(OSError):
            while view and self._descriptor is not None:
                view = view[os.write(self._descriptor, view) :]

    @property
    def last_line(self) -> str:
        """The last line with something on it, also while a progress bar is redrawing it."""
        lines = self._lines()
        return lines[-1] if lines else ""

    @property
    def tail(self) -> str:
        """The last lines."""
        return "\n".join(self._lines()[-TAIL_LINES:])

    def _lines(self) -> list[str]:
        text = self._tail.decode("utf-8", "replace")
        # A progress bar goes back to the start of its line with \r; only its last state is worth showing.
        lines = (line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n"))
        return [line for line in lines if line.strip()]
