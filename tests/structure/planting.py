"""`python -m tests.structure plant`: plant bugs in a copy of a tree, one at a time, and see which the tests catch.

planted.yaml names each place by its function and a snippet of source, so that it is found again where the function has
moved. Where it was renamed or rewritten, `new` gives other places and tests, tried when the first is not in the tree.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from tests.structure.branches import NEW_NAMES
from tests.structure.lines import assigned, definitions
from tests.structure.trees import Module, modules

BUGS_FILE = Path(__file__).with_name("planted.yaml")
CAUGHT, SURVIVED, NOT_APPLICABLE = "caught", "survived", "not applicable"
TEST_TIMEOUT_S = 120

# What a checkout holds beside the tree itself.
_NOT_COPIED = frozenset({".git", ".hypothesis", "build", "lem.pyz", "results", "state"})


@dataclass(frozen=True)
class Place:
    """Where a bug is planted.

    Attributes:
        function: the qualified name of a function, class or constant, without its module. A `file.py:` before it
            chooses among several; it counts only where that file has the place.
        snippet: source within it, once; runs of white space match each other.
        replacement: what stands there instead.
    """

    function: str
    snippet: str
    replacement: str


@dataclass(frozen=True)
class Bug:
    """One planted bug, and the tests that may catch it: files of the old tree, then of the new one."""

    name: str
    package: str
    places: tuple[Place, ...]
    tests: tuple[str, ...] = ()

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Bug:
        """The bug that an entry of planted.yaml declares."""
        renewed = document.get("new") or {}
        places = [Place(found["in"], found["old"], found["bug"]) for found in (document, {**document, **renewed})]
        places += [replace(place, function=place.function.rpartition(":")[2]) for place in places]
        tests = (*document.get("tests", ()), *renewed.get("tests", ()))
        return cls(document["name"], document["package"], tuple(dict.fromkeys(places)), tests)

    def tests_in(self, tree: Path) -> tuple[str, ...]:
        """Its test files that are there; else the unit tests of its package."""
        there = tuple(name for name in self.tests if (tree / name).exists())
        folders = (f"tests/unit/{name}" for name in (self.package, NEW_NAMES.get(self.package, "")) if name)
        loose = (path.relative_to(tree).as_posix() for path in sorted(tree.glob("tests/unit/test_*.py")))
        return there or tuple(name for name in folders if (tree / name).is_dir()) or tuple(loose)


@dataclass(frozen=True)
class Planted:
    """A file with a bug in it."""

    path: Path
    sound: str
    text: str


def read_bugs(file: Path = BUGS_FILE) -> tuple[Bug, ...]:
    """The declared bugs."""
    return tuple(Bug.of(document) for document in yaml.safe_load(file.read_text(encoding="utf-8")))


def find(bug: Bug, known: Mapping[str, Module]) -> Planted | str:
    """The bug in the first of its places that the modules have once; else what is wrong with them."""
    told = []
    for place in bug.places:
        found = list(_matches(place, known.values()))
        if len(found) == 1:
            module, start, end = found[0]
            text = module.text[:start] + place.replacement + module.text[end:]
            ast.parse(text)
            return Planted(module.path, module.text, text)
        told.append(f"{place.function} has its snippet {len(found)} times")
    return "; ".join(told)


def _matches(place: Place, known: Iterable[Module]) -> Iterator[tuple[Module, int, int]]:
    file, _, name = place.function.rpartition(":")
    snippet = re.compile(r"\s+".join(map(re.escape, place.snippet.split())))
    for module in known:
        if module.path.name.endswith(file) and name.rpartition(".")[2] in module.text:
            begins = [0]
            for line in module.text.splitlines(keepends=True):
                begins.append(begins[-1] + len(line))
            for node in _named(module, name):
                start, end = begins[node.lineno - 1], begins[node.end_lineno or node.lineno]
                for found in snippet.finditer(module.text, start, end):
                    yield module, found.start(), found.end()


def _named(module: Module, name: str) -> Iterator[ast.stmt]:
    yield from (node for qualified, node in definitions(module.tree) if qualified == name)
    for node in module.tree.body:
        if name in assigned(node):
            yield node


@dataclass
class Planter:
    """A copy of a tree in which bugs are planted and removed again."""

    folder: Path
    options: Sequence[str] = ()
    _writes: int = 0
    _sound: dict[tuple[str, ...], str] = field(default_factory=dict)

    @functools.cached_property
    def _modules(self) -> Mapping[str, Module]:
        return modules(self.folder, "lem")

    def outcome(self, bug: Bug) -> tuple[str, str]:
        """What became of a bug, and why or by which tests."""
        planted = find(bug, self._modules)
        if isinstance(planted, str):
            return NOT_APPLICABLE, planted
        tests = bug.tests_in(self.folder)
        if tests not in self._sound:
            self._sound[tests] = self._run(tests)
        if self._sound[tests]:
            return NOT_APPLICABLE, f"{' '.join(tests)} fails without the bug: {self._sound[tests]}"
        try:
            self._write(planted.path, planted.text)
            failed = self._run(tests)
        finally:
            self._write(planted.path, planted.sound)
        return (CAUGHT, failed) if failed else (SURVIVED, " ".join(tests))

    def _write(self, path: Path, text: str) -> None:
        # Python takes compiled code to be current by time in seconds and size: no two versions have the same time.
        path.write_text(text, encoding="utf-8")
        self._writes += 1
        at = int(time.time()) - 10_000_000 + self._writes
        os.utime(path, (at, at))

    def _run(self, tests: Sequence[str]) -> str:
        """The first test that failed; empty when all passed."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
        command += ["-o", f"timeout={TEST_TIMEOUT_S}", *self.options, *tests]
        environment = {**os.environ, "PYTHONPATH": ""}
        finished = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode == 0:
            return ""
        lines = [line for line in finished.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return lines[0][:200] if lines else f"pytest exited with {finished.returncode}"


def plant(tree: Path, bugs: Sequence[Bug], output: Path | None, options: Sequence[str] = ()) -> int:
    """0; every outcome is printed as soon as it is known, and written to `output`, which keeps those it has."""
    outcomes = _earlier(output)
    with tempfile.TemporaryDirectory(prefix="lem-planted-") as scratch:
        folder = Path(scratch, "tree")
        shutil.copytree(tree, folder, ignore=functools.partial(_left_out, tree), symlinks=True)
        planter = Planter(folder, options)
        for bug in bugs:
            began_s = time.monotonic()
            result, told = planter.outcome(bug)
            outcomes[bug.name] = {"result": result, "package": bug.package, "told": told}
            print(f"{result:<15} {time.monotonic() - began_s:6.1f} s  {bug.name}: {told}", flush=True)
            if output is not None:
                output.write_text(json.dumps(outcomes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for line in totals(outcomes):
        print(line)
    return 0


def _earlier(output: Path | None) -> dict[str, dict[str, str]]:
    if output is None or not output.exists():
        return {}
    declared = {bug.name for bug in read_bugs()}
    outcomes: dict[str, dict[str, str]] = json.loads(output.read_text(encoding="utf-8"))
    return {name: outcome for name, outcome in outcomes.items() if name in declared}


def _left_out(tree: Path, folder: str, names: Iterable[str]) -> set[str]:
    caches = {name for name in names if name == "__pycache__" or name.endswith("_cache")}
    return caches | _NOT_COPIED if Path(folder) == tree else caches


def totals(outcomes: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """A line for each package, and one for all."""
    counted = Counter((outcome["package"], outcome["result"]) for outcome in outcomes.values())
    counted.update(("all", outcome["result"]) for outcome in outcomes.values())
    for package in (*sorted({outcome["package"] for outcome in outcomes.values()}), "all"):
        numbers = (f"{counted[package, result]} {result}" for result in (CAUGHT, SURVIVED, NOT_APPLICABLE))
        yield f"{package:<15} {', '.join(numbers)}"


def compare(old: Path, new: Path) -> int:
    """1 when the new tests catch fewer bugs; each bug that only the old ones catch is named."""
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (old, new))
    for name, outcome in before.items():
        result = after.get(name, {"result": NOT_APPLICABLE, "told": "not planted"})
        if outcome["result"] == CAUGHT != result["result"]:
            print(f"{result['result']}: {name}: {result['told']}")
    caught = [sum(outcome["result"] == CAUGHT for outcome in outcomes.values()) for outcomes in (before, after)]
    print(f"caught: {caught[0]} of {len(before)} by the old tests, {caught[1]} of {len(after)} by the new ones")
    return int(caught[1] < caught[0])
