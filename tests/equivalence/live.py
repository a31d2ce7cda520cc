"""Campaigns that both builds really run, with the trivial engine of their own tree's tests/doubles.

Nothing of them is the same twice but what was planned, done and told, so they are compared masked (masks.py). Scenes
are made so that what happens does not depend on the speed of the machine: a signal is sent at an event, while the
engine hangs; a window has one pass over its prompts, which takes longer than the window has to last.
"""

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.equivalence.builds import Build, HarnessError, old_build
from tests.equivalence.driver import PLACEHOLDER, snapshot, write_files
from tests.equivalence.playing import Outcomes, environment
from tests.equivalence.recorded import RECORDED
from tests.processes import Marker

TIMEOUT_S = 180
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


def live_scenes(_old: Build) -> Iterator[LiveScene]:
    """Every campaign that is run."""
    fresh = ("campaign", "c.yaml", "--executor", "local", "--yes", "--json")
    resume = (*fresh, "--resume")
    looks = tuple(
        LiveStep(words)
        for words in (
            ("status", "--json"),
            ("status", "demo"),
            ("results", "list", "--json"),
            ("results", "show", "demo", "--json"),
            ("results", "show", "demo"),
            ("results", "export", "--format", "json"),
            ("results", "recompute", "demo", "--json"),
            ("check", "demo", "--json"),
            ("compare", "demo", "--json"),
        )
    )
    plain = {"c.yaml": campaign()}
    text = LiveStep(("campaign", "c.yaml", "--executor", "local", "--yes"))
    yield LiveScene("normal", (LiveStep(fresh), *looks, LiveStep(resume), LiveStep(("campaign", "c.yaml"))), plain)
    yield LiveScene(
        "text", (text, LiveStep(("campaign", "c.yaml", "--yes", "--executor", "local", "--fresh", "-q"))), plain
    )
    yield LiveScene("more-cycles", (LiveStep(fresh), LiveStep((*resume, "--cycles", "3"))), plain)
    shuffled = {"c.yaml": campaign(structure="shuffled", seed=7, reuse="campaign")}
    yield LiveScene("shuffled", (LiveStep(fresh), LiveStep(("check", "demo", "--json"))), shuffled)
    energy = {
        "c.yaml": campaign(
            outputs=(4,), cycles=2, options={"measurement.energy": ["tdp_estimate"], "measurement.cpu_tdp_w": [65]}
        )
    }
    yield LiveScene("energy", (LiveStep(fresh), *looks), energy)

    yield LiveScene(
        "failing",
        (LiveStep(fresh, _failures()), *looks[:5], LiveStep(resume)),
        {"c.yaml": campaign((1, 2, 3, 4, 5, 6), 1, reuse="none")},
    )
    permanent = [{"at": "load", "do": "fail", "kind": "model", "permanent": True}]
    yield LiveScene("fail-fast", (LiveStep((*fresh, "--fail-fast"), permanent), LiveStep(("status", "--json"))), plain)
    yield LiveScene("failed-text", (LiveStep(text.words, permanent),), plain)
    yield LiveScene(
        "failing-requests",
        (LiveStep((*fresh,), [{"failing_requests": [0]}]), *looks[3:5]),
        {"c.yaml": campaign((4,), 2)},
    )

    hang = [{"at": "generate", "do": "hang", "when": {"max_output_tokens": 8}}]
    at_window = {"event": "phase", "phase": "window", "done": 1}
    for name in ("SIGINT", "SIGTERM", "SIGKILL"):
        stopped = LiveStep(fresh, hang, Interruption(signal.Signals[name], at_window))
        yield LiveScene(f"{name.lower()}-resumed", (stopped, *looks[:4], LiveStep(resume), *looks[:4]), plain)
        by_old = LiveStep(fresh, hang, Interruption(signal.Signals[name], at_window), is_old=True)
        yield LiveScene(f"{name.lower()}-by-old", (by_old, *looks[:4], LiveStep(resume), *looks[:4]), plain)
    loading = LiveStep(
        fresh, [{"at": "load", "do": "hang"}], Interruption(signal.SIGTERM, {"event": "phase", "phase": "load"})
    )
    yield LiveScene("sigterm-loading", (loading, LiveStep(("campaign", "c.yaml", "--executor", "local"))), plain)
    locked = LiveStep(fresh, hang, Interruption(signal.SIGINT, at_window), beside=fresh)
    yield LiveScene("locked", (locked,), plain)
    edited = {**plain, "d.yaml": campaign(outputs=(4, 16))}
    other = ("campaign", "d.yaml", "--executor", "local", "--yes", "--json", "--resume")
    yield LiveScene("edited", (LiveStep(fresh, is_old=True), LiveStep(other), LiveStep(("status", "--json"))), edited)
    recording = RECORDED / "interrupted"
    recorded = {
        "c.yaml": {"copy": str(recording / "interrupted.yaml")},
        ".state": {"copy": str(recording / "state")},
        "results": {"copy": str(recording / "results")},
    }
    steps = [LiveStep(("campaign", "c.yaml", "--executor", "local")), LiveStep(resume)]
    steps += [LiveStep((*resume, "--allow-environment-change")), LiveStep(("results", "show", "interrupted", "--json"))]
    yield LiveScene("recorded-resumed", (*steps, LiveStep(("status", "--json"))), recorded)

    until = LiveStep((*fresh, "--until", "ci=90%:output_tok_per_s", "--max-cycles", "6"))
    yield LiveScene("until", (until, *looks[3:5], looks[7]), {"c.yaml": campaign((4,), 2)})
    slow = [{"at": "generate", "do": "sleep", "seconds": 2}]
    budget = LiveStep((*fresh, "--budget", "1s"), slow)
    yield LiveScene("budget", (budget, LiveStep(("status", "--json"))), plain)
    yield from _fleet_scenes(fresh)
    yield from _experiment_scenes()


