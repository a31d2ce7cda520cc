"""The virtual environments of make: filled once for a list of requirements, and kept while they work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pythons import find_pythons

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "lem.pyz-build" / "environment.py"
TIMEOUT_S = 120
NOTHING = "# nothing, so that no network is needed\n"


def fill(folder: Path, requirements: Path, python: Path | str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [str(python), str(SCRIPT), str(folder), str(requirements)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An environment, and its requirements."""
    folder = tmp_path_factory.mktemp("made")
    requirements = folder / "requirements.txt"
    requirements.write_text(NOTHING, encoding="utf-8")
    first = fill(folder / "env", requirements)
    assert first.returncode == 0, first.stderr
    assert "creating a virtual environment" in first.stdout
    return folder / "env", requirements


def test_environment_is_made_once_and_filled_again_only_for_other_requirements(made: tuple[Path, Path]) -> None:
    folder, requirements = made
    mark = folder / "what a person installed"
    mark.touch()
    again = fill(folder, requirements)
    assert (again.returncode, again.stdout) == (0, "")
    requirements.write_text(NOTHING * 2, encoding="utf-8")
    other = fill(folder, requirements)
    assert other.returncode == 0, other.stderr
    assert "installing" in other.stdout
    assert "creating" not in other.stdout
    assert mark.exists()
    (folder / "bin" / "python").unlink()
    broken = fill(folder, requirements)
    assert broken.returncode == 0, broken.stderr
    assert "creating a virtual environment" in broken.stdout
    assert not mark.exists()


def test_environment_that_could_not_be_filled_is_tried_again(made: tuple[Path, Path], tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("./no-such-folder\n", encoding="utf-8")
    for _ in range(2):
        finished = fill(made[0], requirements)
        assert finished.returncode == 1
        assert "pip could not install" in finished.stderr
        assert "Traceback" not in finished.stderr


@pytest.mark.needs("old_python")
def test_old_python_gives_an_error_that_names_the_required_version(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(NOTHING, encoding="utf-8")
    for python in find_pythons():
        if (3, 7) <= python.version < (3, 10):
            finished = fill(tmp_path / "env", requirements, python.path)
            assert finished.returncode == 1
            assert "Python 3.10 or newer is required" in finished.stderr
            assert not (tmp_path / "env").exists()
