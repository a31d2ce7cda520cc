"""The campaign manifest."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lem.base import durable
from lem.base.clock import utc_now, utc_stamp, utc_text
from lem.base.codec import DecodeError, decode, decode_fields
from lem.base.dataclass import dataclass, field, fields
from lem.base.errors import LemError, LockedError, UserError
from lem.orchestration import journal
from lem.orchestration.journal import SCHEMA_VERSION, DamagedJournal, Journal

__all__ = ["CampaignManifest", "CampaignManifestEntry", "ManifestManager"]

PENDING, RUNNING, COMPLETED, FAILED, SKIPPED = STATUSES = ("pending", "running", "completed", "failed", "skipped")

_logger = logging.getLogger(__name__)

# The kinds of notes about an added cycle (`--until`), and about a clock that was set.
TOP_UP_NOTE, CLOCK_STEP_NOTE = "top_up", "clock_step"

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def _encode(value: Any) -> bytes:
    return durable.utf8(_ENCODER.encode(value))


@dataclass(frozen=True)
class Attempt:
    number: int  # from 1; names the folder `attempt-N`
    result_path: str | None = None  # its `result.json`; None without a whole one
    valid: bool | None = None  # as in the record; None without one
    error: str | None = None  # why there is no record
    log_path: str | None = None  # the engine's own output
    started_at: str | None = None
    completed_at: str | None = None
    host: str | None = None  # where it ran
    result_sha256: str | None = None  # of the result as it was measured; None without one, or in the first build's


class _Encoded:
    __slots__ = ("_line",)  # the entry as it was last encoded

    _line: bytes | None


@dataclass(slots=True)  # thousands are in memory
class CampaignManifestEntry(_Encoded):
    """One experiment: one configuration in one cycle. Times are UTC labels; a datetime is turned into one.

    Every value in it is immutable, so assigning a field is the one way to change it.
    """

    exp_id: str
    config_name: str
    config_path: str
    config_hash: str  # of what can change its numbers; the same in every cycle
    backend: str
    container: str | None
    cycle_index: int
    status: str = PENDING
    result_path: str | None = None  # of the result that counts
    started_at: str | None = None
    completed_at: str | None = None
    error: str | None = None
    retry_count: int = 0  # attempts beyond the first
    order_index: int = 0
    host: str | None = None
    attempts: tuple[Attempt, ...] = ()  # oldest first

    def __setattr__(self, name: str, value: Any) -> None:
        is_plain = type(value) in _PLAIN_TYPES and name in _PLAIN_NAMES
        object.__setattr__(self, name, value if is_plain else _checked(name, value))
        object.__setattr__(self, "_line", None)

    def __reduce__(self) -> tuple[Any, ...]:
        # By themselves, `copy` and `pickle` would assign `_line`.
        return type(self), tuple(getattr(self, name) for name in _ENTRY_NAMES)

    def put_attempt(self, attempt: Attempt) -> None:
        """Add an attempt, or put it in the place of the one with its number."""
        others = [item for item in self.attempts if item.number != attempt.number]
        self.attempts = tuple(sorted([*others, attempt], key=lambda item: item.number))

    def encode(self, *, is_kept: bool = False) -> bytes:
        """The entry as one line of JSON; with `is_kept`, encoded again only after a change."""
        line = self._line
        if line is None:
            values: dict[str, Any] = {name: getattr(self, name) for name in _ENTRY_NAMES}
            values["attempts"] = [vars(attempt) for attempt in self.attempts]
            line = _encode(values)
            if is_kept:
                object.__setattr__(self, "_line", line)
        return line


_ENTRY_NAMES = tuple(item.name for item in fields(CampaignManifestEntry))
# As most values of thousands of entries are.
_PLAIN_TYPES, _PLAIN_NAMES = frozenset({str, int, type(None)}), frozenset(_ENTRY_NAMES) - {"status", "attempts"}


def _checked(name: str, value: Any) -> Any:
    if name not in _ENTRY_NAMES:
        raise AttributeError(f"a manifest entry has no field {name!r}")
    if name == "status" and value not in STATUSES:
        raise ValueError(_invalid_status(value))
    if name == "attempts":
        return tuple(value)
    if isinstance(value, datetime):
        return utc_text(value)
    return str(value) if isinstance(value, Path) else value


def _invalid_status(value: Any) -> str:
    return f"invalid status {value!r}: expected one of {', '.join(STATUSES)}"


@dataclass
class CampaignManifest:
    """A campaign's experiments and how far it is. Times are UTC labels."""

    campaign_id: str
    campaign_name: str
    created_at: str
    updated_at: str
    config_hash: str  # of its configuration, names and io left out
    total_experiments: int
    experiments: list[CampaignManifestEntry] = field(default_factory=list)
    run_id: str | None = None  # names the folder of its results; kept by a resume
    shuffle_seed: int | None = None  # of `structure: shuffled`
    structure: str | None = None  # in which it was started; None by an older build (`Plan.as_by_older_build`)
    environment: dict[str, Any] = field(default_factory=dict)  # image, engine, driver and GPU UUIDs at the first load
    notes: list[dict[str, Any]] = field(default_factory=list)  # what a reader of the results must know

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = utc_text(value) if isinstance(value, datetime) else value

    @property
    def completed_count(self) -> int:
        """Experiments with a result."""
        return len(self.get_by_status(COMPLETED))

    @property
    def failed_count(self) -> int:
        """Experiments that failed."""
        return len(self.get_by_status(FAILED))

    @property
    def pending_count(self) -> int:
        """Experiments that have not started."""
        return len(self.get_by_status(PENDING))

    @property
    def is_complete(self) -> bool:
        """Every one is completed or skipped."""
        return all(entry.status in (COMPLETED, SKIPPED) for entry in self.experiments)

    @property
    def progress_fraction(self) -> float:
        """Completed over total, 0.0 of nothing."""
        return self.completed_count / self.total_experiments if self.total_experiments else 0.0

    def get_remaining(self) -> list[CampaignManifestEntry]:
        """Pending and failed experiments, in order."""
        return [entry for entry in self.experiments if entry.status in (PENDING, FAILED)]

    def get_by_status(self, status: str) -> list[CampaignManifestEntry]:
        """The experiments with that status, in order."""
        return [entry for entry in self.experiments if entry.status == status]

    def get_entry(self, exp_id: str) -> CampaignManifestEntry:
        """The entry of that name.

        Raises:
            KeyError: there is none.
        """
        places: dict[str, int] = self.__dict__.setdefault("_places", {})
        place = places.get(exp_id, len(self.experiments))
        if place >= len(self.experiments) or self.experiments[place].exp_id != exp_id:  # the list has changed
            places.clear()
            places.update((entry.exp_id, index) for index, entry in enumerate(self.experiments))
        try:
            return self.experiments[places[exp_id]]
        except KeyError:
            raise KeyError(f"campaign {self.campaign_name} has no experiment {exp_id}") from None

    def update_entry(self, exp_id: str, **fields: Any) -> CampaignManifestEntry:
        """The entry of that name, with those fields changed; in memory, `ManifestManager.save` writes it.

        Raises:
            KeyError: no such experiment.
            AttributeError: no such field; nothing is changed.
            ValueError: no such status; nothing is changed.
        """
        entry = self.get_entry(exp_id)
        checked = {name: _checked(name, value) for name, value in fields.items()}
        for name, value in checked.items():
            setattr(entry, name, value)
        return entry


