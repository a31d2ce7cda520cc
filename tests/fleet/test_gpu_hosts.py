"""Hosts with a GPU, as far as the programs of NVIDIA that the roles call can be replaced by doubles."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.fleet.conftest import Fleet
from tests.fleet.hosts import Host, start_host

pytestmark = [pytest.mark.needs("fleet"), pytest.mark.timeout(1200), pytest.mark.long]

GPUS = {"lem_nvidia_wanted": True}
DRIVER = "#!/bin/sh\necho 570.86.15\n"
# As NVIDIA's documentation says: it adds a runtime to daemon.json and keeps what is there.
TOOLKIT = """\
#!/usr/bin/python3
import json, pathlib, sys
assert sys.argv[1:] == ["runtime", "configure", "--runtime=docker"], sys.argv
path = pathlib.Path("/etc/docker/daemon.json")
found = json.loads(path.read_text()) if path.exists() else {}
found.setdefault("runtimes", {})["nvidia"] = {"path": "/usr/bin/nvidia-container-runtime", "args": []}
path.write_text(json.dumps(found))
"""


@pytest.fixture
def bare(fleet: Fleet) -> Iterator[Host]:
    """A host with a driver, and nothing of lem."""
    host = start_host("gpu3", fleet.controller.key)
    try:
        write_program(host, "nvidia-smi", DRIVER)
        fleet.controller.know(host)
        yield host
    finally:
        host.remove()
        fleet.controller.know(fleet.gpu1, fleet.gpu2)


def write_program(host: Host, name: str, text: str) -> None:
    path = f"/usr/bin/{name}"
    host.run("sh", "-c", f"cat > {path} && chmod 755 {path}", stdin=text.encode())


@pytest.mark.parametrize("has_docker", [True, False])
def test_check_mode_on_a_bare_host_says_what_would_change_and_changes_nothing(
    fleet: Fleet, bare: Host, has_docker: bool
) -> None:
    write_program(bare, "nvidia-ctk", TOOLKIT)
    if not has_docker:
        bare.run("sh", "-c", "systemctl disable --now docker.socket docker.service; dpkg --purge docker.io")
    before = bare.lasting()
    more = {"lem_deploy_docker_access": True, "lem_deploy_rapl_access": True, "lem_deploy_doctor_backends": ["pytorch"]}
    ended = fleet.controller.must("site", "--check", "--diff", **GPUS, **more)
    assert ended.changed("gpu3") > 0
    assert bare.lasting() == before
    assert not bare.answers("id", "lem")


def test_a_runtime_for_gpus_is_added_once_and_docker_restarts(fleet: Fleet, bare: Host) -> None:
    options = {"lem_docker_daemon_options": {"log-driver": "local"}}
    refused = fleet.controller.play("provision", **GPUS)
    assert refused.code != 0
    assert "containers cannot use a GPU here; install the NVIDIA Container Toolkit" in " ".join(refused.text.split())
    write_program(bare, "nvidia-ctk", TOOLKIT)
    begun = bare.show("docker.service", "InvocationID")
    fleet.controller.must("provision", **GPUS, **options)
    assert set(json.loads(bare.read("/etc/docker/daemon.json"))) == {"log-driver", "runtimes"}
    assert "nvidia" in json.loads(bare.run("docker", "info", "--format", "{{json .Runtimes}}"))
    assert bare.show("docker.service", "InvocationID") != begun
    assert fleet.controller.must("provision", **GPUS, **options).changed("gpu3") == 0
    # With it, the host is fit for campaigns in containers with a GPU, and not without a driver that is new enough.
    fleet.controller.must("preflight", lem_preflight_gpu_runtime=True)
    old = fleet.controller.play("provision", **GPUS, lem_nvidia_driver_oldest="999.0")
    assert old.code != 0
    assert "NVIDIA driver 999.0 or newer is required, found 570.86.15" in " ".join(old.text.split())
