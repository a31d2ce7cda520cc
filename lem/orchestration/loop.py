"""The loop over the experiments of a campaign: gap, attempt, and again where that helps."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from lem.base.clock import utc_text
from lem.base.errors import InfrastructureError, Interrupted, LemError
from lem.config.campaign_config import CampaignConfig
from lem.orchestration.attempt import WorkerEvent
from lem.orchestration.host_meters import GapOutcome, keep_gap
from lem.orchestration.manifest import COMPLETED, FAILED, RUNNING, Attempt, CampaignManifest
from lem.orchestration.order import GapKind, gaps_before, loads_engine
from lem.orchestration.plan import CampaignExperiment
from lem.orchestration.resume import interrupt_entry
from lem.orchestration.schedule import StopRequest
from lem.orchestration.session import Measurement, Session
from lem.orchestration.status import Event, Observer

# An experiment that fails, or whose result is not valid, is tried once more inside its cycle.
MAX_TRIES = 2

# How often a wait is told, as often as a worker sends heartbeats.
_TICK_S = 5.0


class Stopped(enum.Enum):
    """Why a loop ended before its end."""

    SIGNAL = "signal"
    DEADLINE = "deadline"
    FAIL_FAST = "fail_fast"
    INFRASTRUCTURE = "infrastructure"


@dataclass(frozen=True)
class CampaignOutcome:
    """How a run of a campaign ended.

    Attributes:
        manifest: as it was last written.
        stopped: why it ended before its end; None when it did not.
        error: what stood in the way, when something did.
        signum: the signal that asked it to stop.
        remark: what became of a top-up; empty without one.
    """

    manifest: CampaignManifest
    stopped: Stopped | None = None
    error: LemError | None = None
    signum: int | None = None
    remark: str = ""


@dataclass
class ExperimentLoop:
    """Runs experiments one after another and writes every step into the manifest.

    Attributes:
        save: writes the manifest.
        is_cold: every experiment gets a worker of its own.
        is_fail_fast: the first failed experiment ends the loop.
        is_check_due: whether what the workers run in is looked at before the experiment at a place of the order (from
            0), which has this gap before it.
    """

    campaign: CampaignConfig
    manifest: CampaignManifest
    save: Callable[[], None]
    session: Session
    observe: Observer
    stop: StopRequest
    now: Callable[[], datetime]
    monotonic: Callable[[], float]
    is_cold: bool = False
    is_fail_fast: bool = False
    is_check_due: Callable[[int, GapKind | None], bool] = lambda _index, _gap: False
    _durations: list[float] = field(default_factory=list)
    _remaining: int = 0
    _since_s: float | None = None

    def run_to_end(
        self,
        experiments: Sequence[CampaignExperiment],
        deadline_s: float | None,
        first_gap: GapKind | None = None,
    ) -> CampaignOutcome:
        """How it ended, also where something came in between."""
        stopped, error = None, None
        try:
            stopped = self.run(experiments, deadline_s, first_gap)
        except Interrupted:
            stopped = Stopped.SIGNAL
        except InfrastructureError as infrastructure:
            stopped, error = Stopped.INFRASTRUCTURE, infrastructure
        return CampaignOutcome(self.manifest, stopped, error, self.stop.signum)

    def why_stop(self, deadline_s: float | None) -> Stopped | None:
        """Why nothing more is begun now; None when it may be."""
        if self.stop.is_set():
            return Stopped.SIGNAL
        return Stopped.DEADLINE if deadline_s is not None and self.monotonic() >= deadline_s else None

    def run(
        self,
        experiments: Sequence[CampaignExperiment],
        deadline_s: float | None = None,
        first_gap: GapKind | None = None,
    ) -> Stopped | None:
        """Why it ended early; None when every experiment had its turn.

        Args:
            deadline_s: no experiment begins after it, on the clock of `monotonic`.
            first_gap: the gap before the first of them, where others ran before in the same session.

        Raises:
            InfrastructureError: what experiments stand on is gone; the rest stays pending.
            Interrupted: a second signal came, or one that broke off an attempt.
        """
        execution = self.campaign.execution
        gaps = [first_gap, *gaps_before(experiments, execution.structure)[1:]]
        loads = loads_engine(experiments, reuse=execution.reuse, is_cold=self.is_cold)
        for index, experiment in enumerate(experiments):
            self._remaining, self._since_s = len(experiments) - index, self.monotonic()
            stopped = self.why_stop(deadline_s)
            if stopped is not None:
                return stopped
            gap = self._keep_gap(gaps[index], deadline_s)
            stopped = self.why_stop(deadline_s)
            if stopped is not None:
                return stopped
            if self.is_check_due(index, gaps[index]):
                self.session.look_after(lambda text: self.tell("note", text=text))
            is_kept = index + 1 < len(experiments) and not loads[index + 1]
            has_result = self._run_experiment(experiment, keep_engine=is_kept, gap=gap)
            if self.is_cold:
                self.session.end_workers()
            if self.is_fail_fast and not has_result:
                return Stopped.FAIL_FAST
        return None

    def tell(self, kind: str, **data: Any) -> None:
        """Tell the observer, with how far the campaign is."""
        self.observe(Event(kind, self._done(), self.manifest.total_experiments, self._eta_s(), data))

    def _keep_gap(self, kind: GapKind | None, deadline_s: float | None) -> GapOutcome | None:
        if kind is None:
            return None
        execution = self.campaign.execution
        cap_s = execution.cycle_gap_seconds if kind == "cycle" else execution.config_gap_seconds
        if deadline_s is not None:
            cap_s = min(cap_s, deadline_s - self.monotonic())
        if cap_s > 0:
            self.tell("gap", gap=kind, cap_s=cap_s)
        if cap_s <= 0:
            return keep_gap(cap_s, is_recovered=None, monotonic=self.monotonic, wait=self._wait)
        with self.session.watching_recovery() as is_recovered:
            return keep_gap(cap_s, is_recovered=is_recovered, monotonic=self.monotonic, wait=self._wait)

    def _wait(self, seconds: float) -> bool:
        """Sleep, and tell from time to time how long still; whether a stop was asked for."""
        until_s = self.monotonic() + seconds
        while (left_s := until_s - self.monotonic()) > 0:
            self.tell("tick", left_s=left_s)
            if self.stop.wait(min(left_s, _TICK_S)):
                return True
        return self.stop.is_set()

    def _run_experiment(self, experiment: CampaignExperiment, *, keep_engine: bool, gap: GapOutcome | None) -> bool:
        """Whether there is a result."""
        self.tell("experiment_started", **self._who(experiment))
        started_s = self.monotonic()
        measurements: list[Measurement] = []
        while True:
            measurement = self._attempt(experiment, keep_engine=keep_engine, gap=gap)
            measurements.append(measurement)
            reason = _reason_to_try_again(measurement)
            if reason is None or len(measurements) == MAX_TRIES:
                break
            self._update(experiment, measurement.attempt)
            self.save()
            self.tell("experiment_retried", **self._who(experiment), reason=reason, **_why(measurement))
            gap = self._gap_before_retry(experiment)
        return self._settle(experiment, measurements, self.monotonic() - started_s)

    def _gap_before_retry(self, experiment: CampaignExperiment) -> GapOutcome | None:
        """The gap before another try, which follows an attempt as any experiment follows another.

        Raises:
            Interrupted: a stop was asked for in it; the experiment is pending again.
        """
        gap = self._keep_gap("configuration", None)
        if self.stop.signum is not None:
            interrupt_entry(self.manifest.get_entry(experiment.exp_id))
            self.tell("experiment_interrupted", **self._who(experiment), reason=None)
            self.save()
            raise Interrupted(self.stop.signum)
        return gap

    def _attempt(self, experiment: CampaignExperiment, *, keep_engine: bool, gap: GapOutcome | None) -> Measurement:
        entry = self.manifest.get_entry(experiment.exp_id)
        folder = self.session.prepare(experiment)
        started_at = utc_text(self.now())
        entry.put_attempt(Attempt(folder.number, started_at=started_at, host=entry.host))
        entry.status, entry.error, entry.started_at = RUNNING, None, entry.started_at or started_at
        entry.retry_count = len(entry.attempts) - 1
        try:
            self.save()
            return self.session.measure(experiment, folder, keep_engine=keep_engine, gap=gap, on_event=self._pass_on)
        except (Interrupted, InfrastructureError) as error:
            interrupt_entry(entry)
            if not isinstance(error, Interrupted):
                entry.error = error.message
            self.tell("experiment_interrupted", **self._who(experiment), reason=entry.error)
            self.save()
            raise

    def _settle(self, experiment: CampaignExperiment, measurements: Sequence[Measurement], elapsed_s: float) -> bool:
        """Write down what the attempts came to; whether there is a result."""
        last = measurements[-1]
        entry = self._update(experiment, last.attempt)
        results = [item for item in measurements if item.record is not None]
        best = next((item for item in results if item.attempt.valid), results[-1] if results else None)
        entry.completed_at = last.attempt.completed_at
        if best is not None:
            entry.status, entry.error, entry.result_path = COMPLETED, None, best.attempt.result_path
        else:
            entry.status, entry.error = FAILED, last.attempt.error
        self.save()
        if self._since_s is not None:
            self._durations.append(self.monotonic() - self._since_s)
        self._remaining, self._since_s = self._remaining - 1, None
        self._tell_end(experiment, best or last, elapsed_s)
        return best is not None

    def _tell_end(self, experiment: CampaignExperiment, measurement: Measurement, elapsed_s: float) -> None:
        who, record = self._who(experiment), measurement.record
        if record is not None:
            self.tell(
                "experiment_completed",
                **who,
                valid=record.validity.valid,
                invalid_reasons=[reason.text for reason in record.validity.invalid_reasons],
                output_tok_per_s=record.throughput.output_tok_per_s,
                elapsed_s=elapsed_s,
                result=measurement.attempt.result_path,
            )
            return
        error = measurement.attempt.error
        self.tell("experiment_failed", **who, error=error, **_why(measurement), elapsed_s=elapsed_s)

    def _update(self, experiment: CampaignExperiment, attempt: Attempt) -> Any:
        entry = self.manifest.get_entry(experiment.exp_id)
        entry.put_attempt(attempt)
        return entry

    def _pass_on(self, event: WorkerEvent) -> None:
        if event.kind == "phase":
            self.tell("phase", exp_id=event.exp_id, phase=event.phase)
        elif event.kind == "progress":
            done, total = event.done, event.total
            self.tell(
                "progress",
                exp_id=event.exp_id,
                phase_done=done,
                phase_total=total,
                text=event.text,
                power_w=event.power_w,
            )
        else:
            self.tell("tick")

    def _who(self, experiment: CampaignExperiment) -> dict[str, Any]:
        return {
            "exp_id": experiment.exp_id,
            "config_name": experiment.config_name,
            "backend": experiment.backend,
            "cycle": experiment.cycle_index + 1,
            "cycles": self.campaign.execution.cycles,
        }

    def _done(self) -> int:
        return sum(entry.status in (COMPLETED, FAILED) for entry in self.manifest.experiments)

    def _eta_s(self) -> float | None:
        """What the experiments left take at the mean of those before, less what the one at hand has had of it."""
        if not self._durations:
            return None
        mean_s = sum(self._durations) / len(self._durations)
        elapsed_s = 0.0 if self._since_s is None else self.monotonic() - self._since_s
        return self._remaining * mean_s - min(elapsed_s, mean_s)


def _why(measurement: Measurement) -> dict[str, Any]:
    """What a person needs to look into an attempt."""
    error = measurement.error
    return {
        "error_kind": error.kind if error else None,
        "hint": error.hint if error else "",
        "log": measurement.attempt.log_path,
        "log_tail": measurement.log_tail,
    }


def _reason_to_try_again(measurement: Measurement) -> str | None:
    """Why another attempt may end differently; None when it would not, or there is a valid result."""
    if measurement.error is not None:
        return None if measurement.error.is_permanent else measurement.error.message
    if measurement.record is not None and not measurement.record.validity.valid:
        return "; ".join(reason.text for reason in measurement.record.validity.invalid_reasons)
    return None
