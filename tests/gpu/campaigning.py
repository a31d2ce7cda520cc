"""Runs a campaign as a person does, by `lem campaign`, and reads what came of it."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lem.base import process
from lem.orchestration.manifest import CampaignManifestEntry, ManifestManager
from lem.record import Record
from lem.results.store import Repository, folder_names
from tests.gpu.bench import Bench
from tests.gpu.load import fixed_lengths

INTERRUPTED = 130
_STOP_S = 30.0


def lem(*words: str) -> list[str]:
    return [sys.executable, "-m", "lem", *words]


def experiment(name: str, input_tok: int, output_tok: int, prompts: int, **others: Any) -> dict[str, Any]:
    """An experiment of a campaign file, on prompts and outputs of fixed lengths."""
    return {
        "config_name": name,
        "backend": "pytorch",
        **fixed_lengths(input_tok, output_tok),
        "prompts": {"type": "synthetic", "input_tokens": input_tok, "sample_size": prompts},
        **others,
    }


def run_campaign(bench: Bench, name: str, document: Mapping[str, Any]) -> int:
    """The exit code of `lem campaign`, which is interrupted when time is up: it keeps what it has.

    What a call has not got done, the next with the same folder resumes. What lem says is in `<name>.log`.
    """
    file = bench.out / f"{name}.yaml"
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
    has_begun = (bench.out / ".state" / name).is_dir()
    command = lem("campaign", file.name, "--executor", "local", "--yes", "--no-color")
    with (bench.out / f"{name}.log").open("ab") as log:
        child = process.spawn(
            [*command, *(["--resume"] if has_begun else [])],
            env={**bench.environ, "LEM_LOCK_DIR": str(bench.out / "locks"), "HF_HUB_OFFLINE": "1"},
            cwd=bench.out,
            streams=(process.DEVNULL, log.fileno(), log.fileno()),
        )
        try:
            return child.wait(max(1.0, bench.left_s()))
        except process.TimeoutExpired:
            print("  time is up: the campaign is interrupted and keeps what it has", flush=True)
            return INTERRUPTED
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
                with contextlib.suppress(process.TimeoutExpired):
                    child.wait(_STOP_S)
                process.kill_group(child.pid)


def read_entries(out: Path, name: str) -> tuple[CampaignManifestEntry, ...]:
    """The experiments of the latest run, with what became of them; () where there was none."""
    manifest = ManifestManager(out / ".state" / name / "campaign_manifest.json").load()
    return () if manifest is None else tuple(manifest.experiments)


def read_records(out: Path, name: str) -> list[Record]:
    """The records of the latest run, as it was planned."""
    repository = Repository(out / "results", name)
    runs = folder_names(repository.folder)
    found = repository.scan(runs[-1]).results if runs else ()
    records = [item.record for item in found]
    return sorted(records, key=lambda record: (record.identity.order_index, record.identity.attempt))
