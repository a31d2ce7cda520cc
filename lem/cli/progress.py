"""Progress of a campaign, for terminals, logs, programs and systemd."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, TextIO

from lem.base import log, units
from lem.base.clock import utc_now, utc_text
from lem.base.doc import printable
from lem.base.measurement import INTERFERENCE_FROM
from lem.cli.main import discard_output
from lem.orchestration.status import Event, Observer
from lem.orchestration.systemd import ServiceManager

_logger = logging.getLogger(__name__)
campaign_logger = logging.getLogger("lem.campaign")

# Phases that take long; the others take moments.
_LONG_PHASES = {"load": "loading", "warmup": "warming up", "window": "measuring"}
_PHASE_WORDS = {**_LONG_PHASES, "prepare": "preparing", "idle": "idle", "cooldown": "cooling down", "write": "writing"}
_LINE_EVERY_S = 60.0
_NAME_AT_LEAST = 12


def choose_progress(console: log.Console, out: TextIO, *, is_json: bool, is_quiet: bool) -> Observer:
    if is_json:
        return JsonProgress(out, None if is_quiet else console)
    if is_quiet:
        return QuietProgress(console)
    return TerminalProgress(console) if console.is_live else LineProgress(console)


def write_output(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        _logger.warning("no more output on stdout: %s", error.strerror or error)
        discard_output(stream)


# What events hold for people alone.
_DISPLAYED = ("text", "invalid_reasons")


class JsonProgress:
    def __init__(self, out: TextIO, console: log.Console | None, now: Callable[[], datetime] = utc_now) -> None:
        self._out, self._console, self._now = out, console, now

    def __call__(self, event: Event) -> None:
        if event.kind == "note" and self._console is not None:
            self._console.line(str(event.data["text"]))
        elif event.kind not in ("note", "tick"):
            data = {name: value for name, value in event.data.items() if name not in _DISPLAYED}
            write_json_event(
                self._out, event.kind, self._now(), done=event.done, total=event.total, eta_s=event.eta_s, **data
            )


def write_json_event(out: TextIO, kind: str, at: datetime, **data: Any) -> None:
    write_output(out, json.dumps({"event": kind, "time": utc_text(at), **data}, ensure_ascii=False) + "\n")


class QuietProgress:
    def __init__(self, console: log.Console) -> None:
        self._console = console

    def __call__(self, event: Event) -> None:
        if event.kind == "experiment_failed":
            for line in _ending(event, self._console.paint):
                self._console.line(line, _level_of(event))


class TerminalProgress:
    def __init__(self, console: log.Console, now: Callable[[], float] = time.time) -> None:
        self._console = console
        self._now = now
        self._state = _State()

    def __call__(self, event: Event) -> None:
        self._state.update(event)
        for line in _ending(event, self._console.paint):
            self._console.line(line, _level_of(event))
        if event.kind == "campaign_finished":
            self._console.close()
        elif event.kind not in ("note", "campaign_started"):
            width = log.terminal_columns() - 1
            self._console.live(self._state.describe(event, self._now(), width))


class LineProgress:
    def __init__(
        self,
        console: log.Console | None,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._now = now
        self._monotonic = monotonic
        self._state = _State()
        self._printed_at = monotonic()

    def __call__(self, event: Event) -> None:
        self._state.update(event)
        lines = _ending(event, self._console.paint if self._console is not None else lambda text, _: text)
        is_change = event.kind in ("experiment_started", "gap") or (
            event.kind == "phase" and event.data.get("phase") in _LONG_PHASES
        )
        is_time = event.kind in ("tick", "progress") and self._monotonic() - self._printed_at >= _LINE_EVERY_S
        if not lines and (is_change or is_time):
            lines = [self._state.describe(event, self._now())]
        if lines:
            self._printed_at = self._monotonic()
        for line in lines:
            if self._console is None:
                campaign_logger.info("%s", line)
            else:  # the journal, like the log, adds its own timestamps
                clock = "" if self._console.is_journal else time.strftime("%H:%M:%S ", time.localtime(self._now()))
                self._console.line(f"{clock}{line}", _level_of(event))


class StatusProgress:
    def __init__(self, manager: ServiceManager) -> None:
        self._manager = manager
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
            self._manager.status(self._state.describe(event, time.time()))


def _level_of(event: Event) -> int:
    if event.kind == "experiment_failed":
        return logging.ERROR
    is_odd = event.kind in ("experiment_retried", "experiment_interrupted") or not event.data.get("valid", True)
    return logging.WARNING if is_odd else logging.INFO


class _State:
    def __init__(self) -> None:
        self.experiment: dict[str, Any] = {}
        self.phase = self.activity = ""
        self.watts: float | None = None
        self.interference = ""

    def update(self, event: Event) -> None:
        data = event.data
        if event.kind == "experiment_started":
            self.experiment = dict(data)
            self.phase = self.activity = "starting"
            self.watts, self.interference = None, ""
        elif event.kind == "phase":
            self.phase = self.activity = _PHASE_WORDS.get(str(data.get("phase")), str(data.get("phase")))
        elif event.kind == "progress":
            self.activity = f"{self.phase} {_count(data)}".rstrip()
            self.watts = data.get("power_w")
            self.interference = _interference(data)
        elif event.kind == "gap":
            self.experiment = {}
            self.watts, self.interference = None, ""  # which were those of the last window
            self.activity = f"gap, at most {units.format_duration(float(data['cap_s']))}"
        elif event.kind == "tick" and "left_s" in data:
            self.activity = f"gap, at most {units.format_duration(float(data['left_s']))} more"

    def describe(self, event: Event, now: float, width: int | None = None) -> str:
        name = printable(str(self.experiment.get("config_name", "")))
        watts = "" if self.watts is None else units.format_power(self.watts)
        line = ""
        for facts in ((self.interference, watts), (self.interference,), ()):
            line = self._join(event, now, name, facts)
            room = len(name) if width is None else max(len(name) - (len(line) - width), _NAME_AT_LEAST)
            if room < len(name):
                head = (room - 1) // 3
                line = self._join(event, now, f"{name[:head]}…{name[len(name) - (room - 1 - head) :]}", facts)
            if width is None or len(line) <= width:
                break
        return line

    def _join(self, event: Event, now: float, name: str, facts: tuple[str, ...]) -> str:
        parts = []
        if self.experiment:
            cycle = f"cycle {self.experiment['cycle']}/{self.experiment['cycles']}"
            parts += [name, str(self.experiment["backend"]), cycle]
        parts += [self.activity, *facts]
        if event.eta_s is not None:
            at, today = time.localtime(now + event.eta_s), time.localtime(now)
            parts.append(time.strftime("ends at %H:%M" if at[:3] == today[:3] else "ends on %a at %H:%M", at))
        return f"[{event.done}/{event.total}] " + " · ".join(filter(None, parts))


def _count(data: Mapping[str, Any]) -> str:
    done, total, text = data.get("phase_done"), data.get("phase_total"), str(data.get("text", ""))
    if done is None or total:
        return f"{done}/{total}" if total else text
    return text if str(done) in text else f"{done} {text}"


def _interference(data: Mapping[str, Any]) -> str:
    words = {"wait_pct": "waits {:.0f} %", "foreign_pct": "others {:.0f} %"}
    shares = ((text, data.get(name)) for name, text in words.items())
    return ", ".join(text.format(share) for text, share in shares if share and share > 100 * INTERFERENCE_FROM)


def _ending(event: Event, paint: Callable[[str, str], str]) -> list[str]:
    data = event.data
    if event.kind == "note":
        return [str(data["text"])]
    if event.kind not in ("experiment_completed", "experiment_failed", "experiment_retried", "experiment_interrupted"):
        return []
    head = f"[{event.done}/{event.total}]"
    name = f"{printable(str(data['config_name']))} · cycle {data['cycle']}/{data['cycles']}"
    if event.kind == "experiment_completed":
        mark = paint("ok", "green") if data.get("valid", True) else paint("invalid", "yellow")
        rate, elapsed = units.format_rate(data.get("output_tok_per_s")), units.format_duration(float(data["elapsed_s"]))
        reasons = [f"    {printable(why)}" for why in data.get("invalid_reasons", ())]
        return [f"{head} {mark} {name} · {rate} · {elapsed}", *reasons]
    if event.kind == "experiment_retried":
        return [f"{head} {paint('retrying', 'yellow')} {name}: {_indented(data['reason'])}"]
    if event.kind == "experiment_interrupted":
        return [f"{head} {paint('interrupted', 'yellow')} {name}"]
    more = [f"    {key}: {_indented(data[key])}" for key in ("hint", "log") if data.get(key)]
    return [f"{head} {paint('failed', 'red')} {name}: {_indented(data['error'])}", *more]


def _indented(text: str) -> str:
    return "\n    ".join(text.splitlines())
