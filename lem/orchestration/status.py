"""What a campaign is doing: its events, the activity file, and its state as others read it."""

from __future__ import annotations

import contextlib
import enum
import itertools
import json
import shlex
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lem.base import durable
from lem.base.clock import parse_time, utc_text
from lem.base.codec import decode
from lem.base.dataclass import dataclass, field, replace
from lem.base.errors import LemError, UserError
from lem.base.names import MANIFEST_FILENAME, slug_of
from lem.orchestration.locks import CAMPAIGN_LOCK_NAME, Holder, is_locked, read_holder
from lem.orchestration.manifest import (
    COMPLETED,
    FAILED,
    PENDING,
    RUNNING,
    SKIPPED,
    CampaignManifest,
    CampaignManifestEntry,
    ManifestManager,
)

if TYPE_CHECKING:
    from lem.results.store import Digests


@dataclass(frozen=True)
class Event:
    """Something that happened, on its way from a worker or the campaign to the screen, systemd, JSON and this file."""

    # Its kind is `campaign_started`, `note` (text for a person), `gap`, `experiment_started`, `phase`, `progress`,
    # `experiment_retried`, `experiment_completed`, `experiment_failed`, `experiment_interrupted`, `tick` (nothing new)
    # or `campaign_finished`. The campaign fills in how far it is.

    kind: str
    done: int = 0  # experiments ended
    total: int = 0  # experiments planned
    eta_s: float | None = None  # seconds to the end, from the experiments measured so far; None before the first
    data: Mapping[str, Any] = field(default_factory=dict)  # what belongs to the kind, as JSON values


Observer = Callable[[Event], None]
ACTIVITY_NAME = "campaign.activity"
SCHEMA_VERSION = 1

# Between changes it is written at most this often, about as often as a worker sends a heartbeat.
_EVERY_S = 5.0


@dataclass(frozen=True)
class Activity:
    run_id: str
    pid: int
    host: str
    started_at: str
    updated_at: str
    go_on: str = ""  # the command that resumes the campaign, in folder `cwd`; empty when unknown
    cwd: str = ""
    doing: str = "starting"  # or `gap`, `experiment`, `ended`
    since: str = ""  # when it began to do so; of an experiment its phase
    exp_id: str | None = None
    config_name: str | None = None
    phase: str | None = None
    phase_done: int | None = None  # how far the phase is
    phase_total: int | None = None
    gap_ends_in_s: float | None = None  # at most, from `updated_at`
    eta_s: float | None = None  # seconds to the end, from `updated_at`; None while unknown
    stopped: str | None = None  # for an early end: a `Stopped` value or `error`
    message: str = ""  # why, where there is more to say

    def after(self, event: Event, at: str) -> Activity:
        now, data = replace(self, updated_at=at, eta_s=event.eta_s), event.data
        if event.kind == "gap":
            return replace(now.idle(), doing="gap", since=at, gap_ends_in_s=data["cap_s"])
        if event.kind == "experiment_started":
            who = {"exp_id": data["exp_id"], "config_name": data["config_name"]}
            return replace(now.idle(), doing="experiment", since=at, **who)
        if event.kind == "phase":
            return replace(now, doing="experiment", phase=data["phase"], since=at, phase_done=None, phase_total=None)
        if event.kind == "progress":
            return replace(now, phase_done=data["phase_done"], phase_total=data["phase_total"])
        if event.kind == "tick" and "left_s" in data:
            return replace(now, gap_ends_in_s=data["left_s"])
        return now

    def idle(self) -> Activity:
        no_phase = replace(self, phase=None, phase_done=None, phase_total=None)
        return replace(no_phase, exp_id=None, config_name=None, gap_ends_in_s=None)

    @property
    def moment(self) -> tuple[Any, ...]:
        return (self.doing, self.since, self.exp_id, self.config_name, self.phase, self.stopped, self.message)


