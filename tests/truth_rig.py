"""A whole attempt on scripted meters, on a clock that moves only when the engine works or somebody waits.

Everything of lem is real: the harness, the sampler (in lock-step with the clock), NVML through pynvml, powercap files,
the CSV of another meter. Only the clock, the engine, and what lies below NVML and sysfs are scripted, so the joules of
the window are known.
"""

from __future__ import annotations

import dataclasses
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from lem.base import durable
from lem.base.measurement import WINDOW
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import Completion, EngineReport, OnProgress, TokenRequest, say_nothing
from lem.meters.attempt import span_of
from lem.meters.nvml import find_gpus, open_nvml
from lem.meters.sampler import SamplerOptions, run_sampler
from lem.meters.samples import FINISHED_FILENAME, PART_FILENAME, read_finished
from lem.meters.usage import Roots
from lem.record import Record
from lem.worker.channel import RunRequest
from lem.worker.harness import ResidentEngine, run_experiment
from lem.worker.prompts import write_prompts
from lem.worker.shapes import Prompt
from tests.doubles.hwmon import Device, HwmonTree, overwrite
from tests.doubles.nvml.library import SCRIPT_VARIABLE, NvmlDouble
from tests.doubles.nvml.traces import GpuTrace, Trace
from tests.doubles.powercap import Powercap, Zone
from tests.unit.worker.timed_backend import START_UTC, SteppedClock, TimedBackend
from tests.worker_rig import IDENTITY

S = 1_000_000_000
START_NS = 1_000 * S
PROMPTS = [Prompt(f"prompt number {number} of eight") for number in range(8)]
STEP_MS = 40.0  # four turns of two prompts, each of eleven steps, are a pass of 1.76 s
OPTIONS = {"max_output_tokens": 10, "baseline": {"duration_sec": 5.0}}


@dataclass(frozen=True)
class Course:
    """Power that follows the engine."""

    idle_w: float
    busy_w: float

    def energy_j(self, states: Sequence[tuple[int, float]], from_ns: int, to_ns: int) -> float:
        """By (since when, how busy) in order; before the first it idles."""
        total_j = 0.0
        for (start_ns, busy), (end_ns, _) in pairwise([(0, 0.0), *states, (max(to_ns, states[-1][0]) + 1, 0.0)]):
            length_ns = min(end_ns, to_ns) - max(start_ns, from_ns)
            total_j += max(0, length_ns) / S * (self.idle_w + busy * (self.busy_w - self.idle_w))
        return total_j


# What a counter reads in µJ, from seconds since the window opened (negative before) and what it should read;
# None when it cannot be read.
Reading = Callable[[float, int], int | None]


@dataclass(frozen=True)
class Package:
    """A zone of powercap, its power, and what is wrong with its counter."""

    folder: str  # `intel-rapl:0`
    name: str
    course: Course
    begins_uj: int = 5_000_000_000
    max_uj: int = 65_532_610_987
    range_uj: int | None = None  # its max_energy_range_uj where that is not where it wraps
    limit_w: float | None = None  # its `long_term` constraint
    reading: Reading = lambda _, energy_uj: energy_uj
    is_counted: bool = True  # False for a second view on joules that another zone has

    @property
    def zone(self) -> Zone:
        limit_uw = None if self.limit_w is None else round(self.limit_w * 1e6)
        return Zone(self.folder, self.name, max_uj=self.range_uj or self.max_uj, max_power_uw=limit_uw)


@dataclass(frozen=True)
class Sensed:
    """A device of hwmon, its power, and what is wrong with its files in the window."""

    device: Device
    course: Course
    is_in_use: bool = True  # of a GPU: the engine computes on it
    is_counted: bool = True  # False for one whose joules another one has too
    absent_s: tuple[float, float] = (0.0, 0.0)  # when its files are gone, by the seconds since the window opened
    reset_s: float | None = None  # when its counter begins again, likewise


@dataclass(frozen=True)
class CsvMeter:
    """A meter at the plug, which writes the mean power of a while before each reading."""

    period_s: float = 1.0
    mean_s: float = 0.1
    ahead_s: float = 0.0  # its clock against UTC
    header: str = "time,power_w"
    factor: float = 1.0  # what it writes for a watt
    base_w: float = 150.0  # what the machine draws besides what the scene meters
    share: float = 1.0  # of what the scene meters
    swing_w: float = 0.0  # of a load of its own, in periods of 37 s
    hole_s: tuple[float, float] = (0.0, 0.0)  # since the window opened


