"""What a machine cannot run is skipped and said; in CI a mandatory need that is missing is told by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.integration.test_vllm_in_the_lab import SUITE
from tests.needs import NEEDS, _package

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120


def run_pytest(folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    """Pytest with the project's conftest on one file."""
    test = folder / "test_example.py"
    test.write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    command += ["-p", "tests.conftest", "-p", "no:cacheprovider", "--noconftest", str(test)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_skips_are_listed_at_the_end_with_their_reason_apart_from_what_ran_elsewhere(tmp_path: Path) -> None:
    source = """
import pytest
def test_that_runs(): pass
@pytest.mark.skipif(True, reason="no such machine")
def test_first(): raise AssertionError
def test_second(): pytest.skip("no such machine")
def test_elsewhere(record_property):
    nodeids = ["test_example.py::test_engine[one - a]", "test_example.py::test_of_another_file"]
    record_property("ran_elsewhere", ("the lab", nodeids))
def test_failing_elsewhere(record_property):
    record_property("ran_elsewhere", ("the lab", ["test_example.py::test_engine[fails there]"]))
    raise AssertionError
@pytest.mark.parametrize("name", ["one - a", "fails there", "other"])
def test_engine(name): pytest.skip("no engine here")
"""
    finished = run_pytest(tmp_path, source)
    assert finished.returncode == 1, finished.stdout
    lines = finished.stdout.splitlines()
    (elsewhere,) = (index for index, line in enumerate(lines) if " RUN IN ANOTHER ENVIRONMENT: 2 tests " in line)
    assert lines[elsewhere + 1] == "    2  the lab"
    assert " NOT RUN ON THIS MACHINE: 3 tests " in lines[elsewhere + 2]
    assert lines[elsewhere + 3 : elsewhere + 5] == ["    2  no such machine", "    1  no engine here"]


def test_every_package_that_make_test_is_said_to_install_is_in_its_requirements() -> None:
    requirements = (ROOT / "tests/requirements.txt").read_text(encoding="utf-8")
    pinned = set(re.findall(r"^([\w-]+)(?:\[\w+\])?==", requirements, re.MULTILINE))
    probes = [need.probe for need in NEEDS.values()]
    packages = {item.args[0] for item in probes if isinstance(item, partial) and item.func is _package}
    assert packages == {"coverage", "datasets", "torch", "transformers"}
    assert packages <= pinned


def test_tests_that_need_vllm_are_run_by_the_lab() -> None:
    """The reason that their skip gives holds only as long as that file runs each of them."""
    marked = {
        path.name
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"needs\([^)]*\"vllm\"", path.read_text(encoding="utf-8"))
    }
    assert marked == set(SUITE)
