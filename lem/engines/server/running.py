"""A server: its process, if lem starts it; when it is ready; and what its failures mean."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lem.base import durable, process
from lem.base.errors import EngineError, OptionRefused, UserError
from lem.base.launch import own_command
from lem.base.process import describe_exit, hint_on_exit, would_repeat
from lem.base.units import KIB
from lem.base.variables import GPU_VARIABLE
from lem.config.backends import ServerConfig, flag_name
from lem.config.experiment import ExperimentConfig
from lem.engines.common import shortened

LOCAL = "127.0.0.1"
OK, UNAUTHORIZED, FORBIDDEN, NOT_FOUND, LOADING = 200, 401, 403, 404, 503

_ASK_TIMEOUT_S = 60.0
_POLL_S = 0.2
# vLLM ends its engine processes in about 5 s.
_GRACE_S = 15.0
_KILL_S = 12.0  # the guardian gives KILL 10 s
_TAIL_B = 64 * KIB
_MOST_B = 64 * KIB * KIB


class _Symptom(NamedTuple):
    pattern: str  # of what a server prints before it ends, in any case
    kind: str  # of the error
    is_permanent: bool
    hint: str


_SYMPTOMS = (
    _Symptom(
        "out of ?memory|cannot allocate memory|failed to allocate|bad_alloc|no available memory",
        *("out_of_memory", True, "use less memory: a shorter context, fewer requests at once, or a smaller model"),
    ),
    _Symptom("address already in use|errno:? ?98|couldn't bind", "engine", False, "another program took its port"),
    _Symptom(
        "unrecognized argument|invalid argument|unknown (option|argument)|unexpected argument|no such option",
        *("option", True, "change server.command or server.options"),
    ),
    _Symptom(
        "failed to load model|not a valid model identifier|no such file|not found|repositorynotfound",
        *("model", True, "check model.name, and the paths in server.command"),
    ),
)


class Address:
    """Where a server is: small requests beside the measurement."""

    def __init__(self, url: str, key: str | None = None, patience_s: float = _ASK_TIMEOUT_S) -> None:
        self._patience_s = patience_s  # for a whole answer
        parts = urllib.parse.urlsplit(url)
        self._scheme = parts.scheme.lower()
        self.host, self.port = parts.hostname or LOCAL, parts.port or (443 if self._scheme == "https" else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def url(self, path: str = "") -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self._scheme}://{host}:{self.port}{self.path(path)}"

    def path(self, path: str) -> str:
        """The path of a request, which begins with that of the address."""
        return f"{self._path}{path}"

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
        """Status and text of the answer to a GET, or to a POST with a body; raises OSError."""
        kind = http.client.HTTPSConnection if self._scheme == "https" else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self._patience_s)
        with contextlib.closing(connection):
            data = None if body is None else json.dumps(body)
            headers = {**self.headers, **({} if body is None else {"Content-Type": "application/json"})}
            connection.connect()
            cut = _Cut(connection.sock, self._patience_s)
            slow = TimeoutError(f"no whole answer within {self._patience_s:g} s")
            try:
                connection.request("GET" if body is None else "POST", self.path(path), data, headers)
                answer = connection.getresponse()
                found = answer.status, answer.read(_MOST_B).decode("utf-8", "replace")
            except (OSError, http.client.HTTPException) as error:
                if cut.has_happened:
                    raise slow from error
                if isinstance(error, OSError):
                    raise
                raise ConnectionError(f"no HTTP: {shortened(error)}") from error
            finally:
                cut.cancel()
            if cut.has_happened:
                raise slow
            return found

    def read(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of an answer; None for any other answer; raises OSError."""
        status, text = self.ask(path, body)
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text) if status == OK else None
        return None


class _Cut(threading.Timer):
    """Ends an answer that takes too long; the timeout of a connection is that of a single read."""

    has_happened = False

    def __init__(self, sock: socket.socket, after_s: float) -> None:
        super().__init__(after_s, self._cut, (sock,))
        self.daemon = True
        self.start()

    def _cut(self, sock: socket.socket) -> None:
        self.has_happened = True
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