_HEAD_NAMES = tuple(item.name for item in fields(CampaignManifest) if item.name != "experiments")


_AT_ONCE = 1000


def encode_manifest(manifest: CampaignManifest) -> Iterator[bytes]:
    """The snapshot in parts, as `journal.sealed` gives them."""
    return journal.sealed(lambda: _parts_of(manifest))


def _parts_of(manifest: CampaignManifest) -> Iterator[bytes]:
    head = {name: getattr(manifest, name) for name in _HEAD_NAMES}
    lines = b"".join([b"  " + _encode(name) + b": " + _encode(value) + b",\n" for name, value in head.items()])
    is_short = len(manifest.experiments) < JOURNALED_FROM  # and so encoded at every change
    yield lines + b'  "experiments": [\n'
    for begin in range(0, len(manifest.experiments), _AT_ONCE):
        entries = manifest.experiments[begin : begin + _AT_ONCE]
        yield b",\n" if begin else b""
        yield b",\n".join([b"    " + entry.encode(is_kept=is_short) for entry in entries])
    yield b"\n  ]\n}\n"


def decode_manifest(data: bytes) -> CampaignManifest:
    """The manifest that `encode_manifest`, or that of the first build, wrote; ValueError for anything else."""
    document = durable.parse_json(data)
    version = document.get("schema_version") if isinstance(document, dict) else None
    if not isinstance(version, int):
        raise ValueError("not a manifest: schema_version is missing")
    if version not in (1, SCHEMA_VERSION):
        by = "a newer lem" if version > SCHEMA_VERSION else "another lem"
        raise ValueError(f"written by {by}: expected schema_version {SCHEMA_VERSION}, got {version}")
    values = {"structure": None, **document}
    del values["schema_version"]
    if version == 1:
        _add_digests(values)
    elif values.pop("sha256", None) is None or not journal.is_intact(data):
        raise ValueError("its content does not match its checksum: it was damaged, or edited")
    entries: Any = values.get("experiments")
    head = {**values, "experiments": []} if isinstance(entries, list) else values
    manifest = decode(CampaignManifest, head, "manifest")
    for at, entry in enumerate(entries):  # in its place, so that thousands are not in memory twice
        entries[at] = _decode_entry(entry, f"manifest.experiments[{at}]")
    manifest.experiments = entries
    if len({entry.exp_id for entry in manifest.experiments}) != len(manifest.experiments):
        raise ValueError("an experiment is listed twice")
    return manifest


