"""An engine process that is none: pipes whose other ends a test holds, in place of `EngineChild`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from lem.base.process import ProcessId
from lem.worker.channel import Outbox, encode_line
from lem.worker.children import EndStep


class PipedEngine:
    """Keeps what it is told, and does what a test gave it to do when an experiment comes.

    Attributes:
        steps: the steps by which it was to be ended; the second one ends it.
        exit_code: what `reap` finds; None while it lives.
        looks_survived: how often `reap` is answered with None though it has ended.
        on_run: called with each experiment.
    """

    def __init__(self) -> None:
        self.message_fd, self._messages = os.pipe()
        self.output_fd, self._output = os.pipe()
        for descriptor in (self.message_fd, self.output_fd):
            os.set_blocking(descriptor, False)
        self._control, control = os.pipe()
        self.control = Outbox(control)
        self.identity = ProcessId(1, 1)
        self.engine_key: str | None = None
        self.is_stuck = False
        self.next_step_at: float | None = None
        self.steps: list[EndStep] = []
        self.exit_code: int | None = None
        self.looks_survived = 0
        self.on_run: Callable[[Mapping[str, Any]], None] = lambda _message: None

    @property
    def step(self) -> EndStep | None:
        return self.steps[-1] if self.steps else None

    def say(self, message: Mapping[str, Any]) -> None:
        """Report to the supervisor."""
        os.write(self._messages, encode_line(message))

    def say_raw(self, data: bytes) -> None:
        """Report what is no message."""
        os.write(self._messages, data)

    def print(self, text: str) -> None:
        """Print, as an engine does."""
        os.write(self._output, text.encode())

    def send(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "run":
            self.on_run(message)

    def end(self, step: EndStep, now: float) -> None:
        del now
        self.steps.append(step)
        if len(self.steps) > 1:
            self.exit_code = -9

    def tick(self, now: float) -> None:
        """Nothing comes by itself here."""

    def reap(self) -> int | None:
        if self.exit_code is not None and self.looks_survived > 0:
            self.looks_survived -= 1
            return None
        return self.exit_code

    def close(self) -> None:
        for descriptor in (self.message_fd, self.output_fd, self.control.descriptor):
            os.close(descriptor)
        for descriptor in (self._messages, self._output, self._control):
            os.close(descriptor)
