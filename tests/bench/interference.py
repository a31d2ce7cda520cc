"""What a second program does to a campaign, and whether quiet windows are taken for disturbed ones.

    python -m tests.bench.interference disturbed [CYCLES]    two campaigns of two configurations, with real PyTorch
    python -m tests.bench.interference quiet [WINDOWS]       windows of real PyTorch, and of vLLM if the lab is up

`disturbed`: in every second cycle of the second campaign another program keeps all CPUs busy. Each of its windows must
be invalid or have a warning that names the cause, and the ratio of the two configurations must stay within the interval
of the first campaign, which has the machine to itself. `quiet`: no window may be invalid or warned of for interference
or a hole. Both need a machine that does nothing else, and show what else it did.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import lem
from lem.record import Record
from lem.results.check import INTERFERENCE
from tests.lab.places import Places

ROOT = Path(__file__).resolve().parents[2]
CYCLES, WINDOWS = 6, 200
BUSY = (sys.executable, "-c", "while True: pass")
WINDOW_S = 5.0


class Disturber:
    """Another program, which keeps all CPUs busy while it is on."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []

    def turn(self, is_on: bool) -> None:
        if is_on and not self._running:
            self._running = [subprocess.Popen(BUSY) for _ in range(os.cpu_count() or 1)]
        elif not is_on:
            for process in self._running:
                process.kill()
                process.wait()
            self._running = []


# vLLM for CPUs takes the share from the memory of the machine.
OPTIONS = {
    "pytorch": "batch_size: {}",
    "vllm": "max_num_seqs: {}\n      enforce_eager: [true]\n      gpu_memory_utilization: [0.5]",
}


def campaign_text(model: Path, backend: str, cycles: int, widths: Sequence[int] = (1, 4), reuse: str = "cycle") -> str:
    """One configuration for each width of a batch."""
    return f"""\
campaign_name: interference-{backend}
model: {model}
grid:
  backends: [{backend}]
  shared:
    max_output_tokens: [32]
    max_input_tokens: [64]
    fp_precision: [float32]
    ignore_eos: [true]
    gpus: [[]]
    prompts: [{{type: synthetic, input_tokens: 32, sample_size: 8}}]
    measurement.min_window_sec: [{WINDOW_S}]
    warmup.max_prompts: [20]
  backend_overrides:
    {backend}:
      {OPTIONS[backend].format(list(widths))}
execution: {{cycles: {cycles}, reuse: {reuse}, config_gap_seconds: 0, cycle_gap_seconds: 0}}
"""


def run_campaign(folder: Path, python: Path, text: str, disturber: Disturber | None = None) -> lem.Run:
    """The campaign; with a disturber, every second cycle of it is disturbed."""
    folder.mkdir()
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    command = (sys.executable, "-m", "lem", "campaign", "c.yaml", "--executor", "local", "--python", str(python))
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen((*command, "--json", "--yes"), cwd=folder, env=environ, stdout=subprocess.PIPE) as process:
        try:
            for line in process.stdout or ():
                event = json.loads(line)
                if event["event"] == "experiment_started" and disturber is not None:
                    disturber.turn(is_disturbed(event["cycle"]))
        finally:
            if disturber is not None:
                disturber.turn(False)
    name = next(line.removeprefix("campaign_name: ") for line in text.splitlines())
    return lem.read(folder / "results", name)


def is_disturbed(cycle: int) -> bool:
    """Cycles count from 1."""
    return cycle % 2 == 0


def named(record: Record) -> list[str]:
    """The codes by which a record says that it was disturbed, those that make it invalid first."""
    return [
        why.code for why in (*record.validity.invalid_reasons, *record.validity.warnings) if why.code in INTERFERENCE
    ]


def show(records: Sequence[Record]) -> None:
    heads = f"{'cycle':>5} {'configuration':<28} {'attempt':>7} {'valid':>5} {'tok/s':>8} {'waited':>8} {'others':>8}"
    print(f"{heads}  named")
    for record in records:
        identity, found = record.identity, record.interference
        shares = [
            f"{'?' if it is None else f'{100 * it:.1f} %':>8}"
            for it in (found.wait_by_others_ratio, found.foreign_ratio)
        ]
        valid, rate = "yes" if record.validity.valid else "no", record.throughput.output_tok_per_s or 0.0
        head = f"{identity.cycle_index + 1:>5} {identity.config_name:<28} {identity.attempt:>7} {valid:>5} {rate:>8.1f}"
        print(f"{head} {' '.join(shares)}  {', '.join(named(record)) or '-'}")


