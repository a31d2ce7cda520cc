"""Faults side by side: most of the time of each is waiting."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.verdict import Verdict

Trial = Callable[[Path], Verdict]
"""What a fault cost that was tried in that folder."""


def try_each(trials: Sequence[Trial], folder: Path, *, jobs: int) -> list[Verdict]:
    """Their verdicts; each has a folder of its own, which is removed when nothing was lost.

    What cost something is printed at once. A campaign that hangs, or cannot be looked at, has completed nothing.
    """

    def work(numbered: tuple[int, Trial]) -> Verdict:
        number, trial = numbered
        place = folder / f"{number:04d}"
        try:
            verdict = trial(place)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            verdict = Verdict("broken off", str(place), False, incomplete=1, notes=f"{type(error).__name__}: {error}")
        if verdict.is_good:
            shutil.rmtree(place)
        else:
            print(verdict, flush=True)
        return verdict

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(work, enumerate(trials)))
