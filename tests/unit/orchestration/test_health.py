"""When the health of containers is checked."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import InfrastructureError, UserError
from lem.config.campaign_config import CampaignHealthCheckConfig
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


@pytest.mark.parametrize("fails", [False, True])
def test_what_the_workers_ran_in_is_taken_down_once_at_the_end(place: Place, fails: bool) -> None:
    campaign = make_campaign(place.folder)
    runner = place.runner(campaign, environment={"torch": None}) if fails else place.runner(campaign)
    with pytest.raises(UserError) if fails else contextlib.nullcontext():
        runner.run()
    assert (place.executor.ended, place.executor.killed, place.executor.closed) == (not fails, fails, 1)


@pytest.mark.parametrize("error", [InfrastructureError("lost"), UserError("lost")])
def test_what_cannot_be_made_well_stops_the_campaign_with_the_rest_pending(place: Place, error: Exception) -> None:
    runner = place.runner(make_campaign(place.folder))
    place.executor.look_error = error
    outcome = runner.run()
    assert outcome.stopped is Stopped.INFRASTRUCTURE
    assert outcome.error is not None
    assert outcome.error.message == "lost"
    assert outcome.manifest.pending_count == 4
