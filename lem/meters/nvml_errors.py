"""What NVML's errors mean to the one who measures, and what to do about them."""

from __future__ import annotations

from typing import Any

__all__ = ["MeterFailure", "failure_of"]

# nvml.h, nvmlReturn_t
_UNINITIALIZED, _INVALID_ARGUMENT, _NOT_SUPPORTED, _NO_PERMISSION, _NOT_FOUND = 1, 2, 3, 4, 6
_FUNCTION_NOT_FOUND, _GPU_IS_LOST, _RESET_REQUIRED, _VERSION_MISMATCH = 13, 15, 16, 25
_DRIVER_NOT_LOADED, _GPU_NOT_FOUND, _DEPRECATED = 9, 28, 26

_LASTING = frozenset({_NOT_SUPPORTED, _NO_PERMISSION, _FUNCTION_NOT_FOUND, _VERSION_MISMATCH, _DEPRECATED})
_ABSENT = frozenset({_FUNCTION_NOT_FOUND, _VERSION_MISMATCH, _DEPRECATED})
_LOST = frozenset({_UNINITIALIZED, _DRIVER_NOT_LOADED, _GPU_IS_LOST, _RESET_REQUIRED, _GPU_NOT_FOUND})

_MEANINGS = {
    _INVALID_ARGUMENT: "NVML knows no such GPU; see lem gpus",
    _NOT_SUPPORTED: "this GPU or its driver does not support it",
    _NO_PERMISSION: "the driver refuses it to this user; run lem as root, or on the host instead of in a container",
    _NOT_FOUND: "NVML sees no such GPU; see lem gpus",
    _FUNCTION_NOT_FOUND: "this driver is too old for it; update the driver",
    _GPU_IS_LOST: "it fell off the bus; dmesg says why (Xid), reset it or reboot",
    _RESET_REQUIRED: "reset it (nvidia-smi --gpu-reset) or reboot",
}


class MeterFailure(Exception):
    """A reading that failed.

    Attributes:
        is_lasting: it will fail the same way again, so it need not be tried again.
        is_absent: the driver has no such function; there may be an older one.
        is_lost: the GPU itself is gone, and everything else about it fails too.
    """

    def __init__(
        self, message: str, *, is_lasting: bool = False, is_absent: bool = False, is_lost: bool = False
    ) -> None:
        super().__init__(message)
        self.is_lasting = is_lasting
        self.is_absent = is_absent
        self.is_lost = is_lost


def failure_of(nvml: Any, code: int) -> MeterFailure:
    """The failure that an error code of NVML stands for."""
    said, meaning = str(nvml.NVMLError(code)), _MEANINGS.get(code)
    return MeterFailure(
        said if meaning is None else f"{said} ({meaning})",
        is_lasting=code in _LASTING,
        is_absent=code in _ABSENT,
        is_lost=code in _LOST,
    )
