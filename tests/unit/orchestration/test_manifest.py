from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import UserError
from lem.orchestration.manifest import (
    Attempt,
    CampaignManifest,
    CampaignManifestEntry,
    ManifestManager,
    encode_manifest,
)
from tests.faulty_disk import watching


def entry(number: int = 0, **fields: Any) -> CampaignManifestEntry:
    values = {
        "exp_id": f"exp-{number}",
        "config_name": f"config-{number}",
        "config_path": f"configs/config-{number}.yaml",
        "config_hash": f"{number:016x}",
        "backend": "pytorch",
        "container": None,
        "cycle_index": 0,
    }
    return CampaignManifestEntry(**{**values, **fields})


def manifest_of(*statuses: str) -> CampaignManifest:
    entries = [entry(number, status=status) for number, status in enumerate(statuses)]
    return ManifestManager("nowhere").create_manifest("0123abcd", "demo", "f00d", entries)


@pytest.fixture
def manager(tmp_path: Path) -> ManifestManager:
    return ManifestManager(tmp_path / "demo" / "campaign_manifest.json")


def test_update_changes_the_fields_named_of_that_entry_wherever_it_is() -> None:
    manifest = manifest_of("pending", "pending")
    assert manifest_of().progress_fraction == 0.0
    updated = manifest.update_entry("exp-1", status="failed", error="out of memory", retry_count=1)
    assert updated is manifest.experiments[1]
    assert updated == entry(1, status="failed", error="out of memory", retry_count=1)
    assert manifest.experiments[0] == entry(0)
    manifest.experiments.reverse()
    assert manifest.update_entry("exp-1", status="running") is updated
    with pytest.raises(KeyError, match="exp-9"):
        manifest.update_entry("exp-9", status="running")


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"error": "x", "statsu": "running"}, AttributeError), ({"error": "x", "status": "done"}, ValueError)],
)
def test_a_wrong_update_changes_nothing(fields: dict[str, str], error: type[Exception]) -> None:
    manifest = manifest_of("pending")
    with pytest.raises(error):
        manifest.update_entry("exp-0", **fields)
    assert manifest.experiments[0] == entry(0)


def test_an_entry_takes_times_and_paths_as_they_are_at_hand() -> None:
    found = entry(started_at=datetime(2026, 7, 14, 12, tzinfo=timezone(timedelta(hours=2))), result_path=Path("a/b"))
    assert found.started_at == "2026-07-14T10:00:00.000000Z"
    assert found.result_path == "a/b"


def test_a_manifest_is_copied_and_pickled() -> None:
    manifest = manifest_of("pending", "completed")
    b"".join(encode_manifest(manifest))  # of few entries, each keeps its line
    for made in (copy.deepcopy(manifest), pickle.loads(pickle.dumps(manifest))):  # noqa: S301
        assert made == manifest
        made.update_entry("exp-0", status="running")
        assert made != manifest


def test_attempts_are_kept_by_number() -> None:
    found = entry()
    for attempt in (Attempt(1), Attempt(2), Attempt(1, error="interrupted")):
        found.put_attempt(attempt)
    assert found.attempts == (Attempt(1, error="interrupted"), Attempt(2))


# The file


def test_round_trip(manager: ManifestManager) -> None:
    entries = [
        entry(0, status="completed", result_path="r/result.json", started_at="a", completed_at="b", retry_count=2),
        entry(1, status="failed", error='tabs\tquotes" and ünïcode\n', container="demo-vllm-1", host="node3"),
        entry(2, attempts=[Attempt(1, valid=False, result_path="x"), Attempt(2, error="died", log_path="log.txt")]),
        entry(3, cycle_index=4, order_index=7, config_path=os.fsdecode(b"configs-\xff/a.yaml")),
    ]
    manifest = manager.create_manifest("0123abcd", "Démo", "f00d", entries)
    manifest.run_id = "20260714T100000Z-1f3a"
    manifest.shuffle_seed = 42
    manifest.environment = {"driver": "580.1", "gpu_uuids": ["GPU-1"], "image": None}
    manifest.notes.append({"kind": "environment_change"})
    manager.save(manifest)
    assert manager.load() == manager.load("0123abcd") == manifest
    text = manager.manifest_path.read_text()
    assert next(iter(json.loads(text))) == "schema_version"
    assert sum('"exp_id"' in line for line in text.splitlines()) == 4


def test_every_change_since_the_last_save_is_saved(manager: ManifestManager) -> None:
    manifest = manager.create_manifest("0123abcd", "demo", "f00d", [entry(0), entry(1)])
    manager.save(manifest)
    for change in (
        {"status": "running"},
        {"error": "x"},
        {"attempts": [Attempt(1)]},
        {"status": "completed", "error": None},
    ):
        manifest.update_entry("exp-1", **change)
        manager.save(manifest)
        assert manager.load() == manifest
    manifest.experiments[0].error = "set without update_entry"
    manifest.experiments[0].put_attempt(Attempt(1))
    manager.save(manifest)
    assert manager.load() == manifest


def test_a_missing_manifest_is_none_without_a_warning(
    manager: ManifestManager, caplog: pytest.LogCaptureFixture
) -> None:
    assert (manager.load(), manager.load_strict(), caplog.records) == (None, None, [])


def whole() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(b"".join(encode_manifest(manifest_of("pending", "completed"))))
    return document


