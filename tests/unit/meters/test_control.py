"""Settings of GPUs: the notes of what was set before. Setting itself is tested on the NVML double, with campaigns."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from lem.meters.control import ControlError, Note, find_notes, note_path, read_note, restore

UUID = "GPU-11111111-2222-3333-4444-555555555555"
BOOT = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
NOTE = Note(UUID, "demo", BOOT, 650.0, is_clock_locked=True)


def write(folder: Path, note: Note = NOTE) -> Path:
    path = note_path(folder, UUID)
    path.write_text(json.dumps(dataclasses.asdict(note)), encoding="utf-8")
    return path


def test_a_note_is_read_by_the_user_who_wrote_it(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert read_note(path) == NOTE
    assert find_notes(tmp_path) == [path]
    assert find_notes(tmp_path, of_others=True) == []


def test_a_note_of_another_boot_is_void_and_removed(tmp_path: Path) -> None:
    path = write(tmp_path, dataclasses.replace(NOTE, boot_id="another"))
    assert read_note(path) is None
    assert restore(path) is None
    assert not path.exists()


def test_nothing_is_restored_without_a_note(tmp_path: Path) -> None:
    assert restore(note_path(tmp_path, UUID)) is None
    assert find_notes(tmp_path / "missing") == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"uuid": 3}', json.dumps({**dataclasses.asdict(NOTE), "more": 1})])
def test_a_damaged_note_is_kept_and_named(tmp_path: Path, text: str) -> None:
    path = note_path(tmp_path, UUID)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ControlError, match=path.name):
        restore(path)
    assert path.exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = write(tmp_path).rename(tmp_path / "elsewhere")
    note_path(tmp_path, UUID).symlink_to(target)
    with pytest.raises(ControlError):
        read_note(note_path(tmp_path, UUID))


def test_a_pipe_in_place_of_a_note_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(note_path(tmp_path, UUID))
    with pytest.raises(ControlError):
        read_note(note_path(tmp_path, UUID))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_another_user_wrote_under_this_name_is_not_obeyed(tmp_path: Path) -> None:
    path = write(tmp_path)
    os.chown(path, 12345, -1)
    with pytest.raises(ControlError, match="another user"):
        restore(path)
    path.rename(tmp_path / f"{UUID}.12345.settings")
    assert find_notes(tmp_path) == []
    assert len(find_notes(tmp_path, of_others=True)) == 1
