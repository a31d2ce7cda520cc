"""The importer of lem.pyz: the same program with and without its cache, which only its owner can have written."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lem.base.importer import FOLDER, CodeCache
from tests.unit.test_build import ROOT, build

Lem = Callable[..., subprocess.CompletedProcess[str]]
TIMEOUT_S = 60
# Which modules are compiled by this process, and not read from the cache.
COMPILED = """
import runpy, sys
compiled = []
sys.addaudithook(lambda event, args: compiled.append(str(args[1])) if event == "compile" and args[0] else None)
archive, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = archive
try:
    runpy.run_path(archive, run_name="__main__")
finally:
    print(*(name for name in compiled if "lem.pyz/lem/cli" in name), file=sys.stderr)
"""


@pytest.fixture
def lem(tmp_path: Path) -> Lem:
    """Runs lem.pyz with a cache of its own; the program in `compiled` says which of lem's commands it compiled."""
    assert build(ROOT, tmp_path / "lem.pyz").returncode == 0

    def run(*words: str, python: tuple[str, ...] = (), **environ: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LEM_"))}
        environ = {**inherited, "XDG_CACHE_HOME": str(tmp_path / "cache"), **environ}
        command = [sys.executable, *python, "-c", COMPILED, str(tmp_path / "lem.pyz"), *words]
        return subprocess.run(
            command, capture_output=True, text=True, env=environ, cwd=tmp_path, timeout=TIMEOUT_S, check=False
        )

    return run


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache" / "lem").rglob("*") if path.is_file())


def test_a_module_is_compiled_once_and_the_next_command_compiles_nothing(lem: Lem, tmp_path: Path) -> None:
    first = lem("status", "--help")
    names = [Path(name).name for name in first.stderr.split()]
    assert {"main.py", "status.py", "options.py"} <= set(names)
    assert len(names) == len(set(names))
    second = lem("status", "--help")
    assert (second.returncode, second.stdout, second.stderr.split()) == (0, first.stdout, [])
    other = lem("gpus", "--help")
    assert "main.py" not in {Path(name).name for name in other.stderr.split()}
    (file,) = kept(tmp_path)
    assert (file.parent.name, file.stat().st_mode & 0o777) == (FOLDER, 0o600)
    assert file.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["index", "code", "cut", "empty", "shared", "link"])
