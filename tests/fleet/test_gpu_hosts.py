"""Hosts with a GPU, as far as the programs of NVIDIA that the roles call can be replaced by doubles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.doubles.nvml.library import LIBRARY_NAME, SCRIPT_VARIABLE, build_library
from tests.doubles.nvml.traces import Counter, GpuTrace, Load, Trace
from tests.fleet.conftest import Fleet
from tests.fleet.controller import HOLD, environment, held, trivial, unit
from tests.fleet.hosts import Host, start_host, wait_for

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


UUID = "GPU-11111111-2222-3333-4444-555555555555"
NVML = "/var/lib/lem-nvml"
STATE = "/var/lib/lem/nvml"  # what a unit may write
CAP_SYS_ADMIN = 21


@pytest.mark.needs("gcc")
def test_the_unit_may_set_a_gpu_and_restores_it_when_all_its_processes_are_killed(provisioned: Fleet) -> None:
    host, controller = provisioned.gpu1, provisioned.controller
    host.run("mkdir", "--parents", "--mode=0777", NVML, STATE)
    library = (build_library() / LIBRARY_NAME).read_bytes()
    host.run("sh", "-c", f"cat > {NVML}/{LIBRARY_NAME}", stdin=library)
    gpu = ("power_limit 650", "limit_range 100 700", "clock_range 210 1980", f"settings {STATE}/settings")
    load = Load(f"{STATE}/load", 80.0, 200.0)
    script = Trace(1, (GpuTrace(UUID, load=load, counter=Counter(period_s=0.02), more=gpu),)).lines()
    host.run("sh", "-c", f"cat > {NVML}/script", stdin="".join(f"{line}\n" for line in script).encode())
    host.run("sh", "-c", f"touch {STATE}/settings {STATE}/load {HOLD}; chmod 666 {STATE}/settings {STATE}/load")
    rule = held({"max_output_tokens": 8})
    variables = {**environment(rule), "LD_LIBRARY_PATH": NVML, SCRIPT_VARIABLE: f"{NVML}/script"}
    variables["LEMTEST_ENGINE_SCRIPT"] = json.dumps(
        {"gpus": [UUID], "load_log": f"{STATE}/load", "token_s": 0.01, "rules": [rule]}
    )
    axes: dict[str, Any] = {"gpus": [["0"]], "gpu.power_limit_w": [250], "measurement.energy": ["none"]}
    axes["measurement.max_foreign_pct"] = [None]
    path = controller.write_campaign("limit", outputs=[8], cycles=1, **axes)

    def done() -> list[str]:
        lines = host.read(f"{STATE}/settings").splitlines()
        return [" ".join(line.split()[4:]) for line in lines if " did " in line]

    given = trivial(rule, lem_campaign_file=path, lem_campaign_environment=variables, lem_campaign_gpu_settings=True)
    controller.know(host)
    try:
        with controller.start("run_campaign", **given) as playing:

            def is_set() -> bool:
                assert playing.process.poll() is None, host.run("journalctl", "--unit", unit("limit"), "--output=cat")
                return done()[-1:] == ["power 250000"]

            wait_for("the limit is set", is_set)
            (pid,) = host.run("pgrep", "--full", "--", "--hold").split()
            status = dict(line.split(":", 1) for line in host.read(f"/proc/{pid}/status").splitlines())
            assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 1 << CAP_SYS_ADMIN
            assert int(status["Uid"].split()[0]) != 0
            host.run("systemctl", "kill", "--signal=KILL", unit("limit"))
            wait_for("it is restored", lambda: done()[-1:] == ["power 650000"])
            ended = playing.wait()
        assert ended.code != 0
        assert ".settings" not in host.run("ls", "/run/lock/lem")
        assert "power limit 650 W" in host.run("journalctl", "--unit", unit("limit"), "--output=cat")
        host.run("rm", HOLD)
        controller.must("run_campaign", **given)
        assert len(host.results("limit")) == 1
        assert done()[-2:] == ["power 250000", "power 650000"]
    finally:
        host.run("rm", "-rf", HOLD, NVML, STATE)
        controller.know(provisioned.gpu1, provisioned.gpu2)
