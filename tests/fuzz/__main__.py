"""Hostile inputs by the thousand: `python -m tests.fuzz [--examples N] [--seed S] [--only SURFACE] [--keep FOLDER]`.

Prints what came of them, and for each find the smallest input of its kind. The exit code is 1 with any find.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import resource
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.running import SURFACES, Tally, fuzz, workplace
from tests.fuzz.trial import Find, Outcome, Surface

# An input that takes longer, or more memory, is a find too.
TRIAL_S = 20
MEMORY_B = 6 * 2**30

HEADS = ("inputs", "refused", "accepted", "no place", "escapes", "tracebacks")
WIDTHS = (8, 9, 10, 10, 9, 12)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000, help="inputs of all surfaces together (default: 20000)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the random choices (default: the time)")
    parser.add_argument("--only", action="append", help="a surface; may be repeated")
    parser.add_argument("--keep", type=Path, help="write the input of each find under this folder")
    args = parser.parse_args()
    if args.keep is not None:
        args.keep = args.keep.absolute()
    chosen = [surface for surface in SURFACES if not args.only or surface.name in args.only]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_B, MEMORY_B))
    signal.signal(signal.SIGALRM, _too_slow)
    print(f"seed {args.seed}")
    heads = "".join(f"{head:>{width}}" for head, width in zip(HEADS, WIDTHS, strict=True))
    print(f"{'surface':16}{heads}{'s':>7}", flush=True)
    tallies = {}
    shares = sum(surface.share for surface in chosen)
    for surface in chosen:
        begun = time.monotonic()
        with workplace() as folder:
            tally = fuzz(_watched(surface), -(-args.examples * surface.share // shares), folder, args.seed)
        tallies[surface.name] = tally
        print(f"{_row(surface.name, tally)}{time.monotonic() - begun:7.0f}", flush=True)
    print(_row("all", Tally(sum((tally.counts for tally in tallies.values()), Counter()))))
    for name, tally in tallies.items():
        _tell_finds(name, tally, args.keep)
    return int(not all(tally.is_good for tally in tallies.values()))


def _watched(surface: Surface) -> Surface:
    """The surface, each of its trials within a time."""

    def trial(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
        signal.alarm(TRIAL_S)
        try:
            return surface.trial(data, folder, is_thorough=is_thorough)
        finally:
            signal.alarm(0)

    return dataclasses.replace(surface, trial=trial)


def _too_slow(_signum: int, _frame: object) -> None:
    raise Find("traceback", f"not done after {TRIAL_S} s")


def _row(name: str, tally: Tally) -> str:
    counts = tally.counts
    cells = (
        tally.total,
        *(counts[kind] for kind in ("refused", "accepted", "place", "escape", "traceback")),
    )
    return f"{name:16}" + "".join(f"{cell:{width}d}" for cell, width in zip(cells, WIDTHS, strict=True))


def _tell_finds(name: str, tally: Tally, keep: Path | None) -> None:
    for key, (data, text) in tally.finds.items():
        print(f"\n{name}: {key}\n  input ({len(data)} bytes): {data[:300]!r}\n{text[-1500:]}")
        if keep is not None:
            (keep / name).mkdir(parents=True, exist_ok=True)
            (keep / name / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
