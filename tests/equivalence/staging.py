"""Live scenes, and how they are played: real processes, signals at events, and what is left on disk."""

from __future__ import annotations

import contextlib
import json
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.equivalence.builds import Build, HarnessError, old_build
from tests.equivalence.driver import PLACEHOLDER, snapshot, write_files
from tests.equivalence.playing import Outcomes, environment
from tests.processes import Marker

TIMEOUT_S = 600
TOKEN_S = 0.02


@dataclass(frozen=True)
class Interruption:
    """A signal sent at the first event with these fields."""

    signum: int
    event: Mapping[str, Any]


@dataclass(frozen=True)
class LiveStep:
    """One command of a live scene.

    Attributes:
        rules: what the trivial engine does (tests/doubles/trivial_engine.py).
        at: send a signal; the command needs --json.
        is_old: run the old build, whichever is compared.
        beside: another command, run to its end while this one waits for the signal at its event.
    """

    words: tuple[str, ...]
    rules: Sequence[Mapping[str, Any]] = ()
    at: Interruption | None = None
    is_old: bool = False
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = " ".join(self.words)
        if self.at is not None:
            told += f", {signal.Signals(self.at.signum).name} at {dict(self.at.event)}"
        return told + (", by the old build" if self.is_old else "")


@dataclass(frozen=True)
class LiveScene:
    """Files in an empty folder, and commands that run there one after the other."""

    name: str
    steps: tuple[LiveStep, ...]
    files: Mapping[str, Any] = field(default_factory=dict)
    may_change: bool = False

    @property
    def commands(self) -> tuple[str, ...]:
        """The command lines for people to read."""
        return tuple(map(str, self.steps))

    def to_json(self) -> str:
        """What the scene is made of, as a key."""
        return json.dumps(
            [self.name, [repr(step) for step in self.steps], self.files, Path(__file__).read_text("utf-8")]
        )


def play_live(build: Build, scenes: Sequence[LiveScene]) -> Outcomes:
    """The outcome of each step of every scene, by the scene's name.

    Raises:
        HarnessError: a command did not end, or an event did not come.
    """
    outcomes: Outcomes = {}
    old = old_build()
    for scene in scenes:
        root, marker = Path(tempfile.mkdtemp(prefix="equivalence-")), Marker()
        try:
            outcomes[scene.name] = _Stage(root, marker, build, old).play(scene)
        finally:
            marker.kill()
            shutil.rmtree(root, ignore_errors=True)
    return outcomes


