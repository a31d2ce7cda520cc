from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lem.base.clock import Clock
from lem.base.errors import UserError
from lem.base.launch import own_command
from lem.meters.samples import PartReader, SampleLog
from lem.worker.children import SamplerProcess, wait_until_ready
from tests.doubles.nvml.library import NvmlDouble
from tests.processes import Marker, wait_for, wait_until_ended
from tests.unit.meters.nvml_stand_in import FakeClock

COMMAND = own_command(sys.executable)
PATIENCE_S = 30.0
NS_PER_S = 1_000_000_000
GPU = "GPU-00000000-0000-4000-8000-000000000000"
OWNER = """
import pathlib, signal, sys
from lem.worker.children import SamplerProcess
sampler = SamplerProcess(sys.argv[2:], pathlib.Path(sys.argv[1]))
print(sampler.child.pid, flush=True)
signal.pause()
"""


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where samplers of this test write; none of them is left behind."""
    marker = Marker()
    for name, value in marker.environ().items():
        monkeypatch.setenv(name, value)
    yield tmp_path / "samples.part"
    left = tuple(pid for pid in marker.pids() if pid != os.getpid())
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == ()


def until_ready(sampler: SamplerProcess) -> SampleLog:
    clock = Clock()
    deadline_ns = clock.monotonic_ns() + round(PATIENCE_S * NS_PER_S)
    assert wait_until_ready(sampler.output, deadline_ns, clock), sampler.death()
    return PartReader(sampler.output).read()


def test_it_writes_from_its_start_to_its_end(output: Path) -> None:
    sampler = SamplerProcess(COMMAND, output, tdp_w=95.5)
    header = until_ready(sampler).header
    assert sampler.death() is None
    assert (header.cpu_tdp_w, header.interval_ms, header.gpu_error) == (95.5, 100, "no GPU is to be sampled")
    assert sampler.stop(PATIENCE_S) == 0
    assert sampler.death() == "the sampler ended with exit code 0"
    log = PartReader(output).read()
    assert len(log.loads) >= 2
    assert log.clocks[-1].at_ns >= log.loads[-1].at_ns
    sampler.kill()  # one that is gone


@pytest.mark.needs("gcc")
def test_it_hears_another_interval(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double = NvmlDouble(tmp_path / "nvml")
    double.say("count 1")
    for name, value in double.variables().items():
        monkeypatch.setenv(name, value)
    sampler = SamplerProcess(COMMAND, output, [GPU], interval_ms=60_000)
    assert [gpu.uuid for gpu in until_ready(sampler).header.gpus] == [GPU]
    sampler.set_interval(10)
    # On its own schedule, the second would come after a minute.
    wait_for(lambda: len(PartReader(output).read().samples) > 5 or None)
    assert sampler.stop(PATIENCE_S) == 0
    sampler.set_interval(10)  # nobody hears it


def test_it_ends_as_soon_as_its_owner_is_gone(output: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(output), *COMMAND]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        wait_for(lambda: output.exists() or None)
        owner.kill()
    assert wait_until_ended(pid, PATIENCE_S)


def test_a_signal_has_it_write_its_last_rows_and_one_that_hangs_is_killed(output: Path) -> None:
    sampler = SamplerProcess(COMMAND, output)
    until_ready(sampler)
    wait_for(lambda: PartReader(output).read().loads or None)
    os.kill(sampler.child.pid, signal.SIGTERM)
    assert wait_until_ended(sampler.child.pid, PATIENCE_S)
    assert sampler.stop(0) == 0
    assert len(PartReader(output).read().clocks) == 1

    output.unlink()
    sampler = SamplerProcess(COMMAND, output)
    until_ready(sampler)
    os.kill(sampler.child.pid, signal.SIGSTOP)
    assert sampler.stop(0.05) == -signal.SIGKILL
    assert sampler.death() == "the sampler was killed by SIGKILL"


def test_one_that_cannot_write_says_why(output: Path) -> None:
    output.mkdir()
    sampler = SamplerProcess(COMMAND, output)
    assert sampler.stop(PATIENCE_S) == 1
    death = sampler.death() or ""
    assert death.startswith("the sampler ended with exit code 1: error:")
    assert "File exists" in death
    with pytest.raises(UserError, match="no such program"):
        SamplerProcess([str(output / "missing")], output)


def test_it_prints_nothing_on_stdout(output: Path) -> None:
    command = [*COMMAND, "worker", "--sampler", "--output", str(output)]
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S, check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, b"", b"")
    assert PartReader(output).read().loads


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output", "x", "--interval-ms", "5"), "--interval-ms 5: expected 0, or between 10 and 60000"),
        ((), "worker --sampler needs --output"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    command = [*COMMAND, "worker", "--sampler", *words]
    finished = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S, check=False, cwd=tmp_path
    )
    assert finished.returncode == 2
    assert message in finished.stderr
    assert list(tmp_path.iterdir()) == []


# Waiting


def test_a_log_is_ready_with_its_header(output: Path) -> None:
    clock = FakeClock(now_ns=0)
    assert not wait_until_ready(output, NS_PER_S, clock)
    assert clock.now_ns >= NS_PER_S
    output.write_text('{"schema_version":1,')
    assert not wait_until_ready(output, 2 * NS_PER_S, clock)
    output.write_text('{"schema_version":1}\n')
    assert wait_until_ready(output, 0, clock)
