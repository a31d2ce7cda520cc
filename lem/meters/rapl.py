"""CPU energy: RAPL counters, design power and load."""

from __future__ import annotations

import contextlib
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from lem.base.dataclass import dataclass, replace
from lem.base.reasons import Reason
from lem.base.units import NS_PER_S
from lem.meters.curve import Curve, Hole, Span, exact
from lem.meters.samples import RaplReading, RaplZone

POWERCAP = Path("/sys/class/powercap")
PACKAGE = "package"
DRAM = "dram"

_ZONE = re.compile(r"(?P<kind>[\w-]*rapl[\w-]*):(?P<numbers>\d+(?::\d+)*)")

_RIGHTS_REMEDY = (
    "run lem as root, or let everybody read them until the next boot: sudo chmod a+r {root}/*rapl*:*/energy_uj"
)
_ABSENT_REMEDY = (
    "virtual machines and containers have none: sample on the host; on hardware, sudo modprobe intel_rapl_msr"
)


@dataclass(frozen=True)
class ZoneFolder:
    folder: Path
    # The kernel's, after those of the zones above it: `package-0`, `package-0/dram`; the folder parts equal names.
    name: str
    domain: str  # `package`, `dram`, `core`, `uncore`, `psys` (the whole machine, packages included) …
    above: str = ""  # the name of the zone it lies in
    twin: Path | None = None  # the same zone in another tree: registers (MSR) first, memory (MMIO) second


@dataclass(frozen=True)
class RaplCounter:
    zone: RaplZone
    path: Path

    def read_uj(self) -> int:
        return int(self.path.read_bytes())


@dataclass(frozen=True)
class RaplFound:
    counters: tuple[RaplCounter, ...] = ()  # that can be read
    error: str | None = None  # why there is none, or why the whole CPU cannot be summed up
    remedy: str = ""  # what to do about `error`
    missing: tuple[tuple[str, str], ...] = ()  # (name, reason) of zones other than packages that cannot be read

    @property
    def dram_error(self) -> str | None:
        return next((f"{name}: {why}" for name, why in self.missing if name.rpartition("/")[2] == DRAM), None)

    @property
    def explained(self) -> str | None:
        return None if self.error is None else f"{self.error}; {self.remedy}"


def find_rapl(root: Path = POWERCAP) -> RaplFound:
    """The counters below `root`; those of a domain count together or not at all: a part would pass for the whole."""
    zones = zone_folders(root)
    if not any(zone.domain == PACKAGE for zone in zones):
        return RaplFound(error=f"no RAPL package in {root}", remedy=_ABSENT_REMEDY)
    opened = {zone: _open_counter(zone) for zone in zones}
    failed = {zone: found for zone, found in opened.items() if not isinstance(found, RaplCounter)}
    packages = [zone for zone in failed if zone.domain == PACKAGE]
    if packages:
        names, error = ", ".join(zone.name for zone in packages), failed[packages[0]]
        if isinstance(error, PermissionError):
            text = f"the RAPL counters ({names}) may not be read by user {os.geteuid()}"
            return RaplFound(error=text, remedy=_RIGHTS_REMEDY.format(root=root))
        text = f"the RAPL counters ({names}) cannot be read: {_why(error)}"
        return RaplFound(error=text, remedy="dmesg may say more; without them CPU energy is null")
    missing = [(zone.name, zone.domain, _why(error)) for zone, error in failed.items()]
    with_dram = {zone.above for zone in zones if zone.domain == DRAM}
    if with_dram:
        without = (zone.name for zone in zones if zone.domain == PACKAGE and zone.name not in with_dram)
        missing += [(f"{name}/{DRAM}", DRAM, "the kernel shows no such zone") for name in without]
    incomplete = {domain for _, domain, _ in missing}
    counters = (found for found in opened.values() if isinstance(found, RaplCounter))
    return RaplFound(
        tuple(counter for counter in counters if counter.zone.domain not in incomplete),
        missing=tuple((name, why) for name, _, why in missing),
    )


