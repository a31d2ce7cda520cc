"""Experiments in containers against a scripted `docker` command, whose `exec` starts real workers on this machine."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import InfrastructureError, UserError
from lem.base.reasons import Reason
from lem.config.campaign_config import (
    CampaignColdStartConfig,
    CampaignConfig,
    CampaignGridConfig,
    CampaignHealthCheckConfig,
    CampaignIOConfig,
)
from lem.config.experiment import ExperimentConfig
from lem.config.load import complete_campaign
from lem.meters.machine import GpuFacts
from lem.orchestration.compose import IMAGES_NAME, ComposeProject, find_compose_files
from lem.orchestration.dispatch import LocalExecutor, Outcome
from lem.orchestration.docker import ContainerError
from lem.orchestration.executor import (
    ContainerWorker,
    DockerExecutor,
    ExecutorChoice,
    campaign_project,
    choose_executor,
    docker_executor,
)
from lem.orchestration.plan import build_plan
from lem.orchestration.schedule import Timeouts
from lem.record import Record, read_record
from lem.worker.channel import Check, Problem
from tests.doubles.fake_docker import UUID, WITH_GPU, FakeDocker, reading
from tests.worker_rig import SMALL, Rig

PATIENT = Timeouts(load_s=100.0, experiment_s=100.0, silence_s=100.0, heartbeat_s=100.0)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    (tmp_path / "work").mkdir()
    with Rig.leaving_nothing(tmp_path / "work") as rig:
        yield rig


class Place:
    """One test's scripted docker, and executors of one project."""

    def __init__(self, rig: Rig, fake: FakeDocker) -> None:
        self.rig = rig
        self.root = rig.folder.parent
        self.fake = fake
        (self.root / "docker-compose.yml").write_text("services: {}\n")
        self.executors: list[DockerExecutor] = []

    def executor(self, *backends: str, free_timeout_s: float = 30.0, **sections: Any) -> DockerExecutor:
        cache = {"LEM_CACHE_DIR": str(self.root / "cache"), "LEM_LOCK_DIR": str(self.root / "locks")}
        environ = {**self.rig.environ(), **self.fake.environ(**cache)}
        environ |= {key: value for key, value in self.rig.environ().items() if key.startswith("LEMTEST")}
        project = ComposeProject(
            name="lem-demo",
            files=find_compose_files(None, self.root, {}),
            state_folder=self.root / "state",
            working_dir=self.root,
            results_dir=self.root / "results",
            environ=environ,
        )
        backends, uuids = backends or ("pytorch",), {"0": UUID}
        self.executors.append(DockerExecutor(project, backends, campaign(**sections), uuids, free_timeout_s))
        return self.executors[-1]

    def run(self, executor: DockerExecutor, name: str = "one", place: str = "pytorch") -> Outcome:
        request = self.rig.request(name, backend=place.partition("@")[0])
        return executor.worker_for(place).run(request, lambda _event: None, PATIENT)

    def images(self) -> dict[str, str]:
        """The images that services would have by lem's own file, if a container was made now."""
        text = (self.root / "state" / IMAGES_NAME).read_text().partition("\n")[2]
        return {service: item["image"] for service, item in json.loads(text)["services"].items()}

    def record(self, name: str = "one") -> Record:
        return read_record(self.rig.folder / name / "result.json")

    def change_in_window(self, **traits: Any) -> dict[str, Any]:
        """A rule by which the engine of docker changes while lem's generates."""
        running = {"pytorch": {"State": "running", "ExitCode": 0}}
        then = self.root / "then.json"
        then.write_text(json.dumps({**self.fake.read(), "containers": running, **traits}))
        return {"at": "generate", "do": "shell", "command": f"cp '{then}' '{self.fake.folder / 'state.json'}'"}


@pytest.fixture
def place(rig: Rig, fake: FakeDocker) -> Iterator[Place]:
    place = Place(rig, fake)
    yield place
    for executor in place.executors:
        executor.kill()
        executor.close()


def test_a_start_that_fails_leaves_nothing_and_no_lock(place: Place) -> None:
    place.fake.change(after_up="exited")
    with pytest.raises(ContainerError, match="does not answer"):
        place.executor().worker_for("pytorch")
    assert place.fake.read()["containers"] == {}
    place.fake.change(after_up="running")
    place.executor().worker_for("pytorch").open()