class ServerProcess:
    """A server that lem starts, under a guardian of its own: nothing of it outlives this process."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str]) -> None:
        reader, self._control = os.pipe2(os.O_CLOEXEC)
        output, writer = os.pipe2(os.O_CLOEXEC)
        guarded = (*own_command(sys.executable), "worker", "--control-fd", str(reader), "--program", *words)
        try:
            self._child = process.spawn(guarded, env=env, streams=(process.DEVNULL, writer, writer), pass_fds=(reader,))
        except UserError as error:
            os.close(self._control)
            os.close(output)
            raise EngineError(error.message, error.hint) from error
        finally:
            os.close(reader)
            os.close(writer)
        self._tail = bytearray()
        self._reading = threading.Thread(target=self._pass_on, args=(output,), name="output of the server", daemon=True)
        self._reading.start()
        with contextlib.suppress(BrokenPipeError):  # why it has ended already shows when it is waited for
            os.write(self._control, b"\n")

    def has_ended(self, patience_s: float = 0.0) -> bool:
        try:
            self._child.wait(patience_s)
        except process.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """End its whole process group."""
        for step, patience_s in ((self._terminate, _GRACE_S), (self._hang_up, _KILL_S)):
            step()
            with contextlib.suppress(process.TimeoutExpired):
                self._child.wait(patience_s)
                break
        process.kill_group(self._child.pid)
        self._child.wait()
        self._hang_up()
        self._reading.join(_POLL_S)

    def failure(self, *, is_loading: bool) -> EngineError:
        """Why it has ended."""
        code = self._child.wait()
        self._reading.join(_GRACE_S)
        text = self._tail.decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        what = f"the server {describe_exit(code)}"
        for item in _SYMPTOMS if code >= 0 else ():
            if found := [line for line in lines if re.search(item.pattern, line, re.IGNORECASE)]:
                is_permanent = item.is_permanent and is_loading
                return EngineError(
                    f"{what}: {shortened(found[-1])}", item.hint, kind=item.kind, is_permanent=is_permanent
                )
        last = f": {shortened(lines[-1])}" if lines and code >= 0 else ""
        is_permanent = would_repeat(code, is_loading=is_loading)
        return EngineError(f"{what}{last}", hint_on_exit(code), is_permanent=is_permanent)

    def _terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGTERM)

    def _hang_up(self) -> None:
        if self._control >= 0:
            os.close(self._control)
            self._control = -1

    def _pass_on(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb", buffering=0) as output:
            while data := output.read(KIB * 64):
                self._tail = (self._tail + data)[-_TAIL_B:]
                view = memoryview(data)
                while view:
                    view = view[os.write(2, view) :]


def command_of(config: ExperimentConfig, section: ServerConfig, port: int, gpus: str) -> list[str]:
    """The command with its options, and what is between braces filled in."""
    values = {"{model}": os.fspath(durable.in_home(config.model.name)), "{port}": str(port), "{gpus}": gpus}
    pattern = re.compile("|".join(map(re.escape, values)))
    words = [pattern.sub(lambda found: values[found[0]], word) for word in section.command or ()]
    return [*words, *option_words(section.options)]


def option_words(options: Mapping[str, Any]) -> list[str]:
    """What stands for options on a command line."""
    words: list[str] = []
    for name, value in options.items():
        flag = flag_name(name)
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (list, tuple)):
            words += [word for item in value for word in (f"--{flag}", _word(item))]
        elif value is not None:
            words += [f"--{flag}", _word(value)]
    return words


def _word(value: Any) -> str:
    return str(value) if isinstance(value, str) else json.dumps(value)


def devices_of(names: Sequence[str] | None, environ: Mapping[str, str]) -> str:
    """CUDA_VISIBLE_DEVICES of a server on these GPUs, whose numbers count those that this process sees."""
    seen = environ.get(GPU_VARIABLE)
    visible = None if seen is None else seen.split(",")

    def outer(name: str) -> str:
        is_inside = visible is not None and name.isdecimal() and int(name) < len(visible)
        return visible[int(name)] if is_inside and visible is not None else name

    return ",".join(map(outer, ("0",) if names is None else names))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        return int(probe.getsockname()[1])


def wait_until_ready(address: Address, ready_path: str, server: ServerProcess | None, server_name: str) -> None:
    """Return once the server answers; how long that may take is up to the host.

    Raises EngineError: it has ended, does not have the path, wants a key, or, if lem did not start it, is not there.
    """
    while True:
        if server is not None and server.has_ended():
            raise server.failure(is_loading=True)
        try:
            status, text = address.ask(ready_path)
        except OSError as error:
            if server is None:
                text = f"server.url: no server answers at {address.url()}: {shortened(error)}"
                raise EngineError(text, "start it, or check the address", kind="option") from error
        else:
            if status == OK:
                return
            _check_status(address, ready_path, status, text, server_name)
        time.sleep(_POLL_S)


def _check_status(address: Address, path: str, status: int, text: str, server_name: str) -> None:
    what = f"{address.url(path)} answers {status}"
    if status in (UNAUTHORIZED, FORBIDDEN):
        raise OptionRefused(f"{what}: the server requires an API key", "set server.api_key_env")
    if status == NOT_FOUND and address.ask("/v1/models")[0] == OK:
        raise OptionRefused(f"{what}, which is not how {server_name} says that it is ready", "set server.ready_path")
    if status not in (NOT_FOUND, LOADING) and not 500 <= status < 600:
        raise EngineError(f"{what}: {shortened(text)}", "set server.ready_path", kind="option", is_permanent=True)


def read_metrics(text: str) -> dict[str, float]:
    """Sums of the counters of a Prometheus text over their labels, by name."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        matched = _METRIC.match(line)
        if matched is not None and matched[1].endswith(_COUNTERS):
            found[matched[1]] = found.get(matched[1], 0.0) + float(matched[3])
    return found


def read_settings(text: str) -> dict[str, str]:
    """The labels of metrics that hold settings, which vLLM calls `…_config_info`."""
    lines = (_METRIC.match(line) for line in text.splitlines())
    infos = (matched[2] or "" for matched in lines if matched is not None and matched[1].endswith("_config_info"))
    return {name: value for labels in infos for name, value in _LABEL.findall(labels)}


_COUNTERS = ("_total", "_sum", "_count")
_METRIC = re.compile(
    r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})?\s+([-+]?[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)(?:\s|$)"
)
_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
