"""What the process that runs a campaign does, in a small file for whoever looks from outside, also once it is dead.

`<state_dir>/<campaign>/campaign.activity`, JSON, replaced at every change and at most every few seconds in between. It
only says what the manifest does not, the phase, the gap, the time expected; nothing is decided by it. So it is written
without fsync, and a disk that refuses it is no reason not to measure.

Schema history:
    1: first version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from lem import durable
from lem.clock import utc_text
from lem.errors import LemError
from lem.jsontypes import build_from
from lem.orchestration.events import Event, Observer
from lem.orchestration.locks import Holder

__all__ = ["ACTIVITY_NAME", "Activity", "ActivityWriter", "read_activity"]

ACTIVITY_NAME = "campaign.activity"
SCHEMA_VERSION = 1

# Between changes it is written no oftener than this, about as often as a worker sends a heartbeat.
_EVERY_S = 5.0


@dataclass(frozen=True)
class Activity:
    """What the process does, or did last. Times are UTC labels.

    Attributes:
        go_on: the command that goes on with the campaign, in folder `cwd`; empty when unknown.
        doing: `starting`, `gap`, `experiment`, or `ended`.
        since: when it began to do so; of an experiment its phase.
        phase_done, phase_total: how far the phase is.
        gap_ends_in_s: at most, from `updated_at`.
        eta_s: seconds to the end, from `updated_at`; None while nobody knows.
        stopped: of an end before the end, `signal`, `deadline`, `fail_fast`, `infrastructure` or `error`.
        message: why, where that says more.
    """

    run_id: str
    pid: int
    host: str
    started_at: str
    updated_at: str
    go_on: str = ""
    cwd: str = ""
    doing: str = "starting"
    since: str = ""
    exp_id: str | None = None
    config_name: str | None = None
    phase: str | None = None
    phase_done: int | None = None
    phase_total: int | None = None
    gap_ends_in_s: float | None = None
    eta_s: float | None = None
    stopped: str | None = None
    message: str = ""


class ActivityWriter:
    """An observer that passes events on and keeps the file."""

    def __init__(
        self,
        path: Path,
        run_id: str,
        holder: Holder,
        observe: Observer,
        *,
        now: Callable[[], datetime],
        monotonic: Callable[[], float],
        go_on: str = "",
    ) -> None:
        self._path = path
        self._observe = observe
        self._now = now
        self._monotonic = monotonic
        self._written_s = float("-inf")
        at = utc_text(now())
        self._activity = Activity(
            run_id, holder.pid, holder.host, at, at, go_on=go_on, cwd=_working_directory(), since=at
        )
        self._write(self._activity)

    def __call__(self, event: Event) -> None:
        """Pass the event on, and write down what it changes."""
        self._observe(event)
        changed = _changed(self._activity, event, utc_text(self._now()))
        is_new = _same_moment(changed) != _same_moment(self._activity)
        self._activity = changed
        if is_new or self._monotonic() - self._written_s >= _EVERY_S:
            self._write(changed)

    def end(self, stopped: str | None, message: str = "") -> None:
        """Write down that the run ended, and how."""
        at = utc_text(self._now())
        self._activity = replace(
            _idle(self._activity), doing="ended", since=at, updated_at=at, eta_s=None, stopped=stopped, message=message
        )
        self._write(self._activity)

    @contextlib.contextmanager
    def ending_on_error(self) -> Iterator[None]:
        """Write down what error leaves the block; an end that was told before stays."""
        try:
            yield
        except LemError as error:
            self.end("error", error.message)
            raise

    def _write(self, activity: Activity) -> None:
        document = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(activity)}
        # The process holds the campaign's lock: nobody else writes under this name.
        temporary = self._path.with_name(durable.TEMPORARY_PREFIX + ACTIVITY_NAME)
        with contextlib.suppress(OSError):
            temporary.write_bytes(durable.utf8(json.dumps(document, ensure_ascii=False) + "\n"))
            temporary.replace(self._path)
        self._written_s = self._monotonic()


def read_activity(folder: Path) -> Activity | None:
    """What the last process in a campaign's state folder did; None where it left nothing that can be read."""
    try:
        with open(folder / ACTIVITY_NAME, "rb") as stream:
            document = json.loads(stream.read().decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.pop("schema_version", None) != SCHEMA_VERSION:
        return None
    try:
        return build_from(Activity, document, "activity")
    except ValueError:
        return None


def _changed(activity: Activity, event: Event, at: str) -> Activity:
    """The activity after an event."""
    activity, data = replace(activity, updated_at=at, eta_s=event.eta_s), event.data
    if event.kind == "gap":
        return replace(_idle(activity), doing="gap", since=at, gap_ends_in_s=data["cap_s"])
    if event.kind == "experiment_started":
        return replace(
            _idle(activity), doing="experiment", since=at, exp_id=data["exp_id"], config_name=data["config_name"]
        )
    if event.kind == "phase":
        return replace(activity, doing="experiment", phase=data["phase"], since=at, phase_done=None, phase_total=None)
    if event.kind == "progress":
        return replace(activity, phase_done=data["phase_done"], phase_total=data["phase_total"])
    if event.kind == "tick" and "left_s" in data:
        return replace(activity, gap_ends_in_s=data["left_s"])
    return activity


def _idle(activity: Activity) -> Activity:
    return replace(
        activity, exp_id=None, config_name=None, phase=None, phase_done=None, phase_total=None, gap_ends_in_s=None
    )


def _same_moment(activity: Activity) -> Activity:
    """The activity without what changes all the time."""
    return replace(activity, updated_at="", eta_s=None, phase_done=None, phase_total=None, gap_ends_in_s=None)


def _working_directory() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it was removed
        return ""
