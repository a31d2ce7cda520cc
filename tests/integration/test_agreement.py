"""A campaign of a real model whose second configuration answers as the first, and whose third does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from lem.base.answers import OUTPUT_IDS_FILE
from tests.campaign_rig import CampaignRig
from tests.command_rig import run_lem

pytestmark = pytest.mark.needs("torch", "transformers")

TIMEOUT_S = 250  # torch takes its time where other work has the CPUs
BASE: dict[str, Any] = {
    "backend": "pytorch",
    "gpus": [],
    "fp_precision": "float32",
    "max_output_tokens": 24,
    "ignore_eos": True,
    "decoder": {"preset": "deterministic"},
    "prompts": {"type": "synthetic", "input_tokens": 32, "sample_size": 16},
    "measurement": {"agreement": True, "min_window_sec": 0.05, "max_wait_pct": None, "max_foreign_pct": None},
    "baseline": {"enabled": False},
    "warmup": {"enabled": False},
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "one": {},
    "batches": {"pytorch": {"batch_size": 8}},
    "bfloat16": {"fp_precision": "bfloat16"},
}


def test_a_batch_size_does_not_change_the_answers_and_bfloat16_does(rig: CampaignRig, tiny_model: Path) -> None:
    campaign = {
        "campaign_name": "answers",
        "model": str(tiny_model),
        "experiments": [{**BASE, **own, "config_name": name} for name, own in CONFIGURATIONS.items()],
        "execution": {"cycles": 1, "config_gap_seconds": 0, "cycle_gap_seconds": 0},
    }
    rig.write(yaml.safe_dump(campaign))
    real = str(Path(__file__).parents[2])
    options = ("--yes", "--executor", "local", "--prometheus", "lem.prom")
    ended = rig.start(*options, PYTHONPATH=real, OMP_NUM_THREADS="1").wait(TIMEOUT_S)
    assert ended.code == 0, ended.err
    results = rig.folder / "results"
    assert len(list(results.glob(f"answers/*/*/attempt-1/{OUTPUT_IDS_FILE}"))) == 3
    found = run_lem("compare", "answers", "--results-dir", results, "--json")
    batches, bfloat16 = (pair["agreement"] for pair in json.loads(found.out)["pairs"])
    assert (batches["requests"], batches["equal_ratio"], batches["prefix_tok"]) == (16, 1.0, 24.0)
    assert bfloat16["requests"] == 16
    assert bfloat16["equal_ci_upper"] < 0.9
    assert bfloat16["prefix_ci_upper"] < 24.0
    text = run_lem("compare", "answers", "--results-dir", results).out
    assert "answers differ (3 bfloat16)" in text
    assert "answers agree (2 batches)" in text
    page = rig.folder / "report.html"
    assert run_lem("report", "answers", "--results-dir", results, "-o", page).code == 0
    assert "Agreement of answers with the baseline" in page.read_text(encoding="utf-8")
    verified = run_lem("verify", "answers", "--results-dir", results, "--state-dir", rig.folder / ".state")
    assert verified.code == 0, verified.out
    families = {item.name for item in text_string_to_metric_families((rig.folder / "lem.prom").read_text())}
    assert "lem_output_tokens_per_second" in families
    next(results.glob(f"answers/*/*/attempt-1/{OUTPUT_IDS_FILE}")).write_bytes(b"")
    assert "work.output_ids_sha256" in run_lem("verify", "answers", "--results-dir", results).out