def _failures() -> list[dict[str, Any]]:
    """Each way in which an engine fails, told apart by the configuration's `max_output_tokens`."""

    def at(outputs: int, place: str, action: str, **more: Any) -> dict[str, Any]:
        return {"at": place, "do": action, "when": {"max_output_tokens": outputs}, **more}

    return [
        at(1, "load", "refuse", text="torch_compile is not for this engine"),
        at(2, "load", "fail", text="out of memory", kind="out_of_memory", permanent=True),
        at(3, "load", "crash", text="a library broke"),
        at(4, "generate", "crash", text="broke once", once="crashed"),
        at(5, "generate", "exit", code=7),
        at(6, "generate", "print", text='{"type": "result"} is printed by engines too'),
    ]


def _fleet_scenes(fresh: tuple[str, ...]) -> Iterator[LiveScene]:
    write = LiveStep(("campaign", "c.yaml", "--write-plan", "plan.json", "--hosts", "one,two"))
    parts = [(*fresh, "--plan", "plan.json", "--shard", f"{n}/2", "-o", f"host{n}") for n in (1, 2)]
    merge = ("merge", "host1", "host2", "-o", "all", "--plan", "plan.json", "--anchor-tolerance", "1e9%")
    steps = [write, LiveStep(parts[0]), LiveStep((*merge, "--json")), LiveStep(("status", "--json"))]
    again = [LiveStep(parts[1]), LiveStep(merge), LiveStep(("results", "show", "demo", "-o", "all", "--json"))]
    files = {"c.yaml": campaign(outputs=(4, 8, 16))}
    yield LiveScene("plan", tuple(steps), files)
    yield LiveScene("plan-of-old", (LiveStep(write.words, is_old=True), *steps[1:3]), files)
    yield LiveScene("plan-second-part", (write, again[0]), files)
    yield LiveScene("shard", (LiveStep((*fresh, "--shard", "2/2")),), files)
    replicate = LiveStep((*write.words, "--replicate"))
    yield LiveScene("replicate", (replicate, LiveStep(parts[1]), LiveStep(merge)), files)