@dataclass
class ActivityWriter:
    folder: Path
    run_id: str
    holder: Holder
    observe: Observer
    now: Callable[[], datetime]
    monotonic: Callable[[], float]  # in seconds
    go_on: str = ""

    def __post_init__(self) -> None:
        at, pid, host = utc_text(self.now()), self.holder.pid, self.holder.host
        self._activity = Activity(self.run_id, pid, host, at, at, go_on=self.go_on, cwd=_working_directory(), since=at)
        self._write()

    def __call__(self, event: Event) -> None:
        self.observe(event)
        before, self._activity = self._activity, self._activity.after(event, utc_text(self.now()))
        if self._activity.moment != before.moment or self.monotonic() - self._written_s >= _EVERY_S:
            self._write()

    def end(self, stopped: str | None, message: str = "") -> None:
        at = utc_text(self.now())
        ended = replace(self._activity.idle(), doing="ended", since=at, updated_at=at, eta_s=None)
        self._activity = replace(ended, stopped=stopped, message=message)
        self._write()

    @contextlib.contextmanager
    def ending_on_error(self) -> Iterator[None]:
        try:
            yield
        except LemError as error:
            self.end("error", error.message)
            raise

    def _write(self) -> None:
        document = {"schema_version": SCHEMA_VERSION, **vars(self._activity)}
        # The process holds the campaign's lock: no other writes under this name.
        temporary = self.folder / (durable.TEMPORARY_PREFIX + ACTIVITY_NAME)
        with contextlib.suppress(OSError):
            temporary.write_bytes(durable.utf8(json.dumps(document, ensure_ascii=False) + "\n"))
            temporary.replace(self.folder / ACTIVITY_NAME)
        self._written_s = self.monotonic()


def read_activity(folder: Path) -> Activity | None:
    try:
        document = durable.read_json(folder / ACTIVITY_NAME)
        if not isinstance(document, dict) or document.pop("schema_version", None) != SCHEMA_VERSION:
            return None
        return decode(Activity, document, "activity")
    except (OSError, ValueError):
        return None


def _working_directory() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it was removed
        return ""


class State(str, enum.Enum):
    RUNNING = "running"
    WAITING = "waiting"  # holds the lock between runs, or before the first
    DONE = "done"
    FAILED = "failed"  # every experiment had its turn
    STOPPED = "stopped"  # ended early, and recorded it
    CRASHED = "crashed"  # ended without recording it
    UNREADABLE = "unreadable"
    NONE = "none"  # without a manifest

    def __str__(self) -> str:  # the same text in every Python, also in an f-string
        return self.value


# A worker sends a heartbeat every 5 s, and each makes the campaign update its activity.
SILENCE_S = 60.0

_ENDINGS = {
    "signal": "stopped by a signal",
    "deadline": "its deadline passed",
    "fail_fast": "an experiment failed, and --fail-fast was given",
    "infrastructure": "the disk, the daemon or the worker failed",
    "error": "stopped by an error",
}


@dataclass(frozen=True)
class Viewpoint:
    now: datetime
    host: str  # as `socket.gethostname`
    booted_at: datetime | None = None  # None when unknown


@dataclass(frozen=True)
class CampaignStatus:
    name: str
    folder: Path  # its state folder
    state: State
    reason: str = ""  # where the state needs one; for `unreadable` what is wrong with the manifest
    hint: str = ""  # what to do about it
    manifest: CampaignManifest | None = None  # None where there is none, or it cannot be read
    activity: Activity | None = None  # what its last process did; None when unknown
    holder: Holder | None = None  # of the lock
    left_s: float | None = None  # seconds to the end, or that a resume would take; None while unknown

    @property
    def part(self) -> str:
        return self.folder.name if self.folder.parent.name == slug_of(self.name) else ""

    @property
    def label(self) -> str:
        return f"{self.name} ({self.part})" if self.part else self.name

    @property
    def entries(self) -> Sequence[CampaignManifestEntry]:
        return [] if self.manifest is None else self.manifest.experiments

    def count(self, *statuses: str) -> int:
        return sum(entry.status in statuses for entry in self.entries)

    @property
    def n_planned(self) -> int:
        return len(self.entries) - self.count(SKIPPED)

    @property
    def n_left(self) -> int:
        return self.count(PENDING, RUNNING)

    @property
    def n_invalid(self) -> int:
        return sum(map(is_invalid, self.entries))

    @property
    def resume_command(self) -> str:
        if self.activity is None or not self.activity.go_on:
            return ""
        return (shlex.join(["cd", self.activity.cwd]) + " && " if self.activity.cwd else "") + self.activity.go_on


