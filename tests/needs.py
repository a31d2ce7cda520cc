"""What tests need beyond Python and the packages of tests/requirements.txt, and whether this machine has it.

A test names what it needs with `@pytest.mark.needs("cuda")`; conftest.py skips it where that is missing and lists it
at the end of the run. With CI=true a missing mandatory need fails the whole run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

PROBE_TIMEOUT_S = 60
# The oldest ansible-core that is supported, in an environment of its own (make test-env).
OLDEST_ANSIBLE = Path(__file__).parents[1] / "build/ansible-2.18/bin/ansible-playbook"

# A test that runs others in another environment records them by this property: the environment, and their node ids.
RAN_ELSEWHERE = "ran_elsewhere"


@dataclass(frozen=True)
class Need:
    """Something a test cannot run without."""

    probe: Callable[[], str | None]  # what is missing and how to get it, in words; None when it is there
    is_mandatory: bool  # CI has it, so a run there that lacks it is a failure


class Late:
    """A module that is imported when it is used: every process collects all tests, and few run those with torch."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # pytest looks whether this is a test
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


def is_ci(environ: Mapping[str, str] = os.environ) -> bool:
    return environ.get("CI", "").lower() in {"1", "true"}


@functools.cache
def missing(name: str) -> str | None:
    """What is missing of the need `name`; None when it is there."""
    return NEEDS[name].probe()


def lacking(needs: Mapping[str, Need]) -> tuple[str, ...]:
    """A line for each mandatory need that is missing."""
    reasons = {name: need.probe() for name, need in needs.items() if need.is_mandatory}
    return tuple(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)


def _package(name: str) -> str | None:
    if importlib.util.find_spec(name) is not None:
        return None
    return f"the package {name} is not installed in this environment (make test installs it)"


def _cuda() -> str | None:
    # The device files say it without importing torch, which takes seconds.
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return "no NVIDIA GPU on this machine (run these tests on one that has it)"
    if (no_torch := _package("torch")) is not None:
        return no_torch
    import torch

    if torch.cuda.is_available():
        return None
    return f"PyTorch {torch.__version__} cannot use the GPU of this machine (pip install a build for its CUDA version)"


def _vllm() -> str | None:
    if importlib.util.find_spec("vllm") is not None:
        return None
    return (
        "vLLM is not installed in this environment; the lab has it (python3 -m tests.lab up, then "
        "make test PYTEST_ARGS=tests/integration/test_vllm_in_the_lab.py)"
    )


def _docker() -> str | None:
    if shutil.which("docker") is None:
        return "no docker command on this machine (python3 -m tests.lab up installs it on Debian 12)"
    for command, problem in (
        (["docker", "info"], "the Docker daemon does not answer (python3 -m tests.lab up starts one)"),
        (["docker", "compose", "version"], "Docker has no Compose plugin (python3 -m tests.lab up provides it)"),
    ):
        if subprocess.run(command, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False).returncode != 0:
            return problem
    return None


def _chromium() -> str | None:
    from tests.browser import find_chromium

    if find_chromium() is None:
        return "no Chromium on this machine (Debian: apt-get install chromium)"
    return _package("playwright")


def _program(name: str) -> str | None:
    return None if shutil.which(name) else f"no {name} on this machine (apt-get install {name})"


def language_server() -> Path | None:
    """yaml-language-server, on PATH or in build/npm."""
    local = Path(__file__).parents[1] / "build/npm/node_modules/.bin/yaml-language-server"
    found = shutil.which("yaml-language-server") or shutil.which(local)
    return Path(found) if found else None


def _language_server() -> str | None:
    if language_server() is not None:
        return None
    return "no yaml-language-server on this machine (npm install --prefix build/npm yaml-language-server@1.25.0)"


def _gcc() -> str | None:
    if shutil.which("gcc"):
        return None
    return "no gcc on this machine, which builds the NVML double (apt-get install gcc libc6-dev)"


