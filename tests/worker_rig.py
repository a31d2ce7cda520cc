"""What tests of the worker channel share: a result folder, a request, and a marked worker with the trivial engine."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lem.base import durable, process
from lem.base.launch import own_command
from lem.config.experiment import ExperimentConfig
from lem.worker.channel import LineBuffer, RunRequest, decode_line, encode_line, read_report
from tests.processes import Marker

DOUBLES = Path(__file__).parent / "doubles"
COMMAND = (*own_command(sys.executable), "worker")

# In order; `load` is skipped when the engine is reused.
PHASES = ("prepare", "load", "idle", "warmup", "window", "cooldown", "write")

# As small as an experiment can be.
SMALL: Mapping[str, Any] = {
    "model": "none",
    "max_output_tokens": 4,
    "warmup": {"enabled": False},
    "measurement": {"min_window_sec": 0.0},
    "prompts": {"type": "synthetic", "input_tokens": 3, "sample_size": 2},
}


IDENTITY: Mapping[str, Any] = {
    "experiment_id": "0123456789ab-c1",
    "config_name": "small",
    "config_hash": "0123456789abcdef",
    "campaign_id": "01234567",
    "campaign_name": "test",
    "run_id": "20260101T000000Z-0000",
    "host": "here",
    "node": "here",
    "backend": "pytorch",
    "model": "none",
    "cycle_index": 0,
    "order_index": 3,
    "attempt": 1,
    "shuffle_seed": None,
}


def decode_report(line: bytes) -> dict[str, Any]:
    """A valid message of a worker, as the object that was sent."""
    read_report(line)
    return decode_line(line)


@dataclass
class Rig:
    """One test's folder, mark and script for the engine."""

    folder: Path
    rules: Sequence[Mapping[str, Any]] = ()
    token_s: float = 0.0
    marker: Marker = field(default_factory=Marker)
    started: list[process.Child[bytes]] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def leaving_nothing(cls, folder: Path) -> Iterator[Rig]:
        """A rig whose processes must all be gone soon after the block, once the workers it started are hung up on."""
        rig = cls(folder)
        try:
            yield rig
        finally:
            for child in rig.started:
                for pipe in (child.stdin, child.stdout):
                    if pipe is not None:
                        pipe.close()
            left = rig.marker.survivors()
            rig.marker.kill()
            for child in rig.started:
                child.wait()
        assert left == ()

    def environ(self) -> dict[str, str]:
        """The environment of a worker that follows the script."""
        script = json.dumps({"rules": list(self.rules), "token_s": self.token_s})
        return self.marker.environ(PYTHONPATH=str(DOUBLES), LEMTEST_ENGINE_SCRIPT=script)

    def request(
        self, name: str, *, keep_engine: bool = True, secrets: Mapping[str, str] | None = None, **options: Any
    ) -> RunRequest:
        """A request whose result folder is as the host leaves it."""
        config = ExperimentConfig.from_dict({**SMALL, **options})
        result_dir = self.folder / name
        result_dir.mkdir()
        document = {"schema_version": 1, "requested": {**SMALL, **options}, "resolved": config.to_dict()}
        durable.write_json(result_dir / "config.json", document)
        return RunRequest(
            config.to_dict(),
            {**IDENTITY, "experiment_id": f"{name}-c1", "config_hash": name},
            str(result_dir),
            config.engine_key(),
            keep_engine,
            secrets=secrets or {},
        )

    def start(self, command: Sequence[str] = COMMAND, stdin: int = process.PIPE) -> process.Child[bytes]:
        child = process.spawn(command, env=self.environ(), streams=(stdin, process.PIPE, 2))
        self.started.append(child)
        return child

    def log_of(self, name: str) -> str:
        return (self.folder / name / "log.txt").read_text()


class RawWorker:
    """A worker whose channel the test reads and writes itself."""

    def __init__(self, rig: Rig, command: Sequence[str] = COMMAND) -> None:
        self.child = rig.start(command)
        self._stdin, self._stdout = process.pipes(self.child)
        self._lines = LineBuffer()
        self._messages: deque[dict[str, Any]] = deque()
        self.hello = self.receive()

    def send(self, message: Mapping[str, Any]) -> None:
        self.send_raw(encode_line(message))

    def send_raw(self, data: bytes) -> None:
        self._stdin.write(data)

    def run(self, request: RunRequest) -> list[dict[str, Any]]:
        """The messages about an experiment, its result or error last."""
        self.send(request.to_message())
        messages = [self.receive()]
        while messages[-1]["type"] not in ("result", "error"):
            messages.append(self.receive())
        return [message for message in messages if message["type"] != "heartbeat"]

    def receive(self) -> dict[str, Any]:
        """The next message. Raises EOFError: the worker closed the channel."""
        while not self._messages:
            data = os.read(self._stdout.fileno(), 65536)
            if not data:
                raise EOFError
            self._messages += map(decode_report, self._lines.feed(data))
        return self._messages.popleft()

    def until(self, kind: str, /, **fields: Any) -> dict[str, Any]:
        """The next message of a type with these fields; those before it are dropped."""
        while True:
            message = self.receive()
            if message["type"] == kind and all(message.get(name) == value for name, value in fields.items()):
                return message

    def hang_up(self) -> None:
        self._stdin.close()

    def close(self) -> int:
        """Hang up and give the exit code."""
        self._stdin.close()
        code = self.child.wait()
        self._stdout.close()
        return code
