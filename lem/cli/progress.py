"""Progress of a campaign, and the summary at its end."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lem.base import log, units
from lem.base.doc import screen_of
from lem.base.errors import ExitCode, LemError
from lem.base.process import copyable
from lem.config.campaign_config import CampaignConfig
from lem.config.option import is_secret
from lem.orchestration.manifest import FAILED, SKIPPED
from lem.orchestration.schedule import CampaignOutcome, Stopped
from lem.orchestration.status import Event, Observer
from lem.orchestration.systemd import ServiceManager
from lem.results.aggregation import run_document
from lem.results.run import make_run
from lem.results.store import Repository, read_stopping_rule
from lem.results.table import render_run

_logger = logging.getLogger(__name__)

# Phases that take long; the others take moments.
_LONG_PHASES = {"load": "loading", "warmup": "warming up", "window": "measuring"}
_PHASE_WORDS = {**_LONG_PHASES, "prepare": "preparing", "idle": "idle", "cooldown": "cooling down", "write": "writing"}
_LINE_EVERY_S = 60.0
_NAME_AT_LEAST = 12


def choose_progress(console: log.Console, out: TextIO, *, is_json: bool, is_quiet: bool) -> Observer:
    """The observer that fits the streams."""
    if is_json:
        return JsonProgress(out)
    if is_quiet:
        return QuietProgress(console)
    return TerminalProgress(console) if console.is_live else LineProgress(console)


def discard_output(stream: TextIO, error: OSError) -> None:
    """Discard further output: the reader is gone or the disk is full, but the campaign continues."""
    _logger.warning("no more output on stdout: %s", error.strerror or error)
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


class JsonProgress:
    """One JSON object per line on stdout."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __call__(self, event: Event) -> None:
        if event.kind == "tick":
            return
        document = {"event": event.kind, "done": event.done, "total": event.total, "eta_s": event.eta_s, **event.data}
        try:
            self._out.write(json.dumps(document, ensure_ascii=False) + "\n")
            self._out.flush()
        except OSError as error:
            discard_output(self._out, error)


class QuietProgress:
    """Only errors; the command writes the final summary."""

    def __init__(self, console: log.Console) -> None:
        self._console = console

    def __call__(self, event: Event) -> None:
        if event.kind == "experiment_failed":
            for line in _ending(event, self._console):
                self._console.line(line, _level_of(event))


class TerminalProgress:
    """A line for each finished experiment, above a live line for the running one."""

    def __init__(self, console: log.Console, now: Callable[[], float] = time.time) -> None:
        self._console = console
        self._now = now
        self._state = _State()

    def __call__(self, event: Event) -> None:
        self._state.update(event)
        for line in _ending(event, self._console):
            self._console.line(line, _level_of(event))
        if event.kind == "campaign_finished":
            self._console.close()
        elif event.kind not in ("note", "campaign_started"):
            width = shutil.get_terminal_size().columns - 1
            self._console.live(self._state.describe(event, self._now(), width))


class _Lines:
    """Progress in lines: one per change, and one per minute."""

    def __init__(self, console: log.Console | None, now: Callable[[], float], monotonic: Callable[[], float]) -> None:
        self._console = console
        self._now = now
        self._monotonic = monotonic
        self._state = _State()
        self._printed_at = monotonic()

    def of(self, event: Event) -> list[str]:
        """The lines for an event; [] for none."""
        self._state.update(event)
        lines = _ending(event, self._console)
        is_change = event.kind in ("experiment_started", "gap") or (
            event.kind == "phase" and event.data.get("phase") in _LONG_PHASES
        )
        is_time = event.kind in ("tick", "progress") and self._monotonic() - self._printed_at >= _LINE_EVERY_S
        if not lines and (is_change or is_time):
            lines = [self._state.describe(event, self._now())]
        if lines:
            self._printed_at = self._monotonic()
        return lines


