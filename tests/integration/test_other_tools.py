"""The examples of docs/export.md, run with the packages that they are about."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lem
from lem.results.run import Run
from tests.documentation import ROOT, blocks
from tests.synthetic_campaign import Campaign, Configuration

TIMEOUT_S = 300
# mlflow-skinny has no database.
MLFLOW = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
EXAMPLES = [block.text for block in blocks(ROOT / "docs" / "export.md") if block.language == "python"]
CONFIGURATIONS = (
    Configuration("batch-1", "pytorch", batch_size=1, energy_per_output_tok_j=0.9, output_tok_per_s=900),
    Configuration("batch-8", "pytorch", batch_size=8, energy_per_output_tok_j=0.35, output_tok_per_s=150),
)


def example(about: str) -> str:
    (text,) = (text for text in EXAMPLES if about in text)
    return text


def run(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **MLFLOW, "MLFLOW_TRACKING_URI": str(folder / "mlruns")}
    command = [sys.executable, "-c", text]
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("tools")
    Campaign(CONFIGURATIONS, name="batch-sizes", structure="balanced", has_samples=False).write(folder)
    return lem.read(folder / "results", "batch-sizes")


def folder_of(results: Run) -> Path:
    assert results.folder is not None
    return results.folder.parents[2]


def test_every_example_is_run_here() -> None:
    assert len(EXAMPLES) == 4


@pytest.mark.needs("datasets")  # which brings pandas and pyarrow
def test_pandas_has_the_estimates(results: Run) -> None:
    found = run(example("groupby"), folder_of(results))
    assert found.returncode == 0, found.stderr
    for item in results.configurations:
        assert f"{item.estimate('energy').value:.6f}" in found.stdout


@pytest.mark.needs("datasets")
def test_parquet_has_a_row_for_each_experiment(results: Run) -> None:
    found = run(example("to_parquet"), folder_of(results))
    assert found.returncode == 0, found.stderr
    from pyarrow import parquet

    table = parquet.read_table(folder_of(results) / "batch-sizes.parquet").to_pylist()
    throughput = [row["output_tok_per_s"] for row in results.rows()]
    assert [row["output_tok_per_s"] for row in table] == pytest.approx(throughput)


def test_mlflow_has_a_run_for_each_configuration_with_its_interval(
    results: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in MLFLOW.items():
        monkeypatch.setenv(name, value)
    found = run(example("mlflow"), folder_of(results))
    assert found.returncode == 0, found.stderr
    import mlflow

    mlflow.set_tracking_uri(str(folder_of(results) / "mlruns"))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("batch-sizes")
    assert experiment is not None
    kept = {item.info.run_name: item.data for item in client.search_runs([experiment.experiment_id])}
    assert kept.keys() == {"batch-1", "batch-8"}
    for item in results.configurations:
        estimate = item.estimate("energy")
        metrics = kept[item.name].metrics
        names = ("", ".low", ".high")
        assert [metrics[f"energy_per_output_tok_j{name}"] for name in names] == [
            estimate.value,
            estimate.low,
            estimate.high,
        ]
        assert kept[item.name].params == dict(item.settings)
        assert kept[item.name].tags["lem.run_id"] == results.run_id


def test_the_job_fails_because_the_second_configuration_is_slower(results: Run) -> None:
    found = run(example("sys.exit"), folder_of(results))
    slower = results.configurations[1].name
    assert found.returncode == 1
    assert found.stderr.startswith(f"{slower} has 0.1"), found.stderr