def zone_folders(root: Path = POWERCAP) -> tuple[ZoneFolder, ...]:
    """The RAPL zones below `root`, each after the one it lies in, once even if registers and memory both have it."""
    found: dict[tuple[str, tuple[int, ...]], tuple[Path, str]] = {}
    for folder in sorted(root.glob("*")):
        if match := _ZONE.fullmatch(folder.name):
            with contextlib.suppress(OSError):  # Docker lays an empty folder over powercap
                numbers = tuple(int(number) for number in match["numbers"].split(":"))
                if name := (folder / "name").read_text(encoding="utf-8", errors="replace").strip():
                    found[match["kind"], numbers] = (folder, name)
    zones: dict[tuple[str, int], ZoneFolder] = {}
    names: dict[tuple[str, tuple[int, ...]], str] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for kind, numbers in sorted(found):  # `intel-rapl` comes before `intel-rapl-mmio`
        folder, name = found[kind, numbers]
        above = names.get((kind, numbers[:-1]), "")
        full_name = f"{above}/{name}" if above else name
        place = seen[kind, full_name]
        seen[kind, full_name] += 1
        key = (full_name, place)
        names[kind, numbers] = full_name if place == 0 else f"{full_name} ({folder.name})"
        if key in zones:
            zones[key] = replace(zones[key], twin=zones[key].twin or folder)
        else:
            # `package-0`, on processors of several dies `package-0-die-1`.
            domain = PACKAGE if name.startswith(PACKAGE) else name
            zones[key] = ZoneFolder(folder, names[kind, numbers], domain, above)
    return tuple(zones.values())


def _open_counter(zone: ZoneFolder) -> RaplCounter | OSError | ValueError:
    counter = _open_folder(zone, zone.folder)
    twin = _open_folder(zone, zone.twin) if zone.twin and not isinstance(counter, RaplCounter) else counter
    return twin if isinstance(twin, RaplCounter) else counter


def _open_folder(zone: ZoneFolder, folder: Path) -> RaplCounter | OSError | ValueError:
    try:
        max_uj = int((folder / "max_energy_range_uj").read_bytes())
        found = RaplZone(zone.name, zone.domain, max_uj, _largest_limit_w(folder))
        counter = RaplCounter(found, folder / "energy_uj")
        counter.read_uj()
    except (OSError, ValueError) as error:
        return error
    return counter


def _largest_limit_w(folder: Path) -> float | None:
    limits = []
    for path in (*folder.glob("constraint_*_power_limit_uw"), *folder.glob("constraint_*_max_power_uw")):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(path.read_bytes()) / 1e6)
    return max((limit_w for limit_w in limits if limit_w > 0), default=None)


