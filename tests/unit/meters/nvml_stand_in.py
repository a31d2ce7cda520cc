"""A pynvml whose every answer a test sets, for what no script of the NVML double can order exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

from lem.base.clock import Clock

NOT_SUPPORTED = 3
NS_PER_S = 1_000_000_000

_NAMES = {
    3: "Not Supported",
    4: "Insufficient Permissions",
    6: "Not Found",
    10: "Timeout",
    13: "Function Not Found",
    15: "GPU is lost",
}


class NVMLError(Exception):
    """As pynvml's: made from a code, which it keeps as `value`."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return _NAMES.get(self.value, "Unknown Error")


@dataclass
class FakeNvml:
    """GPUs by UUID; a handle is the UUID."""

    uuids: tuple[str, ...] = ("GPU-a",)
    # What a function says of every GPU, where it is not the usual: a value, or a function of the handle.
    answers: dict[str, Any] = field(default_factory=dict)
    # Codes that functions fail with; `(function, uuid)` for one GPU alone.
    failures: dict[Any, int] = field(default_factory=dict)
    # (field, scope) to (type, value); others are not supported.
    fields: Mapping[tuple[int, int], tuple[int, float]] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)  # GPUs that fail in everything, with their code
    calls: list[str] = field(default_factory=list)  # every function that was called

    NVMLError = NVMLError

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("nvml"):
            raise AttributeError(name)
        return lambda *arguments: self._answer(name, *arguments)

    def _answer(self, name: str, *arguments: Any) -> Any:
        self.calls.append(name)
        handle = arguments[0] if arguments else None
        self._fail_if(self.failures.get(name))
        self._fail_if(self.failures.get((name, handle)))
        self._fail_if(self.lost.get(str(handle)))
        if name == "nvmlDeviceGetFieldValues":
            return [self._field(*pair) for pair in arguments[1]]
        if name == "nvmlDeviceGetHandleByUUID" and handle not in self.uuids:
            raise NVMLError(6)
        usual: dict[str, Any] = {
            "nvmlSystemGetDriverVersion": "580.65.06",
            "nvmlDeviceGetCount": len(self.uuids),
            "nvmlDeviceGetHandleByIndex": lambda index: self.uuids[index],
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlDeviceGetUUID": lambda handle: handle,
            "nvmlDeviceGetIndex": self.uuids.index,
            "nvmlDeviceGetName": "NVIDIA Test",
            "nvmlDeviceGetVbiosVersion": "96.00",
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetPersistenceMode": 1,
            "nvmlDeviceGetMigMode": [0, 0],
            "nvmlDeviceGetVirtualizationMode": 0,
            "nvmlDeviceGetTotalEnergyConsumption": 1_000,
            "nvmlDeviceGetPowerUsage": 90_000,
            "nvmlDeviceGetTemperatureV": 41,
            "nvmlDeviceGetClockInfo": 1_980,
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=37, memory=5),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=2_000, total=80_000),
            "nvmlDeviceGetCurrentClocksEventReasons": 0x4,
            "nvmlDeviceGetComputeRunningProcesses": [],
        }
        answer = {**usual, **self.answers}.get(name, NVMLError(13))
        if isinstance(answer, NVMLError):
            raise answer
        return answer(handle) if callable(answer) else answer

    def _field(self, number: int, scope: int) -> Any:
        kind, value = self.fields.get((number, scope), (None, 0.0))
        if kind is None:
            return SimpleNamespace(nvmlReturn=NOT_SUPPORTED, valueType=0, value=None)
        member = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")[kind]
        return SimpleNamespace(nvmlReturn=0, valueType=kind, value=SimpleNamespace(**{member: value}))

    @staticmethod
    def _fail_if(code: int | None) -> None:
        if code is not None:
            raise NVMLError(code)


@dataclass
class FakeClock(Clock):
    """A clock that stands still until it is set; every stamp takes `step_ns`."""

    now_ns: int = 100 * NS_PER_S
    step_ns: int = 0

    def monotonic_ns(self) -> int:
        self.now_ns += self.step_ns
        return self.now_ns

    def utc_now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=self.now_ns // 1_000)

    def sleep(self, duration_s: float) -> None:
        self.now_ns += round(duration_s * NS_PER_S)
