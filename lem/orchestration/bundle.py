"""The lem.pyz that containers run, and bundles: what a host without network needs, in one folder with checksums.

`lem-airgap-<version>/{pyz,images,models,debs,wheels}` with `manifest.json`, `SHA256SUMS` of everything, and
`SHA256SUMS.sig`, a detached signature by ssh-keygen(1). The key to trust travels apart.

Schema history of manifest.json:
    1: first version.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import lem.base
from lem.base import __version__, durable
from lem.base.durable import reason_of, remedy_for, sha256_of
from lem.base.errors import UserError
from lem.base.process import Finished, run
from lem.base.units import MIB, some_of
from lem.base.variables import CACHE_VARIABLE

PYZ_NAME = "lem.pyz"
SCHEMA_VERSION = 1
SUMS, SIGNATURE, MANIFEST = "SHA256SUMS", "SHA256SUMS.sig", "manifest.json"
NAMESPACE = "lem-bundle"
_SAVE_TIMEOUT_S = 3600.0
_TOOL_TIMEOUT_S = 120.0
_SHOWN = 5
_AGAIN = "copy the bundle again"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")

_logger = logging.getLogger(__name__)

_ENTRY = "import sys\n\nfrom lem.__main__ import run\n\nsys.exit(run())\n"
_FIRST_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can express

# The modules in the `_vendor` folder of lem.pyz; a lem outside of a zip finds them among the installed ones.
_VENDORED = ("yaml", "pynvml")


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder for reproducible files: `LEM_CACHE_DIR`, or `lem` in the user's cache folder."""
    if chosen := environ.get(CACHE_VARIABLE):
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
        raise UserError(f"cannot write {path}: {error.strerror}", f"set {CACHE_VARIABLE} to another folder") from error
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


@dataclass(frozen=True)
class Contents:
    images: tuple[str, ...] = ()  # names in the local Docker engine
    models: tuple[Path, ...] = ()  # folders, each stored under its own name
    debs: tuple[Path, ...] = ()
    wheels: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Signer:
    allowed_signers: Path  # ssh-keygen(1)
    identity: str  # a name in that file


def make_bundle(folder: Path, contents: Contents, *, sign_key: Path | None = None) -> Path:
    """Make a bundle in `folder`, completely or not at all."""
    target = folder / f"lem-airgap-{__version__}"
    if target.exists():
        raise UserError(f"{target} already exists", "choose another folder; bundles are never changed")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The folder is renamed at the end, so that there is nothing left to clean up.
        with tempfile.TemporaryDirectory(
            prefix=durable.TEMPORARY_PREFIX, dir=folder, ignore_cleanup_errors=True
        ) as name:
            scratch = Path(name)
            _fill(scratch, contents)
            sums = [f"{sha256_of(scratch / name)}  {name}\n" for name in _files(scratch)]
            durable.write_text(scratch / SUMS, "".join(sums))
            if sign_key is not None:
                signed = _ssh_keygen("sign", "-f", str(sign_key), str(scratch / SUMS))
                if signed.code != 0:
                    message = f"the bundle cannot be signed with {sign_key}: {signed.stderr.strip()}"
                    raise UserError(message, "`ssh-keygen -t ed25519` creates a key")
            scratch.chmod(0o755)
            durable.name_folder(scratch, target)
    except OSError as error:
        raise UserError(f"{error.filename or target}: {reason_of(error)}", remedy_for(error)) from error
    return target


def _fill(scratch: Path, contents: Contents) -> None:
    for name in ("pyz", "images", "models", "debs", "wheels"):
        (scratch / name).mkdir()
    shutil.copyfile(provide_pyz(), scratch / "pyz" / PYZ_NAME)
    images = [_save_image(name, scratch / "images") for name in contents.images]
    for model in contents.models:
        if not model.is_dir():
            raise UserError(f"model {model}: no such folder", "expected a folder of files, such as a pinned snapshot")
        # Snapshots of the hub are links into a folder of blobs: a bundle holds what they lead to.
        shutil.copytree(model, scratch / "models" / model.name, symlinks=False)
    for kind, files in (("debs", contents.debs), ("wheels", contents.wheels)):
        for file in files:
            shutil.copyfile(file, scratch / kind / file.name)
    names = {kind: sorted(path.name for path in getattr(contents, kind)) for kind in ("models", "debs", "wheels")}
    document = {"schema_version": SCHEMA_VERSION, "lem_version": __version__, "images": images, **names}
    durable.write_json(scratch / MANIFEST, document)


