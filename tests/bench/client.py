"""The load client beside those of vLLM, AIPerf and guidellm, on a server of streams whose truth is known.

    python -m tests.bench.client [CLIENT…]

Clients are lem, vllm, aiperf and guidellm; all by default, for about 12 minutes on a machine that does nothing else.
The server (scripted_server.c, built with gcc) puts into every token the time at which it sent it, and reports what TTFT
and ICL were. Each peer's runs stand between two of lem's. CPU time is that of the whole process tree; memory is the
peak of its proportional sets (PSS). The peers run in environments of their own: vLLM's is the lab's, those of
AIPerf and guidellm are build/peers-NAME, from requirements-NAME.txt, or LEM_PEERS/NAME.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.base import process
from tests.lab.places import Places

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("scripted_server.c")
TIMEOUT_S = 400
_SAMPLE_S = 0.2

TTFT_MS, FAST_MS, SLOW_MS = 100, 20, 50  # 50 and 20 tokens a second
LEVELS = (1, 16, 64, 256)
FULL = 1000
FEW, MANY = 50, 300  # tokens a stream at FULL: 50,000 and 300,000
QUIET_RUNS, BUSY_RUNS = 20, 6
OFF = 0.02  # more than this away from the truth must name the client


@dataclass(frozen=True)
class Load:
    concurrency: int
    requests: int
    tokens: int
    icl_ms: int
    is_batch: bool = False
    is_split: bool = False
    keeps_texts: bool = False


@dataclass(frozen=True)
class Run:
    cpu_s: float
    memory_mib: float
    found: Mapping[str, Any]  # what the client reports: ttft_ms, icl_p99_ms, and more of lem
    truth: Mapping[str, float]

    @property
    def ttft(self) -> float:
        """Over the truth."""
        return float(self.found["ttft_ms"] / self.truth["ttft_ms"])

    @property
    def icl_p99(self) -> float:
        return float(self.found["icl_p99_ms"] / self.truth["icl_p99_ms"])


@dataclass(frozen=True)
class Client:
    """A program that puts load on a server: its command for a port, a load and a folder, and what it found."""

    name: str
    command: Callable[[int, Load, Path], Sequence[str]]
    read: Callable[[Path, str], Mapping[str, Any]]


# Clients


def _lem(port: int, load: Load, _: Path) -> Sequence[str]:
    numbers = (port, load.concurrency, load.requests, load.tokens, int(load.keeps_texts))
    return [sys.executable, "-m", "tests.bench.client_side", *map(str, numbers)]


def _model() -> str:
    return str(Places.of().models / "demo")


def _peer(name: str) -> str:
    folder = os.environ.get("LEM_PEERS")
    return str((ROOT / "build" / f"peers-{name}" if folder is None else Path(folder) / name) / "bin" / name)


def _vllm(port: int, load: Load, folder: Path) -> Sequence[str]:
    program = [str(Places.of().environment("vllm") / "bin/python"), "-m", "vllm.entrypoints.cli.main"]
    options = {
        "backend": "openai",
        "base-url": f"http://127.0.0.1:{port}",
        "endpoint": "/v1/completions",
        "model": "m",
        "tokenizer": _model(),
        "dataset-name": "random",
        "random-input-len": 8,
        "random-output-len": load.tokens,
        "num-prompts": load.requests,
        "max-concurrency": load.concurrency,
        "result-dir": folder,
        "result-filename": "result.json",
        "percentile-metrics": "ttft,itl",
        "metric-percentiles": 99,
    }
    return [*program, "bench", "serve", "--ignore-eos", "--save-result", "--disable-tqdm", *_options(options)]


def _read_vllm(folder: Path, _: str) -> Mapping[str, Any]:
    found = json.loads((folder / "result.json").read_text())
    return {"good": found["completed"], "ttft_ms": found["mean_ttft_ms"], "icl_p99_ms": found["p99_itl_ms"]}


def _aiperf(port: int, load: Load, folder: Path) -> Sequence[str]:
    options = {
        "model": "m",
        "url": f"http://127.0.0.1:{port}",
        "endpoint-type": "completions",
        "endpoint": "/v1/completions",
        "concurrency": load.concurrency,
        "request-count": load.requests,
        "isl": 8,
        "osl": load.tokens,
        "extra-inputs": "ignore_eos:true",
        "tokenizer": _model(),
        "ui": "none",
        "output-artifact-dir": folder,
    }
    flags = ("--streaming", "--use-server-token-count", "--no-gpu-telemetry", "--no-server-metrics")
    return [_peer("aiperf"), "profile", *flags, *_options(options)]


def _read_aiperf(folder: Path, _: str) -> Mapping[str, Any]:
    found = json.loads((folder / "profile_export_aiperf.json").read_text())
    gaps = found["inter_chunk_latency"]["p99"]
    return {"good": found["request_count"]["avg"], "ttft_ms": found["time_to_first_token"]["avg"], "icl_p99_ms": gaps}


def _guidellm(port: int, load: Load, folder: Path) -> Sequence[str]:
    options = {
        "backend": f"kind=openai_http,target=http://127.0.0.1:{port},model=m,request_format=/v1/completions",
        "profile": f"kind=concurrent,streams={load.concurrency}",
        "constraint": f"kind=max_requests,count={load.requests}",
        "tokenizer": f"kind=hf_auto,model={_model()}",
        "data": f"kind=synthetic_text,prompt_tokens=8,output_tokens={load.tokens}",
        "output": f"kind=json,path={folder / 'result.json'}",
    }
    return [_peer("guidellm"), "run", "--disable-console", *_options(options)]


def _read_guidellm(folder: Path, _: str) -> Mapping[str, Any]:
    found = json.loads((folder / "result.json").read_text())["benchmarks"][0]["metrics"]
    ttft, gaps = (found[name]["successful"] for name in ("time_to_first_token_ms", "inter_token_latency_ms"))
    return {"good": ttft["count"], "ttft_ms": ttft["mean"], "icl_p99_ms": gaps["percentiles"]["p99"]}


def _options(options: Mapping[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


CLIENTS = {
    it.name: it
    for it in (
        Client("lem", _lem, lambda _, out: json.loads(out.splitlines()[-1])),
        Client("vllm", _vllm, _read_vllm),
        Client("aiperf", _aiperf, _read_aiperf),
        Client("guidellm", _guidellm, _read_guidellm),
    )
}

# Runs


@contextlib.contextmanager
def serving(program: Path, load: Load) -> Iterator[int]:
    """The port of a scripted server."""
    numbers = (1000 * TTFT_MS, 1000 * load.icl_ms, int(load.is_batch), int(load.is_split))
    server = subprocess.Popen([str(program), *map(str, numbers)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield int(server.stdout.readline())
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def truth_of(port: int) -> dict[str, float]:
    """What the server did since the last call."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats", timeout=10) as answer:
        found: dict[str, float] = json.load(answer)
    return found


