"""The settings of GPUs that experiments ask for: checked before a run, held during an attempt, restored after it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from lem.base import process
from lem.base.clock import utc_now, utc_text
from lem.base.dataclass import dataclass
from lem.base.doc import printable
from lem.base.errors import EngineError, LemError
from lem.config.experiment import ExperimentConfig
from lem.meters.control import ControlError, Note, find_notes, find_obstacle, note_path, read_note, restore
from lem.meters.machine import GpuFacts, named_gpus, visible_gpus
from lem.meters.nvml import find_gpus, open_nvml
from lem.orchestration.locks import Holder, default_gpu_lock_folder, gpu_locks, hold_locks, owner_of
from lem.orchestration.served import find_server

_logger = logging.getLogger(__name__)

_START_S, _RESTORE_S = 30.0, 15.0


def gpus_to_set(config: ExperimentConfig, environ: Mapping[str, str]) -> tuple[GpuFacts, ...]:
    return named_gpus(config.gpus, visible_gpus(find_gpus(), environ)) if config.gpu.changed() else ()


def find_problems(config: ExperimentConfig, environ: Mapping[str, str], *, may_set: bool) -> Iterator[ControlError]:
    """Why the settings of an experiment cannot be made; with `may_set`, which tries what changes nothing."""
    if not config.gpu.changed():
        return
    _, elsewhere = find_server(config, environ)
    with open_nvml() as nvml:
        gpus = gpus_to_set(config, environ)
        if elsewhere is not None or isinstance(nvml, str) or not gpus:
            why = elsewhere or (nvml if isinstance(nvml, str) else "no GPU here has the names in gpus")
            hint = "run lem on the machine with the GPU, or remove the option; lem gpus lists the GPUs"
            yield ControlError(f"{_options_of(config)}: {why}", hint)
            return
        for gpu in gpus:
            if (problem := find_obstacle(nvml, gpu.uuid, config.gpu, may_set=may_set)) is not None:
                yield problem


def _options_of(config: ExperimentConfig) -> str:
    return " and ".join(f"gpu.{name}" for name in config.gpu.changed())


@dataclass
class GpuControl:
    """Holds settings for the attempts of a run."""

    command: Sequence[str]  # runs this lem
    environ: Mapping[str, str]
    campaign: str
    locks: Sequence[int] = ()  # descriptors of the GPUs' locks, which the holder keeps until it has restored

    @contextlib.contextmanager
    def holding(self, config: ExperimentConfig) -> Iterator[None]:
        """The settings are in force within the block; EngineError where they cannot be made."""
        if not config.gpu.changed():
            yield
            return
        uuids = [gpu.uuid for gpu in gpus_to_set(config, self.environ)]
        if not uuids:  # since the preflight, which saw some
            text = f"{_options_of(config)}: no GPU here has the names in gpus any more"
            raise EngineError(text, "see lem gpus and the kernel log (dmesg)", kind="settings")
        folder = default_gpu_lock_folder(self.environ)
        words = [*self.command, "worker", "--hold", str(folder), f"--campaign={printable(self.campaign[:200])}"]
        words += ["--settings", json.dumps(config.gpu.to_dict())]
        words += [word for uuid in uuids for word in ("--gpu", uuid)]
        held = _Held(words, [note_path(folder, uuid) for uuid in uuids], self.locks)
        try:
            held.wait_until_set()
            yield
        finally:
            held.release()


class _Held:
    """The process that holds settings. A thread waits for its end, and restores what it left."""

    def __init__(self, words: Sequence[str], notes: Sequence[Path], locks: Sequence[int]) -> None:
        self._notes = notes
        self._answer, self._is_over = b"", False
        self._answered = threading.Event()
        self._child = process.spawn(words, streams=(process.PIPE, process.PIPE, process.DEVNULL), pass_fds=locks)
        self._stdin, self._stdout = process.pipes(self._child)
        self._thread = threading.Thread(target=self._watch, name="settings of GPUs", daemon=True)
        self._thread.start()

    def wait_until_set(self) -> None:
        self._answered.wait(_START_S)
        try:
            answer = json.loads(self._answer)
        except ValueError as error:
            text = "the process that sets the GPUs gave no answer"
            raise EngineError(text, "see lem doctor", kind="settings") from error
        if not answer["held"]:
            raise EngineError(answer["message"], answer["hint"], kind="settings", is_permanent=True)

    def release(self) -> None:
        self._is_over = True
        self._stdin.close()
        try:
            self._child.wait(_RESTORE_S)
        except process.TimeoutExpired:  # it hangs in the driver
            process.kill_group(self._child.pid)
        self._thread.join()

    def _watch(self) -> None:
        while data := os.read(self._stdout.fileno(), 4096):
            self._answer += data
            if data.endswith(b"\n"):
                self._answered.set()
        code = self._child.wait()
        self._answered.set()
        if not self._is_over and code != 0:
            how = process.describe_exit(code)
            _logger.warning("the process that holds the settings of GPUs %s: restoring them", how)
        for path in self._notes:
            try:
                restore(path)
            except (ControlError, OSError) as error:  # noqa: PERF203 (each one is restored)
                _logger.warning("%s; lem doctor --restore tries it again", error)
        self._stdout.close()


@dataclass(frozen=True)
class Left:
    """Settings that a run which was killed left in force."""

    path: Path  # of their note
    what: str  # in words
    error: LemError | None = None  # why they are not restored; None: they are


def restore_left(environ: Mapping[str, str], held: Collection[str] = ()) -> Iterator[Left]:
    """Restore what runs left, but not what one that still runs holds; `held` are GPUs that this process has locked."""
    folder = default_gpu_lock_folder(environ)
    holder = Holder(os.getpid(), socket.gethostname(), "lem doctor --restore", utc_text(utc_now()))
    for path in find_notes(folder):
        what = path.name
        try:
            note = read_note(path)
            what = what if note is None else describe(note)
            locks = gpu_locks([note.uuid] if note is not None and note.uuid not in held else [], environ)
            with hold_locks(locks, holder):
                found = restore(path)
        except (LemError, OSError) as error:
            yield Left(path, what, error if isinstance(error, LemError) else ControlError(f"{path}: {error}"))
        else:
            if found is not None:  # else it is of another boot
                yield Left(path, what)


def describe(note: Note) -> str:
    parts = [] if note.power_limit_w is None else [f"power limit {note.power_limit_w:g} W"]
    parts += ["clock unlocked"] if note.is_clock_locked else []
    return f"{note.uuid}: {', '.join(parts)}, as before campaign {printable(note.campaign)}"


def left_by_others(environ: Mapping[str, str]) -> Iterator[str]:
    for path in find_notes(default_gpu_lock_folder(environ), of_others=True):
        yield f"{path} was left by user {owner_of(path)}: run lem doctor --restore as that user"
