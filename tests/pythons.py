"""The Pythons on this machine, to try the program on each."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OLDEST_SUPPORTED = (3, 10)
NAMES = ("python3", "python2.7", *(f"python3.{minor}" for minor in range(6, 21)))
# Readable by every Python there is.
DESCRIBE = (
    "import platform, sys; "
    "sys.stdout.write('%s %s %s' % (platform.python_implementation(), platform.python_version(), sys.executable))"
)


@dataclass(frozen=True)
class Python:
    """One interpreter; `version` is (major, minor, micro)."""

    path: Path
    version: tuple[int, ...]

    @property
    def is_supported(self) -> bool:
        return self.version >= OLDEST_SUPPORTED

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


@functools.cache
def find_pythons() -> tuple[Python, ...]:
    """One CPython of each version on this machine, oldest first: on PATH, and kept by pyenv where there is one."""
    by_version: dict[tuple[int, ...], Python] = {}
    for path in (Path(sys.executable), *_on_path(), *_kept_by_pyenv()):
        python = _describe(path)
        if python is not None:
            by_version.setdefault(python.version, python)
    return tuple(by_version[version] for version in sorted(by_version))


def _on_path() -> Iterator[Path]:
    for name in NAMES:
        found = shutil.which(name)
        if found and Path(found).parent.name != "shims":  # of pyenv: slow, and what they start is found below
            yield Path(found)


def _kept_by_pyenv() -> Iterator[Path]:
    program = shutil.which("pyenv")
    root = os.environ.get("PYENV_ROOT") or (_output([program, "root"]) if program else None)
    if root:
        yield from sorted(Path(root).glob("versions/*/bin/python"))


def _describe(path: Path) -> Python | None:
    """The interpreter at a path; None for no CPython, or one that does not start (a shim of a version not chosen)."""
    answer = _output([str(path), "-c", DESCRIBE])
    if answer is None or not answer.startswith("CPython "):
        return None
    _, version, executable = answer.split(maxsplit=2)
    return Python(Path(executable), tuple(int(part) for part in version.split(".") if part.isdigit()))


def _output(command: list[str]) -> str | None:
    try:
        finished = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except OSError:
        return None
    return finished.stdout.decode().strip() if finished.returncode == 0 else None
