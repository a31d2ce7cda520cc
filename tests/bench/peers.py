"""The same window measured by lem, Zeus and CodeCarbon, on scripted meters whose true joules are known.

    python -m tests.bench.peers [WORDS OF A NAME]

Each row is a machine of `tests.bench.truth`, in real time: the NVML double, or a tree of powercap that is mounted over
/sys/class in a mount namespace (which needs root). The peers run in an environment of their own (build/peers, from
requirements-peers.txt). Every meter is compared with the truth between its own two calls, so that what a call takes
counts against none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.base import measurement as names
from lem.base.clock import Clock
from lem.base.launch import own_command
from lem.config.experiment import ExperimentConfig
from lem.meters.attempt import AttemptLog, without_still_counters
from lem.meters.curve import Span
from lem.meters.energy import measure
from lem.meters.samples import Mark, PartReader
from lem.meters.sources import choose_sources
from lem.worker.children import SamplerProcess, wait_until_ready
from tests.bench.peers_side import REST_S
from tests.bench.truth import ROOT, ROWS
from tests.doubles.nvml.library import NvmlDouble
from tests.doubles.nvml.traces import Trace
from tests.doubles.powercap import Powercap
from tests.truth_rig import Package, Scene

FOLDER = ROOT / "build" / "peers"
PINS = Path(__file__).with_name("requirements-peers.txt")
SIDE = Path(__file__).with_name("peers_side.py")
S = 1_000_000_000
TIMEOUT_S = 180
WINDOW_S = 10.03  # at a whole number of updates naive errors of both edges would cancel

# Rows of `tests.bench.truth`, and the length of the window.
SCENES: Sequence[tuple[str, float]] = (
    ("nvml, counter of 0.02 s", WINDOW_S),
    ("nvml, counter of 0.1 s", WINDOW_S),
    ("nvml, counter of 0.1 s", 1.03),
    ("nvml, counter of 0.5 s", WINDOW_S),
    ("nvml, counter 100 ms behind", WINDOW_S),
    ("nvml, driver reloaded in the window", WINDOW_S),
    ("nvml, counter frozen, power sampled", WINDOW_S),
    ("nvml, no counter", WINDOW_S),
    ("nvml, no counter, bursts of 10 Hz", WINDOW_S),
    ("rapl, one package", WINDOW_S),
    ("rapl, real wrap in the window", WINDOW_S),
    ("rapl, backwards for a second", WINDOW_S),
    ("rapl, reset in the window", WINDOW_S),
    ("rapl, four dies with one counter", WINDOW_S),
    ("rapl, never changes", WINDOW_S),
)


@dataclass(frozen=True)
class World:
    """A scene in real time, in a folder; work is what the load log says."""

    scene: Scene
    folder: Path
    origin_ns: int

    @property
    def load_log(self) -> Path:
        return self.folder / "load"

    @property
    def trace(self) -> Trace:
        gpus = (it if it.load is None else self._on_load(it) for it in self.scene.gpus)
        return Trace(self.origin_ns, tuple(gpus))

    def _on_load(self, gpu: Any) -> Any:
        return dataclasses.replace(gpu, load=dataclasses.replace(gpu.load, path=str(self.load_log)))

    def states(self) -> list[tuple[int, float]]:
        lines = (line.split() for line in self.load_log.read_text(encoding="ascii").splitlines())
        return [(self.origin_ns, 0.0), *((int(ns), float(busy)) for ns, busy in lines)]

    def energy_j(self, from_ns: int, to_ns: int) -> float:
        if self.scene.gpus:
            return sum(self.trace.after_load().energy_j(from_ns, to_ns, place) for place in self.scene.in_use)
        states = self.states()
        return sum(it.course.energy_j(states, from_ns, to_ns) for it in self.scene.packages if it.is_counted)

    @contextlib.contextmanager
    def running(self, double: NvmlDouble) -> Iterator[None]:
        """The double says what the scene does at its window, and counters of packages go on, within the block."""
        self.load_log.touch()
        double.say(*self._lines())
        counters = [(it, self._counter(it)) for it in self.scene.packages]
        is_over = threading.Event()
        thread = threading.Thread(target=self._follow, args=(double, counters, is_over))
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            for _, descriptor in counters:
                os.close(descriptor)

    def _lines(self, more: Sequence[str] = ()) -> list[str]:
        return [*(self.trace.lines() if self.scene.gpus else ["count 0"]), *self.scene.script, *more]

    def _counter(self, it: Package) -> int:
        return os.open(self.folder / "class" / "powercap" / it.folder / "energy_uj", os.O_WRONLY)

    def _follow(self, double: NvmlDouble, counters: Sequence[tuple[Package, int]], is_over: threading.Event) -> None:
        opened_ns = None
        while not is_over.wait(0.001):
            states, now_ns = self.states(), time.monotonic_ns()
            if opened_ns is None and len(states) > 1:
                opened_ns = states[1][0]
                if more := self.scene.at_window((opened_ns - self.origin_ns) / S):
                    double.say(*self._lines(more))
            since_s = -1e6 if opened_ns is None else (now_ns - opened_ns) / S
            for it, descriptor in counters:
                true_uj = it.begins_uj + round(1e6 * it.course.energy_j(states, self.origin_ns, now_ns))
                value = it.reading(since_s, true_uj % it.max_uj)
                # In place and of one width, so that no reader finds half a number.
                if value is not None:
                    os.pwrite(descriptor, b"%020d\n" % value, 0)

    def make_powercap(self) -> None:
        """A folder like /sys/class, with the links of a real one by which the peers find their way."""
        root = self.folder / "class" / "powercap"
        Powercap(root, tuple(it.zone for it in self.scene.packages)).make(0)
        for it in self.scene.packages:
            (root / "intel-rapl" / it.folder).symlink_to(Path("..") / it.folder)
        (root / "intel-rapl" / "subsystem").symlink_to("..")


def play(name: str, window_s: float, folder: Path) -> dict[str, Any]:
    """What each measured, next to the truth; in a process whose /sys/class is that of the folder."""
    (scene,) = (row.scene for row in ROWS if row.name == name)
    world = World(scene, folder, time.monotonic_ns())
    double = NvmlDouble(folder / "nvml")
    environ = {**double.environ(), "CODECARBON_TELEMETRY_LEVEL": "disabled"}
    if scene.gpus:  # CodeCarbon looks for this program before it looks for GPUs
        (folder / "nvidia-smi").write_text("#!/bin/sh\n", encoding="ascii")
        (folder / "nvidia-smi").chmod(0o755)
        environ["PATH"] = f"{folder}:{environ['PATH']}"
    uuids = tuple(scene.gpus[place].uuid for place in scene.in_use) if scene.gpus else ()
    os.environ |= double.variables()
    with world.running(double):
        sampler = SamplerProcess(own_command(sys.executable), folder / "samples.part", uuids)
        try:
            clock = Clock()
            assert wait_until_ready(folder / "samples.part", clock.monotonic_ns() + 30 * S, clock), sampler.death()
            numbers = map(str, (window_s, len(scene.gpus), len(scene.packages)))
            command = [str(FOLDER / "bin" / "python"), str(SIDE), str(world.load_log), *numbers]
            finished = subprocess.run(
                command,
                env=environ,
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
                start_new_session=True,
            )
        finally:
            sampler.stop(10.0)
        if not finished.stdout:
            raise RuntimeError(finished.stderr[-2000:])
        found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
        work = Span(found.pop("opened_ns"), found.pop("closed_ns"))
        for peer in found.values():
            if "energy_j" in peer:
                peer["true_j"] = world.energy_j(peer["begun_ns"], peer["ended_ns"])
        found["lem"] = _by_lem(world, work, folder / "samples.part", uuids)
    return found


def _by_lem(world: World, work: Span, path: Path, uuids: Sequence[str]) -> Mapping[str, Any]:
    rest_ns = round(REST_S * S * 0.9)
    middle_ns = work.opened_ns - rest_ns // 2
    marks = (
        Mark(names.IDLE_LOADED, work.opened_ns - rest_ns, middle_ns),
        Mark(names.GUARD_BEFORE, middle_ns, work.opened_ns),
        Mark(names.WINDOW, work.opened_ns, work.closed_ns),
        Mark(names.GUARD_AFTER, work.closed_ns, work.closed_ns + rest_ns),
    )
    log = without_still_counters(PartReader(path).read(), work)
    options = {"max_foreign_pct": None, **({} if uuids else {"energy": "rapl"})}
    config = ExperimentConfig.from_dict({"model": "any", "measurement": options, "gpus": list(uuids)})
    attempt = AttemptLog(log, marks, choose_sources(config, log.header, uuids))
    energy_j = measure(attempt, window_repeats=1).energy.primary_j
    true_j = world.energy_j(work.opened_ns, work.closed_ns)
    error = {} if energy_j.null_reason is None else {"error": f"null: {energy_j.null_reason.code}"}
    return {"energy_j": energy_j.value, "true_j": true_j, **error}


def provide_environment() -> None:
    """build/peers with the pinned packages, made once for each text of the pins."""
    stamp = FOLDER / "pins.txt"
    if not stamp.exists() or stamp.read_bytes() != PINS.read_bytes():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER)], check=True)
        subprocess.run([str(FOLDER / "bin" / "pip"), "install", "--quiet", "-r", str(PINS)], check=True)
        stamp.write_bytes(PINS.read_bytes())


_MOUNT = 'mount --bind "$1/class" /sys/class && shift && exec "$@"'


def row(name: str, window_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        (scene,) = (row.scene for row in ROWS if row.name == name)
        World(scene, Path(folder), 0).make_powercap()
        own = [sys.executable, "-m", "tests.bench.peers", "--row", name, str(window_s), folder]
        command = ["unshare", "--mount", "sh", "-c", _MOUNT, "sh", folder, *own]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if finished.returncode:
            raise RuntimeError(f"{name}: {finished.stderr[-2000:]}")
        document: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
        return document


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--row"]:
        print(json.dumps(play(arguments[1], float(arguments[2]), Path(arguments[3]))))
        return 0
    provide_environment()
    meters = ("lem", "zeus", "codecarbon")
    print(f"{'meter':<40}{'window':>8}{'true J':>9}" + "".join(f"{name:>26}" for name in meters))
    versions: dict[str, str] = {}
    for name, window_s in SCENES:
        if " ".join(arguments) not in name:
            continue
        found = row(name, window_s)
        versions |= {peer: it["version"] for peer, it in found.items() if "version" in it}
        cells = "".join(f"{_cell(found[meter]):>26}" for meter in meters)
        print(f"{name:<40}{window_s:>6.2f} s{found['lem']['true_j']:>9.1f}{cells}", flush=True)
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    return 0


def _cell(found: Mapping[str, Any]) -> str:
    if found.get("energy_j") is None:
        return str(found.get("error", "nothing"))[:25]
    return f"{found['energy_j'] / found['true_j'] - 1:+.2%}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
