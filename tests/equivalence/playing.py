"""Scenes played by a build, in one process of its own; what the old build did is kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.equivalence.builds import BUILD, OLD_COMMIT, Build, HarnessError
from tests.equivalence.scenes import Scene

DRIVER = Path(__file__).with_name("driver.py")

Outcomes = dict[str, list[dict[str, Any]]]


class AnyScene(Protocol):
    """A scene of any suite.

    Attributes:
        commands: for people; one for each outcome.
    """

    @property
    def name(self) -> str: ...
    @property
    def files(self) -> Mapping[str, Any]: ...
    @property
    def may_change(self) -> bool: ...
    @property
    def commands(self) -> tuple[str, ...]: ...
    def to_json(self) -> str:
        """What it is made of."""


def play_forked(build: Build, scenes: Sequence[Scene]) -> Outcomes:
    """The outcome of each step of every scene, by the scene's name.

    Raises:
        HarnessError: the driver ended early.
    """
    # The same length for every run: messages are wrapped at a column, and may name a file by its full path.
    root = Path(tempfile.mkdtemp(prefix="equivalence-"))
    try:
        program = root / "lem.pyz"
        shutil.copyfile(build.zip, program)
        (root / "scenes").write_text("".join(scene.to_json() + "\n" for scene in scenes), encoding="utf-8")
        command = [sys.executable, "-B", str(DRIVER), *map(str, (program, root / "scenes", root / "outcomes", root))]
        done = subprocess.run(command, env=environment(root), stdin=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise HarnessError(f"{build.zip}: the driver ended with exit code {done.returncode}")
        lines = (root / "outcomes").read_text(encoding="utf-8").splitlines()
        return dict(json.loads(line) for line in lines)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def environment(root: Path) -> dict[str, str]:
    """What commands see: nothing of this machine's settings, no Docker, a clock in UTC."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(root / "home"),
        "TMPDIR": str(root / "tmp"),
        "LEM_LOCK_DIR": str(root / "locks"),
        "LEM_CACHE_DIR": str(root / "home" / "cache"),
        "DOCKER_HOST": "unix:///nonexistent/docker.sock",
        "COLUMNS": "80",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "HF_HUB_OFFLINE": "1",
    }


def play_kept(
    suite: str, build: Build, scenes: Sequence[AnyScene], play: Callable[[Build, Sequence[Any]], Outcomes]
) -> Outcomes:
    """The outcomes of the old build; a scene that it has played before is not played again."""
    driver = _digest(DRIVER.read_bytes(), sys.version.encode())
    kept_path = BUILD / f"old-{OLD_COMMIT[:7]}" / f"{suite}-{driver}.json"
    kept: Outcomes = json.loads(kept_path.read_text(encoding="utf-8")) if kept_path.exists() else {}
    keys = {scene.name: _key(scene) for scene in scenes}
    missing = [scene for scene in scenes if scene.may_change or keys[scene.name] not in kept]
    played = play(build, missing) if missing else {}
    kept.update({keys[name]: outcomes for name, outcomes in played.items()})
    if missing:
        kept_path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept_path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(kept), encoding="utf-8")
        unfinished.replace(kept_path)
    return {name: kept[key] for name, key in keys.items()}


def _key(scene: AnyScene) -> str:
    """A digest of everything that the scene is made of, copied files included."""
    return _digest(scene.to_json().encode(), *_copied(scene.files))


def _copied(files: Mapping[str, Any]) -> Iterable[bytes]:
    for content in files.values():
        if isinstance(content, dict) and "copy" in content:
            path = Path(content["copy"])
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                yield str(file.relative_to(path)).encode()
                yield file.read_bytes() if file.is_file() else b""


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:24]
