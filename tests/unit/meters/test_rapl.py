"""RAPL zones: which there are, which count, and what is said where they cannot be read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lem.meters.rapl import RaplCounter, find_rapl, zone_folders
from tests.doubles.powercap import Powercap, Zone

NS_PER_S = 1_000_000_000


@pytest.fixture
def server(tmp_path: Path) -> Powercap:
    tree = Powercap.server(tmp_path / "powercap")
    tree.make(0)
    return tree


def test_zones_are_named_after_the_one_they_lie_in(server: Powercap) -> None:
    assert [(zone.name, zone.domain) for zone in zone_folders(server.root)] == [
        ("package-0", "package"),
        ("package-0/core", "core"),
        ("package-0/dram", "dram"),
        ("package-1", "package"),
        ("package-1/dram", "dram"),
        ("psys", "psys"),
    ]


def test_counters_are_read_raw_with_where_they_wrap(server: Powercap) -> None:
    found = find_rapl(server.root)
    assert (found.error, found.explained, found.missing) == (None, None, ())
    package = found.counters[0]
    assert (package.zone.name, package.zone.max_uj, package.read_uj()) == ("package-0", 262_143_328_850, 0)
    server.update(2 * NS_PER_S)
    assert package.read_uj() == 180_000_000


def test_ten_packages_stay_in_order(tmp_path: Path) -> None:
    zones = tuple(Zone(f"intel-rapl:{number}", f"package-{number}") for number in range(11))
    Powercap(tmp_path, zones).make(0)
    assert [zone.name for zone in zone_folders(tmp_path)] == [f"package-{number}" for number in range(11)]


def test_a_package_that_can_be_reached_in_two_ways_counts_once(tmp_path: Path) -> None:
    zones = (Zone("intel-rapl-mmio:0", "package-0"), Zone("intel-rapl:0", "package-0"))
    Powercap(tmp_path, zones).make(0)
    (counter,) = find_rapl(tmp_path).counters
    assert counter.path == tmp_path / "intel-rapl:0" / "energy_uj"


def test_dies_of_a_package_are_packages(tmp_path: Path) -> None:
    Powercap(tmp_path, (Zone("intel-rapl:0", "package-0-die-0"), Zone("intel-rapl:1", "package-0-die-1"))).make(0)
    assert [zone.domain for zone in zone_folders(tmp_path)] == ["package", "package"]


def test_a_machine_without_rapl_is_told_where_to_look(tmp_path: Path) -> None:
    for root in (tmp_path / "missing", tmp_path):
        found = find_rapl(root)
        assert found.counters == ()
        assert f"no RAPL package in {root}" in (found.error or "")
        assert "on the host" in found.remedy


def test_a_folder_that_docker_has_masked_is_no_zone(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0").symlink_to("../../devices/virtual/powercap/intel-rapl/intel-rapl:0")
    assert zone_folders(tmp_path) == ()


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """A user who is not root, since root reads everything; without a change where the tests run as such a user."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_counters_that_only_root_may_read_are_told_with_the_command_that_helps(
    server: Powercap, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.protect()
    monkeypatch.chdir(server.root)  # the folders above it are closed to others
    with as_nobody():
        found = find_rapl(Path())
    assert found.counters == ()
    assert "(package-0, package-1) may not be read by user" in (found.error or "")
    assert "sudo chmod a+r ./*rapl*:*/energy_uj" in found.remedy
    assert found.explained == f"{found.error}; {found.remedy}"


def test_the_command_that_helps_names_every_counter(server: Powercap) -> None:
    pattern = "*rapl*:*/energy_uj"
    assert len(list(server.root.glob(pattern))) == len(server.zones)


def test_one_package_that_cannot_be_read_voids_the_whole(server: Powercap) -> None:
    server.obstruct(["intel-rapl:1"])
    found = find_rapl(server.root)
    assert found.counters == ()
    assert "(package-1) cannot be read: Is a directory" in (found.error or "")


def test_one_memory_zone_that_cannot_be_read_voids_memory_alone(server: Powercap) -> None:
    server.take_away(["intel-rapl:1:0"])
    found = find_rapl(server.root)
    assert [counter.zone.name for counter in found.counters] == ["package-0", "package-0/core", "package-1", "psys"]
    assert found.error is None
    assert found.missing == (("package-1/dram", "No such file or directory"),)


def test_a_counter_that_says_no_number_is_told(server: Powercap) -> None:
    (server.root / "intel-rapl:0" / "energy_uj").write_text("nonsense\n")
    assert "no number" in (find_rapl(server.root).error or "")


def test_a_counter_that_vanishes_raises(server: Powercap) -> None:
    counter: RaplCounter = find_rapl(server.root).counters[0]
    server.take_away()
    with pytest.raises(FileNotFoundError):
        counter.read_uj()
