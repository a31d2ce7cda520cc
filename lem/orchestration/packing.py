"""The lem.pyz that containers run and bundles hold: the running program, in one file that only its owner can write."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import logging
import os
import stat
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import lem.base
from lem.base import durable
from lem.base.durable import reason_of
from lem.base.errors import UserError
from lem.base.importer import CACHE_VARIABLE
from lem.base.variables import cache_folder

PYZ_NAME = "lem.pyz"
_OTHER_CACHE = f"set {CACHE_VARIABLE} to another folder"

_logger = logging.getLogger(__name__)

_ENTRY = "import sys\n\nfrom lem.__main__ import run\n\nsys.exit(run())\n"
_FIRST_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can express

# The modules in the `_vendor` folder of lem.pyz; a lem outside of a zip finds them among the installed ones.
_VENDORED = ("yaml", "pynvml")


def provide_pyz(environ: Mapping[str, str] = os.environ) -> Path:
    """A lem.pyz of the running program, alone in a folder that only its owner can write; UserError if there is none."""
    # Its bytes are compared with the running program's at every call, and a file that differs is written again. The
    # folder's name is the hash of the file. So a container of another build is recreated, and a running one keeps its
    # file when lem.pyz is rebuilt: replacing a zip under a running program breaks its late imports, and the mount of a
    # single file would keep showing the old one.
    data = program_bytes()
    cache = cache_folder(environ)
    path = cache / "pyz" / hashlib.sha256(data).hexdigest() / PYZ_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _is_open_to_others(cache.stat()):
            raise UserError(f"every user can replace files in {cache}", f"chmod o-w {cache}, or {_OTHER_CACHE}")
        for folder in (path.parent.parent, path.parent):
            _protect(folder)
        if not _is_program(path, data):
            if os.path.lexists(path):
                _logger.warning("%s was changed by another program; it is written again", path)
            durable.write_bytes(path, data)
            path.chmod(0o644)  # readable for every user that a container may run as
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason_of(error)}", _OTHER_CACHE) from error
    return path


@functools.cache  # of what this process was started from
def program_bytes() -> bytes:
    archive = getattr(getattr(lem.__spec__, "loader", None), "archive", None)
    return _pack_sources() if archive is None else Path(archive).read_bytes()


def _is_open_to_others(found: os.stat_result) -> bool:
    """Whether every user can replace what is in a folder; in a sticky one (/tmp) only the owner can."""
    return bool(found.st_mode & stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX


def _protect(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, os.geteuid()):
        raise UserError(f"{folder}: expected a folder of your own", f"delete it, or {_OTHER_CACHE}")
    if found.st_mode & 0o022 or found.st_mode & 0o055 != 0o055:
        folder.chmod(0o755)


def _is_program(path: Path, data: bytes) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # missing, a link, or not readable: it is written again
        return False
    with open(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        is_protected = stat.S_ISREG(found.st_mode) and found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022
        return is_protected and found.st_mode & 0o044 == 0o044 and stream.read(len(data) + 1) == data


def _pack_sources() -> bytes:
    members = {"__main__.py": _ENTRY.encode(), **_package_members(Path(lem.__path__[0]), "lem")}
    if "lem/_vendor/__init__.py" not in members:
        members["lem/_vendor/__init__.py"] = b""
        for name in _VENDORED:
            members.update(_vendored_members(name))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name, _FIRST_TIME), members[name])
    return buffer.getvalue()


def _package_members(folder: Path, prefix: str) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_left_out = any(part == "__pycache__" or part.startswith(".") for part in name.parts)
        if path.is_file() and not is_left_out and path.suffix not in (".so", ".pyd", ".pyc"):
            found[f"{prefix}/{name.as_posix()}"] = path.read_bytes()
    return found


def _vendored_members(name: str) -> dict[str, bytes]:
    module = sys.modules.get(name)
    spec = module.__spec__ if module is not None else importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return {}
    origin = Path(spec.origin)
    if spec.submodule_search_locations is None:
        return {f"lem/_vendor/{name}.py": origin.read_bytes()}
    found = _package_members(origin.parent, f"lem/_vendor/{name}")
    # Without it `yaml` reports that it has no C loader; with it, it would import that of an engine's own PyYAML.
    found.pop(f"lem/_vendor/{name}/cyaml.py", None)
    return found
