"""Hosts that all tests of the fleet share, bare when the first of them begins."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.container_rig import docker
from tests.fleet.controller import Controller, Ended
from tests.fleet.hosts import NETWORK, Host, host_image, start_host
from tests.needs import missing

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fleet:
    """A controller, two hosts, and what was on them when they were bare."""

    controller: Controller
    gpu1: Host
    gpu2: Host
    bare_files: dict[str, dict[str, str]]


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    reason = missing("fleet")
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("fleet")
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    pyz = folder / "lem.pyz"
    builder = [sys.executable, str(ROOT / "lem.pyz-build" / "build.py"), "--output", str(pyz)]
    subprocess.run(builder, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    docker("network", "create", NETWORK)
    starting: list[Future[Host]] = []
    try:
        host_image()
        with ThreadPoolExecutor() as pool:
            starting += [pool.submit(start_host, name, key) for name in ("gpu1", "gpu2")]
        gpu1, gpu2 = (it.result() for it in starting)
        controller = Controller(folder, key, pyz)
        controller.know(gpu1, gpu2)
        yield Fleet(controller, gpu1, gpu2, {host.name: host.files() for host in (gpu1, gpu2)})
    finally:
        for it in starting:
            if it.exception() is None:
                it.result().remove()
        docker("network", "rm", NETWORK)


@pytest.fixture(scope="session")
def site(fleet: Fleet) -> Ended:
    """How the playbook that installs everything on both hosts has ended."""
    return fleet.controller.must("site")


@pytest.fixture(scope="session")
def provisioned(fleet: Fleet, site: Ended) -> Fleet:
    """Hosts on which everything is installed, also if the test of that was left out."""
    return fleet
