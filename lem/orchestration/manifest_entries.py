"""What a manifest holds: a campaign's experiments, and the attempts at each."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lem import durable
from lem.clock import utc_text

__all__ = [
    "COMPLETED",
    "FAILED",
    "PENDING",
    "RUNNING",
    "SKIPPED",
    "STATUSES",
    "TOP_UP_NOTE",
    "Attempt",
    "CampaignManifest",
    "CampaignManifestEntry",
    "encode_json",
]

PENDING, RUNNING, COMPLETED, FAILED, SKIPPED = STATUSES = ("pending", "running", "completed", "failed", "skipped")

# The kind of a note that tells of cycles added (`lem.orchestration.topup`).
TOP_UP_NOTE = "top_up"

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def encode_json(value: Any) -> bytes:
    """The value as one line of JSON in UTF-8."""
    return durable.utf8(_ENCODER.encode(value))


@dataclass(frozen=True)
class Attempt:
    """One try at an experiment.

    Attributes:
        number: from 1; names the folder `attempt-N`.
        result_path: its `result.json`; None without a whole one.
        valid: what the record says; None without one.
        error: why there is no record.
        log_path: what the engine printed.
        host: where it ran.
    """

    number: int
    result_path: str | None = None
    valid: bool | None = None
    error: str | None = None
    log_path: str | None = None
    started_at: str | None = None
    completed_at: str | None = None
    host: str | None = None


@dataclass
class CampaignManifestEntry:
    """One experiment: one configuration in one cycle. Times are UTC labels; a datetime is turned into one.

    Every value in it is immutable, so assigning a field is the one way to change it.

    Attributes:
        exp_id: unique in the manifest.
        config_hash: hash of what can change its numbers; the same in every cycle.
        result_path: the result that counts; None until there is one.
        retry_count: attempts beyond the first.
        attempts: all of them, oldest first.
    """

    exp_id: str
    config_name: str
    config_path: str
    config_hash: str
    backend: str
    container: str | None
    cycle_index: int
    status: str = PENDING
    result_path: str | None = None
    started_at: str | None = None
    completed_at: str | None = None
    error: str | None = None
    retry_count: int = 0
    order_index: int = 0
    host: str | None = None
    attempts: tuple[Attempt, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = _checked(name, value)
        self.__dict__.pop("_line", None)

    def put_attempt(self, attempt: Attempt) -> None:
        """Add an attempt, or put it in the place of the one with its number."""
        others = [item for item in self.attempts if item.number != attempt.number]
        self.attempts = tuple(sorted([*others, attempt], key=lambda item: item.number))

    def encode(self) -> bytes:
        """The entry as one line of JSON, made anew only after a change."""
        line: bytes | None = self.__dict__.get("_line")
        if line is None:
            values = {name: self.__dict__[name] for name in _ENTRY_NAMES}
            values["attempts"] = [vars(attempt) for attempt in self.attempts]
            line = self.__dict__["_line"] = encode_json(values)
        return line


_ENTRY_NAMES = tuple(item.name for item in dataclasses.fields(CampaignManifestEntry))


def _checked(name: str, value: Any) -> Any:
    """The value as an entry keeps it."""
    if name not in _ENTRY_NAMES:
        raise AttributeError(f"a manifest entry has no field {name!r}")
    if name == "status" and value not in STATUSES:
        raise ValueError(f"status {value!r} is none of {', '.join(STATUSES)}")
    if name == "attempts":
        return tuple(value)
    if isinstance(value, datetime):
        return utc_text(value)
    return str(value) if isinstance(value, Path) else value


@dataclass
class CampaignManifest:
    """A campaign's experiments and how far it is. Times are UTC labels.

    Attributes:
        config_hash: hash of the campaign's configuration, names and io left out.
        run_id: names the folder of its results; kept by a resume.
        shuffle_seed: of `structure: shuffled`; None for the others.
        environment: what was found at the first load (image, engine, driver, GPU UUIDs), as the caller names it.
        notes: what a resume did that a reader of the results must know, e.g. an environment change that was allowed.
    """

    campaign_id: str
    campaign_name: str
    created_at: str
    updated_at: str
    config_hash: str
    total_experiments: int
    experiments: list[CampaignManifestEntry] = field(default_factory=list)
    run_id: str | None = None
    shuffle_seed: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._positions: dict[str, int] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = utc_text(value) if isinstance(value, datetime) else value

    @property
    def completed_count(self) -> int:
        """Experiments with a result."""
        return self._count(COMPLETED)

    @property
    def failed_count(self) -> int:
        """Experiments that failed."""
        return self._count(FAILED)

    @property
    def pending_count(self) -> int:
        """Experiments not begun."""
        return self._count(PENDING)

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
        position = self._positions.get(exp_id, -1)
        if not (0 <= position < len(self.experiments) and self.experiments[position].exp_id == exp_id):
            self._positions = {entry.exp_id: index for index, entry in enumerate(self.experiments)}
            if exp_id not in self._positions:
                raise KeyError(f"campaign {self.campaign_name} has no experiment {exp_id}")
            position = self._positions[exp_id]
        return self.experiments[position]

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

    def _count(self, status: str) -> int:
        return sum(entry.status == status for entry in self.experiments)
