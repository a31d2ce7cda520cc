"""How lem.pyz imports its modules: each is compiled once, and its code kept for the next command.

Python's own importer compiles each module of a zip twice in every process: for its file name, and to run it. That was
half of a command's time. The cached code is executed, so a file is used only if this user alone owns and can write it
and its folder, if its name has the hash of the zip's directory, and if its content matches the hashes in it.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import stat
import sys
import zipimport
from importlib.util import MAGIC_NUMBER, source_hash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import CodeType
    from typing import Final

CACHE_VARIABLE: Final = "LEM_CACHE_DIR"
FOLDER = "bytecode"
_HASH_SIZE = 8
_MOST_INDEX_B = 1 << 20  # ten times that of all modules
_DIRECTORY_SIZE = 1 << 16  # at the end of the zip: names, sizes, times and CRC-32 of some 600 members
_KEPT = 3  # files: one for each lem.pyz, path to it and version of Python


class CodeCache:
    """The code of lem.pyz's modules, by name, in one file; without a folder, or with one that is unusable, nothing.

    The file: the hash and the length of an index, the index (where each module's code is, and its hash), the codes. Of
    a large file, a command reads only what it imports.
    """

    def __init__(self, archive: str, folder: str) -> None:
        self._folder, self._name = folder, ""
        self._file, self._begin = -1, 0
        self._places: dict[str, tuple[int, int, bytes]] = {}
        self._added: dict[str, bytes] = {}
        self._archive = archive
        if not os.path.isabs(folder):  # a user without a home
            return
        with contextlib.suppress(OSError):
            self._name = _name_of(archive)
            if _is_private(folder):
                self._file = _opened(os.path.join(folder, self._name))
                self._begin, self._places = _index_of(self._file)

    def get(self, module: str) -> CodeType | None:
        code = self._code(module)
        return None if code is None else marshal.loads(code)  # nosec B302 - of a checked file

    def add(self, module: str, code: CodeType) -> None:
        self._added[module] = marshal.dumps(code)

    def save(self) -> None:
        if not (self._added and self._name) or sys.dont_write_bytecode:
            return
        kept = {module: code for module in self._places if (code := self._code(module)) is not None}
        codes, places, at = {**kept, **self._added}, {}, 0
        for module, code in codes.items():
            places[module] = (at, len(code), source_hash(code))
            at += len(code)
        index = marshal.dumps(places)
        temporary = os.path.join(self._folder, f".{self._name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a read-only or full disk
            # The zip may have been replaced meanwhile, and root may have another user's HOME.
            if _name_of(self._archive) != self._name or not _may_be_made(self._folder):
                return
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            if not _is_private(self._folder):
                return
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            try:
                with open(descriptor, "wb") as stream:
                    stream.writelines([source_hash(index), len(index).to_bytes(_HASH_SIZE, "little"), index])
                    stream.writelines(codes.values())
                os.replace(temporary, os.path.join(self._folder, self._name))
            except BaseException:
                os.unlink(temporary)
                raise
            others = [item for item in os.scandir(self._folder) if _is_name(item.name) and item.name != self._name]
            for item in sorted(others, key=lambda item: item.stat(follow_symlinks=False).st_mtime_ns)[: 1 - _KEPT]:
                os.unlink(item)

    def _code(self, module: str) -> bytes | None:
        if module not in self._places:
            return None
        at, size, expected = self._places[module]
        with contextlib.suppress(OSError):
            code = os.pread(self._file, size, self._begin + at)
            return code if source_hash(code) == expected else None
        return None


def _name_of(archive: str) -> str:
    with open(archive, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _DIRECTORY_SIZE))
        given = f"{archive}\n{sys.flags.optimize}\n{size}\n".encode(errors="surrogateescape")
        return f"{source_hash(given + stream.read()).hex()}-{MAGIC_NUMBER.hex()}"


def _is_name(name: str) -> bool:
    """Whether `_name_of` gives such names, in any version of Python; `.NAME.PID` is a temporary one."""
    digest, _, magic = name.removeprefix(".").partition("-")
    return len(digest) == 2 * _HASH_SIZE and magic[4:8] == MAGIC_NUMBER[2:].hex()


def _is_private(folder: str) -> bool:
    found = os.lstat(folder)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _may_be_made(folder: str) -> bool:
    """Whether it, or what it is to be made in (`.cache/lem/bytecode` at most), belongs to this user or to root."""
    for _ in range(3):
        if os.path.lexists(folder):
            break
        folder = os.path.dirname(folder)
    return os.lstat(folder).st_uid in (0, os.geteuid())


def _opened(path: str) -> int:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    found = os.fstat(file)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
        return file
    os.close(file)
    raise PermissionError(path)


def _index_of(file: int) -> tuple[int, dict[str, tuple[int, int, bytes]]]:
    """Where the codes begin, and the index."""
    head = os.pread(file, 2 * _HASH_SIZE, 0)
    size = int.from_bytes(head[_HASH_SIZE:], "little")
    index = os.pread(file, min(size, _MOST_INDEX_B), len(head))
    is_whole = index and source_hash(index) == head[:_HASH_SIZE]
    return len(head) + size, marshal.loads(index) if is_whole else {}  # nosec B302


class Importer(zipimport.zipimporter):
    def __init__(self, path: str, cache: CodeCache) -> None:
        super().__init__(path)
        self._cache = cache
        self._codes: dict[str, CodeType] = {}

    def get_filename(self, fullname: str) -> str:
        code = self._codes[fullname] = self._cache.get(fullname) or self._compiled(fullname)
        return code.co_filename

    def get_code(self, fullname: str) -> CodeType:
        return self._codes.pop(fullname, None) or super().get_code(fullname)

    def _compiled(self, fullname: str) -> CodeType:
        code = super().get_code(fullname)
        self._cache.add(fullname, code)
        return code


def install(archive: str) -> CodeCache:
    """Import the modules of `archive` by an `Importer` from now on; its cache is to be saved at the end."""
    cache = CodeCache(archive, cache_folder_of(os.environ))

    def importer_of(path: str) -> Importer:
        if path != archive and not path.startswith(archive + os.sep):
            raise ImportError(path)
        return Importer(path, cache)

    sys.path_hooks.insert(0, importer_of)
    for path in [path for path in sys.path_importer_cache if path.startswith(archive)]:
        del sys.path_importer_cache[path]
    return cache


def cache_folder_of(environ: Mapping[str, str]) -> str:
    cache = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(environ.get(CACHE_VARIABLE) or os.path.join(cache, "lem"), FOLDER)
