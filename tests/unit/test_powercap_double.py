"""The powercap folder holds the counters that follow from the powers of its zones, and is unreadable as told."""

from __future__ import annotations

import itertools

import pytest

from tests.doubles.powercap import Powercap, Zone

SECOND_NS = 1_000_000_000


def _read(path):
    return int(path.read_text())


@pytest.fixture
def tree(tmp_path):
    powercap = Powercap.server(tmp_path / "powercap", begins_ns=100 * SECOND_NS)
    powercap.make(100 * SECOND_NS)
    return powercap


def test_zones_lie_beside_each_other_and_in_their_parents(tree):
    names = {path.name: (path / "name").read_text() for path in tree.root.glob("intel-rapl:*")}
    assert names == {
        "intel-rapl:0": "package-0\n",
        "intel-rapl:0:0": "core\n",
        "intel-rapl:0:1": "dram\n",
        "intel-rapl:1": "package-1\n",
        "intel-rapl:1:0": "dram\n",
        "intel-rapl:2": "psys\n",
    }
    assert (tree.root / "intel-rapl:0:1").resolve() == (tree.root / "intel-rapl:0" / "intel-rapl:0:1").resolve()
    assert not (tree.root / "intel-rapl" / "name").exists()


def test_counters_follow_power_to_the_time_they_are_brought_to(tree):
    assert _read(tree.root / "intel-rapl:0" / "energy_uj") == 0
    tree.update(110 * SECOND_NS)
    assert _read(tree.root / "intel-rapl:0" / "energy_uj") == 900_000_000
    assert _read(tree.root / "intel-rapl:1:0" / "energy_uj") == 80_000_000


def test_a_counter_wraps_at_its_range(tmp_path):
    zone = Zone("intel-rapl:0", "package-0", ((0, 100.0),), max_uj=250_000_000, begins_uj=240_000_000)
    powercap = Powercap(tmp_path, (zone,))
    seen = []
    powercap.make(0)
    for second in range(5):
        powercap.update(second * SECOND_NS)
        seen.append(_read(tmp_path / "intel-rapl:0" / "energy_uj"))
    assert seen == [240_000_000, 90_000_000, 190_000_000, 40_000_000, 140_000_000]
    steps = [(after - before) % zone.max_uj for before, after in itertools.pairwise(seen)]
    assert steps == [100_000_000] * 4
    assert _read(tmp_path / "intel-rapl:0" / "max_energy_range_uj") == 250_000_000


def test_a_counter_that_was_taken_away_stays_away(tree):
    tree.take_away(["intel-rapl:0:1"])
    tree.update(110 * SECOND_NS)
    assert not (tree.root / "intel-rapl:0:1" / "energy_uj").exists()
    assert _read(tree.root / "intel-rapl:1:0" / "energy_uj") == 80_000_000


def test_an_obstructed_counter_cannot_be_read_by_anyone(tree):
    tree.obstruct()
    tree.update(110 * SECOND_NS)
    for path in tree.root.glob("intel-rapl:*"):
        with pytest.raises(IsADirectoryError):
            (path / "energy_uj").read_text()
