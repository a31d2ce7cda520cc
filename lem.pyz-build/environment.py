#!/usr/bin/env python3
"""Install a requirements file into a virtual environment, and create the environment if necessary.

    environment.py FOLDER REQUIREMENTS

The folder stores the hash of the requirements, so a second call does nothing. An existing environment is kept unless
its Python no longer runs: packages that you installed into it (a PyTorch for CUDA, for example) stay as long as they
satisfy the pins.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

OLDEST_PYTHON = (3, 10)
STAMP = "requirements.sha256"
PROBE_TIMEOUT_S = 60
INSTALL_TIMEOUT_S = 3600


class SetupError(Exception):
    """The environment cannot be set up; the message is for the user."""


def main() -> int:
    """Set up the environment and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the virtual environment")
    parser.add_argument("requirements", type=Path, help="a requirements file with pinned versions")
    args = parser.parse_args()
    try:
        fill(args.folder, args.requirements)
    except (SetupError, OSError) as error:
        print(f"{args.folder}: {error}", file=sys.stderr)
        return 1
    return 0


def fill(folder: Path, requirements: Path) -> None:
    """Install `requirements` into the environment `folder`.

    Raises:
        SetupError: this Python is too old or cannot create environments, or pip failed.
    """
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    python, stamp = folder / "bin" / "python", folder / STAMP
    is_usable = _succeeds([str(python), "-c", "import pip"], PROBE_TIMEOUT_S)
    if is_usable and stamp.is_file() and stamp.read_text(encoding="ascii").strip() == wanted:
        return
    if not is_usable:
        _create(folder)
    print(f"{folder}: installing {requirements}", flush=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)]
    if not _succeeds(command, INSTALL_TIMEOUT_S, is_shown=True):
        raise SetupError(f"pip could not install {requirements}; see its message above")
    stamp.write_text(wanted + "\n", encoding="ascii")


def _create(folder: Path) -> None:
    if sys.version_info < OLDEST_PYTHON:
        oldest, found = ".".join(map(str, OLDEST_PYTHON)), sys.version.split()[0]
        raise SetupError(
            f"Python {oldest} or newer is required, this is {found}; choose one: make PYTHON=python{oldest} …"
        )
    print(f"{folder}: creating a virtual environment for Python {sys.version.split()[0]}", flush=True)
    # In a subprocess, so that the output of venv and ours come in order.
    if not _succeeds([sys.executable, "-m", "venv", "--clear", str(folder)], INSTALL_TIMEOUT_S, is_shown=True):
        version = ".".join(map(str, sys.version_info[:2]))
        raise SetupError(
            "this Python cannot create virtual environments; on Debian and Ubuntu: "
            f"apt-get install python3-venv (or python{version}-venv)"
        )


def _succeeds(command: list[str], timeout_s: float, *, is_shown: bool = False) -> bool:
    """Whether the command exits with 0; False if the program is missing.

    Raises:
        SetupError: it does not finish within `timeout_s`.
    """
    sink = None if is_shown else subprocess.DEVNULL
    try:
        return subprocess.run(command, check=False, timeout=timeout_s, stdout=sink, stderr=sink).returncode == 0
    except (FileNotFoundError, PermissionError):
        return False
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"{command[0]} did not finish within {timeout_s:.0f} s") from error


if __name__ == "__main__":
    sys.exit(main())
