"""`lem measure` around real programs: NVML's double follows them, a fake powercap tree stands in for RAPL."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import lem
from lem.base import measurement, process
from lem.meters.samples import FINISHED_FILENAME, PART_FILENAME, PartReader, read_finished
from lem.record import Record, decode_record, read_record
from tests.campaign_rig import DOUBLES_PATH, LEM, ROOT, Ended, Running
from tests.command_rig import run_lem
from tests.doubles.nvml.library import NvmlDouble
from tests.doubles.nvml.traces import Counter, GpuTrace, Load, Trace
from tests.doubles.powercap import Powercap, Zone
from tests.processes import Marker, wait_for

UUID = "GPU-11111111-2222-3333-4444-555555555555"
IDLE_W, BUSY_W = 80.0, 350.0
WORK = {"completed": 40, "failed": 0, "total_input_tokens": 4000, "total_output_tokens": 2500, "duration": 1.4}

# Loads the GPU for a moment, of whose processes it then is one, and reports what it did.
PROGRAM = """
import json, os, sys, time
load, held, work, seconds = sys.argv[1:5]
def say(state):
    with open(load, "a") as stream:
        stream.write(f"{time.monotonic_ns()} {state}\\n")
with open(held, "w") as stream:
    stream.write(f"process {os.getpid()} 1000000\\n")
print("to stdout", flush=True)
print("to stderr", file=sys.stderr, flush=True)
say(1)
until = time.monotonic() + float(seconds)
while time.monotonic() < until:
    time.sleep(0.01)
say(0)
os.unlink(held)
if work:
    with open(work, "w") as stream:
        json.dump(%r, stream)
