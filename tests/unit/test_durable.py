"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lem.base import durable
from tests.faulty_disk import failing, watching

EVENTS_BEFORE_THE_NAME_CHANGES = ("lem.write", "lem.fsync", "lem.rename")


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(durable.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_file_is_on_disk_before_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    synced: list[tuple[bool, bool]] = []  # whether it was the folder, and whether the file had its name

    def note(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink() == tmp_path, path.exists()))

    monkeypatch.setattr(os, "fsync", note)
    durable.write_bytes(path, b"one")
    assert synced == [(False, False), (True, True)]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"
    durable.write_text(path, "longer than the new one")
    durable.write_text(path, "neu: \0ü")
    assert path.read_text(encoding="utf-8") == "neu: \0ü"


def test_json_round_trips(tmp_path: Path) -> None:
    document = {"b": [1, 2.5, None, True, "ü"], "a": {}}
    durable.write_json(tmp_path / "a.json", document)
    assert list(durable.read_json(tmp_path / "a.json").items()) == list(document.items())


def test_long_json_is_written_in_parts_as_in_one(tmp_path: Path) -> None:
    document = [{"number": number, "texts": ["a", "b"]} for number in range(5000)]
    durable.write_json(tmp_path / "a.json", document)
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == json.dumps(document, indent=2) + "\n"


def test_a_file_name_that_is_no_utf8_survives_in_json(tmp_path: Path) -> None:
    document = {"path": os.fsdecode(b"results-\xff/\xc3\xbc")}
    durable.write_json(tmp_path / "a.json", document)
    assert durable.read_json(tmp_path / "a.json") == document
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "path": "results-\\udcff/ü"\n}\n'


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that cannot sync a folder: /proc")
def test_a_file_system_that_cannot_sync_a_folder_is_taken_as_it_is() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        sync_by_itself(Path("/proc/self"))
    durable.sync_folder(Path("/proc/self"))