def test_every_missing_image_is_named_before_a_container_is_started(place: Place) -> None:
    place.fake.change(images=[], services={"pytorch": {"image": "one"}, "vllm": {"image": "two"}})
    with pytest.raises(ContainerError) as caught:
        place.executor("pytorch", "vllm").prepare(("pytorch", "vllm"))
    assert caught.value.kind == "image"
    assert "image one of service pytorch is missing" in caught.value.message
    assert "; so is image two of service vllm" in caught.value.message
    assert "`docker pull one`, `docker pull two`" in caught.value.hint
    assert place.fake.compose_calls("up") == []


def test_a_container_is_replaced_when_the_next_experiment_has_another_image(place: Place) -> None:
    place.fake.change(images=["img", "reg/two:2"])
    one, two = "pytorch", "pytorch@reg/two:2"
    executor = place.executor(one, two)
    found = []
    for number, slot in enumerate((one, one, two, one)):
        assert place.run(executor, str(number), slot).error is None
        found.append((place.images().get("pytorch"), place.record(str(number)).environment.image))
    first, second = (None, "sha256:img"), ("reg/two:2", "sha256:reg/two:2")
    assert found == [first, first, second, first]
    ups = place.fake.compose_calls("up")
    assert len(ups) == 3, "the start, and one for each change"
    assert all("--force-recreate" in words for words in ups)
    assert not executor.worker_for(two).is_open, "its container is gone"


def test_the_image_of_the_compose_file_is_its_own_where_another_comes_first(place: Place) -> None:
    place.fake.change(images=["img", "reg/two:2"])
    one, two = "pytorch", "pytorch@reg/two:2"
    executor = place.executor(two, one)
    for name, slot in (("two", two), ("one", one)):
        assert place.run(executor, name, slot).error is None
    assert place.record("two").environment.image == "sha256:reg/two:2"
    assert place.record("one").environment.image == "sha256:img"
    place.fake.change(images=["reg/two:2"])
    with pytest.raises(ContainerError, match="image img of service pytorch is missing"):
        place.executor(two, one).prepare((two, one))


def test_a_service_need_not_have_the_image_of_its_compose_file(place: Place) -> None:
    place.fake.change(images=["reg/two:2"])
    executor = place.executor("pytorch@reg/two:2")
    assert place.run(executor, "one", "pytorch@reg/two:2").error is None
    assert place.images() == {"pytorch": "reg/two:2"}


def test_an_image_of_an_axis_that_is_missing_is_refused_before_a_container_is_started(place: Place) -> None:
    with pytest.raises(ContainerError, match="image reg/two:2 of service pytorch is missing") as caught:
        place.executor("pytorch", "pytorch@reg/two:2").prepare(("pytorch", "pytorch@reg/two:2"))
    assert caught.value.kind == "image"
    assert "`docker pull reg/two:2`" in caught.value.hint
    assert "--executor local" not in caught.value.hint, "it has no images"
    assert place.fake.compose_calls("up") == []


def test_models_are_looked_for_in_the_container_and_its_engine_process_is_gone_afterwards(place: Place) -> None:
    place.rig.rules = [{"at": "check", "do": "fail", "text": "no such model", "permanent": True}]
    worker = place.executor().worker_for("pytorch")
    answers = worker.check(Check((ExperimentConfig.from_dict(SMALL).to_dict(),)))
    assert Problem("check", 0, "no such model", "", is_certain=True) in answers
    assert worker.run(place.rig.request("one"), lambda _event: None, PATIENT).error is None


def test_one_engine_is_loaded_at_a_time_and_the_record_has_the_image(place: Place) -> None:
    log = place.root / "log"
    place.rig.rules = [{"at": at, "do": "shell", "command": f"echo {at} >> '{log}'"} for at in ("load", "unload")]
    executor = place.executor("pytorch", "vllm")
    assert place.run(executor).error is None
    assert place.run(executor, "two", "vllm").error is None
    assert log.read_text().split() == ["load", "unload", "load"]
    assert place.record().environment.image == "sha256:img"


