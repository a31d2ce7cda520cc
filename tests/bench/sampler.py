"""What a sampler and the heartbeats of a worker cost, beside the first build's.

    python -m tests.bench.sampler [PAIRS] [SECONDS]
    python -m tests.bench.sampler hwmon [SECONDS]

The second prints what hwmon devices cost, read from plain files: what a driver takes to answer comes on top.

Pairs of runs in the order ABBA, on the NVML double: CPU time by the kernel's own account (/proc/PID/schedstat), over a
stretch in which nothing begins or ends. The sampler reads one GPU every 100 ms; the one of this build also watches an
engine of 16 threads. Heartbeats are those of a campaign whose engine sleeps: host and supervisor, without the sampler.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lem.base.clock import Clock
from lem.base.process import below, list_processes
from lem.meters.sampler import PipeOwner, SamplerOptions, run_sampler
from lem.meters.usage import Roots
from tests.bench.builds import OLD_COMMIT, ROOT, Build, build_of, old_build
from tests.bench.host import in_turn, start_campaign
from tests.doubles.hwmon import Device, HwmonTree, acpi, amd, intel, jetson
from tests.doubles.nvml.library import NvmlDouble
from tests.doubles.nvml.traces import Counter, GpuTrace, Level, PowerSignal, Trace
from tests.processes import wait_for

PAIRS, SECONDS = 4.0, 20.0
UUID = "GPU-11111111-2222-3333-4444-555555555555"
_ENGINE = "import threading, time\nfor _ in range(15): threading.Thread(target=time.sleep, args=(600,)).start()\n"
_SETTLED_S = 3.0
_READY_S = 60.0


def cpu_s(pids: Sequence[int]) -> float:
    """CPU time of all threads of these processes so far."""
    total_ns = 0
    for pid in pids:
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            total_ns += int(path.read_text(encoding="ascii").split()[0])
    return total_ns / 1e9


def sampler_cost(build: Build, folder: Path, environ: dict[str, str], seconds: float, engine: int | None) -> float:
    """The share of a CPU that a sampler takes."""
    output = folder / "samples.part"
    output.unlink(missing_ok=True)
    command = [sys.executable, str(build.zip), "worker", "--sampler", "--output", str(output), "--gpu", UUID]
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE) as sampler:
        wait_for(lambda: True if output.exists() and output.stat().st_size > 0 else None, _READY_S)
        if engine is not None and sampler.stdin is not None:
            sampler.stdin.write(f"watch {engine}\n".encode())
            sampler.stdin.flush()
        share = _share_of_cpu(lambda: [sampler.pid], seconds)
    if sampler.returncode:
        raise RuntimeError(f"the sampler of {build.zip} ended with {sampler.returncode}")
    return share


HWMON: Mapping[str, tuple[Device, tuple[str, ...]]] = {
    "an AMD GPU (gpu_metrics, power1_average)": (amd(), ("0000:03:00.0",)),
    "an Intel GPU (energy1_input)": (intel(), ("0000:4d:00.0",)),
    "a Jetson (in1_input, curr1_input)": (jetson(), ()),
    "an ACPI power meter": (acpi(), ()),
    "nothing but the CPU": (Device("none"), ()),
}


def hwmon_cost(folder: Path, device: Device, gpus: tuple[str, ...], seconds: float) -> float:
    """The share of a CPU of a sampler on a tree that changes a hundred times a second."""
    tree, output = HwmonTree(folder / "sys", (device,)), folder / "samples.part"
    tree.make(0, lambda _: 100.0)
    command = [sys.executable, "-m", "tests.bench.sampler", "--hwmon", str(folder), *gpus]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as sampler:
        wait_for(lambda: True if output.exists() and output.stat().st_size > 0 else None, _READY_S)
        is_over, begun_s = threading.Event(), time.monotonic()

        def write() -> None:
            while not is_over.wait(0.01):
                tree.update(0, round((time.monotonic() - begun_s) * 100e6), lambda _: 100.0)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(write)
            share = _share_of_cpu(lambda: [sampler.pid], seconds)
            is_over.set()
    return share


def _sample_hwmon(folder: Path, gpus: Sequence[str]) -> None:
    options = SamplerOptions(folder / "samples.part", tuple(gpus), energy="hwmon")
    roots = Roots(sys=folder / "sys", powercap=folder / "powercap")
    run_sampler(options, "no NVML", Clock(), PipeOwner(0, os.pipe()[0]), roots=roots)


def hwmon(seconds: float) -> None:
    for name, (device, gpus) in HWMON.items():
        with tempfile.TemporaryDirectory() as folder:
            print(f"sampler of {name}: {hwmon_cost(Path(folder), device, gpus, seconds):.2%} of one CPU", flush=True)


def heartbeat_cost(build: Build, folder: Path, environ: dict[str, str], seconds: float) -> float:
    """The share of a CPU that a campaign takes while its engine sleeps."""
    script = json.dumps({"token_s": seconds})
    with tempfile.TemporaryDirectory(dir=folder) as place:
        more = {**environ, "LEMTEST_ENGINE_SCRIPT": script}
        with start_campaign(build, Path(place), 1, environ=more) as host:
            for line in host.stdout or ():
                event = json.loads(line)
                if event["event"] == "phase" and event.get("phase") == "window":
                    break
            share = _share_of_cpu(lambda: list(_without_sampler(host.pid)), seconds)
            host.terminate()
            host.communicate()
    return share


def _without_sampler(host: int) -> Iterator[int]:
    for pid in [host, *below(host, list_processes())]:
        if b"--sampler" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            yield pid


def _share_of_cpu(pids: Callable[[], list[int]], seconds: float) -> float:
    time.sleep(_SETTLED_S)
    found, begun_s = pids(), time.monotonic()
    before_s = cpu_s(found)
    time.sleep(seconds)
    return (cpu_s(found) - before_s) / (time.monotonic() - begun_s)


def main() -> int:
    """0; the figures are for a person to judge."""
    if sys.argv[1:2] == ["--hwmon"]:
        _sample_hwmon(Path(sys.argv[2]), sys.argv[3:])
        return 0
    if sys.argv[1:2] == ["hwmon"]:
        hwmon(float(sys.argv[2]) if len(sys.argv) > 2 else SECONDS)
        return 0
    numbers = [float(word) for word in sys.argv[1:]]
    pairs, seconds = (*numbers, *(PAIRS, SECONDS)[len(numbers) :])
    with tempfile.TemporaryDirectory() as text, subprocess.Popen([sys.executable, "-c", _ENGINE]) as engine:
        folder = Path(text)
        then, now = old_build(), build_of(ROOT, folder / "lem.pyz")
        double = NvmlDouble(folder / "nvml")
        signal = PowerSignal(levels=(Level(0.0, 300.0),))
        double.say(*Trace(1, (GpuTrace(uuid=UUID, signal=signal, counter=Counter(period_s=0.1)),)).lines())
        environ = {name: value for name, value in os.environ.items() if not name.startswith("LEM")}
        environ |= {**double.variables(), "LEM_LOCK_DIR": text, "LEM_CACHE_DIR": text}
        costs: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
            "sampler": (
                lambda: sampler_cost(now, folder, environ, seconds, engine.pid),
                lambda: sampler_cost(then, folder, environ, seconds, None),
            ),
            "heartbeats": (
                lambda: heartbeat_cost(now, folder, environ, seconds),
                lambda: heartbeat_cost(then, folder, environ, seconds),
            ),
        }
        try:
            for name, (ours, theirs) in costs.items():
                shares = list(in_turn(ours, theirs, round(pairs)))
                ratio = statistics.geometric_mean(mine / other for mine, other in shares)
                mine = statistics.fmean(share for share, _ in shares)
                other = statistics.fmean(share for _, share in shares)
                print(
                    f"{name}: {mine:.3%} of one CPU, {OLD_COMMIT[:7]} {other:.3%}; ratio {ratio:.3f} "
                    f"({', '.join(f'{one / two:.3f}' for one, two in shares)})",
                    flush=True,
                )
        finally:
            engine.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