def sync_by_itself(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_json_does_not_have_is_refused_and_nothing_written(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        durable.write_json(tmp_path / "a.json", {"value": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe\x00", b""])
def test_reading_what_is_no_json_is_a_value_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError):  # noqa: PT011 - JSONDecodeError and UnicodeDecodeError have no words in common
        durable.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_an_ordinary_file_and_the_umask_of_other_threads_stays(
    tmp_path: Path, mask: int
) -> None:
    called: list[str] = []
    before = os.umask(mask)
    try:
        sys.setprofile(lambda _frame, event, what: called.append(what.__name__) if event == "c_call" else None)
        durable.write_bytes(tmp_path / "a", b"")
    finally:
        sys.setprofile(None)
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask
    assert ("replace" in called, "umask" in called) == (True, False)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        durable.write_bytes(tmp_path / "nowhere" / "a", b"")


@pytest.mark.parametrize("event", EVENTS_BEFORE_THE_NAME_CHANGES)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_failure_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, event: str, code: int, old: bytes | None
) -> None:
    path = tmp_path / "a"
    if old is not None:
        path.write_bytes(old)
    with failing(event, code), pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is looked at
        durable.write_bytes(path, b"new")
    assert caught.value.errno == code
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == ({} if old is None else {"a": old})


def test_a_failing_folder_sync_leaves_the_new_file_whole(tmp_path: Path) -> None:
    with failing("lem.fsync_dir"), pytest.raises(OSError, match="space"):
        durable.write_bytes(tmp_path / "a", b"new")
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == {"a": b"new"}


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    seen: list[tuple[str, bytes]] = []
    with watching(lambda event, _: seen.append((event, path.read_bytes()))):
        durable.write_bytes(path, b"new")
    assert seen == [("lem.write", b"old"), ("lem.fsync", b"old"), ("lem.rename", b"old"), ("lem.fsync_dir", b"new")]


def test_a_disk_that_fills_up_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    """A real partial write: the limit on the size of files lets the kernel take the beginning only."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    code = """
import resource, sys
from pathlib import Path
from lem.base import durable
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    durable.write_bytes(Path(sys.argv[1]), bytes(100_000))
except OSError as error:
    print(error.errno)
"""
    assert run_python(code, str(path)).stdout.strip() == str(errno.EFBIG)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("event", [*EVENTS_BEFORE_THE_NAME_CHANGES, "lem.fsync_dir"])
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path, event: str) -> None:
    path = tmp_path / "a.json"
    durable.write_json(path, ["old"])
    code = """
import os, signal, sys
from pathlib import Path
from lem.base import durable
sys.addaudithook(lambda event, _: event == sys.argv[2] and os.kill(os.getpid(), signal.SIGKILL))
durable.write_json(Path(sys.argv[1]), ["new"])
"""
    assert run_python(code, str(path), event).returncode == -signal.SIGKILL
    assert json.loads(path.read_bytes()) == (["new"] if event == "lem.fsync_dir" else ["old"])
    strangers = [item.name for item in tmp_path.iterdir() if item != path]
    assert all(name.startswith(durable.TEMPORARY_PREFIX) for name in strangers)


def test_a_folder_gets_its_name_after_everything_in_it_is_on_disk(tmp_path: Path) -> None:
    scratch, target = tmp_path / "scratch", tmp_path / "target"
    (scratch / "inner").mkdir(parents=True)
    (scratch / "a").write_text("one")
    (scratch / "inner" / "b").write_text("two")
    seen: list[tuple[str, str]] = []
    with watching(lambda event, path: seen.append((event, Path(path).name))):
        durable.name_folder(scratch, target)
    assert seen[-2:] == [("lem.rename", "target"), ("lem.fsync_dir", tmp_path.name)]
    assert {"a", "b", "scratch", "inner"} == {name for _, name in seen[:-2]}
    assert [(target / "a").read_text(), (target / "inner" / "b").read_text()] == ["one", "two"]
    assert not scratch.exists()


@pytest.mark.parametrize("event", ["lem.fsync", "lem.fsync_dir", "lem.rename"])
def test_a_folder_that_cannot_be_made_safe_gets_no_name(tmp_path: Path, event: str) -> None:
    scratch, target = tmp_path / "scratch", tmp_path / "target"
    scratch.mkdir()
    (scratch / "a").write_text("one")
    with failing(event), pytest.raises(OSError, match="No space left"):
        durable.name_folder(scratch, target)
    assert not target.exists()
    assert (scratch / "a").read_text() == "one"


def test_a_file_that_is_not_synced_is_still_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    seen: list[str] = []
    with watching(lambda event, _path: seen.append(event)):
        durable.write_bytes(path, b"one", is_synced=False)
    assert seen == ["lem.write", "lem.rename"]
    with failing("lem.rename"), pytest.raises(OSError, match="No space left"):
        durable.write_bytes(path, b"two", is_synced=False)
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"one"


def test_the_hash_of_a_file_is_that_of_its_whole_content(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192 + b"end"  # more than one block
    (tmp_path / "file").write_bytes(data)
    assert durable.sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_what_may_block_or_never_end_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero"), Path("/dev/stdin"), tmp_path):
            for read in (durable.read_json, durable.read_bytes, durable.sha256_of, durable.open_text):
                with pytest.raises(OSError, match="expected a regular file") as caught:
                    read(path)
                assert caught.value.filename == str(path)
        with pytest.raises(OSError, match="No such device"):
            durable.read_bytes(tmp_path / "socket")


def test_a_file_larger_than_any_of_lem_is_refused_without_filling_the_memory(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="too large"):
        durable.read_json(tmp_path / "sparse")


@pytest.mark.parametrize("count", [0, 1, 1000, 1001, 2500])
def test_a_checksum_is_that_of_the_sorted_json_however_long_a_list_is(count: int) -> None:
    document = {"b": [{"z": number, "a": "ü"} for number in range(count)], "a": tuple(range(count)), "c": None}
    expected = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    assert durable.seal(document) == {**document, "sha256": expected}
