"""The journal of a long plan: what it costs, and that no crash and no damage changes what is read."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lem.base.errors import LockedError, UserError
from lem.orchestration.journal import Journal
from lem.orchestration.manifest import (
    JOURNALED_FROM,
    Attempt,
    CampaignManifest,
    CampaignManifestEntry,
    ManifestManager,
    encode_manifest,
)
from tests.faulty_disk import watching

# A change so long that the journal soon is longer than the snapshot.
LONG = "x" * 20_000


def make_manifest(count: int = JOURNALED_FROM) -> CampaignManifest:
    entries = [
        CampaignManifestEntry(f"exp-{number:05}", "a", "a.yaml", "0" * 16, "pytorch", None, 0)
        for number in range(count)
    ]
    return ManifestManager("nowhere").create_manifest("0123abcd", "demo", "f00d", entries)


@pytest.fixture
def manager(tmp_path: Path) -> ManifestManager:
    return ManifestManager(tmp_path / "campaign_manifest.json")


def change(manager: ManifestManager, manifest: CampaignManifest, number: int, text: str = "") -> None:
    entry = manifest.update_entry("exp-00007", error=f"{number} {text}")
    manager.save_entry(manifest, entry)


def last_change(path: Path) -> int:
    """The number of the last change that a reader sees; 0 for none."""
    manifest = ManifestManager(path).load_strict()
    assert manifest is not None
    assert len(manifest.experiments) == JOURNALED_FROM
    return int((manifest.get_entry("exp-00007").error or "0").split()[0])


def journal_of(manager: ManifestManager) -> Path:
    return manager.manifest_path.with_suffix(".journal")


def test_a_change_of_a_long_plan_is_one_synced_line_beside_the_snapshot(manager: ManifestManager) -> None:
    manifest = make_manifest()
    manager.save(manifest)
    snapshot = manager.manifest_path.read_bytes()
    synced: list[tuple[str, str]] = []
    with watching(lambda event, path: synced.append((event, Path(path).name))):
        for number, status in enumerate(("running", "completed"), start=1):
            entry = manifest.update_entry("exp-00007", status=status, attempts=[Attempt(1, result_sha256="ab")])
            manager.save_entry(manifest, entry)
            assert journal_of(manager).read_bytes().count(b"\n") == 1 + number
    name = journal_of(manager).name
    assert [item for item in synced if "fsync" in item[0]] == [
        ("lem.fsync", name),
        ("lem.fsync_dir", manager.manifest_path.parent.name),  # once, for the name of a new file
        ("lem.fsync", name),
    ]
    assert manager.manifest_path.read_bytes() == snapshot
    assert ManifestManager(manager.manifest_path).load_strict() == manifest


def test_a_short_plan_has_its_snapshot_rewritten_at_every_change_and_no_journal(manager: ManifestManager) -> None:
    manifest = make_manifest(JOURNALED_FROM - 1)
    manager.save(manifest)
    manager.save_entry(manifest, manifest.update_entry("exp-00007", status="running"))
    assert json.loads(manager.manifest_path.read_bytes())["experiments"][7]["status"] == "running"
    assert not journal_of(manager).exists()


def test_a_change_costs_as_many_bytes_in_a_plan_of_any_length(tmp_path: Path) -> None:
    sizes = []
    for count in (JOURNALED_FROM, 10 * JOURNALED_FROM):
        manager, manifest = ManifestManager(tmp_path / f"{count}.json"), make_manifest(count)
        manager.save(manifest)
        change(manager, manifest, 1)
        sizes.append(journal_of(manager).stat().st_size)
        assert ManifestManager(manager.manifest_path).load_strict() == manifest
    assert sizes[0] == sizes[1]


def test_a_journal_longer_than_its_snapshot_goes_into_a_new_one(manager: ManifestManager) -> None:
    manifest = make_manifest()
    manager.save(manifest)
    snapshots, number = {manager.manifest_path.read_bytes()}, 0
    while len(snapshots) < 3:
        number += 1
        change(manager, manifest, number, LONG)
        assert not journal_of(manager).exists() or journal_of(manager).stat().st_size < 2 * len(max(snapshots, key=len))
        assert last_change(manager.manifest_path) == number
        snapshots.add(manager.manifest_path.read_bytes())
    assert not journal_of(manager).exists()
    assert ManifestManager(manager.manifest_path).load_strict() == manifest


def test_settling_leaves_one_file_and_writes_nothing_twice(manager: ManifestManager) -> None:
    manifest = make_manifest()
    manager.save(manifest)
    change(manager, manifest, 1)
    manager.settle(manifest)
    assert [path.name for path in manager.manifest_path.parent.iterdir()] == ["campaign_manifest.json"]
    before = manager.manifest_path.stat()
    manager.settle(manifest)
    assert manager.manifest_path.stat() == before
    assert last_change(manager.manifest_path) == 1


def test_a_last_line_that_was_cut_off_is_dropped_wherever_it_was_cut(manager: ManifestManager) -> None:
    manifest = make_manifest()
    manager.save(manifest)
    ends = [0]
    for number in (1, 2, 3):
        change(manager, manifest, number)
        ends.append(journal_of(manager).stat().st_size)
    whole = journal_of(manager).read_bytes()
    for length in range(len(whole)):
        journal_of(manager).write_bytes(whole[:length])
        # A line of which only the end is missing is whole.
        seen = sum(length >= end - 1 for end in ends[1:])
        assert len(Journal(manager.manifest_path).read(_snapshot(manager))) == seen, length
    assert last_change(manager.manifest_path) == 3


def test_no_flipped_bit_of_a_journal_changes_what_is_read(manager: ManifestManager) -> None:
    manifest = make_manifest()
    manager.save(manifest)
    for number in (1, 2):
        change(manager, manifest, number)
    whole = journal_of(manager).read_bytes()
    refused = 0
    for place, bit in ((place, 1 << bit) for place in range(len(whole)) for bit in range(8)):
        damaged = bytearray(whole)
        damaged[place] ^= bit
        try:
            Journal(manager.manifest_path).path.write_bytes(damaged)
            documents = Journal(manager.manifest_path).read(_snapshot(manager))
        except ValueError:
            refused += 1
        else:
            pytest.fail(f"byte {place}, bit {bit}: {documents}")
    assert refused == 8 * len(whole)
    with pytest.raises(UserError, match="journal") as caught:
        ManifestManager(manager.manifest_path).load_strict()
    assert "--resume" in caught.value.hint


def _snapshot(manager: ManifestManager) -> str:
    return str(json.loads(manager.manifest_path.read_bytes())["sha256"])


def test_no_flipped_bit_of_a_snapshot_is_accepted(manager: ManifestManager) -> None:
    manager.save(make_manifest(2))
    whole = manager.manifest_path.read_bytes()
    for place, bit in ((place, 1 << bit) for place in range(len(whole)) for bit in range(8)):
        damaged = bytearray(whole)
        damaged[place] ^= bit
        manager.manifest_path.write_bytes(damaged)
        with pytest.raises(UserError):
            ManifestManager(manager.manifest_path).load_strict()


def test_a_journal_of_another_snapshot_is_not_applied(manager: ManifestManager) -> None:
    manifest = make_manifest()
    manager.save(manifest)
    change(manager, manifest, 1)
    older = journal_of(manager).read_bytes()
    manifest.update_entry("exp-00007", error="2")
    manager.save(manifest)
    journal_of(manager).write_bytes(older)  # as after a crash before its removal
    assert last_change(manager.manifest_path) == 2
    loaded = ManifestManager(manager.manifest_path)
    found = loaded.load_strict()
    assert found is not None
    change(loaded, found, 3)
    assert last_change(manager.manifest_path) == 3


def _twelve_changes(path: Path, acknowledge: Callable[[int], None]) -> None:
    """Changes among which are two new snapshots."""
    manager = ManifestManager(path)
    manifest = make_manifest()
    manager.save(manifest)
    acknowledge(0)
    for number in range(1, 13):
        change(manager, manifest, number, LONG)
        acknowledge(number)
    manager.settle(manifest)


STEPS = ("lem.write", "lem.fsync", "lem.rename", "lem.fsync_dir", "open", "os.remove", "os.rename")


def _steps(run: Callable[[], Any], at: Callable[[int], None]) -> int:
    """How many steps on the disk `run` takes; `at` is called before each."""
    count, is_on = 0, True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if (
            is_on
            and event in STEPS
            and (event != "open" or (isinstance(arguments[2], int) and arguments[2] & os.O_WRONLY))
        ):
            count += 1
            at(count)

    sys.addaudithook(hook)
    try:
        run()
    finally:
        is_on = False
    return count


def _die_at(step: int, path: Path, writer: int) -> NoReturn:
    """Make the changes, each acknowledged by a byte, and end without any clean-up at that step."""

    def acknowledge(_number: int) -> None:
        os.write(writer, b".")

    def die(count: int) -> None:
        if count == step:
            os._exit(0)

    try:
        _steps(lambda: _twelve_changes(path, acknowledge), die)
    finally:
        os._exit(1)


def test_a_process_that_is_killed_at_any_step_loses_no_change_that_was_on_disk(tmp_path: Path) -> None:
    total = _steps(lambda: _twelve_changes(tmp_path / "whole.json", lambda _: None), lambda _: None)
    assert total > 40
    for step in range(1, total + 1):
        path = tmp_path / f"{step}.json"
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _die_at(step, path, writer)
        os.close(writer)
        with open(reader, "rb") as stream:
            acknowledged = len(stream.read())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, step
        if acknowledged:
            assert last_change(path) in (acknowledged - 1, acknowledged), step


def test_a_step_that_fails_loses_nothing_and_the_next_change_succeeds(tmp_path: Path) -> None:
    total = _steps(lambda: _twelve_changes(tmp_path / "whole.json", lambda _: None), lambda _: None)
    for step in range(1, total + 1):
        path, done = tmp_path / f"{step}.json", [-1]

        def fail(count: int, step: int = step) -> None:
            if count == step:
                raise OSError(errno.EIO, "injected")

        manager, manifest = ManifestManager(path), make_manifest()

        def run(
            manager: ManifestManager = manager, manifest: CampaignManifest = manifest, done: list[int] = done
        ) -> None:
            manager.save(manifest)
            for number in range(13):
                change(manager, manifest, number, LONG)
                done.append(number)

        try:
            _steps(run, fail)
        except OSError:
            if path.exists():
                assert last_change(path) in (max(done[-1], 0), done[-1] + 1), step
        change(manager, manifest, 99)
        assert last_change(path) == 99, step


def test_a_manifest_that_another_process_wrote_is_not_overwritten(manager: ManifestManager) -> None:
    """Four campaigns ran at once on a file system where every lock succeeds."""
    manager.save(make_manifest())
    others = [ManifestManager(manager.manifest_path) for _ in range(2)]
    first, second = (other.load_strict() for other in others)
    assert first is not None
    assert second is not None
    first.run_id, second.run_id = "run-1", "run-2"
    others[0].save(first)
    for write in (lambda: others[1].save(second), lambda: change(manager, make_manifest(), 5)):
        with pytest.raises(LockedError, match="another process"):
            write()
    change(others[0], first, 6)
    found = ManifestManager(manager.manifest_path).load_strict()
    assert found is not None
    assert (found.run_id, last_change(manager.manifest_path)) == ("run-1", 6)
    journal_of(manager).write_bytes(journal_of(manager).read_bytes() + b"of another process\n")
    with pytest.raises(OSError, match="another process"):
        change(others[0], first, 7)


def test_a_manifest_that_vanished_is_written_again(manager: ManifestManager) -> None:
    manifest = make_manifest()
    manager.save(manifest)
    change(manager, manifest, 1)
    manager.manifest_path.unlink()
    change(manager, manifest, 2)
    assert last_change(manager.manifest_path) == 2


def test_a_long_manifest_is_set_aside_as_one_file_with_all_its_changes(manager: ManifestManager) -> None:
    manifest = make_manifest()
    manager.save(manifest)
    change(manager, manifest, 4)
    aside = ManifestManager(manager.manifest_path).set_aside()
    assert aside is not None
    assert list(manager.manifest_path.parent.iterdir()) == [aside]
    assert last_change(aside) == 4
    assert manager.manifest_path.with_suffix(".journal") == journal_of(manager)
    manager.save(manifest)
    change(manager, manifest, 5)
    manager.manifest_path.write_bytes(b"broken")
    aside = ManifestManager(manager.manifest_path).set_aside()
    assert aside is not None
    assert aside.with_suffix(".journal").exists()
    assert not journal_of(manager).exists()


def test_a_manifest_of_the_first_build_is_read_and_its_attempts_have_no_digests(manager: ManifestManager) -> None:
    manifest = make_manifest(2)
    manifest.update_entry("exp-00001", status="completed", attempts=[Attempt(1, result_path="r", valid=True)])
    document = json.loads(b"".join(encode_manifest(manifest)))
    del document["sha256"], document["experiments"][1]["attempts"][0]["result_sha256"]
    manager.manifest_path.write_text(json.dumps({**document, "schema_version": 1}))
    assert manager.load_strict() == manifest
    manager.save(manifest)
    assert json.loads(manager.manifest_path.read_bytes())["schema_version"] == 2


def test_an_entry_is_found_as_the_list_changes() -> None:
    manifest = make_manifest(3)
    assert manifest.get_entry("exp-00002") is manifest.experiments[2]
    del manifest.experiments[0]
    assert manifest.get_entry("exp-00002") is manifest.experiments[1]
    with pytest.raises(KeyError):
        manifest.get_entry("exp-00000")
    new = CampaignManifestEntry("new", "a", "a.yaml", "0", "pytorch", None, 0)
    manifest.experiments = [new]
    assert manifest.get_entry("new") is new
