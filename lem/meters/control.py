"""Settings of GPUs, the power limit and a locked clock: what can be set, setting it, and restoring what was set before.

A process of its own holds the settings (`hold`): it writes a note of what was set before, sets, and restores when its
stdin is closed, which the kernel does however the host process ends. If the holder ends first, the host process
restores from the note; if both have ended, the next lem that finds the note does. A note from before a reboot is void:
the driver forgets both settings when it is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from lem.base import durable
from lem.base.codec import decode
from lem.base.dataclass import asdict, dataclass, replace
from lem.base.errors import ExitCode, LemError
from lem.base.measurement import LIMIT_TOLERANCE_W
from lem.config.sections import GpuConfig
from lem.meters.nvml import open_nvml

_NO_PERMISSION, _NOT_SUPPORTED = 4, 3  # nvml.h, nvmlReturn_t
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_SUFFIX = ".settings"
_READ_B = 4096

PERMISSION_HINT = "run lem as root, or give it CAP_SYS_ADMIN; for the fleet: lem_campaign_gpu_settings: true"
_RANGE_HINT = "nvidia-smi -q -d POWER,SUPPORTED_CLOCKS shows what this GPU accepts"
_ABSENT_HINT = "remove the option, or use a GPU whose driver supports it"


class ControlError(LemError):
    """A GPU that cannot be set, or restored."""


@dataclass(frozen=True)
class Note:
    """What was set on a GPU before lem set something else."""

    uuid: str
    campaign: str
    boot_id: str
    power_limit_w: float | None  # None: the power limit is not touched
    is_clock_locked: bool  # NVML does not tell a former lock, so restoring unlocks


def note_path(folder: Path, uuid: str) -> Path:
    """One for each GPU and user: a user's notes are never read by another, who could have made them."""
    return folder / f"{re.sub('[^A-Za-z0-9._-]', '_', uuid)}.{os.geteuid()}{_SUFFIX}"


def find_notes(folder: Path, *, of_others: bool = False) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if path.name.endswith(_SUFFIX))
    except OSError:
        return []
    return [path for path in found if path.name.endswith(f".{os.geteuid()}{_SUFFIX}") != of_others]


