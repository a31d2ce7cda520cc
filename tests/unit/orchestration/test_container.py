"""The manager of containers on a scripted `docker` command; the real engine is in tests/integration."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from lem.meters.nvml import GpuProcess, GpuReading, GpuState
from lem.orchestration.container import ContainerError, ContainerManager, judge
from tests.doubles.fake_docker import WITH_GPU, FakeDocker, reading

TWO_FORMS = "services.a: can't set distinct values on 'mem_limit' and 'deploy.resources.limits.memory'"


def manager(fake: FakeDocker, file: str = "docker-compose.yml", **environ: str) -> ContainerManager:
    """The containers of a compose file, whose content is what the scripted command says."""
    folder = fake.folder.parent
    (folder / "docker-compose.yml").write_text("services: {}\n")
    cache = str(folder / "cache")
    return ContainerManager(file, folder, environ=fake.environ(LEM_CACHE_DIR=cache, **environ))


@pytest.fixture
def started(fake: FakeDocker) -> ContainerManager:
    found = manager(fake)
    found.start_services(["vllm"])
    return found


BUILT = {"build": ".", "image": "mine"}


@pytest.mark.parametrize(
    ("state", "kind", "remedy"),
    [
        ({"daemon": "down"}, "daemon", "systemctl start docker"),
        ({"daemon": "forbidden"}, "rights", "usermod"),
        ({"compose": None}, "compose", "install"),
        ({"compose": "2.16.0"}, "compose", "2.17"),
        ({"invalid": "validating c.yml: services.a Additional property imag"}, "compose_file", "correct the file"),
        ({"invalid": "required variable NOPE is missing"}, "compose_file", "correct the file"),
        ({"services": {"web": {"image": "img"}}}, "service", "lem compose"),
        ({"invalid": TWO_FORMS}, "limits", "deploy: {resources: {limits:"),
        ({"endpoint": "ssh://user@far"}, "remote", "docker context use default"),
        ({"endpoint": "tcp://10.0.0.7:2376"}, "remote", "unset DOCKER_HOST"),
        ({"others": ["web-1 /a/compose.yaml"]}, "project", "COMPOSE_PROJECT_NAME"),
        ({"images": []}, "image", "run `docker pull img`, or load it"),
        ({"images": [], "services": {"pytorch": {"image": "lem-pytorch:1"}}}, "image", "-t lem-pytorch:1 docker` in a"),
        ({"images": [], "services": {"pytorch": BUILT}}, "image", "run `docker compose build pytorch`, or load it"),
        ({"services": {"pytorch": {"build": "."}}}, "image", "build"),
        ({"services": {"pytorch": WITH_GPU}, "no_gpu_runtime": True}, "gpu", "NVIDIA Container Toolkit"),
    ],
)
def test_an_error_has_its_kind_and_a_remedy(fake: FakeDocker, state: dict[str, Any], kind: str, remedy: str) -> None:
    fake.change(**state)
    with pytest.raises(RuntimeError) as caught:
        manager(fake).start_services(["pytorch"])
    assert isinstance(caught.value, ContainerError)
    assert caught.value.kind == kind
    assert remedy in caught.value.hint


def test_where_the_demo_made_a_python_a_missing_image_of_its_engine_is_not_needed(
    fake: FakeDocker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    python = Path("build/demo-env/bin/python")
    python.parent.mkdir(parents=True)
    python.touch()
    fake.change(images=[])
    with pytest.raises(ContainerError) as caught:
        manager(fake).start_services(["pytorch"])
    assert caught.value.hint.endswith(f"run on this machine instead: --executor local --python {python}")


@pytest.mark.parametrize(
    ("file", "path", "kind", "remedy"),
    [
        ("nope.yml", None, "compose_file", "lem compose"),
        ("docker-compose.yml", "/nowhere", "docker", "--executor local"),
    ],
)
def test_a_missing_file_or_command_is_an_error(
    fake: FakeDocker, file: str, path: str | None, kind: str, remedy: str
) -> None:
    environ = {} if path is None else {"PATH": path}
    with pytest.raises(ContainerError) as caught:
        manager(fake, file, **environ).start_services(["pytorch"])
    assert caught.value.kind == kind
    assert remedy in caught.value.hint


@pytest.mark.parametrize(
    "endpoint",
    ["unix:///run/user/1/docker.sock", "tcp://127.0.0.1:2375", "tcp://[::1]:1", f"tcp://{socket.gethostname()}:1", ""],
)
def test_an_engine_of_this_machine_is_used_wherever_it_listens(fake: FakeDocker, endpoint: str) -> None:
    fake.change(endpoint=endpoint)
    manager(fake).start_services(["pytorch"])
    assert fake.compose_calls("up")


def test_containers_that_are_not_lem_s_survive_a_teardown(fake: FakeDocker) -> None:
    found = manager(fake)
    found.start_services(["pytorch"])
    served = "llm-1 /s/docker-compose.lem.yml,/tmp/x/options.yml"  # with the options of its load
    fake.change(others=["web-1 /a/compose.yaml", "lem-1 /a/compose.yaml,/s/docker-compose.lem.yml", served])
    found.teardown()
    assert fake.compose_calls("down") == []
    assert fake.calls()[-1] == ["rm", "--force", "--volumes", "lem-1", "llm-1"]


def test_files_and_profiles_are_also_found_by_a_manager(fake: FakeDocker) -> None:
    folder = fake.folder.parent
    for name in ("one.yml", "two.yml"):
        (folder / name).write_text("services: {}\n")
    (folder / ".env").write_text("COMPOSE_FILE=one.yml:two.yml\nCOMPOSE_PROFILES=gpu\n")
    found = ContainerManager(None, folder, environ=fake.environ(LEM_CACHE_DIR=str(folder / "cache")))
    assert [path.name for path in found.project.files] == ["one.yml", "two.yml"]
    assert found.project.environ["COMPOSE_PROFILES"] == "gpu"


# Starting


def test_no_backend_starts_no_service(fake: FakeDocker) -> None:
    found = manager(fake)
    found.start_services([])
    assert fake.compose_calls("up") == []


@pytest.mark.parametrize("compose", ["2.17.3", "v2.20.2", "5.0.1"])
def test_every_version_is_driven_alike_by_every_manager(fake: FakeDocker, compose: str) -> None:
    fake.change(compose=compose)
    first, later = manager(fake), manager(fake)
    assert fake.calls() == [], "nothing is asked before it is needed"
    first.start_services(["vllm"], wait=False)
    assert fake.compose_calls("exec") == []
    assert later.is_service_running("vllm")
    assert not later.is_service_running("pytorch")
    later.teardown(timeout=3)
    assert fake.compose_calls("down")[-1][-1] == "3"


def test_a_service_that_ends_at_once_is_an_error_with_its_output(fake: FakeDocker) -> None:
    fake.change(after_up="exited", logs="exec: python3 not found")
    with pytest.raises(RuntimeError, match=r"exited with code 137.*python3 not found"):
        manager(fake).start_services(["vllm"])


def test_a_failing_teardown_hides_no_error(fake: FakeDocker) -> None:
    with pytest.raises(ValueError, match="the one to see"), manager(fake) as found:
        found.start_services(["vllm"])
        fake.change(daemon="down")
        raise ValueError("the one to see")


# Health


def damaged(**fields: Any) -> dict[str, Any]:
    found = reading()
    return {**found, "gpus": [{**found["gpus"][0], **fields}]}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"containers": {}}, "no container"),
        ({"containers": {"vllm": {"State": "exited", "ExitCode": 137}}}, "exited with code 137"),
        ({"daemon": "down"}, "does not answer"),
        ({"gpus": {"vllm": None}}, "unexpected answer"),
        ({"gpus": {"vllm": {}}}, "unexpected answer"),
        ({"gpus": {"vllm": damaged(name=1)}}, "unexpected answer"),
        ({"gpus": {"vllm": damaged(processes=[{"pid": "1", "memory_b": 1}])}}, "unexpected answer"),
    ],
)
def test_a_service_without_a_reading_is_unhealthy(
    fake: FakeDocker, started: ContainerManager, state: dict[str, Any], reason: str
) -> None:
    fake.change(**state)
    status = started.check_health("vllm")
    assert status.healthy is False
    assert reason in status.reason


def gpu(used_b: int, *processes: tuple[int, int | None], index: int = 0, total_b: int = 100) -> GpuState:
    return GpuState(index, f"GPU-{index}", "Test", total_b, used_b, tuple(GpuProcess(*item) for item in processes))


@pytest.mark.parametrize(
    ("state", "own", "healthy"),
    [
        (gpu(89), (), True),
        (gpu(90), (), False),
        (gpu(95, (1, 90)), (1,), True),
        (gpu(95, (1, 90)), (2,), False),
        (gpu(95, (1, 3), (2, 92)), (1,), False),
        (gpu(95, (1, None)), (1,), True),
        # Whose it is cannot be said while another computes there, too.
        (gpu(95, (1, None), (2, 1)), (1,), False),
        # The driver may count more for a process than it says is in use.
        (gpu(50, (1, 90)), (1,), True),
        (gpu(0, total_b=0), (), True),
    ],
)
def test_only_memory_of_others_counts(state: GpuState, own: tuple[int, ...], healthy: bool) -> None:
    assert judge("vllm", GpuReading((state,), "1"), own, 90.0).healthy is healthy


def test_the_fullest_of_several_gpus_decides() -> None:
    status = judge("vllm", GpuReading((gpu(10), gpu(95, (7, 90), index=1)), "1"), (), 90.0)
    assert not status.healthy
    assert "GPU 1" in status.reason
    assert "7" in status.reason
    assert (status.gpu_memory_used_gb, status.gpu_memory_total_gb) == (105e-9, 200e-9)
