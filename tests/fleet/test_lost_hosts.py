"""Hosts that are lost while a playbook waits for their campaign, and come back or do not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.conftest import Fleet
from tests.fleet.controller import HOLD, Playing, held, trivial
from tests.fleet.hosts import Host, wait_for

pytestmark = [pytest.mark.needs("fleet"), pytest.mark.timeout(1200), pytest.mark.long]


@pytest.fixture
def second(fleet: Fleet) -> Iterator[Host]:
    """The second host, whose campaigns stop in the middle until the hold is lifted."""
    fleet.controller.know(fleet.gpu1, fleet.gpu2)
    fleet.gpu2.run("touch", HOLD)
    yield fleet.gpu2
    fleet.gpu2.run("rm", "-f", HOLD)


def campaign(fleet: Fleet, name: str) -> dict[str, Any]:
    """The variables of a campaign that both hosts run; after half of it, the held one waits."""
    path = fleet.controller.write_campaign(name)
    return trivial(held({"max_output_tokens": 8}), lem_campaign_file=path, lem_fleet_mode="replicate")


def wait_until_polled(playing: Playing, host: Host, name: str) -> None:
    def is_polled() -> bool:
        assert playing.process.poll() is None, playing.text()[-4000:]
        return "TASK [Poll the campaign]" in playing.text() or "lem_campaign : Poll the campaign" in playing.text()

    wait_for("the playbook polls", is_polled)
    wait_for("the host is in the middle", lambda: "running" in host.entries(name, host.name).values())
    wait_for("the host has a result", lambda: len(host.results(name)) == 1)


def hosts_of(merged: dict[str, bytes]) -> list[str]:
    return sorted(Path(path).parts[-3].split("+")[1] for path in merged)


def test_a_host_that_freezes_is_waited_for_and_continues(fleet: Fleet, second: Host) -> None:
    """Its kernel answers, but none of its processes: no connection ends by itself."""
    given = campaign(fleet, "frozen")
    with fleet.controller.start("run_campaign", **given) as playing:
        wait_until_polled(playing, second, "frozen")
        second.freeze()
        try:
            wait_for("the host is lost", lambda: "[gpu2]: UNREACHABLE!" in playing.text())
        finally:
            second.thaw()
        second.run("rm", HOLD)
        ended = playing.wait()
    assert ended.code == 0, ended.text[-6000:]
    assert hosts_of(fleet.controller.merged("frozen")) == ["gpu1"] * 4 + ["gpu2"] * 4


def test_a_host_that_dies_is_named_and_continues_at_the_next_call(fleet: Fleet, second: Host) -> None:
    given = campaign(fleet, "dying")
    with fleet.controller.start("run_campaign", **given, lem_campaign_lost_seconds=5) as playing:
        wait_until_polled(playing, second, "dying")
        kept = second.results("dying")
        second.kill()
        try:
            ended = playing.wait()
        finally:
            second.start()
    assert ended.code != 0
    assert "gpu2: unreachable" in ended.text
    assert "results are missing" in ended.text
    assert hosts_of(fleet.controller.merged("dying")) == ["gpu1"] * 4
    # A host that started again does not continue by itself.
    assert second.show("lem-campaign@dying.service", "ActiveState") == "inactive"

    fleet.controller.know(fleet.gpu1, second)  # its port is another one
    second.run("rm", HOLD)
    before = fleet.gpu1.results("dying")
    fleet.controller.must("run_campaign", **given)
    assert fleet.gpu1.results("dying") == before
    assert kept.items() <= second.results("dying").items()
    assert hosts_of(fleet.controller.merged("dying")) == ["gpu1"] * 4 + ["gpu2"] * 4


def test_a_host_that_is_frozen_from_the_beginning_costs_only_itself(fleet: Fleet, second: Host) -> None:
    second.freeze()
    try:
        ended = fleet.controller.play("deploy")
    finally:
        second.thaw()
    assert ended.code != 0
    assert "did not answer: gpu2." in " ".join(ended.text.split())
    assert (ended.counts("gpu1")["failed"], ended.counts("gpu1")["unreachable"]) == (0, 0)


def test_results_that_were_altered_on_a_host_are_refused_and_named(fleet: Fleet, second: Host) -> None:
    """What arrived before stays, and the other host's results arrive."""
    second.run("rm", HOLD)
    given = campaign(fleet, "altered")
    fleet.controller.must("run_campaign", **given)
    before = fleet.controller.merged("altered")
    path = next(iter(second.results("altered")))
    second.run("sh", "-c", f"echo >> /var/lib/lem/altered/results/{path}")
    ended = fleet.controller.play("collect_results", lem_campaign_name="altered")
    assert ended.code != 0
    said = " ".join(ended.text.split())
    assert f"gpu2: the archive holds a result that was altered: results/{path.removeprefix('./')}" in said
    assert (ended.counts("gpu1")["failed"], ended.counts("gpu2")["failed"]) == (0, 1)
    hosts = fleet.controller.fleet_dir / "altered/hosts"
    arrived = [item.read_bytes() for item in sorted(hosts.glob("*/results/**/result.json"))]
    assert sorted(arrived) == sorted(before.values())
