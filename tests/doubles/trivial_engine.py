"""A backend without an engine: it takes a prompt's bytes for its tokens and answers with bytes that follow from them.

It keeps to `lem.engines.protocol` in everything, and does what LEMTEST_ENGINE_SCRIPT says beside that: JSON with

    token_s           seconds a token takes (0)
    gpus              UUIDs of the GPUs it says it runs on ([]: the CPU)
    load_log          a file to which it writes `<monotonic ns> <1 or 0>` when it begins and ends to work, for the
                      NVML double
    failing_requests  indices of requests that fail by themselves ([])
    rules             what to do where, in order ([]); each an object with
        at     `check`, `load`, `configure`, `generate`, `serve` or `unload`
        do     `print` text              on every way to fd 1: print, os.write, and a child's echo
               `sleep` seconds
               `hang`                    for ever, giving the interpreter's lock back
               `hold_gil`                for ever, without giving it back
               `ignore_term`             from here on
               `refuse` text             OptionRefused
               `fail` kind, permanent    EngineError
               `crash` text              an exception that is no EngineError
               `exit` code               at once, as a library may
               `signal` number           to itself
               `shell` command           and wait for it
               `spawn` own_session       start a child that stays
               `allocate` bytes          and keep them
        when   {dotted option: value}    only for experiments that are configured like that
        once   a file                    only if it is not there, and then it is: the first time, in whatever process
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lem.base.errors import EngineError, OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import Completion, EngineReport, OnProgress, RequestQueue, TokenRequest, say_nothing

VARIABLE = "LEMTEST_ENGINE_SCRIPT"


def load(config: ExperimentConfig, secrets: Mapping[str, str]) -> TrivialEngine:
    return TrivialEngine(json.loads(os.environ.get(VARIABLE, "{}")), config, secrets)


def find_problems(config: ExperimentConfig, token: str | None) -> Iterator[EngineError]:
    """In place of `lem.engines.checkpoints`: what the rules at `check` raise."""
    for rule in json.loads(os.environ.get(VARIABLE, "{}")).get("rules", ()):
        if rule["at"] == "check" and _applies(rule, config):
            try:
                _ACTIONS[rule["do"]]({"text": "as scripted", **rule})
            except EngineError as error:
                yield error


def answer(request: TokenRequest) -> tuple[int, ...]:
    """The tokens generated for a request: as many as allowed, each following from the prompt and its own place."""
    seed = hashlib.sha256(repr(request.token_ids).encode()).digest()
    return tuple(seed[place % len(seed)] ^ (place & 0xFF) for place in range(request.max_output_tokens))


class TrivialEngine:
    def __init__(
        self, script: Mapping[str, Any], config: ExperimentConfig, secrets: Mapping[str, str] | None = None
    ) -> None:
        self._token_s = float(script.get("token_s", 0.0))
        self._gpus = tuple(script.get("gpus", ()))
        self._load_log: str | None = script.get("load_log")
        self._failing = frozenset(script.get("failing_requests", ()))
        self._rules: Sequence[Mapping[str, Any]] = script.get("rules", ())
        self._obey_rules("load", config, secrets)
        self._config = config

    @property
    def report(self) -> EngineReport:
        return EngineReport(
            engine_name="trivial",
            engine_version="1",
            versions={"python": platform.python_version()},
            device="cuda" if self._gpus else "cpu",
            gpu_uuids=self._gpus,
            effective={self._config.backend: {"batch_size": getattr(self._config.section, "batch_size", None)}},
            model_parameters=1_000,
            embedding_parameters=100,
            active_parameters=1_000,
        )

    def configure(self, config: ExperimentConfig) -> None:
        self._obey_rules("configure", config)
        self._config = config

    def encode(self, text: str, *, is_whole: bool = True) -> list[int]:
        return list(text.encode())

    def chat_template(self, given: str | None, *, has_tools: bool) -> str:
        return given or "{{ messages }}"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        template: str,
    ) -> tuple[str, str, str]:
        return "", str(messages[-1]["content"]), "\n"

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode("latin-1")

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        self._obey_rules("generate", self._config)
        width = 1 if observe_tokens else self._batch_size
        completions: list[Completion] = []
        for first in range(0, len(requests), width):
            batch = requests[first : first + width]
            completions += [_without_token_times(item, observe_tokens) for item in self._run(batch)]
            on_progress(len(completions))
        return completions

    def serve(self, queue: RequestQueue) -> None:
        self._obey_rules("serve", self._config)
        while batch := queue.take(self._batch_size):
            for completion in self._run(batch):
                queue.complete(completion)

    def synchronize(self) -> None:
        """Nothing runs on."""

    def reset_peak_memory(self) -> None:
        """There is no device."""

    def peak_memory_b(self) -> int | None:
        return None

    def close(self) -> None:
        self._obey_rules("unload", self._config)

    @property
    def _batch_size(self) -> int:
        return int(getattr(self._config.section, "batch_size", None) or 1)

    def _run(self, batch: Sequence[TokenRequest]) -> list[Completion]:
        """One token after the other for the whole batch; each request is done with its own last token."""
        started_ns = self._say_busy(1)
        times: list[int] = []
        for _ in range(max(request.max_output_tokens for request in batch)):
            _pause(self._token_s)
            times.append(time.monotonic_ns())
        self._say_busy(0)
        longest = max(len(request.token_ids) for request in batch)
        return [self._complete(request, started_ns, times, longest - len(request.token_ids)) for request in batch]

    def _say_busy(self, state: int) -> int:
        """The time of a change, which is also written down where that is wanted."""
        now_ns = time.monotonic_ns()
        if self._load_log is not None:
            descriptor = os.open(self._load_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(descriptor, f"{now_ns} {state}\n".encode())
            os.close(descriptor)
        return now_ns

    def _complete(self, request: TokenRequest, started_ns: int, times: Sequence[int], padding: int) -> Completion:
        if request.index in self._failing:
            return Completion(request.index, (), started_ns, times[0], error="it was told to fail")
        seen = tuple(times[: request.max_output_tokens])
        return Completion(request.index, answer(request), started_ns, seen[-1], seen, padding_tok=padding)

    def _obey_rules(self, at: str, config: ExperimentConfig, secrets: Mapping[str, str] | None = None) -> None:
        for rule in self._rules:
            if rule["at"] == at and _applies(rule, config):
                # {secret} stands for a secret, which a careless engine may print or put into an error.
                secret = next(iter((secrets or {}).values()), "")
                _ACTIONS[rule["do"]]({**rule, "text": str(rule.get("text", "as scripted")).replace("{secret}", secret)})


def _without_token_times(completion: Completion, observe_tokens: bool) -> Completion:
    """A batch of a closed set tells no token times, as engines that return when all is done."""
    return completion if observe_tokens else dataclasses.replace(completion, token_times_ns=None)


def _applies(rule: Mapping[str, Any], config: ExperimentConfig) -> bool:
    options = config.to_dict()
    for dotted, value in rule.get("when", {}).items():
        found: Any = options
        for part in dotted.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found != value:
            return False
    if "once" not in rule:
        return True
    try:
        os.close(os.open(rule["once"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _pause(seconds: float) -> None:
    if seconds > 0:
        threading.Event().wait(seconds)


def _print(rule: Mapping[str, Any]) -> None:
    text = rule["text"]
    print(f"print: {text}", flush=True)
    os.write(1, f"write: {text}\n".encode())
    subprocess.run(["echo", f"child: {text}"], check=True)


def _hold_gil(_rule: Mapping[str, Any]) -> None:
    # PyDLL, unlike CDLL, keeps the interpreter's lock during the call; a mutex that is locked twice is waited for for
    # ever, and unlike sleep(3) no signal breaks that off. A mutex of zeros is an unlocked one.
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def _refuse(rule: Mapping[str, Any]) -> None:
    raise OptionRefused(rule["text"])


def _fail(rule: Mapping[str, Any]) -> None:
    kind, is_permanent = str(rule.get("kind", "engine")), bool(rule.get("permanent"))
    raise EngineError(rule["text"], kind=kind, is_permanent=is_permanent)


def _crash(rule: Mapping[str, Any]) -> None:
    raise RuntimeError(rule["text"])


def _spawn(rule: Mapping[str, Any]) -> None:
    """Start a child that inherits everything and stays; print its number."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.pause()"], start_new_session=bool(rule.get("own_session"))
    )
    print(f"spawned {child.pid}", flush=True)


_HOARD: list[bytearray] = []


def _allocate(rule: Mapping[str, Any]) -> None:
    """Take memory and write to it, a little at a time, so that the kernel has to find it."""
    chunk_b = 16 * 1024**2
    _HOARD.extend(bytearray(b"x" * chunk_b) for _ in range(0, int(rule["bytes"]), chunk_b))


_ACTIONS = {
    "print": _print,
    "sleep": lambda rule: _pause(float(rule["seconds"])),
    "hang": lambda _rule: threading.Event().wait(),
    "hold_gil": _hold_gil,
    "ignore_term": lambda _rule: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "refuse": _refuse,
    "fail": _fail,
    "crash": _crash,
    "exit": lambda rule: os._exit(int(rule.get("code", 1))),
    "signal": lambda rule: os.kill(os.getpid(), int(rule.get("number", signal.SIGKILL))),
    "shell": lambda rule: subprocess.run(["sh", "-c", str(rule["command"])], check=True),
    "spawn": _spawn,
    "allocate": _allocate,
}
