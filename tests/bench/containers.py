"""Containers: the same small campaign with engines kept, loaded anew, and as a script would run it; and the dispatch.

The campaign is PyTorch on the lab's tiny model, two cycles of three experiments that can share an engine. What it
takes from the command to its end is told beside the share of that time in which something was measured.
"""

from __future__ import annotations

import functools
import itertools
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from lem.record import Record, read_record
from tests.bench.builds import PYZ
from tests.bench.host import Figure
from tests.container_rig import ContainerRig, container_campaign
from tests.lab.places import COMPOSE_FILES, Places

CYCLES, OUTPUTS = 2, (8, 16, 24)
DISPATCHED = 24
TIMEOUT_S = 600


def dispatch() -> Iterator[Figure]:
    """From the end of an experiment's work to the start of the next one's, in a worker that has its engine.

    The work of one ends with its result file, whose time is that of its content; that of the next begins with the
    start that its record tells. Between them lie the result on disk for good, the word to the host, its bookkeeping,
    the next experiment's folder, and the way through `docker compose exec` into the engine's process. One kernel has
    one clock, which gives file times up to 4 ms too early.
    """
    text = container_campaign("bench", outputs=tuple(range(4, 4 + DISPATCHED)))  # one engine load, next to no work
    with tempfile.TemporaryDirectory() as folder, ContainerRig(Path(folder), text).cleaned() as rig:
        ended = rig.run("--fresh", "--yes", is_warm=False)
        if ended.code != 0:
            raise RuntimeError(f"the campaign fails with {ended.code}:\n{ended.err[-2000:]}")
        gaps_s = gaps_between([rig.folder / path for path in rig.results()])
    yield Figure(
        f"dispatch into a warm worker, beyond the work itself (of {len(gaps_s)})",
        1000 * statistics.median(gaps_s),
        "ms",
        20,
    )


def gaps_between(results: Sequence[Path]) -> list[float]:
    """Seconds from each result file to the start of the next experiment."""
    records = sorted(((read_record(path), path) for path in results), key=lambda pair: pair[0].identity.order_index)
    return [
        datetime.fromisoformat(record.identity.start_utc.replace("Z", "+00:00")).timestamp()
        - before.stat().st_mtime_ns / 1e9
        for (_record, before), (record, _path) in itertools.pairwise(records)
    ]


def containers() -> Iterator[Figure]:
    """Wall time, and measured time over wall time, of three ways to run one campaign."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        experiments = CYCLES * len(OUTPUTS)
        yield Figure("containers: experiments of the campaign (PyTorch, tiny model)", experiments, "")
        for name, run, loads in (
            ("engines kept within cycles", functools.partial(bench.campaign, "warm"), CYCLES),
            ("cold by exec", functools.partial(bench.campaign, "cold", "--force-cold-start"), experiments),
            ("a new container each (docker compose run --rm)", bench.script, experiments),
        ):
            began_s = time.monotonic()
            records = run()
            wall_s = time.monotonic() - began_s
            found = len({record.validity.engine_load_id for record in records})
            if (len(records), found) != (experiments, loads):
                raise RuntimeError(f"{name}: {len(records)} results of {found} loads, not {experiments} of {loads}")
            measured_s = sum(record.window.window_s or 0.0 for record in records)
            yield Figure(f"{name}: wall time", wall_s, "s")
            yield Figure("  measured time over wall time", measured_s / wall_s, "")


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places = Places.of()
        self._model = self._places.models / "tiny"
        (folder / "bench.yaml").write_text(campaign_text(self._model), encoding="utf-8")
        (folder / "pyz").mkdir()
        (folder / "pyz/lem.pyz").write_bytes(PYZ.read_bytes())

    def campaign(self, name: str, *options: str) -> list[Record]:
        """The records of the campaign, with a folder of results of that name."""
        command = [sys.executable, str(PYZ), "campaign", "bench.yaml", "--executor", "docker", "--fresh", "--yes"]
        self._run([*command, "--results-dir", name, *options])
        return self._records(name)

    def script(self) -> list[Record]:
        """The records of the same experiments, each in a container made for it."""
        project = f"lem-bench-{secrets.token_hex(4)}"
        compose = ["docker", "compose", "--project-name", project]
        container = [*compose, "run", "--rm", "-T", "--volume", f"{self._model}:{self._model}:ro"]
        # The files that the campaign wrote when it ran: the same experiments to the letter.
        files = sorted((self.folder / "configs/bench").glob("*.yaml"))
        try:
            for cycle in range(CYCLES):
                for file in files:
                    experiment = ["experiment", str(file), "--yes", "--results-dir", str(self.folder / f"run-{cycle}")]
                    program = ["--entrypoint", "python3", "pytorch", "-u", "/opt/lem/lem.pyz"]
                    self._run([*container, *program, *experiment])
        finally:
            self._run([*compose, "down"])
        return [record for cycle in range(CYCLES) for record in self._records(f"run-{cycle}")]

    def _records(self, name: str) -> list[Record]:
        return [read_record(path) for path in sorted((self.folder / name).rglob("result.json"))]

    def _run(self, command: Sequence[str]) -> None:
        finished = subprocess.run(
            command,
            cwd=self.folder,
            env=self._environ(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if finished.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} fails with {finished.returncode}:\n{finished.stderr[-2000:]}")

    def _environ(self) -> Mapping[str, str]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("LEM_", "COMPOSE_"))}
        return {
            **plain,
            **self._places.variables(),
            "COMPOSE_FILE": ":".join(map(str, COMPOSE_FILES)),
            "LEM_LOCK_DIR": str(self.folder),
            # What `docker compose run` is told here, lem tells for itself.
            "LEM_PYZ_DIR": str(self.folder / "pyz"),
            "LEM_RESULTS_DIR": str(self.folder),
            "LEM_UID": str(os.getuid()),
            "LEM_GID": str(os.getgid()),
        }


def campaign_text(model: Path) -> str:
    """The campaign: only lengths of outputs differ, for which no engine is loaded anew."""
    return f"""\
campaign_name: bench
model: {model}
grid:
  backends: [pytorch]
  shared:
    max_output_tokens: {list(OUTPUTS)}
    fp_precision: [float32]
    gpus: [[]]
    decoder.preset: [deterministic]
    ignore_eos: [true]
    max_input_tokens: [32]
    prompts: [{{type: synthetic, input_tokens: 16, sample_size: 8}}]
    warmup.convergence_detection: [false]
    measurement.min_window_sec: [1.0]
    measurement.max_wait_pct: [null]
execution: {{cycles: {CYCLES}, config_gap_seconds: 0, cycle_gap_seconds: 0}}
"""