def read_note(path: Path) -> Note | None:
    """None for one of another boot, or that is gone; ControlError for one that cannot be used."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            if os.fstat(stream.fileno()).st_uid != os.geteuid():
                raise ControlError(f"{path}: written by another user", "remove it")
            note = decode(Note, json.loads(stream.read(_READ_B)), "note")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = durable.reason_of(error) if isinstance(error, OSError) else error
        hint = "nvidia-smi -q -d POWER shows the default limit; set it (nvidia-smi -pl), unlock (-rgc), remove the file"
        raise ControlError(f"{path}: {reason}", hint) from error
    return note if note.boot_id == _boot_id() else None


def _boot_id() -> str:
    return _BOOT.read_text(encoding="ascii").strip()


def find_obstacle(nvml: Any, uuid: str, wanted: GpuConfig, *, may_set: bool) -> ControlError | None:
    """What keeps these settings from being made; with `may_set`, also whether this user may make them."""
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        if wanted.power_limit_w is not None:
            with _explained(nvml, "gpu.power_limit_w", uuid):
                least_w, most_w = (it / 1e3 for it in nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle))
                if not least_w <= wanted.power_limit_w <= most_w:
                    text = f"{wanted.power_limit_w:g} W on {uuid}: expected between {least_w:g} and {most_w:g} W"
                    raise ControlError(f"gpu.power_limit_w: {text}", _RANGE_HINT)
        if wanted.lock_clock_mhz is not None:
            with _explained(nvml, "gpu.lock_clock_mhz", uuid):
                memory_mhz = max(nvml.nvmlDeviceGetSupportedMemoryClocks(handle))
                _check_clock(uuid, wanted.lock_clock_mhz, nvml.nvmlDeviceGetSupportedGraphicsClocks(handle, memory_mhz))
        if may_set:
            _check_permission(nvml, handle, uuid, wanted)
    except ControlError as error:
        return error
    except nvml.NVMLError as error:
        return ControlError(f"{uuid}: NVML reports: {error}", "see lem gpus")
    return None


def _check_clock(uuid: str, wanted_mhz: int, known_mhz: Sequence[int]) -> None:
    if wanted_mhz not in known_mhz:
        near = sorted(known_mhz, key=lambda clock: abs(clock - wanted_mhz))[:2]
        text = f"{wanted_mhz} MHz is not a clock of {uuid}, which has {min(known_mhz)} to {max(known_mhz)} MHz"
        hint = f"choose one that it has, such as {' or '.join(map(str, sorted(near)))}"
        raise ControlError(f"gpu.lock_clock_mhz: {text}", hint)


def _check_permission(nvml: Any, handle: Any, uuid: str, wanted: GpuConfig) -> None:
    # To set what is set already changes nothing. A lock cannot be read, but needs the same permission.
    option = "gpu.power_limit_w" if wanted.power_limit_w is not None else "gpu.lock_clock_mhz"
    with _explained(nvml, option, uuid):
        try:
            nvml.nvmlDeviceSetPowerManagementLimit(handle, nvml.nvmlDeviceGetPowerManagementLimit(handle))
        except nvml.NVMLError as error:
            if wanted.power_limit_w is not None or error.value != _NOT_SUPPORTED:
                raise


@contextlib.contextmanager
def _explained(nvml: Any, option: str, uuid: str) -> Iterator[None]:
    try:
        yield
    except nvml.NVMLError as error:
        hints = {_NO_PERMISSION: PERMISSION_HINT, _NOT_SUPPORTED: _ABSENT_HINT}
        raise ControlError(
            f"{option}: cannot be set on {uuid}: {error}", hints.get(error.value, _RANGE_HINT)
        ) from error
    except AttributeError as error:  # an older pynvml has fewer functions
        raise ControlError(f"{option}: {error}", "update nvidia-ml-py") from error


def _set(nvml: Any, wanted: GpuConfig, note: Note, path: Path) -> None:
    handle = nvml.nvmlDeviceGetHandleByUUID(note.uuid)
    if wanted.power_limit_w is not None:
        with _explained(nvml, "gpu.power_limit_w", note.uuid):
            _set_limit(nvml, handle, note.uuid, wanted.power_limit_w)
    if wanted.lock_clock_mhz is not None:
        with _explained(nvml, "gpu.lock_clock_mhz", note.uuid):
            try:
                nvml.nvmlDeviceSetGpuLockedClocks(handle, wanted.lock_clock_mhz, wanted.lock_clock_mhz)
            except nvml.NVMLError:  # then nothing is locked, and unlocking may be refused, too
                durable.write_json(path, asdict(replace(note, is_clock_locked=False)))
                raise


def _set_limit(nvml: Any, handle: Any, uuid: str, limit_w: float) -> None:
    limit_mw = round(limit_w * 1e3)
    if nvml.nvmlDeviceGetPowerManagementLimit(handle) != limit_mw:
        nvml.nvmlDeviceSetPowerManagementLimit(handle, limit_mw)
    found_w = nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3
    if abs(found_w - limit_w) > LIMIT_TOLERANCE_W:
        text = f"set to {limit_w:g} W on {uuid}, which then reports {found_w:g} W"
        raise ControlError(f"power limit: {text}", "find out which other program sets it")


def restore(path: Path) -> Note | None:
    """Set what a note says was set before, and remove it; None where there is nothing to restore, else ControlError."""
    note = read_note(path)
    if note is not None:
        with open_nvml() as nvml:
            if isinstance(nvml, str):
                raise ControlError(f"{note.uuid} cannot be restored: {nvml}", "repair the driver; lem doctor --restore")
            _restore(nvml, note)
    path.unlink(missing_ok=True)
    return note


def _restore(nvml: Any, note: Note) -> None:
    failed: list[Exception] = []
    handle = None
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(note.uuid)
        if note.power_limit_w is not None:
            _set_limit(nvml, handle, note.uuid, note.power_limit_w)
    except (nvml.NVMLError, ControlError) as error:
        failed.append(error)
    try:
        if note.is_clock_locked and handle is not None:
            nvml.nvmlDeviceResetGpuLockedClocks(handle)
    except nvml.NVMLError as error:
        failed.append(error)
    if failed:
        text = "; ".join(str(error) for error in failed)
        raise ControlError(
            f"{note.uuid}: its settings cannot be restored: {text}", f"{PERMISSION_HINT}; then lem doctor --restore"
        )


def hold(uuids: Sequence[str], wanted: GpuConfig, folder: Path, campaign: str, out: TextIO, err: TextIO) -> int:
    """Set, print `held` or the error as a line of JSON, and restore once stdin is closed."""
    # Only the end of the host process counts; a signal to all processes of a group is for it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    paths = [note_path(folder, uuid) for uuid in uuids]
    answer: dict[str, Any] = {"held": True}
    with open_nvml() as nvml:  # kept open: without persistence mode, the driver forgets when its last client leaves
        try:
            if isinstance(nvml, str):
                raise ControlError(f"gpu: NVML reports: {nvml}", "see lem gpus")
            _take(nvml, uuids, wanted, paths, campaign)
        except ControlError as error:
            answer = {"held": False, "message": error.message, "hint": error.hint}
        with contextlib.suppress(OSError):  # the host process is gone
            out.write(f"{json.dumps(answer)}\n")
            out.flush()
        while answer["held"] and os.read(0, _READ_B):
            pass
        return _restore_all(paths, err)


def _take(nvml: Any, uuids: Sequence[str], wanted: GpuConfig, paths: Sequence[Path], campaign: str) -> None:
    for uuid, path in zip(uuids, paths, strict=True):
        restore(path)  # of a holder that was killed
        limit_w = None
        try:
            if wanted.power_limit_w is not None:
                limit_w = nvml.nvmlDeviceGetPowerManagementLimit(nvml.nvmlDeviceGetHandleByUUID(uuid)) / 1e3
            note = Note(uuid, campaign, _boot_id(), limit_w, is_clock_locked=wanted.lock_clock_mhz is not None)
            durable.write_json(path, asdict(note))
            _set(nvml, wanted, note, path)
        except OSError as error:
            hint = durable.remedy_for(error, "LEM_LOCK_DIR")
            raise ControlError(f"{path}: {durable.reason_of(error)}: nothing is set without a note", hint) from error
        except nvml.NVMLError as error:
            raise ControlError(f"gpu: {uuid}: NVML reports: {error}", "see lem gpus") from error


def _restore_all(paths: Sequence[Path], err: TextIO) -> int:
    code = ExitCode.OK
    for path in paths:
        try:
            restore(path)
        except (ControlError, OSError) as error:  # noqa: PERF203 (each one is restored)
            err.write(f"{error}\n")
            code = ExitCode.EXPERIMENT_FAILED
    return code
