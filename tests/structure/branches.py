"""`python -m tests.structure coverage`: the branches of lem/ that tests take, by package; and whether two trees differ.

Programs that the tests start are measured too, workers and lem.pyz among them, by way of the file that coverage.py has
in site-packages. What runs without site-packages (`python -I -S`), in a container or in the lab's own Python is not,
and neither is what a process did that was killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_TESTS = ("tests/unit", "tests/integration")

# What packages of 524ec81 are called in the rebuilt tree; modules that are in none count as `base`.
NEW_NAMES = {"backends": "engines", "experiment": "worker", "": "base"}

_CONFIGURATION = """
[run]
branch = true
parallel = true
relative_files = true
source_pkgs = lem
data_file = {folder}/coverage
disable_warnings = module-not-imported, no-data-collected
patch =
    _exit
    fork
    subprocess

[paths]
lem =
    lem
    */lem.pyz/lem
"""


@dataclass(frozen=True)
class Taken:
    """Statements and branches, and how many of them the tests executed."""

    statements: int = 0
    covered_statements: int = 0
    branches: int = 0
    covered_branches: int = 0

    def __add__(self, other: Taken) -> Taken:
        return Taken(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def branch_percent(self) -> float:
        """100 where there is no branch."""
        return 100 * self.covered_branches / self.branches if self.branches else 100.0

    @property
    def statement_percent(self) -> float:
        """100 where there is no statement."""
        return 100 * self.covered_statements / self.statements if self.statements else 100.0


def measure(tree: Path, tests: Sequence[str], pytest_options: Sequence[str] = ()) -> dict[str, Any]:
    """The coverage of each module of `tree`, as a document; `tests_ended_with` is the exit code of pytest."""
    with tempfile.TemporaryDirectory(prefix="lem-coverage-") as scratch:
        folder = Path(scratch)
        configuration, report = folder / "coveragerc", folder / "report.json"
        configuration.write_text(_CONFIGURATION.format(folder=folder), encoding="utf-8")
        coverage = [sys.executable, "-m", "coverage"]
        rcfile = f"--rcfile={configuration}"
        pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *pytest_options, *tests]
        environment = {**os.environ, "PYTHONPATH": ""}  # else this checkout's lem is found first
        code = subprocess.run([*coverage, "run", rcfile, *pytest], cwd=tree, env=environment, check=False).returncode
        subprocess.run([*coverage, "combine", "-q", rcfile], cwd=tree, check=True)
        subprocess.run([*coverage, "json", "-q", "-i", rcfile, "-o", str(report)], cwd=tree, check=True)
        files = json.loads(report.read_text(encoding="utf-8"))["files"]
    modules = {
        name: {
            "statements": found["summary"]["num_statements"],
            "covered_statements": found["summary"]["covered_lines"],
            "branches": found["summary"]["num_branches"],
            "covered_branches": found["summary"]["covered_branches"],
        }
        for name, found in sorted(files.items())
        if name.startswith("lem/")  # a double may bear the name of a module of lem
    }
    return {"tests": list(tests), "tests_ended_with": code, "modules": modules}


def by_package(document: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Taken]:
    """The sums of each package under its name in the new tree."""
    found: dict[str, Taken] = {}
    for name, numbers in document["modules"].items():
        package = _package(name, names)
        found[package] = found.get(package, Taken()) + Taken(**numbers)
    return dict(sorted(found.items()))


def _package(file: str, names: Mapping[str, str]) -> str:
    parts = Path(file).parts[1:-1]  # lem/results/report/page.py is of results.report
    first = "".join(parts[:1])
    return ".".join([names.get(first, first), *parts[1:]])


def lower(old: Mapping[str, Taken], new: Mapping[str, Taken]) -> list[str]:
    """The packages of which the new tests take a smaller part of the branches, or that are not in the new tree."""
    return [
        name
        for name, before in old.items()
        if name not in new
        or new[name].covered_branches * before.branches < before.covered_branches * new[name].branches
    ]


def print_coverage(tree: Path, tests: Sequence[str], output: Path | None, pytest_options: Sequence[str] = ()) -> int:
    """The exit code of the tests."""
    document = measure(tree, tests or DEFAULT_TESTS, pytest_options)
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for line in _table(by_package(document, {})):
        print(line)
    code: int = document["tests_ended_with"]
    if code != 0:
        print(f"the tests failed (pytest exited with {code}): these numbers are not those of a whole run")
    return code


def _table(packages: Mapping[str, Taken]) -> Iterator[str]:
    yield f"{'package':<20} {'statements':>12} {'covered':>9} {'branches':>10} {'covered':>9}"
    for name, taken in {**packages, "all": sum(packages.values(), Taken())}.items():
        yield (
            f"{name or '(top)':<20} {taken.statements:>12} {taken.statement_percent:>7.2f} % "
            f"{taken.branches:>9} {taken.branch_percent:>7.2f} %"
        )


def print_comparison(old: Path, new: Path, names: Mapping[str, str]) -> int:
    """1 when the branch coverage of any package is lower."""
    before, after = (by_package(json.loads(path.read_text(encoding="utf-8")), names) for path in (old, new))
    worse = lower(before, after)
    print(f"{'package':<20} {'old':>20} {'new':>20}")
    for name in sorted({*before, *after}):
        sides = (_side(packages.get(name)) for packages in (before, after))
        print(f"{name:<20} {' '.join(sides)}{'  LOWER' if name in worse else ''}")
    return int(bool(worse))


def _side(taken: Taken | None) -> str:
    if taken is None:
        return f"{'–':>20}"
    return f"{f'{taken.branch_percent:.2f} % of {taken.branches}':>20}"