def test_a_file_that_may_not_be_its_own_is_not_run(lem: Lem, tmp_path: Path, damage: str) -> None:
    whole = lem("status", "--help")
    (file,) = kept(tmp_path)
    data = bytearray(file.read_bytes())
    if damage in ("index", "code"):
        data[40 if damage == "index" else len(data) - 40] ^= 1
        file.write_bytes(data)
    elif damage in ("cut", "empty"):
        file.write_bytes(data[: len(data) // 2 if damage == "cut" else 0])
    elif damage == "shared":
        file.chmod(0o622)
    else:
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    again = lem("status", "--help")
    assert (again.returncode, again.stdout) == (0, whole.stdout)
    names, rest = set(whole.stderr.split()), set(again.stderr.split())
    assert rest < names if damage in ("code", "cut") else rest == names
    assert lem("status", "--help").stderr.split() == []  # it was replaced


def test_another_program_at_the_same_place_has_its_own_code(lem: Lem, tmp_path: Path) -> None:
    first = lem("--version")
    path = tmp_path / "lem.pyz"
    version = first.stdout.strip().removeprefix("lem ")
    import zipfile

    with zipfile.ZipFile(path) as archive:
        members = {item.filename: archive.read(item) for item in archive.infolist()}
    name = "lem/base/__init__.py"
    members[name] = members[name].replace(version.encode(), b"9" * len(version))
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    assert lem("--version").stdout == f"lem {'9' * len(version)}\n"


@pytest.mark.parametrize("reason", ["variable", "option", "unwritable", "no home"])
def test_nothing_is_kept_where_that_is_not_wanted_or_not_possible(lem: Lem, tmp_path: Path, reason: str) -> None:
    place = tmp_path / "cache"
    if reason == "unwritable":
        place.write_text("a file")
    environ = {
        "variable": {"PYTHONDONTWRITEBYTECODE": "1"},
        "no home": {"XDG_CACHE_HOME": "", "HOME": "relative"},
    }.get(reason, {})
    ended = lem("status", "--help", python=("-B",) if reason == "option" else (), **environ)
    assert ended.returncode == 0
    assert kept(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} <= {"lem.pyz", "cache"}


def test_an_error_names_the_line_of_the_source(lem: Lem, tmp_path: Path) -> None:
    code = """
import sys, traceback
sys.path.insert(0, sys.argv[1])
from lem.base import importer
importer.install(sys.argv[1])
from lem.base.units import parse_duration
import inspect
print(inspect.getsource(parse_duration).splitlines()[0])
try:
    parse_duration("soon")
except ValueError:
    traceback.print_exc()
"""
    path = tmp_path / "lem.pyz"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    assert ended.stdout == "def parse_duration(text: str) -> float:\n"
    assert f'File "{path}/lem/base/units.py", line ' in ended.stderr
    assert 'raise ValueError(f"{text!r} is not a duration' in ended.stderr


def test_the_same_file_is_read_by_another_spelling_of_its_path(lem: Lem, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LEM_"))}
    environ = {**inherited, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for place, name in ((folder, "../lem.pyz"), (tmp_path, "lem.pyz")):
        ended = subprocess.run(
            [sys.executable, name, "presets"], cwd=place, env=environ, capture_output=True, text=True, check=False
        )
        assert (ended.returncode, ended.stderr) == (0, "")
    assert len(kept(tmp_path)) == 2


@pytest.mark.parametrize("is_link", [False, True])
def test_the_newest_code_is_kept_and_only_a_folder_of_its_own_is_tidied(
    lem: Lem, tmp_path: Path, is_link: bool
) -> None:
    folder = tmp_path / "cache/lem" / FOLDER
    place = tmp_path / "elsewhere" if is_link else folder
    place.mkdir(parents=True, mode=0o700)
    if is_link:
        folder.parent.mkdir(parents=True)
        folder.symlink_to(place)
    older = [f".{'0' * 16}-a70d0d0a.17", f"{'1' * 16}-a70d0d0a", f"{'2' * 16}-cb0d0d0a", f"{'3' * 16}-a70d0d0a"]
    names = ["notes.txt", *older]
    for number, name in enumerate(names):
        (place / name).touch()
        written_s = number if name != older[-1] else 2**33  # before the clock was set back
        os.utime(place / name, (written_s, written_s))
    assert lem("--version").returncode == 0
    left = {path.name for path in place.iterdir()}
    if is_link:
        assert left == set(names)
    else:
        assert left & set(names) == {"notes.txt", *older[-2:]}
        assert len(left) == 4


def test_what_cannot_be_written_whole_leaves_nothing(lem: Lem, tmp_path: Path) -> None:
    ended = subprocess.run(
        ["sh", "-c", f"ulimit -f 20; exec {sys.executable} lem.pyz --version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert kept(tmp_path) == []


def test_an_unpacked_lem_pyz_runs_without_the_importer(lem: Lem, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "lem.pyz") as archive:
        archive.extractall(tmp_path / "unpacked")
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-B", str(tmp_path / "unpacked"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == lem("--version", PYTHONDONTWRITEBYTECODE="1").stdout
    assert not kept(tmp_path)


def test_a_pipe_in_its_place_is_not_waited_for(lem: Lem, tmp_path: Path) -> None:
    lem("--version")
    (file,) = kept(tmp_path)
    file.unlink()
    os.mkfifo(file)
    assert lem("--version").returncode == 0


def test_nothing_is_kept_of_a_zip_that_was_replaced_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "lem.pyz"
    path.write_bytes(b"the first one")
    cache = CodeCache(str(path), str(tmp_path / FOLDER))
    cache.add("module", compile("1", "name", "eval"))
    path.write_bytes(b"another one")
    cache.save()
    assert not (tmp_path / FOLDER).exists()
    path.write_bytes(b"the first one")
    cache.save()
    assert len(list((tmp_path / FOLDER).iterdir())) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_root_keeps_nothing_in_the_home_of_another_user(lem: Lem, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    assert lem("--version", XDG_CACHE_HOME="", HOME=str(home)).returncode == 0
    assert list(home.iterdir()) == []
