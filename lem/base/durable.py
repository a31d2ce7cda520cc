"""Files that are whole or absent, also after a crash; and messages for when the disk refuses them.

Every write, fsync and rename that matters raises an audit event (`lem.write`, `lem.fsync`, `lem.rename`,
`lem.fsync_dir`; see `sys.audit`) just before it happens, so that a test can stop the program, or make the
call fail, at any one of them without a hook in the program.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import logging
import math
import os
import stat
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from lem.base.doc import INDENTED
from lem.base.errors import DISK_FULL
from lem.base.units import GIB, MIB

_Found = TypeVar("_Found")

_logger = logging.getLogger(__name__)

_MOST_RATIO = 120  # of the unpacked size to the packed one
_MOST_LINE_B = 16 * MIB  # the marks of some 300,000 passes

TEMPORARY_PREFIX = ".lem-tmp-"
# No file that lem reads as a whole comes near it; one that is sparse or endless must not fill the memory.
MOST_B = GIB
_SEAL = "sha256"
_NOT_REGULAR = "expected a regular file"


def write_bytes(path: Path, data: bytes, *, is_synced: bool = True) -> None:
    """Replace `path` by `data`, whole or not at all; OSError if it cannot, and then no temporary file is left."""
    write_parts(path, (data,), is_synced=is_synced)


def write_parts(path: Path, parts: Iterable[bytes], *, is_synced: bool = True) -> None:
    """As `write_bytes`, of data that need not be in memory as a whole."""
    # rename(2) is atomic, and only the fsync of the folder makes the new name survive a power cut. Both fsyncs take
    # milliseconds; files that can be made again need none.
    folder = path.parent
    temporary = folder / f"{TEMPORARY_PREFIX}{os.urandom(8).hex()}"
    # Not mkstemp, whose files are 0600: results are for the lab. The kernel applies the umask; lem cannot read it
    # without setting it, for all threads.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb", buffering=0) as stream:
            sys.audit("lem.write", str(path))
            for data in parts:
                view = memoryview(data)
                while view:
                    view = view[stream.write(view) :]
            if is_synced:
                sys.audit("lem.fsync", str(path))
                os.fsync(descriptor)
        sys.audit("lem.rename", str(path))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if is_synced:
        sync_folder(folder)


def append_bytes(path: Path, data: bytes, *, at_b: int) -> None:
    """Append to a file of that size and sync it. After an OSError, `data` may be in it in part; EBUSY: another size."""
    sys.audit("lem.write", str(path))
    descriptor = os.open(
        path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | (0 if at_b else os.O_CREAT | os.O_TRUNC), 0o666
    )
    with open(descriptor, "ab", buffering=0) as stream:
        if os.fstat(descriptor).st_size != at_b:
            raise OSError(errno.EBUSY, "another process has changed it", str(path))
        view = memoryview(data)
        while view:
            view = view[stream.write(view) :]
        sys.audit("lem.fsync", str(path))
        os.fsync(descriptor)
    if not at_b:
        sync_folder(path.parent)


def utf8(text: str) -> bytes:
    """The text in UTF-8; the lone surrogates that Python makes of other bytes in file names are escaped as in JSON."""
    return text.encode("utf-8", "backslashreplace")


def write_text(path: Path, text: str) -> None:
    write_bytes(path, utf8(text))


_PIECES = 10_000  # of JSON, each a bracket, a comma, a name or a value


def write_json(path: Path, document: Any) -> None:
    pieces = itertools.chain(INDENTED.iterencode(document), ["\n"])
    write_parts(path, iter(lambda: utf8("".join(itertools.islice(pieces, _PIECES))), b""))


def open_regular(path: Path, most_b: float = math.inf) -> BinaryIO:
    return open(_opened(path, most_b)[0], "rb")


def read_with_status(path: str) -> tuple[os.stat_result, bytes]:
    """A regular file, and its size and times before it was read, without the objects that take most of the time."""
    descriptor, found = _opened(path)
    try:
        parts = []
        while part := os.read(descriptor, found.st_size + 1):
            parts.append(part)
    finally:
        os.close(descriptor)
    return found, b"".join(parts)


def _opened(path: Path | str, most_b: float = math.inf) -> tuple[int, os.stat_result]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_size <= most_b:
        return descriptor, found
    os.close(descriptor)
    if stat.S_ISREG(found.st_mode):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    raise OSError(errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL, _NOT_REGULAR, str(path))


def read_bytes(path: Path) -> bytes:
    with open_regular(path, MOST_B) as stream:
        return stream.read()


def open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline=newline)


class UnpackedTooFar(ValueError):
    """A packed file that holds more than lem can have written into it."""


def unpacked_lines(path: Path, most_b: int, free_b: int) -> Generator[bytes, None, None]:
    """The lines of a packed file; OSError, EOFError, zlib.error, or UnpackedTooFar if lem cannot have written it."""
    # A damaged or hostile file must not fill the memory: rows of meters shrink to a ninth, of one error over and over
    # to a thirty-fifth, and a file that is made to fill the memory to a thousandth. However small it is, it may unpack
    # to `free_b`.
    import gzip

    with open_regular(path) as packed, io.BufferedReader(gzip.open(packed)) as file:
        most_b = min(most_b, free_b + _MOST_RATIO * os.fstat(packed.fileno()).st_size)
        left = most_b
        while line := file.readline(min(left + 1, _MOST_LINE_B)):
            left -= len(line)
            if left < 0:
                text = f"more than {most_b} bytes when unpacked, the most that lem reads from such a file"
                raise UnpackedTooFar(text)
            yield line


def read_json(path: Path) -> Any:
    return parse_json(read_bytes(path))


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    return {**document, _SEAL: _digest_of(document)}


def read_sealed(path: Path) -> dict[str, Any]:
    """An object that was written with `seal`, or by the first build; raises as `read_json`, or if it was changed."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise ValueError("expected an object")
    if document.pop(_SEAL, None) not in (None, _digest_of(document)):
        raise ValueError("its content does not match its checksum: it was damaged, or edited")
    return document