class _Stage:
    """One scene being played."""

    def __init__(self, root: Path, marker: Marker, build: Build, old: Build) -> None:
        self._root, self._marker = root, marker
        self._trees = {"lem.pyz": build.tree, "old.pyz": old.tree}
        self._folder = root / "scene"
        self._runs: dict[str, str] = {}
        for name in ("home", "tmp", "locks", "scene"):
            (root / name).mkdir()
        shutil.copyfile(build.zip, root / "lem.pyz")
        shutil.copyfile(old.zip, root / "old.pyz")

    def play(self, scene: LiveScene) -> list[dict[str, Any]]:
        write_files(scene.files, self._folder)
        outcomes, before = [], snapshot(self._folder)
        for step in scene.steps:
            code, out, err = self._run(step, scene.name)
            survivors = self._marker.survivors()
            if survivors:
                err += f"left behind: {survivors}\n"
                self._marker.kill()
            after = snapshot(self._folder)
            changed = {name: after.get(name) for name in {*before, *after} if before.get(name) != after.get(name)}
            before = after
            outcome = {"code": code, "out": out, "err": err, "files": changed}
            text = json.dumps(outcome).replace(str(self._root), PLACEHOLDER)
            outcomes.append(comparable(json.loads(self._with_numbered_runs(text))))
        return outcomes

    def _with_numbered_runs(self, text: str) -> str:
        """The ids of runs, which are random, replaced by numbers in the order in which they began."""
        new = sorted(set(_RUN.findall(text)) - set(self._runs))
        self._runs.update({run: f"run{number}" for number, run in enumerate(new, len(self._runs) + 1)})
        return _SET_ASIDE.sub("<time>", _RUN.sub(lambda found: self._runs[found[0]], text))

    def _run(self, step: LiveStep, scene: str) -> tuple[int, str, str]:
        out, err = self._root / "stdout", self._root / "stderr"
        with open(out, "wb") as out_file, open(err, "wb") as err_file:
            process = subprocess.Popen(
                self._command(step.words, step.is_old),
                cwd=self._folder,
                env=self._environ(step),
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
            )
            with contextlib.ExitStack() as stack:
                stack.callback(process.kill)
                beside = ""
                if step.at is not None:
                    self._wait_for(step.at.event, out, err, process, scene)
                    beside = self._run_beside(step)
                    process.send_signal(step.at.signum)
                try:
                    code = process.wait(TIMEOUT_S)
                except subprocess.TimeoutExpired as error:
                    raise HarnessError(f"live/{scene}: {step} did not end in {TIMEOUT_S} s") from error
        texts = (path.read_bytes().decode("utf-8", "backslashreplace") for path in (out, err))
        return (code, next(texts), beside + next(texts))

    def _run_beside(self, step: LiveStep) -> str:
        if not step.beside:
            return ""
        command = self._command(step.beside, is_old=False)
        done = subprocess.run(
            command,
            cwd=self._folder,
            env=self._environ(step),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return f"beside: exit code {done.returncode}\n{done.stdout}{done.stderr}"

    def _command(self, words: Sequence[str], is_old: bool) -> list[str]:
        return [sys.executable, str(self._root / ("old.pyz" if is_old else "lem.pyz")), *words]

    def _environ(self, step: LiveStep) -> dict[str, str]:
        script: dict[str, Any] = {"token_s": TOKEN_S, "rules": [rule for rule in step.rules if "at" in rule]}
        for rule in step.rules:
            script.update(rule if "at" not in rule else {})
        doubles = self._trees["old.pyz" if step.is_old else "lem.pyz"] / "tests" / "doubles"
        return {
            **environment(self._root),
            "LEMTEST_MARKER": self._marker.value,
            "LEMTEST_ENGINE_SCRIPT": json.dumps(script),
            "PYTHONPATH": str(doubles),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def _wait_for(
        self, event: Mapping[str, Any], out: Path, err: Path, process: subprocess.Popen[bytes], scene: str
    ) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            has_ended = process.poll() is not None
            lines = out.read_bytes().split(b"\n")[:-1]
            if any(event.items() <= json.loads(line).items() for line in lines):
                return
            if has_ended or time.monotonic() > deadline:
                told = f"{out.read_text()}\n{err.read_text()}"
                raise HarnessError(f"live/{scene}: no event {dict(event)}\n{told[-3000:]}")
            select.select([], [], [], 0.02)


# Of a run, and in the name of a manifest that was set aside.
_RUN = re.compile(r"\b\d{8}T\d{6}Z-[0-9a-f]{4}\b")
_SET_ASIDE = re.compile(r"\b\d{8}T\d{6}Z\b(?!-)")
# A stack, as faulthandler and tracebacks print it: names and lines of the program's own modules.
_STACK = re.compile(r"^(?:(?:Current thread|Thread) 0x| *File \"|    | *\^|Traceback|Extension modules)")

# What is told while something goes on; how often depends on the time it takes.
_REPEATED_EVENTS = frozenset({"progress"})
_LEFT_OUT = (".lock",)


def comparable(outcome: dict[str, Any]) -> dict[str, Any]:
    """An outcome without what is different each time in number or order, not only in value."""
    out = "".join(map(_event, outcome["out"].splitlines(keepends=True)))
    files = {}
    for name, content in outcome["files"].items():
        if name.endswith(_LEFT_OUT):
            continue
        if isinstance(content, str) and "/samples." in name:
            content = _shape_of_log(content)
        elif isinstance(content, str) and name.endswith("/log.txt"):
            content = _without_stacks(content)
        files[name] = content
    return {**outcome, "out": out, "files": files}


def _event(line: str) -> str:
    """A line of output; empty where it is an event whose number depends on time."""
    if not line.startswith('{"event"'):
        return line
    event = json.loads(line)
    if "log_tail" in event:
        event["log_tail"] = _without_stacks(event["log_tail"])
    return "" if event["event"] in _REPEATED_EVENTS else f"{json.dumps(event, ensure_ascii=False)}\n"


def _without_stacks(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not _STACK.match(line))


def _shape_of_log(content: str) -> str:
    """Which kinds of rows a sample log has, and which fields each."""
    rows = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):  # the last line of a log that was broken off
            rows.append(json.loads(line))
    shapes = {json.dumps(sorted(row) if isinstance(row, dict) else f"{type(row).__name__} {row[:1]}") for row in rows}
    return "\n".join(sorted(shapes))