@dataclass(frozen=True)
class Remainder:
    failed: Mapping[str, int]  # experiments
    left: Mapping[str, int]  # experiments that had no turn yet, were interrupted, or whose result is gone
    is_resumable: bool  # a resume has something to do
    remedy: str  # empty where nothing is to be done


def remainder_of(status: CampaignStatus, whole: Container[str] | None = None) -> Remainder:
    """What is left of a campaign, by the experiments with a `whole` result on disk; None believes the manifest."""
    failed = Counter(entry.config_name for entry in status.entries if entry.status == FAILED)
    left = Counter(
        entry.config_name
        for entry in status.entries
        if entry.status in (PENDING, RUNNING)
        or (entry.status == COMPLETED and whole is not None and entry.exp_id not in whole)
    )
    if status.state in (State.RUNNING, State.WAITING):
        return Remainder(failed, left, False, "wait: the campaign is running (lem status)")
    # One that was stopped with nothing left was about to add cycles (--until).
    is_resumable = bool(failed or left) or status.state == State.STOPPED
    name = "/".join(status.folder.parts[-2:]) if status.part else status.folder.name
    how = f"lem campaign … --resume continues the run (lem status {name} shows the whole command)"
    return Remainder(failed, left, is_resumable, how if is_resumable else "")


def digests_of(manifest: CampaignManifest | None) -> Digests:
    run_id = str(manifest.run_id) if manifest is not None else ""
    return {
        (run_id, entry.exp_id, attempt.number, attempt.host): attempt.result_sha256
        for entry in (manifest.experiments if manifest is not None else ())
        for attempt in entry.attempts
        if attempt.result_sha256 is not None
    }


def is_invalid(entry: CampaignManifestEntry) -> bool:
    return entry.status == COMPLETED and any(
        attempt.result_path == entry.result_path and attempt.valid is False for attempt in entry.attempts
    )


def find_folders(state_dir: Path) -> tuple[Path, ...]:
    try:
        folders = sorted(path for path in state_dir.iterdir() if path.is_dir())
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise UserError(f"state folder {state_dir}: {(error.strerror or str(error)).lower()}") from error
    return tuple(path for folder in folders for path in state_folders(folder))


def state_folders(folder: Path) -> list[Path]:
    try:
        parts = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:  # reported by the one who reads the folder
        parts = []
    # A campaign that could not start leaves a lock file that no process holds, and no manifest.
    return [it for it in (folder, *parts) if find_manifest(it) is not None or is_locked(it / CAMPAIGN_LOCK_NAME)]


def find_manifest(folder: Path) -> Path | None:
    usual = folder / MANIFEST_FILENAME
    # One that was set aside has a second dot in its name: `campaign_manifest.20260714T100000Z.json`.
    others = (path for path in folder.glob("*.json") if "." not in path.stem)
    try:
        return usual if usual.exists() else min(others, default=None)
    except PermissionError:  # reported by the one who reads the folder
        return usual


def boot_time(stat_file: Path = Path("/proc/stat")) -> datetime | None:
    try:
        lines = stat_file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("btime ")]
    return datetime.fromtimestamp(int(found[0]), timezone.utc) if found and found[0].isdigit() else None


def parse_utc(label: str | None) -> datetime | None:
    moment = parse_time(label or "")
    return moment if moment is not None and moment.tzinfo is not None else None


def read_status(folder: Path, viewpoint: Viewpoint, manifest_path: Path | None = None) -> CampaignStatus:
    is_held = is_locked(folder / CAMPAIGN_LOCK_NAME)
    holder = read_holder(folder / CAMPAIGN_LOCK_NAME)
    path = manifest_path or find_manifest(folder) or folder / MANIFEST_FILENAME
    try:
        manifest = ManifestManager(path).load_strict()
    except UserError as error:
        return CampaignStatus(folder.name, folder, State.UNREADABLE, error.message, error.hint)
    name = manifest.campaign_name if manifest else holder.campaign if holder else folder.name
    activity = read_activity(folder)
    if activity is not None and (manifest is None or activity.run_id != manifest.run_id):
        activity = None  # of an earlier run
    status = CampaignStatus(name, folder, State.NONE, manifest=manifest, activity=activity, holder=holder)
    if is_held:
        return _of_held(status, viewpoint)
    if manifest is None:
        return replace(status, reason=f"no manifest at {path}: nothing was measured", holder=None)
    return replace(_of_free(status, manifest, viewpoint), holder=None)


