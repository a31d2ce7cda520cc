"""A campaign is divided the same way by everybody, and a host runs its part of the stored plan and nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from lem.base.errors import UserError
from lem.config.load import load_campaign
from lem.orchestration.fleet import divide, make_fleet_plan, parse_shard, part_of_plan, replan
from lem.orchestration.grid import campaign_config_hash
from lem.orchestration.plan import Plan, build_plan
from lem.results.merge import FleetPlan, read_plan, write_plan

RUN = "20260714T100000Z-3fa1"


def plan(*outputs: int, cycles: int = 2, shared: Mapping[str, Any] = MappingProxyType({}), **execution: Any) -> Plan:
    grid = {"backends": ["pytorch"], "shared": {"max_output_tokens": list(outputs), **shared}}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        settings = {"execution": {"cycles": cycles, **execution}}
        json.dump({"campaign_name": "demo", "model": "gpt2", "grid": grid, **settings}, file)
        file.flush()
        loaded = load_campaign(file.name)
    return build_plan(loaded.config, loaded.listed)


def fleet(found: Plan, *hosts: str, **options: Any) -> FleetPlan:
    return make_fleet_plan(found, hosts, RUN, **options)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", "1/0", ""])
def test_a_shard_is_one_of_so_many(text: str) -> None:
    assert parse_shard("2/3") == (2, 3)
    with pytest.raises(UserError, match="expected I/N"):
        parse_shard(text)


@pytest.mark.parametrize(
    ("costs", "count", "anchor", "parts"),
    [
        ({"a": 1, "b": 8, "c": 5, "d": 4, "e": 3}, 2, "a", ["abe", "acd"]),
        ({"a": 1, "b": 2}, 1, None, ["ab"]),
        ({"a": 1, "b": 2}, 3, "a", ["ab", "a", "a"]),
    ],
)
def test_the_longest_goes_first_to_the_host_with_the_least_to_do(
    costs: dict[str, float], count: int, anchor: str | None, parts: list[str]
) -> None:
    assert divide(costs, count) == (anchor, tuple(map(frozenset, parts)))


def test_earlier_results_decide_what_is_long() -> None:
    found = plan(4, 64, 512)
    short, middle, long = (item.config_hash for item in found.configurations)
    stored = fleet(found, "gpu1", "gpu2", measured_by_config={short: 90.0, middle: 10.0, long: 20.0})
    assert stored.anchor == middle
    assert [host.expected_s for host in stored.hosts] == [200.0, 60.0]


def test_replicated_every_host_has_everything_and_takes_over_nothing() -> None:
    stored = fleet(plan(4, 64), "gpu1", "gpu2", is_replicated=True)
    assert stored.anchor is None
    assert [len(host.exp_ids) for host in stored.hosts] == [4, 4]
    with pytest.raises(UserError, match="no host can take over another's part"):
        replan(stored, ["gpu1"], set())


def test_a_part_of_a_stored_plan_keeps_order_and_hash_and_is_of_the_same_campaign() -> None:
    found = plan(4, 64, 128)
    stored = fleet(found, "gpu1", "gpu2")
    part = part_of_plan(found, 1, 2, stored)
    assert part.config_hash == found.config_hash
    assert [item.order_index for item in part.experiments] == sorted(item.order_index for item in part.experiments)
    assert 0 < len(part.experiments) < len(found.experiments)
    with pytest.raises(UserError, match="another version"):
        part_of_plan(plan(4, 64, 129), 1, 2, stored)
    with pytest.raises(UserError, match="for 2 hosts, not for 3"):
        part_of_plan(found, 1, 3, stored)


TIMEOUTS: dict[str, Any] = {f"{name}_timeout_seconds": 99.0 for name in ("load", "experiment", "silence")}
PRICED = {"measurement.price_per_kwh": [0.3], "baseline.cache_ttl_sec": [9.0]}


def test_timeouts_prices_and_cache_lifetimes_may_change_after_a_plan_was_stored() -> None:
    stored = fleet(plan(4, 64), "gpu1", "gpu2")
    part = part_of_plan(plan(4, 64, shared=PRICED, **TIMEOUTS), 2, 2, stored)
    assert [item.exp_id for item in part.experiments] == [*stored.hosts[1].exp_ids]
    with pytest.raises(UserError, match="another version"):
        part_of_plan(plan(4, 64, config_gap_seconds=1.0), 2, 2, stored)


def test_a_plan_stored_by_the_first_build_whose_hashes_held_timeouts_and_prices_is_run() -> None:
    found = plan(4, 64, shared=PRICED, **TIMEOUTS)
    first = found.as_first_hashed()
    hashes = [item.config_hash for item in first.given]
    assert not {*hashes} & {item.config_hash for item in found.given}
    digest = campaign_config_hash(first.campaign, hashes, is_first=True)
    stored = dataclasses.replace(fleet(first, "gpu1", "gpu2"), config_hash=digest)
    part = part_of_plan(found, 2, 2, stored)
    assert [item.exp_id for item in part.experiments] == [*stored.hosts[1].exp_ids]


def test_a_stored_plan_is_read_back_and_never_overwritten(tmp_path: Path) -> None:
    stored = fleet(plan(4, 64), "gpu1", "gpu2")
    write_plan(tmp_path / "plan.json", stored)
    assert read_plan(tmp_path / "plan.json") == stored
    with pytest.raises(UserError, match="never overwritten"):
        write_plan(tmp_path / "plan.json", stored)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 9}, "schema"),
        ({"mode": "both"}, "mode"),
        ({"hosts": []}, "at least one"),
        ({"run_id": "../up"}, "cannot be used as a folder name"),
        ({"extra": 1}, "plan: unknown 'extra'"),
        ({"experiments": []}, "unknown experiment"),
        ({"hosts": [{"name": "gpu1", "exp_ids": [], "expected_s": None}]}, "assigned to no host"),
        ({"hosts": "gpu1"}, "plan.hosts: expected a list"),
    ],
)
def test_a_broken_plan_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, fleet(plan(4, 64), "gpu1", "gpu2"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=said):
        read_plan(path)


def _done(stored: FleetPlan, *hosts: str) -> set[tuple[str, str]]:
    return {(host.name, exp_id) for host in stored.hosts if host.name in hosts for exp_id in host.exp_ids}


def test_what_a_lost_host_lacks_goes_to_the_others_and_what_was_measured_stays() -> None:
    stored = fleet(plan(4, 64, 128, 512), "gpu1", "gpu2", "gpu3")
    anew = replan(stored, ["gpu1", "gpu2"], _done(stored, "gpu1"))
    assert (anew.run_id, anew.anchor, anew.experiments) == (stored.run_id, stored.anchor, stored.experiments)
    assert [host.name for host in anew.hosts] == ["gpu1", "gpu2"]
    ids = {host.name: set(host.exp_ids) for host in anew.hosts}
    assert set(stored.hosts[0].exp_ids) <= ids["gpu1"]
    assert set(stored.hosts[1].exp_ids) <= ids["gpu2"]
    assert ids["gpu1"] | ids["gpu2"] == {item.exp_id for item in stored.experiments}
    # The host that is done has least to do.
    assert ids["gpu1"] - set(stored.hosts[0].exp_ids) == set(stored.hosts[2].exp_ids) - set(stored.hosts[1].exp_ids)


def test_a_lost_host_that_was_done_keeps_its_place_in_the_plan() -> None:
    stored = fleet(plan(4, 64, 128), "gpu1", "gpu2")
    anew = replan(stored, ["gpu1"], _done(stored, "gpu2"))
    assert {host.name: host.exp_ids for host in anew.hosts} == {host.name: host.exp_ids for host in stored.hosts}


def test_a_configuration_half_measured_by_a_lost_host_is_measured_whole_by_another() -> None:
    stored = fleet(plan(4, 64, 128), "gpu1", "gpu2")
    lost = next(exp_id for exp_id in stored.hosts[1].exp_ids if exp_id not in stored.hosts[0].exp_ids)
    anew = replan(stored, ["gpu1", "gpu3"], _done(stored, "gpu1") | (_done(stored, "gpu2") - {("gpu2", lost)}))
    cycles = {exp_id for exp_id in stored.hosts[1].exp_ids if exp_id.startswith(lost.rpartition("-")[0])}
    assert len(cycles) == 2
    assert [host.name for host in anew.hosts if cycles & set(host.exp_ids)] == ["gpu1"]  # gpu3 has the anchor to do
    assert cycles <= set(anew.part(1).exp_ids)


def test_a_plan_that_an_older_build_stored_is_run_in_its_order() -> None:
    found = plan(4, 8, 16)
    older = fleet(found.as_by_older_build(), "gpu1", "gpu2", is_replicated=True)
    assert older.config_hash != found.config_hash
    part = part_of_plan(found, 1, 2, older)
    assert [item.exp_id for item in part.experiments] == [item.exp_id for item in older.experiments]
    assert part.execution.structure == "interleaved"


@pytest.mark.parametrize("name", ["../a", "a b", "ab-c1", "0123456789ab-c12+x"])
def test_a_host_whose_name_cannot_be_that_of_its_folder_is_refused_before_anything_runs(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(repr(name))):
        fleet(plan(16), "a", name)
