"""The worker channel, read from both ends, and the CSV of a meter of the user's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

from hypothesis import strategies as st

from lem import __version__
from lem.base.errors import LemError, MeterRefused, UserError
from lem.config.experiment import ExperimentConfig
from lem.meters.curve import NotMeasured, Span
from lem.meters.external import measure_external, read_external
from lem.meters.samples import SampleHeader, SampleLog
from lem.orchestration.dispatch import Worker
from lem.orchestration.schedule import Timeouts
from lem.worker.channel import PROTOCOL_VERSION, ChannelError, Failure, LineBuffer, RunRequest, read_report
from lem.worker.supervisor import Supervisor
from tests.fuzz.mutation import bytes_near, json_lines_near, text_near
from tests.fuzz.trial import Find, Outcome, Surface

_EXP = "0123456789ab-c1"
_REQUEST = RunRequest(
    config={"model": {"name": "gpt2"}},
    identity={"experiment_id": _EXP},
    result_dir="attempt",
    engine_key="0123456789ab",
    keep_engine=True,
    sampled_gpus=("GPU-1",),
    secrets={"HF_TOKEN": "hf_secret"},
)
_HELLO = {
    "type": "hello",
    "protocol": PROTOCOL_VERSION,
    "lem_version": __version__,
    "pid": 7,
    "environment": {"os": "x"},
}
_COURSE: tuple[dict[str, Any], ...] = (
    _HELLO,
    {"type": "engine", "pgid": 7, "started_ticks": 9},
    {"type": "phase", "exp_id": _EXP, "phase": "load"},
    {"type": "progress", "exp_id": _EXP, "done": 1, "total": 2, "text": "x"},
    {"type": "heartbeat"},
)
_RESULT = {
    "type": "result", "exp_id": _EXP, "valid": True, "engine_load_id": "1", "engine_reused": False,
    "summary": {"a": 1.5},
}  # fmt: skip
_ERROR = {
    "type": "error", "exp_id": _EXP, "kind": "engine", "message": "no", "hint": "", "permanent": False,
    "phase": None, "engine_lost": True, "log_tail": "last line",
}  # fmt: skip
_TIMEOUTS = Timeouts(load_s=20.0, experiment_s=20.0, silence_s=20.0, heartbeat_s=20.0)


def try_worker_lines(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """What a worker says: line by line; and one in some, as the host that runs an experiment hears it."""
    good = 0
    lines: list[bytes] = []
    try:
        lines = LineBuffer(max_line_b=4000).feed(data)
        good = sum(read_report(line) is not None for line in lines)
    except ChannelError as error:
        if not str(error):
            raise Find("place", "an error of the channel without words") from error
    if is_thorough or len(data) % 4 == 0:
        _run_on(data, folder)
    return Outcome.ACCEPTED if lines and good == len(lines) else Outcome.REFUSED


def _run_on(data: bytes, folder: Path) -> None:
    """Run an experiment on a worker that says just this, and then ends."""
    said = folder / "said"
    said.write_bytes(data)
    # What it says of an engine process is noted and, since its numbers mean nothing here, never acted upon.
    worker = Worker(("cat", str(said)), shares_pids=False)
    try:
        worker.run(_REQUEST, lambda _event: None, _TIMEOUTS)
        worker.unload(timeout_s=20.0)
    except LemError:
        pass
    finally:
        worker.kill()


def try_host_lines(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """What a host says, to a supervisor whose engine cannot be started."""
    del is_thorough
    (folder / "attempt").mkdir(exist_ok=True)
    host_in, host = os.pipe()
    answers, host_out = os.pipe()
    wakeup, wakeup_writer = os.pipe()
    try:
        os.set_blocking(host, False)
        os.write(host, data[:60_000])
        os.close(host)
        Supervisor(host_in, host_out, wakeup, _no_engine).run()
        os.close(host_out)
        host_out = -1
        answered = LineBuffer().feed(os.read(answers, 1 << 20))
    finally:
        for descriptor in (host_in, answers, host_out, wakeup, wakeup_writer):
            if descriptor >= 0:
                os.close(descriptor)
    reports = [read_report(line) for line in answered]  # the supervisor itself speaks the protocol
    is_refused = any(isinstance(item, Failure) and item.kind == "channel" for item in reports)
    if any("hf_secret" in str(item) and "experiment could not" in str(item) for item in reports):
        raise Find("escape", "the supervisor told a secret")
    return Outcome.REFUSED if is_refused else Outcome.ACCEPTED


def _no_engine() -> NoReturn:
    raise UserError("there is no engine here")


def try_csv(data: bytes, folder: Path, *, is_thorough: bool) -> Outcome:
    """A CSV of UTC times and power."""
    del is_thorough
    path = folder / "meter.csv"
    path.write_bytes(data)
    log = SampleLog(SampleHeader(1_000_000_000, "2026-07-14T10:00:00.000000Z", "lab1", 100))
    try:
        measure_external(read_external(path), log, Span(2_000_000_000, 5_000_000_000), ())
    except (MeterRefused, NotMeasured) as error:
        if "meter.csv" not in str(error):
            raise Find("place", str(error)) from error
        return Outcome.REFUSED
    return Outcome.ACCEPTED


def _csv_texts() -> tuple[str, ...]:
    rows = [f"2026-07-14T10:00:{second:02d}Z,{200 + second}" for second in range(12)]
    epoch = [f"{1_784_023_200 + second}.5;{200 + second},5" for second in range(4)]
    return "\n".join(["time,watts", *rows]), "\n".join(rows), "\n".join(epoch), "\n".join(f"{row},x,y" for row in rows)


def _worker_lines() -> st.SearchStrategy[bytes]:
    courses = [*_COURSE, _RESULT], [*_COURSE, _ERROR, {"type": "unloaded"}], [_HELLO, {"type": "unloaded"}]
    return json_lines_near(*courses) | bytes_near(b'{"type":"heartbeat"}\n{"type":"unloaded"}\n')


def _host_lines() -> st.SearchStrategy[bytes]:
    config = ExperimentConfig.from_dict({"model": "gpt2"}).to_dict()
    run = {**_REQUEST.to_message(), "config": config}
    least = RunRequest({}, {"experiment_id": "e"}, "attempt", "k", keep_engine=False).to_message()
    return json_lines_near([run], [least, {"type": "unload"}, {"type": "quit"}]) | bytes_near(b'{"type":"quit"}\n')


SURFACES = (
    Surface("worker-lines", _worker_lines, try_worker_lines, share=3),
    Surface("host-lines", _host_lines, try_host_lines, share=2),
    Surface("external-csv", lambda: text_near(*_csv_texts()), try_csv, share=2),
)
