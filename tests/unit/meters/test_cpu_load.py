"""CPU load from /proc/stat, and who says what the CPUs are designed for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lem.meters.rapl import CpuLoadMeter, find_tdp
from tests.doubles.powercap import Powercap, Zone


def stat(path: Path, **ticks: int) -> None:
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
    path.write_text(f"cpu  {' '.join(str(ticks.get(name, 0)) for name in names)}\ncpu0 1 2 3 4\n")


@pytest.fixture
def meter(tmp_path: Path) -> CpuLoadMeter:
    stat(tmp_path / "stat", user=1000, idle=1000)
    meter = CpuLoadMeter(tmp_path / "stat")
    assert meter.read() is None  # since when is not known
    return meter


@pytest.mark.parametrize(
    ("ticks", "busy_ratio"),
    [
        ({"user": 1030, "idle": 1070}, 0.3),
        ({"user": 1010, "nice": 10, "system": 10, "irq": 10, "softirq": 10, "idle": 1050}, 0.5),
        ({"user": 1000, "idle": 1050, "iowait": 40, "steal": 10}, 0.0),
        ({"user": 1100, "idle": 1000, "guest": 100}, 1.0),  # in user already
        ({"user": 1110, "idle": 990}, 1.0),  # the kernel's idle time went back a little
        ({"user": 1000, "idle": 1000}, None),  # no time has passed
    ],
)
def test_the_load_is_the_busy_share_since_the_reading_before(
    meter: CpuLoadMeter, tmp_path: Path, ticks: dict[str, int], busy_ratio: float | None
) -> None:
    stat(tmp_path / "stat", **ticks)
    assert meter.read() == (None if busy_ratio is None else pytest.approx(busy_ratio))


def test_each_reading_counts_from_the_one_before(meter: CpuLoadMeter, tmp_path: Path) -> None:
    stat(tmp_path / "stat", user=1100, idle=1000)
    assert meter.read() == 1.0
    stat(tmp_path / "stat", user=1100, idle=1100)
    assert meter.read() == 0.0


@pytest.mark.parametrize("text", ["", "cpu 1 2 3\n", "intr 1 2 3 4 5 6 7 8\n", "cpu a b c d e f g h\n"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "stat").write_text(text)
    with pytest.raises(ValueError, match=r"not understood|invalid literal|not enough"):
        CpuLoadMeter(tmp_path / "stat").read()


def test_this_machine_tells_its_load() -> None:
    assert CpuLoadMeter().read() is None


def test_what_the_user_says_comes_first(tmp_path: Path) -> None:
    Powercap.server(tmp_path).make(0)
    assert find_tdp(350.0, tmp_path) == (350.0, "measurement.cpu_tdp_w")


def test_the_kernel_is_asked_for_all_packages(tmp_path: Path) -> None:
    Powercap.server(tmp_path).make(0)
    tdp_w, source = find_tdp(None, tmp_path)
    assert tdp_w == 410.0
    assert "package-0, package-1" in (source or "")


def test_counters_that_may_not_be_read_hide_no_design_power(tmp_path: Path) -> None:
    tree = Powercap.server(tmp_path)
    tree.make(0)
    tree.take_away()
    assert find_tdp(None, tmp_path)[0] == 410.0


@pytest.mark.parametrize("second_uw", [None, 0])
def test_a_part_of_the_packages_is_not_taken_for_the_whole(tmp_path: Path, second_uw: int | None) -> None:
    first = Zone("intel-rapl:0", "package-0", max_power_uw=205_000_000)
    Powercap(tmp_path, (first, Zone("intel-rapl:1", "package-1", max_power_uw=second_uw))).make(0)
    assert find_tdp(None, tmp_path) == (None, None)


def test_a_short_term_limit_is_no_design_power(tmp_path: Path) -> None:
    Powercap(tmp_path, (Zone("intel-rapl:0", "package-0", max_power_uw=205_000_000),)).make(0)
    (tmp_path / "intel-rapl:0" / "constraint_0_name").write_text("short_term\n")
    assert find_tdp(None, tmp_path) == (None, None)


def test_nobody_may_know(tmp_path: Path) -> None:
    assert find_tdp(None, tmp_path / "missing") == (None, None)
