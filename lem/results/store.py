"""The results folder: runs, experiments, attempts and their records."""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.base import durable
from lem.base.clock import run_time
from lem.base.dataclass import dataclass, replace
from lem.base.durable import make_folder, reason_of, remedy_for
from lem.base.errors import InfrastructureError, UserError
from lem.base.units import MIB
from lem.record import CONFIG_FILE, LOG_FILE, RESULT_FILE, Identity, Record, RecordError
from lem.results.configurations import (
    EXPERIMENT_NAME,
    HOST_MARK,
    ID_HASH_LENGTH,
    CampaignList,
    Listing,
    Reading,
    as_read,
    labels_of,
    listing_of,
    read_list,
    superseded,
)
from lem.results.index import AlteredError, Found, Index, describe_altered, record_result

_logger = logging.getLogger(__name__)

CONFIG_SCHEMA_VERSION = 1
_OPTION = "--results-dir"

# One path component that is the same on every file system, is not hidden, and leads nowhere else.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,254}")
_ATTEMPT = re.compile(r"attempt-([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class AttemptFolder:
    path: Path
    number: int  # from 1

    @property
    def result_path(self) -> Path:  # the worker writes it last
        return self.path / RESULT_FILE

    @property
    def log_path(self) -> Path:  # the engine's own output
        return self.path / LOG_FILE

    def write_config(self, requested: Mapping[str, Any], resolved: Mapping[str, Any]) -> Path:
        document = {"schema_version": CONFIG_SCHEMA_VERSION, "requested": requested, "resolved": resolved}
        with stopping_campaign(self.path / CONFIG_FILE) as path:
            durable.write_json(path, durable.seal(document))
        return path


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def check_name(text: str, what: str) -> str:
    if not is_name(text):
        hint = "use at most 255 letters, digits and . _ = + -, starting with a letter or digit"
        raise UserError(f"{what} {text[:80]!r} cannot be used as a folder name", hint)
    return text


@contextlib.contextmanager
def stopping_campaign(path: Path) -> Iterator[Path]:
    try:
        yield path
    except OSError as error:
        hint = remedy_for(error, _OPTION) + "; then continue with --resume"
        raise InfrastructureError(f"results: {path}: {reason_of(error)}", hint) from error


_PROBE_B = MIB  # room for the files of a few attempts


@dataclass(frozen=True)
class StoredResult:
    file: str
    record: Record
    sha256: str = ""  # of the bytes that the record was read from
    is_recorded: bool = False  # whether the campaign recorded that digest when the result was measured

    @property
    def path(self) -> Path:  # of thousands of results few are asked for theirs
        return Path(self.file)


@dataclass(frozen=True)
class Problem:
    """An attempt without a usable result, or a folder that cannot be read.

    Its kinds: `missing` (the attempt failed, was interrupted or is still running), `half-written` (its write was cut
    off), `corrupt` (no record of a known schema, or one that contradicts itself), `altered` (not as it was measured),
    `foreign` (the record of another experiment), `unreadable`.
    """

    path: Path  # of the file or folder
    kind: str
    message: str
    run_id: str = ""
    exp_id: str = ""  # empty where a folder above cannot be read


DigestKey = tuple[str, str, int, "str | None"]
"""Run, experiment, attempt and host of a result."""

Digests = Mapping[DigestKey, str]
"""The SHA-256 of results as they were measured."""


@dataclass(frozen=True)
class Scan:
    results: tuple[StoredResult, ...]
    problems: tuple[Problem, ...]


class Repository:
    """The results of one campaign, in `folder`: `<results_dir>/<campaign>/<run>/<experiment>/attempt-<n>`.

    Each part of a stored plan has a folder of its own in that of the run, `<run>/<part>/<experiment>/attempt-<n>`, so
    that hosts can share a file system. Results are written to `part`, and read from it; without one, from all parts.
    """

    def __init__(self, results_dir: Path, campaign: str, part: str = "") -> None:
        self.folder = results_dir / check_name(campaign, "campaign")
        self._part = part and check_name(part, "part")
        self._indexes: dict[Path, Index] = {}
        self._written: dict[str, set[str]] = {}  # by run: what its index names, as far as it was put there

    def run_folder(self, run_id: str) -> Path:
        return self.folder / check_name(run_id, "run") / self._part

    def check_writable(self) -> None:
        try:
            make_folder(self.folder)
            import tempfile

            with tempfile.TemporaryFile(dir=self.folder) as probe:  # without a name: no crash leaves it behind
                sys.audit("lem.write", str(self.folder))
                probe.write(bytes(_PROBE_B))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise UserError(f"results folder {self.folder}: {reason_of(error)}", remedy_for(error, _OPTION)) from error

    def prepare_attempt(self, run_id: str, exp_id: str) -> AttemptFolder:
        with stopping_campaign(self.run_folder(run_id) / check_name(exp_id, "experiment")) as folder:
            make_folder(folder)
            number = max(_attempt_numbers(folder), default=0)
            while True:
                number += 1
                path = folder / f"attempt-{number}"
                with contextlib.suppress(FileExistsError):  # another process was quicker
                    path.mkdir()
                    durable.sync_folder(folder)
                    return AttemptFolder(path, number)

    def find_attempts(self, run_id: str, exp_id: str) -> tuple[StoredResult, ...]:
        return self.check(run_id, exp_id).results

    def check(self, run_id: str, exp_id: str) -> Scan:
        found: list[StoredResult | Problem] = []
        for folder in part_folders(self.run_folder(run_id)):
            if folder not in self._indexes:
                self._indexes[folder] = Index(folder)
            read = functools.partial(self._indexes[folder].read, is_checked=True)
            found += _experiment_items(check_name(exp_id, "experiment"), folder, run_id, read)
        results = tuple(item for item in found if isinstance(item, StoredResult))
        return Scan(results, tuple(item for item in found if isinstance(item, Problem)))

    def find_campaign_name(self) -> str | None:
        found = _nested(self.folder, lambda name: _run_items(self.folder / name, name, is_checked=False))
        return next((item.record.identity.campaign_name for item in found if isinstance(item, StoredResult)), None)

    def record_result(self, run_id: str, result: StoredResult) -> None:
        written = self._written.setdefault(run_id, set())
        try:
            record_result(self.run_folder(run_id), result.path, result.record, result.sha256, written)
        except OSError as error:
            _logger.warning("%s: %s is not in the index: %s", self.run_folder(run_id), result.path, reason_of(error))

    def scan(
        self,
        run_id: str | None = None,
        *,
        is_checked: bool = False,
        digests: Digests | None = None,
        reading: Reading | None = None,
        lists: Callable[[Path], CampaignList | None] | None = None,
    ) -> Scan:
        """Everything in the campaign's folder, or in one run of it; damage is a value and never raised."""
        # Each result is taken from the index of its run while its file has the same size, time and inode. With
        # `is_checked`, its digest must be the same, too. A result that has none of the `digests` is altered. Each
        # configuration has its current label. Without a `reading`, everything else is as recorded.
        if run_id is None:
            found = list(_nested(self.folder, lambda it: _run_items(self.folder / it, it, is_checked=is_checked)))
        else:
            found = list(_run_items(self.run_folder(run_id), run_id, is_checked=is_checked))
        if digests:
            found = [_compared(item, digests) if isinstance(item, StoredResult) else item for item in found]
        results = self._labelled(
            [item for item in found if isinstance(item, StoredResult)], reading, lists or functools.cache(read_list)
        )
        return Scan(results, tuple(item for item in found if isinstance(item, Problem)))

    def _labelled(
        self,
        results: Sequence[StoredResult],
        reading: Reading | None,
        lists: Callable[[Path], CampaignList | None],
    ) -> tuple[StoredResult, ...]:
        results = _with_nodes(results)
        runs: dict[str, list[Identity]] = {}
        for item in results:
            runs.setdefault(item.record.identity.run_id, []).append(item.record.identity)
        listings = {run_id: listing_of(lists(self.run_folder(run_id))) for run_id in runs}
        folders = {_above(item.file, 3) for item in results}
        again = {f"{folder}/{name}" for folder in folders for name in getattr(lists(Path(folder)), "superseded", ())}
        results = [item for item in results if _above(item.file, 1) not in again] if again else results
        nodes = set(map(operator.attrgetter("record.identity.host", "record.identity.node"), results))
        left_out = superseded((_above(item.file, 2), item.record.identity) for item in results if len(nodes) > 1)
        if left_out:
            results = [item for item in results if item.record.identity.key not in left_out]
            runs = {run_id: [item for item in every if item.key not in left_out] for run_id, every in runs.items()}
        labels = {run_id: labels_of(identities, listings[run_id]) for run_id, identities in runs.items()}
        found = []
        for item in results:
            identity, record = item.record.identity, item.record
            label = labels[identity.run_id][identity.config_hash, identity.machine]
            if label != identity.config_name:
                record = record.with_sections(identity=replace(identity, config_name=label))
            if reading is not None:
                listed = (listings[identity.run_id] or {}).get(identity.config_hash)
                record = as_read(item.file, record, listed, reading)
            found.append(item if record is item.record else replace(item, record=record))
        return tuple(found)


def _above(file: str, levels: int) -> str:
    """The folder so many levels above, without making one object for each."""
    return file.rsplit(os.sep, levels)[0]


def _with_nodes(results: Sequence[StoredResult]) -> list[StoredResult]:
    """Results of an older build, which names no node, are taken to be of the first that a later one names."""
    first: dict[tuple[str, str], str] = {}
    nodes = set(map(operator.attrgetter("record.identity.node"), results))
    if "" not in nodes or len(nodes) == 1:
        return list(results)
    for identity in sorted((item.record.identity for item in results), key=lambda item: item.start_utc):
        if identity.node:
            first.setdefault((identity.run_id, identity.host), identity.node)
    found = []
    for item in results:
        identity = item.record.identity
        node = identity.node or first.get((identity.run_id, identity.host), "")
        if node != identity.node:
            record = item.record.with_sections(identity=replace(identity, node=node))
            item = replace(item, record=record)
        found.append(item)
    return found


digest_key: Callable[[Identity], DigestKey] = operator.attrgetter("run_id", "experiment_id", "attempt", "host")


def _compared(result: StoredResult, digests: Digests) -> StoredResult | Problem:
    identity = result.record.identity
    recorded = digests.get(digest_key(identity))
    if recorded is None or recorded == result.sha256:
        return result
    text = describe_altered(result.sha256, recorded)
    return Problem(result.path, "altered", text, identity.run_id, identity.experiment_id)


def experiment_folder_name(exp_id: str, host: str) -> str:
    return check_name(f"{exp_id}{HOST_MARK}{host}", "host")


def count_failed(scan: Scan, listing: Listing | None = None) -> dict[str, int]:
    if not scan.problems:
        return {}
    identities = [item.record.identity for item in scan.results]
    whole = {(identity.run_id, identity.experiment_id) for identity in identities}
    names = {configuration_of(identity.experiment_id): identity.config_name for identity in identities}
    listed = {digest[:ID_HASH_LENGTH]: item.config_name for digest, item in (listing or {}).items()}
    failed: dict[tuple[str, str], str] = {}
    for problem in scan.problems:
        key, configuration = (problem.run_id, problem.exp_id), configuration_of(problem.exp_id)
        is_removed = listing is not None and configuration not in listed
        if problem.exp_id and key not in whole and key not in failed and not is_removed:
            name = names.get(configuration) or listed.get(configuration) or config_of_problem(problem)[0]
            failed[key] = name or configuration
    return dict(collections.Counter(failed.values()))


def configuration_of(exp_id: str) -> str:
    return exp_id.rpartition("-c")[0] or exp_id


def config_of_problem(problem: Problem) -> tuple[str | None, Mapping[str, Any] | None]:
    folder = problem.path if problem.path.is_dir() else problem.path.parent
    try:
        found = durable.read_sealed(folder / CONFIG_FILE)
    except (OSError, ValueError):
        return None, None
    resolved, requested = found.get("resolved"), found.get("requested")
    name = resolved.get("config_name") if isinstance(resolved, dict) else None
    return name if isinstance(name, str) else None, requested if isinstance(requested, dict) else None


def _nested(
    folder: Path,
    read: Callable[[str], Iterator[StoredResult | Problem]],
    listed: Callable[[Path], tuple[str, ...]] | None = None,
) -> Iterator[StoredResult | Problem]:
    try:
        names = (listed or _folder_names)(folder)
    except OSError as error:
        yield Problem(folder, "unreadable", reason_of(error))
        return
    for name in names:
        yield from read(name)


def _run_items(folder: Path, run_id: str, *, is_checked: bool) -> Iterator[StoredResult | Problem]:
    listed = functools.cache(_folder_names)
    for part in part_folders(folder, listed):
        index = Index(part)
        read = functools.partial(index.read, is_checked=is_checked)
        yield from _nested(part, functools.partial(_experiment_items, part=part, run_id=run_id, read=read), listed)
        index.write()


def is_part(folder: Path) -> bool:
    if EXPERIMENT_NAME.fullmatch(folder.name) is not None:
        return False
    try:
        return not _attempt_numbers(folder)
    except OSError:
        return False


def part_folders(run_folder: Path, listed: Callable[[Path], tuple[str, ...]] | None = None) -> list[Path]:
    try:
        others = [name for name in (listed or _folder_names)(run_folder) if EXPERIMENT_NAME.fullmatch(name) is None]
        return [run_folder, *(path for name in others if is_part(path := run_folder / name))]
    except OSError:
        return [run_folder]


_Reader = Callable[[str], Found]


def _experiment_items(name: str, part: Path, run_id: str, read: _Reader) -> Iterator[StoredResult | Problem]:
    folder = f"{part}/{name}"  # no `Path`, which takes longer than all the rest for thousands of results
    try:
        numbers = sorted(_attempt_numbers(folder))
    except FileNotFoundError:
        return
    except OSError as error:
        yield _problem(name, run_id, Path(folder), "unreadable", reason_of(error))
        return
    for number in numbers:
        yield _read_attempt(folder, name, run_id, number, read)


def _read_attempt(folder: str, name: str, run_id: str, number: int, read: _Reader) -> StoredResult | Problem:
    place = f"attempt-{number}/{RESULT_FILE}"
    file = f"{folder}/{place}"
    try:
        found = read(f"{name}/{place}")
    except FileNotFoundError:
        return _describe_missing(name, run_id, Path(file).parent)
    except OSError as error:
        return _problem(name, run_id, Path(file), "unreadable", reason_of(error))
    except AlteredError as error:
        return _problem(name, run_id, Path(file), "altered", str(error))
    except RecordError as error:
        return _problem(name, run_id, Path(file), "corrupt", str(error))
    identity, exp_id = found.record.identity, name.partition(HOST_MARK)[0]
    if (run_id, exp_id, number) == (identity.run_id, identity.experiment_id, identity.attempt):
        return StoredResult(file, *found)
    facts: tuple[tuple[str, object, object], ...] = (
        ("run", run_id, identity.run_id),
        ("experiment", exp_id, identity.experiment_id),
        ("attempt", number, identity.attempt),
    )
    strange = [f"expected {what} {it}, got {str(named)!r:.80}" for what, it, named in facts if named != it]
    return _problem(name, run_id, Path(file), "foreign", ", ".join(strange))


def _describe_missing(name: str, run_id: str, attempt: Path) -> Problem:
    try:
        is_cut_off = any(item.name.startswith(durable.TEMPORARY_PREFIX) for item in attempt.iterdir())
    except OSError as error:
        return _problem(name, run_id, attempt, "unreadable", reason_of(error))
    kind, why = "missing", "the attempt failed, was interrupted, or is still running"
    if is_cut_off:
        kind, why = "half-written", "writing was cut off"
    return _problem(name, run_id, attempt, kind, f"no {RESULT_FILE}: {why}")


def _problem(experiment: str, run_id: str, path: Path, kind: str, message: str) -> Problem:
    return Problem(path, kind, message, run_id, experiment.partition(HOST_MARK)[0])


def _attempt_numbers(folder: Path | str) -> list[int]:
    names = os.listdir(folder)  # noqa: PTH208 - quick
    return [int(match[1]) for name in names if (match := _ATTEMPT.fullmatch(name))]


def experiment_names(run_folder: Path) -> tuple[str, ...]:
    folders = part_folders(run_folder)
    parts = {folder.name for folder in folders[1:]}
    return tuple(sorted({name for folder in folders for name in folder_names(folder)} - parts))


def folder_names(folder: Path) -> tuple[str, ...]:
    try:
        return _folder_names(folder)
    except OSError as error:
        raise UserError(f"results folder {folder}: {reason_of(error)}", remedy_for(error, _OPTION)) from error


def _folder_names(folder: Path) -> tuple[str, ...]:
    try:
        with os.scandir(folder) as items:
            return tuple(sorted(item.name for item in items if is_name(item.name) and item.is_dir()))
    except FileNotFoundError:
        return ()


def in_order(run_ids: Iterable[str]) -> list[str]:
    """The runs, the last one last; IDs only grow, whatever the clock did. Names that lem did not give come first."""
    return sorted(run_ids, key=lambda name: (run_time(name) is not None, name))
