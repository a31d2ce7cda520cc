"""The channel between host and worker: declared messages, one JSON object a line; and the log of an experiment."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from lem.base import codec
from lem.base.dataclass import dataclass, field
from lem.base.units import KIB, MIB

PROTOCOL_VERSION = 3

# `load_timeout_seconds` bounds these; `experiment_timeout_seconds` the others: idle, warmup, window, cooldown, write.
LOAD_PHASE = "load"  # skipped when the engine is reused
FIRST_PHASE = "prepare"
LOADED_PHASE = "idle"  # the first with an engine
LOADING_PHASES = (FIRST_PHASE, LOAD_PHASE)
# A longer line is garbage, not a message; prompts travel as files.
MAX_LINE_B = 8 * MIB
# The capacity of a pipe on Linux, and so the most that one read can return.
READ_B = 64 * KIB


class ChannelError(ValueError):
    """A line that is not a message of this protocol."""


_OrderT = TypeVar("_OrderT", bound="Message")


class Message:
    type: ClassVar[str]

    def __init_subclass__(cls, kind: str) -> None:
        cls.type = kind

    def to_message(self) -> dict[str, Any]:
        return {"type": self.type, **codec.encode(self, self.type)}


@dataclass(frozen=True)
class RunRequest(Message, kind="run"):
    config: Mapping[str, Any]  # the resolved experiment (`ExperimentConfig.to_dict`)
    identity: Mapping[str, Any]  # fields of `record.Identity` that the host knows: all but start_utc and lem_version
    result_dir: str  # absolute path as the worker sees it
    engine_key: str  # hash of the options that need a reload
    keep_engine: bool  # leave the engine loaded afterwards
    draw: int = 0  # of arrivals and prompts from their seeds; every cycle has its own
    gap_s: float | None = None  # the gap before this experiment, for the record
    gap_end_code: str | None = None  # why that gap ended
    executor: str = "local"  # or `docker`
    image: str | None = None  # image id of the container
    samples_path: str | None = None  # the sampler's log as the worker sees it; None where nothing is sampled
    is_worker_sampling: bool = False  # the host cannot read the meters, so the worker starts the sampler
    sampled_gpus: tuple[str, ...] = ()  # UUIDs
    server_pids: tuple[int, ...] = ()  # of a server that was running already, as the sampler numbers them
    # Why the host cannot read the meter "gpu" or "rapl"; "server": why neither measures the server.
    meter_errors: Mapping[str, str] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)  # `Baselines` by `energy_source`
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)  # {"HF_TOKEN": …}; never in argv or a file

    @property
    def exp_id(self) -> str:
        return str(self.identity["experiment_id"])

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> RunRequest:
        request = _decode_order(cls, message)
        if "experiment_id" not in request.identity:
            raise ChannelError("run: identity has no experiment_id")
        return request


@dataclass(frozen=True)
class Check(Message, kind="check"):
    configs: tuple[Mapping[str, Any], ...]  # as in a RunRequest
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    exp_id: ClassVar[str] = "check"
    engine_key: ClassVar[str] = ""  # as in a RunRequest; its process loads nothing and ends
    keep_engine: ClassVar[bool] = False


def read_order(message: Mapping[str, Any]) -> RunRequest | Check:
    return _decode_order(Check, message) if message["type"] == Check.type else RunRequest.from_message(message)


def _decode_order(kind: type[_OrderT], message: Mapping[str, Any]) -> _OrderT:
    secrets = message.get("secrets", {})
    if not isinstance(secrets, dict) or not all(isinstance(secret, str) for secret in secrets.values()):
        raise ChannelError(f"{kind.type}: secrets: expected texts by name")  # the codec would quote them
    try:
        return codec.decode(kind, {key: value for key, value in message.items() if key != "type"}, kind.type)
    except (codec.DecodeError, RecursionError) as error:
        raise ChannelError(str(error)) from error


@dataclass(frozen=True)
class Hello(Message, kind="hello"):
    protocol: int
    lem_version: str
    pid: int
    environment: Mapping[str, Any]  # see `lem.worker.supervisor.probe_environment`


@dataclass(frozen=True)
class EngineProcess(Message, kind="engine"):
    pgid: int | None = None
    started_ticks: int | None = None


@dataclass(frozen=True)
class Phase(Message, kind="phase"):
    exp_id: str
    phase: str


@dataclass(frozen=True)
class Progress(Message, kind="progress"):
    exp_id: str
    done: int
    total: int | None  # None without a known end
    text: str


@dataclass(frozen=True)
class Heartbeat(Message, kind="heartbeat"):
    """The worker is alive."""


@dataclass(frozen=True)
class Problem(Message, kind="problem"):
    exp_id: str
    place: int  # of the configuration, from 0
    message: str
    hint: str
    is_certain: bool  # False: it could not be found out, since the hub did not answer


@dataclass(frozen=True)
class Result(Message, kind="result"):
    exp_id: str
    engine_reused: bool


@dataclass(frozen=True)
class Failure(Message, kind="error"):
    exp_id: str | None
    kind: str  # as of `EngineError`
    message: str
    hint: str
    permanent: bool
    phase: str | None
    engine_lost: bool  # the engine must be loaded again
    log_tail: str = ""


@dataclass(frozen=True)
class Unloaded(Message, kind="unloaded"):
    """The engine process is gone."""


_REPORTS = {
    kind.type: kind for kind in (Hello, EngineProcess, Phase, Progress, Heartbeat, Problem, Result, Failure, Unloaded)
}


def encode_line(message: Mapping[str, Any]) -> bytes:
    """The message as a line of ASCII, so that any path survives; ValueError for NaN or infinity."""
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def decode_line(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ChannelError(f"not a message: {line[:120]!r}") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ChannelError(f"not a message: {line[:120]!r}")
    return message


def read_report(line: bytes) -> Message:
    message = decode_line(line)
    kind = _REPORTS.get(message["type"])
    if kind is None:
        raise ChannelError(f"no message of a worker: {line[:120]!r}")
    known = codec.hints_of(kind)
    try:
        return codec.decode(kind, {name: value for name, value in message.items() if name in known}, kind.type)
    except (codec.DecodeError, RecursionError) as error:
        raise ChannelError(f"{error}: {line[:120]!r}") from error


class LineBuffer:
    def __init__(self, max_line_b: int = MAX_LINE_B) -> None:
        self._max_line_b = max_line_b
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        self._buffer += data
        lines: list[bytes] = []
        if b"\n" in data:
            *lines, rest = bytes(self._buffer).split(b"\n")
            self._buffer = bytearray(rest)
        if len(self._buffer) > self._max_line_b:
            raise ChannelError(f"a line of more than {self._max_line_b} bytes: {bytes(self._buffer[:120])!r}")
        return [line for line in lines if line.strip()]


class Outbox:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._buffer = bytearray()
        os.set_blocking(descriptor, False)

    @property
    def is_pending(self) -> bool:
        return bool(self._buffer)

    def put(self, message: Mapping[str, Any], *, is_droppable: bool = False) -> None:
        if is_droppable and self._buffer:
            return
        self._buffer += encode_line(message)
        self.flush()

    def flush(self) -> None:
        while self._buffer:
            try:
                written = os.write(self.descriptor, self._buffer)
            except BlockingIOError:
                return
            del self._buffer[:written]

    def drop(self) -> None:
        self._buffer.clear()


REDACTED = b"[redacted]"
# A shorter secret is a word that may occur in a log for another reason.
SHORTEST_SECRET = 6
_URL_SAFE = str.maketrans("+/", "-_")
TAIL_LINES = 30
_TAIL_B = 8 * KIB


@functools.cache
def forms_of(secret: str) -> tuple[str, ...]:
    """The forms in which programs print a secret, the longest first; () for one that is too short to look for."""
    # As it is, percent-encoded (the characters that need it, or all), and in Base64, also within a longer text: three
    # bytes become four characters, so there are three ways to fall into them. Characters that depend on the text before
    # and after it are left out.
    data = secret.strip().encode("utf-8", "surrogateescape")
    if len(secret.strip()) < SHORTEST_SECRET:
        return ()
    every = "".join(f"%{byte:02X}" for byte in data)
    percent = [urllib.parse.quote(data), urllib.parse.quote(data, safe=""), urllib.parse.quote_plus(data), every]
    percent += [re.sub("%..", lambda found: found[0].lower(), text) for text in percent]
    base64s = [base64.b64encode(data).decode()]
    base64s.append(base64s[0].rstrip("="))
    for before in range(3):
        first, last = -(-before * 8 // 6), (before + len(data)) * 8 // 6
        base64s.append(base64.b64encode(bytes(before) + data).decode()[first:last])
    base64s += [text.translate(_URL_SAFE) for text in base64s]
    return tuple(sorted({secret.strip(), *percent, *base64s}, key=len, reverse=True))


def redact(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        for form in forms_of(secret):
            text = text.replace(form, REDACTED.decode())
    return text


class EngineLog:
    """The log of one experiment, appended to; OSError when it cannot be opened."""

    # When it can no longer be written (the disk is full), its lines are lost, but the experiment goes on.

    def __init__(self, path: str, secrets: Iterable[str] = ()) -> None:
        forms = {form.encode("utf-8", "surrogateescape") for secret in secrets for form in forms_of(secret)}
        self._forms = sorted(forms, key=len, reverse=True)
        self._beginnings = frozenset(form[0] for form in forms)
        self._held = b""
        self._tail = bytearray()
        self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes) -> None:
        data = self._held + data
        for form in self._forms:
            data = data.replace(form, REDACTED)
        cut = len(data) - self._count_held(data)
        self._held = data[cut:]
        self._append(data[:cut])

    def _count_held(self, data: bytes) -> int:
        longest = len(self._forms[0]) - 1 if self._forms else 0
        for begin in range(max(len(data) - longest, 0), len(data)):
            if data[begin] in self._beginnings and any(form.startswith(data[begin:]) for form in self._forms):
                return len(data) - begin
        return 0

    def close(self) -> None:
        self._append(self._held)
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

    def tail(self, lines: int = TAIL_LINES) -> str:
        text = self._tail.decode("utf-8", "replace")
        # A progress bar goes back to the start of its line with \r; only its last state is worth showing.
        found = (line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n"))
        return "\n".join([line for line in found if line.strip()][-lines:])
