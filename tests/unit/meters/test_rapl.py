"""RAPL zones: which there are, which count, and what is said where they cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lem.meters.rapl import distinct_zones, find_rapl, find_tdp, zone_folders
from lem.meters.samples import RaplReading
from tests.doubles.powercap import Powercap, Zone
from tests.processes import ordinary_user

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


def test_a_package_that_can_be_reached_in_two_ways_counts_once(tmp_path: Path) -> None:
    zones = (Zone("intel-rapl-mmio:0", "package-0"), Zone("intel-rapl:0", "package-0"))
    Powercap(tmp_path, zones).make(0)
    (counter,) = find_rapl(tmp_path).counters
    assert counter.path == tmp_path / "intel-rapl:0" / "energy_uj"


def test_dies_of_a_package_are_packages_in_their_order(tmp_path: Path) -> None:
    zones = tuple(Zone(f"intel-rapl:{number}", f"package-0-die-{number}") for number in range(11))
    Powercap(tmp_path, zones).make(0)
    found = [(f"package-0-die-{number}", "package") for number in range(11)]
    assert [(zone.name, zone.domain) for zone in zone_folders(tmp_path)] == found


def test_a_machine_without_rapl_is_told_where_to_look(tmp_path: Path) -> None:
    for root in (tmp_path / "missing", tmp_path):
        found = find_rapl(root)
        assert found.counters == ()
        assert f"no RAPL package in {root}" in (found.error or "")
        assert "on the host" in found.remedy


def test_a_folder_that_docker_has_masked_is_no_zone(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0").symlink_to("../../devices/virtual/powercap/intel-rapl/intel-rapl:0")
    assert zone_folders(tmp_path) == ()


def test_counters_that_only_root_may_read_are_told_with_the_command_that_helps(
    server: Powercap, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.protect()
    monkeypatch.chdir(server.root)  # the folders above it are closed to others
    with ordinary_user():
        found = find_rapl(Path())
    assert found.counters == ()
    assert "(package-0, package-1) may not be read by user" in (found.error or "")
    assert "sudo chmod a+r ./*rapl*:*/energy_uj" in found.remedy
    assert len(list(server.root.glob("*rapl*:*/energy_uj"))) == len(server.zones)
    assert found.explained == f"{found.error}; {found.remedy}"


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


def test_the_kernel_is_asked_for_all_packages(server: Powercap) -> None:
    assert find_tdp(350.0, server.root) == (350.0, "measurement.cpu_tdp_w")
    server.take_away()  # counters that cannot be read hide no design power
    tdp_w, source = find_tdp(None, server.root)
    assert tdp_w == 410.0
    assert "package-0, package-1" in (source or "")


@pytest.mark.parametrize("second_uw", [None, 0])
def test_a_part_of_the_packages_is_not_taken_for_the_whole(tmp_path: Path, second_uw: int | None) -> None:
    first = Zone("intel-rapl:0", "package-0", max_power_uw=205_000_000)
    Powercap(tmp_path, (first, Zone("intel-rapl:1", "package-1", max_power_uw=second_uw))).make(0)
    assert find_tdp(None, tmp_path) == find_tdp(None, tmp_path / "missing") == (None, None)


def dies(root: Path, begins_uj: tuple[int, ...]) -> None:
    zones = (
        Zone(f"intel-rapl:{die}", f"package-0-die-{die}", begins_uj=begin_uj, max_power_uw=200_000_000)
        for die, begin_uj in enumerate(begins_uj)
    )
    Powercap(root, tuple(zones)).make(0)


@pytest.mark.parametrize(
    ("begins_uj", "tdp_w"),
    [
        ((7_000_000_000,) * 4, 200.0),  # the counter of the socket, once for each die
        ((7_000_000_000, 6_000_000_000), 400.0),
        ((0, 0), 400.0),  # nothing was counted yet that could tell them apart
    ],
)
def test_a_die_that_repeats_its_socket_adds_no_design_power(
    tmp_path: Path, begins_uj: tuple[int, ...], tdp_w: float
) -> None:
    dies(tmp_path, begins_uj)
    assert find_tdp(None, tmp_path)[0] == tdp_w


@pytest.mark.parametrize("later_us", [-200, 0, 200])
@pytest.mark.parametrize(("watts", "kept"), [((68.0, 68.0), (0,)), ((90.0, 60.0), (0, 1))])
def test_dies_that_repeat_their_socket_are_one_in_whichever_order_they_are_read(
    later_us: int, watts: tuple[float, float], kept: tuple[int, ...]
) -> None:
    rows = [
        RaplReading(
            die, second * 10**9 + die * later_us * 1000, round(5e9 + power_w * 1e6 * (second + die * later_us / 1e6))
        )
        for second in range(1, 6)
        for die, power_w in enumerate(watts)
    ]
    assert distinct_zones(rows, {0: "package-0-die-0", 1: "package-0-die-1"}) == kept


def test_the_design_power_of_dies_that_cannot_be_compared_is_unknown(tmp_path: Path) -> None:
    dies(tmp_path, (7_000_000_000,) * 2)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert find_tdp(None, tmp_path) == (None, None)


def test_a_twin_is_read_where_the_first_tree_cannot_be(tmp_path: Path) -> None:
    zones = (
        Zone("intel-rapl-mmio:0", "package-0"),
        Zone("intel-rapl:0", "package-0"),
        Zone("intel-rapl:1", "package-1"),
    )
    tree = Powercap(tmp_path, zones)
    tree.make(0)
    tree.take_away(["intel-rapl:0"])
    assert [counter.path.parent.name for counter in find_rapl(tmp_path).counters] == [
        "intel-rapl-mmio:0",
        "intel-rapl:1",
    ]


def test_zones_of_one_name_in_one_tree_are_several(tmp_path: Path) -> None:
    zones = (Zone("intel-rapl:0", "package-0"), Zone("intel-rapl:1", "package-0"), Zone("intel-rapl:1:0", "dram"))
    Powercap(tmp_path, zones).make(0)
    names = [zone.name for zone in zone_folders(tmp_path)]
    assert names == ["package-0", "package-0 (intel-rapl:1)", "package-0 (intel-rapl:1)/dram"]


def test_memory_of_one_package_alone_is_not_the_memory(server: Powercap) -> None:
    for name in ("intel-rapl:1/intel-rapl:1:0/name", "intel-rapl:1:0/name"):
        (server.root / name).unlink(missing_ok=True)
    found = find_rapl(server.root)
    assert "package-0/dram" not in [counter.zone.name for counter in found.counters]
    assert found.dram_error == "package-1/dram: the kernel shows no such zone"


def test_the_largest_limit_of_a_zone_is_known(server: Powercap) -> None:
    (server.root / "intel-rapl:0" / "constraint_0_power_limit_uw").write_text("350000000\n")
    limits_w = {counter.zone.name: counter.zone.limit_w for counter in find_rapl(server.root).counters}
    assert (limits_w["package-0"], limits_w["package-1"], limits_w["psys"]) == (350.0, 205.0, None)
