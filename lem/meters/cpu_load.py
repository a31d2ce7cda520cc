"""How busy the CPUs are, and the power they are designed for: together an estimate of their energy, never more."""

from __future__ import annotations

from pathlib import Path

from lem.meters.rapl import PACKAGE, POWERCAP, ZoneFolder, zone_folders

__all__ = ["PROC_STAT", "CpuLoadMeter", "find_tdp"]

PROC_STAT = Path("/proc/stat")

# Fields of the first line of /proc/stat (proc_stat(5)): user nice system idle iowait irq softirq steal guest …;
# user and nice hold what guests took. A CPU is not busy when it idles, waits for a disk or serves another machine.
_COUNTED = 8
_NOT_BUSY = (3, 4, 7)


class CpuLoadMeter:
    """The load of all CPUs of the machine, also when read inside a container."""

    def __init__(self, path: Path = PROC_STAT) -> None:
        self._path = path
        self._before: tuple[int, int] | None = None

    def read(self) -> float | None:
        """The busy share of all CPU time since the reading before, 0 to 1; None at the first one.

        Raises:
            OSError, ValueError: the kernel does not tell.
        """
        first_line = self._path.read_text(encoding="ascii").partition("\n")[0]
        label, *words = first_line.split()
        times = [int(word) for word in words[:_COUNTED]]
        if label != "cpu" or len(times) < _COUNTED:
            raise ValueError(f"{self._path}: not understood: {first_line}")
        total = sum(times)
        now = (total - sum(times[index] for index in _NOT_BUSY), total)
        before, self._before = self._before, now
        # The kernel's idle and iowait times may go back a little (proc_stat(5)).
        if before is None or now[1] <= before[1]:
            return None
        return min(1.0, max(0.0, (now[0] - before[0]) / (now[1] - before[1])))


def find_tdp(asked_w: float | None, root: Path = POWERCAP) -> tuple[float | None, str | None]:
    """The power in W that all CPU packages are designed for, and who says so; None twice where nobody does.

    The kernel has it as the maximum of a package's long-term limit, which is the `thermal spec power` of Intel's
    MSR_PKG_POWER_INFO and may be read by everybody. AMD's processors do not tell.

    Args:
        asked_w: `measurement.cpu_tdp_w`, which comes first.
    """
    if asked_w is not None:
        return asked_w, "measurement.cpu_tdp_w"
    packages = [zone for zone in zone_folders(root) if zone.domain == PACKAGE]
    found_w = [_long_term_w(zone) for zone in packages]
    known_w = [value for value in found_w if value]
    if not known_w or len(known_w) < len(packages):
        return None, None
    return sum(known_w), f"long-term limit of {', '.join(zone.name for zone in packages)} (powercap)"


def _long_term_w(zone: ZoneFolder) -> float | None:
    try:
        for path in sorted(zone.folder.glob("constraint_*_name")):
            if path.read_text(encoding="ascii").strip() == "long_term":
                return int(path.with_name(path.name.replace("_name", "_max_power_uw")).read_bytes()) / 1e6
    except (OSError, ValueError):
        return None
    return None
