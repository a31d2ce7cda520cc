"""A campaign on several hosts, each played by a folder: one plan, its parts, the merge; and what systemd hears."""

from __future__ import annotations

import json
import socket
from collections import Counter
from pathlib import Path

import pytest

from tests.campaign_rig import CampaignRig, campaign_text


@pytest.fixture
def hosts(tmp_path):
    """A controller and two hosts with the same campaign file."""
    rigs = []
    for name in ("controller", "one", "two"):
        (tmp_path / name).mkdir()
        rigs.append(CampaignRig(tmp_path / name, campaign_text(outputs=(4, 8, 16))))
    yield rigs
    for rig in rigs:
        rig.marker.kill()


def _store_plan(rig: CampaignRig, *options: str) -> Path:
    path = rig.folder / "plan.json"
    ended = rig.run("--write-plan", str(path), "--hosts", "one,two", *options)
    assert ended.code == 0, ended.err
    return path


def test_parts_of_one_plan_merge_to_one_run_and_a_second_start_does_nothing(hosts):
    controller, one, two = hosts
    plan = _store_plan(controller)
    run_id = json.loads(plan.read_text())["run_id"]
    for number, rig in ((1, one), (2, two)):
        part = ["--plan", str(plan), "--shard", f"{number}/2", "--executor", "local", "--yes"]
        ended = rig.run(*part)
        assert ended.code == 0, ended.err
        before = rig.results()
        assert rig.run(*part).code == 0
        assert rig.results() == before
    assert {record.identity.run_id for record in one.records() + two.records()} == {run_id}
    assert {record.identity.host for record in one.records()} == {"one"}
    assert [len(one.records()), len(two.records())] == [4, 4]  # the anchor and one more, twice

    merged = controller.lem(
        "merge",
        one.folder,
        two.folder,
        "--output",
        "all",
        "--plan",
        plan,
        "--anchor-tolerance",
        "1e9%",
        "--json",
    )
    assert merged.code == 0, merged.err
    document = json.loads(merged.out)
    assert (document["results"], document["lacking"], document["problems"]) == (8, [], [])
    shown = controller.lem("results", "show", "demo", "--results-dir", "all")
    assert "@ one" in shown.out
    assert "@ two" in shown.out


def test_a_replicated_campaign_is_run_whole_by_every_host(hosts):
    controller, one, _ = hosts
    plan = _store_plan(controller, "--replicate")
    assert one.run("--plan", str(plan), "--shard", "1/2", "--executor", "local", "--yes").code == 0
    assert len(one.records()) == 6


def test_a_new_plan_begins_a_new_run_beside_the_old_one(hosts):
    _, one, _ = hosts
    first = _store_plan(one)
    assert one.run("--plan", str(first), "--shard", "1/2", "--executor", "local", "--yes").code == 0
    first.rename(one.folder / "first.json")
    second = _store_plan(one)
    assert one.run("--plan", str(second), "--shard", "1/2", "--executor", "local", "--yes").code == 0
    assert len({record.identity.run_id for record in one.records()}) == 2


def test_what_a_lost_host_lacks_is_planned_anew_for_the_others(hosts):
    controller, one, two = hosts
    plan = _store_plan(controller)
    part = ["--executor", "local", "--yes"]
    assert one.run("--plan", str(plan), "--shard", "1/2", *part).code == 0
    merge = ["--output", "results", "--anchor-tolerance", "1e9%", "--json"]
    assert controller.lem("merge", one.folder, *merge, "--plan", plan).code == 1

    anew = controller.folder / "anew.json"
    ended = controller.run("--write-plan", str(anew), "--plan", str(plan), "--hosts", "one,three")
    assert ended.code == 0, ended.err
    before = one.results()
    for number, rig in ((1, one), (2, two)):
        assert rig.run("--plan", str(anew), "--shard", f"{number}/2", *part).code == 0
    assert before.items() <= one.results().items()
    assert {record.identity.host for record in two.records()} == {"three"}
    ended = controller.lem("merge", one.folder, two.folder, *merge, "--plan", anew)
    assert ended.code == 0, ended.out
    assert len({item["exp_id"] for item in json.loads(anew.read_text())["experiments"]}) == 6
    assert json.loads(ended.out)["lacking"] == []


