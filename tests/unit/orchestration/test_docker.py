"""What the docker command prints, from Docker 20.10 and Compose 2.17 on, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lem.orchestration.docker import (
    Compose,
    ContainerError,
    ContainerState,
    Docker,
    decode_states,
    describe,
    parse_version,
)
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


OTHER_FORMS = PS_2_26.replace("137", '"137"').replace('"running"', '"Running"')


@pytest.mark.parametrize("printed", [PS_2_17, PS_2_26, PS_2_26.replace("\n", "\r\n"), OTHER_FORMS])
def test_ps_prints_an_array_or_lines(printed: str) -> None:
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
        '{"Service": "a", "State": "exited", "ExitCode": "x"}',
    ],
)
def test_other_output_of_ps_is_refused(printed: str) -> None:
    with pytest.raises(ContainerError):
        decode_states(printed)


@pytest.mark.parametrize(
    ("service", "has_gpu"),
    [
        ({"image": "img"}, False),
        ({"deploy": {"resources": {"reservations": {"devices": [{"capabilities": ["gpu"]}]}}}}, True),
        ({"deploy": {"resources": {"reservations": {"devices": [{"driver": "cdi"}]}}}}, True),
        ({"deploy": {"resources": {"reservations": {"devices": [{"driver": "tpu"}]}}}}, False),
        ({"devices": ["/dev/nvidia0:/dev/nvidia0"]}, True),
        ({"devices": [{"source": "nvidia.com/gpu=0"}, {"source": "/dev/null"}]}, True),
        ({"runtime": "nvidia"}, True),
        ({"gpus": "all"}, True),
    ],
)
def test_a_gpu_is_reserved_in_any_of_composes_ways(fake: FakeDocker, service: dict[str, Any], has_gpu: bool) -> None:
    fake.change(services={"vllm": service})
    assert Compose(fake.environ(), "p", ()).services["vllm"].has_gpu is has_gpu


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
def test_other_output_of_config_is_refused(fake: FakeDocker, services: Any) -> None:
    fake.change(services=services)
    with pytest.raises(ContainerError, match="printed no project"):
        _ = Compose(fake.environ(), "p", ()).services


@pytest.mark.parametrize(
    ("container", "at_s", "state", "expected"),
    [
        ("mine", 150.0, {}, True),
        ("mine", 99.0, {}, False),
        ("mine", 201.0, {}, False),
        ("another", 150.0, {}, False),
        ("mine", 150.0, {"daemon": "down"}, False),
    ],
)
def test_out_of_memory_is_what_the_engine_reports_of_that_time(
    tmp_path: Path, container: str, at_s: float, state: dict[str, str], expected: bool
) -> None:
    fake = FakeDocker.install(tmp_path / "docker", out_of_memory=[(container, at_s)], **state)
    assert Docker(fake.environ()).was_out_of_memory("mine", 100.0, 200.0) is expected


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("2.17.0\n", (2, 17, 0)),
        ("v2.17.2-desktop.1", (2, 17, 2)),
        ("2.26.1-4\n", (2, 26, 1)),
        ("Docker Compose version v2.39.4", (2, 39, 4)),
        ("dev", None),
    ],
)
def test_versions_have_several_forms(text: str, version: tuple[int, ...] | None) -> None:
    assert parse_version(text) == version
