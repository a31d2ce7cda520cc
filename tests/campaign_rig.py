"""A campaign run as a person runs it: real processes with the trivial engine, in a folder of their own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.orchestration.manifest import CampaignManifest, ManifestManager
from lem.record import Record, read_record
from tests.processes import PATIENCE_S, Marker
from tests.warm import WarmProcess

ROOT = Path(__file__).resolve().parents[1]
FOUR, EIGHT = "pytorch-max_output_tokens=4", "pytorch-max_output_tokens=8"
RUN_TIMEOUT_S = 120


def campaign_text(
    *,
    name: str = "demo",
    backends: Sequence[str] = ("pytorch",),
    outputs: Sequence[int] = (4, 8),
    more: str = "",
    **execution: Any,
) -> str:
    """A campaign of as little as there can be; `more` is YAML at the top, `execution` its section."""
    chosen = {"cycles": 2, "config_gap_seconds": 0, "cycle_gap_seconds": 0, **execution}
    return (
        f"campaign_name: {name}\n"
        "model: none\n"
        "grid:\n"
        f"  backends: [{', '.join(backends)}]\n"
        "  shared:\n"
        f"    max_output_tokens: {list(outputs)}\n"
        "    warmup.enabled: [false]\n"
        "    measurement.min_window_sec: [0.01]\n"
        "    measurement.max_wait_pct: [null]\n"  # other tests may run beside it
        "    measurement.max_foreign_pct: [null]\n"
        "    prompts: [{type: synthetic, input_tokens: 3, sample_size: 2}]\n"
        "    gpus: [[]]\n"
        f"execution: {json.dumps(chosen)}\n"
    ) + more


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


LEM = (sys.executable, "-m", "lem")
DOUBLES_PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "doubles")])  # lem with the trivial engine


def can_be_warm(command: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether a command is one of lem with the trivial engine, which can be forked (tests/warm.py)."""
    return tuple(command[: len(LEM)]) == LEM and environ.get("PYTHONPATH") == DOUBLES_PATH


class Running:
    """A command that runs, with its output in files so that nobody has to read for it to go on."""

    def __init__(
        self, command: Sequence[str], folder: Path, environ: Mapping[str, str], *, is_warm: bool = False
    ) -> None:
        """Start it; with `is_warm` a command of lem is forked (tests/warm.py), as are its workers."""
        self.patience_s = PATIENCE_S
        self._out, self._err = (tempfile.TemporaryFile(buffering=0) for _ in range(2))  # noqa: SIM115
        self.process: subprocess.Popen[bytes] | WarmProcess
        if is_warm and can_be_warm(command, environ):
            outputs = [Path(f"/proc/{os.getpid()}/fd/{file.fileno()}") for file in (self._out, self._err)]
            self.process = WarmProcess(command[len(LEM) :], folder, environ, outputs)
        else:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err
            )

    def wait_for_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The first event of a kind with these fields, once it was told (with --json)."""
        event: dict[str, Any] = self._wait(lambda: _find(self.out, kind, fields), f"{kind} {fields}")
        return event

    def wait_for_text(self, text: str) -> None:
        """Return once stderr holds the text."""
        self._wait(lambda: text in self.err or None, text)

    @property
    def out(self) -> str:
        return _content(self._out.fileno())

    @property
    def err(self) -> str:
        return _content(self._err.fileno())

    def send(self, signum: int) -> None:
        """Send it, and nobody else, a signal."""
        self.process.send_signal(signum)

    def wait(self, timeout_s: float = RUN_TIMEOUT_S) -> Ended:
        code = self.process.wait(timeout_s)
        ended = Ended(code, self.out, self.err)
        self._out.close()
        self._err.close()
        return ended

    def _wait(self, look: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + self.patience_s
        while True:
            has_ended = self.process.poll() is not None
            found = look()
            if found is not None:
                return found
            assert not has_ended, f"ended without {what}: {self.out} {self.err}"
            assert time.monotonic() < deadline, f"no {what} in time: {self.out} {self.err}"
            select.select([], [], [], 0.02)


def _find(out: str, kind: str, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    for line in out.splitlines(keepends=True):
        if line.endswith("\n"):
            event: dict[str, Any] = json.loads(line)
            if event["event"] == kind and fields.items() <= event.items():
                return event
    return None


def _content(descriptor: int) -> str:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()


class Terminal:
    """A command in the foreground of a terminal of its own."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environ: Mapping[str, str],
        size: tuple[int, int] = (24, 80),
        *,
        is_warm: bool = False,
    ) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        # A session whose terminal this is, so that Ctrl-C reaches its foreground process group.
        environ = {**environ, "TERM": "xterm", "COLUMNS": str(size[1]), "LINES": str(size[0])}
        self.process: subprocess.Popen[bytes] | WarmProcess
        if is_warm and can_be_warm(command, environ):
            self.process = WarmProcess(command[len(LEM) :], folder, environ, terminal=os.ttyname(slave))
        else:
            self.process = subprocess.Popen(
                ["setsid", "--ctty", *command], cwd=folder, env=environ, stdin=slave, stdout=slave, stderr=slave
            )
        os.close(slave)
        self.shown = ""

    def read_until(self, text: str) -> str:
        """Everything shown so far, once the text is in it that was not looked for before."""
        start, deadline = len(self.shown), time.monotonic() + PATIENCE_S
        while text not in self.shown[max(0, start - len(text)) :]:
            assert self._read(deadline), f"no {text!r} in {self.shown!r}"
        return self.shown

    def type(self, text: str) -> None:
        """Type on the keyboard; `\\x03` is Ctrl-C."""
        os.write(self._master, text.encode())

    def wait(self) -> int:
        """The exit code, after everything was read."""
        deadline = time.monotonic() + PATIENCE_S
        while self._read(deadline):
            pass
        os.close(self._master)
        return self.process.wait(RUN_TIMEOUT_S)

    def close(self) -> int:
        """Take the terminal away, as when its window is closed; the exit code of the command."""
        os.close(self._master)
        return self.process.wait(RUN_TIMEOUT_S)

    def _read(self, deadline: float) -> bool:
        if not select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: nobody has the other side any more
            return False
        self.shown += data.decode("utf-8", "replace")
        return bool(data)


