"""The manifest of a campaign: what was planned, and what became of each experiment.

One file, `<state_dir>/<campaign>/campaign_manifest.json`, written whole after every transition.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path

from lem import durable
from lem.clock import utc_now, utc_stamp, utc_text
from lem.durable import make_folder
from lem.errors import LemError, UserError
from lem.orchestration.manifest_codec import SCHEMA_VERSION, decode_manifest, encode_manifest
from lem.orchestration.manifest_entries import (
    COMPLETED,
    FAILED,
    PENDING,
    RUNNING,
    SKIPPED,
    STATUSES,
    Attempt,
    CampaignManifest,
    CampaignManifestEntry,
)

__all__ = [
    "COMPLETED",
    "FAILED",
    "PENDING",
    "RUNNING",
    "SCHEMA_VERSION",
    "SKIPPED",
    "STATUSES",
    "Attempt",
    "CampaignManifest",
    "CampaignManifestEntry",
    "ManifestManager",
    "decode_manifest",
    "encode_manifest",
]

logger = logging.getLogger(__name__)


class ManifestManager:
    """The manifest's file.

    Before a save writes a changed status, it raises the audit event `lem.transition` (exp_id, old, new; see
    `sys.audit`), so that a test can stop the program there.
    """

    def __init__(self, manifest_path: Path | str, *, now: Callable[[], datetime] = utc_now) -> None:
        self.manifest_path = Path(manifest_path)
        self._now = now
        self._saved_statuses: dict[str, str] = {}

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
        """Write the manifest, whole or not at all, and make its folder when there is none.

        Raises:
            OSError: as `durable.write_bytes`; the manifest of before is still there.
        """
        statuses = {entry.exp_id: entry.status for entry in manifest.experiments}
        for exp_id, status in statuses.items():
            before = self._saved_statuses.get(exp_id, status)
            if status != before:
                sys.audit("lem.transition", exp_id, before, status)
        manifest.updated_at = utc_text(self._now())
        make_folder(self.manifest_path.parent)
        durable.write_bytes(self.manifest_path, encode_manifest(manifest))
        self._saved_statuses = statuses

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
            logger.warning("%s", error.message)
            return None

    def load_strict(self, campaign_id: str | None = None) -> CampaignManifest | None:
        """The manifest; None when there is none.

        Raises:
            UserError: it is unreadable, truncated, of another schema, or of another campaign than `campaign_id`.
        """
        try:
            manifest = decode_manifest(durable.read_json(self.manifest_path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(f"cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise self._unusable(f"is broken: {error}") from error
        if campaign_id is not None and manifest.campaign_id != campaign_id:
            raise self._unusable(f"belongs to another campaign, {manifest.campaign_name!r}")
        self._saved_statuses = {entry.exp_id: entry.status for entry in manifest.experiments}
        return manifest

    def set_aside(self) -> Path | None:
        """Where the manifest went to make room for a fresh start; None when there was none.

        Nothing is overwritten: its new name carries the time, and a number when that name is taken. To be called
        under the campaign's lock.

        Raises:
            OSError: the folder is not writable.
        """
        if not self.exists():
            return None
        stamp = utc_stamp(self._now())
        stem, suffix = self.manifest_path.stem, self.manifest_path.suffix
        numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        candidates = (self.manifest_path.with_name(f"{stem}.{stamp}{number}{suffix}") for number in numbers)
        target = next(path for path in candidates if not path.exists())
        sys.audit("lem.rename", str(target))
        self.manifest_path.rename(target)
        durable.sync_folder(target.parent)
        self._saved_statuses = {}
        return target

    def remove_leftovers(self) -> None:
        """Remove what a process left that was killed while it saved. To be called under the campaign's lock."""
        for path in self.manifest_path.parent.glob(f"{durable.TEMPORARY_PREFIX}*"):
            path.unlink(missing_ok=True)

    def _unusable(self, what: str) -> UserError:
        return UserError(
            f"the manifest {self.manifest_path} {what}",
            "--fresh sets it aside and starts anew; results are kept either way",
        )
