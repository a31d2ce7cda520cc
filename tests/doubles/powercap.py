"""A folder like /sys/class/powercap with RAPL zones whose counters follow a known power; time is always an argument."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class Zone:
    folder: str  # `intel-rapl:0`, or `intel-rapl:0:0` for a zone inside that
    name: str  # as the kernel names it: `package-0`, `core`, `uncore`, `dram`, `psys`
    # (since when on CLOCK_MONOTONIC in ns, W); the first holds before it, too.
    powers_w: tuple[tuple[int, float], ...] = ((0, 10.0),)
    max_uj: int = 262_143_328_850  # it wraps there (`max_energy_range_uj`)
    begins_uj: int = 0  # the counter at `begins_ns`
    begins_ns: int = 0
    max_power_uw: int | None = None  # of constraint 1, `long_term`; None for a zone without constraints

    def energy_j(self, from_ns: int, to_ns: int) -> float:
        """What it truly drew between the two."""
        edges = [from_ns, *(at_ns for at_ns, _ in self.powers_w if from_ns < at_ns < to_ns), to_ns]
        return sum(self._power_w(start) * (end - start) / _NS_PER_S for start, end in itertools.pairwise(edges))

    def energy_uj(self, at_ns: int) -> int:
        """Its counter then, wrapped."""
        if at_ns < self.begins_ns:
            raise ValueError(f"{self.name} begins at {self.begins_ns} ns, asked for {at_ns}")
        return (self.begins_uj + round(self.energy_j(self.begins_ns, at_ns) * 1e6)) % self.max_uj

    def _power_w(self, at_ns: int) -> float:
        past = [power_w for since_ns, power_w in self.powers_w if since_ns <= at_ns]
        return past[-1] if past else self.powers_w[0][1]


@dataclass(frozen=True)
class Powercap:
    """The tree under `root`.

    Root reads a file whatever its mode: a counter that it cannot read, either, is taken away or obstructed.
    """

    root: Path
    zones: tuple[Zone, ...]

    @classmethod
    def server(cls, root: Path, *, max_uj: int = 262_143_328_850, begins_ns: int = 0) -> Powercap:
        """Two packages with 90 and 60 W, their memory with 12 and 8 W, cores, and psys over all of it."""
        wide = {"max_uj": max_uj, "begins_ns": begins_ns}
        zones = (
            Zone("intel-rapl:0", "package-0", ((0, 90.0),), max_power_uw=205_000_000, **wide),
            Zone("intel-rapl:0:0", "core", ((0, 70.0),), **wide),
            Zone("intel-rapl:0:1", "dram", ((0, 12.0),), **wide),
            Zone("intel-rapl:1", "package-1", ((0, 60.0),), max_power_uw=205_000_000, **wide),
            Zone("intel-rapl:1:0", "dram", ((0, 8.0),), **wide),
            Zone("intel-rapl:2", "psys", ((0, 260.0),), **wide),
        )
        return cls(root, zones)

    def make(self, at_ns: int) -> None:
        (self.root / "intel-rapl").mkdir(parents=True, exist_ok=True)  # the control type: a folder, but no zone
        (self.root / "intel-rapl" / "enabled").write_text("1\n", encoding="ascii")
        for zone in self.zones:
            folder = self._folder(zone)
            folder.mkdir(parents=True, exist_ok=True)
            if folder.parent != self.root:
                (self.root / zone.folder).symlink_to(folder.relative_to(self.root))
            (folder / "name").write_text(f"{zone.name}\n", encoding="ascii")
            (folder / "max_energy_range_uj").write_text(f"{zone.max_uj}\n", encoding="ascii")
            if zone.max_power_uw is not None:
                (folder / "constraint_0_name").write_text("peak_power\n", encoding="ascii")
                (folder / "constraint_1_name").write_text("long_term\n", encoding="ascii")
                (folder / "constraint_1_max_power_uw").write_text(f"{zone.max_power_uw}\n", encoding="ascii")
            self._counter(zone).write_text(f"{zone.energy_uj(at_ns)}\n", encoding="ascii")

    def update(self, at_ns: int) -> None:
        for zone in self.zones:
            path = self._counter(zone)
            if path.is_file():
                path.write_text(f"{zone.energy_uj(at_ns)}\n", encoding="ascii")

    def protect(self, folders: Sequence[str] = ()) -> None:
        """Give the counters of those zones, of all without any, the mode the kernel gives them: root alone may read."""
        for path in self._chosen(folders):
            path.chmod(0o400)

    def take_away(self, folders: Sequence[str] = ()) -> None:
        """Leave those zones, all without any, without a counter."""
        for path in self._chosen(folders):
            path.unlink()

    def obstruct(self, folders: Sequence[str] = ()) -> None:
        """Put a folder in the place of those counters, so that reading one fails."""
        for path in self._chosen(folders):
            path.unlink()
            path.mkdir()

    def _chosen(self, folders: Sequence[str]) -> list[Path]:
        return [self._counter(zone) for zone in self.zones if not folders or zone.folder in folders]

    def _counter(self, zone: Zone) -> Path:
        return self._folder(zone) / "energy_uj"

    def _folder(self, zone: Zone) -> Path:
        """A zone's own folder: in its parent's, if it has one; a link beside the others leads there, as in sysfs."""
        parent = zone.folder.rpartition(":")[0]
        return self.root / parent / zone.folder if ":" in parent else self.root / zone.folder
