"""Faults side by side: most of the time of each is waiting. What each cost can be kept for another sitting."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.verdict import Verdict

Trial = Callable[[Path], Verdict]
"""What a fault cost that was tried in that folder."""


class Sitting:
    """What faults cost, by their names, with progress on stderr; with a file also those of earlier sittings."""

    def __init__(self, path: Path | None = None, program: Path | None = None) -> None:
        """Read what earlier sittings wrote to `path`; the last verdict of a fault counts."""
        self._path, self._lock, self._begin = path, threading.Lock(), time.monotonic()
        self._program = _digest(program) if program else ""
        self._tried: dict[str, tuple[str, Verdict]] = {}  # with the program on which it was tried
        self._left, self._done = 0, 0
        if path is not None and path.exists():
            whole, _, cut_short = path.read_text(encoding="utf-8").rpartition("\n")
            if cut_short:  # it was stopped while it wrote
                path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
            for item in map(json.loads, whole.splitlines()):
                self._tried[item["name"]] = item["program"], Verdict(**item["verdict"])

    @property
    def verdicts(self) -> list[Verdict]:
        return [verdict for _, verdict in self._tried.values()]

    def left(self, names: Sequence[str]) -> list[str]:
        """Those that are still to be tried: never tried, or with a cost the last time."""
        left = [name for name in names if name not in self._tried or not self._tried[name][1].is_good]
        self._left = len(left)
        return left

    def add(self, name: str, verdict: Verdict) -> None:
        line = json.dumps({"name": name, "program": self._program, "verdict": dataclasses.asdict(verdict)})
        with self._lock:
            self._tried[name] = self._program, verdict
            self._left, self._done = self._left - 1, self._done + 1
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            each_s = (time.monotonic() - self._begin) / self._done
            print(
                f"{self._done} of {self._done + self._left}, {each_s * self._left:.0f} s left: {name}", file=sys.stderr
            )

    def describe_programs(self) -> str:
        """How many were tried on another version of lem than this one."""
        others = sum(program != self._program for program, _ in self._tried.values())
        return f"{len(self._tried)} faults, {others} of them tried on earlier versions of lem"


def _digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        whole.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:12]


def try_each(trials: Mapping[str, Trial], folder: Path, *, jobs: int, sitting: Sitting | None = None) -> list[Verdict]:
    """The verdicts of these faults, by their names, those of earlier sittings left out.

    Each has a folder of its own, which is removed when nothing was lost; what cost something is printed at once. A
    campaign that hangs, or cannot be looked at, has completed nothing.
    """

    def work(numbered: tuple[int, str]) -> Verdict:
        number, name = numbered
        place = folder / f"{number:04d}"
        try:
            verdict = trials[name](place)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            verdict = Verdict("broken off", str(place), False, incomplete=1, notes=f"{type(error).__name__}: {error}")
        if verdict.is_good:
            shutil.rmtree(place)
        else:
            print(verdict, flush=True)
        if sitting is not None:
            sitting.add(name, verdict)
        return verdict

    names = list(trials) if sitting is None else sitting.left(list(trials))
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(work, enumerate(names)))