def ratio_of(run: lem.Run) -> tuple[float, float, float] | None:
    """The ratio of the throughputs with its 95 % interval, over the cycles that count."""
    first, second, *_ = run.configurations
    for pair in lem.compare(first, second).pairs:
        for row in pair.rows:
            if row.metric.name == "output_tok_per_s" and row.effect is not None:
                low, high = row.interval or (0.0, float("inf"))
                return row.effect.ratio, low, high
    return None


def disturbed(cycles: int) -> int:
    """0 if every disturbed window is invalid or named, and the ratio is that of the quiet campaign."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = campaign_text(make_model(folder), "pytorch", cycles)
        quiet = run_campaign(folder / "quiet", Path(sys.executable), text)
        print("quiet")
        show(quiet.records)
        loaded = run_campaign(folder / "loaded", Path(sys.executable), text, Disturber())
        print("\nall CPUs busy in every second cycle")
        show(loaded.records)
    hit = [record for record in loaded.records if is_disturbed(record.identity.cycle_index + 1)]
    missed = [record for record in hit if not named(record)]
    invalid = sum(not record.validity.valid for record in hit)
    print(f"\ndisturbed windows: {len(hit)}, of which invalid {invalid}, neither invalid nor named {len(missed)}")
    false = sum(bool(named(record)) for record in quiet.records)
    print(f"quiet windows: {len(quiet.records)}, named {false} (the machine was not quiet, or the finding is false)")
    expected, found = ratio_of(quiet), ratio_of(loaded)
    if expected is None or found is None:
        print("no ratio: too few cycles count")
        return 1
    is_same = expected[1] <= found[0] <= expected[2]
    print(f"ratio, quiet: {expected[0]:.4f} ({expected[1]:.4f} to {expected[2]:.4f})")
    print(f"ratio, disturbed: {found[0]:.4f}, {'within' if is_same else 'OUTSIDE'} that interval")
    return 0 if is_same and not missed else 1


def quiet(windows: int) -> int:
    """0 if no window of any engine is taken for a disturbed one."""
    false = 0
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name))
        for backend, python in engines():
            seen: list[Record] = []
            cycles = min(20, windows)  # of one window each; a campaign has at most 20
            text = campaign_text(model, backend, cycles, (4,), reuse="campaign")
            for part in range(-(-windows // cycles)):
                run = run_campaign(Path(name, f"{backend}-{part}"), python, text)
                seen += run.records
            found = [record for record in seen if named(record)]
            false += len(found)
            print(f"{backend}: {len(seen)} windows, {len(found)} taken for disturbed")
            for what in ("wait_ratio", "wait_by_others_ratio", "foreign_ratio", "sampler_pause_max_s"):
                values = [value for it in seen if (value := getattr(it.interference, what)) is not None]
                if values:
                    print(f"  {what:<22} median {statistics.median(values):.4f}, greatest {max(values):.4f}")
            show(found)
    return 1 if false else 0


def engines() -> Iterator[tuple[str, Path]]:
    """Each engine that this machine has, with its Python."""
    yield "pytorch", Path(sys.executable)
    vllm = Places.of().folder / "environments/vllm/bin/python"
    if vllm.exists():
        yield "vllm", vllm
    else:
        print("vllm: left out, since the lab is not up (python -m tests.lab up)")


def make_model(folder: Path) -> Path:
    subprocess.run([sys.executable, str(ROOT / "examples/make_demo_model.py"), str(folder / "model")], check=True)
    return folder / "model"


if __name__ == "__main__":
    what, count = sys.argv[1] if len(sys.argv) > 1 else "", int(sys.argv[2]) if len(sys.argv) > 2 else 0
    if what not in ("disturbed", "quiet"):
        sys.exit(__doc__)
    sys.exit(disturbed(count or CYCLES) if what == "disturbed" else quiet(count or WINDOWS))
