import io
import json
import time
from datetime import datetime, timezone

import pytest

from lem.base import log
from lem.cli.progress import JsonProgress, LineProgress, QuietProgress, TerminalProgress
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


@pytest.fixture
def live(stream):
    """Shows events on a terminal at noon; what the live line was after each."""
    show = TerminalProgress(log.Console(stream), now=lambda: NOON)

    def live_lines(*events):
        for event in events:
            show(event)
        return stream.getvalue().split("\r\x1b[2K")[1:]

    return live_lines


def _event(kind, eta_s=None, **data):
    return Event(kind, 3, 12, eta_s, data)


STARTED = _event("experiment_started", **WHO)


def test_live_line_names_experiment_backend_cycle_phase_and_end(live):
    progress = {"phase_done": 5, "phase_total": 10, "text": "5 requests", "power_w": 312.4}
    lines = live(STARTED, _event("phase", 3600, phase="window"), _event("progress", 3600, **progress))
    assert lines[-1] == "[3/12] gpt2-b4 · pytorch · cycle 2/3 · measuring 5/10 · 312.4 W · ends at 13:00"


@pytest.mark.parametrize(
    ("wait_pct", "foreign_pct", "shown"),
    [
        (None, None, "312.4 W"),
        (4.9, 5.0, "312.4 W"),
        (23.4, None, "waits 23 % · 312.4 W"),
        (23.4, 41.2, "waits 23 %, others 41 "),
    ],
)
def test_the_live_line_shows_interference_from_5_percent_on(live, wait_pct, foreign_pct, shown):
    how_far = {"phase_done": 5, "phase_total": 10, "text": "", "power_w": 312.4}
    disturbed = _event("progress", **how_far, wait_pct=wait_pct, foreign_pct=foreign_pct)
    lines = live(STARTED, _event("phase", phase="window"), disturbed)
    assert lines[-1].startswith(f"[3/12] gpt2-b4 · pytorch · cycle 2/3 · measuring 5/10 · {shown}")


def test_a_long_name_gives_way_on_the_live_line(live, monkeypatch):
    name = "pytorch-" + "x" * 200 + "-b64"
    last = live(_event("experiment_started", 3600, **{**WHO, "config_name": name}))[-1]
    assert len(last) == 79
    assert last.startswith("[3/12] pytorch")
    assert last.endswith("…" + "x" * 11 + "-b64 · pytorch · cycle 2/3 · starting · ends at 13:00")
    monkeypatch.setenv("COLUMNS", "30")  # where even that does not help, the line is cut
    assert live(STARTED)[-1] == "[3/12] gpt2-b4 · pytorch · c…"


def test_the_end_stays_on_the_live_line_when_other_facts_give_way(live):
    name = "pytorch-" + "x" * 200 + "-b64"
    started = _event("experiment_started", 3600, **{**WHO, "config_name": name})
    how_far = {"phase_done": 5, "phase_total": 10, "text": "", "power_w": 312.4, "wait_pct": 23.4, "foreign_pct": 41.2}
    last = live(started, _event("phase", 3600, phase="window"), _event("progress", 3600, **how_far))[-1]
    assert len(last) <= 79
    assert last.endswith("-b64 · pytorch · cycle 2/3 · measuring 5/10 · ends at 13:00")


def test_progress_without_an_end_is_a_count_and_without_a_meter_has_no_watts(live):
    counts = ((5, "prompts"), (6, "prompts"), (7, "7 requests"))
    progress = (_event("progress", phase_done=done, phase_total=None, text=text) for done, text in counts)
    lines = live(STARTED, _event("phase", phase="warmup"), *progress)
    assert [line.rpartition(" · ")[2] for line in lines[-2:]] == ["warming up 6 prompts", "warming up 7 requests"]


def test_a_gap_counts_down_and_the_live_line_goes_when_the_campaign_ends(live):
    gap, tick = _event("gap", gap="cycle", cap_s=300.0), _event("tick", left_s=245.0)
    lines = live(gap, tick, _event("campaign_finished"))
    assert lines == ["[3/12] gap, at most 5m 00s", "[3/12] gap, at most 4m 05s more", ""]