def test_a_gpu_that_the_other_container_holds_is_waited_for_and_then_freed(place: Place) -> None:
    place.fake.change(
        services={"pytorch": WITH_GPU, "vllm": WITH_GPU},
        gpus={"pytorch": reading(), "vllm": reading((4711, None))},
        pids={"id-pytorch": [4711], "id-vllm": [4712]},
    )
    executor = place.executor("pytorch", "vllm", free_timeout_s=0.5)
    assert place.run(executor).error is None
    with pytest.raises(InfrastructureError, match=r"still in use by the containers of pytorch"):
        place.run(executor, "two", "vllm")
    assert place.fake.compose_calls("up")[-1][-1] == "pytorch", "its container was replaced"
    place.fake.change(gpus={"pytorch": reading(), "vllm": reading((99, None))})
    executor.worker_for("pytorch").open()
    assert place.run(executor, "three", "vllm").error is None, "99 is not one of ours"


@pytest.mark.parametrize(
    ("service", "gpus", "seen"),
    [
        (WITH_GPU, None, [UUID]),
        (WITH_GPU, ["GPU-9"], ["GPU-9"]),
        (WITH_GPU, [], []),
        ({"image": "img"}, None, None),
    ],
)
def test_gpus_are_named_by_uuid_inside(
    place: Place, service: dict[str, Any], gpus: list[str] | None, seen: list[str] | None
) -> None:
    place.fake.change(services={"pytorch": service}, gpus={"pytorch": reading()})
    worker = place.executor().worker_for("pytorch")
    assert isinstance(worker, ContainerWorker)
    assert worker.adapt(place.rig.request("one", backend="pytorch", gpus=gpus)).config["gpus"] == seen


def test_a_result_is_invalid_if_the_gpu_was_lost_meanwhile(place: Place) -> None:
    place.fake.change(services={"pytorch": WITH_GPU}, gpus={"pytorch": reading()})
    place.rig.rules = [place.change_in_window(gpus={"pytorch": reading(error="Unknown Error")})]
    executor = place.executor(health_check=CampaignHealthCheckConfig(max_restarts=1))
    assert place.run(executor).error is None
    validity = place.record().validity
    assert not validity.valid
    assert Reason.of("gpu_unplugged", error="Unknown Error") in validity.invalid_reasons
    worker = executor.worker_for("pytorch")
    assert worker.is_open is False
    place.rig.rules = []
    with pytest.raises(InfrastructureError, match="still unhealthy after 1 restart: the GPU is lost"):
        worker.open()
    place.fake.change(gpus={"pytorch": reading()})
    worker.open()


@pytest.mark.parametrize(
    ("containers", "text"),
    [
        ({"pytorch": {"State": "exited", "ExitCode": 137}}, "its container exited with code 137"),
        ({"pytorch": {"State": "running", "ExitCode": 0}}, "SIGKILL"),
    ],
)
def test_a_death_is_put_down_to_a_container_that_ended(place: Place, containers: dict[str, Any], text: str) -> None:
    place.rig.rules = [place.change_in_window(containers=containers), {"at": "generate", "do": "signal", "number": 9}]
    error = place.run(place.executor()).error
    assert error is not None
    assert error.kind == "died"
    assert text in error.message
    assert ("container" in error.message) is ("container" in text)


@pytest.mark.parametrize(("at", "is_permanent"), [("load", True), ("generate", False)])
def test_an_engine_killed_for_lack_of_memory_has_that_error(place: Place, at: str, is_permanent: bool) -> None:
    place.rig.rules = [{"at": at, "do": "signal", "number": 9}]
    place.fake.change(out_of_memory=[("id-pytorch", None)])
    error = place.run(place.executor()).error
    assert error is not None
    assert (error.kind, error.is_permanent) == ("out_of_memory", is_permanent)
    assert "LEM_MEMORY_LIMIT" in error.hint


ENDED = {"pytorch": {"State": "exited", "ExitCode": 137}}


@pytest.mark.parametrize("options", [{"max_restarts": 0}, {"restart_on_failure": False}])
def test_a_container_that_may_not_be_restarted_stops_the_campaign(place: Place, options: dict[str, Any]) -> None:
    worker = place.executor(health_check=CampaignHealthCheckConfig(**options)).worker_for("pytorch")
    place.fake.change(containers=ENDED)
    with pytest.raises(InfrastructureError, match=r"may not be restarted: .*exited with code 137") as caught:
        worker.open()
    assert "--resume" in caught.value.hint
    assert place.fake.compose_calls("restart") == []


