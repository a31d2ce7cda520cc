"""Health of real containers, told by NVML inside them: who holds memory, which GPU is lost, and what mends that."""

from __future__ import annotations

import os

import pytest

from lem.orchestration.dispatch import Worker
from tests.doubles.nvml.library import NvmlDouble
from tests.weather.rig import LOCAL_NVML, SERVICE, WeatherRig

pytestmark = [pytest.mark.needs("lab", "gcc"), pytest.mark.timeout(300)]

GB = 1_000_000_000


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    with WeatherRig(tmp_path_factory.mktemp("health")).cleaned() as rig:
        rig.give_gpu(*NvmlDouble.gpu())
        yield rig


@pytest.fixture(scope="module")
def running(rig):
    """The containers of a manager, with the GPU of the double."""
    manager = rig.manager()
    with manager:
        manager.start_services([SERVICE])
        yield manager
    assert rig.containers() == []


@pytest.fixture
def manager(rig, running):
    rig.nvml.say(*NvmlDouble.gpu(used_b=2 * GB))
    return running


def _inside(rig, line):
    """Have NVML say one more line, in this container alone."""
    rig.docker("exec", rig.container(), "sh", "-c", f"echo {line} > {LOCAL_NVML}")


def test_a_container_whose_gpu_has_room_is_healthy(manager):
    status = manager.check_health(SERVICE)
    assert (status.healthy, status.gpu_memory_used_gb, status.gpu_memory_total_gb) == (True, 2.0, 80.0)
    assert manager.check_and_recover(SERVICE).healthy
    assert manager.restarts == {}


def test_memory_of_others_is_held_against_the_threshold(rig, manager):
    rig.nvml.say(*NvmlDouble.gpu(used_b=74 * GB, processes=[(1, 70 * GB)]))
    for threshold_pct, healthy in ((90.0, False), (95.0, True)):
        status = manager.check_health(SERVICE, threshold_pct)
        assert status.healthy is healthy
        assert "92 % of the memory of GPU 0" in status.reason
        assert ("processes 1" in status.reason) is not healthy


def test_memory_of_a_worker_of_our_own_does_not_count(rig, manager):
    worker = manager.worker_in(SERVICE, Worker)
    try:
        worker.open()
        pid = rig.pids_inside()[0]
        rig.nvml.say(*NvmlDouble.gpu(used_b=79 * GB, processes=[(pid, 78 * GB)]))
        status = manager.check_health(SERVICE)
        assert (status.healthy, status.gpu_memory_used_gb) == (True, 79.0)
        rig.nvml.say(*NvmlDouble.gpu(used_b=79 * GB, processes=[(pid, 3 * GB), (os.getpid(), 75 * GB)]))
        status = manager.check_health(SERVICE)
        assert status.healthy is False
        assert f"processes {os.getpid()}" in status.reason
        assert str(pid) not in status.reason.partition("processes")[2].split()
    finally:
        worker.stop()
    assert rig.workers_left() == ()
    rig.nvml.say(*NvmlDouble.gpu(used_b=79 * GB))
    assert manager.check_health(SERVICE).healthy is False


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("lost 0 999", "the GPU is lost: NVML says Unknown Error in the container"),
        ("lost 0", "the GPU is lost: NVML says GPU is lost in the container"),
        ("fail nvmlInit 999", "the GPU is lost: NVML says Unknown Error in the container"),
        ("fail nvmlDeviceGetMemoryInfo 999", "the GPU is lost: NVML says Unknown Error in the container"),
        ("count 0", "the GPU is lost: NVML sees none in the container"),
    ],
)
def test_a_gpu_that_is_lost_in_a_running_container_is_recognised(rig, manager, line, text):
    rig.nvml.say(*NvmlDouble.gpu(), line)
    status = manager.check_health(SERVICE)
    assert (status.healthy, status.gpu_memory_used_gb) == (False, None)
    assert text in status.reason


def test_a_container_that_a_restart_does_not_help_is_replaced_and_healthy_again(rig, manager):
    before = rig.container()
    _inside(rig, "lost 0 999")
    assert manager.check_health(SERVICE).healthy is False
    restarts = manager.restarts.get(SERVICE, 0)
    assert manager.check_and_recover(SERVICE).healthy
    assert rig.container() != before
    assert manager.restarts[SERVICE] == restarts + 1
    assert manager.check_health(SERVICE).healthy


def test_a_container_that_is_paused_or_killed_is_unhealthy_and_recovers(rig, manager):
    for word, text in (("pause", "paused"), ("kill", "exited with code 137")):
        rig.docker(word, rig.container())
        status = manager.check_health(SERVICE)
        assert status.healthy is False
        assert text in status.reason
        assert manager.check_and_recover(SERVICE, max_restarts=99).healthy
        assert manager.check_health(SERVICE).healthy


def test_without_a_gpu_reserved_it_is_healthy_when_it_answers_whatever_nvml_says(tmp_path):
    with WeatherRig(tmp_path).cleaned() as rig, rig.manager() as manager:
        rig.nvml.say("fail nvmlInit 999")
        manager.start_services([SERVICE])
        status = manager.check_health(SERVICE)
        assert (status.healthy, status.gpu_memory_used_gb) == (True, None)
        assert "no GPU" in status.reason
