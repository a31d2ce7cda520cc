"""The manager of containers against a scripted `docker` command; the real engine is in tests/integration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lem.meters.nvml import GpuProcess, GpuReading, GpuState
from lem.orchestration.container import ContainerError, ContainerManager, gpu_loss, judge
from tests.doubles.fake_docker import FakeDocker

GIB = 1024**3
GPU = {"driver": "nvidia", "count": -1, "capabilities": ["gpu"]}
WITH_GPU = {"image": "img", "deploy": {"resources": {"reservations": {"devices": [GPU]}}}}


@pytest.fixture
def fake(tmp_path: Path) -> FakeDocker:
    return FakeDocker.install(tmp_path / "docker")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project folder with a compose file; the scripted command says what is in it."""
    path = tmp_path / "project"
    path.mkdir()
    (path / "docker-compose.yml").write_text("services: {}\n")
    return path


def manager(fake: FakeDocker, folder: Path, **environ: str) -> ContainerManager:
    cache = str(folder.parent / "cache")
    return ContainerManager(project_dir=folder, environ=fake.environ(LEM_CACHE_DIR=cache, **environ))


def reading(used_b: int, *processes: tuple[int, int | None], error: str | None = None) -> dict[str, Any]:
    """What NVML says of one GPU of 10 GiB."""
    gpu = {
        "index": 0,
        "uuid": "GPU-1",
        "name": "Test GPU",
        "memory_total_b": 10 * GIB,
        "memory_used_b": used_b,
        "processes": [{"pid": pid, "memory_b": memory_b} for pid, memory_b in processes],
    }
    return {"gpus": [] if error else [gpu], "driver": "1", "error": error}


def started(fake: FakeDocker, folder: Path, *services: str) -> ContainerManager:
    found = manager(fake, folder)
    found.start_services(services)
    return found


# What is missing is told, each with its remedy


@pytest.mark.parametrize(
    ("state", "kind", "remedy"),
    [
        ({"daemon": "down"}, "daemon", "systemctl start docker"),
        ({"daemon": "forbidden"}, "rights", "usermod"),
        ({"compose": None}, "compose", "install"),
        ({"compose": "2.16.0"}, "compose", "2.17"),
        (
            {"invalid": "validating c.yml: services.a Additional property imag is not allowed"},
            "compose_file",
            "correct the file",
        ),
        (
            {"invalid": "error while interpolating services.a.image: required variable NOPE"},
            "compose_file",
            "correct the file",
        ),
        ({"services": {"web": {"image": "img"}}}, "service", "lem compose"),
        ({"images": []}, "image", "docker pull img"),
        ({"services": {"pytorch": {"build": "."}}}, "image", "build"),
        ({"services": {"pytorch": WITH_GPU}, "no_gpu_runtime": True}, "gpu", "NVIDIA Container Toolkit"),
    ],
)
def test_what_is_missing_is_told_with_its_remedy(
    fake: FakeDocker, folder: Path, state: dict[str, Any], kind: str, remedy: str
) -> None:
    fake.change(**state)
    with pytest.raises(RuntimeError) as caught:
        manager(fake, folder).start_services(["pytorch"])
    assert isinstance(caught.value, ContainerError)
    assert caught.value.kind == kind
    assert remedy in caught.value.hint


def test_no_docker_command_is_told(fake: FakeDocker, folder: Path, tmp_path: Path) -> None:
    environ = {"PATH": str(tmp_path / "empty"), "HOME": str(tmp_path)}
    with pytest.raises(ContainerError) as caught:
        ContainerManager(project_dir=folder, environ=environ).start_services(["pytorch"])
    assert caught.value.kind == "docker"
    assert "--executor local" in caught.value.hint


def test_a_compose_file_that_is_not_there_is_told(fake: FakeDocker, folder: Path) -> None:
    with pytest.raises(ContainerError, match=r"nope\.yml: no such compose file") as caught:
        ContainerManager("nope.yml", folder, environ=fake.environ()).start_services(["pytorch"])
    assert caught.value.kind == "compose_file"


# Starting, and what containers are given


def test_a_service_that_ends_at_once_is_an_error_with_what_it_printed(fake: FakeDocker, folder: Path) -> None:
    fake.change(after_up="exited", logs="exec: python3 not found")
    with pytest.raises(RuntimeError, match=r"exited with code 137.*python3 not found"):
        manager(fake, folder).start_services(["vllm"])


