"""The manager of containers on a real engine: its contract, with the trivial engine inside."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lem.orchestration.container import ContainerManager
from lem.orchestration.dispatch import Worker
from tests.campaign_rig import Running
from tests.container_rig import ContainerRig, docker
from tests.processes import wait_for

pytestmark = [pytest.mark.needs("lab"), pytest.mark.timeout(300)]

EXPERIMENT = """\
model: none
gpus: []
max_output_tokens: 4
warmup: {enabled: false}
measurement: {min_window_sec: 0.01, max_wait_pct: null, max_foreign_pct: null}
prompts: {type: synthetic, input_tokens: 3, sample_size: 2}
"""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ContainerRig]:
    with ContainerRig(tmp_path).cleaned() as rig:
        rig.write(EXPERIMENT, "e.yaml")
        yield rig


@pytest.fixture
def manager(rig: ContainerRig) -> Iterator[ContainerManager]:
    with ContainerManager(project_dir=rig.folder, environ=rig.environ()) as manager:
        manager.start_services(["pytorch"])
        yield manager


def test_only_the_service_that_is_needed_runs_until_the_context_ends(rig: ContainerRig) -> None:
    with ContainerManager(project_dir=rig.folder, environ=rig.environ()) as manager:
        manager.start_services(["pytorch"])
        assert manager.is_service_running("pytorch")
        assert not manager.is_service_running("vllm")
        assert list(rig.containers()) == ["pytorch"]
        assert manager.check_health("pytorch").healthy
    assert rig.containers(is_all=True) == {}


def test_an_experiment_runs_inside_with_its_result_and_exit_code_here(
    rig: ContainerRig, manager: ContainerManager
) -> None:
    output, code = manager.execute_experiment("pytorch", "e.yaml", ["--cycles", "2"], {"HF_TOKEN": "hf_planted"})
    assert code == 0, output
    assert len(rig.results()) == 2
    assert "hf_planted" not in output
    rig.assert_nothing_inside(0)
    assert manager.execute_experiment("pytorch", "nope.yaml")[1] == 2
    rules = '{"rules": [{"at": "load", "do": "fail", "text": "as scripted", "permanent": true}]}'
    output, code = manager.execute_experiment("pytorch", "e.yaml", env_vars={"LEMTEST_ENGINE_SCRIPT": rules})
    assert (code, "as scripted" in output) == (1, True)
    output, code = manager.execute_experiment("vllm", "e.yaml")
    assert (code, "not running" in output) == (1, True)


def test_an_experiment_ends_with_the_one_who_started_it(rig: ContainerRig) -> None:
    program = (
        "import json, sys\n"
        "from lem.orchestration.container import ContainerManager\n"
        "manager = ContainerManager()\n"
        "manager.start_services(['pytorch'])\n"
        "script = {'rules': [{'at': 'load', 'do': 'ignore_term'}, {'at': 'load', 'do': 'hold_gil'}]}\n"
        "variables = {'LEMTEST_ENGINE_SCRIPT': json.dumps(script)}\n"
        "manager.execute_experiment('pytorch', 'e.yaml', env_vars=variables)\n"
    )
    host = Running([sys.executable, "-c", program], rig.folder, rig.environ())
    wait_for(lambda: any("--engine" in item for item in rig.workers_inside()) or None)
    host.send(signal.SIGKILL)
    host.wait()
    # TERM, a while, KILL: the command inside is given its time.
    rig.assert_nothing_inside(30.0)


def test_a_restarted_service_is_the_same_container_and_a_broken_one_is_not(
    rig: ContainerRig, manager: ContainerManager
) -> None:
    first = rig.containers()["pytorch"]
    assert manager.restart_service("pytorch")
    assert rig.containers()["pytorch"] == first
    docker("rm", "--force", first)
    assert not manager.is_service_running("pytorch")
    assert manager.check_and_recover("pytorch").healthy
    assert rig.containers()["pytorch"] != first


def test_a_worker_is_opened_and_nothing_of_it_stays(rig: ContainerRig, manager: ContainerManager) -> None:
    worker = manager.worker_in("pytorch", Worker)
    worker.open()
    assert worker.environment["torch"] == "1.0"
    assert len(rig.workers_inside()) == 1
    worker.stop()
    rig.assert_nothing_inside(0)
    worker.open()
    worker.kill()
    rig.assert_nothing_inside(0)


def test_a_lem_that_was_built_anew_replaces_the_container(rig: ContainerRig, manager: ContainerManager) -> None:
    before = rig.containers()["pytorch"]
    manager.start_services(["pytorch"])
    assert rig.containers()["pytorch"] == before, "nothing has changed"
    environ = {**rig.environ(), "LEM_CACHE_DIR": str(rig.folder / "another")}
    ContainerManager(project_dir=rig.folder, environ=environ).start_services(["pytorch"])
    assert rig.containers()["pytorch"] != before
