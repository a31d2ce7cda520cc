"""The programs that benchmarks compare: lem.pyz as the first build (524ec81) makes it, and as another tree does."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLD_COMMIT = "524ec812cc1bf80f2de91037c5c71a564ab2e100"
BUILD = ROOT / "build" / "bench"
WHEELS = ROOT / "build" / "vendor"
PYZ = ROOT / "lem.pyz"  # of `make bench`
OLD_TREE = BUILD / f"old-{OLD_COMMIT[:7]}" / "tree"


class BuildError(Exception):
    """Why there is nothing to compare."""


@dataclass(frozen=True)
class Build:
    """A lem.pyz and the tree that it was built from, whose test doubles fit it."""

    zip: Path
    tree: Path

    @property
    def is_first(self) -> bool:
        return self.tree == OLD_TREE

    @property
    def digest(self) -> str:
        """SHA-256 of the zip."""
        return hashlib.sha256(self.zip.read_bytes()).hexdigest()


@functools.cache
def old_build() -> Build:
    """The build of the old commit, made once.

    Raises:
        BuildError: the commit is not in this repository, or its build failed.
    """
    if not OLD_TREE.exists():
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", OLD_COMMIT], capture_output=True, check=False)
        if archive.returncode != 0:
            raise BuildError(
                f"commit {OLD_COMMIT[:7]} is not available here, so there is no old build to compare with; "
                "fetch the complete history (git fetch --unshallow)\n"
                f"git: {archive.stderr.decode(errors='replace').strip()}"
            )
        unfinished = OLD_TREE.with_name(f"tree.{os.getpid()}")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(unfinished, filter="data")
        unfinished.rename(OLD_TREE)
    return build_of(OLD_TREE, OLD_TREE.with_name("lem.pyz"))


def build_of(tree: Path, zip_path: Path) -> Build:
    """The zip of a tree, built by that tree's own tool.

    Raises:
        BuildError: the build failed.
    """
    zip_path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(tree / "lem.pyz-build" / "build.py"), f"--output={zip_path}", f"--cache={WHEELS}"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0:
        raise BuildError(f"{tree}: lem.pyz could not be built\n{built.stdout}{built.stderr}")
    return Build(zip_path, tree)