def test_without_waiting_nothing_is_asked(fake: FakeDocker, folder: Path) -> None:
    manager(fake, folder).start_services(["vllm"], wait=False)
    assert fake.compose_calls("exec") == []


def override(fake: FakeDocker) -> str:
    """The override file of the last call."""
    words = fake.calls()[-1]
    return Path([words[place + 1] for place, word in enumerate(words) if word == "--file"][-1]).read_text()


def test_the_override_gives_folders_and_no_secret(fake: FakeDocker, folder: Path) -> None:
    environ = {"HF_TOKEN": "hf_planted", "LEM_WEBHOOK": "https://planted"}
    manager(fake, folder, **environ).start_services(["vllm"])
    text = override(fake)
    assert "planted" not in text
    assert "planted" not in json.dumps(fake.calls())
    (service,) = json.loads(text.partition("\n")[2])["services"].values()
    mounts = {item["target"]: item for item in service["volumes"]}
    assert all(item["bind"] == {"create_host_path": False} for item in mounts.values())
    assert {path: item["read_only"] for path, item in mounts.items()} == {
        "/opt/lem": True,
        str(folder): True,
        str(folder / "results"): False,
    }
    assert (folder / "results").is_dir()
    assert service["pull_policy"] == "never"
    assert service["environment"]["HOME"] == "/tmp"
    assert service["environment"]["USER"]
    assert "deploy" not in service


# Running experiments


def test_an_experiment_runs_with_its_arguments_and_its_variables_are_in_no_argv(fake: FakeDocker, folder: Path) -> None:
    found = started(fake, folder, "pytorch")
    output, code = found.execute_experiment("pytorch", "nope.yaml", ["--cycles", "2"], {"HF_TOKEN": "hf_planted"})
    words = fake.compose_calls("exec")[-1]
    assert words[words.index("experiment") :] == ["experiment", "nope.yaml", "--yes", "--cycles", "2"]
    assert "hf_planted" not in json.dumps(fake.calls())
    assert code == 2
    assert "nope.yaml" in output


def test_an_experiment_that_could_not_run_is_a_message_and_1(fake: FakeDocker, folder: Path) -> None:
    found = started(fake, folder, "pytorch")
    message, code = found.execute_experiment("vllm", "a.yaml")
    assert (code, "not running" in message) == (1, True)
    shutil.rmtree(fake.folder / "bin")
    assert found.execute_experiment("pytorch", "a.yaml")[1] == 1


# Health


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {},
        {"gpus": [{"index": 0}], "driver": None, "error": None},
        {**reading(GIB), "gpus": [{**reading(GIB)["gpus"][0], "processes": [{"pid": "1", "memory_b": 1}]}]},
    ],
)
def test_an_answer_that_is_no_reading_is_unhealthy(fake: FakeDocker, folder: Path, answer: Any) -> None:
    found = started(fake, folder, "vllm")
    fake.change(gpus={"vllm": answer})
    status = found.check_health("vllm")
    assert status.healthy is False
    assert "unexpected answer" in status.reason


@pytest.mark.parametrize(
    ("containers", "reason"),
    [({}, "no container"), ({"vllm": {"State": "exited", "ExitCode": 137}}, "exited with code 137")],
)
def test_a_container_that_does_not_run_is_unhealthy(
    fake: FakeDocker, folder: Path, containers: dict[str, Any], reason: str
) -> None:
    found = started(fake, folder, "vllm")
    fake.change(containers=containers)
    status = found.check_health("vllm")
    assert not status.healthy
    assert reason in status.reason


def test_an_engine_that_is_gone_is_unhealthy_and_no_error(fake: FakeDocker, folder: Path) -> None:
    found = started(fake, folder, "vllm")
    fake.change(daemon="down")
    assert not found.check_health("vllm").healthy
    assert not found.is_service_running("vllm")


@pytest.fixture
def with_gpu(fake: FakeDocker, folder: Path) -> ContainerManager:
    fake.change(services={"vllm": WITH_GPU}, gpus={"vllm": reading(GIB)})
    return started(fake, folder, "vllm")


