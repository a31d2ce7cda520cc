"""The lem.pyz that containers run: the running program, in a folder of its own to mount."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import logging
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import lem.base
from lem.base import durable
from lem.base.errors import UserError
from lem.base.variables import CACHE_VARIABLE

PYZ_NAME = "lem.pyz"

_logger = logging.getLogger(__name__)

_ENTRY = "import sys\n\nfrom lem.__main__ import run\n\nsys.exit(run())\n"
_FIRST_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can express

# The modules in the `_vendor` folder of lem.pyz; a lem outside of a zip finds them among the installed ones.
_VENDORED = ("yaml", "pynvml")


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder for reproducible files: `LEM_CACHE_DIR`, or `lem` in the user's cache folder."""
    chosen = environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).absolute()
    return Path(environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()).absolute() / "lem"


def provide_pyz(environ: Mapping[str, str] = os.environ) -> Path:
    """A lem.pyz of the running program, alone in a folder that never changes; UserError if it cannot be written.

    The folder's name is the hash of the file. So a container of another build is recreated, and a running one keeps
    its file when lem.pyz is rebuilt: replacing a zip under a running program breaks its late imports, and the mount
    of a single file would keep showing the old one.
    """
    archive = getattr(getattr(lem.__spec__, "loader", None), "archive", None)
    own = None if archive is None else Path(archive).absolute()  # the zip that lem runs from
    data = own.read_bytes() if own is not None else _pack_sources()
    path = cache_folder(environ) / "pyz" / hashlib.sha256(data).hexdigest()[:16] / PYZ_NAME
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(path, data)
        # Readable for every user that a container may run as.
        path.parent.chmod(0o755)
        path.chmod(0o644)
    except OSError as error:
        if own is not None:
            _logger.debug("%s cannot be written (%s); %s itself is mounted", path, error.strerror, own.parent)
            return own
        raise UserError(
            f"cannot write {path}: {error.strerror}", f"set {CACHE_VARIABLE} to a writable folder"
        ) from error
    return path


@functools.cache  # of what this process was started from
def _pack_sources() -> bytes:
    """A zip of the package in its folder and the modules it needs; the same bytes every time."""
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
    """An installed pure module as in lem.pyz; {} if it is not installed, so that there is no NVML."""
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