def run(client: Client, load: Load, program: Path) -> Run:
    with tempfile.TemporaryDirectory() as name, serving(program, load) as port:
        folder = Path(name)
        truth_of(port)
        environ = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with (folder / "out").open("w+b") as out, (folder / "log").open("wb") as log:
            child = subprocess.Popen(
                client.command(port, load, folder),
                stdout=out,
                stderr=log,
                env=environ,
                cwd=ROOT,
                start_new_session=True,
            )
            killer = threading.Timer(TIMEOUT_S, process.kill_group, (child.pid,))
            killer.start()
            peak = _Peak(child.pid)
            _, status, usage = os.wait4(child.pid, 0)
            memory_mib = peak.stop()
            killer.cancel()
            child.returncode = os.waitstatus_to_exitcode(status)
            process.kill_group(child.pid)
        printed = (folder / "out").read_text(errors="replace")
        if child.returncode:
            raise RuntimeError(
                f"{client.name}: {(folder / 'log').read_text(errors='replace')[-1000:]}{printed[-1000:]}"
            )
        found = client.read(folder, printed)
        return Run(usage.ru_utime + usage.ru_stime, memory_mib, found, truth_of(port))


class _Peak:
    """The most memory of a process and those below it; what they share counts once (PSS)."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._most_b = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._is_over.wait(_SAMPLE_S):
            total_b = 0
            for pid in (self._pid, *process.descendants(self._pid)):
                with contextlib.suppress(OSError):
                    found = re.search(r"(?m)^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
                    total_b += 1024 * int(found[1]) if found else 0
            self._most_b = max(self._most_b, total_b)

    def stop(self) -> float:
        self._is_over.set()
        self._thread.join()
        return self._most_b / 2**20


# The table


def level(concurrency: int) -> Load:
    return Load(concurrency, {1: 8, 16: 32}.get(concurrency, concurrency), 50, FAST_MS)


def full(tokens: int, **changes: Any) -> Load:
    return Load(FULL, FULL, tokens, SLOW_MS, **changes)


class Table:
    """What each client found, in a row per figure; medians where there are several runs."""

    def __init__(self, names: Sequence[str], program: Path) -> None:
        self._program = program
        self._runs: dict[tuple[str, Load], list[Run]] = {}
        for name in names:
            loads = [*map(level, LEVELS), full(FEW), full(MANY)]
            for load in loads:
                # Between two of lem's own, so that a change of the machine shows.
                around = ["lem", name, "lem"] if name != "lem" and load.concurrency == FULL else [name]
                for each in around:
                    self._measure(each, load)
        self._names = ["lem", *(name for name in names if name != "lem")]
        if "lem" in names:
            for extra in (full(MANY, keeps_texts=True), *self.modes):
                self._measure("lem", extra)

    modes = (Load(256, 256, 50, FAST_MS, is_batch=True), Load(256, 256, 50, FAST_MS, is_split=True))

    def _measure(self, name: str, load: Load) -> None:
        found = run(CLIENTS[name], load, self._program)
        said = f"; {found.found['bound']}" if found.found.get("bound") else ""
        figures = f"TTFT {found.ttft:.4f}, p99 of ICL {found.icl_p99:.4f}, {found.cpu_s:.2f} CPU s"
        print(f"  {name} {load.concurrency} x {load.tokens}: {figures}{said}", flush=True)
        self._runs.setdefault((name, load), []).append(found)

    def _median(self, name: str, load: Load, figure: Callable[[Run], float]) -> float | None:
        found = self._runs.get((name, load))
        return None if found is None else statistics.median(map(figure, found))

    def show(self) -> None:
        print(f"\n{'':<68}" + "".join(f"{name:>11}" for name in self._names))
        for concurrency in LEVELS:
            self._row(f"mean TTFT over the truth, {concurrency} streams", "x", level(concurrency), lambda it: it.ttft)
        self._row(f"mean TTFT over the truth, {FULL} streams", "x", full(FEW), lambda it: it.ttft)
        for load, name in zip(self.modes, ("a batch that steps at once", "events cut at any byte"), strict=True):
            self._row(f"mean TTFT over the truth, 256 streams, {name}", "x", load, lambda it: it.ttft)
        self._row(f"p99 of ICL over the truth, {FULL} streams", "x", full(MANY), lambda it: it.icl_p99)
        texts = full(MANY, keeps_texts=True)
        self._row("p99 of a token's added time, us", "us", texts, lambda it: it.found.get("added_p99_us", 0.0))
        for name in self._names:
            self._show_cost(name)

    def _row(self, what: str, unit: str, load: Load, figure: Callable[[Run], float]) -> None:
        digits = {"x": ".4f", "us": ".1f"}[unit]
        values = [self._median(name, load, figure) for name in self._names]
        print(f"{what:<68}" + "".join(f"{'-' if value is None else format(value, digits):>11}" for value in values))

    def _show_cost(self, name: str) -> None:
        few, many = (self._median(name, full(tokens), lambda it: it.cpu_s) for tokens in (FEW, MANY))
        served = tuple(self._median(name, full(tokens), lambda it: it.truth["cpu_s"]) or 0.0 for tokens in (FEW, MANY))
        start_s = self._median(name, level(1), lambda it: it.cpu_s)
        memory = self._median(name, full(MANY), lambda it: it.memory_mib)
        good = self._median(name, full(MANY), lambda it: it.found["good"])
        if few is None or many is None:
            return
        more = FULL * (MANY - FEW)
        cost_us, server_us = (1e6 * (after - before) / more for before, after in ((few, many), served))
        print(
            f"{name}: {cost_us:.1f} us CPU a token (the server {server_us:.1f}), start-up {start_s:.2f} CPU s, "
            f"{memory:.0f} MiB, {good:.0f} of {FULL} requests"
        )


def show_honesty(program: Path) -> None:
    """Whether the client says that it was the bottleneck when it was, and not when it was not."""
    load = Load(256, 256, 40, SLOW_MS)
    quiet = [run(CLIENTS["lem"], load, program) for _ in range(QUIET_RUNS)]
    alarms = [it.found["bound"] for it in quiet if it.found["bound"]]
    off = max(abs(it.ttft - 1) for it in quiet)
    print(f"{QUIET_RUNS} quiet runs: TTFT at most {off:.2%} off, {len(alarms)} false alarms {alarms[:1]}")
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        busy = [run(CLIENTS["lem"], full(60), program) for _ in range(BUSY_RUNS)]
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
    for it in busy:
        said = it.found["bound"] or "fine"
        print(f"  all cores busy: TTFT {it.ttft - 1:+.2%}, p99 of ICL {it.icl_p99 - 1:+.2%}; {said}")
    wrong = [it for it in busy if max(abs(it.ttft - 1), abs(it.icl_p99 - 1)) > OFF and not it.found["bound"]]
    print(f"{BUSY_RUNS} runs with all cores busy: {len(wrong)} are more than {OFF:.0%} off and do not say so")


def main(names: Sequence[str]) -> int:
    names = names or list(CLIENTS)
    unknown = set(names) - set(CLIENTS)
    if unknown:
        print(f"unknown client {', '.join(unknown)}: expected some of {', '.join(CLIENTS)}")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "scripted_server"
        subprocess.run(["gcc", "-O2", "-o", str(program), str(SOURCE)], check=True)
        table = Table(names, program)
        table.show()
        if "lem" in names:
            show_honesty(program)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