def _slurm() -> str | None:
    if shutil.which("slurmctld", path=f"{os.environ.get('PATH', '')}:/usr/sbin") and os.geteuid() == 0:
        return None
    return "no Slurm on this machine, or not root (apt-get install slurmctld slurmd slurm-client)"


def _lab() -> str | None:
    from tests.lab.places import Places
    from tests.lab.state import lacking as lacking_of

    lines = lacking_of(Places.of())
    return f"the lab is not up (python3 -m tests.lab up): {'; '.join(lines)}" if lines else None


def _environments() -> str | None:
    from tests.lab.places import Places
    from tests.lab.state import lacking_environments

    lines = lacking_environments(Places.of())
    return f"the lab lacks environments (python3 -m tests.lab up): {'; '.join(lines)}" if lines else None


def _ansible(folder: Path) -> str | None:
    if (folder / "ansible-playbook").exists():
        return None
    return f"no ansible-core in {folder} (make test installs it on Python 3.11 and later)"


def _fleet() -> str | None:
    for program, package in (("ssh", "openssh-client"), ("ssh-keygen", "openssh-client")):
        if shutil.which(program) is None:
            return f"no {program} command on this machine (apt-get install {package})"
    return _ansible(Path(sys.executable).parent) or _lab()


def _checkout() -> str | None:
    command = ["git", "rev-parse", "--is-inside-work-tree"]
    if shutil.which("git") is None:
        return "no git command on this machine (apt-get install git)"
    folder = Path(__file__).parent
    answer = subprocess.run(command, cwd=folder, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False)
    return None if answer.returncode == 0 else "this copy of the project is not a git checkout (git clone makes one)"


def _other_pythons() -> str | None:
    from tests.pythons import find_pythons

    found = {python.version[:2] for python in find_pythons() if python.is_supported}
    return None if len(found) > 1 else "only one CPython from 3.10 on is on PATH (install another, with pyenv say)"


def _old_python() -> str | None:
    from tests.pythons import find_pythons

    is_there = any(not python.is_supported for python in find_pythons())
    return None if is_there else "no CPython before 3.10 is on PATH (install one, with pyenv say)"


NEEDS: Mapping[str, Need] = MappingProxyType(
    {
        "torch": Need(partial(_package, "torch"), is_mandatory=True),
        "transformers": Need(partial(_package, "transformers"), is_mandatory=True),
        "datasets": Need(partial(_package, "datasets"), is_mandatory=True),
        "coverage": Need(partial(_package, "coverage"), is_mandatory=True),
        "checkout": Need(_checkout, is_mandatory=True),
        "other_pythons": Need(_other_pythons, is_mandatory=False),
        "old_python": Need(_old_python, is_mandatory=False),
        # `make test` runs in an environment without it; there the lab's Python runs what needs it.
        "vllm": Need(_vllm, is_mandatory=False),
        "cuda": Need(_cuda, is_mandatory=False),
        "docker": Need(_docker, is_mandatory=False),
        "chromium": Need(_chromium, is_mandatory=True),
        "gcc": Need(_gcc, is_mandatory=True),
        "slurm": Need(_slurm, is_mandatory=True),
        "podman": Need(partial(_program, "podman"), is_mandatory=False),
        "zsh": Need(partial(_program, "zsh"), is_mandatory=False),
        "fish": Need(partial(_program, "fish"), is_mandatory=False),
        "yaml-language-server": Need(_language_server, is_mandatory=False),
        "lab": Need(_lab, is_mandatory=True),
        # Its engines and models, without Docker.
        "environments": Need(_environments, is_mandatory=True),
        "ansible": Need(partial(_ansible, Path(sys.executable).parent), is_mandatory=True),
        "oldest_ansible": Need(partial(_ansible, OLDEST_ANSIBLE.parent), is_mandatory=True),
        # Hosts that are containers of the lab, and Ansible to reach them.
        "fleet": Need(_fleet, is_mandatory=True),
    }
)