class CampaignRig:
    """One folder with a campaign file, and the marked processes that run it."""

    is_warm = True  # campaigns are forked, unless a test wants processes with command lines of their own

    def __init__(self, folder: Path, text: str | None = None) -> None:
        self.folder = folder
        self.marker = Marker()
        self.write(campaign_text() if text is None else text)

    def write(self, text: str, name: str = "c.yaml") -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def environ(self, rules: Sequence[Mapping[str, Any]] = (), **more: str) -> dict[str, str]:
        """The environment of a command whose engine follows the rules."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith("LEM")}
        return {
            **plain,
            **self.marker.environ(),
            "PYTHONPATH": DOUBLES_PATH,
            "LEM_LOCK_DIR": str(self.folder / "locks"),
            "LEMTEST_ENGINE_SCRIPT": json.dumps({"rules": list(rules)}),
            **more,
        }

    def command(self, *options: str, file: str = "c.yaml") -> list[str]:
        return [*LEM, "campaign", file, *options]

    def start(
        self,
        *options: str,
        rules: Sequence[Mapping[str, Any]] = (),
        file: str = "c.yaml",
        is_warm: bool | None = None,
        **more: str,
    ) -> Running:
        """The campaign, started; without `is_warm` each of its processes is a Python of its own."""
        chosen = self.is_warm if is_warm is None else is_warm
        return Running(self.command(*options, file=file), self.folder, self.environ(rules, **more), is_warm=chosen)

    def run(self, *options: str, **more: Any) -> Ended:
        return self.start(*options, **more).wait()

    def lem(self, *words: str | Path, **more: str) -> Ended:
        """Another command of lem."""
        return Running([*LEM, *map(str, words)], self.folder, self.environ((), **more), is_warm=True).wait()

    def terminal(self, *options: str, rules: Sequence[Mapping[str, Any]] = ()) -> Terminal:
        return Terminal(self.command(*options), self.folder, self.environ(rules), is_warm=self.is_warm)

    def manifest(self, campaign: str = "demo") -> CampaignManifest:
        manifest = ManifestManager(self.folder / ".state" / campaign / "campaign_manifest.json").load_strict()
        assert manifest is not None
        return manifest

    def statuses(self) -> list[str]:
        return [entry.status for entry in self.manifest().experiments]

    def results(self) -> dict[str, bytes]:
        """Every `result.json` by its path in the folder; reading them all shows that they are whole."""
        found = {}
        for path in sorted((self.folder / "results").rglob("result.json")):
            read_record(path)
            found[str(path.relative_to(self.folder))] = path.read_bytes()
        return found

    def records(self) -> list[Record]:
        records = [read_record(self.folder / path) for path in self.results()]
        return sorted(records, key=lambda record: (record.identity.order_index, record.identity.attempt))

    def tree(self) -> dict[str, bytes]:
        """Every file and folder below, to compare with another moment."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else b""
            for path in sorted(self.folder.rglob("*"))
            if path.name not in ("stdout", "stderr")
        }

    def assert_no_process_left(self) -> None:
        """Fail when a process of this rig does not go by itself."""
        assert self.marker.survivors() == ()

    @contextlib.contextmanager
    def cleaned(self) -> Iterator[CampaignRig]:
        """Leave no process behind when a test fails in the block."""
        try:
            yield self
        finally:
            self.marker.kill()
