"""The members that scripts and notebooks call: names, order of parameters, defaults, and the behaviour promised."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from lem.config import campaign_config, introspection
from lem.config.campaign_config import (
    CampaignConfig,
    CampaignDaemonConfig,
    CampaignExecutionConfig,
    CampaignExplicitExperiment,
    CampaignGridConfig,
    CampaignHealthCheckConfig,
    CampaignIOConfig,
    CampaignScheduleConfig,
)
from lem.orchestration import grid
from lem.orchestration.campaign import CampaignExperiment, CampaignRunner
from lem.orchestration.container import ContainerHealthStatus, ContainerManager
from lem.orchestration.grid import (
    GridExpansionResult,
    GridValidationIssue,
)
from lem.orchestration.manifest import CampaignManifest, CampaignManifestEntry, ManifestManager
from lem.orchestration.plan import build_plan
from lem.orchestration.resume import resume_text
from lem.results.aggregation import aggregate_campaign_results, run_document
from lem.results.bootstrap import BootstrapResult, bootstrap_ci, compute_metric_ci
from lem.results.run import make_run
from tests.campaign_doubles import Place, make_campaign
from tests.doubles.fake_docker import FakeDocker
from tests.records import make_record


def parameters(function: Any) -> str:
    """The parameters that can be given by position, with their defaults, as contracts.md writes them."""
    found = inspect.signature(function).parameters.values()
    return ", ".join(
        item.name if item.default is item.empty else f"{item.name}={item.default!r}"
        for item in found
        if item.kind is item.POSITIONAL_OR_KEYWORD and item.name != "self"
    )


# As a notebook has it, where a list is as good as a tuple.
config: Any = campaign_config

FUNCTIONS = {
    campaign_config.generate_campaign_id: "name",
    CampaignConfig.generate_campaign_id: "name",
    CampaignConfig.get_config_paths: "",
    CampaignConfig.get_config_names: "",
    introspection.get_campaign_params: "",
    introspection.get_campaign_grid_params: "",
    introspection.get_campaign_health_check_params: "",
    introspection.get_experiment_params: "backend=None",
    grid.expand_campaign_grid: "grid, base_config=None",
    grid.validate_campaign_grid: "config_dicts",
    ManifestManager: "manifest_path",
    ManifestManager.save: "manifest",
    ManifestManager.exists: "",
    ManifestManager.create_manifest: "campaign_id, campaign_name, config_hash, experiments",
    ManifestManager.check_config_changed: "manifest, current_config_hash",
    CampaignManifest.get_remaining: "",
    CampaignManifest.get_by_status: "status",
    CampaignManifest.update_entry: "exp_id",
    ContainerManager: "compose_file='docker-compose.yml', project_dir=None",
    ContainerManager.start_services: "backends, wait=True",
    ContainerManager.execute_experiment: "service, config_path, extra_args=None, env_vars=None",
    ContainerManager.check_health: "service, gpu_memory_threshold_pct=90.0",
    ContainerManager.check_and_recover: "service, gpu_memory_threshold_pct=90.0, max_restarts=3",
    ContainerManager.teardown: "timeout=30",
    ContainerManager.is_service_running: "service",
    CampaignRunner.generate_execution_order: "",
    CampaignRunner.generate_execution_order_from_grid: "",
    CampaignRunner.create_manifest: "execution_order",
    CampaignRunner.apply_resume_filter: "manifest, execution_order",
    CampaignRunner.should_health_check: "experiment_index",
    CampaignRunner.should_cold_start: "",
    bootstrap_ci: "samples, n_iterations=1000, confidence=0.95, seed=42",
    compute_metric_ci: "values, metric_name='', confidence=0.95",
    aggregate_campaign_results: "results, confidence=0.95",
}


@pytest.mark.parametrize(("function", "expected"), FUNCTIONS.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_functions_have_these_parameters(function: Any, expected: str) -> None:
    assert parameters(function) == expected


def test_further_parameters_come_after_the_fixed_ones_and_have_defaults() -> None:
    service, *others = list(inspect.signature(ContainerManager.restart_service).parameters.values())[1:]
    assert service.name == "service"
    assert all(item.default is not item.empty for item in others)
    assert parameters(ManifestManager.load).split(", ")[0].endswith("=None")


FIELDS = {
    GridExpansionResult: "valid_configs filtered_configs warnings total_generated",
    GridValidationIssue: "config_desc reason severity",
    ContainerHealthStatus: "service healthy reason gpu_memory_used_gb gpu_memory_total_gb",
    BootstrapResult: "mean std ci_lower ci_upper n_samples confidence warning",
    CampaignExplicitExperiment: "config overrides",
    CampaignManifestEntry: "exp_id config_name config_path config_hash backend container cycle_index status "
    "result_path started_at completed_at error retry_count",
    CampaignManifest: "campaign_id campaign_name created_at updated_at config_hash total_experiments experiments",
}


@pytest.mark.parametrize(("kind", "names"), FIELDS.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_dataclasses_begin_with_these_fields(kind: Any, names: str) -> None:
    expected = names.split()
    assert [item.name for item in dataclasses.fields(kind)][: len(expected)] == expected


FROZEN = [getattr(campaign_config, name) for name in campaign_config.__all__ if name.startswith("Campaign")]
FROZEN += [GridExpansionResult, GridValidationIssue, ContainerHealthStatus, BootstrapResult, CampaignExperiment]


def test_dataclasses_are_frozen_but_for_the_manifest() -> None:
    assert [kind for kind in FROZEN if not is_frozen(kind)] == []
    assert [kind for kind in (CampaignManifest, CampaignManifestEntry) if is_frozen(kind)] == []


def is_frozen(kind: type[Any]) -> bool:
    try:
        setattr(object.__new__(kind), dataclasses.fields(kind)[0].name, None)
    except dataclasses.FrozenInstanceError:
        return True
    return False


# --- lem.config.campaign_config


def test_a_campaign_needs_a_name_and_something_to_run_and_no_model() -> None:
    campaign = config.CampaignConfig(campaign_name="demo", grid=config.CampaignGridConfig(backends=["pytorch"]))
    assert (campaign.model, campaign.dataset, campaign.num_samples) == (None, None, None)
    assert (campaign.daemon, campaign.schedule) == (None, None)
    assert (campaign.configs, campaign.experiments) == ([], [])
    assert campaign.grid is not None
    assert (campaign.grid.models, campaign.grid.shared, campaign.grid.backend_overrides) == (None, {}, {})
    assert campaign.notification.on == ["complete", "failure"]
    assert config.CampaignConfig(campaign_name="demo", configs=["a.yaml"]).grid is None
    plan = build_plan(campaign)
    assert plan.experiments == ()
    assert ["no model" in issue.reason for issue in plan.filtered] == [True]


def test_an_explicit_experiment_is_a_file_with_overrides() -> None:
    assert config.CampaignExplicitExperiment("a.yaml").overrides == {}
    given = config.CampaignExplicitExperiment(config="a.yaml", overrides={"decoder.temperature": 0.0})
    assert (given.config, given.overrides) == ("a.yaml", {"decoder.temperature": 0.0})
    campaign = config.CampaignConfig(campaign_name="demo", configs=["runs/b.yaml"], experiments=[given])
    assert campaign.experiments == [given]
    assert campaign.get_config_paths() == [Path("runs/b.yaml"), Path("a.yaml")]
    assert campaign.get_config_names() == ["b", "a"]


def test_the_campaign_id_is_the_beginning_of_the_md5_of_the_name() -> None:
    campaign = config.CampaignConfig(campaign_name="demo", configs=["a.yaml"])
    assert campaign.campaign_id == "fe01ce2a"
    assert CampaignConfig.generate_campaign_id("demo") == campaign_config.generate_campaign_id("demo") == "fe01ce2a"


def test_durations_are_seconds_and_the_manifest_a_path() -> None:
    daemon = CampaignDaemonConfig(enabled=True, interval="6h", total_duration="2d")
    assert (daemon.interval_seconds, daemon.total_duration_seconds) == (21600.0, 172800.0)
    assert (CampaignDaemonConfig().interval_seconds, CampaignDaemonConfig().total_duration_seconds) == (None, None)
    assert CampaignIOConfig().manifest_path == Path(".state/campaign_manifest.json")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: CampaignConfig(campaign_name="demo"), "configs"),
        (lambda: CampaignConfig(grid=CampaignGridConfig(backends=("pytorch",))), "campaign_name"),
        (CampaignExplicitExperiment, "config"),
        (lambda: CampaignExecutionConfig(cycles=21), "cycles"),
        (lambda: CampaignGridConfig(backends=("cuda",)), "backends"),
        (lambda: CampaignHealthCheckConfig(gpu_memory_threshold_pct=49), "gpu_memory_threshold_pct"),
        (lambda: CampaignScheduleConfig(days=("mon",)), "at"),
        (lambda: CampaignDaemonConfig(enabled=True, interval="soon"), "interval"),
    ],
)
def test_keyword_construction_validates(make: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


# --- lem.config.introspection


def test_parameters_are_described_by_their_dotted_names() -> None:
    backends = introspection.get_campaign_grid_params()["grid.backends"]
    threshold = introspection.get_campaign_health_check_params()["health_check.gpu_memory_threshold_pct"]
    assert {"type", "default", "bounds", "unit", "description"} <= backends.keys()
    assert (threshold["type"], threshold["default"], threshold["unit"]) == ("number", 90.0, "%")
    assert threshold["bounds"] == {"minimum": 50, "maximum": 100}
    everything = introspection.get_campaign_params()
    assert everything["grid.backends"] == backends
    assert everything["health_check.gpu_memory_threshold_pct"] == threshold
    only_vllm = introspection.get_experiment_params("vllm").keys()
    assert "vllm.max_num_seqs" in only_vllm
    assert "pytorch.batch_size" in introspection.get_experiment_params().keys() - only_vllm


# --- lem.orchestration.manifest


def entry(number: int, **fields: Any) -> CampaignManifestEntry:
    return CampaignManifestEntry(f"exp-{number}", "small", "small.yaml", "0" * 16, "pytorch", None, 0, **fields)


def manifest_of(*statuses: str) -> CampaignManifest:
    entries = [entry(number, status=status) for number, status in enumerate(statuses)]
    return CampaignManifest("fe01ce2a", "demo", "", "", "0" * 16, len(entries), entries)


def test_a_manifest_counts_its_entries() -> None:
    manifest = manifest_of("completed", "failed", "pending", "running", "skipped")
    assert (manifest.completed_count, manifest.failed_count, manifest.pending_count) == (1, 1, 1)
    assert manifest.progress_fraction == pytest.approx(0.2)
    assert [item.exp_id for item in manifest.get_remaining()] == ["exp-1", "exp-2"]
    assert [item.exp_id for item in manifest.get_by_status("running")] == ["exp-3"]
    assert not manifest.is_complete
    assert manifest_of("completed", "skipped").is_complete
    manifest.update_entry("exp-2", status="completed", result_path="r.json")
    assert (manifest.experiments[2].status, manifest.experiments[2].result_path) == ("completed", "r.json")
    assert manifest.completed_count == 2


def test_a_manifest_is_saved_whole_and_loaded_equal(tmp_path: Path) -> None:
    manager = ManifestManager(tmp_path / "new" / "manifest.json")
    assert not manager.exists()
    assert manager.load() is None
    manifest = manager.create_manifest("fe01ce2a", "demo", "0" * 16, [entry(0), entry(1)])
    assert (manifest.total_experiments, len(manifest.experiments)) == (2, 2)
    manifest.updated_at = "2000-01-01T00:00:00.000000Z"
    manager.save(manifest)
    assert manifest.updated_at > "2000-01-02"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["manifest.json"]
    assert manager.exists()
    assert manager.load() == manifest
    assert not manager.check_config_changed(manifest, "0" * 16)
    assert manager.check_config_changed(manifest, "1" * 16)


# --- lem.orchestration.container


@pytest.fixture
def fake(tmp_path: Path) -> FakeDocker:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "docker-compose.yml").write_text("services: {}\n")
    return FakeDocker.install(tmp_path / "docker")


@pytest.fixture
def manager(fake: FakeDocker, tmp_path: Path) -> ContainerManager:
    environ = fake.environ(LEM_CACHE_DIR=str(tmp_path / "cache"))
    return ContainerManager(project_dir=tmp_path / "project", environ=environ)


def test_a_service_without_a_gpu_is_healthy_when_it_answers(fake: FakeDocker, manager: ContainerManager) -> None:
    manager.start_services(["vllm"])
    status = manager.check_health("vllm")
    assert (status.healthy, status.gpu_memory_used_gb, status.gpu_memory_total_gb) == (True, None, None)
    fake.change(silent=["vllm"])
    assert manager.check_health("vllm").healthy is False
    assert manager.restart_service("vllm") is True


def test_recovery_gives_the_final_status(fake: FakeDocker, manager: ContainerManager) -> None:
    manager.start_services(["vllm", "pytorch"])
    assert manager.check_and_recover("vllm") == manager.check_health("vllm")
    fake.change(silent=["vllm"])
    recovered = manager.check_and_recover("vllm", max_restarts=1)
    assert recovered == manager.check_health("vllm")
    assert recovered.healthy is True
    fake.change(silent=["vllm"])
    status = manager.check_and_recover("vllm", max_restarts=1)
    assert (status.service, status.healthy) == ("vllm", False)
    assert status == manager.check_health("vllm")
    assert len(fake.compose_calls("restart")) == 1, "restarts are counted over the campaign"
    fake.change(silent=["vllm", "pytorch"])
    assert manager.check_and_recover("pytorch", max_restarts=1).healthy is True, "and for each service"


def test_recovery_in_vain_says_why(fake: FakeDocker, manager: ContainerManager) -> None:
    manager.start_services(["vllm"])
    fake.change(silent=["vllm"], after_restart="exited", after_up="exited")
    status = manager.check_and_recover("vllm", max_restarts=2)
    assert status == ContainerHealthStatus("vllm", False, "its container exited with code 137")
    assert len(fake.compose_calls("restart")) == 2


def test_the_context_tears_down(fake: FakeDocker, manager: ContainerManager) -> None:
    with manager:
        manager.start_services(["vllm"], wait=False)
    assert fake.read()["containers"] == {}


# --- lem.orchestration.campaign


def test_a_runner_plans_and_resumes(tmp_path: Path) -> None:
    runner = Place(tmp_path).runner(make_campaign(tmp_path))
    order = runner.generate_execution_order()
    assert [item.cycle_index for item in order] == [0, 0, 1, 1]
    assert [item.manifest_entry for item in order] == [None] * 4
    assert runner.generate_execution_order_from_grid() == order
    manifest = runner.create_manifest(order)
    assert [item.exp_id for item in manifest.experiments] == [item.exp_id for item in order]
    manifest.update_entry(order[0].exp_id, status="completed")
    manifest.update_entry(order[1].exp_id, status="failed")
    remaining = runner.apply_resume_filter(manifest, order)
    assert [item.exp_id for item in remaining] == [item.exp_id for item in order[1:]]
    assert [item.manifest_entry for item in remaining] == manifest.experiments[1:]


def test_a_runner_knows_when_to_check_and_when_to_start_cold(tmp_path: Path) -> None:
    often = make_campaign(tmp_path, health_check={"interval_experiments": 2}, cold_start={"force_cold_start": True})
    runner = Place(tmp_path).runner(often)
    assert [runner.should_health_check(index) for index in range(5)] == [False, False, True, False, True]
    assert runner.should_cold_start() is True
    usual = Place(tmp_path).runner(make_campaign(tmp_path))
    assert [usual.should_health_check(index) for index in range(5)] == [False] * 5
    assert usual.should_cold_start() is False


# --- lem.results


# --- texts people grep for


def test_texts_people_grep_for(tmp_path: Path) -> None:
    campaign = make_campaign(tmp_path)
    assert build_plan(campaign).summary == "Generated 2 experiments (0 filtered, 0 warnings)"
    manifest = manifest_of("completed", "completed", "failed", "pending", "pending")
    assert resume_text(manifest) == "Resuming: 3 remaining (2 completed, 1 failed)"
    summary = make_run([make_record()], campaign_name="demo", run_id="20260714T100000Z-3fa1")
    assert run_document(summary)["note"] == "Single cycle: use --cycles 3+ for confidence intervals"