class LineProgress:
    """A line with the time of day per change, and one per minute, for logs and pipes."""

    def __init__(
        self,
        console: log.Console,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._now = now
        self._lines = _Lines(console, now, monotonic)

    def __call__(self, event: Event) -> None:
        for line in self._lines.of(event):
            # The journal adds its own timestamps.
            clock = "" if self._console.is_journal else time.strftime("%H:%M:%S ", time.localtime(self._now()))
            self._console.line(f"{clock}{line}", _level_of(event))


class LogProgress:
    """The same lines for the log, which adds its own timestamps."""

    def __init__(
        self,
        logger: logging.Logger,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._lines = _Lines(None, now, monotonic)

    def __call__(self, event: Event) -> None:
        for line in self._lines.of(event):
            self._logger.info("%s", line)


class StatusProgress:
    """The live line for `systemctl status`, and readiness once the campaign has started."""

    def __init__(self, manager: ServiceManager, now: Callable[[], float] = time.time) -> None:
        self._manager = manager
        self._now = now
        self._state = _State()

    def __call__(self, event: Event) -> None:
        self._state.update(event)
        if event.kind == "campaign_started":
            self._manager.ready()
        elif event.kind == "note":
            self._manager.status(str(event.data["text"]))
        elif event.kind == "campaign_finished":
            self._manager.status(f"[{event.done}/{event.total}] finished")
        else:
            self._manager.status(self._state.describe(event, self._now()))


def _level_of(event: Event) -> int:
    """How much an event matters, as a level of `logging`."""
    if event.kind == "experiment_failed":
        return logging.ERROR
    is_odd = event.kind in ("experiment_retried", "experiment_interrupted") or not event.data.get("valid", True)
    return logging.WARNING if is_odd else logging.INFO


class _State:
    """The state behind the live line."""

    def __init__(self) -> None:
        self.experiment: dict[str, Any] = {}
        self.phase = self.activity = ""
        self.watts: float | None = None

    def update(self, event: Event) -> None:
        data = event.data
        if event.kind == "experiment_started":
            self.experiment = dict(data)
            self.phase = self.activity = "starting"
        elif event.kind == "phase":
            self.phase = self.activity = _PHASE_WORDS.get(str(data.get("phase")), str(data.get("phase")))
        elif event.kind == "progress":
            self.activity = f"{self.phase} {_count(data)}".rstrip()
            self.watts = data.get("power_w")
        elif event.kind == "gap":
            self.experiment = {}
            self.activity = f"gap, at most {units.format_duration(float(data['cap_s']))}"
        elif event.kind == "tick" and "left_s" in data:
            self.activity = f"gap, at most {units.format_duration(float(data['left_s']))} more"

    def describe(self, event: Event, now: float, width: int | None = None) -> str:
        """The line; the name of the experiment is shortened to fit `width`."""
        name = str(self.experiment.get("config_name", ""))
        line = self._join(event, now, name)
        if width is not None and len(line) > width:
            line = self._join(event, now, _squeeze(name, max(len(name) - (len(line) - width), _NAME_AT_LEAST)))
        return line

    def _join(self, event: Event, now: float, name: str) -> str:
        parts = [f"[{event.done}/{event.total}]"]
        if self.experiment:
            cycle = f"cycle {self.experiment['cycle']}/{self.experiment['cycles']}"
            parts += [name, str(self.experiment["backend"]), cycle]
        parts.append(self.activity)
        if self.watts is not None:
            parts.append(units.format_power(self.watts))
        if event.eta_s is not None:
            parts.append(f"ETA {clock_time(now + event.eta_s, now)}")
        return parts[0] + " " + " · ".join(part for part in parts[1:] if part)


def _squeeze(name: str, width: int) -> str:
    """The name without its middle: names differ at their ends."""
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def clock_time(at: float, now: float) -> str:
    """The local time of day, with the weekday when it is not today."""
    pattern = "%H:%M" if time.localtime(at)[:3] == time.localtime(now)[:3] else "%a %H:%M"
    return time.strftime(pattern, time.localtime(at))


def _unpainted(text: str, _colour: str) -> str:
    return text


def _count(data: Mapping[str, Any]) -> str:
    """Progress within a phase: `5/32`, or text if the total is unknown."""
    done, total, text = data.get("phase_done"), data.get("phase_total"), str(data.get("text", ""))
    if done is None or total:
        return f"{done}/{total}" if total else text
    return text if str(done) in text else f"{done} {text}"


def _ending(event: Event, console: log.Console | None) -> list[str]:
    """The lines about the end of an experiment or attempt; [] for other events."""
    data, paint = event.data, console.paint if console is not None else _unpainted
    if event.kind == "note":
        return [str(data["text"])]
    if event.kind not in ("experiment_completed", "experiment_failed", "experiment_retried", "experiment_interrupted"):
        return []
    head = f"[{event.done}/{event.total}]"
    name = f"{data['config_name']} · cycle {data['cycle']}/{data['cycles']}"
    if event.kind == "experiment_completed":
        valid = data.get("valid", True)
        mark = paint("ok", "green") if valid else paint("invalid", "yellow")
        figures = units.format_rate(data.get("output_tok_per_s"))
        lines = [f"{head} {mark} {name} · {figures} · {units.format_duration(float(data['elapsed_s']))}"]
        return lines + [f"    {reason}" for reason in data.get("invalid_reasons", ())]
    if event.kind == "experiment_retried":
        return [f"{head} {paint('retrying', 'yellow')} {name}: {data['reason']}"]
    if event.kind == "experiment_interrupted":
        return [f"{head} {paint('interrupted', 'yellow')} {name}"]
    lines = [f"{head} {paint('failed', 'red')} {name}: {data['error']}"]
    return lines + [f"    {key}: {data[key]}" for key in ("hint", "log") if data.get(key)]


def exit_code_of_outcome(outcome: CampaignOutcome) -> int:
    """The exit code of a run that no signal ended."""
    if outcome.stopped is Stopped.DURATION:
        return int(ExitCode.OK)
    if outcome.error is not None:
        return int(outcome.error.exit_code)
    if outcome.stopped is Stopped.DEADLINE:
        return int(ExitCode.BUDGET)
    return int(ExitCode.EXPERIMENT_FAILED if outcome.manifest.failed_count else ExitCode.OK)


def show_results(campaign: CampaignConfig, outcome: CampaignOutcome, out: TextIO, *, is_json: bool) -> None:
    """Write the table, or the summary as a line of JSON; nothing if there are no results."""
    run_id, manifest = str(outcome.manifest.run_id), outcome.manifest
    planned = {entry.exp_id for entry in manifest.experiments if entry.status != SKIPPED}
    scan = Repository(Path(campaign.io.results_dir), campaign.slug).scan(run_id)
    summary = make_run(
        [item.record for item in scan.results if item.record.identity.experiment_id in planned],
        failed=Counter(entry.config_name for entry in manifest.get_by_status(FAILED)),
        campaign_name=campaign.campaign_name,
        run_id=run_id,
        stopping=read_stopping_rule(Path(campaign.io.results_dir) / campaign.slug / run_id),
    )
    if is_json:
        text = json.dumps({"event": "summary", **run_document(summary)}, ensure_ascii=False) + "\n"
    elif summary.configurations:
        text = render_run(summary, **screen_of(out))
    else:
        return
    try:
        out.write(text)
        out.flush()
    except OSError as error:
        discard_output(out, error)


def closing_lines(campaign: CampaignConfig, outcome: CampaignOutcome, console: log.Console) -> Iterator[str]:
    """The closing lines: counts, results folder, error and hint."""
    manifest = outcome.manifest
    counted = [entry.status for entry in manifest.experiments if entry.status != SKIPPED]
    left = len(counted) - manifest.completed_count - manifest.failed_count
    folder = Path(campaign.io.results_dir) / campaign.slug / str(manifest.run_id)
    if outcome.remark:
        yield outcome.remark
    yield f"{manifest.completed_count} completed, {manifest.failed_count} failed, {left} left; results in {folder}"
    if outcome.error is not None:
        yield f"{console.paint('error:', 'red')} {outcome.error.message}"
        if outcome.error.hint:
            yield f"{console.paint('hint:', 'cyan')} {outcome.error.hint}"


def resume_command(words: Sequence[str]) -> str:
    """The same command for a shell, with --resume instead of options that conflict with it.

    Args:
        words: the whole command line, the interpreter first (`sys.orig_argv`).
    """
    # A script on PATH is named without the Python of its first line.
    script = Path(words[1]) if len(words) > 1 else Path()
    if script.name == "lem" and shutil.which("lem") == str(script):
        words = ["lem", *words[2:]]
    kept = [_without_secret(word) for word in words if word not in ("--fresh", "--resume", "--no-resume")]
    kept.insert(kept.index("--") if "--" in kept else len(kept), "--resume")
    return copyable(kept)


def _without_secret(word: str) -> str:
    """The argument, with `(hidden)` instead of a secret value."""
    start = "--set=" if word.startswith("--set=") else ""
    key, sign, _ = word[len(start) :].partition("=")
    return f"{start}{key}=(hidden)" if sign and is_secret(CampaignConfig, tuple(key.split("."))) else word


def message_of_outcome(campaign: CampaignConfig, outcome: CampaignOutcome) -> dict[str, Any] | None:
    """The webhook's message about a run; None if it is not subscribed to it."""
    manifest = outcome.manifest
    if outcome.stopped is Stopped.SIGNAL:
        return None
    is_failure = outcome.error is not None or manifest.failed_count > 0
    return _message(
        campaign,
        "failure" if is_failure else "complete",
        run_id=manifest.run_id,
        completed=manifest.completed_count,
        failed=manifest.failed_count,
        remaining=len(manifest.get_remaining()),
        error=None if outcome.error is None else outcome.error.message,
    )


def message_of_error(campaign: CampaignConfig, error: LemError) -> dict[str, Any] | None:
    """The webhook's message about a run that could not start; None if it is not subscribed to it."""
    return _message(campaign, "failure", run_id=None, completed=0, failed=0, remaining=None, error=error.message)


def _message(campaign: CampaignConfig, event: str, **data: Any) -> dict[str, Any] | None:
    if event not in campaign.notification.on:
        return None
    return {"event": event, "campaign": campaign.campaign_name, "campaign_id": campaign.campaign_id, **data}
