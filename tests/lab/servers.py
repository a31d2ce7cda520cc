"""The real servers of the lab: how each is started, and one that runs while a block of code does."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.places import RECIPES, Places
from tests.processes import wait_for

LLAMA_SERVER = RECIPES / "llama_server.py"
VLLM_MODULE = "vllm.entrypoints.openai.api_server"
READY_TIMEOUT_S = 180.0
END_TIMEOUT_S = 30.0
ASK_TIMEOUT_S = 60.0
# One thread, since the tests beside it need the machine, too; without a limit the KV cache takes most of the memory.
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


def llama_server(places: Places, size: str = "tiny") -> list[str]:
    """llama.cpp's server; `{port}` is to be replaced, options may follow."""
    program = [str(places.environment("llamacpp") / "bin/python"), str(LLAMA_SERVER)]
    return [*program, "--model", str(places.gguf(size)), "--threads", "1", "--port", "{port}"]


def vllm_serve(places: Places, size: str = "tiny") -> list[str]:
    """vLLM's server; `{port}` is to be replaced, options may follow."""
    python, model = places.environment("vllm") / "bin/python", places.models / size
    command = [str(python), "-m", VLLM_MODULE, "--model", str(model), "--port", "{port}"]
    return [*command, "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]


@dataclass(frozen=True)
class Server:
    port: int
    pid: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
        """Status and text of the answer: POST with a body, else GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ASK_TIMEOUT_S)
        with contextlib.closing(connection):
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()


@contextlib.contextmanager
def serving(command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server that answers /health, on a free port and in a session of its own, which ends with the block."""
    port = free_port()
    words = [word.replace("{port}", str(port)) for word in command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            words,
            env={**os.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(port, process.pid, log)

    def look() -> bool | None:
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        return is_ready(server) or None

    try:
        wait_for(look, READY_TIMEOUT_S)
        yield server
    finally:
        _end(process)


def is_ready(server: Server) -> bool:
    """Whether it answers; one that still loads refuses the connection, or answers 503."""
    try:
        return server.ask("/health")[0] == 200
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _end(process: subprocess.Popen[bytes]) -> None:
    """INT, which vLLM ends its engine processes at, then KILL to whatever is left of the group."""
    deadline = time.monotonic() + END_TIMEOUT_S
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(deadline - time.monotonic())
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(END_TIMEOUT_S)