def _save_image(name: str, folder: Path) -> dict[str, Any]:
    """Save an image, compressed by gzip (Docker 20.10 loads nothing newer); its entry in the manifest."""
    file = folder / (re.sub(r"[^A-Za-z0-9._-]+", "-", name) + ".tar.gz")
    with tempfile.TemporaryDirectory(prefix=durable.TEMPORARY_PREFIX, dir=folder) as scratch_name:
        saved = Path(scratch_name) / "image.tar"
        ended = run(["docker", "save", "--output", str(saved), name], timeout_s=_SAVE_TIMEOUT_S)
        if ended.code != 0:
            raise UserError(f"image {name} cannot be saved: {ended.stderr.strip()}", f"docker pull {name}")
        ids = _image_ids(saved)
        # Without a time and a name in it, the same image gives the same bytes.
        with saved.open("rb") as source, file.open("wb") as sink, gzip.GzipFile("", "wb", 6, sink, mtime=0) as packed:
            shutil.copyfileobj(source, packed, MIB)
    return {"name": name, "file": f"images/{file.name}", "ids": ids}


def _image_ids(saved: Path) -> dict[str, str | None]:
    """The image's id once it is loaded, by store: the digest of its configuration, or (containerd) of its manifest."""
    with tarfile.open(saved) as archive:
        images, index = (_member(archive, name) for name in ("manifest.json", "index.json"))
    config = _of_first(images, "Config")
    if config is None:
        raise UserError("unexpected output of `docker save`: manifest.json names no configuration")
    return {  # only newer engines save the manifest's digest
        "overlay2": f"sha256:{PurePosixPath(config).name.removesuffix('.json')}",
        "containerd": _of_first(index.get("manifests") if isinstance(index, dict) else None, "digest"),
    }


def _member(archive: tarfile.TarFile, name: str) -> Any:
    """The JSON document of that name; None if it does not exist."""
    stream = archive.extractfile(name) if name in archive.getnames() else None
    try:
        return None if stream is None else json.load(stream)
    except ValueError as error:
        raise UserError(f"unexpected output of `docker save`: {name} is invalid: {error}") from error


def _of_first(items: Any, key: str) -> str | None:
    """A text of the first object of a list; None if there is none."""
    first = items[0] if isinstance(items, list) and items else None
    value = first.get(key) if isinstance(first, dict) else None
    return value if isinstance(value, str) else None


def _ssh_keygen(action: str, *words: str, stdin: bytes = b"") -> Finished:
    return run(["ssh-keygen", "-Y", action, "-n", NAMESPACE, *words], timeout_s=_TOOL_TIMEOUT_S, stdin=stdin)


def verify_bundle(folder: Path, signer: Signer | None) -> dict[str, Any]:
    """The manifest of a bundle; UserError unless every byte is as it was made. Without a signer only sums count."""
    try:
        if signer is not None:
            _verify_signature(folder, signer)
        sums = _read_sums(folder)
        present = set(_files(folder)) - {SUMS, SIGNATURE}
        if lost := sorted(set(sums) - present):
            raise UserError(f"bundle {folder}: missing {some_of(lost, _SHOWN)}", _AGAIN)
        if unlisted := sorted(present - set(sums)):
            raise UserError(f"bundle {folder}: {some_of(unlisted, _SHOWN)} is not listed in {SUMS}", _AGAIN)
        if changed := [name for name, digest in sums.items() if sha256_of(folder / name) != digest]:
            raise UserError(f"bundle {folder}: changed since it was made: {some_of(changed, _SHOWN)}", _AGAIN)
        manifest = durable.read_json(folder / MANIFEST)
        if not isinstance(manifest, dict):
            raise ValueError("expected an object")
    except OSError as error:
        raise UserError(f"bundle {error.filename or folder}: {reason_of(error)}") from error
    except ValueError as error:
        raise UserError(f"bundle {folder}: invalid {MANIFEST}: {error}") from error
    if (version := manifest.get("schema_version")) != SCHEMA_VERSION:
        raise UserError(f"bundle {folder}: expected schema version {SCHEMA_VERSION}, got {version}")
    return manifest


def _verify_signature(folder: Path, signer: Signer) -> None:
    if not (folder / SIGNATURE).is_file():
        raise UserError(f"bundle {folder}: it is not signed", "`lem bundle make --sign-key KEY` signs it")
    words = ("verify", "-f", str(signer.allowed_signers), "-I", signer.identity, "-s", str(folder / SIGNATURE))
    ended = _ssh_keygen(*words, stdin=(folder / SUMS).read_bytes())
    if ended.code != 0:
        details = (ended.stderr or ended.stdout).strip()
        raise UserError(f"bundle {folder}: no valid signature of {signer.identity}: {details}", "do not use the bundle")


def _read_sums(folder: Path) -> dict[str, str]:
    sums = {}
    # A byte that is not UTF-8 gives an invalid line, or a name that does not exist.
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            raise UserError(f"bundle {folder}: invalid line in {SUMS}: {line[:80]!r}")
        sums[found[2]] = found[1]
    return sums


def _files(folder: Path) -> Iterator[str]:
    """The names of all files below a folder; a link is refused, since it can lead out of the bundle."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise UserError(f"bundle {folder}: {path.relative_to(folder)} is a link", _AGAIN)
        if path.is_file():
            yield path.relative_to(folder).as_posix()
