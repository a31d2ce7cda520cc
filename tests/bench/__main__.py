"""Figures of the program itself beside their targets: `make bench`.

Each is measured where it is made: CPU time and memory of a process by the kernel's own account of it, what takes part
in a campaign inside that campaign. Where a target is a ratio both sides are measured in turn, in this one run.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lem.cli.main import main as run_lem
from lem.config.campaign_config import CampaignGridConfig
from lem.orchestration.grid import expand_campaign_grid, validate_campaign_grid
from lem.orchestration.manifest import CampaignManifestEntry, ManifestManager
from tests.bench.builds import PYZ, ROOT, Build
from tests.bench.containers import containers, dispatch
from tests.bench.fleet import fleet
from tests.bench.host import HEADER, Figure, process_cost, run_host
from tests.browser import browser, opened
from tests.lab.places import Places
from tests.needs import missing
from tests.synthetic_campaign import sweep

STARTS = 21
SAVES = 25
WARM_EXPERIMENTS = 22
IN_REPORT = 1000

# Pairs of runs, which need a machine to themselves for some minutes.
BESIDE = """
Beside others, in ABBA pairs, for some minutes on a machine that does nothing else:
  lem's own time and memory beside those of the first build, with the targets (--help lists the groups):
    {python} -m tests.bench.speed
  a bare loop around `generate` of transformers:
    {python} -m tests.bench.bare
  a second program beside a campaign, and quiet windows of real engines:
    {python} -m tests.bench.interference disturbed
    {python} -m tests.bench.interference quiet
  the sampler and the heartbeats of the first build, and other tools on meters whose joules are known (as root):
    {python} -m tests.bench.sampler
    {python} -m tests.bench.sampler hwmon
    {python} -m tests.bench.peers
  the load clients of vLLM, AIPerf and guidellm on a server whose truth is known (their environments: see the module):
    {python} -m tests.bench.client
  the playbooks on 100 hosts that are not there, first build and new (about 20 minutes of CPU time):
    {python} -m tests.bench fleet
  `make test` of the first build and of this tree, each with its own environment and lab (an hour or more, as root):
    {python} -m tests.bench.suite
  vLLM's own offline benchmark, once the lab is up:
    {lab}/environments/vllm/bin/python -m tests.bench.offline {lab}/models/demo
  `vllm bench serve` on the same server, once the lab is up:
    {python} -m tests.bench.served"""


def main() -> int:
    """0; a figure above its target is shown as such, for a person to judge on a machine that may be busy."""
    print(HEADER)
    if sys.argv[1:2] == ["fleet"]:
        show(fleet(*map(int, sys.argv[2:])))
        return 0
    for measure in (start_up, grid, manifest, host_of_a_campaign):
        show(measure())
    if (no_browser := missing("chromium")) is None:
        show(report())
    reason = missing("docker") or missing("lab")
    if reason is None:
        show(dispatch())
        show(containers())
    print(BESIDE.format(python=sys.executable, lab=Places.of().folder))
    if no_browser is not None:
        print(f"\nLEFT OUT: every figure about the report, for {no_browser}")
    if reason is not None:
        print(f"\nLEFT OUT: every figure about containers, for {reason}")
    return 0


def show(figures: Iterator[Figure]) -> None:
    for figure in figures:
        print(figure, flush=True)


def start_up() -> Iterator[Figure]:
    """CPU time and memory of `lem.pyz --help`, beside a Python that does nothing."""
    commands = (("-c", "pass"), (str(PYZ), "--help"))
    with tempfile.TemporaryDirectory() as folder:
        costs = [
            [process_cost(Path(folder), *words, environ={"LEM_CACHE_DIR": folder}) for words in commands]
            for _ in range(STARTS)
        ]
    unit_ms = 1000 * statistics.median(nothing.cpu_s for nothing, _ in costs)
    help_ms = 1000 * statistics.median(helping.cpu_s for _, helping in costs)
    yield Figure("python -c pass, CPU time (the unit)", unit_ms, "ms", None)
    yield Figure("lem.pyz --help, CPU time", help_ms, "ms", 60 + 5 * unit_ms)
    yield Figure("lem.pyz --help, CPU time in units", help_ms / unit_ms, "units", 5 + 60 / unit_ms)
    memory_mib = statistics.median(helping.memory_kib for _, helping in costs) / 1024
    yield Figure("lem.pyz --help, memory", memory_mib, "MiB", 25)


def grid() -> Iterator[Figure]:
    """Expansion and validation of 10,000 experiments."""
    shared = {
        "max_output_tokens": list(range(1, 101)),
        "max_input_tokens": list(range(101, 111)),
        "decoder.temperature": [value / 10 for value in range(1, 11)],
    }
    config = CampaignGridConfig(backends=("pytorch",), models=("model",), shared=shared)
    begin_s = time.process_time()
    result = validate_campaign_grid(expand_campaign_grid(config))
    elapsed_s = time.process_time() - begin_s
    assert len(result.valid_configs) == 10_000, result.summary
    yield Figure("grid of 10,000: expansion and validation, CPU time", elapsed_s, "s", 1)


def manifest() -> Iterator[Figure]:
    """One transition: an entry is changed, until that is on disk."""
    for count, target_ms in ((1_000, 10), (10_000, 10)):
        with tempfile.TemporaryDirectory() as folder:
            elapsed_s = transition_time(Path(folder), count)
        yield Figure(f"manifest of {count:,}: one transition", 1000 * elapsed_s, "ms", target_ms)


def transition_time(folder: Path, count: int) -> float:
    """Median seconds of a transition in a manifest of so many entries."""
    manager = ManifestManager(folder / "campaign_manifest.json")
    entries = [
        CampaignManifestEntry(
            exp_id=f"{index:012x}-c1",
            config_name=f"model-pytorch-{index}",
            config_path=f"configs/bench/model-pytorch-{index}.yaml",
            config_hash=f"{index:016x}",
            backend="pytorch",
            container=None,
            cycle_index=0,
            order_index=index,
        )
        for index in range(count)
    ]
    state = manager.create_manifest("0" * 8, "bench", "0" * 16, entries)
    manager.save(state)
    times_s = []
    for index in range(SAVES):
        begin_s = time.perf_counter()
        entry = state.update_entry(entries[index // 2].exp_id, status=("running", "completed")[index % 2])
        manager.save_entry(state, entry)
        times_s.append(time.perf_counter() - begin_s)
    return statistics.median(times_s)


def host_of_a_campaign() -> Iterator[Figure]:
    """What the host costs beside the worker, with an engine that answers at once and stays loaded."""
    with tempfile.TemporaryDirectory() as folder:
        cost = run_host(Build(PYZ, ROOT), Path(folder) / "campaign", WARM_EXPERIMENTS, WARM_EXPERIMENTS)
    yield Figure("host, CPU time an experiment (warm)", 1000 * cost.each_cpu_s, "ms", 10)
    yield Figure("host, from a result written to the next one's start", 1000 * cost.turn_s, "ms", 10)
    yield Figure("host process of a campaign, memory", cost.memory_kib / 1024, "MiB", 60)


# From the start of the navigation to the first frame after the page was loaded and laid out.
_DRAWN = """() => new Promise(resolve => {
    document.body.getBoundingClientRect();
    requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now())));
})"""


def report() -> Iterator[Figure]:
    """With one cycle, which gives the most configurations, and with five."""
    for cycles in (1, 5):
        with tempfile.TemporaryDirectory() as folder:
            yield from _report_of(cycles, Path(folder))


def _report_of(cycles: int, folder: Path) -> Iterator[Figure]:
    written = sweep(IN_REPORT, cycles=cycles).write(folder)
    page = folder / "report.html"
    name = f"report of {IN_REPORT:,} experiments, {cycles} {'cycle' if cycles == 1 else 'cycles'}"
    command = ["report", written.campaign, "--results-dir", str(written.results_dir), "--output", str(page)]
    begin_s = time.process_time()
    if run_lem(command, io.StringIO(), io.StringIO()) != 0:
        raise RuntimeError("lem report fails")
    yield Figure(f"{name}: to make, CPU time", time.process_time() - begin_s, "s")
    yield Figure(f"{name}: size", page.stat().st_size / 1e6, "MB", 2)
    with browser() as started, opened(started, page) as found:
        yield Figure(f"{name}: drawn in", found.evaluate(_DRAWN) / 1000, "s", 2)


if __name__ == "__main__":
    sys.exit(main())
