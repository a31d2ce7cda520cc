"""The playbooks over hosts that are not there, by the oldest and by the newest Ansible that is supported."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.bench.builds import build_of
from tests.fleet.controller import install_collection
from tests.fleet.simulated import ANSIBLE, ROOT, Simulated
from tests.needs import OLDEST_ANSIBLE, missing

pytestmark = [pytest.mark.needs("ansible"), pytest.mark.timeout(1200)]

HOSTS = ("gpu1", "gpu2", "gpu3")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A controller with a stored plan, and hosts with the results of it."""
    if (reason := missing("ansible")) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("measured")
    simulated = Simulated(build_of(ROOT, folder / "lem.pyz"), folder / "fleet", HOSTS)
    simulated.write_results()
    return simulated


@pytest.fixture(
    params=[
        pytest.param(OLDEST_ANSIBLE, id="oldest", marks=pytest.mark.needs("oldest_ansible")),
        pytest.param(ANSIBLE, id="newest"),
    ]
)
def fleet(request, tmp_path, measured):
    return copy_of(measured, tmp_path, request.param)


@pytest.fixture
def newest(tmp_path, measured):
    return copy_of(measured, tmp_path, ANSIBLE)


def copy_of(measured, folder, ansible):
    simulated = Simulated(measured.build, folder / "c", HOSTS, ansible)  # Ansible 2.21 has a socket below it
    shutil.copytree(measured.fleet_dir, simulated.fleet_dir)
    for host in HOSTS:
        shutil.copy(measured.double / f"{host}.tar.gz", simulated.double)
    return simulated


def outcomes(text: str) -> dict[str, str]:
    lines = text.partition("Show the outcome on each host")[2].splitlines()
    found = (line.strip().removeprefix("- ").strip("'\"").partition(": ") for line in lines)
    return {host: outcome for host, _, outcome in found if host in HOSTS and outcome}


BOOKS = ("preflight", "site", "deploy", "provision", "images", "schedule_campaign", "stop_campaign", "collect_results")


@pytest.mark.parametrize(
    ("playbook", "dead", "after"),
    [
        *((playbook, "gpu2", 0) for playbook in (*BOOKS, "uninstall")),
        # In the middle, and the first of the hosts, which does for all of them what is done once.
        ("site", "gpu1", 5),
        ("schedule_campaign", "gpu1", 6),
        ("collect_results", "gpu1", 2),
        ("uninstall", "gpu1", 3),
    ],
)
def test_a_host_that_does_not_answer_costs_only_itself_and_is_named_at_the_end(newest, playbook, dead, after):
    newest.describe(dead, dead_after=after)
    ended = newest.play(playbook, lem_campaign_name="bench", lem_docker_wanted=False).ended
    assert ended.code != 0
    assert ended.counts(dead)["unreachable"] == 1
    assert f"did not answer: {dead}." in " ".join(ended.text.split())
    assert len(newest.exchanges(dead)) == after
    for host in set(HOSTS) - {dead}:
        counts = ended.counts(host)
        assert (counts["failed"], counts["unreachable"]) == (0, 0), ended.text[-4000:]
        assert len(newest.exchanges(host)) > after


def test_a_campaign_goes_on_without_a_host_that_does_not_answer(fleet):
    fleet.describe("gpu2", dead_after=0)
    ended = fleet.play("run_campaign", lem_fleet_anchor_tolerance="1e9%").ended
    assert ended.code != 0
    assert outcomes(ended.text) == {"gpu1": "ended", "gpu2": "unreachable", "gpu3": "ended"}, ended.text[-4000:]
    assert {path.name for path in (fleet.fleet_dir / "bench/hosts").iterdir()} == {"gpu1", "gpu3"}
    assert "results are missing" in ended.text


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"lem_campaign_file": None}, "set the campaign with -e lem_campaign_file=…"),
        ({"lem_campaign_file": "{broken}"}, "unknown key"),
        ({"lem_fleet_mode": "both"}, "shard or replicate"),
        ({"lem_fleet_anchor_tolerance": "0.05"}, "expected a percentage"),
    ],
)
def test_errors_of_a_campaign_are_found_before_any_host_is_touched(newest, variables, said):
    broken = newest.folder / "broken.yaml"
    broken.write_text(newest.campaign.read_text().replace("execution", "exekution"))
    given = {name: value and value.replace("{broken}", str(broken)) for name, value in variables.items()}
    ended = newest.play("run_campaign", **given).ended
    assert ended.code != 0
    assert said in ended.text
    assert not any(newest.exchanges(host) for host in HOSTS)


