"""What the host of a long campaign writes and syncs from one result to the next, beside the first build's.

    python -m tests.bench.writes [EXPERIMENTS] [RESULTS]

Both builds run the start of one plan, with an engine that answers at once. Bytes are those that the host process hands
to the kernel (proc_pid_io(5), `wchar`), from the change that completes the first result to the one that completes the
last. A compaction of the journal writes the snapshot once more; those that a whole plan needs are spread over it.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.builds import BUILD, OLD_COMMIT, ROOT, Build, build_of, old_build
from tests.bench.host import TIMEOUT_S, start_campaign

# design.md: of a change, its line in the journal; of a snapshot, the file and then the folder of its name.
REQUIRED_SYNCS = 1
LARGEST_SHARE = 1 / 100

# Runs lem.pyz as Python would, and adds up what it writes at each result.
_HOST = """
import json, os, runpy, sys
report, sys.argv = sys.argv[1], sys.argv[2:]
syncs, changes, marks = {}, [0], []

def look(event, arguments):
    if event in ("lem.fsync", "lem.fsync_dir"):
        kind = "folder" if event == "lem.fsync_dir" else os.path.basename(arguments[0])
        syncs[kind] = syncs.get(kind, 0) + 1
    elif event == "lem.transition":
        changes[0] += 1
        if arguments[2] == "completed":
            with open("/proc/self/io") as file:
                written = int(file.read().split("wchar:")[1].split()[0])
            marks.append({"written": written, "syncs": dict(syncs), "changes": changes[0]})

sys.addaudithook(look)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    json.dump(marks, open(report, "w"))
"""


@dataclass(frozen=True)
class Writes:
    """What one build wrote from the first to the last result."""

    changes: int  # of an experiment's status
    written_b: int
    syncs: Counter[str]  # by file name; of folders together
    snapshot_b: int
    journal_b: int  # that these changes appended

    def compactions_b(self, experiments: int, results: int) -> float:
        """The share of the compactions of a whole plan, at least one, that falls on so many of its results."""
        if not self.journal_b:
            return 0.0
        journal_of_plan_b = self.journal_b * experiments / results
        return math.ceil(journal_of_plan_b / self.snapshot_b) * self.snapshot_b * results / experiments


def measure(build: Build, folder: Path, experiments: int, results: int) -> Writes:
    """Run a plan of so many experiments until so many results are there."""
    folder.mkdir()
    state = folder / ".state" / "bench"
    journal_b: list[int] = []
    with start_campaign(build, folder, experiments, program=("-c", _HOST, "marks.json")) as process:
        for line in process.stdout or ():
            if json.loads(line)["event"] == "experiment_completed":
                journal = state / "campaign_manifest.journal"
                journal_b.append(journal.stat().st_size if journal.exists() else 0)
                if len(journal_b) == results + 1:
                    process.send_signal(signal.SIGTERM)
        process.wait(TIMEOUT_S)
    marks: list[dict[str, Any]] = json.loads((folder / "marks.json").read_text(encoding="utf-8"))
    if len(marks) < results:
        raise RuntimeError(f"{len(marks)} results:\n{(folder / 'errors').read_text()[-2000:]}")
    first, last = marks[0], marks[results - 1]
    return Writes(
        last["changes"] - first["changes"],
        last["written"] - first["written"],
        Counter(last["syncs"]) - Counter(first["syncs"]),
        (state / "campaign_manifest.json").stat().st_size,
        journal_b[results - 1] - journal_b[0],
    )


def main() -> int:
    """0 if the bytes are at most the share wanted, and every change was synced."""
    numbers = [int(word) for word in sys.argv[1:]]
    experiments, results = (*numbers, *(10_000, 200)[len(numbers) :])
    builds = {OLD_COMMIT[:7]: old_build(), "now": build_of(ROOT, BUILD / "now" / "lem.pyz")}
    total_b: dict[str, float] = {}
    is_synced = True
    for name, build in builds.items():
        with tempfile.TemporaryDirectory() as folder:
            found = measure(build, Path(folder) / "campaign", experiments, results)
        spread_b = found.compactions_b(experiments, results)
        total_b[name] = found.written_b + spread_b
        print(f"{name}: results 1 to {results} of {experiments:,}, {found.changes} changes of status")
        print(f"  written {found.written_b:,} B, and compactions spread over the plan {spread_b:,.0f} B")
        print(f"  snapshot {found.snapshot_b:,} B, journal {found.journal_b:,} B")
        of_manifest = sum(count for file, count in found.syncs.items() if file.startswith("campaign_manifest"))
        all_syncs = ", ".join(f"{file} {count}" for file, count in sorted(found.syncs.items()))
        print(f"  syncs of the manifest per change {of_manifest / found.changes:.3f}, required {REQUIRED_SYNCS}")
        print(f"  syncs by file: {all_syncs}")
        is_synced = is_synced and of_manifest >= REQUIRED_SYNCS * found.changes
    old_b, now_b = total_b.values()
    share = now_b / old_b
    print(f"share {share:.6f}, 1/{old_b / now_b:,.0f} (at most {LARGEST_SHARE})")
    return 0 if is_synced and share <= LARGEST_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