def _why(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else f"no number: {error}"


# Energy by the readings of a zone

# More than any CPU package draws whose limits are lower or unknown.
_MOST_PACKAGE_W = 1000.0
_LIMIT_MARGIN = 1.2
_RAPL_UPDATE_S = 0.01  # counters are updated about every millisecond, so that a step may hold more than its time
_LEAST_STILL_S = 0.5  # two readings that follow each other at once may be equal
# Two readings of one counter, one right after the other, lie at most an update or two apart.
_SAME_COUNTER_UJ = 2_000_000
_SAME_ROUND_S = 0.25  # zones are read one after the other, once a second


def rapl_curve(
    readings: Iterable[RaplReading], zone: int, max_uj: int, what: str, limit_w: float | None = None
) -> Curve:
    """A powercap zone without its wraps at `max_energy_range_uj`; what it cannot have drawn is a hole."""
    rows = [row for row in readings if row.zone == zone]
    energy_j = [0.0] * len(rows)
    holes: list[Hole] = []
    for place, (before, after) in enumerate(pairwise(rows), start=1):
        step = rapl_step_j(before, after, max_uj, what, limit_w)
        energy_j[place] = energy_j[place - 1] + (0.0 if isinstance(step, Reason) else step)
        if isinstance(step, Reason):
            since_ns = before.at_ns
            if holes and holes[-1].span.closed_ns == since_ns and holes[-1].reason.code == step.code == "zone_still":
                since_ns = holes.pop().span.opened_ns
                step = Reason.of("zone_still", what=what, gap_s=(after.at_ns - since_ns) / NS_PER_S)
            holes.append(Hole(Span(since_ns, after.at_ns), step))
    return exact(what, [row.at_ns for row in rows], energy_j, holes)


def rapl_step_j(
    before: RaplReading, after: RaplReading, max_uj: int, what: str, limit_w: float | None = None
) -> float | Reason:
    """The energy between two readings of a powercap zone; the reason if it cannot be had."""
    # A zone cannot have drawn nothing at all, nor more than the larger of 1 kW and 1.2 x its largest limit; in a time
    # in which that is more than its range, it may have wrapped twice.
    length_s, step_uj = (after.at_ns - before.at_ns) / NS_PER_S, after.energy_uj - before.energy_uj
    most_w = max(_MOST_PACKAGE_W, _LIMIT_MARGIN * (limit_w or 0.0))
    most_uj = most_w * (length_s + _RAPL_UPDATE_S) * 1e6
    if length_s * most_w > max_uj / 1e6:
        return Reason.of("zone_hole", what=what, gap_s=length_s)
    if step_uj == 0 and length_s >= _LEAST_STILL_S:
        return Reason.of("zone_still", what=what, gap_s=length_s)
    if step_uj > most_uj:
        return Reason.of("zone_leapt", what=what, step_j=step_uj / 1e6, gap_s=length_s, most_w=most_w)
    if step_uj < 0 and not 0 <= step_uj + max_uj <= most_uj:
        return Reason.of(
            "zone_fell", what=what, before_j=before.energy_uj / 1e6, after_j=after.energy_uj / 1e6, max_j=max_uj / 1e6
        )
    return (step_uj if step_uj >= 0 else step_uj + max_uj) / 1e6


def distinct_zones(readings: Iterable[RaplReading], names: Mapping[int, str]) -> tuple[int, ...]:
    """Of zones (place: name), those without the dies whose readings are always those of another die of their socket."""
    # Some kernels show the counter of an AMD socket once for each of its dies (mended in 2024: "perf/x86/rapl: Fix the
    # energy-pkg event for AMD CPUs"). Dies with counters of their own differ.
    rows: dict[int, list[RaplReading]] = {place: [] for place in names}
    for row in readings:
        if row.zone in rows:
            rows[row.zone].append(row)
    kept: list[int] = []
    for place in sorted(rows, key=lambda place: (-len(rows[place]), place)):
        socket = _socket_of(names[place])
        if not any(_socket_of(names[other]) == socket and _are_one(rows[place], rows[other]) for other in kept):
            kept.append(place)
    return tuple(sorted(kept))


def _socket_of(name: str) -> str:
    return name.partition("-die-")[0].partition(" (")[0]


def _are_one(rows: Sequence[RaplReading], others: Sequence[RaplReading]) -> bool:
    times = [row.at_ns for row in others]
    compared = 0
    for row in rows:
        place = bisect_left(times, row.at_ns)
        for near in others[max(0, place - 1) : place + 1]:  # read just before it, or just after
            apart_s = abs(near.at_ns - row.at_ns) / NS_PER_S
            if apart_s < _SAME_ROUND_S:
                compared += 1
                if abs(near.energy_uj - row.energy_uj) > _SAME_COUNTER_UJ + _MOST_PACKAGE_W * apart_s * 1e6:
                    return False
    return compared >= 2


# Design power


def find_tdp(asked_w: float | None, root: Path = POWERCAP) -> tuple[float | None, str | None]:
    """The power in W that all CPU packages are designed for, and its source; None twice if unknown."""
    # `asked_w` (`measurement.cpu_tdp_w`) comes first. The kernel has it as the maximum of a package's long-term limit,
    # which is the `thermal spec power` of Intel's MSR_PKG_POWER_INFO and readable by all. AMD's processors have none.
    if asked_w is not None:
        return asked_w, "measurement.cpu_tdp_w"
    packages = _counted_once([zone for zone in zone_folders(root) if zone.domain == PACKAGE])
    known_w = [value for zone in packages or () if (value := _long_term_w(zone))]
    if not packages or len(known_w) < len(packages):
        return None, None
    return sum(known_w), f"long-term limit of {', '.join(zone.name for zone in packages)} (powercap)"


def _counted_once(packages: Sequence[ZoneFolder]) -> list[ZoneFolder] | None:
    """The packages without dies that repeat their socket's counter (as `distinct_zones`); None if it cannot be read."""
    counted: list[ZoneFolder] = []
    seen_uj: dict[str, list[int]] = {}  # by the dies of each socket
    for zone in packages:
        if "-die-" in zone.name:
            opened = _open_counter(zone)
            if not isinstance(opened, RaplCounter):
                return None
            energy_uj, others_uj = opened.read_uj(), seen_uj.setdefault(_socket_of(zone.name), [])
            if energy_uj and any(other_uj and abs(energy_uj - other_uj) <= _SAME_COUNTER_UJ for other_uj in others_uj):
                continue
            others_uj.append(energy_uj)
        counted.append(zone)
    return counted


def _long_term_w(zone: ZoneFolder) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        for path in sorted(zone.folder.glob("constraint_*_name")):
            if path.read_text(encoding="ascii").strip() == "long_term":
                return int(path.with_name(path.name.replace("_name", "_max_power_uw")).read_bytes()) / 1e6
    return None
