"""The linters run with the tests, by the rules of pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 280


BANDIT = ("bandit", "--quiet", "--configfile", "pyproject.toml", "--recursive", "lem", "lem.pyz-build", "examples")


@pytest.mark.parametrize(
    "arguments", [("ruff", "check"), ("ruff", "format", "--check"), ("mypy",), BANDIT], ids=" ".join
)
def test_linter_finds_nothing(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
