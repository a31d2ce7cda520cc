"""Energy through a whole campaign: the real sampler on NVML's double, an engine that tells it when it is busy."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lem.base import measurement
from lem.base.reasons import Reason
from lem.meters.samples import FINISHED_FILENAME, PART_FILENAME, read_finished
from lem.record import Record, read_record
from tests.campaign_rig import CampaignRig, Ended, Running
from tests.command_rig import run_lem
from tests.documentation import ROOT, blocks
from tests.doubles.nvml.library import NvmlDouble
from tests.doubles.nvml.traces import Counter, GpuTrace, Load, Thermal, Trace

pytestmark = pytest.mark.needs("gcc")

UUID = "GPU-11111111-2222-3333-4444-555555555555"
IDLE_W, BUSY_W = 80.0, 350.0


@dataclass
class MeteredRig:
    """A campaign beside one GPU of the double."""

    rig: CampaignRig
    gpu: GpuTrace

    @property
    def trace(self) -> Trace:
        return Trace(1, (self.gpu,))

    @property
    def load_log(self) -> Path:
        return self.rig.folder / "load"

    def run(self, *options: str, **experiment: Any) -> Ended:
        self.load_log.touch()
        double = NvmlDouble(self.rig.folder / "nvml")
        double.say(*self.trace.lines())
        script = {"gpus": [UUID], "load_log": str(self.load_log), "token_s": 0.01}
        self.rig.write(campaign(**experiment))
        command = self.rig.command(*options)
        environ = {**self.rig.environ(), **double.variables(), "LEMTEST_ENGINE_SCRIPT": json.dumps(script)}
        return Running(command, self.rig.folder, environ, is_warm=True).wait()

    def true_j(self, record_path: Path, name: str = measurement.WINDOW) -> float:
        _, found = read_finished(record_path.with_name(FINISHED_FILENAME))
        spans = [(mark.opened_ns, mark.closed_ns) for mark in found if mark.name == name]
        assert len(spans) == 1, found
        return self.trace.after_load({0: self.load_log.read_text()}).energy_j(*spans[0])

    def results(self) -> list[tuple[Path, Record]]:
        paths = sorted((self.rig.folder / "results").rglob("result.json"))
        return sorted(((path, read_record(path)) for path in paths), key=lambda item: item[1].identity.order_index)


def campaign(*, cycles: int = 2, gap_s: float = 0.0, outputs: Sequence[int] = (8,), **experiment: Any) -> str:
    shared = {
        "gpus": [["0"]],
        "measurement": [{"min_window_sec": 1.0, "max_wait_pct": None, "max_foreign_pct": None}],
        "prompts": [{"type": "synthetic", "input_tokens": 3, "sample_size": 4}],
        "max_output_tokens": [*outputs],
        "warmup": [{"timeout_seconds": 1.0}],
        "baseline": [{"duration_sec": 1.0}],
        **{name: [value] for name, value in experiment.items()},
    }
    return (
        "campaign_name: demo\nmodel: none\ngrid:\n  backends: [pytorch]\n"
        f"  shared: {json.dumps(shared)}\n"
        f"execution: {json.dumps({'cycles': cycles, 'config_gap_seconds': gap_s, 'cycle_gap_seconds': gap_s})}\n"
    )


@pytest.fixture
def metered(tmp_path: Path) -> Iterator[MeteredRig]:
    load = Load(str(tmp_path / "load"), IDLE_W, BUSY_W)
    gpu = GpuTrace(uuid=UUID, load=load, counter=Counter(period_s=0.02), thermal=Thermal(tau_s=1.0))
    with CampaignRig(tmp_path).cleaned() as rig:
        yield MeteredRig(rig, gpu)


def test_a_campaign_measures_the_energy_that_was_drawn(metered: MeteredRig) -> None:
    ended = metered.run("--yes")
    assert ended.code == 0, ended.err
    metered.rig.assert_no_process_left()
    results = metered.results()
    assert len(results) == 2
    for path, record in results:
        assert record.validity.valid, record.validity.invalid_reasons
        assert record.energy.energy_source == "nvml_counter"
        assert record.energy.gpu_energy_j == pytest.approx(metered.true_j(path), rel=0.02)
        assert record.idle.idle_loaded_power_w == pytest.approx(IDLE_W, rel=0.02)
        assert record.gpus[0].uuid == UUID
        assert not path.with_name(PART_FILENAME).exists()
    first, second = (record for _, record in results)
    assert first.idle.baseline_age_s == 0
    assert second.idle.baseline_age_s is not None
    assert second.idle.baseline_age_s > 0
    assert second.idle.idle_loaded_power_w == first.idle.idle_loaded_power_w
    assert "J" in ended.out


def test_every_figure_is_worked_out_again_from_the_samples(metered: MeteredRig) -> None:
    assert metered.run("--yes", cycles=1, baseline={"enabled": False}).code == 0
    again = metered.rig.lem("results", "recompute", "demo")
    assert again.code == 0, again.out + again.err


def test_pandas_and_scipy_compute_the_same_table_from_the_files(
    metered: MeteredRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = {"type": "synthetic", "input_tokens": 3, "sample_size": 10}
    traffic = {"enabled": True, "mode": "closed", "concurrency": 4}
    options = {"prompts": prompts, "baseline": {"enabled": False}, "ignore_eos": True, "traffic_simulation": traffic}
    assert metered.run("--yes", outputs=(4, 8), **options).code == 0
    monkeypatch.chdir(metered.rig.folder)
    found: dict[str, Any] = {}
    (snippet,) = (block.text for block in blocks(ROOT / "docs" / "results.md") if "import pandas" in block.text)
    compared = lem_json("compare", "demo")
    snippet = snippet.replace("results/batch-sizes", "results/demo")
    exec(snippet.replace("confidence = 0.95", f"confidence = {compared['interval_confidence']}"), found)  # noqa: S102

    shown = lem_json("results", "show", "demo")
    assert len(shown["configurations"]) == 2
    n_figures = 0
    for configuration in shown["configurations"]:
        groups = [configuration[group] for group in ("energy", "throughput", "latency")]
        for metric, estimate in {name: item for group in groups for name, item in group.items()}.items():
            if (metric, configuration["config_name"]) not in found["estimates"].index:
                continue
            rows = found["table"].query("configuration == @configuration['config_name']").sort_values("cycle")
            ours = found["estimates"].loc[(metric, configuration["config_name"])]
            theirs = estimate["t_log"]
            assert estimate["values"] == pytest.approx([*rows[metric]], rel=1e-9)
            assert [*ours] == pytest.approx(
                [theirs["geometric_mean"], theirs["ci_lower"], theirs["ci_upper"]], rel=1e-9
            )
            n_figures += 1
    assert n_figures == len(found["estimates"]) == 2 * 8

    (pair,) = compared["pairs"]
    assert (pair["baseline"]["config_name"], pair["other"]["config_name"]) == (found["baseline"], found["other"])
    assert len(found["ratios"]) == 8
    for metric, expected in found["ratios"].items():
        assert {name: pair["metrics"][metric][name] for name in expected} == pytest.approx(expected, rel=1e-9)


def lem_json(*words: str) -> Any:
    ended = run_lem(*words, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_a_gap_ends_when_the_device_is_back_at_its_reference(metered: MeteredRig) -> None:
    ended = metered.run("--yes", gap_s=600.0)
    assert ended.code == 0, ended.err
    _, second = (record for _, record in metered.results())
    assert second.window.gap_end_reason == Reason.of("gap_recovered")
    assert second.window.gap_s is not None
    assert second.window.gap_s < 600


def test_energy_that_is_demanded_and_cannot_be_read_is_refused(metered: MeteredRig) -> None:
    metered.gpu = GpuTrace(uuid=UUID, load=metered.gpu.load, more=("fail nvmlDeviceGetTotalEnergyConsumption 4",))
    ended = metered.run("--yes", measurement={"min_window_sec": 1.0, "energy": "nvml"}, cycles=1)
    assert ended.code == 1
    assert "energy counter cannot be read" in ended.err
    metered.rig.assert_no_process_left()


def test_without_a_meter_of_energy_the_sampler_watches_the_cpus_alone(tmp_path: Path) -> None:
    with CampaignRig(tmp_path).cleaned() as rig:
        ended = rig.run("-v", "--yes")
        assert ended.code == 0, ended.err
        reads_no_power = re.search(r"--sampler .*--interval-ms 0\b", ended.err) is not None
        assert reads_no_power or os.access("/sys/class/powercap/intel-rapl:0/energy_uj", os.R_OK)
        assert {record.energy.gpu_energy_j for record in rig.records()} == {None}
