"""When containers are looked at, and how what is seen there is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import InfrastructureError, UserError
from lem.config.campaign_config import CampaignHealthCheckConfig
from lem.meters.nvml import GpuProcess, GpuReading, GpuState
from lem.orchestration.container import gpu_loss, judge
from lem.orchestration.schedule import Stopped
from tests.campaign_doubles import Place, make_campaign


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("structure", "health", "looks"),
    [
        ("interleaved", {}, 3),
        ("shuffled", {}, 3),
        ("grouped", {}, 2),
        ("interleaved", {"interval_experiments": 1}, 6),
        ("interleaved", {"interval_experiments": 3}, 4),
        ("interleaved", {"enabled": False, "interval_experiments": 1}, 0),
    ],
)
def test_containers_are_looked_at_once_a_cycle_or_block_and_every_so_many_experiments(
    place: Place, structure: str, health: dict[str, Any], looks: int
) -> None:
    check = CampaignHealthCheckConfig(**health)
    campaign = make_campaign(place.folder, execution={"cycles": 3, "structure": structure}, health_check=check)
    place.runner(campaign).run()
    assert place.executor.looked_after == looks


def test_what_the_workers_ran_in_is_taken_down_once_at_the_end(place: Place) -> None:
    place.runner(make_campaign(place.folder)).run()
    assert (place.executor.ended, place.executor.closed) == (1, 1)


def test_what_the_workers_ran_in_is_taken_down_after_an_error_too(place: Place) -> None:
    runner = place.runner(make_campaign(place.folder), environment={"torch": None})
    with pytest.raises(UserError):
        runner.run()
    assert (place.executor.killed, place.executor.closed) == (1, 1)


@pytest.mark.parametrize("error", [InfrastructureError("lost"), UserError("lost")])
def test_what_cannot_be_made_well_stops_the_campaign_with_the_rest_pending(place: Place, error: Exception) -> None:
    runner = place.runner(make_campaign(place.folder))
    place.executor.look_error = error
    outcome = runner.run()
    assert outcome.stopped is Stopped.INFRASTRUCTURE
    assert outcome.error is not None
    assert outcome.error.message == "lost"
    assert outcome.manifest.pending_count == 4


# How it is judged


def gpu(used_b: int, *processes: tuple[int, int | None], index: int = 0) -> GpuState:
    return GpuState(index, f"GPU-{index}", "Test", 100, used_b, tuple(GpuProcess(*item) for item in processes))


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


def test_a_gpu_without_memory_of_its_own_is_judged_by_being_there() -> None:
    assert judge("vllm", GpuReading((GpuState(0, "GPU-0", "Test", 0, 0, ()),), "1"), (), 90.0).healthy


@pytest.mark.parametrize(
    ("reading", "is_lost", "is_explained"),
    [
        (GpuReading((gpu(1),), "1"), False, False),
        (GpuReading((), "1"), True, False),
        (GpuReading((), None, "Unknown Error"), True, True),
        (GpuReading((gpu(1),), "1", "Unknown Error"), True, True),
        (GpuReading((), None, "NVML Shared Library Not Found"), True, False),
        (GpuReading((), None, "GPU is lost"), True, False),
        (GpuReading((), None, "Something New"), True, False),
    ],
)
def test_a_gpu_is_lost_when_it_cannot_be_read(reading: GpuReading, is_lost: bool, is_explained: bool) -> None:
    lost = gpu_loss(reading)
    assert (lost is not None) is is_lost
    assert ("daemon-reload" in str(lost)) is is_explained
