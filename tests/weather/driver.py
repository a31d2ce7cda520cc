"""Weathers side by side: most of their time is waiting."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.weather.verdict import Case, Verdict, judge

UMOUNT_TIMEOUT_S = 30


def judge_all(cases: Sequence[Case], folder: Path, *, jobs: int) -> list[Verdict]:
    """The verdict of each case, each in a folder of its own; one that breaks off is a bad one."""

    def work(case: Case) -> Verdict:
        place = folder / re.sub(r"\W+", "-", case.name)
        try:
            return judge(case, place)
        except (AssertionError, OSError, TimeoutError, ValueError, subprocess.SubprocessError) as error:
            return Verdict(case.name, "-", -1, (0, 0), (0, 0), 0, (f"{type(error).__name__}: {error}",))
        finally:
            results = place / "results"
            if os.path.ismount(results):
                subprocess.run(["umount", "--lazy", str(results)], timeout=UMOUNT_TIMEOUT_S, check=False)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(work, cases))
