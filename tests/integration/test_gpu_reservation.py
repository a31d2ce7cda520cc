"""A GPU reserved by its UUID, on an engine that takes itself to have NVIDIA's runtime: what a container is given."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container_rig import ContainerRig, container_campaign
from tests.doubles.nvml.library import NvmlDouble, build_library
from tests.lab.image import RECIPE
from tests.lab.places import BASE_IMAGE, Places
from tests.processes import wait_for

pytestmark = [pytest.mark.needs("lab", "gcc"), pytest.mark.timeout(300)]

# As the double makes them up.
FIRST, SECOND = (f"GPU-00000000-0000-4000-8000-{index:012d}" for index in (0, 1))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an engine of its own; with this hook on its PATH Docker before 28 believes in the runtime."""
    hook = tmp_path_factory.mktemp("bin") / "nvidia-container-runtime-hook"
    hook.write_text("#!/bin/sh\nexec cat > /dev/null\n")
    hook.chmod(0o755)
    folder = Path(tempfile.mkdtemp(prefix="lem-"))  # the path of a socket has to be short
    address = f"unix://{folder}/socket"
    places = {"--data-root": "data", "--exec-root": "run", "--pidfile": "pid"}
    command = ["dockerd", "--host", address, "--bridge=none", "--iptables=false"]
    command += [word for option, name in places.items() for word in (option, str(folder / name))]
    environ = {**os.environ, "PATH": f"{hook.parent}:{os.environ['PATH']}"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(address, process) or None)
        image = ["import", str(Places.of().tarball(RECIPE)), BASE_IMAGE]
        subprocess.run(["docker", "--host", address, *image], capture_output=True, check=True)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def answers(address: str, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the engine has ended"
    found = subprocess.run(["docker", "--host", address, "info"], capture_output=True, check=False)
    return found.returncode == 0


@pytest.mark.parametrize(("named", "reserved"), [("1", SECOND), (FIRST, FIRST)])
def test_the_gpu_that_an_experiment_names_is_the_one_that_its_container_has(
    tmp_path: Path, engine: str, named: str, reserved: str
) -> None:
    double = NvmlDouble(tmp_path / "nvml")
    double.say("count 2")
    text = container_campaign(outputs=(4,))
    text = text.replace("  shared:\n", f"  shared:\n    gpus: [['{named}']]\n    measurement.energy: [none]\n")
    with ContainerRig(tmp_path, text).cleaned() as rig:
        show_nvml(rig, double)
        seen = rig.folder / "results" / "seen"
        # The engine gives it to what the container starts with, by which the runtime's hook makes devices visible.
        command = f"tr '\\0' '\\n' < /proc/1/environ | sed -n s/^NVIDIA_VISIBLE_DEVICES=//p > '{seen}'"
        rules = [{"at": "load", "do": "shell", "command": command}]
        ended = rig.run("--yes", rules=rules, DOCKER_HOST=engine, **double.variables())
        assert ended.code == 0, ended.err
        assert seen.read_text().split() == [reserved]


def show_nvml(rig: ContainerRig, double: NvmlDouble) -> None:
    """Have the double be NVML in the containers too."""
    path = rig.folder / "docker-compose.yml"
    document = json.loads(path.read_text(encoding="utf-8"))
    for service in document["services"].values():
        service["environment"] |= double.variables()
        for folder in (build_library(), double.script.parent):
            service["volumes"].append({"type": "bind", "source": str(folder), "target": str(folder), "read_only": True})
    rig.write(json.dumps(document), path.name)
