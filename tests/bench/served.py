"""lem beside `vllm bench serve`, on one running vLLM server of the lab: what each calls the same thing.

    python -m tests.bench.served [RATE [PAIRS [SECONDS]]]

Both send random prompts of one length at the same mean rate of Poisson arrivals, in the order ABBA.
Between `lem` and vLLM bench, the table has what lem's own requests give by the definitions of vLLM bench, which shows
what of a difference is the definition, and what the client. Medians over the pairs.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.base.units import NS_PER_S
from lem.meters.requestlog import REQUESTS_FILENAME, Request, read_requests
from lem.record import Record, read_record
from tests.bench.host import in_turn
from tests.lab.places import Places
from tests.lab.servers import VLLM_ENVIRONMENT, Server, serving, vllm_serve

ROOT = Path(__file__).resolve().parents[2]
INPUT_TOK, OUTPUT_TOK, SEQUENCES = 48, 32, 16
TIMEOUT_S = 300
# What is shown: its name, its unit, and why the definitions differ.
ROWS = (
    ("requests/s", "completed in the window / its length; vLLM bench: all / first send to last answer"),
    ("output tok/s", "tokens that arrived in the window / its length; vLLM bench: all / first send to last answer"),
    ("TTFT mean, ms", "from the scheduled arrival; vLLM bench: from just before the request is made, and it connects"),
    ("TPOT mean, ms", "per request, (end - first token) / (output tokens - 1); the same in vLLM bench"),
    ("ICL mean, ms", "between arrivals, events of one arrival are one chunk; ITL of vLLM bench: between all events"),
    ("E2E mean, ms", "from the scheduled arrival; vLLM bench: from just before the request is made"),
)
Figures = tuple[float, ...]


def main(argv: Sequence[str]) -> int:
    """0; the figures are for a person to judge on a machine that may be busy."""
    rate, pairs, seconds = (float(given) for given in (*argv, *("8", "4", "20")[len(argv) :]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server ends with this process
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places, log = Places.of(), folder / "server.log"
        command = [*vllm_serve(places, "demo"), "--max-model-len", "256", "--max-num-seqs", str(SEQUENCES)]
        with serving(command, log, VLLM_ENVIRONMENT) as server:
            found = list(compare(server, places, folder, rate, round(pairs), seconds))
    print(f"\n{rate:g} requests/s (Poisson), {OUTPUT_TOK} output tokens, {len(found)} pairs of {seconds:g} s")
    print(table(found))
    return 0


def compare(
    server: Server, places: Places, folder: Path, rate: float, pairs: int, seconds: float
) -> Iterator[tuple[tuple[Figures, Figures], Figures]]:
    """lem's figures by its own definitions and by those of vLLM bench, and vLLM bench's."""
    numbers = itertools.count()

    def lem_side() -> tuple[Figures, Figures]:
        return run_lem(server, places, folder / str(next(numbers)), rate, seconds)

    def vllm_side() -> Figures:
        return run_vllm_bench(server, places, folder, rate, round(rate * seconds))

    for ours, theirs in in_turn(lem_side, lambda: (vllm_side(),) * 2, pairs):
        yield ours, theirs[0]


def run_lem(server: Server, places: Places, folder: Path, rate: float, seconds: float) -> tuple[Figures, Figures]:
    folder.mkdir()
    experiment = {
        "model": str(places.models / "demo"),
        "backend": "server",
        "max_input_tokens": 128,
        "max_output_tokens": OUTPUT_TOK,
        "ignore_eos": True,
        "decoder": {"preset": "deterministic"},
        "prompts": {"type": "synthetic", "input_tokens": INPUT_TOK, "sample_size": 64},
        "traffic_simulation": {"enabled": True, "target_qps": rate},
        "measurement": {"min_window_sec": seconds, "max_wait_pct": None, "max_foreign_pct": None},
        "warmup": {"min_prompts": 8, "max_prompts": 8, "window_size": 3},
        "baseline": {"enabled": False},
        "gpus": [],
        "server": {"engine": "vllm", "url": server.url},
    }
    (folder / "x.yaml").write_text(json.dumps(experiment), encoding="utf-8")
    _run([sys.executable, "-m", "lem", "experiment", "x.yaml", "--yes", "--quiet"], folder, {"PYTHONPATH": str(ROOT)})
    # What is not valid is measured once more, by `lem experiment`, too.
    path = max(folder.rglob("result.json"), key=lambda it: it.stat().st_mtime_ns)
    log, record = read_requests(path.with_name(REQUESTS_FILENAME)), read_record(path)
    for reason in record.validity.invalid_reasons:
        print(f"lem: not valid: {reason.text}", flush=True)
    return own_figures(record), their_figures([it for it in log.requests if it.is_good])


def own_figures(record: Record) -> Figures:
    latency, throughput = record.latency, record.throughput
    means = [it.mean for it in (latency.ttft_s, latency.tpot_s, latency.icl_s, latency.e2e_s) if it is not None]
    rates = [it for it in (throughput.requests_per_s, throughput.output_tok_per_s) if it is not None]
    return (*rates, *(1000 * it for it in means))


def their_figures(requests: Sequence[Request]) -> Figures:
    """lem's requests by the definitions of vLLM bench: all of them, from their sending, and each token's gap, also one
    of zero (this server sends each token in an event of its own)."""
    ms = 1e6
    times = [(it.started_ns or 0, it.token_times_ns or (), it.finished_ns or 0) for it in requests]
    span_s = (max(end for _, _, end in times) - min(sent for sent, _, _ in times)) / NS_PER_S
    gaps = [after - before for _, tokens, _ in times for before, after in itertools.pairwise(tokens)]
    return (
        len(times) / span_s,
        sum(len(tokens) for _, tokens, _ in times) / span_s,
        statistics.fmean(tokens[0] - sent for sent, tokens, _ in times) / ms,
        statistics.fmean((tokens[-1] - tokens[0]) / (len(tokens) - 1) for _, tokens, _ in times) / ms,
        statistics.fmean(gaps) / ms,
        statistics.fmean(tokens[-1] - sent for sent, tokens, _ in times) / ms,
    )


def run_vllm_bench(server: Server, places: Places, folder: Path, rate: float, prompts: int) -> Figures:
    python, model = places.environment("vllm") / "bin/python", places.models / "demo"
    command = [str(python), "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai"]
    command += ["--base-url", server.url, "--model", str(model), "--dataset-name", "random"]
    command += ["--random-input-len", str(INPUT_TOK), "--random-output-len", str(OUTPUT_TOK)]
    command += ["--num-prompts", str(prompts), "--request-rate", str(rate), "--ignore-eos"]
    command += ["--temperature", "0", "--save-result", "--result-filename", "bench.json", "--disable-tqdm"]
    command += ["--percentile-metrics", "ttft,tpot,itl,e2el"]
    _run(command, folder, VLLM_ENVIRONMENT)
    found = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    if found["failed"] or found["total_output_tokens"] != prompts * OUTPUT_TOK:
        raise RuntimeError(f"vLLM bench: {found['failed']} failed, {found['total_output_tokens']} output tokens")
    means = [found[f"mean_{name}_ms"] for name in ("ttft", "tpot", "itl", "e2el")]
    return (found["request_throughput"], found["output_throughput"], *means)


def table(found: Sequence[tuple[tuple[Figures, Figures], Figures]]) -> str:
    lines = [f"{'':<15}{'lem':>9}{'lem, by their':>15}{'vLLM bench':>12}", f"{'':<24}{'definition':>15}"]
    for index, (name, why) in enumerate(ROWS):
        columns = [
            statistics.median(column)
            for column in zip(
                *((own[index], other[index], theirs[index]) for (own, other), theirs in found), strict=True
            )
        ]
        lines.append(f"{name:<15}{columns[0]:>9.2f}{columns[1]:>15.2f}{columns[2]:>12.2f}  {why}")
    return "\n".join(lines)


def _run(command: Sequence[str], folder: Path, environ: Mapping[str, str]) -> None:
    finished = subprocess.run(
        command,
        cwd=folder,
        env={**{name: it for name, it in os.environ.items() if not name.startswith("LEM")}, **environ},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if finished.returncode != 0:
        said: Any = (finished.stdout + finished.stderr)[-3000:]
        raise RuntimeError(f"{command[:4]} fails with {finished.returncode}:\n{said}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
