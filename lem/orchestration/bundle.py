"""Bundles: what a host without network needs, in one folder with checksums.

`lem-airgap-<version>/{pyz,images,models,debs,wheels}` with `manifest.json`, `SHA256SUMS` of everything, and
`SHA256SUMS.sig`, a detached signature by ssh-keygen(1). The key to trust travels apart. `_list_files` says what else a
bundle must not hold; `docs/no-network.md` says it to users.

Schema history of manifest.json:
    1: first version.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lem.base import __version__, durable
from lem.base.codec import decode
from lem.base.dataclass import asdict, dataclass
from lem.base.durable import reason_of, remedy_for, sha256_of
from lem.base.errors import UserError
from lem.base.process import Finished, run
from lem.base.units import MIB, some_of
from lem.orchestration.docker import how_to_get
from lem.orchestration.packing import PYZ_NAME, program_bytes

SCHEMA_VERSION = 1
SUMS, SIGNATURE, MANIFEST = "SHA256SUMS", "SHA256SUMS.sig", "manifest.json"
FOLDERS = ("pyz", "images", "models", "debs", "wheels")
NAMESPACE = "lem-bundle"
_SAVE_TIMEOUT_S = 3600.0
_TOOL_TIMEOUT_S = 120.0
_SHOWN = 5
_AGAIN = "copy the bundle again"
_RENAME = "a bundle stores each under the last part of its path: rename one, or name a link to it"
_MOST_INDEX_B = 16 * MIB  # of a JSON document in the output of `docker save`
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


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


@dataclass(frozen=True)
class BundledImage:
    name: str
    file: str  # in the bundle
    ids: Mapping[str, str | None]  # by image store


@dataclass(frozen=True)
class BundleManifest:
    schema_version: int
    lem_version: str
    images: tuple[BundledImage, ...]
    models: tuple[str, ...]
    debs: tuple[str, ...]
    wheels: tuple[str, ...]


def make_bundle(folder: Path, contents: Contents, *, sign_key: Path | None = None) -> Path:
    target = folder / f"lem-airgap-{__version__}"
    if target.exists():
        raise UserError(f"{target} already exists", "choose another folder; bundles are never changed")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The folder is renamed at the end, so that there is nothing left to clean up.
        with durable.scratch_folder(folder) as scratch:
            _fill(scratch, contents)
            _set_modes(scratch)
            names = _list_files(scratch, "the bundle", "rename it, or leave it out")
            durable.write_text(scratch / SUMS, "".join(f"{sha256_of(scratch / name)}  {name}\n" for name in names))
            if sign_key is not None:
                signed = _ssh_keygen("sign", "-f", str(sign_key), str(scratch / SUMS))
                if signed.code != 0:
                    message = f"the bundle cannot be signed with {sign_key}: {signed.stderr.strip()}"
                    raise UserError(message, "`ssh-keygen -t ed25519` creates a key")
            _set_modes(scratch)
            durable.name_folder(scratch, target)
    except OSError as error:
        raise UserError(f"{error.filename or target}: {reason_of(error)}", remedy_for(error)) from error
    return target


def _fill(scratch: Path, contents: Contents) -> None:
    for name in FOLDERS:
        (scratch / name).mkdir()
    durable.write_bytes(scratch / "pyz" / PYZ_NAME, program_bytes())
    models, debs, wheels = (_by_name(kind, getattr(contents, kind)) for kind in ("models", "debs", "wheels"))
    for name, model in models.items():
        _copy_model(model, scratch / "models" / name, scratch)
    for kind, files in (("debs", debs), ("wheels", wheels)):
        for name, path in files.items():
            _copy_file(path, scratch / kind / name)
    images: dict[str, BundledImage] = {}  # by file
    for name in dict.fromkeys(contents.images):
        file = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        if f"images/{file}.tar.gz" in images:  # `a/b:1` and `a-b:1`
            file += f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        saved = _save_image(name, scratch / "images" / f"{file}.tar.gz")
        images[saved.file] = saved
    listed = (tuple(sorted(named)) for named in (models, debs, wheels))
    manifest = BundleManifest(SCHEMA_VERSION, __version__, tuple(images.values()), *listed)
    durable.write_json(scratch / MANIFEST, asdict(manifest))


def _by_name(kind: str, paths: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for given in paths:
        path = Path(os.path.abspath(given))  # noqa: PTH100 - `.` and `a/..` have no name; a link keeps its own
        if not path.name:
            raise UserError(f"{given} has no name to be stored under", _RENAME)
        if (other := found.setdefault(path.name, path)) != path:
            raise UserError(f"two {kind} with the name {path.name}: {other} and {path}", _RENAME)
    return found


def _copy_model(model: Path, target: Path, scratch: Path) -> None:
    if not model.is_dir():
        raise UserError(f"model {model}: no such folder", "expected a folder of files, such as a pinned snapshot")
    if scratch.resolve().is_relative_to(model.resolve()):
        raise UserError(f"model {model}: the bundle would be made inside it", "choose a folder outside the model")
    _copy_folder(model, target, (model.resolve(), scratch.resolve()))
    if not target.exists():
        raise UserError(f"model {model}: no files in it", "expected a folder of files, such as a pinned snapshot")


def _copy_folder(source: Path, target: Path, above: tuple[Path, ...]) -> None:
    for item in sorted(source.iterdir()):
        if not item.is_dir():
            _copy_file(item, target / item.name)
            continue
        place = item.resolve()
        if any(folder.is_relative_to(place) for folder in above):
            raise UserError(f"{item}: a link to a folder that contains it, or the bundle", "remove the link")
        _copy_folder(item, target / item.name, (*above, place))


def _copy_file(source: Path, target: Path) -> None:
    if not source.exists():
        raise UserError(f"{source}: no such file", "check the path, and where its links lead")
    if not source.is_file():
        raise UserError(f"{source}: expected a file, found a folder, device or FIFO", "a bundle holds only files")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _set_modes(scratch: Path) -> None:
    for parent, _, names in os.walk(scratch):
        Path(parent).chmod(0o755)
        for name in names:
            Path(parent, name).chmod(0o644)


def _save_image(name: str, file: Path) -> BundledImage:
    with durable.scratch_folder(file.parent) as scratch:
        saved = scratch / "image.tar"
        ended = run(["docker", "save", "--output", str(saved), name], timeout_s=_SAVE_TIMEOUT_S)
        if ended.code != 0:
            raise UserError(f"image {name} cannot be saved: {ended.stderr.strip()}", f"run {how_to_get(name)}")
        try:
            ids = _image_ids(saved)
        except (tarfile.TarError, EOFError) as error:
            raise _unexpected(f"not a complete tar archive: {error}") from error
        # Without a time and a name in it, the same image gives the same bytes.
        with saved.open("rb") as source, file.open("wb") as sink, gzip.GzipFile("", "wb", 6, sink, mtime=0) as packed:
            shutil.copyfileobj(source, packed, MIB)
    return BundledImage(name, f"images/{file.name}", ids)


def _image_ids(saved: Path) -> dict[str, str | None]:
    with tarfile.open(saved) as archive:
        images, index = (_member(archive, name) for name in ("manifest.json", "index.json"))
    config = _of_first(images, "Config")
    if config is None:
        raise _unexpected("manifest.json names no configuration")
    return {  # only newer engines save the manifest's digest
        "overlay2": f"sha256:{PurePosixPath(config).name.removesuffix('.json')}",
        "containerd": _of_first(index.get("manifests") if isinstance(index, dict) else None, "digest"),
    }


def _member(archive: tarfile.TarFile, name: str) -> Any:
    member = next((item for item in reversed(archive.getmembers()) if item.name == name), None)
    if member is None:
        return None
    stream = archive.extractfile(member) if member.isreg() and member.size <= _MOST_INDEX_B else None
    if stream is None:
        raise _unexpected(f"{name} is not a file of at most {_MOST_INDEX_B // MIB} MiB")
    try:
        return json.load(stream)
    except (ValueError, RecursionError) as error:
        raise _unexpected(f"{name} is invalid: {error}") from error


def _unexpected(what: str) -> UserError:
    return UserError(f"unexpected output of `docker save`: {what}", "check the disk, and save the image by hand")


def _of_first(items: Any, key: str) -> str | None:
    first = items[0] if isinstance(items, list) and items else None
    value = first.get(key) if isinstance(first, dict) else None
    return value if isinstance(value, str) else None


def _ssh_keygen(action: str, *words: str, stdin: bytes = b"") -> Finished:
    return run(["ssh-keygen", "-Y", action, "-n", NAMESPACE, *words], timeout_s=_TOOL_TIMEOUT_S, stdin=stdin)


def verify_bundle(folder: Path, signer: Signer | None) -> dict[str, Any]:
    try:
        # First of all: a FIFO in the place of a file would be waited for.
        present = {*_list_files(folder, f"bundle {folder}", _AGAIN)} - {SUMS, SIGNATURE}
        if signer is not None:
            _verify_signature(folder, signer)
        sums = _read_sums(folder)
        if lost := sorted(set(sums) - present):
            raise UserError(f"bundle {folder}: missing {some_of(lost, _SHOWN)}", _AGAIN)
        if unlisted := sorted(present - set(sums)):
            raise UserError(f"bundle {folder}: {some_of(unlisted, _SHOWN)} is not listed in {SUMS}", _AGAIN)
        if changed := [name for name, digest in sums.items() if sha256_of(folder / name) != digest]:
            raise UserError(f"bundle {folder}: changed since it was made: {some_of(changed, _SHOWN)}", _AGAIN)
        return _read_manifest(folder, present)
    except OSError as error:
        raise UserError(f"bundle {error.filename or folder}: {reason_of(error)}") from error
    except ValueError as error:
        raise UserError(f"bundle {folder}: invalid {MANIFEST}: {error}") from error


def _read_manifest(folder: Path, present: Iterable[str]) -> dict[str, Any]:
    document = durable.read_json(folder / MANIFEST)
    if not isinstance(document, dict):
        raise ValueError("expected an object")
    if (version := document.get("schema_version")) != SCHEMA_VERSION:
        raise UserError(f"bundle {folder}: expected schema version {SCHEMA_VERSION}, got {version}")
    manifest = decode(BundleManifest, document, MANIFEST)
    named = {item.file for item in manifest.images}
    for kind in ("models", "debs", "wheels"):
        named |= {f"{kind}/{name}" for name in getattr(manifest, kind)}
    paths = (PurePosixPath(name) for name in present if name not in (MANIFEST, f"pyz/{PYZ_NAME}"))
    if strange := sorted(named ^ {str(PurePosixPath(*path.parts[:2])) for path in paths}):
        raise ValueError(f"it and the bundle differ in {some_of(strange, _SHOWN)}")
    return document


def _verify_signature(folder: Path, signer: Signer) -> None:
    if not (folder / SIGNATURE).is_file():
        raise UserError(f"bundle {folder}: it is not signed", "`lem bundle make --sign-key KEY` signs it")
    words = ("verify", "-f", str(signer.allowed_signers), "-I", signer.identity, "-s", str(folder / SIGNATURE))
    ended = _ssh_keygen(*words, stdin=durable.read_bytes(folder / SUMS))
    if ended.code != 0:
        details = (ended.stderr or ended.stdout).strip()
        raise UserError(f"bundle {folder}: no valid signature of {signer.identity}: {details}", "do not use the bundle")


def _read_sums(folder: Path) -> dict[str, str]:
    sums: dict[str, str] = {}
    # A byte that is not UTF-8 gives an invalid line, or a name that does not exist.
    text = durable.read_bytes(folder / SUMS).decode("utf-8", "replace")
    for line in text.removesuffix("\n").split("\n"):
        found = _LINE.fullmatch(line)
        if found is None:
            raise UserError(f"bundle {folder}: invalid line in {SUMS}: {line[:80]!r}")
        if found[2] in sums:
            raise UserError(f"bundle {folder}: {found[2]} is listed twice in {SUMS}", _AGAIN)
        sums[found[2]] = found[1]
    return sums


def _list_files(folder: Path, subject: str, hint: str) -> list[str]:
    """The names of all files of a bundle, sorted; UserError for anything that it must not hold."""
    # It holds ordinary files in its folders, each under one printable name, and no empty folder in those. A link, a
    # device, a program that runs with the rights of its owner and a file that every user can write can do harm after
    # the sums were compared; a line of sums cannot express a control character.
    found: list[str] = []
    todo = [(PurePosixPath(), folder.stat())]
    while todo:
        place, status = todo.pop()
        name = str(place)
        if why := _objection(name, status):
            raise UserError(f"{subject}: {name if name.isprintable() else ascii(name)} {why}", hint)
        if stat.S_ISREG(status.st_mode):
            found.append(name)
            continue
        with os.scandir(folder / place) as items:
            below = [(place / item.name, item.stat(follow_symlinks=False)) for item in items]
        if not below and name not in FOLDERS:
            raise UserError(f"{subject}: {name} is an empty folder", hint)
        todo += below
    return sorted(found)


def _objection(name: str, status: os.stat_result) -> str | None:
    mode, top = status.st_mode, name.partition("/")[0]
    is_file = stat.S_ISREG(mode)
    if not name.isprintable():
        return "has a name with a control character or one that is not UTF-8"
    if stat.S_ISLNK(mode):
        return "is a link"
    if not is_file and not stat.S_ISDIR(mode):
        return "is a FIFO, a socket or a device"
    if is_file and mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX):
        return "has a setuid, setgid or sticky bit"
    if mode & stat.S_IWOTH:
        return "can be changed by every user (chmod -R o-w)"
    if is_file and status.st_nlink > 1:
        return "is a hard link: it can be changed under another name"
    if (top not in FOLDERS and name not in (".", MANIFEST, SUMS, SIGNATURE)) or (is_file and name in FOLDERS):
        return "does not belong in a bundle"
    return None