def read_if_whole(path: Path, decode: Callable[[dict[str, Any]], _Found], without: str) -> _Found | None:
    """What `decode` makes of a sealed file; None without one, or with a warning for one that is damaged or refused."""
    try:
        return decode(read_sealed(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        _logger.warning("%s: %s: %s", path, reason_of(error), without)
    except ValueError:
        _logger.warning("%s is corrupt: %s", path, without)
    return None


def _digest_of(document: Mapping[str, Any]) -> str:
    import hashlib  # OpenSSL, which not every process of lem needs

    digest = hashlib.sha256()
    for text in _sorted_parts(document):
        digest.update(text.encode())
    return digest.hexdigest()


_SORTED = json.JSONEncoder(sort_keys=True).encode
_ITEMS = 1000


def _sorted_parts(document: Mapping[str, Any]) -> Iterator[str]:
    """The parts of `json.dumps(document, sort_keys=True)`: as a whole, that of a long list takes megabytes."""
    yield "{"
    for place, (name, value) in enumerate(sorted(document.items())):
        yield f"{', ' if place else ''}{_SORTED(name)}: "
        if isinstance(value, (list, tuple)) and len(value) > _ITEMS:
            for begin in range(0, len(value), _ITEMS):
                yield f"{', ' if begin else '['}{_SORTED(value[begin : begin + _ITEMS])[1:-1]}"
            yield "]"
        else:
            yield _SORTED(value)
    yield "}"


def parse_json(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def packaged_text(package: str, name: str) -> str:
    """A text file of lem's own beside the modules of a package, in the zip too."""
    import pkgutil

    return (pkgutil.get_data(package, name) or b"").decode()


def make_folder(folder: Path) -> None:
    missing: list[Path] = []
    while not folder.is_dir():
        missing.append(folder)
        if folder.parent == folder:
            break
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder in `parent` for the length of the block; what cannot be removed is left."""
    # Of a parent that has become read-only, `tempfile.TemporaryDirectory` makes a RecursionError (seen on CPython
    # 3.11).
    folder = parent / f"{TEMPORARY_PREFIX}{os.urandom(8).hex()}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)


def name_folder(folder: Path, target: Path) -> None:
    """Rename a finished folder to `target` beside it, which is complete or missing after a crash; OSError if taken."""
    name_folders({target: folder})


def name_folders(folders: Mapping[Path, Path]) -> None:
    """As `name_folder`, for the finished folders of these targets, on the same file system."""
    # The first fsync has a journal written, and with it everything that is new; those that follow find little to do.
    # One after each folder was written would have it written each time.
    for folder in folders.values():
        for parent, _, names in os.walk(folder):
            for name in names:
                path = f"{parent}/{name}"
                sys.audit("lem.fsync", path)
                with open(path, "rb", buffering=0) as stream:
                    os.fsync(stream.fileno())
            sync_folder(Path(parent))
    for target, folder in folders.items():
        sys.audit("lem.rename", str(target))
        folder.rename(target)
    for parent_folder in dict.fromkeys(target.parent for target in folders):
        sync_folder(parent_folder)


def sync_folder(folder: Path) -> None:
    sys.audit("lem.fsync_dir", str(folder))
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # fsync(2): some network file systems do not sync folders; there, files suffice.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def in_home(name: str | Path) -> Path:
    return Path(os.path.expanduser(name))  # noqa: PTH111


def reason_of(error: OSError) -> str:
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "expected a folder, found a file"
    return (error.strerror or str(error) or type(error).__name__).lower()


def remedy_for(error: OSError, option: str | None = None) -> str:
    with_option = f" with {option}" if option else ""
    if error.errno in DISK_FULL:
        return f"free some space, or name a folder on another disk{with_option}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"make it writable for you, or name another folder{with_option}"
    return f"name another folder{with_option}"


def sha256_of(path: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while block := stream.read(MIB):
            digest.update(block)
    return digest.hexdigest()