def test_memory_of_the_own_worker_does_not_count(fake: FakeDocker, with_gpu: ContainerManager) -> None:
    fake.change(gpus={"vllm": reading(int(9.5 * GIB), (4711, int(9.4 * GIB)))}, pids={"id-vllm": [4710, 4711]})
    assert not with_gpu.check_health("vllm").healthy, "no worker is open: it is a leftover"
    worker = with_gpu.worker_in("vllm")
    worker.open()
    try:
        assert with_gpu.check_health("vllm").healthy
    finally:
        worker.stop()
    assert not with_gpu.check_health("vllm").healthy


# Restarts


@pytest.mark.parametrize("state", [{"restart_fails": True}, {"after_restart": "exited"}])
def test_a_container_that_a_restart_does_not_help_is_replaced(
    fake: FakeDocker, folder: Path, state: dict[str, Any]
) -> None:
    found = started(fake, folder, "vllm")
    fake.change(silent=["vllm"], **state)
    assert found.restart_service("vllm") is True
    assert "--force-recreate" in fake.compose_calls("up")[-1]


# The end


def test_a_teardown_that_fails_hides_no_error(fake: FakeDocker, folder: Path) -> None:
    with pytest.raises(ValueError, match="the one to see"), manager(fake, folder) as found:
        found.start_services(["vllm"])
        fake.change(daemon="down")
        raise ValueError("the one to see")


def test_another_manager_sees_what_one_left(fake: FakeDocker, folder: Path) -> None:
    started(fake, folder, "vllm")
    later = manager(fake, folder)
    assert later.is_service_running("vllm")
    later.teardown(timeout=3)
    assert fake.compose_calls("down")[-1][-1] == "3"


def test_a_manager_that_is_only_made_asks_nothing(fake: FakeDocker, folder: Path) -> None:
    manager(fake, folder)
    ContainerManager()
    assert fake.calls() == []


# How a reading is judged


def gpu_state(used_b: int, *processes: tuple[int, int | None], index: int = 0) -> GpuState:
    return GpuState(index, f"GPU-{index}", "Test", 100, used_b, tuple(GpuProcess(*item) for item in processes))


@pytest.mark.parametrize(
    ("state", "own", "healthy"),
    [
        (gpu_state(89), (), True),
        (gpu_state(90), (), False),
        (gpu_state(95, (1, 90)), (1,), True),
        (gpu_state(95, (1, 90)), (2,), False),
        (gpu_state(95, (1, 3), (2, 92)), (1,), False),
        (gpu_state(95, (1, None)), (1,), True),
        # Whose it is cannot be said while another computes there, too.
        (gpu_state(95, (1, None), (2, 1)), (1,), False),
        # The driver may count more for a process than it says is in use.
        (gpu_state(50, (1, 90)), (1,), True),
    ],
)
def test_only_memory_of_others_counts(state: GpuState, own: tuple[int, ...], healthy: bool) -> None:
    assert judge("vllm", GpuReading((state,), "1"), own, 90.0).healthy is healthy


def test_the_fullest_of_several_gpus_decides() -> None:
    status = judge("vllm", GpuReading((gpu_state(10), gpu_state(95, (7, 90), index=1)), "1"), (), 90.0)
    assert not status.healthy
    assert "GPU 1" in status.reason
    assert "7" in status.reason
    assert (status.gpu_memory_used_gb, status.gpu_memory_total_gb) == (105e-9, 200e-9)


def test_a_gpu_without_memory_of_its_own_is_judged_by_being_there() -> None:
    assert judge("vllm", GpuReading((GpuState(0, "GPU-0", "Test", 0, 0, ()),), "1"), (), 90.0).healthy


@pytest.mark.parametrize(
    ("reading", "is_lost", "is_explained"),
    [
        (GpuReading((gpu_state(1),), "1"), False, False),
        (GpuReading((), "1"), True, False),
        (GpuReading((), None, "Unknown Error"), True, True),
        (GpuReading((gpu_state(1),), "1", "Unknown Error"), True, True),
        (GpuReading((), None, "NVML Shared Library Not Found"), True, False),
        (GpuReading((), None, "GPU is lost"), True, False),
        (GpuReading((), None, "Something New"), True, False),
    ],
)
def test_a_gpu_is_lost_when_it_cannot_be_read(reading: GpuReading, is_lost: bool, is_explained: bool) -> None:
    lost = gpu_loss(reading)
    assert (lost is not None) is is_lost
    assert judge("vllm", reading, (), 90.0).healthy is not is_lost
    assert ("daemon-reload" in str(lost)) is is_explained
