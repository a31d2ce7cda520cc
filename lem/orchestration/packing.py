"""The lem.pyz that containers run: the program that runs here, in a folder of its own to mount."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import logging
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import lem.base
from lem.base import durable
from lem.base.errors import UserError
from lem.base.variables import CACHE_VARIABLE

PYZ_NAME = "lem.pyz"

_logger = logging.getLogger(__name__)

_ENTRY = "import sys\n\nfrom lem.__main__ import run\n\nsys.exit(run())\n"
_FIRST_MOMENT = (1980, 1, 1, 0, 0, 0)  # the first that a zip knows

# The modules that lem.pyz carries inside, and where a lem that is no zip finds them instead.
_VENDORED = ("yaml", "pynvml")


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder for what can be made again: `LEM_CACHE_DIR`, or `lem` in the user's cache folder."""
    chosen = environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).absolute()
    return Path(environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()).absolute() / "lem"


def provide_pyz(environ: Mapping[str, str] = os.environ) -> Path:
    """A lem.pyz of the program that runs, in a folder that holds nothing else and never changes.

    The folder is named by what the file holds. So a container of another build is recreated, and one that runs keeps
    its file when lem.pyz is built anew: replacing a zip under a running program breaks its late imports, and a mount
    of a single file would go on showing the old one.

    Raises:
        UserError: it cannot be written.
    """
    own = _own_archive()
    data = own.read_bytes() if own is not None else _pack_sources()
    path = cache_folder(environ) / "pyz" / hashlib.sha256(data).hexdigest()[:16] / PYZ_NAME
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(path, data)
        # Whoever the container runs as reads it.
        path.parent.chmod(0o755)
        path.chmod(0o644)
    except OSError as error:
        if own is not None:
            _logger.debug("%s cannot be written (%s); %s itself is mounted", path, error.strerror, own.parent)
            return own
        raise UserError(
            f"cannot write {path}: {error.strerror}", f"choose a folder that can be written with {CACHE_VARIABLE}"
        ) from error
    return path


def _own_archive() -> Path | None:
    """The zip that lem runs from; None when it runs from a folder."""
    archive = getattr(getattr(lem.__spec__, "loader", None), "archive", None)
    return None if archive is None else Path(archive).absolute()


@functools.cache  # of what this process was started from
def _pack_sources() -> bytes:
    """A zip of the package in the folder that it runs from, with the modules it needs; the same bytes every time."""
    members = {"__main__.py": _ENTRY.encode(), **_package_members(Path(lem.__path__[0]), "lem")}
    if "lem/_vendor/__init__.py" not in members:
        members["lem/_vendor/__init__.py"] = b""
        for name in _VENDORED:
            members.update(_vendored_members(name))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name, _FIRST_MOMENT), members[name])
    return buffer.getvalue()


def _package_members(folder: Path, prefix: str) -> dict[str, bytes]:
    return {f"{prefix}/{name}": data for name, data in _files_below(folder)}


def _files_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_left_out = any(part == "__pycache__" or part.startswith(".") for part in name.parts)
        if path.is_file() and not is_left_out and path.suffix not in (".so", ".pyd", ".pyc"):
            yield name.as_posix(), path.read_bytes()


def _vendored_members(name: str) -> dict[str, bytes]:
    """An installed pure module, as lem.pyz holds it; {} for one that is not there (no NVML then)."""
    module = sys.modules.get(name)
    spec = module.__spec__ if module is not None else importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return {}
    origin = Path(spec.origin)
    if spec.submodule_search_locations is None:
        return {f"lem/_vendor/{name}.py": origin.read_bytes()}
    found = _package_members(origin.parent, f"lem/_vendor/{name}")
    # Without it `yaml` says by itself that it has no C loader; with it, it would look for an engine's own PyYAML.
    found.pop(f"lem/_vendor/{name}/cyaml.py", None)
    return found