def test_what_a_window_showed_is_not_shown_after_it(live):
    measured = _event("progress", phase_done=5, phase_total=10, text="", power_w=312.4, wait_pct=23.4, foreign_pct=41.2)
    lines = live(STARTED, _event("phase", phase="window"), measured, _event("gap", gap="cycle", cap_s=300.0))
    assert lines[-1] == "[3/12] gap, at most 5m 00s"
    assert live(measured, STARTED)[-1] == "[3/12] gpt2-b4 · pytorch · cycle 2/3 · starting"


def test_off_a_terminal_each_change_is_a_line_with_its_time():
    stream = io.StringIO()
    show = LineProgress(log.Console(stream), now=lambda: NOON, monotonic=_Clock())
    too_hot = {"valid": False, "invalid_reasons": ["thermal slowdown"], "output_tok_per_s": None, "elapsed_s": 1}
    for event in (
        STARTED,
        _event("phase", phase="window"),
        _event("progress", phase_done=1, phase_total=2),
        _event("experiment_completed", **WHO, valid=True, output_tok_per_s=99.5, elapsed_s=61),
        _event("experiment_completed", **WHO, **too_hot),
        _event("experiment_retried", **WHO, reason="the worker died"),
        _event("experiment_interrupted", **WHO),
    ):
        show(event)
    assert [line.removeprefix("12:00:00 [3/12] ") for line in stream.getvalue().splitlines()] == [
        "gpt2-b4 · pytorch · cycle 2/3 · starting",
        "gpt2-b4 · pytorch · cycle 2/3 · measuring",
        "ok gpt2-b4 · cycle 2/3 · 99.5 tok/s · 1m 01s",
        "invalid gpt2-b4 · cycle 2/3 · – · 1.0 s",
        "12:00:00     thermal slowdown",
        "retrying gpt2-b4 · cycle 2/3: the worker died",
        "interrupted gpt2-b4 · cycle 2/3",
    ]


def test_off_a_terminal_a_long_phase_speaks_once_a_minute():
    stream, clock = io.StringIO(), _Clock()
    show = LineProgress(log.Console(stream), now=lambda: NOON, monotonic=clock)
    for second in range(180):
        clock.seconds = float(second)
        show(_event("tick"))
    assert len(stream.getvalue().splitlines()) == 2


def test_a_failure_tells_error_remedy_and_log_even_when_quiet():
    stream = io.StringIO()
    show = QuietProgress(log.Console(stream))
    show(_event("experiment_failed", **WHO, error="out of memory", hint="a smaller batch", log="results/log.txt"))
    show(STARTED)
    assert stream.getvalue().splitlines() == [
        "[3/12] failed gpt2-b4 · cycle 2/3: out of memory",
        "    hint: a smaller batch",
        "    log: results/log.txt",
    ]


def test_json_is_one_object_a_line_with_its_time_and_nothing_that_is_for_people():
    out, err = io.StringIO(), io.StringIO()
    show = JsonProgress(out, log.Console(err), lambda: datetime(2026, 7, 15, 12, 0, 1, 500_000, tzinfo=timezone.utc))
    how_far = {"exp_id": "e", "phase_done": 3, "phase_total": None}
    show(_event("experiment_started", 12.5, **WHO))
    show(_event("tick"))
    show(_event("progress", **how_far, text="warm-up prompts"))
    show(_event("note", text="the anchor was added"))
    show(_event("experiment_completed", **WHO, invalid_reasons=["too hot"], invalid_codes=["hot"]))
    common = {"time": "2026-07-15T12:00:01.500000Z", "done": 3, "total": 12}
    assert [*map(json.loads, out.getvalue().splitlines())] == [
        {"event": "experiment_started", **common, "eta_s": 12.5, **WHO},
        {"event": "progress", **common, "eta_s": None, **how_far},
        {"event": "experiment_completed", **common, "eta_s": None, **WHO, "invalid_codes": ["hot"]},
    ]
    assert err.getvalue() == "the anchor was added\n"
