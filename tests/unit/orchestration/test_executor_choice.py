"""Where a campaign runs; the scripted `docker` stands in for an engine, and this Python has PyTorch but no TensorRT."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import UserError
from lem.config.campaign_config import CampaignColdStartConfig, CampaignConfig, CampaignGridConfig, CampaignIOConfig
from lem.meters.nvml import GpuFacts
from lem.orchestration.executor import DockerExecutor, ExecutorChoice, choose_executor, docker_executor
from lem.orchestration.plan import Plan, build_plan
from lem.orchestration.session import LocalExecutor
from tests.doubles.fake_docker import FakeDocker

pytestmark = pytest.mark.needs("torch", "transformers")

GPUS = tuple(GpuFacts(index, f"GPU-{index}aaa", "Test", 1, (9, 0)) for index in (0, 1))


@pytest.fixture
def fake(tmp_path: Path) -> FakeDocker:
    return FakeDocker.install(tmp_path / "docker")


def campaign(*backends: str, shared: dict[str, Any] | None = None, **more: Any) -> CampaignConfig:
    grid = CampaignGridConfig(backends=backends or ("pytorch",), shared=shared or {})
    return CampaignConfig.from_dict({"campaign_name": "My Demo", "model": "gpt2", "grid": grid, **more})


def choose(fake: FakeDocker, found: CampaignConfig, wish: str = "auto", **more: Any) -> ExecutorChoice:
    environ = fake.environ()
    return choose_executor(wish, found, build_plan(found), folder=fake.folder, environ=environ, **more)


def test_what_is_installed_here_runs_here(fake: FakeDocker) -> None:
    choice = choose(fake, campaign("pytorch"))
    assert choice.name == "local"
    assert "pytorch can be imported here" in choice.describe()
    assert isinstance(choice.make(), LocalExecutor)
    assert fake.calls() == []


def test_what_is_not_installed_here_runs_in_containers(fake: FakeDocker) -> None:
    choice = choose(fake, campaign("pytorch", "vllm"))
    assert choice.name == "docker"
    text = choice.describe()
    assert "not installed here: vllm" in text
    assert "img (pytorch), img (vllm)" in text
    executor = choice.make()
    assert isinstance(executor, DockerExecutor)
    assert executor.backends == ("pytorch", "vllm")
    assert executor.project.name == "lem-my-demo"


def test_tensorrt_runs_in_its_container(fake: FakeDocker) -> None:
    found = campaign("tensorrt")
    fake.change(services={"tensorrt": {"image": "trt"}})
    choice = choose(fake, found)
    assert choice.name == "docker"
    assert "not installed here: tensorrt (tensorrt_llm)" in choice.describe()
    assert "trt (tensorrt)" in choice.describe()


@pytest.mark.parametrize("state", [{"daemon": "down"}, {"compose": None}])
def test_without_an_engine_it_is_here_and_says_why(fake: FakeDocker, state: dict[str, Any]) -> None:
    fake.change(**state)
    choice = choose(fake, campaign("vllm"))
    assert choice.name == "local"
    assert "want of containers" in choice.describe()


def test_what_is_asked_for_is_done(fake: FakeDocker) -> None:
    assert choose(fake, campaign("pytorch"), "docker").name == "docker"
    assert choose(fake, campaign("vllm"), "local").name == "local"
    assert "python3 (asked for)" in choose(fake, campaign("vllm"), python="python3").describe()


def test_a_python_is_for_the_local_executor(fake: FakeDocker) -> None:
    with pytest.raises(UserError, match="--python"):
        choose(fake, campaign(), "docker", python="python3")


def test_containers_that_are_to_be_restarted_are_containers(fake: FakeDocker) -> None:
    found = campaign("pytorch", cold_start=CampaignColdStartConfig(restart_container=True))
    choice = choose(fake, found)
    assert choice.name == "docker"
    executor = choice.make()
    assert isinstance(executor, DockerExecutor)
    assert executor.is_recreating


def test_images_that_cannot_be_told_are_no_error(fake: FakeDocker) -> None:
    fake.change(invalid="yaml: line 2: did not find expected node content")
    assert "images unknown" in choose(fake, campaign(), "docker").describe()


# What the executor is made of


def made(found: CampaignConfig, folder: Path, gpus: tuple[GpuFacts, ...] = GPUS) -> DockerExecutor:
    plan: Plan = build_plan(found)
    return docker_executor(found, plan, folder=folder, environ={}, gpus=gpus)


@pytest.mark.parametrize(
    ("gpus", "given"),
    [
        ([None], ("GPU-0aaa",)),
        ([["1"]], ("GPU-1aaa",)),
        ([["1"], None], ("GPU-0aaa", "GPU-1aaa")),
        ([["GPU-1a"]], ("GPU-1aaa",)),
        ([[]], ()),
        ([[], ["0"]], ("GPU-0aaa",)),
    ],
)
def test_a_service_is_given_the_gpus_that_its_experiments_name(
    tmp_path: Path, gpus: list[Any], given: tuple[str, ...]
) -> None:
    assert made(campaign(shared={"gpus": gpus}), tmp_path).project.gpus_of == {"pytorch": given}


@pytest.mark.parametrize("gpus", [[None], [["7"]]])
def test_gpus_that_nobody_knows_are_those_of_the_file(tmp_path: Path, gpus: list[Any]) -> None:
    assert made(campaign(shared={"gpus": gpus}), tmp_path, gpus=()).project.gpus_of == {}


def test_folders_are_those_of_the_campaign(tmp_path: Path) -> None:
    io = CampaignIOConfig(results_dir="r", state_dir="/s", env_file="my.env")
    project = made(campaign(io=io), tmp_path).project
    assert project.results_dir == tmp_path / "r"
    assert project.state_folder == Path("/s/my-demo")
    assert project.env_file == tmp_path / "my.env"
    assert project.working_dir == tmp_path


def test_each_service_sees_its_own_models(tmp_path: Path) -> None:
    models = {"pytorch": tmp_path / "one", "vllm": tmp_path / "two"}
    for path in models.values():
        path.mkdir()
    entries = [{"model": str(path), "backend": backend} for backend, path in models.items()]
    found = CampaignConfig.from_dict({"campaign_name": "demo", "experiments": entries})
    from lem.config.load import complete_campaign

    plan = build_plan(found, complete_campaign(found).listed)
    mounts = docker_executor(found, plan, folder=tmp_path, environ={}, gpus=()).project.mounts_of
    assert {name: [item.source for item in items] for name, items in mounts.items()} == {
        name: [path] for name, path in models.items()
    }


def test_a_compose_file_that_is_named_is_used(fake: FakeDocker) -> None:
    io = CampaignIOConfig(compose_file=str(fake.folder / "docker-compose.yml"))
    Path(str(io.compose_file)).write_text("services: {}\n")
    choice = choose(fake, campaign("pytorch", io=io))
    assert choice.name == "docker"
    assert "a file for compose is named" in choice.describe()


def test_what_is_about_containers_is_told_to_do_nothing_here(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lem"), "propagate", True)
    found = campaign("pytorch", io={"env_file": "gpu.env"}, health_check={"enabled": False})
    assert choose(fake, found, "local").name == "local"
    assert "io.env_file has no effect" in caplog.text
    assert "health_check has no effect" in caplog.text
    assert "compose_file" not in caplog.text
