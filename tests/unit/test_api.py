"""The public API: light to import, and the example works from load to report."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lem
from lem.orchestration.plan import Plan
from lem.results.run import Run
from tests.campaign_rig import CampaignRig, campaign_text
from tests.synthetic_campaign import Campaign, Configuration, Written

ROOT = Path(__file__).parents[2]
LATER = "20260801T100000Z-0b0b"
FAST = Configuration("fast", energy_per_output_tok_j=0.2, throttled_cycles=(1,))
SLOW = Configuration("slow", backend="pytorch", energy_per_output_tok_j=0.4)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Two runs of a campaign."""
    folder = tmp_path_factory.mktemp("api")
    Campaign((FAST, SLOW), name="Batch sizes", run_id=LATER).write(folder)
    return Campaign((FAST, SLOW), name="Batch sizes").write(folder)


def test_importing_lem_imports_nothing_heavy() -> None:
    program = "import sys, lem; print([name for name in sys.modules if name.startswith('lem.')])"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True, timeout=60
    )
    assert found.stdout == "['lem.base']\n"


def test_everything_public_is_there() -> None:
    assert {name: getattr(lem, name) is not None for name in lem.__all__} == dict.fromkeys(lem.__all__, True)
    assert set(lem.__all__) <= set(dir(lem))
    assert (lem.Plan, lem.Run) == (Plan, Run)
    with pytest.raises(AttributeError, match="no attribute 'measure'"):
        lem.measure  # noqa: B018


def test_the_last_run_is_read_and_one_by_the_beginning_of_its_id(written: Written) -> None:
    assert lem.read(written.results_dir, "Batch sizes").run_id == LATER
    run = lem.read(written.results_dir, "Batch sizes", "20260714")
    assert run.run_id == written.run_id
    assert [item.name for item in run.configurations] == ["fast", "slow"]


def test_a_campaign_is_loaded_and_planned(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(campaign_text(outputs=(4, 8)), encoding="utf-8")
    campaign = lem.load(tmp_path / "c.yaml")
    assert (campaign.name, len(campaign.plan().experiments)) == ("demo", 4)


@pytest.mark.parametrize(("campaign", "run"), [("other", None), ("Batch sizes", "2030"), ("Batch sizes", "2026")])
def test_what_is_missing_or_ambiguous_is_refused(written: Written, campaign: str, run: str | None) -> None:
    with pytest.raises(lem.UserError):
        lem.read(written.results_dir, campaign, run)


def test_an_estimate_has_value_interval_and_number_of_cycles(written: Written) -> None:
    slow = lem.read(written.results_dir, "Batch sizes").find("slow")
    assert slow is not None
    found = slow.estimate("energy_per_output_tok_j")
    assert found.value == pytest.approx(0.4, rel=0.02)
    assert None not in (found.low, found.high)
    assert (found.low or 0) < (found.value or 0) < (found.high or 0)
    assert (found.n, found.unit, found.null_reason) == (5, "J/tok", None)
    assert slow.estimate("energy") is found
    with pytest.raises(lem.UserError, match="did you mean"):
        slow.estimate("output_tok_per_sec")


def test_rows_are_flat_and_one_per_experiment(written: Written) -> None:
    run = lem.read(written.results_dir, "Batch sizes")
    rows = run.rows()
    assert [row["config_name"] for row in rows].count("fast") == 5
    assert (written.results_dir / rows[0]["result"]).is_file()
    assert json.loads(json.dumps(rows)) == rows
    assert {type(value) for row in rows for value in row.values()} <= {str, int, float, bool, type(None)}


def test_two_configurations_are_compared_within_their_cycles(written: Written) -> None:
    run = lem.read(written.results_dir, "Batch sizes")
    fast, slow = run.configurations
    (pair,) = lem.compare(fast, slow).pairs
    effect = pair.rows[0].effect
    assert effect is not None
    assert effect.ratio == pytest.approx(2, rel=0.03)
    assert effect.n_cycles == (5,)


def test_two_runs_are_compared_over_an_anchor_and_reported(written: Written, tmp_path: Path) -> None:
    before, after = (lem.read(written.results_dir, "Batch sizes", run) for run in (written.run_id, LATER))
    comparison = lem.compare(before, after)
    assert comparison.anchor is not None
    assert comparison.anchor.name == "fast"
    assert lem.read(written.results_dir, "Batch sizes").run_id == LATER  # the last, where none is named
    assert LATER in lem.report(after, tmp_path / "report.html").read_text(encoding="utf-8")
    assert [pair.other.name for pair in comparison.pairs] == ["slow"]


def test_what_cannot_be_compared_is_refused(written: Written) -> None:
    before, after = (lem.read(written.results_dir, "Batch sizes", run) for run in (written.run_id, LATER))
    (one, other), (later, *_) = before.configurations, after.configurations
    empty = dataclasses.replace(other, records=())
    refused: list[tuple[Any, Any, str]] = [
        (before, one, "a run cannot be compared with a configuration"),
        (before, before, "both are the same run"),
        (before, dataclasses.replace(after, records=()), "a run without results"),
        (one, empty, "a configuration without results"),
        (one, later, "share no cycles"),
    ]
    for a, b, problem in refused:
        with pytest.raises(lem.UserError, match=problem):
            lem.compare(a, b)


def test_the_example_runs_from_load_to_report(tmp_path: Path) -> None:
    rig = CampaignRig(tmp_path)
    command = [sys.executable, str(ROOT / "examples" / "api.py"), "c.yaml"]
    with rig.cleaned():
        ended = subprocess.run(
            command, cwd=tmp_path, env=rig.environ(), capture_output=True, text=True, timeout=120, check=False
        )
    assert ended.stderr == ""
    assert ended.returncode == 0
    assert ended.stdout.count("experiment_completed") == 4
    assert "run " in ended.stdout
    assert "Output throughput: " in ended.stdout
    assert (tmp_path / "results" / "report.html").is_file()
    assert len(rig.records()) == 4
