"""One campaign at a time: `flock` on a file per campaign and per GPU.

The kernel releases a lock when its holder ends, however it ends, so there are no stale locks: the file stays and
means nothing by itself. It names its last holder, for error messages. It is never removed: another process
may have it open, and would then hold a lock on a file that no other process finds.

Lock files have mode 0600, because any user who can open a lock file can hold it and so block the campaigns of others.
The GPUs of a host are shared by its users, so each user has a lock file of their own for each GPU. A campaign locks its
user's file, then checks the files of the other users: the kernel also lists locks on files that this user cannot open
(proc_locks(5)). Of two campaigns that start at the same time, at least one sees the other. A container with its own
process namespace sees only the locks on files that it can open, so campaigns in such containers exclude each other only
if they run as the same user.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pwd
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lem.base import durable
from lem.base.codec import decode
from lem.base.dataclass import dataclass, replace
from lem.base.durable import make_folder
from lem.base.errors import LockedError, UserError
from lem.base.variables import LOCK_FOLDER_VARIABLE

CAMPAIGN_LOCK_NAME = "campaign.lock"
_MODE = 0o600
_HINT = "choose a folder on a file system with flock: io.state_dir, and LEM_LOCK_DIR for the GPUs"
_KERNEL_LOCKS = Path("/proc/locks")
RUN_LOCK = Path("/run/lock")
# Not `tempfile.gettempdir()`: TMPDIR differs between users and jobs.
TMP = Path("/tmp")  # noqa: S108 - what is made in it is checked

# More than this is not what we wrote: a campaign's name is cut to stay below it.
_HOLDER_MAX_B = 4096
_CAMPAIGN_MAX = 500

# `is_locked` holds a free lock for some microseconds; a process that meets it there tries again.
_TRIES = 3
_TRY_AGAIN_S = 0.02

# No child process inherits the lock, and no link that anybody could have put there is followed.
_OPEN_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True)
class Holder:
    pid: int
    host: str
    campaign: str
    since: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, campaign {self.campaign}, since {self.since}"


@dataclass(frozen=True)
class LockTarget:
    path: Path
    what: str
    is_shared: bool = False  # by all users of the host; each then has a file of its own

    @property
    def own_path(self) -> Path:
        return (
            self.path.with_name(f"{self.path.stem}.{os.geteuid()}{self.path.suffix}") if self.is_shared else self.path
        )

    def other_paths(self) -> list[Path]:
        start, suffix = self.path.stem, re.escape(self.path.suffix)
        found = (
            path
            for path in self.path.parent.iterdir()
            if re.fullmatch(rf"{re.escape(start)}(\.[0-9]+)?{suffix}", path.name)
        )
        return sorted(path for path in found if path != self.own_path)


def default_gpu_lock_folder(environ: Mapping[str, str], run_lock: Path = RUN_LOCK) -> Path:
    """The folder of the GPU locks: `LEM_LOCK_DIR`, or one that is the same for every user of this host."""
    # `run_lock`, where the FHS puts locks, is used only where every user may write to it: even root must use the folder
    # that the others use.
    if chosen := environ.get(LOCK_FOLDER_VARIABLE):
        return Path(chosen)
    try:
        is_open_to_all = bool(run_lock.stat().st_mode & stat.S_IWOTH)
    except OSError:
        is_open_to_all = False
    return (run_lock if is_open_to_all else TMP) / "lem"


def campaign_lock(state_folder: Path, campaign_name: str) -> LockTarget:
    return LockTarget(state_folder / CAMPAIGN_LOCK_NAME, f"campaign {campaign_name}")


def gpu_locks(uuids: Iterable[str], environ: Mapping[str, str]) -> list[LockTarget]:
    """The locks of GPUs, in one order for all: no two campaigns each hold a lock that the other needs."""
    folder = default_gpu_lock_folder(environ)
    # A UUID comes from the driver, or from a person.
    return [
        LockTarget(folder / f"{re.sub('[^A-Za-z0-9._-]', '_', uuid)}.lock", f"GPU {uuid}", is_shared=True)
        for uuid in sorted(set(uuids))
    ]


@contextlib.contextmanager
def hold_locks(targets: Sequence[LockTarget], holder: Holder) -> Iterator[Sequence[int]]:
    """Hold all the locks or none; LockedError names another holder, UserError if a file cannot be opened.

    Gives their descriptors: a process that is started with one holds the lock, too.
    """
    descriptors: list[int] = []
    with contextlib.ExitStack() as stack:
        for target in targets:
            descriptor = _hold(target)
            stack.callback(os.close, descriptor)
            descriptors.append(descriptor)
            _write_holder(descriptor, holder)
            if target.is_shared:
                _check_others(target)
        yield descriptors


def read_holder(path: Path) -> Holder | None:
    try:
        with durable.open_regular(path) as stream:
            return _decode_holder(stream.read(_HOLDER_MAX_B))
    except OSError:
        return None


def is_locked(path: Path) -> bool | None:
    """Whether a process holds the lock; None when unknown. Nothing is written."""
    # flock cannot query a lock, so a free one is held shared for a moment, which allows other queries.
    try:
        descriptor = os.open(path, os.O_RDONLY | _OPEN_FLAGS)
    except FileNotFoundError:
        return False
    except PermissionError:
        return _is_listed(path)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    return False


def _is_listed(path: Path) -> bool | None:
    try:
        found = path.stat()
        lines = _KERNEL_LOCKS.read_bytes().splitlines()
    except OSError:
        return None
    # `1: FLOCK  ADVISORY  WRITE 4711 08:01:131 0 EOF`: device in hexadecimal, inode in decimal.
    name = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    return any(name.encode() in line.split() for line in lines)


def _check_others(target: LockTarget) -> None:
    """Refuse, with a LockedError, what another user's campaign has locked."""
    for path in target.other_paths():
        if is_locked(path):
            raise _locked_error(target, path, read_holder(path))