def test_health_is_checked_and_recovered(place: Place) -> None:
    executor, told = place.executor(health_check=CampaignHealthCheckConfig(max_restarts=1)), list[str]()
    executor.worker_for("pytorch").open()
    executor.look_after(told.append)
    assert told == []
    place.fake.change(silent=["pytorch"])
    executor.look_after(told.append)
    assert len(told) == 2
    assert "exec failed" in told[0]
    assert told[1] == "pytorch is healthy again"
    assert place.run(executor).error is None
    place.fake.change(silent=["pytorch"])
    with pytest.raises(InfrastructureError, match="still unhealthy after 1 restart:"):
        executor.look_after(told.append)


def test_health_that_is_only_logged_restarts_nothing(place: Place) -> None:
    executor, told = place.executor(health_check=CampaignHealthCheckConfig(restart_on_failure=False)), list[str]()
    executor.worker_for("pytorch")
    place.fake.change(silent=["pytorch"])
    executor.look_after(told.append)
    assert "restart_on_failure is off" in told[0]
    assert place.fake.compose_calls("restart") == []


def test_a_killed_worker_is_ended_inside_or_with_its_container(place: Place) -> None:
    executor = place.executor()
    executor.worker_for("pytorch").open()
    executor.kill()
    words = place.fake.compose_calls("exec")[-1]
    assert words[-2] == "--end-marked"
    (opened,) = [call for call in place.fake.compose_calls("exec") if call[-1] == "worker"]
    assert f"LEM_WORKER_MARK={words[-1]}" in opened
    assert place.rig.marker.survivors() == ()
    executor.worker_for("pytorch").open()
    place.fake.change(silent=["pytorch"])
    executor.kill()
    assert len(place.fake.compose_calls("kill")) == 1
    assert "--force-recreate" in place.fake.compose_calls("up")[-1]


def test_lem_pyz_is_checked_again_whenever_a_container_is_to_run_it(place: Place) -> None:
    executor = place.executor()
    executor.worker_for("pytorch").open()
    (pyz,) = (place.root / "cache").rglob("lem.pyz")
    program = pyz.read_bytes()
    executor.kill()
    for use in (executor.worker_for("pytorch").open, lambda: executor.check_health("pytorch")):
        pyz.write_bytes(b"evil")
        use()
        assert pyz.read_bytes() == program
    pyz.parent.chmod(0o755)
    executor.kill()
    pyz.unlink()
    pyz.mkdir()  # so that it cannot be written again
    with pytest.raises(UserError, match=r"cannot write .*lem\.pyz"):
        executor.worker_for("pytorch").open()


# Where a campaign runs; this Python has PyTorch but no TensorRT

needs_torch = pytest.mark.needs("torch", "transformers")
GPUS = tuple(GpuFacts(index, f"GPU-{index}aaa", "Test", 1, (9, 0)) for index in (0, 1))


def campaign(*backends: str, shared: dict[str, Any] | None = None, **more: Any) -> CampaignConfig:
    grid = CampaignGridConfig(backends=backends or ("pytorch",), shared=shared or {})
    return CampaignConfig.from_dict({"campaign_name": "My Demo", "model": "gpt2", "grid": grid, **more})


@pytest.fixture(autouse=True)
def here(fake: FakeDocker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fake.folder)


def choose(fake: FakeDocker, found: CampaignConfig, wish: str = "auto", **more: Any) -> ExecutorChoice:
    environ = fake.environ()
    return choose_executor(wish, found, build_plan(found), environ=environ, **more)


@needs_torch
def test_what_is_installed_here_runs_here(fake: FakeDocker) -> None:
    choice = choose(fake, campaign("pytorch"))
    assert choice.name == "local"
    assert "pytorch can be imported here" in choice.describe()
    assert isinstance(choice.make(), LocalExecutor)
    assert fake.calls() == []


def test_tensorrt_runs_in_its_container(fake: FakeDocker) -> None:
    found = campaign("tensorrt")
    fake.change(services={"tensorrt": {"image": "trt"}})
    choice = choose(fake, found)
    assert choice.name == "docker"
    assert "not installed here: tensorrt (tensorrt_llm)" in choice.describe()
    assert "trt (tensorrt)" in choice.describe()
    executor = choice.make()
    assert isinstance(executor, DockerExecutor)
    assert (executor.backends, executor.project.name) == (("tensorrt",), "lem-my-demo")


def test_parts_on_hosts_with_one_file_system_do_not_write_the_same_override(fake: FakeDocker) -> None:
    found = campaign("tensorrt")
    made = [choose(fake, found, "docker", part=part).make() for part in ("", "a", "b")]
    folders = [item.project.state_folder for item in made if isinstance(item, DockerExecutor)]
    assert folders == [fake.folder / ".state" / "my-demo" / part for part in ("", "a", "b")]


