"""Runs of a program that `lem measure` meters: at rest, the run, at rest again, and a record of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import shutil
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

from lem.base import __version__, process
from lem.base.clock import Clock, seconds_between, utc_text
from lem.base.dataclass import dataclass, field, fields
from lem.base.errors import Interrupted, UserError
from lem.base.launch import own_command
from lem.base.measurement import MAX_FAILED_RATIO, Measured, Section, known
from lem.base.reasons import Reason
from lem.config.experiment import PROGRAM, ProgramConfig
from lem.engines.protocol import EngineReport
from lem.meters.energy import EnergyFindings, efficiency_of
from lem.meters.peers import WorkSource, read_work, stamp_of
from lem.orchestration.grid import experiment_id
from lem.orchestration.host_meters import Attendance, HostMeters
from lem.orchestration.schedule import StopRequest
from lem.record import (
    ITL_REPLACED,
    Compute,
    Identity,
    Latency,
    Record,
    Throughput,
    Validity,
    Window,
    Work,
    carbon_of,
    read_with_digest,
    write_record,
)
from lem.results.store import Repository, StoredResult, stopping_campaign
from lem.worker.channel import RunRequest
from lem.worker.children import interval_ms
from lem.worker.metering import Reporter, open_metering
from lem.worker.recording import describe_environment, read_host
from lem.worker.window import MeasuredWindow

_Section = TypeVar("_Section", bound=Section)
_UNSEEN = Reason.of("program_unseen")
_START_TIMEOUT_S = 30.0
# How long the program may take to end after the signal that lem got, and its guardian to kill what is left of it.
_PATIENCE_S, _KILL_S = 5.0, 12.0
_TICK_S = 1.0
_LATE_S = 1.0  # a wait that takes so much longer was a stop of this process
_WALK_SHARE = 200  # walks over /proc take at most this part of a CPU


class Program:
    """A program below a guardian, which waits to be run; leaving the block ends whatever is left of it."""

    def __init__(self, command: Sequence[str], streams: tuple[int, int, int]) -> None:
        self._on_suspend = signal.getsignal(signal.SIGTSTP)
        control, self._control = os.pipe2(os.O_CLOEXEC)
        self._message, message = os.pipe2(os.O_CLOEXEC)
        words = [*own_command(sys.executable), "worker", "--control-fd", str(control), "--message-fd", str(message)]
        # As NVML counts GPUs, and as lem does for its engines.
        env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **os.environ}
        try:
            spawned = [*words, "--program", *command]
            self._child = process.spawn(spawned, env=env, streams=streams, pass_fds=(control, message))
        finally:
            os.close(control)
            os.close(message)
        self.pid = self._child.pid  # of the guardian, which leads its group
        self.stopped_s = 0.0  # of lem itself, while this is there
        if not select.select([self._message], [], [], _START_TIMEOUT_S)[0] or not os.read(self._message, 1):
            self.__exit__(None, None, None)
            raise UserError(f"{command[0]}: the process that starts it was not ready in {_START_TIMEOUT_S:g} s")

    def __enter__(self) -> Program:
        if self._on_suspend is not signal.SIG_IGN:
            signal.signal(signal.SIGTSTP, self._suspend)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.signal(signal.SIGTSTP, self._on_suspend)
        os.close(self._control)
        os.close(self._message)
        self.code()

    def begin(self) -> None:
        os.write(self._control, b"!")

    def _suspend(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a handler gets both
        """Ctrl-Z: stop with the program, which has no terminal, and go on with it."""
        begin_s = time.monotonic()
        signal.signal(signum, signal.SIG_IGN)  # another one changes nothing
        self._signal_all(signal.SIGSTOP)
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        self.stopped_s += time.monotonic() - begin_s
        signal.signal(signum, self._suspend)  # before the program goes on, so that the next one stops it too
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, signum: signal.Signals) -> None:
        """Send it to the program, but not to the guardian, which must outlive lem."""
        if self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just been reaped
                os.killpg(self.pid, signum)  # to all at once, since a program may start processes all the time
                os.kill(self.pid, signal.SIGCONT)
            for pid in process.descendants(self.pid):  # some may have a group of their own, or another user
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signum)

    def has_ended(self, timeout_s: float, stop: StopRequest) -> bool:
        """Wait for its end; Interrupted, after it was ended, when a stop is requested."""
        before_s, begin_s = self.stopped_s, time.monotonic()  # in this order, so that no stop between counts twice
        readable = select.select([self._message, stop.fileno()], [], [], timeout_s)[0]
        late_s = time.monotonic() - begin_s - timeout_s - (self.stopped_s - before_s)
        self.stopped_s += late_s if late_s > _LATE_S else 0.0
        if stop.signum is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, stop.signum if stop.signum == signal.SIGINT else signal.SIGTERM)
            select.select([self._message], [], [], _PATIENCE_S)
            raise Interrupted(stop.signum)
        return self._message in readable

    def code(self) -> int:
        """Its exit code as `subprocess` gives it; it has ended, or is being ended."""
        with contextlib.suppress(process.TimeoutExpired):
            return self._child.wait(_KILL_S)
        process.kill_group(self.pid)
        return self._child.wait()


class _StoppableClock(Clock):
    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def sleep(self, duration_s: float) -> None:
        if self._stop.wait(duration_s):
            raise Interrupted(self._stop.signum or signal.SIGINT)


@dataclass(frozen=True)
class _Run:
    """What is found out about one run."""

    request: RunRequest
    start_utc: datetime
    opened_ns: int
    closed_ns: int
    code: int
    stopped_s: float  # of lem itself
    work: Mapping[str, Any]  # fields of `Work`
    energy: EnergyFindings
    surroundings: Mapping[str, Measured[tuple[str, ...]]]
    host: Mapping[str, Any]


@dataclass(frozen=True)
class Measurer:
    """What the runs of one `lem measure` have in common."""

    command: Sequence[str]
    config: ProgramConfig  # with `gpus` by UUID
    requested: Mapping[str, Any]
    sources: Sequence[WorkSource]
    identity: Mapping[str, str]  # names and ids of configuration and campaign, as in `Identity`
    repository: Repository
    streams: tuple[int, int, int]  # of the program
    stop: StopRequest
    reporter: Reporter
    meters: HostMeters = field(default_factory=HostMeters.found)

    def measure(self, cycle: int) -> tuple[StoredResult, int]:
        """The result of one more run, as stored, and how the program ended, as `subprocess` has it.

        Raises Interrupted: a stop was requested, and the program ended; MeterRefused: the energy that was asked for
        cannot be measured here; EngineError: the sampler fails; InfrastructureError: a result cannot be written.
        """
        run_id, exp_id = self.identity["run_id"], experiment_id(self.identity["config_hash"], cycle)
        folder = self.repository.prepare_attempt(run_id, exp_id)
        folder.write_config(self.requested, self.config.to_dict())
        request = RunRequest(
            config=self.config.to_dict(),
            identity={
                **self.identity,
                "experiment_id": exp_id,
                "host": socket.gethostname(),
                "backend": PROGRAM,
                "model": Path(self.command[0]).name,
                "cycle_index": cycle,
                "order_index": cycle,
                "attempt": folder.number,
                "shuffle_seed": None,
            },
            result_dir=str(folder.path.absolute()),
            engine_key=PROGRAM,
            keep_engine=False,
        )
        with self.meters.attending(self.config, request) as attendance:
            found = self._attend(attendance, folder.path)
        with stopping_campaign(folder.result_path):
            write_record(folder.result_path, self._compose(found))
            record, digest = read_with_digest(folder.result_path)
        result = StoredResult(str(folder.result_path), record, digest)
        self.repository.record_result(run_id, result)
        return result, found.code

    def _attend(self, attendance: Attendance, folder: Path) -> _Run:
        clock, sampler, request = _StoppableClock(self.stop), attendance.sampler, attendance.request
        start_utc, host = clock.utc_now(), read_host()
        metering = open_metering(request, self.config, is_resident=False, clock=clock, reporter=self.reporter)

        def follow(phase: str) -> None:
            if phase == "window" or metering.has_rest:
                self.reporter.phase(phase)
            if sampler is not None:
                sampler.set_interval(interval_ms(request.config, phase))

        with Program(self.command, self.streams) as program:
            if sampler is not None and not self.config.whole_machine:
                sampler.watch(program.pid)
            follow("idle")
            metering.rest_before()
            own_pids: set[int] = set()

            def run() -> MeasuredWindow:
                follow("window")
                opened_ns = clock.monotonic_ns()
                program.begin()
                for pids in self._while_running(program):
                    own_pids.update(pids)
                    if sampler is not None:
                        sampler.find_processes()
                span = (opened_ns, clock.monotonic_ns())
                return MeasuredWindow(PROGRAM, *span, prompts=1, requests=(), passes_ns=(span,))

            stamps = [stamp_of(source.path) for source in self.sources]
            window = metering.measure_closed(run)
            follow("cooldown")
            metering.rest_after()
            if self.config.whole_machine:
                own_pids = {pid for row in metering.read().processes for pid in row.pids}
            metering.own_pids = frozenset(own_pids)
            energy = metering.close(folder, window)
            # Not earlier: the guardian's entry in /proc, by which the sampler counts, stays until it is reaped.
            code = program.code()
        surroundings = metering.surroundings(self.config.gpus or ())
        work = read_work(self.sources, stamps)
        span = (window.opened_ns, window.closed_ns)
        return _Run(request, start_utc, *span, code, program.stopped_s, work, energy, surroundings, host)

    def _while_running(self, program: Program) -> Iterator[Sequence[int]]:
        """Its processes, now and then until it ends."""
        wait_s = _TICK_S / 10
        while not program.has_ended(wait_s, self.stop):
            begin_s = time.monotonic()
            yield process.descendants(program.pid)
            wait_s = max(_TICK_S, _WALK_SHARE * (time.monotonic() - begin_s))

    def _compose(self, run: _Run) -> Record:
        energy, window_s = run.energy, seconds_between(run.opened_ns, run.closed_ns)
        unseen: Measured[Any] = known(None, _UNSEEN)
        failed = (Reason.of("program_failed", how=process.describe_exit(run.code)),) if run.code else ()
        stopped = (Reason.of("lem_stopped", stopped_s=run.stopped_s),) if round(run.stopped_s, 1) else ()
        work = _unseen_but(Work, token_source=PROGRAM, **run.work)
        lost = work.requests_failed if work.requests_ok is not None else None
        unanswered = (Reason.of("work_failed", failed=lost, total=work.tried),) if lost else ()
        is_unfit = (lost or 0) > MAX_FAILED_RATIO * work.tried
        found = [item for item in energy.invalid_reasons if not (stopped and _is_same_stop(item, run.stopped_s))]
        invalid = (*failed, *stopped, *(unanswered if is_unfit else ()), *found)
        warnings = (*(() if is_unfit else unanswered), *energy.warnings)

        def rate(name: str) -> Measured[float]:
            count = getattr(work, name)
            why = work.null_reasons.get(name) or work.why_uncounted or _UNSEEN
            return known(None if count is None else count / window_s, why)

        report = EngineReport(
            engine_name=Path(self.command[0]).name,
            engine_version=_version_of(self.command[0]),
            versions={},
            device="cuda" if self.config.gpus else "cpu",
            gpu_uuids=tuple(self.config.gpus or ()),
            effective={"exit_code": run.code},
        )
        start_utc = utc_text(run.start_utc, "milliseconds")
        return Record(
            identity=Identity(**run.request.identity, start_utc=start_utc, lem_version=__version__),
            validity=Validity.of(
                valid=not invalid,
                invalid_reasons=invalid,
                warnings=tuple(dict.fromkeys(warnings)),
                warmup_converged=unseen,
                steady=unseen,
                engine_reused=False,
                engine_load_id=uuid.uuid4().hex[:16],
            ),
            window=_unseen_but(Window, traffic_mode=PROGRAM, window_s=window_s, window_repeats=1, warmup_prompts=0),
            energy=energy.energy,
            gpus=energy.gpus,
            idle=energy.idle,
            work=work,
            throughput=_unseen_but(
                Throughput,
                output_tok_per_s=rate("output_tok"),
                total_tok_per_s=rate("total_tok"),
                requests_per_s=rate("requests_ok"),
            ),
            latency=_unseen_but(Latency, itl_s=known(None, ITL_REPLACED)),
            compute=_unseen_but(Compute),
            efficiency=efficiency_of(energy.energy.primary_j, work),
            carbon=carbon_of(energy.energy.primary_j, self.config.measurement),
            environment=describe_environment(run.request, run.host, report, self.config, run.surroundings),
            requested=self.requested,
            interference=energy.interference,
            machine=energy.machine,
        )


def _is_same_stop(reason: Reason, stopped_s: float) -> bool:
    """Whether the program was stopped because lem was: Ctrl-Z stops both."""
    return reason.code == "engine_stopped" and float(reason.data["stopped_s"]) <= stopped_s + _LATE_S


def _unseen_but(section: type[_Section], **seen: Any) -> _Section:
    unseen: dict[str, Any] = {
        item.name: known(None, _UNSEEN) for item in fields(section) if item.name != "null_reasons"
    }
    return section.of(**{**unseen, **seen})


def _version_of(name: str) -> str:
    """Programs have no common way to tell their version: the beginning of the SHA-256 of the file."""
    try:
        return hashlib.sha256(Path(shutil.which(name) or name).read_bytes()).hexdigest()[:12]
    except OSError:
        return "unknown"
