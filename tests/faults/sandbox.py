"""A small campaign in a folder of its own, run as a person would, and what is left of it afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lem.base.errors import UserError
from lem.meters.requestlog import REQUESTS_FILENAME, RequestLogError, read_requests
from lem.meters.samples import FINISHED_FILENAME, SampleLogError, read_finished
from lem.orchestration.manifest import ManifestManager
from lem.record import RecordError, read_record
from tests.doubles import fault_injector, wall_clock
from tests.doubles.fault_injector import Fault, process_of, without_interpreter
from tests.faults.scenarios import Tools
from tests.processes import VARIABLE, Marker, parent_of
from tests.warm import WarmProcess

ROOT = Path(__file__).resolve().parents[2]

RUN_TIMEOUT_S = 120
# A supervisor whose host was killed ends its engine: TERM, grace, KILL.
END_TIMEOUT_S = 30
_JOURNAL = "journal"
_COUNTS = ("n", "n_prompts")  # in a distribution, beside the seconds

# Root may write to what is read-only, which nobody else may; without that right it is an owner like others.
AS_OTHERS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")


@dataclass(frozen=True)
class Outcome:
    """What a folder holds after a run."""

    statuses: tuple[str, ...]  # of the manifest's entries; () without a whole manifest
    results: Mapping[str, bytes]  # whole results by their path in the folder, with their bytes
    partial: tuple[str, ...]  # results, and the manifest, where they are there and not whole
    duplicates: tuple[str, ...]  # experiments with more than one valid result
    durations_s: tuple[float, ...]  # every duration that the results tell

    def costs_since(self, before: Outcome) -> dict[str, int]:
        """What a fault has cost between two outcomes, as far as files tell it."""
        return {
            "lost": sum(self.results.get(name) != data for name, data in before.results.items()),
            "partial": len(before.partial) + len(self.partial),
            "duplicates": len(self.duplicates),
        }


def look_at(folder: Path, campaign: str) -> Outcome:
    results: dict[str, bytes] = {}
    partial: list[str] = []
    experiments: Counter[str] = Counter()
    durations_s: list[float] = []
    for path in sorted((folder / "results").rglob("result.json")):
        name = str(path.relative_to(folder))
        try:
            record = read_record(path)
            # One that is not valid is measured once more, and both stay.
            experiments[record.identity.experiment_id] += record.validity.valid
            durations_s += _durations_s(dataclasses.asdict(record))
            results[name] = path.read_bytes()
        except RecordError:
            partial.append(name)
    statuses: tuple[str, ...] = ()
    manifest_path = folder / ".state" / campaign / "campaign_manifest.json"
    try:
        manifest = ManifestManager(manifest_path).load_strict()
        statuses = tuple(entry.status for entry in manifest.experiments) if manifest else ()
    except UserError:
        partial.append(str(manifest_path))
    duplicates = tuple(sorted(name for name, count in experiments.items() if count > 1))
    for name, is_whole in ((FINISHED_FILENAME, _is_whole_log), (REQUESTS_FILENAME, _is_whole_request_log)):
        partial += [str(path) for path in (folder / "results").rglob(name) if not is_whole(path)]
    return Outcome(statuses, results, tuple(partial), duplicates, tuple(durations_s))


def copy_program(folder: Path) -> Tools:
    """A copy of lem and of the doubles: hundreds of runs are one program, whatever is edited meanwhile."""
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lem", folder / "lem", ignore=leave_out)
    shutil.copytree(ROOT / "tests" / "doubles", folder / "doubles", ignore=leave_out)
    return Tools(folder, wall_clock.build_library(folder))


class Setting(Protocol):
    """What is tried: `scenarios.Scenario` or `commands.Command`."""

    @property
    def name(self) -> str:
        """For the table."""

    @property
    def options(self) -> tuple[str, ...]:
        """Of `lem campaign`."""

    def prepare(self, work: Path, rig: Path, tools: Tools) -> dict[str, str]:
        """Write what lem needs into `work`, and what the doubles need into `rig`; the environment of every process."""


class Sandbox:
    """One campaign in `folder`, where nothing but what lem writes is changed."""

    def __init__(self, folder: Path, tools: Tools, setting: Setting) -> None:
        """Write the campaign; `tools` is what `copy_program` made."""
        self.folder, self._rig = folder / "work", folder
        self.setting = setting
        self.marker = Marker()
        self._program = tools.program
        self.folder.mkdir(parents=True, exist_ok=True)
        self._environ = setting.prepare(self.folder, self._rig, tools)

    @property
    def journal(self) -> Path:
        return self._rig / _JOURNAL

    @property
    def output(self) -> Path:
        return self._rig / "output"

    def fault(self, process: str = "", event: str = "", nth: int = 0, action: str = "") -> Fault:
        """That fault here; without arguments, only the journal is kept."""
        return Fault(str(self.journal), process, event, nth, action, root=str(self.folder.resolve()))

    def start(self, *options: str, fault: Fault | None = None, is_warm: bool = True) -> Started:
        """The campaign, started; its output goes to a file."""
        command = ["campaign", "faults.yaml", "--yes", "--executor", "local", *self.setting.options, *options]
        return self.start_lem(*command, fault=fault, is_warm=is_warm)

    def start_lem(self, *words: str, fault: Fault | None = None, is_warm: bool = True) -> Started:
        """A command of lem, started; its output goes to a file.

        Without `is_warm` every process of it is a Python of its own, which takes several times as long.
        """
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("LEM")},
            "PYTHONPATH": os.pathsep.join([str(self._program), str(self._program / "doubles")]),
            "LEM_LOCK_DIR": str(self.folder / "locks"),
            "LEM_CACHE_DIR": str(self.folder / "cache"),
            "PYTHONDONTWRITEBYTECODE": "",  # compiling lem anew would be most of what a run takes
            **self._environ,
            VARIABLE: self.marker.value,
        }
        command = [sys.executable, "-m", "lem", *words]
        if fault is not None:
            environ[fault_injector.VARIABLE] = fault.to_json()
        with open(self.output, "ab") as output:
            output.write(f"$ {' '.join(words)} {fault}\n".encode())
            output.flush()
            is_as_others = fault is not None and fault.action == "readonly" and os.geteuid() == 0
            if is_warm:
                process: subprocess.Popen[bytes] | WarmProcess = WarmProcess(
                    words,
                    self.folder,
                    environ,
                    (self.output, self.output),
                    program=self._program,
                    doubles=self._program / "doubles",
                    is_as_others=is_as_others,
                )
                return Started(process, self)
            command = [*(AS_OTHERS if is_as_others else ()), *command]
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return Started(process, self)

    def make_writable(self) -> None:
        """Take back what a fault did to the folders."""
        for folder, _, _ in os.walk(self.folder):
            Path(folder).chmod(0o755)

    def run(self, *options: str, fault: Fault | None = None) -> int:
        return self.start(*options, fault=fault).wait()

    def processes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        engines: set[int] = set()
        for pid in sorted(self.marker.pids()):
            # One that ends while it is looked at is not alive.
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if words == [""]:
                    continue
                kind = process_of(without_interpreter(words))
                if kind == "engine":
                    engines.add(pid)
                    kind = "engine" if parent_of(pid) in engines else "guardian"
                found[kind] = pid
        return found

    def processes_left(self, timeout_s: float = END_TIMEOUT_S) -> int:
        """How many processes are alive once they have had the time to end by themselves; those are killed."""
        left = self.marker.survivors(timeout_s)
        self.marker.kill()
        return len(left)

    @property
    def bugs(self) -> int:
        """How many commands reported a bug of lem, or printed a traceback."""
        text = self.output.read_text(encoding="utf-8", errors="replace")
        return len(re.findall(r"^(?:.*\x1b\[[0-9;]*m)?bug: |^Traceback ", text, re.MULTILINE))

    def look(self) -> Outcome:
        return look_at(self.folder, "faults")


@dataclass(frozen=True)
class Started:
    process: subprocess.Popen[bytes] | WarmProcess
    sandbox: Sandbox

    def wait(self, timeout_s: float = RUN_TIMEOUT_S) -> int:
        """The exit code; a run that does not end is killed and counts as one that hangs."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            self.process.wait()
            self.sandbox.processes_left(0)
            raise TimeoutError(f"{self.sandbox.folder}: the campaign hangs") from error

    def has_ended_within(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode is not None


def _is_whole_log(path: Path) -> bool:
    try:
        read_finished(path)
    except SampleLogError:
        return False
    return True


def _is_whole_request_log(path: Path) -> bool:
    try:
        read_requests(path)
    except RequestLogError:
        return False
    return True


def _durations_s(section: Mapping[str, Any]) -> Iterator[float]:
    """Every number of a record that counts seconds."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            is_distribution = name.endswith("_s")
            named = {f"{key}_s" if is_distribution else key: item for key, item in value.items() if key not in _COUNTS}
            yield from _durations_s(named)
        elif isinstance(value, (list, tuple)):
            yield from (found for item in value if isinstance(item, Mapping) for found in _durations_s(item))
        elif name.endswith("_s") and not name.endswith("per_s") and isinstance(value, (int, float)):
            yield float(value)