def _of_held(status: CampaignStatus, viewpoint: Viewpoint) -> CampaignStatus:
    manifest, activity, holder = status.manifest, status.activity, status.holder
    if activity is not None and holder is not None and activity.pid != holder.pid:
        activity = None  # of an earlier process
    left_s = None if manifest is None else estimate_left_s(manifest)
    status = replace(status, state=State.RUNNING, activity=activity, left_s=left_s)
    if activity is None:
        # Whether an experiment runs that began since the lock was taken, not in an earlier process.
        running = [] if manifest is None else manifest.get_by_status(RUNNING)
        since = holder.since if holder else ""
        if any(attempt.started_at and attempt.started_at >= since for entry in running for attempt in entry.attempts):
            return status
        waiting = "not measuring yet: scheduled, starting, or waiting for an answer"
        return replace(status, state=State.WAITING, reason=waiting, left_s=None)
    if activity.doing == "ended":
        waiting = "its run ended; waiting for the next one, or about to exit"
        return replace(status, state=State.WAITING, reason=waiting, left_s=None)
    updated_at = parse_utc(activity.updated_at)
    silent_s = 0.0 if updated_at is None else (viewpoint.now - updated_at).total_seconds()
    if silent_s > SILENCE_S:
        silence = f"no sign of life since {_short(activity.updated_at)}: it hangs, or the machine was suspended"
        hint = f"check whether process {activity.pid} on {activity.host} still works; it may be waiting for a disk"
        status = replace(status, reason=silence, hint=hint)
    if activity.eta_s is not None:
        status = replace(status, left_s=max(0.0, activity.eta_s - silent_s))
    return status


def _of_free(status: CampaignStatus, manifest: CampaignManifest, viewpoint: Viewpoint) -> CampaignStatus:
    activity, left_s = status.activity, estimate_left_s(manifest)
    if manifest.get_by_status(RUNNING) or (activity is not None and activity.doing != "ended"):
        reason, hint = _why_crashed(status, manifest, viewpoint)
        return replace(status, state=State.CRASHED, reason=reason, hint=hint, left_s=left_s)
    stopped, message = (activity.stopped, activity.message) if activity is not None else (None, "")
    if stopped is not None or manifest.get_by_status(PENDING):
        reason = ": ".join(filter(None, (_ENDINGS.get(stopped or ""), message)))
        return replace(status, state=State.STOPPED, reason=reason, left_s=left_s)
    state = State.DONE if manifest.is_complete else State.FAILED
    return replace(status, state=state, reason=message, left_s=left_s or None)


def _why_crashed(status: CampaignStatus, manifest: CampaignManifest, viewpoint: Viewpoint) -> tuple[str, str]:
    last_sign = max(manifest.updated_at, status.activity.updated_at if status.activity else "")
    last, sign, moment = status.activity or status.holder, _short(last_sign), parse_utc(last_sign)
    who = "its process" if last is None else f"process {last.pid}"
    if last is not None and last.host != viewpoint.host:
        reason = f"it ran on {last.host}, not on this host ({viewpoint.host}): last sign of life {sign}"
        return reason, f"check on {last.host} whether {who} still runs"
    if moment is not None and viewpoint.booted_at is not None and moment < viewpoint.booted_at:
        return f"the host was restarted at {viewpoint.booted_at:%Y-%m-%dT%H:%M:%SZ}; last sign of life {sign}", ""
    reason = f"{who} ended unexpectedly after {sign}: killed, out of memory, or a bug"
    return reason, "the kernel log (dmesg, journalctl -k) shows which processes it killed"


def _short(label: str) -> str:
    return f"{label[:19]}Z"


def estimate_left_s(manifest: CampaignManifest) -> float | None:
    """Seconds that the experiments left take; None before two have ended."""
    # The median time from one end to the next, which a night between two sessions does not move.
    entries = manifest.experiments
    n_left = sum(entry.status in (PENDING, RUNNING) for entry in entries)
    if not n_left:
        return 0.0
    moments = (parse_utc(entry.completed_at) for entry in entries if entry.status in (COMPLETED, FAILED))
    ends = sorted(moment for moment in moments if moment is not None)
    if len(ends) < 2:
        return None
    import statistics

    return n_left * statistics.median((later - earlier).total_seconds() for earlier, later in itertools.pairwise(ends))