def test_an_unfit_host_stops_all_of_them_before_anything_changes(fleet):
    fleet.describe("gpu1", problems=["it is too small"])
    fleet.describe("gpu2", dead_after=0)
    fleet.describe("gpu3", problems=["it is too old"])
    ended = fleet.play("site", lem_docker_wanted=False).ended
    assert ended.code != 0
    assert "gpu1: it is too small; gpu3: it is too old" in ended.text
    sent = {item.kind for host in HOSTS for item in fleet.exchanges(host)}
    assert sent == {"raw"}


def test_a_host_that_is_lost_for_a_while_is_waited_for(fleet):
    """It is lost at its second poll."""
    fleet.describe("gpu2", states=["active", "active", "inactive"], dead_after="poll", back_after=3)
    ended = fleet.play("run_campaign", lem_fleet_anchor_tolerance="1e9%").ended
    assert ended.code == 0, ended.text[-4000:]
    assert "No route to host" in ended.text
    assert outcomes(ended.text) == dict.fromkeys(HOSTS, "ended")
    assert [item.kind for item in fleet.exchanges("gpu2")].count("poll") == 3


def test_a_host_that_is_lost_for_good_costs_only_itself(newest):
    newest.describe("gpu2", states=["active"], dead_after="poll")
    ended = newest.play("run_campaign", lem_fleet_anchor_tolerance="1e9%", lem_campaign_lost_seconds=2).ended
    assert ended.code != 0
    assert outcomes(ended.text) == {"gpu1": "ended", "gpu2": "unreachable", "gpu3": "ended"}
    assert "results are missing" in ended.text
    merged = (newest.fleet_dir / "bench/merged").rglob("result.json")
    assert {path.parents[1].name.split("+")[1] for path in merged} == {"gpu1", "gpu3"}


def test_check_mode_works_on_first_use_and_changes_nothing_anywhere(fleet):
    shutil.rmtree(fleet.fleet_dir)
    before = state_of(fleet.folder)
    ended = fleet.play("run_campaign", "--check", "--diff").ended
    assert ended.code == 0, ended.text[-4000:]
    assert state_of(fleet.folder) == before
    for host in HOSTS:
        assert ended.counts(host)["changed"] > 0
        assert "poll" not in {item.kind for item in fleet.exchanges(host)}


def state_of(folder: Path) -> dict[str, str]:
    """Every file and folder of a controller, except what the connections and Ansible itself write."""
    paths = (path for path in folder.rglob("*") if "double" not in path.parts and path.name != "output")
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in paths}


def test_an_archive_that_does_not_arrive_as_it_was_sent_is_refused_and_named(fleet):
    fleet.describe("gpu2", is_tampered=True)
    ended = fleet.play("collect_results", lem_campaign_name="bench").ended
    assert ended.code != 0
    assert "gpu2: the SHA-256 of the archive that arrived is" in " ".join(ended.text.split())
    hosts = fleet.fleet_dir / "bench/hosts"
    assert [path.name for path in (hosts / "gpu2").iterdir()] == ["refused-results.tar.gz"]
    for host in ("gpu1", "gpu3"):
        assert ended.counts(host)["failed"] == 0
        assert (hosts / host / "results/bench").is_dir()


def test_a_second_collection_of_the_same_changes_nothing(newest):
    assert newest.play("collect_results", lem_campaign_name="bench").ended.changed(*HOSTS) > 0
    assert newest.play("collect_results", lem_campaign_name="bench").ended.changed(*HOSTS) == 0


def test_roles_are_used_from_another_repository_as_a_collection(newest, tmp_path):
    install_collection(tmp_path, newest.ansible.with_name("ansible-galaxy"))
    play = {
        "hosts": "all",
        "gather_facts": False,
        "tasks": [
            {"ansible.builtin.include_role": {"name": "lem.energy.lem_preflight"}},
            {"ansible.builtin.include_role": {"name": "lem.energy.lem_deploy"}},
        ],
    }
    (tmp_path / "other.yml").write_text(json.dumps([play]))
    other = copy_of(newest, tmp_path / "o", newest.ansible)
    other.build = dataclasses.replace(newest.build, tree=tmp_path)
    ended = other.play(tmp_path / "other.yml").ended
    assert ended.code == 0, ended.text[-4000:]
    assert "lem.energy.lem_deploy" in ended.text
    assert "copy" in {item.kind for item in other.exchanges("gpu1")}