def _locked_error(target: LockTarget, path: Path, holder: Holder | None) -> LockedError:
    # The holder may not have written its name yet, or only its own user may read it.
    other = f"another process of user {owner_of(path)}, not yet identified"
    return LockedError(
        f"{target.what} is locked by {holder or other}",
        f"wait until it ends, or stop it; the lock {path} is released when its holder ends",
    )


def owner_of(path: Path) -> str:
    try:
        number = path.stat().st_uid
    except OSError:
        return ""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def take(descriptor: int, wait: Callable[[float], None] = time.sleep) -> None:
    for _ in range(_TRIES - 1):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        wait(_TRY_AGAIN_S)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _hold(target: LockTarget) -> int:
    path = target.own_path
    for _ in range(_TRIES):
        descriptor = _open(target, path)
        try:
            _lock(descriptor, target, path)
            if _is_at(path, descriptor):
                _check_exclusive(path)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was removed before it was locked; other processes would lock a new one
    raise UserError(f"the lock of {target.what}, {path}, is removed again and again", "find out what removes it")


def _lock(descriptor: int, target: LockTarget, path: Path) -> None:
    try:
        take(descriptor)
    except BlockingIOError as error:
        raise _locked_error(target, path, _decode_holder(os.pread(descriptor, _HOLDER_MAX_B, 0))) from error
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}", _HINT) from error


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _check_exclusive(path: Path) -> None:
    """Refuse a file system on which every lock succeeds: a second one on a file that is locked must not."""
    if is_locked(path) is False:
        raise UserError(f"locks do not work in {path.parent}: {path.name} can be locked twice", _HINT)


def _open(target: LockTarget, path: Path) -> int:
    try:
        _make_folder(path.parent)
        descriptor = _open_or_create(path)
    except OSError as error:
        if isinstance(error, PermissionError) and is_locked(path):
            raise _locked_error(target, path, None) from error
        hint = "make the folder writable, or choose another: io.state_dir for the campaign, LEM_LOCK_DIR for the GPUs"
        if isinstance(error, PermissionError) and (owner := owner_of(path)):
            hint = f"run it as user {owner}, or choose another io.state_dir"
        raise UserError(f"cannot open the lock of {target.what}, {path}: {error.strerror}", hint) from error
    # In a folder that all may write, another user may have put a link there for us to write through.
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise UserError(f"the lock of {target.what}, {path}, is not an ordinary file", "remove it")
    if found.st_uid == os.geteuid():
        os.fchmod(descriptor, _MODE)  # older versions made it writable for all
    return descriptor


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    make_folder(folder)
    if folder.parent in (RUN_LOCK, TMP):
        # Every user of the host locks the same GPUs: as open, and as sticky, as the folder it lies in.
        with contextlib.suppress(PermissionError):  # another user was faster
            folder.chmod(0o1777)


def _open_or_create(path: Path) -> int:
    # Not O_CREAT at once: in a sticky folder that all may write, Linux refuses O_CREAT on another user's file
    # (fs.protected_regular), though opening it is allowed.
    with contextlib.suppress(FileNotFoundError):
        return _open_existing(path)
    with contextlib.suppress(FileExistsError):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, _MODE)
    # Another process has made it meanwhile, and lock files are never removed.
    return _open_existing(path)


def _open_existing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | _OPEN_FLAGS)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    # flock does not need write permission; the holder's name is then not written.
    return os.open(path, os.O_RDONLY | _OPEN_FLAGS)


def _write_holder(descriptor: int, holder: Holder) -> None:
    if len(holder.campaign) > _CAMPAIGN_MAX:
        holder = replace(holder, campaign=f"{holder.campaign[:_CAMPAIGN_MAX]}…")
    data = durable.utf8(json.dumps(vars(holder), ensure_ascii=False) + "\n")
    # For error messages only: a read-only lock file or a full disk must not prevent a run.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)


def _decode_holder(data: bytes) -> Holder | None:
    try:
        return decode(Holder, json.loads(data), "holder")
    except (RecursionError, ValueError):
        return None
