"""The loop over the experiments of a campaign: gap, attempt, and again where that helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lem.base.clock import utc_text
from lem.base.errors import InfrastructureError, Interrupted
from lem.orchestration.host_meters import GapOutcome, keep_gap
from lem.orchestration.manifest import COMPLETED, FAILED, RUNNING, Attempt, CampaignManifestEntry
from lem.orchestration.plan import CampaignExperiment, GapKind, gaps_before, loads_engine
from lem.orchestration.resume import interrupt_entry
from lem.orchestration.schedule import CampaignOutcome, Stopped
from lem.orchestration.session import Measurement, Session
from lem.orchestration.status import Event, Observer

# An experiment that fails, or whose result is not valid, is tried once more in its cycle.
MAX_TRIES = 2

# How often a wait is reported, as often as a worker sends heartbeats.
_TICK_S = 5.0


@dataclass
class ExperimentLoop:
    """Runs experiments one after another and writes every step into the manifest."""

    session: Session
    save: Callable[[], None]  # writes the manifest
    observe: Observer
    is_cold: bool = False  # every experiment gets a worker of its own
    is_fail_fast: bool = False  # the first failed experiment ends the loop
    # Whether containers are checked before the experiment at a place of the order (from 0), after this gap.
    is_check_due: Callable[[int, GapKind | None], bool] = lambda _index, _gap: False
    _durations: list[float] = field(default_factory=list)
    _remaining: int = 0
    _since_s: float | None = None

    def run_to_end(
        self, experiments: Sequence[CampaignExperiment], deadline_s: float | None, first_gap: GapKind | None = None
    ) -> CampaignOutcome:
        """How it ended, also when a signal or an error stopped it.

        Args:
            deadline_s: no experiment begins after it, on the clock of `monotonic`.
            first_gap: the gap before the first of them, where others ran before in the same session.
        """
        stopped, error = None, None
        try:
            stopped = self._run(experiments, deadline_s, first_gap)
        except Interrupted:
            stopped = Stopped.SIGNAL
        except InfrastructureError as infrastructure:
            stopped, error = Stopped.INFRASTRUCTURE, infrastructure
        return CampaignOutcome(self.session.manifest, stopped, error, self.session.stop.signum)

    def why_stop(self, deadline_s: float | None) -> Stopped | None:
        """Why no further experiment may begin now; None when it may."""
        if self.session.stop.is_set():
            return Stopped.SIGNAL
        return Stopped.DEADLINE if deadline_s is not None and self.session.monotonic() >= deadline_s else None

    def report(self, kind: str, **data: Any) -> None:
        """Report something that happened, with how far the campaign is."""
        self._pass_on(Event(kind, data=data))

    def _pass_on(self, event: Event) -> None:
        done = sum(entry.status in (COMPLETED, FAILED) for entry in self.session.manifest.experiments)
        self.observe(replace(event, done=done, total=self.session.manifest.total_experiments, eta_s=self._eta_s()))

    def _run(
        self, experiments: Sequence[CampaignExperiment], deadline_s: float | None, first_gap: GapKind | None
    ) -> Stopped | None:
        execution = self.session.campaign.execution
        gaps = [first_gap, *gaps_before(experiments, execution.structure)[1:]]
        loads = loads_engine(experiments, reuse=execution.reuse, is_cold=self.is_cold)
        for index, experiment in enumerate(experiments):
            self._remaining, self._since_s = len(experiments) - index, self.session.monotonic()
            gap = None
            if self.why_stop(deadline_s) is None:
                gap = self._keep_gap(gaps[index], deadline_s)
            stopped = self.why_stop(deadline_s)
            if stopped is not None:
                return stopped
            if self.is_check_due(index, gaps[index]):
                self.session.look_after(lambda text: self.report("note", text=text))
            is_kept = index + 1 < len(experiments) and not loads[index + 1]
            has_result = self._run_experiment(experiment, keep_engine=is_kept, gap=gap)
            if self.is_cold:
                self.session.executor.stop()
            if self.is_fail_fast and not has_result:
                return Stopped.FAIL_FAST
        return None

    def _keep_gap(self, kind: GapKind | None, deadline_s: float | None) -> GapOutcome | None:
        if kind is None:
            return None
        execution, monotonic = self.session.campaign.execution, self.session.monotonic
        cap_s = execution.cycle_gap_seconds if kind == "cycle" else execution.config_gap_seconds
        if deadline_s is not None:
            cap_s = min(cap_s, deadline_s - monotonic())
        if cap_s <= 0:
            return keep_gap(cap_s, is_recovered=None, monotonic=monotonic, wait=self._wait)
        self.report("gap", gap=kind, cap_s=cap_s)
        with self.session.meters.watching() as is_recovered:
            return keep_gap(cap_s, is_recovered=is_recovered, monotonic=monotonic, wait=self._wait)

    def _wait(self, seconds: float) -> bool:
        """Sleep, and report from time to time how long still; whether a stop was requested."""
        until_s = self.session.monotonic() + seconds
        while (left_s := until_s - self.session.monotonic()) > 0:
            self.report("tick", left_s=left_s)
            if self.session.stop.wait(min(left_s, _TICK_S)):
                return True
        return self.session.stop.is_set()

    def _run_experiment(self, experiment: CampaignExperiment, *, keep_engine: bool, gap: GapOutcome | None) -> bool:
        """Whether there is a result."""
        who = self._who(experiment)
        entry = self.session.manifest.get_entry(experiment.exp_id)
        self.report("experiment_started", **who)
        started_s = self.session.monotonic()
        measurements: list[Measurement] = []
        while True:
            measurement = self._attempt(experiment, entry, keep_engine=keep_engine, gap=gap)
            measurements.append(measurement)
            entry.put_attempt(measurement.attempt)
            reason = _reason_to_try_again(measurement)
            if reason is None or len(measurements) == MAX_TRIES:
                break
            self.save()
            self.report("experiment_retried", **who, reason=reason, **_why(measurement))
            gap = self._keep_gap("configuration", None)
            if self.session.stop.signum is not None:
                interrupt_entry(entry)
                self.report("experiment_interrupted", **who, reason=None)
                self.save()
                raise Interrupted(self.session.stop.signum)
        return self._settle(experiment, entry, measurements, self.session.monotonic() - started_s)

    def _attempt(
        self,
        experiment: CampaignExperiment,
        entry: CampaignManifestEntry,
        *,
        keep_engine: bool,
        gap: GapOutcome | None,
    ) -> Measurement:
        session = self.session
        folder = session.repository.prepare_attempt(str(session.manifest.run_id), experiment.exp_id)
        folder.write_config(experiment.requested, experiment.resolved)
        started_at = utc_text(self.session.now())
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
            self.report("experiment_interrupted", **self._who(experiment), reason=entry.error)
            self.save()
            raise

    def _settle(
        self,
        experiment: CampaignExperiment,
        entry: CampaignManifestEntry,
        measurements: Sequence[Measurement],
        elapsed_s: float,
    ) -> bool:
        """Write down what the attempts came to; whether there is a result."""
        last = measurements[-1]
        results = [item for item in measurements if item.record is not None]
        best = next((item for item in results if item.attempt.valid), results[-1] if results else None)
        entry.completed_at = last.attempt.completed_at
        if best is not None:
            entry.status, entry.error, entry.result_path = COMPLETED, None, best.attempt.result_path
        else:
            entry.status, entry.error = FAILED, last.attempt.error
        self.save()
        if self._since_s is not None:
            self._durations.append(self.session.monotonic() - self._since_s)
        self._remaining, self._since_s = self._remaining - 1, None
        self._report_end(experiment, best or last, elapsed_s)
        return best is not None

    def _report_end(self, experiment: CampaignExperiment, measurement: Measurement, elapsed_s: float) -> None:
        who, record = self._who(experiment), measurement.record
        if record is None:
            error = measurement.attempt.error
            self.report("experiment_failed", **who, error=error, **_why(measurement), elapsed_s=elapsed_s)
            return
        self.report(
            "experiment_completed",
            **who,
            valid=record.validity.valid,
            invalid_reasons=[reason.text for reason in record.validity.invalid_reasons],
            output_tok_per_s=record.throughput.output_tok_per_s,
            elapsed_s=elapsed_s,
            result=measurement.attempt.result_path,
        )

    def _who(self, experiment: CampaignExperiment) -> dict[str, Any]:
        return {
            "exp_id": experiment.exp_id,
            "config_name": experiment.config_name,
            "backend": experiment.backend,
            "cycle": experiment.cycle_index + 1,
            "cycles": self.session.campaign.execution.cycles,
        }

    def _eta_s(self) -> float | None:
        """The time left at the mean of the experiments before, less what the current one has already used of it."""
        if not self._durations:
            return None
        mean_s = sum(self._durations) / len(self._durations)
        elapsed_s = 0.0 if self._since_s is None else self.session.monotonic() - self._since_s
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
