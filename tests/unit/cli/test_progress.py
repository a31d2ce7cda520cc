"""What a running campaign looks like on a terminal, off it, and to a program."""

import io
import json
import time

import pytest

from lem.base import log
from lem.cli.progress import JsonProgress, LineProgress, QuietProgress, TerminalProgress, choose_progress
from lem.orchestration.status import Event

NOON = time.mktime((2026, 11, 20, 12, 0, 0, 0, 0, -1))
WHO = {"config_name": "gpt2-b4", "backend": "pytorch", "cycle": 2, "cycles": 3}


class _Terminal(io.StringIO):
    def isatty(self):
        return True


class _Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return _Terminal()


def _started(done=3, eta_s=None):
    return Event("experiment_started", done, 12, eta_s, WHO)


def test_live_line_names_experiment_backend_cycle_phase_and_end(stream):
    show = TerminalProgress(log.Console(stream), now=lambda: NOON)
    show(_started(eta_s=3600))
    show(Event("phase", 3, 12, 3600, {"phase": "window"}))
    show(Event("progress", 3, 12, 3600, {"phase_done": 5, "phase_total": 10, "text": "5 requests", "power_w": 312.4}))
    last = stream.getvalue().split("\r\x1b[2K")[-1]
    assert last == "[3/12] gpt2-b4 · pytorch · cycle 2/3 · measuring 5/10 · 312.4 W · ETA 13:00"


def test_a_long_name_gives_way_on_the_live_line(stream):
    show = TerminalProgress(log.Console(stream), now=lambda: NOON)
    name = "pytorch-" + "x" * 200 + "-b64"
    show(Event("experiment_started", 0, 1, 3600, {**WHO, "config_name": name}))
    last = stream.getvalue().split("\r\x1b[2K")[-1]
    assert len(last) == 79
    assert last.startswith("[0/1] pytorch-")
    assert last.endswith("…" + "x" * 14 + "-b64 · pytorch · cycle 2/3 · starting · ETA 13:00")


def test_the_live_line_is_cut_where_even_that_does_not_help(stream, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    show = TerminalProgress(log.Console(stream), now=lambda: NOON)
    show(_started())
    assert stream.getvalue().split("\r\x1b[2K")[-1] == "[3/12] gpt2-b4 · pytorch · c…"


def test_progress_without_an_end_is_a_count(stream):
    show = TerminalProgress(log.Console(stream), now=lambda: NOON)
    show(_started())
    show(Event("phase", 3, 12, None, {"phase": "warmup"}))
    show(Event("progress", 3, 12, None, {"phase_done": 5, "phase_total": None, "text": "prompts"}))
    show(Event("progress", 3, 12, None, {"phase_done": 6, "phase_total": None, "text": "prompts"}))
    assert stream.getvalue().endswith(" · warming up 6 prompts")
    show(Event("progress", 3, 12, None, {"phase_done": 7, "phase_total": None, "text": "7 requests"}))
    assert stream.getvalue().endswith(" · warming up 7 requests")


def test_no_watts_where_no_meter_told_them(stream):
    show = TerminalProgress(log.Console(stream), now=lambda: NOON)
    show(_started())
    show(Event("progress", 3, 12, None, {"phase_done": 5, "phase_total": 10}))
    assert " W" not in stream.getvalue()


def test_the_live_line_goes_when_the_campaign_ends(stream):
    show = TerminalProgress(log.Console(stream), now=lambda: NOON)
    show(_started())
    show(Event("campaign_finished", 12, 12))
    assert stream.getvalue().endswith("\r\x1b[2K")


def test_off_a_terminal_each_change_is_a_line_with_its_time():
    stream = io.StringIO()
    show = LineProgress(log.Console(stream), now=lambda: NOON, monotonic=_Clock())
    show(_started())
    show(Event("phase", 3, 12, None, {"phase": "window"}))
    show(Event("progress", 3, 12, None, {"phase_done": 1, "phase_total": 2}))
    show(Event("experiment_completed", 4, 12, None, {**WHO, "valid": True, "output_tok_per_s": 99.5, "elapsed_s": 61}))
    assert stream.getvalue().splitlines() == [
        "12:00:00 [3/12] gpt2-b4 · pytorch · cycle 2/3 · starting",
        "12:00:00 [3/12] gpt2-b4 · pytorch · cycle 2/3 · measuring",
        "12:00:00 [4/12] ok gpt2-b4 · cycle 2/3 · 99.5 tok/s · 1m 01s",
    ]


def test_off_a_terminal_a_long_phase_speaks_once_a_minute():
    stream, clock = io.StringIO(), _Clock()
    show = LineProgress(log.Console(stream), now=lambda: NOON, monotonic=clock)
    show(_started())
    before = len(stream.getvalue().splitlines())
    for second in range(0, 180):
        clock.seconds = float(second)
        show(Event("tick", 3, 12))
    assert len(stream.getvalue().splitlines()) - before == 2


def test_a_gap_counts_down_on_the_live_line(stream):
    show = TerminalProgress(log.Console(stream), now=lambda: NOON)
    show(Event("gap", 1, 2, None, {"gap": "cycle", "cap_s": 300.0}))
    show(Event("tick", 1, 2, None, {"left_s": 245.0}))
    assert [part for part in stream.getvalue().split("\r\x1b[2K") if part] == [
        "[1/2] gap, at most 5m 00s",
        "[1/2] gap, at most 4m 05s more",
    ]


def test_a_failure_tells_error_remedy_and_log_even_when_quiet():
    stream = io.StringIO()
    data = {**WHO, "error": "out of memory", "hint": "a smaller batch", "log": "results/log.txt"}
    QuietProgress(log.Console(stream))(Event("experiment_failed", 1, 2, None, data))
    QuietProgress(log.Console(stream))(_started())
    assert stream.getvalue().splitlines() == [
        "[1/2] failed gpt2-b4 · cycle 2/3: out of memory",
        "    hint: a smaller batch",
        "    log: results/log.txt",
    ]


def test_an_invalid_result_says_why():
    stream = io.StringIO()
    data = {**WHO, "valid": False, "invalid_reasons": ["thermal slowdown"], "output_tok_per_s": None, "elapsed_s": 1}
    LineProgress(log.Console(stream), now=lambda: NOON)(Event("experiment_completed", 1, 2, None, data))
    assert "invalid gpt2-b4" in stream.getvalue()
    assert "thermal slowdown" in stream.getvalue()


def test_json_is_one_object_a_line():
    out = io.StringIO()
    show = JsonProgress(out)
    show(_started(eta_s=12.5))
    show(Event("tick", 3, 12))
    (line,) = out.getvalue().splitlines()
    assert json.loads(line) == {"event": "experiment_started", "done": 3, "total": 12, "eta_s": 12.5, **WHO}


def test_the_stream_decides_the_kind(stream):
    terminal, pipe, out = log.Console(stream), log.Console(io.StringIO()), io.StringIO()
    assert isinstance(choose_progress(terminal, out, is_json=False, is_quiet=False), TerminalProgress)
    assert isinstance(choose_progress(pipe, out, is_json=False, is_quiet=False), LineProgress)
    assert isinstance(choose_progress(terminal, out, is_json=True, is_quiet=True), JsonProgress)
    assert isinstance(choose_progress(terminal, out, is_json=False, is_quiet=True), QuietProgress)
