"""Archives of hosts are unpacked only as they were sent, and only with results as they were measured."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.command_rig import run_lem
from tests.synthetic_campaign import Campaign, Configuration

CAMPAIGN = Campaign((Configuration("a"),), cycles=2, is_verifiable=True)


def packed(folder: Path, host: str, source: Path) -> str:
    """The archive of a host in a folder of archives, and its line of sha256sum."""
    archive = folder / host / "results.tar.gz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as members:
        members.add(source, "results")
    return f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  {host}/results.tar.gz\n"


def receive(folder: Path, sums: str):
    (folder / "sums").write_text(sums)
    ended = run_lem("fleet", "receive", str(folder), "--sums", str(folder / "sums"), "--json")
    return ended.code, json.loads(ended.out) if ended.out else ended.err


@pytest.fixture
def results(tmp_path):
    return CAMPAIGN.write(tmp_path / "host").results_dir


def test_what_arrives_as_it_was_sent_is_unpacked_once(tmp_path, results):
    sums = packed(tmp_path / "hosts", "gpu1", results)
    assert receive(tmp_path / "hosts", sums) == (0, {"new": ["gpu1"], "refused": {}})
    arrived = tmp_path / "hosts/gpu1/results"
    found = {path.relative_to(arrived) for path in arrived.rglob("result.json")}
    assert found == {path.relative_to(results) for path in results.rglob("result.json")}
    assert receive(tmp_path / "hosts", sums) == (0, {"new": [], "refused": {}})


def test_an_archive_that_changed_on_its_way_is_refused_and_what_arrived_before_stays(tmp_path, results):
    hosts = tmp_path / "hosts"
    receive(hosts, packed(hosts, "gpu1", results))
    before = sorted((hosts / "gpu1/results").rglob("*"))
    sums = packed(hosts, "gpu1", results) + packed(hosts, "gpu2", results)
    archive = hosts / "gpu1/results.tar.gz"
    archive.write_bytes(archive.read_bytes() + b"more")
    code, found = receive(hosts, sums)
    assert (code, found["new"], list(found["refused"])) == (1, ["gpu2"], ["gpu1"])
    assert sorted((hosts / "gpu1/results").rglob("*")) == before
    assert not archive.exists()


def test_an_archive_with_a_result_that_was_altered_is_refused(tmp_path, results):
    path = next(results.rglob("result.json"))
    path.write_text(path.read_text().replace('"host": "lab1"', '"host": "lab2"'))
    code, found = receive(tmp_path / "hosts", packed(tmp_path / "hosts", "gpu1", results))
    assert (code, found["new"]) == (1, [])
    assert str(path.relative_to(results)) in found["refused"]["gpu1"]
    assert not (tmp_path / "hosts/gpu1/results").exists()


@pytest.mark.parametrize("name", ["results/../../escaped", "/escaped", "elsewhere"])
def test_a_member_outside_the_results_is_refused(tmp_path, name):
    archive = tmp_path / "hosts/gpu1/results.tar.gz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as members:
        member = tarfile.TarInfo(name)
        member.size = 1
        members.addfile(member, io.BytesIO(b"x"))
    sums = f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  gpu1/results.tar.gz"
    code, found = receive(tmp_path / "hosts", sums)
    assert (code, list(found["refused"])) == (1, ["gpu1"])
    assert not [path for path in tmp_path.rglob("*") if path.name in ("escaped", "elsewhere")]


def test_a_link_in_an_archive_is_refused(tmp_path, results):
    (results / "link").symlink_to("/etc/hostname")
    code, found = receive(tmp_path / "hosts", packed(tmp_path / "hosts", "gpu1", results))
    assert (code, list(found["refused"])) == (1, ["gpu1"])


@pytest.mark.parametrize("sums", ["abc", "abc gpu1/other.tar.gz", "abc ../results.tar.gz"])
def test_other_lines_than_those_of_sha256sum_are_a_usage_error(tmp_path, sums):
    assert receive(tmp_path, sums)[0] == 2
