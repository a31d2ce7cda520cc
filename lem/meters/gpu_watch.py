"""What a sampler remembers of one GPU: how it gives rows, and how it goes on when the GPU does not answer."""

from __future__ import annotations

from typing import Protocol

from lem.meters.nvml import NvmlMeter
from lem.meters.nvml_errors import MeterFailure
from lem.meters.samples import CounterChange, GpuSample, MeterError, ProcessesSeen, Row, gpu_meter

__all__ = ["Complaints", "GpuWatch", "Stamps"]


class Stamps(Protocol):
    """Where time stamps come from."""

    def monotonic_ns(self) -> int:
        """CLOCK_MONOTONIC in nanoseconds."""


class Complaints:
    """What does not work, told once for as long as it stays the same."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def of(self, meter: str, at_ns: int, message: str) -> list[Row]:
        """The row that tells of a failure, unless that was the last thing told of this meter."""
        if self._said.get(meter) == message:
            return []
        self._said[meter] = message
        return [MeterError(at_ns, meter, message)]

    def withdraw(self, meter: str) -> None:
        """The meter works; its next failure is told again."""
        self._said.pop(meter, None)


class GpuWatch:
    """One GPU that is sampled.

    A GPU that is lost is asked nothing but, once a second, whether it is back. What fails for another reason is
    tried every time, with a fresh handle once a second; what the GPU does not have is tried once.
    """

    def __init__(self, meter: NvmlMeter, place: int, clock: Stamps, complaints: Complaints) -> None:
        """Start to watch.

        Args:
            place: of the GPU in the log's header.
        """
        self._meter = meter
        self._place = place
        self._clock = clock
        self._complaints = complaints
        self._has_counter = meter.has_counter
        self._energy_mj: int | None = None
        self._polled_ns = 0
        self._pids: tuple[int, ...] | None = None
        self._hopeless: set[str] = set() if meter.header.power_error is None else {"power"}
        self._is_lost = not meter.is_known
        self._is_failing = self._is_lost

    def poll(self) -> list[Row]:
        """The change of the energy counter, if there was one since the last poll."""
        if self._is_lost or not self._has_counter:
            return []
        opened_ns = self._clock.monotonic_ns()
        try:
            energy_mj = self._meter.read_counter_mj()
        except MeterFailure as failure:
            self._has_counter = not failure.is_lasting
            return self._failed("counter", opened_ns, failure)
        at_ns = (opened_ns + self._clock.monotonic_ns()) // 2
        self._complaints.withdraw(self._meter_name("counter"))
        before_ns = at_ns if self._energy_mj is None else self._polled_ns
        has_changed = energy_mj != self._energy_mj
        self._energy_mj, self._polled_ns = energy_mj, at_ns
        return [CounterChange(self._place, before_ns, at_ns, energy_mj)] if has_changed else []

    def sample(self) -> list[Row]:
        """One look at everything else; its stamp is that of the reading of power."""
        rows: list[Row] = []
        opened_ns = self._clock.monotonic_ns()
        power_w = self._read("power", rows)
        at_ns = (opened_ns + self._clock.monotonic_ns()) // 2
        temp_c = self._read("temperature", rows)
        sm_clock_hz = self._read("sm_clock", rows)
        util_ratio = self._read("utilisation", rows)
        memory_b = self._read("memory", rows)
        event_mask = self._read("events", rows)
        values = (power_w, temp_c, sm_clock_hz, util_ratio, memory_b, event_mask)
        if any(value is not None for value in values):
            sample = GpuSample(
                gpu=self._place,
                at_ns=at_ns,
                power_w=power_w,
                temp_c=temp_c,
                sm_clock_hz=sm_clock_hz,
                util_ratio=util_ratio,
                memory_b=None if memory_b is None else int(memory_b),
                event_mask=None if event_mask is None else int(event_mask),
            )
            rows.append(sample)
        return rows

    def look_at_processes(self) -> list[Row]:
        """The processes, when they are others than at the last look."""
        if self._is_lost or "processes" in self._hopeless:
            return []
        at_ns = self._clock.monotonic_ns()
        try:
            pids = self._meter.read_pids()
        except MeterFailure as failure:
            return self._failed("processes", at_ns, failure)
        self._complaints.withdraw(self._meter_name("processes"))
        if pids == self._pids:
            return []
        self._pids = pids
        return [ProcessesSeen(self._place, at_ns, pids)]

    def revive(self) -> list[Row]:
        """Once a second: look a GPU that does not answer up again."""
        if not self._is_failing or not self._meter.is_known:
            return []
        at_ns = self._clock.monotonic_ns()
        try:
            self._meter.renew()
        except MeterFailure as failure:
            return self._complaints.of(self._meter_name("handle"), at_ns, str(failure))
        self._complaints.withdraw(self._meter_name("handle"))
        self._is_lost = self._is_failing = False
        return []

    def _read(self, quantity: str, rows: list[Row]) -> float | None:
        """A quantity; None with what is to be told in `rows` when it cannot be read."""
        if self._is_lost or quantity in self._hopeless:
            return None
        try:
            value = self._meter.read(quantity)
        except MeterFailure as failure:
            rows += self._failed(quantity, self._clock.monotonic_ns(), failure)
            return None
        self._complaints.withdraw(self._meter_name(quantity))
        return value

    def _failed(self, what: str, at_ns: int, failure: MeterFailure) -> list[Row]:
        if failure.is_lasting:
            self._hopeless.add(what)
        else:
            self._is_failing = True
            self._is_lost = self._is_lost or failure.is_lost
        return self._complaints.of(self._meter_name(what), at_ns, str(failure))

    def _meter_name(self, what: str) -> str:
        return gpu_meter(self._place, what)
