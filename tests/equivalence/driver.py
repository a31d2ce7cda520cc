"""Runs command lines of one build in one interpreter, each in a forked child, and writes down what each did.

    python driver.py ZIP SCENES OUTCOMES ROOT

A program of its own, standard library alone: the only part of lem that it knows is `lem.__main__.run`. What a command
imported is imported by the parent before the next fork, so that a command takes milliseconds and still starts from
fresh state.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import importlib
import io
import json
import os
import shutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CRASHED = 99
TIMEOUT_S = 120
PLACEHOLDER = "<root>"


def main(zip_path: str, scenes_path: str, outcomes_path: str, root: str) -> None:
    """Play every scene of a file, and write one line for each."""
    sys.path.insert(0, zip_path)
    for name in ("home", "tmp", "locks"):
        Path(root, name).mkdir(parents=True, exist_ok=True)
    with open(scenes_path, encoding="utf-8") as scenes, open(outcomes_path, "w", encoding="utf-8") as outcomes:
        for line in scenes:
            scene = json.loads(line)
            outcomes.write(json.dumps([scene["name"], play(scene, Path(root))]) + "\n")


def play(scene: Mapping[str, Any], root: Path) -> list[dict[str, Any]]:
    """The outcome of each step of a scene, in a new folder."""
    folder = root / "scene"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_files(scene["files"], folder)
    outcomes, before = [], snapshot(folder)
    for words in scene["steps"]:
        code, out, err = run_forked(words, folder, root, scene.get("environ", {}))
        after = snapshot(folder)
        changed = {name: after.get(name) for name in sorted({*before, *after}) if before.get(name) != after.get(name)}
        before = after
        outcome = {"code": code, "out": out, "err": err, "files": changed}
        outcomes.append(json.loads(json.dumps(outcome).replace(str(root), PLACEHOLDER)))
    return outcomes


def write_files(files: Mapping[str, Any], folder: Path) -> None:
    """Lay out files: a text, `{"base64": …}`, or `{"copy": path}` of a file or folder elsewhere."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8", newline="")
        elif "base64" in content:
            path.write_bytes(base64.b64decode(content["base64"]))
        elif Path(content["copy"]).is_dir():
            shutil.copytree(content["copy"], path, dirs_exist_ok=True)
        else:
            shutil.copyfile(content["copy"], path)


def run_forked(
    words: Sequence[str], folder: Path, root: Path, environ: Mapping[str, str]
) -> tuple[int | None, str, str]:
    """Exit code (None: it did not end in time), stdout and stderr of one command line."""
    out_path, err_path, modules_path = root / "stdout", root / "stderr", root / "modules"
    modules_path.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        run_child(words, folder, root, environ)
    _, status = os.waitpid(pid, 0)
    if modules_path.exists():
        for name in modules_path.read_text().split():
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    out, err = (path.read_bytes().decode("utf-8", "backslashreplace") for path in (out_path, err_path))
    return os.waitstatus_to_exitcode(status), out, err


def run_child(words: Sequence[str], folder: Path, root: Path, environ: Mapping[str, str]) -> None:
    """Be the command; does not return."""
    code = CRASHED
    try:
        import signal

        signal.alarm(TIMEOUT_S)
        os.chdir(folder)
        os.environ.update(environ)
        for number, name in enumerate(("stdout", "stderr"), 1):
            descriptor = os.open(root / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(descriptor, number)
            os.close(descriptor)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for number, name in enumerate(("stdout", "stderr"), 1):  # new ones: the parent's have its own settings
            stream = io.TextIOWrapper(open(number, "wb", closefd=False), encoding="utf-8", line_buffering=number == 2)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        known = set(sys.modules)
        sys.argv = [str(root / "lem.pyz"), *words]
        try:
            from lem.__main__ import run  # the one name of the program that is known here

            code = run()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        sys.stdout.flush()
        new = [name for name in sys.modules if name not in known and sys.modules[name] is not None]
        Path(root, "modules").write_text("\n".join(name for name in new if name.split(".")[0] == "lem"))
    except BaseException:  # noqa: BLE001 - the top of a program, whose failure is an outcome too
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def snapshot(folder: Path) -> dict[str, Any]:
    """The content of every file below a folder: text, or a digest of bytes that are none; compressed text as text."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = {"link": str(path.readlink())}
        elif path.is_file():
            data = path.read_bytes()
            with contextlib.suppress(OSError, EOFError):
                data = gzip.decompress(data) if name.endswith(".gz") else data
            try:
                found[name] = data.decode("utf-8")
            except UnicodeDecodeError:
                found[name] = {"sha256": hashlib.sha256(data).hexdigest()}
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