@dataclass(frozen=True)
class Scene:
    """A machine and an experiment on it."""

    gpus: tuple[GpuTrace, ...] = ()
    in_use: tuple[int, ...] = (0,)  # places of `gpus`
    at_window: Callable[[float], Sequence[str]] = lambda _: ()  # more lines of the script, by its seconds
    packages: tuple[Package, ...] = ()
    cpu: Course | None = None  # the load of the CPU as a course of W, for a machine without a meter of it
    csv: CsvMeter | None = None
    sensed: tuple[Sensed, ...] = ()
    is_jetson: bool = False
    script: tuple[str, ...] = ()  # more lines of the script
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    true_j: float
    record: Record


class LockStep:
    """The owner of a sampler in a thread of its own that runs only while the other side waits for it."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Sequence[str] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.next_ns: int | None = None

    def wait(self, until_ns: int) -> Sequence[str] | None:
        self._asked.put(until_ns)
        return self._answers.get()

    def start(self, run: Callable[[], None]) -> None:
        def body() -> None:
            try:
                run()
            except BaseException as error:  # noqa: BLE001 (raised again on the other side)
                self._error = error
            self._asked.put(None)

        self._thread = threading.Thread(target=body, daemon=True)
        self._thread.start()
        self._take()

    def step(self) -> None:
        self._answers.put(())
        self._take()

    def end(self) -> None:
        if self.next_ns is not None:
            self._answers.put(None)
            self._take()

    def _take(self) -> None:
        self.next_ns = self._asked.get()
        if self._error is not None:
            raise self._error


@dataclass
class World(SteppedClock):
    """The clock, and all that changes with it."""

    folder: Path
    scene: Scene

    def __post_init__(self) -> None:
        super().__init__(START_NS)
        self.states: list[tuple[int, float]] = [(START_NS, 0.0)]
        self.sampler = LockStep()
        self.window_ns: int | None = None
        (self.folder / "proc").mkdir()
        self._load = self.folder / "load"
        self._load.touch()
        self._now = os.open(self.folder / "now", os.O_CREAT | os.O_WRONLY, 0o644)
        self.gpus = tuple(self._on_load(gpu) for gpu in self.scene.gpus)
        self.double = NvmlDouble(self.folder / "nvml", more=(str(self.folder / "now"),))
        self.powercap = Powercap(self.folder / "powercap", tuple(it.zone for it in self.scene.packages))
        self.powercap.make(0)
        devices = tuple(it.device for it in self.scene.sensed)
        self.hwmon = HwmonTree(self.folder / "sys", devices, self.scene.is_jetson)
        self.hwmon.make(0, lambda _: 50.0)
        self.csv_path = self.folder / "meter.csv"
        self._csv_next_ns = START_NS - 60 * S  # it has run for a while
        if self.scene.csv is not None:
            self.csv_path.write_text(f"{self.scene.csv.header}\n" if self.scene.csv.header else "")
        self._say(())
        self._update()

    def sleep(self, duration_s: float) -> None:
        assert duration_s > 0
        self._move(self.now_ns + round(duration_s * S))

    def advance_ms(self, duration_ms: float) -> None:
        self._move(self.now_ns + round(duration_ms * 1e6))

    def set_busy(self, busy: float) -> None:
        if self.states[-1][0] == self.now_ns:  # the next pass begins as the last one ends
            self.states.pop()
        if self.states[-1][1] != busy:
            self.states.append((self.now_ns, busy))
        self._load.write_text("".join(f"{at_ns} {state:g}\n" for at_ns, state in self.states[1:]))

    # The harness reports its phases.

    def phase(self, name: str) -> None:
        if name == "window":
            self.window_ns = self.now_ns
            self._say(tuple(self.scene.at_window((self.now_ns - START_NS) / S)))

    def progress(self, done: int, total: int | None, text: str) -> None:
        pass

    def gpus_j(self, from_ns: int, to_ns: int, places: Sequence[int]) -> float:
        text = self._load.read_text()
        trace = Trace(START_NS, self.gpus).after_load(dict.fromkeys(range(len(self.gpus)), text))
        return sum(trace.energy_j(from_ns, to_ns, place) for place in places)

    def packages_j(self, from_ns: int, to_ns: int) -> float:
        counted = (it for it in self.scene.packages if it.is_counted)
        return sum(it.course.energy_j(self.states, from_ns, to_ns) for it in counted)

    def machine_j(self, from_ns: int, to_ns: int) -> float:
        assert self.scene.csv is not None
        parts_j = self.gpus_j(from_ns, to_ns, range(len(self.gpus))) + self.packages_j(from_ns, to_ns)
        parts_j += self.scene.cpu.energy_j(self.states, from_ns, to_ns) if self.scene.cpu else 0.0
        return self.scene.csv.share * parts_j + self.scene.csv.base_w * (to_ns - from_ns) / S

    def _on_load(self, gpu: GpuTrace) -> GpuTrace:
        return (
            gpu
            if gpu.load is None
            else dataclasses.replace(gpu, load=dataclasses.replace(gpu.load, path=str(self._load)))
        )

    def _say(self, more: Sequence[str]) -> None:
        lines = Trace(START_NS, self.gpus).lines() if self.gpus else ["count 0"]
        self.double.say(*lines, *self.scene.script, *more)

    def _move(self, until_ns: int) -> None:
        while self.sampler.next_ns is not None and self.sampler.next_ns <= until_ns:
            self.now_ns = max(self.now_ns, self.sampler.next_ns)
            self._update()
            self.sampler.step()
        self.now_ns = until_ns
        self._update()

    def _update(self) -> None:
        os.pwrite(self._now, b"now %020d\n" % self.now_ns, 0)
        # No second: its times of processes stay as they are.
        busy_s = sum(max(0, min(end, self.now_ns) - start) * busy for (start, busy), (end, _) in self._spans()) / S
        ticks = (round(100 * busy_s), round(100 * ((self.now_ns - START_NS) / S - busy_s)))
        overwrite(self.folder / "proc" / "stat", b"cpu %d 0 0 %d 0 0 0 0 0 0\n" % ticks)
        for it in self.scene.packages:
            self._write_zone(it)
        for number, sensed in enumerate(self.scene.sensed):
            self._write_sensed(number, sensed)
        if self.scene.csv is not None:
            self._write_csv(self.scene.csv)

    def _write_sensed(self, number: int, it: Sensed) -> None:
        now_ns, since_s = self.now_ns, self._since_window_s()
        if it.absent_s[0] <= since_s and it.absent_s != (0.0, 0.0):
            # Its driver is unloaded, and when it is back, its device has another number.
            folder = self.hwmon.sys / "class/hwmon"
            (folder / f"hwmon{number}").unlink(missing_ok=True)
            if since_s >= it.absent_s[1] and not (folder / f"hwmon{number + 9}").is_symlink():
                (folder / f"hwmon{number + 9}").symlink_to(self.hwmon.folder_of(number))
        from_ns = START_NS
        if it.reset_s is not None and since_s >= it.reset_s:
            from_ns = now_ns - round((since_s - it.reset_s) * S)

        def mean_w(seconds: float) -> float:
            return it.course.energy_j(self.states, now_ns - round(seconds * S), now_ns) / seconds

        self.hwmon.update(number, round(1e6 * it.course.energy_j(self.states, from_ns, now_ns)), mean_w)

    def sensed_j(self, from_ns: int, to_ns: int) -> float:
        counted = [it for it in self.scene.sensed if it.is_counted]
        return sum(it.course.energy_j(self.states, from_ns, to_ns) for it in counted)

    def _spans(self) -> Iterator[tuple[tuple[int, float], tuple[int, float]]]:
        return pairwise([*self.states, (self.now_ns + 1, 0.0)])

    def _write_zone(self, it: Package) -> None:
        path = self.folder / "powercap" / it.folder / "energy_uj"
        true_uj = it.begins_uj + round(1e6 * it.course.energy_j(self.states, START_NS, self.now_ns))
        value = it.reading(self._since_window_s(), true_uj % it.max_uj)
        if value is None:
            path.unlink(missing_ok=True)
        else:
            overwrite(path, b"%d\n" % value)

    def _since_window_s(self) -> float:
        """Since the window's engine first worked, after the guard; without one it is far off."""
        first = next((at for at, busy in self.states if busy and at >= (self.window_ns or self.now_ns + 1)), None)
        return -1e6 if first is None else (self.now_ns - first) / S

    def _write_csv(self, meter: CsvMeter) -> None:
        rows = []
        while self._csv_next_ns <= self.now_ns:
            at_ns, mean_ns = self._csv_next_ns, round(meter.mean_s * S)
            self._csv_next_ns += round(meter.period_s * S)
            into_s = self._since_window_s()
            if meter.hole_s[0] <= into_s < meter.hole_s[1]:
                continue
            power_w = self.machine_j(at_ns - mean_ns, at_ns) / meter.mean_s
            power_w += meter.swing_w * math.sin(2 * math.pi * at_ns / S / 37)
            utc_s = START_UTC.timestamp() + (at_ns - START_NS) / S + meter.ahead_s
            rows.append(f"{utc_s:.3f},{power_w * meter.factor:.6g}\n")
        if rows:
            with self.csv_path.open("a") as file:
                file.write("".join(rows))