def _experiment_scenes() -> Iterator[LiveScene]:
    one = ("experiment", "e.yaml", "--yes")
    files = {"e.yaml": experiment()}
    steps = (LiveStep(one), LiveStep((*one, "--json", "--cycles", "2")), LiveStep((*one, "--json"), [_broken("load")]))
    yield LiveScene("experiment", steps, files)
    streaming = {"e.yaml": experiment("streaming: true\nsave_outputs: true\n")}
    yield LiveScene("experiment-streaming", (LiveStep((*one, "--json")),), streaming)
    traffic = "traffic_simulation: {enabled: true, mode: constant, target_qps: 20, seed: 3}\n"
    yield LiveScene("experiment-traffic", (LiveStep((*one, "--json")),), {"e.yaml": experiment(traffic)})


def _broken(at: str) -> dict[str, Any]:
    return {"at": at, "do": "fail", "text": "no such weights", "kind": "model", "permanent": True}


def campaign(
    outputs: Sequence[int] = (4, 8), cycles: int = 2, *, options: Mapping[str, Any] | None = None, **execution: Any
) -> str:
    """A campaign named demo that does as little as there can be."""
    shared = {
        "max_output_tokens": list(outputs),
        "warmup.enabled": [False],
        "measurement.min_window_sec": [0.01],
        "prompts": [{"type": "synthetic", "input_tokens": 3, "sample_size": 2}],
        "gpus": [[]],
        "ignore_eos": [True],
        **(options or {}),
    }
    chosen = {"cycles": cycles, "config_gap_seconds": 0, "cycle_gap_seconds": 0, **execution}
    grid = {"backends": ["pytorch"], "shared": shared}
    return json.dumps({"campaign_name": "demo", "model": "none", "grid": grid, "execution": chosen}, indent=1)


def experiment(more: str = "") -> str:
    """An experiment that does as little as there can be."""
    prompts = "prompts: {type: synthetic, input_tokens: 3, sample_size: 2}\n"
    least = (
        "model: none\nmax_output_tokens: 4\ngpus: []\nwarmup: {enabled: false}\nmeasurement: {min_window_sec: 0.01}\n"
    )
    return least + prompts + more


# Playing


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
        return _RUN.sub(lambda found: self._runs[found[0]], text)

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


_RUN = re.compile(r"\b\d{8}T\d{6}Z-[0-9a-f]{4}\b")
# A stack, as faulthandler and tracebacks print it: names and lines of the program's own modules.
_STACK = re.compile(r"^(?:(?:Current thread|Thread) 0x| *File \"|    | *\^|Traceback|Extension modules)")

# What is told while something goes on; how often depends on the time it takes.
_REPEATED_EVENTS = frozenset({"progress"})
_LEFT_OUT = (".lock",)


def comparable(outcome: dict[str, Any]) -> dict[str, Any]:
    """An outcome without what is different each time in number or order, not only in value."""
    lines = outcome["out"].splitlines(keepends=True)
    out = "".join(line for line in lines if not _is_repeated(line))
    files = {}
    for name, content in outcome["files"].items():
        if name.endswith(_LEFT_OUT):
            continue
        if isinstance(content, str) and "/samples." in name:
            content = _shape_of_log(content)
        elif isinstance(content, str) and name.endswith("/log.txt"):
            content = "".join(line for line in content.splitlines(keepends=True) if not _STACK.match(line))
        files[name] = content
    return {**outcome, "out": out, "files": files}


def _is_repeated(line: str) -> bool:
    if not line.startswith('{"event"'):
        return False
    return json.loads(line)["event"] in _REPEATED_EVENTS


def _shape_of_log(content: str) -> str:
    """Which kinds of rows a sample log has, and which fields each."""
    rows = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):  # the last line of a log that was broken off
            rows.append(json.loads(line))
    shapes = {json.dumps(sorted(row) if isinstance(row, dict) else f"{type(row).__name__} {row[:1]}") for row in rows}
    return "\n".join(sorted(shapes))
