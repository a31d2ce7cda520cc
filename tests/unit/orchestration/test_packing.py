"""The lem.pyz that containers run, packed from the folder that lem runs from here."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lem import __version__
from lem.base.errors import UserError
from lem.base.variables import cache_folder
from lem.orchestration.packing import provide_pyz
from tests.pythons import find_pythons

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return provide_pyz({"LEM_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))})


def ask(python: str, pyz: Path, *arguments: str) -> str:
    # -I -S: nothing that is installed here helps.
    command = [python, "-I", "-S", str(pyz), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=pyz.parent)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_it_runs_with_nothing_installed(pyz: Path, tmp_path: Path) -> None:
    for python in [item for item in find_pythons() if item.is_supported]:
        assert ask(str(python.path), pyz, "--version") == f"lem {__version__}\n"
    (tmp_path / "e.yaml").write_text("model: gpt2\n")
    ask(sys.executable, pyz, "config", "validate", str(tmp_path / "e.yaml"))
    assert json.loads(ask(sys.executable, pyz, "gpus", "--json"))["error"] != "pynvml is not installed"
    assert ask(sys.executable, pyz, "compose") == (ROOT / "docker" / "docker-compose.yml").read_text()


def test_the_same_program_is_packed_once_alone_into_the_same_bytes(pyz: Path, tmp_path: Path) -> None:
    assert provide_pyz({"LEM_CACHE_DIR": str(pyz.parents[2])}) == pyz
    elsewhere = provide_pyz({"LEM_CACHE_DIR": str(tmp_path)})
    assert elsewhere.parent.name == pyz.parent.name
    assert elsewhere.read_bytes() == pyz.read_bytes()
    assert [path.name for path in pyz.parent.iterdir()] == ["lem.pyz"]
    assert stat.S_IMODE(pyz.parent.stat().st_mode) & 0o555 == 0o555
    assert stat.S_IMODE(pyz.stat().st_mode) & 0o444 == 0o444
    names = zipfile.ZipFile(pyz).namelist()
    assert not [name for name in names if name.endswith((".pyc", ".so")) or "__pycache__" in name]


def _truncated(path: Path) -> None:
    os.truncate(path, 1000)


def _of_the_same_size(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)


def _longer(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"more")


def _linked(path: Path) -> None:
    path.rename(path.parent.parent / "evil")
    path.symlink_to(path.parent.parent / "evil")


def _piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _open_to_the_group(path: Path) -> None:
    path.chmod(0o664)


def _in_a_folder_open_to_all(path: Path) -> None:
    path.parent.chmod(0o777)
    _of_the_same_size(path)


@pytest.mark.parametrize(
    "change",
    [_truncated, _of_the_same_size, _longer, _linked, _piped, _open_to_the_group, _in_a_folder_open_to_all],
)
def test_a_copy_that_was_changed_is_written_again(
    pyz: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[Path], None]
) -> None:
    environ = {"LEM_CACHE_DIR": str(tmp_path)}
    path = provide_pyz(environ)
    with path.open("rb") as old:  # open, so that its inode is not used again
        change(path)
        assert provide_pyz(environ) == path
        assert path.read_bytes() == pyz.read_bytes()
        assert path.lstat().st_ino != os.fstat(old.fileno()).st_ino, "who has the old one open could still write to it"
    for item, mode in ((path, 0o100644), (path.parent, 0o40755), (path.parent.parent, 0o40755)):
        assert (item.lstat().st_mode, item.stat().st_uid) == (mode, os.geteuid())
    assert "was changed" in caplog.text
    caplog.clear()
    assert provide_pyz(environ) == path
    assert caplog.text == ""


@pytest.mark.parametrize("depth", [0, 1])
def test_a_folder_of_another_user_is_refused(tmp_path: Path, depth: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, who can give a folder to another user")
    path = provide_pyz({"LEM_CACHE_DIR": str(tmp_path)})
    os.chown(path.parents[depth], 12345, 12345)
    with pytest.raises(UserError, match="expected a folder of your own") as caught:
        provide_pyz({"LEM_CACHE_DIR": str(tmp_path)})
    assert "LEM_CACHE_DIR" in caught.value.hint


def test_a_cache_in_which_everyone_can_replace_folders_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(UserError, match="every user can replace files"):
        provide_pyz({"LEM_CACHE_DIR": str(tmp_path)})
    assert list(tmp_path.rglob("*.pyz")) == []
    tmp_path.chmod(0o1777)  # as /tmp
    assert provide_pyz({"LEM_CACHE_DIR": str(tmp_path)}).is_file()


def test_a_zip_that_runs_is_copied_as_it_is(pyz: Path, tmp_path: Path) -> None:
    own = tmp_path / "my-lem.pyz"
    shutil.copy(pyz, own)
    program = (
        f"import sys; sys.path.insert(0, {str(own)!r})\n"
        "from lem.orchestration.packing import provide_pyz\n"
        f"print(provide_pyz({{'LEM_CACHE_DIR': {str(tmp_path / 'cache')!r}}}))\n"
    )
    command = [sys.executable, "-I", "-S", "-c", program]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout.strip()
    assert Path(printed).read_bytes() == own.read_bytes()
    assert Path(printed).name == "lem.pyz"


def test_a_cache_that_cannot_be_written_is_told_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        provide_pyz({"LEM_CACHE_DIR": str(tmp_path / "file")})
    assert "LEM_CACHE_DIR" in caught.value.hint


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"LEM_CACHE_DIR": "/a"}, "/a"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/lem"),
        ({}, str(Path("~/.cache/lem").expanduser())),
    ],
)
def test_the_cache_is_where_it_is_told_to_be(environ: dict[str, str], folder: str) -> None:
    assert str(cache_folder(environ)) == folder
