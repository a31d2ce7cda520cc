"""Outputs of Compose 2.17 to 5, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lem.orchestration.container import ContainerError, ContainerManager
from lem.orchestration.services import ContainerState, decode_states, describe
from tests.doubles.fake_docker import FakeDocker

PS_2_17 = (
    '[{"ID":"3e1","Name":"p-vllm-1","Command":"sleep infinity","Project":"p","Service":"vllm","State":"running",'
    '"Health":"","ExitCode":0,"Publishers":null},{"ID":"9c0","Name":"p-pytorch-1","Command":"sleep infinity",'
    '"Project":"p","Service":"pytorch","State":"exited","Health":"","ExitCode":137,"Publishers":null}]\n'
)
PS_2_26 = (
    '{"Command":"\\"sleep infinity\\"","CreatedAt":"2026-11-20 08:28:22 +0000 UTC","ExitCode":0,"Health":"","ID":"3e1",'
    '"Image":"img","Labels":"com.docker.compose.oneoff=False","LocalVolumes":"0","Mounts":"/tmp","Name":"p-vllm-1",'
    '"Names":"p-vllm-1","Networks":"p_default","Ports":"","Project":"p","Publishers":null,"RunningFor":"1 second ago",'
    '"Service":"vllm","Size":"0B","State":"running","Status":"Up 1 second"}\n'
    '{"ExitCode":137,"Health":"","ID":"9c0","Name":"p-pytorch-1","Service":"pytorch","State":"exited"}\n'
)


@pytest.mark.parametrize("printed", [PS_2_17, PS_2_26, PS_2_26.replace("\n", "\r\n")])
def test_ps_is_understood_as_an_array_and_as_lines(printed: str) -> None:
    one, two = decode_states(printed)
    assert one == ContainerState("vllm", "running", "3e1")
    assert (two.service, describe(two)) == ("pytorch", "its container exited with code 137")


@pytest.mark.parametrize("printed", ["", "\n", "[]\n", "null\n"])
def test_ps_of_an_empty_project_is_empty(printed: str) -> None:
    assert decode_states(printed) == ()


@pytest.mark.parametrize(
    "printed",
    [
        "NAME  STATE\n",
        '{"State": "running"}',
        '[{"Service": 1, "State": 2',
        "7",
        '["a"]',
        "[[1]]",
        '{"Service": "a", "State": "exited", "ExitCode": [1]}',
        '{"Service": "a", "State": "exited", "ExitCode": "x"}',
    ],
)
def test_ps_that_prints_something_else_is_refused(printed: str) -> None:
    with pytest.raises(ContainerError):
        decode_states(printed)


@pytest.fixture
def fake(tmp_path: Path) -> FakeDocker:
    (tmp_path / "docker-compose.yml").write_text("services: {}\n")
    return FakeDocker.install(tmp_path / "docker")


def manager(fake: FakeDocker) -> ContainerManager:
    folder = fake.folder.parent
    return ContainerManager(project_dir=folder, environ=fake.environ(LEM_CACHE_DIR=str(folder / "cache")))


@pytest.mark.parametrize("compose", ["2.17.3", "v2.20.2", "2.26.1-4", "5.0.1"])
def test_every_version_is_driven_alike(fake: FakeDocker, compose: str) -> None:
    fake.change(compose=compose)
    found = manager(fake)
    found.start_services(["vllm"])
    assert found.is_service_running("vllm")
    assert not found.is_service_running("pytorch")


@pytest.mark.parametrize(
    "services",
    [
        None,
        "text",
        {"vllm": None},
        {"vllm": {"image": 7}},
        {"vllm": {"devices": 1}},
        {"vllm": {"deploy": {"resources": {"reservations": [1]}}}},
        {"vllm": {"deploy": {"resources": {"reservations": {"devices": [{"capabilities": 1}]}}}}},
    ],
)
def test_a_project_that_is_described_otherwise_is_refused(fake: FakeDocker, services: Any) -> None:
    fake.change(services=services)
    with pytest.raises(ContainerError, match="printed no project"):
        manager(fake).start_services(["vllm"])