BROKEN = {
    "empty": b"",
    "truncated": b"".join(encode_manifest(manifest_of("pending", "pending")))[:-20],
    "not an object": b"[]",
    "newer schema": json.dumps({**whole(), "schema_version": 2}).encode(),
    "older schema": json.dumps({**whole(), "schema_version": 0}).encode(),
    "unknown field": json.dumps({**whole(), "surprise": 1}).encode(),
    "missing field": json.dumps({key: value for key, value in whole().items() if key != "config_hash"}).encode(),
    "mistyped field": json.dumps({**whole(), "total_experiments": "2"}).encode(),
    "true for a number": json.dumps({**whole(), "total_experiments": True}).encode(),
    "entry is no object": json.dumps({**whole(), "experiments": [1]}).encode(),
    "entry without status": b"".join(encode_manifest(manifest_of("pending"))).replace(b'"status": "pending", ', b""),
    "unknown status": b"".join(encode_manifest(manifest_of("pending"))).replace(b'"pending"', b'"done"'),
    "broken attempt": b"".join(encode_manifest(manifest_of("pending"))).replace(b'"attempts": []', b'"attempts": [{}]'),
    "same experiment twice": json.dumps({**whole(), "experiments": whole()["experiments"][:1] * 2}).encode(),
    "thousands of brackets": b'{"schema_version": 1, "experiments": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_manifest_is_none_with_a_warning_and_an_error_for_the_command_line(
    manager: ManifestManager, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    manager.manifest_path.parent.mkdir()
    manager.manifest_path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert manager.load() is None
    (warning,) = caplog.records
    assert str(manager.manifest_path) in warning.getMessage()
    with pytest.raises(UserError) as error:
        manager.load_strict()
    assert str(manager.manifest_path) in error.value.message
    assert "--fresh" in error.value.hint
    assert manager.manifest_path.read_bytes() == content


def test_a_folder_in_the_place_of_the_manifest_is_broken(manager: ManifestManager) -> None:
    manager.manifest_path.mkdir(parents=True)
    assert manager.load() is None
    with pytest.raises(UserError, match="cannot be read"):
        manager.load_strict()


def test_a_saved_manifest_is_on_disk(manager: ManifestManager) -> None:
    seen: list[str] = []
    with watching(lambda event, _path: seen.append(event)):
        manager.save(manifest_of("pending"))
    assert {"lem.fsync", "lem.fsync_dir"} <= set(seen)


def test_a_save_that_fails_keeps_the_manifest_of_before(manager: ManifestManager) -> None:
    manifest = manager.create_manifest("0123abcd", "demo", "f00d", [entry()])
    manager.save(manifest)
    before = manager.manifest_path.read_bytes()
    manifest.environment["made of"] = object()
    with pytest.raises(TypeError):
        manager.save(manifest)
    assert manager.manifest_path.read_bytes() == before
    assert len(list(manager.manifest_path.parent.iterdir())) == 1


def test_set_aside_keeps_every_old_manifest(tmp_path: Path) -> None:
    at = datetime(2026, 7, 14, 10, tzinfo=timezone.utc)
    manager = ManifestManager(tmp_path / "campaign_manifest.json", now=lambda: at)
    assert manager.set_aside() is None
    for number in range(3):
        manager.manifest_path.write_text(str(number))
        assert manager.set_aside() is not None
        assert not manager.exists()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "campaign_manifest.20260714T100000Z.json": "0",
        "campaign_manifest.20260714T100000Z-2.json": "1",
        "campaign_manifest.20260714T100000Z-3.json": "2",
    }


def test_leftovers_of_a_killed_save_are_removed_and_nothing_else(manager: ManifestManager) -> None:
    manager.remove_leftovers()
    manager.save(manager.create_manifest("0123abcd", "demo", "f00d", []))
    (manager.manifest_path.parent / ".lem-tmp-abc").write_text("half")
    (manager.manifest_path.parent / "lem.log").write_text("log")
    manager.remove_leftovers()
    assert {path.name for path in manager.manifest_path.parent.iterdir()} == {"campaign_manifest.json", "lem.log"}


@pytest.fixture
def seen() -> Iterator[list[tuple[Any, ...]]]:
    """The `lem.transition` and `lem.write` events of a test; an audit hook cannot be removed, so it is switched off."""
    events: list[tuple[Any, ...]] = []
    is_on = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if is_on and event in ("lem.transition", "lem.write"):
            events.append(arguments if event == "lem.transition" else ("written",))

    sys.addaudithook(hook)
    yield events
    is_on = False


def test_a_status_change_is_announced_before_it_is_saved_also_from_what_was_loaded(
    manager: ManifestManager, seen: list[tuple[Any, ...]]
) -> None:
    manifest = manager.create_manifest("0123abcd", "demo", "f00d", [entry(0), entry(1)])
    manager.save(manifest)
    manifest.update_entry("exp-1", status="running")
    manager.save(manifest)
    manifest.update_entry("exp-1", error="no transition")
    manager.save(manifest)
    assert seen == [("written",), ("exp-1", "pending", "running"), ("written",), ("written",)]
    other = ManifestManager(manager.manifest_path)
    loaded = other.load_strict()
    assert loaded is not None
    loaded.update_entry("exp-1", status="pending")
    other.save(loaded)
    assert seen[4:] == [("exp-1", "running", "pending"), ("written",)]