def test_parts_without_a_stored_plan_are_told_by_numbers_alone(hosts):
    _, one, two = hosts
    for number, rig in ((1, one), (2, two)):
        ended = rig.run("--shard", f"{number}/2", "--executor", "local", "--yes")
        assert ended.code == 0, ended.err
    ids = [{record.identity.experiment_id for record in rig.records()} for rig in (one, two)]
    assert len(ids[0] | ids[1]) == 6
    assert len(ids[0] & ids[1]) == 2


def _parts(rig: CampaignRig) -> dict[str, int]:
    """The number of results in the folder of each part."""
    paths = (rig.folder / "results").glob("demo/*/*/*/attempt-*/result.json")
    return dict(Counter(path.parents[2].name for path in paths))


@pytest.mark.parametrize(("options", "own"), [((), 4), (("--replicate",), 6)])
def test_hosts_that_share_their_folders_each_run_their_own_part_at_the_same_time(hosts, options, own):
    shared = hosts[0]
    plan = _store_plan(shared, *options)
    part = ["--plan", str(plan), "--executor", "local", "--yes"]
    both = [shared.start("--shard", f"{number}/2", *part) for number in (1, 2)]
    for running in both:
        ended = running.wait()
        assert ended.code == 0, ended.err
    assert _parts(shared) == {"one": own, "two": own}
    before = shared.results()
    assert [shared.run("--shard", f"{number}/2", *part).code for number in (1, 2)] == [0, 0]
    assert shared.results() == before

    # Each part has its own index, manifest and lock; every reader sees them all as one run.
    (run,) = (shared.folder / "results" / "demo").iterdir()
    assert sorted(path.parent.name for path in run.rglob("index.jsonl")) == ["one", "two"]
    for name in ("campaign_manifest.json", "campaign.lock"):
        assert {path.parent.name for path in (shared.folder / ".state").rglob(name)} == {"one", "two"}
    shown = json.loads(shared.lem("results", "show", "demo", "--json").out)
    assert sum(item["n_cycles"] for item in shown["configurations"]) == 2 * own
    assert shown["problems"] == []
    statuses = json.loads(shared.lem("status", "demo", "--json").out)
    assert [(item["part"], item["state"], item["completed"]) for item in statuses] == [
        ("one", "done", own),
        ("two", "done", own),
    ]
    assert json.loads(shared.lem("status", "demo/two", "--json").out)["part"] == "two"
    verified = json.loads(shared.lem("verify", "demo", "--json").out)
    assert [set(item["digests"]) for item in verified["results"]] == [{"index", "manifest"}] * 2 * own
    merged = shared.lem("merge", "results", "--output", "all", "--plan", plan, "--anchor-tolerance", "1e9%", "--json")
    assert merged.code == 0, merged.out + merged.err
    document = json.loads(merged.out)
    assert (document["results"], document["lacking"], document["problems"]) == (2 * own, [], [])


def test_a_part_that_an_earlier_lem_began_without_a_folder_is_continued_there(hosts):
    rig = hosts[1]
    assert rig.run("--executor", "local", "--yes").code == 0
    before = rig.results()
    ended = rig.run("--shard", "1/1", "--executor", "local", "--resume")
    assert (ended.code, rig.results()) == (0, before), ended.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--plan", "none.json"], "--plan requires --shard"),
        (["--plan", "none.json", "--shard", "1/2"], "no such file"),
        (["--shard", "3/2"], "expected I/N"),
        (["--hosts", "a,b"], "require --write-plan"),
        (["--write-plan", "p.json"], "--write-plan requires --hosts"),
        (["--write-plan", "p.json", "--hosts", "a,a"], "each once"),
        (["--write-plan", "p.json", "--hosts", "a", "--shard", "1/2"], "cannot be combined"),
        (["--write-plan", "p.json", "--hosts", "a", "--plan", "none.json"], "no such file"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(hosts, options, said):
    before = hosts[1].tree()
    ended = hosts[1].run(*options)
    assert (ended.code, hosts[1].tree()) == (2, before)
    assert said in ended.err


def test_systemd_hears_of_readiness_and_progress(hosts, tmp_path):
    rig = hosts[1]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        running = rig.start("--executor", "local", "--yes", NOTIFY_SOCKET=str(tmp_path / "notify"))
        heard: list[str] = []
        channel.settimeout(60)
        while not heard or not heard[-1].endswith("finished"):
            heard.append(channel.recv(4096).decode())
        assert running.wait().code == 0
    assert heard.count("READY=1") == 1
    assert any("measuring" in line for line in heard[heard.index("READY=1") :])
    assert heard[-1] == "STATUS=[6/6] finished"