"""


@dataclass
class Rig:
    folder: Path
    marker: Marker = field(default_factory=Marker)

    @property
    def trace(self) -> Trace:
        load = Load(str(self.folder / "load"), IDLE_W, BUSY_W)
        return Trace(1, (GpuTrace(uuid=UUID, load=load, counter=Counter(period_s=0.02)),))

    def start(self, *words: str, before: Sequence[str] = (), double: NvmlDouble | None = None) -> Running:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("LEM")}
        environ = {
            **plain,
            **self.marker.environ(),
            "PYTHONPATH": DOUBLES_PATH,
            "LEM_LOCK_DIR": str(self.folder / "locks"),
        }
        environ |= double.variables() if double else {}
        # Other tests may run beside it.
        limits = ["--max-wait-pct", "100"]
        limits += [] if "--whole-machine" in words else ["--max-foreign-pct", "100"]
        command = [*before, *LEM, "measure", *limits, *words]
        return Running(command, self.folder, environ, is_warm=True)

    def measure(self, *words: str, **more: Any) -> Ended:
        return self.start(*words, **more).wait()

    def on_gpu(self, *options: str, work: str = "", seconds: float = 1.4, held_by: Sequence[int] = ()) -> Ended:
        (self.folder / "load").touch()
        double = NvmlDouble(self.folder / "nvml", (str(self.folder / "held"),))
        double.say(*self.trace.lines(), *(f"process {pid} 1000000" for pid in held_by))
        program = [sys.executable, "-c", PROGRAM % WORK, "load", "held", work, str(seconds)]
        return self.measure("--baseline", "1", *options, "--", *program, double=double)

    def results(self) -> list[tuple[Path, Record]]:
        found = [(path, read_record(path)) for path in (self.folder / "results").rglob("result.json")]
        return sorted(found, key=lambda item: item[1].identity.order_index)

    def true_j(self, path: Path) -> float:
        _, marks = read_finished(path.with_name(FINISHED_FILENAME))
        (window,) = ((mark.opened_ns, mark.closed_ns) for mark in marks if mark.name == measurement.WINDOW)
        return self.trace.after_load({0: (self.folder / "load").read_text()}).energy_j(*window)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    found = Rig(tmp_path)
    yield found
    found.marker.kill()


@pytest.mark.needs("gcc")
def test_runs_of_a_program_are_metered_with_an_interval_and_per_unit_of_its_work(rig: Rig) -> None:
    ended = rig.on_gpu("-r", "3", "--name", "bench", "--work", "out.json", work="out.json")
    assert ended.code == 0, ended.err
    assert ended.out == 3 * "to stdout\n"
    assert ended.err.count("to stderr\n") == 3
    assert rig.marker.survivors() == ()
    results = rig.results()
    assert [record.identity.cycle_index for _, record in results] == [0, 1, 2]
    for path, record in results:
        assert record.validity.valid, record.validity.invalid_reasons
        assert record.energy.energy_source == "nvml_counter"
        assert record.energy.gpu_energy_j == pytest.approx(rig.true_j(path), rel=0.02)
        assert record.idle.idle_bare_power_w == pytest.approx(IDLE_W, rel=0.02)
        assert record.idle.idle_loaded_post_power_w == pytest.approx(IDLE_W, rel=0.02)
        assert record.environment.other_gpu_processes == ()
        assert record.environment.engine_effective == {"exit_code": 0}
        work = record.work
        assert (work.requests_ok, work.input_tok, work.output_tok) == (40, 4000, 2500)
        assert record.efficiency.energy_per_output_tok_j == pytest.approx((record.energy.gpu_energy_j or 0) / 2500)
    run = lem.read(rig.folder / "results", "bench")
    (found,) = run.configurations
    per_run, per_tok = found.estimate("total_j"), found.estimate("energy_per_output_tok_j")
    assert (per_run.n, per_tok.n) == (3, 3)
    assert per_run.value is not None
    assert (per_run.low or 0) <= per_run.value <= (per_run.high or 0)
    assert per_tok.value == pytest.approx(per_run.value / 2500)
    verified = run_lem("verify", rig.folder / "results" / "bench")
    assert verified.code == 0, verified.out
    for command in (("results", "show"), ("check",), ("results", "export"), ("results", "recompute")):
        assert run_lem(*command, "bench", "--results-dir", rig.folder / "results").code in (0, 4), command
    report = ("report", "bench", "--results-dir", rig.folder / "results", "--output", rig.folder / "report.html")
    assert run_lem(*report).code == 0


@pytest.mark.needs("gcc")
def test_a_gpu_that_another_program_uses_is_measured_only_with_the_whole_machine(rig: Rig) -> None:
    assert rig.on_gpu("--name", "shared", held_by=(1,)).code == 0
    assert rig.on_gpu("--name", "whole", "--whole-machine", held_by=(1,)).code == 0
    (_, shared), (_, whole) = sorted(rig.results(), key=lambda item: item[1].identity.config_name)
    assert shared.energy.why_none("gpu_energy_j").code == "gpu_shared"
    assert whole.validity.valid, whole.validity.invalid_reasons
    assert whole.energy.gpu_energy_j is not None
    assert shared.identity.config_hash != whole.identity.config_hash
    for name in ("shared", "whole"):
        assert run_lem("verify", rig.folder / "results" / name).code == 0


@pytest.mark.needs("gcc")
def test_a_file_that_the_run_did_not_write_tells_nothing_of_its_work(rig: Rig) -> None:
    (rig.folder / "out.json").write_text(json.dumps(WORK))
    ended = rig.on_gpu("--work", "out.json")
    assert ended.code == 1
    ((_, record),) = rig.results()
    assert record.validity.valid
    assert record.energy.gpu_energy_j is not None
    assert record.work.output_tok is None
    assert record.work.why_none("output_tok").code == "work_unreadable"
    assert record.efficiency.why_none("energy_per_output_tok_j").code == "work_unreadable"


@pytest.mark.parametrize(("script", "code", "recorded"), [("exit 3", 3, 3), ("kill -KILL $$", 137, -9)])
def test_a_program_that_fails_passes_its_exit_code_on_and_is_not_run_again(
    rig: Rig, script: str, code: int, recorded: int
) -> None:
    ended = rig.measure("-r", "2", "--no-idle", "--", "sh", "-c", script)
    assert ended.code == code
    ((_, record),) = rig.results()
    assert [reason.code for reason in record.validity.invalid_reasons] == ["program_failed"]
    assert record.environment.engine_effective == {"exit_code": recorded}
    assert record.work.requests_ok is None
    assert record.work.why_none("requests_ok").code == "work_not_given"


def test_with_json_stdout_is_one_document(rig: Rig) -> None:
    ended = rig.measure("--json", "--no-idle", "--", "echo", "hello")
    assert ended.code == 0, ended.err
    assert "hello\n" in ended.err
    document = json.loads(ended.out)
    assert document["exit_code"] == 0
    (result,) = document["results"]
    record = decode_record(result["record"])
    assert record.requested["command"] == ["echo", "hello"]
    assert document["summary"]["configurations"][0]["time"]["window_s"]["n"] == 1


@pytest.mark.parametrize(("script", "code"), [("kill -KILL $$", 137), ("exit 0", 1)])
def test_the_document_has_the_exit_code_of_lem(rig: Rig, script: str, code: int) -> None:
    ended = rig.measure("--json", "--no-idle", "--work", "requests=none.json:n", "--", "sh", "-c", script)
    assert (ended.code, json.loads(ended.out)["exit_code"]) == (code, code)
    ((_, record),) = rig.results()
    assert record.work.why_uncounted is not None
    assert record.work.why_uncounted.code == "work_unreadable"


@pytest.mark.parametrize(("failed", "is_valid"), [(0, True), (1, True), (2, False)])
def test_a_run_of_which_more_than_1_percent_of_the_requests_failed_is_invalid(
    rig: Rig, failed: int, is_valid: bool
) -> None:
    work = {**WORK, "completed": 100 - failed, "failed": failed}
    (rig.folder / "work.json").write_text(json.dumps(work))
    ended = rig.measure("--no-idle", "--work", "out.json", "--", "cp", "work.json", "out.json")
    assert ended.code == 0, ended.err
    ((_, record),) = rig.results()
    validity = record.validity
    assert validity.valid is is_valid
    told = {reason.code for reason in (*validity.invalid_reasons, *validity.warnings)}
    assert ("work_failed" in told) is bool(failed)


def test_what_a_file_does_not_tell_is_named_beside_what_it_tells(rig: Rig) -> None:
    rows = [{"n_prompt": 0, "n_gen": 128, "n_depth": 512, "samples_ns": [5, 6]}]
    (rig.folder / "work.json").write_text(json.dumps(rows))
    ended = rig.measure("--no-idle", "--work", "out.json", "--", "cp", "work.json", "out.json")
    assert ended.code == 0, ended.err
    ((_, record),) = rig.results()
    assert (record.work.requests_ok, record.work.output_tok, record.work.input_tok) == (2, 256, None)
    assert record.efficiency.null_reasons["energy_per_total_tok_j"].code != "work_not_given"
    assert "2 requests, 256 tokens out; tokens in not measured: " in " ".join(ended.err.split())


@pytest.mark.parametrize(("signum", "code"), [("INT", 130), ("TERM", 143), ("HUP", 129), ("KILL", -9)])
def test_nothing_is_left_of_a_program_when_lem_is_ended(rig: Rig, signum: str, code: int) -> None:
    # Deaf to TERM, and with a child in a session of its own.
    script = "trap '' TERM INT; setsid sh -c 'trap \"\" TERM INT; echo begun >&2; while :; do sleep 1; done'"
    running = rig.start("-r", "2", "--no-idle", "--", "sh", "-c", script)
    running.wait_for_text("begun")
    running.send(getattr(signal, f"SIG{signum}"))
    assert running.wait().code == code
    assert rig.marker.survivors() == ()
    assert rig.results() == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((), 2),
        (("--", "no-such-program"), 2),
        (("-r", "0", "--", "true"), 2),
        (("--gpu", "7", "--", "true"), 2),
        (("--work", "a.json:images", "--", "true"), 2),
        (("--work", "a.json", "--work", "b.json:tokens", "--", "true"), 2),
        (("--energy", "nvml", "--", "true"), 2),
        (("--cpu-tdp-w", "90", "--", "true"), 2),
        (("--baseline", "5", "--", "true"), 2),
        (("--whole-machine", "--energy", "tdp_estimate", "--cpu-tdp-w", "90", "--", "true"), 2),
        (("--work", "outptu_tokens=a.json:n_tokens", "--", "true"), 2),
    ],
)
def test_what_cannot_take_effect_is_refused_before_the_program_runs(rig: Rig, words: Sequence[str], code: int) -> None:
    ended = rig.measure("--no-idle", *words)
    assert ended.code == code, ended.err
    assert ended.err.startswith("error: ")
    assert rig.results() == []


@pytest.mark.parametrize("option", [("--baseline", "5"), ("--idle",)])
@pytest.mark.parametrize("energy", ["none", "tdp_estimate"])
def test_a_rest_that_no_meter_measures_is_refused(rig: Rig, option: Sequence[str], energy: str) -> None:
    ended = rig.measure("--energy", energy, *option, "--", "true")
    assert ended.code == 2
    assert f"{option[0]}: has no effect with --energy {energy}" in ended.err
    assert rig.results() == []


def test_the_table_of_a_single_run_without_energy_says_why_and_names_the_option(rig: Rig) -> None:
    assert rig.measure("--energy", "none", "--name", "one", "--", "true").code == 0
    shown = run_lem("results", "show", "one", "--results-dir", str(rig.folder / "results")).out
    assert "Energy per run: not measured: energy is not measured" in " ".join(shown.split())
    assert "Single run: use lem measure -r 3" in shown
    assert "--cycles" not in shown


def test_without_a_rest_none_is_told(rig: Rig) -> None:
    for words in (("--no-idle",), ("--energy", "none")):
        ended = rig.measure("-r", "2", *words, "--", "true")
        assert [line for line in ended.err.splitlines() if line.startswith("run ")] == [
            "run 1 of 2: the program runs",
            "run 2 of 2: the program runs",
        ]


def suspended(rig: Rig, *program: str) -> subprocess.Popen[str]:
    """A program that writes its number to `pid` and then `begun`, stopped by Ctrl-Z."""
    command = [sys.executable, "-m", "lem", "measure", "--no-idle", "--energy", "none", "--", *program]
    environ = {**os.environ, **rig.marker.environ(), "PYTHONPATH": str(ROOT), "LEM_LOCK_DIR": str(rig.folder / "locks")}
    # A group of its own in this session, as a shell with job control makes one.
    options: dict[str, Any] = {"cwd": rig.folder, "env": environ, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, preexec_fn=os.setpgrp, **options)  # noqa: PLW1509 - without threads
    assert child.stderr is not None
    assert any(line == "begun\n" for line in child.stderr)
    os.killpg(child.pid, signal.SIGTSTP)
    assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
    return child


def test_ctrl_z_stops_the_program_too_and_makes_its_run_invalid(rig: Rig) -> None:
    os.mkfifo(rig.folder / "done")
    child = suspended(rig, "sh", "-c", "echo $$ > pid; echo begun >&2; read line < done")
    (samples,) = rig.folder.rglob(PART_FILENAME)
    wait_for(lambda: any((row.stopped_s or 0.0) >= 0.3 for row in PartReader(samples).read().usage) or None)
    os.killpg(child.pid, signal.SIGCONT)
    (rig.folder / "done").write_text("\n")
    child.communicate(timeout=120)
    assert child.returncode == 0
    ((_, record),) = rig.results()
    reason, *others = (it for it in record.validity.invalid_reasons if it.code in ("lem_stopped", "engine_stopped"))
    assert (reason.code, others) == ("lem_stopped", [])
    assert 0.3 <= reason.data["stopped_s"] <= round(record.window.window_s + 0.05, 1)
    assert record.interference.stopped_s


# Its children are replaced every moment by children of their own.
FORKING = """
import os, sys, time
until = time.monotonic() + 300  # nothing else ends them where the test fails
if not all(os.fork() for _ in range(8)):
    while not os.path.exists("done") and time.monotonic() < until:
        time.sleep(0.0003)
        if os.fork():
            os._exit(0)
    os._exit(0)