@dataclass
class BusyBackend(TimedBackend):
    """Tells the world when it works."""

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        assert isinstance(self.clock, World)
        if not self.clock.states[-1][1]:
            self.clock.set_busy(1.0)
        return super().generate(requests, observe_tokens=observe_tokens, on_progress=on_progress)

    def synchronize(self) -> None:
        assert isinstance(self.clock, World)
        if self.clock.states[-1][1]:
            self.clock.set_busy(0.0)


def play(scene: Scene, folder: Path) -> Outcome:
    """The record of an attempt on that machine, and the joules of its window."""
    folder.mkdir(parents=True)
    world = World(folder, scene)
    os.environ[SCRIPT_VARIABLE] = world.double.variables()[SCRIPT_VARIABLE]
    write_prompts(folder, PROMPTS)
    uuids = tuple(gpu.uuid for gpu in scene.gpus)
    in_use = tuple(uuids[place] for place in scene.in_use if place < len(uuids))
    addresses = tuple(it.device.address for it in scene.sensed if it.device.address and it.is_in_use)
    seen = {gpu.uuid for gpu in find_gpus()}
    sampled = (*(uuid for uuid in in_use if uuid in seen), *dict.fromkeys(addresses))
    in_use += tuple(dict.fromkeys(addresses))
    measurement = {"external_csv": str(world.csv_path)} if scene.csv is not None else {}
    measurement.update(scene.options.get("measurement", {}))
    options = {**OPTIONS, **scene.options, "measurement": measurement}
    config = ExperimentConfig.from_dict({"model": "any", **options})
    durable.write_json(folder / "config.json", {"requested": {"model": "any"}})
    report = EngineReport(
        "timed", "1", {}, "cuda" if in_use else "cpu", in_use, model_parameters=10, embedding_parameters=1
    )
    backend = BusyBackend(world, report=report, prefill_ms=STEP_MS, token_ms=STEP_MS)
    request = RunRequest(
        config=config.to_dict(),
        identity=IDENTITY,
        result_dir=str(folder),
        engine_key=config.engine_key(),
        keep_engine=True,
        samples_path=str(folder / PART_FILENAME),
        sampled_gpus=sampled,
    )
    options_of_sampler = SamplerOptions(folder / PART_FILENAME, sampled, energy=config.measurement.energy)
    with open_nvml() as nvml:
        world.sampler.start(
            lambda: run_sampler(
                options_of_sampler,
                nvml,
                world,
                world.sampler,
                roots=Roots(proc=folder / "proc", sys=folder / "sys", powercap=folder / "powercap"),
            )
        )
        try:
            record = run_experiment(request, ResidentEngine(backend.load, world), world, world)
        finally:
            world.sampler.end()
    _, marks = read_finished(folder / FINISHED_FILENAME)
    window = span_of(marks, WINDOW)
    assert window is not None
    edges = window.opened_ns, window.closed_ns
    places = [place for place in scene.in_use if place < len(uuids)]
    true_j = world.gpus_j(*edges, places) if places else world.packages_j(*edges)
    if scene.sensed:
        true_j = world.sensed_j(*edges)
    if scene.csv is not None:
        true_j = world.machine_j(*edges)
    return Outcome(true_j, record)
