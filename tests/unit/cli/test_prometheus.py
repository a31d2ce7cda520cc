"""The Prometheus file of a campaign, as prometheus_client reads it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lem.base.errors import UserError
from lem.cli.prometheus import PrometheusFile, prometheus_path
from lem.orchestration.locks import Holder, campaign_lock, hold_locks
from lem.orchestration.status import Event
from lem.results.run import Run, make_run
from tests.campaign_rig import CampaignRig
from tests.records import make_record
from tests.synthetic_campaign import Campaign, Configuration

STARTED = Event("campaign_started", 0, 4, data={"campaign": "demo", "run_id": "r1"})
WHO = {"exp_id": "a-c1", "config_name": 'odd "name" \\ with\nlines', "backend": "pytorch", "cycle": 1, "cycles": 2}


class Watch:
    """A clock, and results that are counted when they are read."""

    def __init__(self, run: Run | None = None, reading_s: float = 0.0) -> None:
        self.now_s, self.reads, self.run, self.reading_s = 1000.0, 0, run or make_run([]), reading_s

    def now(self) -> float:
        return self.now_s

    def read(self, run_id: str) -> Run:
        assert run_id == "r1"
        self.reads += 1
        self.now_s += self.reading_s
        return self.run


def samples(path: Path) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
        assert family.type == "gauge"
        assert family.documentation
        assert re.fullmatch(r"lem_[a-z0-9_]+", family.name)
        assert family.samples
        found[family.name] = {tuple(item.labels.items()): item.value for item in family.samples}
    return found


def only(path: Path, name: str, **labels: str) -> float | None:
    """The value of the one sample of this name with these labels; None if there is none."""
    values = [value for own, value in samples(path).get(name, {}).items() if labels.items() <= dict(own).items()]
    assert len(values) <= 1
    return values[0] if values else None


def test_the_file_follows_the_campaign_from_start_to_end(tmp_path: Path) -> None:
    path, watch = tmp_path / "lem.prom", Watch()
    file = PrometheusFile(path, "demo", watch.read, watch.now)
    assert only(path, "lem_campaign_running", campaign="demo") == 0
    file(STARTED)
    file(Event("experiment_started", 0, 4, data=WHO))
    file(Event("phase", 0, 4, 120.0, {"phase": "window", "exp_id": "a-c1"}))
    watch.now_s += 10
    file(Event("progress", 0, 4, 100.0, {"phase_done": 1, "phase_total": 2, "text": "", "power_w": 212.5}))
    assert only(path, "lem_campaign_running") == 1
    assert only(path, "lem_campaign_info", run_id="r1") == 1
    assert only(path, "lem_campaign_experiments_planned") == 4
    assert only(path, "lem_campaign_start_timestamp_seconds") == 1000
    assert only(path, "lem_campaign_remaining_seconds") == 100
    assert only(path, "lem_campaign_power_watts") == 212.5
    assert only(path, "lem_campaign_end_timestamp_seconds") is None
    assert only(path, "lem_campaign_activity_info", configuration=str(WHO["config_name"]), phase="window") == 1
    file.end(3)
    assert only(path, "lem_campaign_running") == 0
    assert only(path, "lem_campaign_exit_code") == 3
    assert only(path, "lem_campaign_end_timestamp_seconds") == 1010
    assert {"lem_campaign_power_watts", "lem_campaign_activity_info"}.isdisjoint(samples(path))
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444
    assert [item.name for item in tmp_path.iterdir()] == ["lem.prom"]


def test_results_have_base_units_and_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    configurations = (
        Configuration("fast", energy_per_output_tok_j=0.2, output_tok_per_s=2000),
        Configuration("unmetered", batch_size=2, energy_per_output_tok_j=None, output_tok_per_s=1000),
    )
    run = make_run(Campaign(configurations, has_samples=False).records())
    path, watch = tmp_path / "lem.prom", Watch(run)
    file = PrometheusFile(path, "demo", watch.read, watch.now)
    file(STARTED)
    fast, unmetered = run.select("fast"), run.select("unmetered")
    estimate = fast.estimate("energy")
    for name, expected in (
        ("lem_energy_per_output_token_joules", estimate.value),
        ("lem_energy_per_output_token_ci_lower_joules", estimate.low),
        ("lem_energy_per_output_token_ci_upper_joules", estimate.high),
    ):
        assert only(path, name, configuration="fast") == expected
        assert only(path, name, configuration="unmetered") is None
    throughput = unmetered.estimate("throughput").value
    assert only(path, "lem_output_tokens_per_second", configuration="unmetered") == throughput
    assert only(path, "lem_configuration_cycles", configuration="fast") == 5
    described = {"number": str(fast.number), "energy_source": "nvml_counter"}
    assert only(path, "lem_configuration_info", configuration="fast", **described) == 1


def test_one_cycle_has_a_value_and_no_interval(tmp_path: Path) -> None:
    path, watch = tmp_path / "lem.prom", Watch(make_run([make_record(energy_per_output_tok_j=0.5)]))
    PrometheusFile(path, "demo", watch.read, watch.now)(STARTED)
    assert only(path, "lem_energy_per_output_token_joules") == 0.5
    assert "lem_energy_per_output_token_ci_lower_joules" not in samples(path)


def test_results_are_read_between_experiments_for_a_small_share_of_the_time(tmp_path: Path) -> None:
    watch = Watch(reading_s=2.0)
    file = PrometheusFile(tmp_path / "lem.prom", "demo", watch.read, watch.now)
    file(STARTED)
    assert watch.reads == 1
    for number in range(10):
        watch.now_s += 20
        file(Event("phase", number, 20, data={"phase": "window"}))
        file(Event("progress", number, 20, data={"power_w": None}))
        file(Event("experiment_completed", number + 1, 20, data={}))
    assert watch.reads == 3
    file.end(0)
    assert watch.reads == 4


def test_between_changes_the_file_is_written_every_few_seconds(tmp_path: Path) -> None:
    path, watch = tmp_path / "lem.prom", Watch()
    file = PrometheusFile(path, "demo", watch.read, watch.now)
    file(STARTED)
    inodes = set()
    for _ in range(20):
        watch.now_s += 1
        file(Event("tick", 0, 4))
        inodes.add(only(path, "lem_campaign_update_timestamp_seconds"))
    assert len(inodes) == 5


def test_a_folder_that_is_missing_is_refused_at_once_and_one_that_vanishes_warned_about_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match="no such file") as caught:
        PrometheusFile(tmp_path / "none" / "lem.prom", "demo", Watch().read)
    assert "--prometheus" in caught.value.hint
    folder, watch = tmp_path / "there", Watch()
    folder.mkdir()
    file = PrometheusFile(folder / "lem.prom", "demo", watch.read, watch.now)
    (folder / "lem.prom").unlink()
    folder.rmdir()
    file(STARTED)
    file.end(0)
    assert [item.levelname for item in caplog.records] == ["WARNING"]


def test_files_of_two_campaigns_have_no_sample_in_common(tmp_path: Path) -> None:
    seen = []
    for name in ("one", "two"):
        watch = Watch(make_run([make_record(energy_per_output_tok_j=0.5)]))
        file = PrometheusFile(tmp_path / f"{name}.prom", name, watch.read, watch.now)
        file(STARTED)
        file.end(0)
        seen.append({(family, labels) for family, own in samples(tmp_path / f"{name}.prom").items() for labels in own})
    assert seen[0]
    assert seen[0].isdisjoint(seen[1])


def test_a_note_outside_a_run_and_a_campaign_that_has_not_begun_count_no_experiments(tmp_path: Path) -> None:
    path, watch = tmp_path / "lem.prom", Watch()
    file = PrometheusFile(path, "demo", watch.read, watch.now)
    watch.now_s += 60
    file(Event("note", 0, 4, data={"text": "waiting"}))
    assert {"lem_campaign_experiments_planned", "lem_campaign_experiments_ended"}.isdisjoint(samples(path))
    file(STARTED)
    file(Event("experiment_completed", 4, 4))
    file.end(0)
    watch.now_s += 60
    file(Event("note", 0, 4, data={"text": "the next run is in 1 h"}))
    assert only(path, "lem_campaign_update_timestamp_seconds") == 1120
    assert only(path, "lem_campaign_experiments_ended") == 4


def test_power_is_that_of_the_current_phase(tmp_path: Path) -> None:
    path, watch = tmp_path / "lem.prom", Watch()
    file = PrometheusFile(path, "demo", watch.read, watch.now)
    file(STARTED)
    file(Event("phase", 0, 4, data={"phase": "window"}))
    watch.now_s += 10
    file(Event("progress", 0, 4, data={"power_w": 212.5}))
    assert only(path, "lem_campaign_power_watts") == 212.5
    file(Event("phase", 0, 4, data={"phase": "cooldown"}))
    assert only(path, "lem_campaign_power_watts") is None


def test_a_start_that_is_refused_leaves_its_exit_code(tmp_path: Path) -> None:
    path, manifest = tmp_path / "lem.prom", tmp_path / ".state" / "demo" / "campaign_manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("no manifest")
    ended = CampaignRig(tmp_path).run("--executor", "local", "--resume", "--prometheus", str(path))
    assert ended.code != 0
    assert only(path, "lem_campaign_exit_code") == ended.code
    assert only(path, "lem_campaign_end_timestamp_seconds") is not None


def test_a_second_start_does_not_touch_the_file_of_the_campaign_that_runs(tmp_path: Path) -> None:
    path, state = tmp_path / "lem.prom", tmp_path / ".state" / "demo"
    path.write_text("of the first\n")
    state.mkdir(parents=True)
    with hold_locks([campaign_lock(state, "demo")], Holder(os.getpid(), "here", "demo", "2026-07-14T10:00:00Z")):
        ended = CampaignRig(tmp_path).run("--executor", "local", "--prometheus", str(path))
    assert ended.code != 0
    assert "demo" in ended.err
    assert path.read_text() == "of the first\n"


@pytest.mark.parametrize("text", ["lem.txt", "lem", "prom"])
def test_a_name_that_the_collector_does_not_read_is_refused(text: str) -> None:
    assert prometheus_path("a/lem.prom") == Path("a/lem.prom")
    with pytest.raises(ValueError, match=r"ends in \.prom"):
        prometheus_path(text)


@pytest.mark.needs("torch", "transformers")
def test_a_campaign_keeps_the_file_and_leaves_its_results_in_it(tmp_path: Path) -> None:
    path = tmp_path / "lem.prom"
    ended = CampaignRig(tmp_path).run("--prometheus", str(path))
    assert ended.code == 0, ended.err
    assert only(path, "lem_campaign_running", campaign="demo") == 0
    assert only(path, "lem_campaign_exit_code") == 0
    assert only(path, "lem_campaign_experiments_ended") == 4
    rates = samples(path)["lem_output_tokens_per_second"]
    assert len(rates) == 2
    assert all(value > 0 for value in rates.values())