with open("pid", "w") as stream:
    stream.write(str(os.getpid()))
print("begun", file=sys.stderr, flush=True)
while not os.path.exists("done"):
    time.sleep(0.01)
"""


def test_ctrl_z_stops_a_program_that_starts_processes_all_the_time(rig: Rig) -> None:
    child = suspended(rig, sys.executable, "-c", FORKING)
    program = process.read_stat(int((rig.folder / "pid").read_text()))
    assert program is not None

    def states() -> set[str]:
        found = map(process.read_stat, process.descendants(program.parent))
        return {stat.state for stat in found if stat is not None}

    for _ in range(8):
        # The kernel stops them a moment later; one look does not see all that come and go.
        wait_for(lambda: all(states() == {"T"} for _ in range(10)) or None)
        os.killpg(child.pid, signal.SIGCONT)
        wait_for(lambda: "T" not in states() or None)
        os.killpg(child.pid, signal.SIGTSTP)
        assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
    (rig.folder / "done").touch()
    os.killpg(child.pid, signal.SIGCONT)
    child.communicate(timeout=120)
    assert child.returncode == 0
    assert rig.marker.survivors() == ()


@contextmanager
def advancing(tree: Powercap) -> Iterator[list[int]]:
    """The counters of a powercap tree go on within the block; when they did, since a busy machine delays them."""
    done = threading.Event()
    updated_ns: list[int] = []

    def follow() -> None:
        while not done.wait(0.02):
            tree.update(time.monotonic_ns())
            updated_ns.append(time.monotonic_ns())

    tree.make(time.monotonic_ns())
    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield updated_ns
    finally:
        done.set()
        thread.join()


def test_a_program_on_the_cpu_is_metered_by_rapl(rig: Rig) -> None:
    begins_ns = time.monotonic_ns()
    zone = Zone("intel-rapl:0", "package-0", ((0, 20.0),), begins_ns=begins_ns)
    mount = ("unshare", "--mount", "sh", "-c", f'mount --bind {rig.folder}/class /sys/class && exec "$@"', "sh")

    def measured(name: str) -> tuple[Path, Record]:
        program = [sys.executable, "-c", "import time; time.sleep(3)"]
        ended = rig.measure("--name", name, "--baseline", "3", "--", *program, before=mount)
        assert ended.code == 0, ended.err
        return next(item for item in rig.results() if item[1].identity.campaign_name == name)

    with advancing(Powercap(rig.folder / "class" / "powercap", (zone,))) as updated_ns:
        path, record = measured("first")
        for name in ("second", "third", "fourth"):
            if None in (record.energy.energy_source, record.idle.idle_bare_power_w):  # the machine was too busy
                path, record = measured(name)
    assert record.energy.energy_source == "rapl"
    late_s = max(later - earlier for earlier, later in itertools.pairwise(updated_ns)) / 1e9
    error = 0.05 + 2 * late_s / record.window.window_s
    assert record.energy.cpu_package_energy_j == pytest.approx(20 * record.window.window_s, rel=error)
    assert record.idle.idle_bare_power_w == pytest.approx(20, rel=error), record.idle.null_reasons
    assert run_lem("verify", path).code == 0
