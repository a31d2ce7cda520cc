"""A small campaign in a folder of its own, run as a person would, and what is left of it afterwards."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lem.errors import UserError
from lem.orchestration.manifest import ManifestManager
from lem.record import RecordError, read_record
from tests.doubles.fault_injector import VARIABLE, Fault, process_of

__all__ = ["CAMPAIGN", "EXPERIMENTS", "Outcome", "Sandbox", "Started", "copy_program"]

ROOT = Path(__file__).resolve().parents[2]

# A mark in the environment is inherited by everything a run starts, whatever session or group it moves to.
MARK = "LEMTEST_SANDBOX"
RUN_TIMEOUT_S = 120
# A supervisor whose host was killed ends its engine: TERM, grace, KILL.
END_TIMEOUT_S = 30
CYCLES, CONFIGURATIONS = 2, 2
EXPERIMENTS = CYCLES * CONFIGURATIONS

MANIFEST = ".state/faults/campaign_manifest.json"

# The least that passes through every kind of write and transition. The trivial engine generates at once.
CAMPAIGN = f"""\
campaign_name: faults
model: trivial
grid:
  backends: [pytorch]
  shared:
    max_output_tokens: [4, 8]
    warmup.enabled: [false]
    measurement.min_window_sec: [0.02]
    prompts: [{{type: file, path: prompts.txt}}]
    gpus: [[]]
execution: {{cycles: {CYCLES}, config_gap_seconds: 0, cycle_gap_seconds: 0}}
"""


@dataclass(frozen=True)
class Outcome:
    """What a folder holds after a run.

    Attributes:
        statuses: of the manifest's entries; () without a whole manifest.
        results: whole results by their path in the folder, with their bytes.
        partial: results, and the manifest, where they are there and not whole.
        duplicates: experiments with more than one whole result.
    """

    statuses: tuple[str, ...]
    results: Mapping[str, bytes]
    partial: tuple[str, ...]
    duplicates: tuple[str, ...]


def copy_program(folder: Path) -> Path:
    """A copy of lem and of the trivial engine: hundreds of runs are one program, whatever is edited meanwhile."""
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lem", folder / "lem", ignore=leave_out)
    shutil.copytree(ROOT / "tests" / "doubles", folder / "doubles", ignore=leave_out)
    return folder


class Sandbox:
    """One campaign and its folder."""

    def __init__(self, folder: Path, program: Path) -> None:
        """Write the campaign; `program` is what `copy_program` made."""
        self.folder = folder
        self.program = program
        self.mark = uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prompts.txt").write_text("one two three\nfour five\n", encoding="utf-8")
        (folder / "faults.yaml").write_text(CAMPAIGN, encoding="utf-8")

    @property
    def journal(self) -> Path:
        """The journal of the faulted run."""
        return self.folder / "journal"

    def start(self, *options: str, fault: Fault | None = None) -> Started:
        """The campaign, started; its output goes to a file."""
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("LEM")},
            "PYTHONPATH": os.pathsep.join([str(self.program), str(self.program / "doubles")]),
            "LEM_LOCK_DIR": str(self.folder / "locks"),
            "PYTHONDONTWRITEBYTECODE": "",  # compiling lem anew would be most of what a run takes
            MARK: self.mark,
        }
        if fault is not None:
            environ[VARIABLE] = fault.to_json()
        command = [sys.executable, "-m", "lem", "campaign", "faults.yaml", "--yes", "--executor", "local", *options]
        with open(self.folder / "output", "ab") as output:
            output.write(f"$ {' '.join(options)} {fault}\n".encode())
            output.flush()
            process = subprocess.Popen(
                command, cwd=self.folder, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        return Started(process, self)

    def run(self, *options: str, fault: Fault | None = None) -> int:
        """The exit code of the campaign, negative for a signal."""
        return self.start(*options, fault=fault).wait()

    def processes(self) -> dict[str, int]:
        """Pids of living processes of this sandbox: host, supervisor, engine, guardian (the engine's parent)."""
        found: dict[str, int] = {}
        engines: set[int] = set()
        for pid, argv in sorted(self._living()):
            kind = process_of(argv)
            if kind == "engine":
                engines.add(pid)
                kind = "engine" if _parent(pid) in engines else "guardian"
            found[kind] = pid
        return found

    def processes_left(self, timeout_s: float = END_TIMEOUT_S) -> int:
        """How many processes are alive once they have had the time to end by themselves; those are killed."""
        deadline = time.monotonic() + timeout_s
        for pid, _ in self._living():
            _wait_for_end(pid, deadline - time.monotonic())
        left = [pid for pid, _ in self._living()]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(left)

    def look(self) -> Outcome:
        """What the folder holds, read by the program's own codecs."""
        results: dict[str, bytes] = {}
        partial: list[str] = []
        experiments: Counter[str] = Counter()
        for path in sorted((self.folder / "results").rglob("result.json")):
            name = str(path.relative_to(self.folder))
            try:
                experiments[read_record(path).identity.experiment_id] += 1
                results[name] = path.read_bytes()
            except RecordError:
                partial.append(name)
        statuses: tuple[str, ...] = ()
        try:
            manifest = ManifestManager(self.folder / MANIFEST).load_strict()
            statuses = tuple(entry.status for entry in manifest.experiments) if manifest else ()
        except UserError:
            partial.append(MANIFEST)
        duplicates = tuple(sorted(name for name, count in experiments.items() if count > 1))
        return Outcome(statuses, results, tuple(partial), duplicates)

    def _living(self) -> Iterator[tuple[int, list[str]]]:
        """Pid and command line (without the interpreter) of every process that carries the mark, zombies left out."""
        wanted = f"{MARK}={self.mark}".encode()
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            # A process that ends while it is read is not alive.
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    if words != [""]:
                        yield int(folder.name), _without_interpreter(words)


@dataclass(frozen=True)
class Started:
    """A running campaign."""

    process: subprocess.Popen[bytes]
    sandbox: Sandbox

    def wait(self, timeout_s: float = RUN_TIMEOUT_S) -> int:
        """The exit code; a run that does not end is killed and counts as one that hangs.

        Raises:
            TimeoutError: it did not end.
        """
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            self.process.wait()
            self.sandbox.processes_left(0)
            raise TimeoutError(f"{self.sandbox.folder}: the campaign hangs") from error

    def has_ended_within(self, seconds: float) -> bool:
        """Whether it ended by itself in that time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode is not None


def _without_interpreter(words: list[str]) -> list[str]:
    """`[program, argument, …]` of `python -u program argument …` or `python -m lem argument …`."""
    rest = words[1:]
    while rest and rest[0] != "-m" and rest[0].startswith("-"):
        rest = rest[1:]
    return rest[1:] if rest[:1] == ["-m"] else rest


def _parent(pid: int) -> int:
    """The pid of a process's parent; 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("PPid:"):
                return int(line.split()[1])
    return 0


def _wait_for_end(pid: int, timeout_s: float) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([descriptor], [], [], max(0.0, timeout_s))
    finally:
        os.close(descriptor)
