"""Wall time of `make test`, of the first build and of this tree, on a machine that does nothing else.

    python -m tests.bench.suite [old] [new]

Each tree has an environment and a lab of its own in build/bench, which are made first and are not timed (as root, on
Debian 12, with the network). One lab is up at a time. It takes an hour or more.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.builds import BUILD, OLD_COMMIT, ROOT
from tests.lab.places import FOLDER_VARIABLE

TARGET = 0.5
SIDES = ("old", "new")


@dataclass(frozen=True)
class Suite:
    """One complete run."""

    wall_s: float
    code: int
    summary: str  # the last line of pytest, such as `7790 passed, 12 skipped in 1234.56s`


def tree_of(side: str) -> Path:
    """A checkout: tests of the old commit, too, ask git for the files of the project."""
    if side == "new":
        return ROOT
    tree = BUILD / "suite-old"
    if not tree.exists():
        subprocess.run(["git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(tree)], check=True)
    subprocess.run(["git", "-C", str(tree), "checkout", "--quiet", OLD_COMMIT], check=True)
    return tree


@contextlib.contextmanager
def prepared(side: str, tree: Path) -> Iterator[dict[str, str]]:
    """The variables of a run, while the lab of the tree is up."""
    lab = BUILD / f"lab-{side}"
    # With CI=true, a run in which something would be skipped is refused.
    environ = {**os.environ, FOLDER_VARIABLE: str(lab), "CI": "true"}
    python = environ.get("PYTHON", "python3")
    subprocess.run(["make", f"PYTHON={python}", "test-env", "lem.pyz"], cwd=tree, env=environ, check=True)
    subprocess.run([python, "-m", "tests.lab", "up"], cwd=tree, env=environ, check=True)
    try:
        yield environ
    finally:
        # By this tree: the first build leaves a network namespace mounted.
        subprocess.run([python, "-m", "tests.lab", "down"], cwd=ROOT, env=environ, check=True)


def run_suite(side: str) -> Suite:
    """`make test` in the tree, with its output in build/bench."""
    tree, log = tree_of(side), BUILD / f"suite-{side}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with prepared(side, tree) as environ:
        print(f"{side}: make test in {tree}, output in {log}", flush=True)
        begin_s = time.monotonic()
        with log.open("wb") as output:
            command = ["make", f"PYTHON={environ.get('PYTHON', 'python3')}", "test"]
            code = subprocess.run(
                command, cwd=tree, env=environ, stdout=output, stderr=subprocess.STDOUT, check=False
            ).returncode
        wall_s = time.monotonic() - begin_s
        print(f"{side}: {wall_s:.0f} s, exit {code}", flush=True)
    summaries = re.findall(r"\d+ (?:passed|failed).* in [\d.]+s.*", log.read_text(errors="replace"))
    return Suite(wall_s, code, summaries[-1].strip("= ") if summaries else "no summary")


def main(sides: Sequence[str]) -> int:
    """0; 1 when a suite failed or the target is missed."""
    if unknown := set(sides) - set(SIDES):
        print(f"unknown side: {', '.join(sorted(unknown))} (old, new)", file=sys.stderr)
        return 2
    found = {side: run_suite(side) for side in sides or SIDES}
    for side, suite in found.items():
        name = OLD_COMMIT[:7] if side == "old" else "this tree"
        print(f"make test of {name:<10}{suite.wall_s:>8.0f} s  exit {suite.code}  {suite.summary}")
    is_missed = any(suite.code for suite in found.values())
    if len(found) == len(SIDES):
        ratio = found["new"].wall_s / found["old"].wall_s
        print(f"ratio {ratio:.2f} (target: at most {TARGET:g})")
        is_missed |= ratio > TARGET
    return int(is_missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