def _decode_entry(document: Any, where: str) -> CampaignManifestEntry:
    # Not by its constructor, which takes longer for each value than to decode it.
    entry = object.__new__(CampaignManifestEntry)
    for name, value in {**decode_fields(CampaignManifestEntry, document, where), "_line": None}.items():
        object.__setattr__(entry, name, value)
    if entry.status not in STATUSES:
        raise DecodeError(f"{where}: {_invalid_status(entry.status)}")
    return entry


def _add_digests(values: Mapping[str, Any]) -> None:
    entries = values.get("experiments")
    for entry in entries if isinstance(entries, list) else ():
        attempts = entry.get("attempts") if isinstance(entry, dict) else None
        for attempt in attempts if isinstance(attempts, list) else ():
            if isinstance(attempt, dict):
                attempt.setdefault("result_sha256", None)


# A plan with fewer entries has its snapshot rewritten at every change, since people read it.
JOURNALED_FROM = 200


class ManifestManager:
    """The manifest's files: the snapshot, and for a long plan the journal of the changes since.

    Before a changed status is written, it raises the audit event `lem.transition` (exp_id, old, new; see
    `sys.audit`), so that a test can stop the program there.
    """

    # Before a changed status is written, it raises the audit event `lem.transition` (exp_id, old, new; see
    # `sys.audit`), so that a test can stop the program there.

    def __init__(self, manifest_path: Path | str, *, now: Callable[[], datetime] = utc_now) -> None:
        self.manifest_path = Path(manifest_path)
        self._now = now
        self._journal = Journal(self.manifest_path)
        self._snapshot_b = 0
        self._saved_statuses: dict[str, str] = {}
        # The snapshots that may be on disk unless another process wrote one; None before any was read or written.
        self._own: frozenset[str] | None = None

    def exists(self) -> bool:
        """Whether there is a file, whole or not."""
        return self.manifest_path.exists()

    def create_manifest(
        self, campaign_id: str, campaign_name: str, config_hash: str, experiments: Iterable[CampaignManifestEntry]
    ) -> CampaignManifest:
        """A new manifest, not yet saved."""
        entries = list(experiments)
        now = utc_text(self._now())
        return CampaignManifest(campaign_id, campaign_name, now, now, config_hash, len(entries), entries)

    def check_config_changed(self, manifest: CampaignManifest, current_config_hash: str) -> bool:
        """Whether the campaign is another than the one in the manifest."""
        return manifest.config_hash != current_config_hash

    def save(self, manifest: CampaignManifest) -> None:
        """Write the snapshot, whole or not at all, and make its folder when there is none.

        Raises:
            OSError: as `durable.write_bytes`; the earlier manifest is still there.
            LockedError: another process has written the manifest meanwhile.
        """
        for entry in manifest.experiments:
            self._announce(entry)
        manifest.updated_at = utc_text(self._now())
        durable.make_folder(self.manifest_path.parent)
        self._check_own()
        parts = encode_manifest(manifest)
        start = next(parts)
        snapshot = journal.snapshot_of(start)
        if self._own is not None:  # a write that fails may have replaced the file or not
            self._own |= {snapshot}
        self._journal.stop()
        durable.write_parts(self.manifest_path, itertools.chain([start], parts))
        self._own, self._snapshot_b = frozenset({snapshot}), self.manifest_path.stat().st_size
        self._journal.begin(snapshot)

    def save_entry(self, manifest: CampaignManifest, entry: CampaignManifestEntry) -> None:
        """Write the change of one entry, which in a long plan takes as long as in a short one.

        Raises:
            OSError, LockedError: as `save`.
        """
        is_short = len(manifest.experiments) < JOURNALED_FROM
        if is_short or not self._journal.has_begun or self._journal.size_b > self._snapshot_b:
            self.save(manifest)
            return
        self._announce(entry)
        manifest.updated_at = utc_text(self._now())
        if not self._check_own():  # the file was removed
            self.save(manifest)
            return
        self._journal.append(b'{"at": ' + _encode(manifest.updated_at) + b', "entry": ' + entry.encode() + b"}")

    def settle(self, manifest: CampaignManifest) -> None:
        """Write the snapshot unless all changes are in it; raises as `save`."""
        if self._journal.size_b or not self._journal.has_begun:
            self.save(manifest)

    def _announce(self, entry: CampaignManifestEntry) -> None:
        before = self._saved_statuses.get(entry.exp_id, entry.status)
        self._saved_statuses[entry.exp_id] = entry.status
        if entry.status != before:
            sys.audit("lem.transition", entry.exp_id, before, entry.status)

    def _check_own(self) -> bool:
        """Whether the snapshot on disk is the one last read or written here; False when there is none."""
        # The lock keeps others out, except on a file system where locks do not work, or not between hosts.
        found = journal.find_snapshot(self.manifest_path)
        if found is not None and self._own is not None and found not in self._own:
            hint = "locks do not exclude others in this folder: choose another io.state_dir, on a local disk"
            raise LockedError(f"{self.manifest_path} was written by another process meanwhile", hint)
        return found is not None

    @contextlib.contextmanager
    def saving(self, kind: type[LemError], remedy: str) -> Iterator[None]:
        """Turn a write that fails within the block into an error of that kind."""
        try:
            yield
        except OSError as error:
            where, reason = error.filename or self.manifest_path, durable.reason_of(error)
            raise kind(f"cannot write {where}: {reason}", remedy) from error

    def load(self, campaign_id: str | None = None) -> CampaignManifest | None:
        """The manifest; None when there is none, and, with a warning in the log, when it is broken.

        Args:
            campaign_id: take another campaign's manifest for a broken one.
        """
        try:
            return self.load_strict(campaign_id)
        except UserError as error:
            _logger.warning("%s", error.message)
            return None

    def load_strict(self, campaign_id: str | None = None) -> CampaignManifest | None:
        """The manifest; None when there is none.

        Raises:
            UserError: it is unreadable, truncated, of another schema, or of another campaign than `campaign_id`.
        """
        try:
            manifest = self._read()
        except FileNotFoundError:
            self._own = frozenset()
            return None
        except OSError as error:
            raise self._unusable(f"cannot be read: {error.strerror}") from error
        except DamagedJournal as error:
            hint = f"move {self._journal.path} away, then use --resume: complete results are found again"
            raise UserError(f"the journal of {self.manifest_path} is broken: {error}", hint) from error
        except ValueError as error:
            raise self._unusable(f"is broken: {error}") from error
        if campaign_id is not None and manifest.campaign_id != campaign_id:
            raise self._unusable(f"belongs to another campaign, {manifest.campaign_name!r}")
        self._saved_statuses = {entry.exp_id: entry.status for entry in manifest.experiments}
        return manifest

    def _read(self, tries: int = 5) -> CampaignManifest:
        data = durable.read_bytes(self.manifest_path)
        manifest, snapshot = decode_manifest(data), journal.snapshot_of(data)
        changes = self._journal.read(snapshot)
        if tries > 1 and journal.find_snapshot(self.manifest_path) != snapshot:
            return self._read(tries - 1)  # its process has written another, and the journal may be that one's
        places = {entry.exp_id: place for place, entry in enumerate(manifest.experiments)} if changes else {}
        for change in changes:
            if not isinstance(change, dict) or change.keys() != {"at", "entry"}:
                raise DamagedJournal("it holds something else than changes")
            entry = _decode_entry(change["entry"], "journal")
            if entry.exp_id not in places:
                raise DamagedJournal(f"it changes {entry.exp_id}, which is not in the manifest")
            manifest.experiments[places[entry.exp_id]] = entry
            manifest.updated_at = decode(str, change["at"], "journal")
        self._own = frozenset({snapshot})
        self._journal.stop()
        return manifest

    def set_aside(self) -> Path | None:
        """Rename the manifest to make room for a fresh start; the new path, or None when there was no manifest.

        Nothing is overwritten: the new name contains the time, and a number when that name is taken. To be called
        under the campaign's lock.
        """
        self._own = frozenset()
        if not self.exists():
            return None
        if self._journal.path.exists():
            manifest = self.load()
            if manifest is not None:
                self.save(manifest)  # so that it is one file again
        stamp = utc_stamp(self._now())
        stem, suffix = self.manifest_path.stem, self.manifest_path.suffix
        numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        candidates = (self.manifest_path.with_name(f"{stem}.{stamp}{number}{suffix}") for number in numbers)
        target = next(path for path in candidates if not path.exists())
        sys.audit("lem.rename", str(target))
        self.manifest_path.rename(target)
        if self._journal.path.exists():  # of one that cannot be read
            self._journal.path.rename(Journal(target).path)
        durable.sync_folder(target.parent)
        self._own, self._saved_statuses = frozenset(), {}
        return target

    def remove_leftovers(self) -> None:
        """Remove temporary files of a process that was killed while saving; to be called under the campaign's lock."""
        for path in self.manifest_path.parent.glob(f"{durable.TEMPORARY_PREFIX}*"):
            path.unlink(missing_ok=True)

    def _unusable(self, what: str) -> UserError:
        hint = "use --fresh to set it aside and start over; results are kept"
        return UserError(f"the manifest {self.manifest_path} {what}", hint)