@pytest.mark.parametrize(
    "options",
    [
        {"cold_start": CampaignColdStartConfig(restart_container=True)},
        {"io": CampaignIOConfig(compose_file=("docker-compose.yml",))},
        {"io": CampaignIOConfig(env_file="gpu.env")},
    ],
)
def test_options_for_containers_choose_containers(fake: FakeDocker, options: dict[str, Any]) -> None:
    (fake.folder / "docker-compose.yml").write_text("services: {}\n")
    executor = choose(fake, campaign("pytorch", **options)).make()
    assert isinstance(executor, DockerExecutor)


def test_images_of_an_axis_choose_containers_and_are_named_before_a_run(fake: FakeDocker) -> None:
    choice = choose(fake, campaign("pytorch", shared={"image": [None, "reg/two:2", "reg/three@sha256:0f"]}))
    assert choice.name == "docker"
    text = "images img (pytorch), reg/two:2 (pytorch), reg/three@sha256:0f (pytorch)"
    assert f"services pytorch of the compose file in lem's package, {text}" in choice.describe()
    assert "image: reg/two:2 needs it" in choice.describe()


@pytest.mark.parametrize("state", [{"daemon": "down"}, {"compose": None}])
def test_without_an_engine_it_is_here_and_says_why(fake: FakeDocker, state: dict[str, Any]) -> None:
    fake.change(**state)
    choice = choose(fake, campaign("vllm"))
    assert choice.name == "local"
    assert "containers are not available" in choice.describe()


def test_an_executor_that_is_asked_for_is_used(fake: FakeDocker) -> None:
    assert choose(fake, campaign("pytorch"), "docker").name == "docker"
    assert choose(fake, campaign("vllm"), "local").name == "local"
    assert "python3 (requested)" in choose(fake, campaign("vllm"), python="python3").describe()
    with pytest.raises(UserError, match="--python"):
        choose(fake, campaign(), "docker", python="python3")


def test_images_that_cannot_be_told_are_no_error(fake: FakeDocker) -> None:
    fake.change(invalid="yaml: line 2: did not find expected node content")
    assert "images unknown" in choose(fake, campaign(), "docker").describe()


# What the executor is made of


def project_of(found: CampaignConfig, folder: Path, gpus: tuple[GpuFacts, ...] = GPUS) -> ComposeProject:
    plan = build_plan(found, complete_campaign(found).listed)
    return docker_executor(found, plan, campaign_project(found, folder, {}), gpus).project


@pytest.mark.parametrize(
    ("gpus", "known", "given"),
    [
        ([None], (), None),
        ([["7"]], GPUS, None),
        ([None], GPUS, ("GPU-0aaa",)),
        ([["1"]], GPUS, ("GPU-1aaa",)),
        ([["1"], None], GPUS, ("GPU-0aaa", "GPU-1aaa")),
        ([["GPU-1a"]], GPUS, ("GPU-1aaa",)),
        ([[]], GPUS, ()),
        ([[], ["0"]], GPUS, ("GPU-0aaa",)),
    ],
)
def test_a_service_is_given_the_gpus_that_its_experiments_name(
    tmp_path: Path, gpus: list[Any], known: tuple[GpuFacts, ...], given: tuple[str, ...] | None
) -> None:
    found = project_of(campaign(shared={"gpus": gpus}), tmp_path, known).gpus_of
    assert found == ({} if given is None else {"pytorch": given})


def test_folders_are_those_of_the_campaign(tmp_path: Path) -> None:
    io = CampaignIOConfig(results_dir="r", state_dir="/s", env_file="my.env")
    project = project_of(campaign(io=io), tmp_path)
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
    mounts = project_of(found, tmp_path, ()).mounts_of
    sources = {name: [item.source for item in items] for name, items in mounts.items()}
    assert sources == {name: [path] for name, path in models.items()}


def test_what_is_about_containers_is_told_to_do_nothing_here(
    fake: FakeDocker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lem"), "propagate", True)
    found = campaign("pytorch", io={"env_file": "gpu.env"}, health_check={"enabled": False})
    assert choose(fake, found, "local").name == "local"
    assert "io.env_file has no effect" in caplog.text
    assert "health_check has no effect" in caplog.text
    assert "compose_file" not in caplog.text
