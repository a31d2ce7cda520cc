"""A campaign without processes: a clock that waits move, a stop on that clock, and workers that answer as told.

Everything above the worker is real: plan, locks, manifest, result folders and records on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from lem.base.errors import EngineError, Interrupted, UserError
from lem.config.campaign_config import CampaignConfig, CampaignExecutionConfig, CampaignGridConfig, CampaignIOConfig
from lem.orchestration.campaign import CampaignRunner
from lem.orchestration.dispatch import Executor, Outcome, Worker
from lem.orchestration.host_meters import HostMeters
from lem.orchestration.manifest import CampaignManifest, ManifestManager
from lem.orchestration.resume import RunOptions
from lem.orchestration.schedule import CampaignOutcome, StopRequest, Timeouts
from lem.orchestration.status import Event, Observer
from lem.record import write_record
from lem.worker.channel import Check, Message, Result, RunRequest
from tests.records import make_record

FOUR, EIGHT = "pytorch-max_output_tokens=4", "pytorch-max_output_tokens=8"
ENVIRONMENT: Mapping[str, Any] = {
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "driver": None,
    "gpus": [],
}


class FakeClock:
    """Time that passes only while something waits or runs; it starts at noon, UTC."""

    def __init__(self, start: datetime = datetime(2026, 7, 14, 12, tzinfo=timezone.utc)) -> None:
        self.elapsed_s = 0.0
        self._start = start

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self.elapsed_s)

    def set_ahead(self, seconds: float) -> None:
        """Set the time of day, back if negative."""
        self._start += timedelta(seconds=seconds)

    def monotonic(self) -> float:
        return 1000.0 + self.elapsed_s


class FakeStop(StopRequest):
    """A stop whose waits move the clock, and for which a signal may come at a second of it."""

    def __init__(self, clock: FakeClock, signal_at_s: float = float("inf")) -> None:
        super().__init__()
        self.waits: list[float] = []
        self._clock = clock
        self._signal_at_s = signal_at_s

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        if not self.is_set():
            self.pass_time(seconds)
        return self.is_set()

    def pass_time(self, seconds: float) -> None:
        """Let time pass; what comes before its end happens."""
        end_s = self._clock.elapsed_s + seconds
        if end_s >= self._signal_at_s:
            end_s = max(self._signal_at_s, self._clock.elapsed_s)
            self._signal_at_s = float("inf")
            self.request(2)
        self._clock.elapsed_s = end_s


class LoadError(EngineError):
    """An answer of a worker: the load fails after 2 s, so that there is no window."""


class FakeWorker(Worker):
    """Answers the attempts at each configuration one after the other, the last answer for ever; each takes 10 s.

    An answer is `ok`, `invalid` (a result that is not valid), `none` (says there is a result, and there is none), an
    `EngineError` to report (a `LoadError` is one without a window), another exception to raise, a number (a result with
    that throughput), or a function of the request that gives one of these.
    """

    def __init__(
        self, clock: FakeClock, answers: Mapping[str, Sequence[Any]], environment: Mapping[str, Any] = ENVIRONMENT
    ) -> None:
        super().__init__(())
        self.requests: list[RunRequest] = []
        self.checks: list[Check] = []
        self.findings: list[Message] = [Result("check", engine_reused=False)]  # what it answers to a check
        self.opened = 0
        self._is_there = False
        self._clock = clock
        self._answers = {name: list(items) for name, items in answers.items()}
        self._found = environment

    def open(self, stop: Any = None, timeout_s: float = 0.0) -> None:
        self.opened += not self._is_there
        self._is_there = True
        self.environment = self._found

    def run(self, request: RunRequest, on_event: Observer, timeouts: Timeouts, stop: Any = None) -> Outcome:
        self.open()
        self.requests.append(request)
        answers = self._answers.get(str(request.identity["config_name"]), ["ok"])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        phase, taken_s = ("load", 2.0) if isinstance(answer, LoadError) else ("window", 10.0)
        on_event(Event("phase", data={"exp_id": request.exp_id, "phase": phase}))
        if isinstance(stop, FakeStop):
            stop.pass_time(taken_s)
            if stop.signum is not None:
                raise Interrupted(stop.signum)
        return self._obey(answer(request) if callable(answer) else answer, request)

    def check(self, check: Check, stop: Any = None, timeout_s: float = 0.0) -> list[Message]:
        self.open()
        self.checks.append(check)
        return self.findings

    def stop(self) -> str:
        self._is_there = False
        return ""

    def kill(self) -> None:
        self._is_there = False

    def _obey(self, answer: Any, request: RunRequest) -> Outcome:
        if isinstance(answer, EngineError):
            return Outcome(answer, log_tail="last words")
        if isinstance(answer, BaseException):
            raise answer
        if answer != "none":
            write_result(request, is_valid=answer != "invalid", rate=answer if isinstance(answer, float) else 100.0)
        return Outcome()


def write_result(request: RunRequest, *, is_valid: bool = True, rate: float = 100.0, **identity: Any) -> None:
    """Leave the result that a worker would."""
    reasons = () if is_valid else ("it was too hot",)
    load_id = f"load {request.exp_id} {request.identity['attempt']}"
    record = make_record(is_valid=is_valid, invalid_reasons=reasons, output_tok_per_s=rate, load_id=load_id)
    names = {item.name for item in dataclasses.fields(record.identity)} & request.identity.keys()
    known = {name: request.identity[name] for name in names}
    identified = dataclasses.replace(record, identity=dataclasses.replace(record.identity, **{**known, **identity}))
    write_record(Path(request.result_dir) / "result.json", identified)


class FakeExecutor:
    """One worker for every backend, and the names of what was asked of it."""

    name = "local"

    def __init__(self, worker: FakeWorker) -> None:
        self.worker = worker
        self.calls: list[str] = []
        self.look_error: Exception | None = None
        self.prepare_error: UserError | None = None

    def worker_for(self, backend: str) -> Worker:
        return self.worker

    def prepare(self, backends: Collection[str]) -> None:
        if self.prepare_error is not None:
            raise self.prepare_error

    def stop(self) -> None:
        self.calls.append("stop")
        self.worker.stop()

    def kill(self) -> None:
        self.calls.append("kill")
        self.worker.kill()

    def clear(self) -> None:
        self.calls.append("clear")

    def look_after(self, report: Callable[[str], None]) -> None:
        self.calls.append("look_after")
        if self.look_error is not None:
            raise self.look_error

    def close(self) -> None:
        self.calls.append("close")


def make_campaign(folder: Path, *, outputs: Sequence[int] = (4, 8), **changes: Any) -> CampaignConfig:
    """A campaign with a configuration for each bound on the output; `execution` are keywords of its section."""
    execution = {"cycles": 2, "config_gap_seconds": 0, "cycle_gap_seconds": 0, **changes.pop("execution", {})}
    shared = {"max_output_tokens": list(outputs), "gpus": [[]], **changes.pop("shared", {})}
    folders: dict[str, Any] = {
        name: str(folder / name.partition("_")[0]) for name in ("results_dir", "configs_dir", "state_dir")
    }
    return CampaignConfig(
        **{
            "campaign_name": "demo",
            "model": "none",
            "grid": CampaignGridConfig(backends=("pytorch",), shared=shared),
            "execution": CampaignExecutionConfig(**execution),
            "io": CampaignIOConfig(**folders),
            **changes,
        }
    )


class Place:
    """A folder, and what ran there: events, worker, clock."""

    def __init__(self, folder: Path, *, signal_at_s: float = float("inf")) -> None:
        self.folder, self.node = folder, "here"
        self.clock = FakeClock()
        self.stop = FakeStop(self.clock, signal_at_s)
        self.events: list[Event] = []
        self.executor = FakeExecutor(FakeWorker(self.clock, {}))

    def runner(
        self,
        campaign: CampaignConfig,
        answers: Mapping[str, Sequence[Any]] | None = None,
        *,
        environment: Mapping[str, Any] = ENVIRONMENT,
        **more: Any,
    ) -> CampaignRunner:
        """A runner with a new worker that answers like that."""
        self.executor = FakeExecutor(FakeWorker(self.clock, answers or {}, environment))
        executor: Executor = self.executor
        runner = CampaignRunner(
            campaign,
            executor=executor,
            observe=self.events.append,
            stop=self.stop,
            now=self.clock.now,
            monotonic=self.clock.monotonic,
            host="here",
            node=self.node,
            **more,
        )
        runner.meters = HostMeters("no driver", "no powercap", "no process is watched")
        return runner

    def run(
        self,
        answers: Mapping[str, Sequence[Any]] | None = None,
        *,
        deadline_s: float | None = None,
        environment: Mapping[str, Any] = ENVIRONMENT,
        options: RunOptions | None = None,
        **campaign: Any,
    ) -> CampaignOutcome:
        """How a campaign with these changes went; no experiment begins after that many seconds from now."""
        runner = self.runner(
            make_campaign(self.folder, **campaign), answers, environment=environment, options=options or RunOptions()
        )
        return runner.run(deadline_s=None if deadline_s is None else self.clock.monotonic() + deadline_s)

    @property
    def requests(self) -> list[RunRequest]:
        """What the last worker was asked."""
        return self.executor.worker.requests

    def asked(self) -> list[tuple[str, int, int]]:
        """Name, cycle (from 1) and attempt of each request."""
        found = [item.identity for item in self.requests]
        return [(str(item["config_name"]), item["cycle_index"] + 1, item["attempt"]) for item in found]

    def manifest(self) -> CampaignManifest:
        """As it is on disk."""
        manifest = ManifestManager(self.folder / "state" / "demo" / "campaign_manifest.json").load_strict()
        assert manifest is not None
        return manifest

    def statuses(self) -> list[str]:
        return [entry.status for entry in self.manifest().experiments]

    def kinds(self) -> list[str]:
        """The events, without those of the progress inside an experiment."""
        return [event.kind for event in self.events if event.kind not in ("phase", "progress", "tick")]

    def told(self, kind: str) -> list[Mapping[str, Any]]:
        """The data of the events of a kind."""
        return [event.data for event in self.events if event.kind == kind]
