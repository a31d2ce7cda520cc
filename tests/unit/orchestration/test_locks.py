from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lem.base.errors import ExitCode, LockedError, UserError
from lem.orchestration import locks
from lem.orchestration.locks import Holder, LockTarget, gpu_locks, hold_locks, read_holder

ME = Holder(pid=os.getpid(), host="node3", campaign="demo", since="2026-07-14T10:00:00Z")
OTHER = Holder(pid=1, host="node3", campaign="other", since="2026-07-14T11:00:00Z")


def target(folder: Path, name: str = "a") -> LockTarget:
    return LockTarget(folder / f"{name}.lock", f"GPU {name}")


def test_gpus_are_locked_once_each_in_one_order_for_everybody_and_inside_their_folder(tmp_path: Path) -> None:
    targets = gpu_locks(["GPU-2", "GPU-1", "GPU-2", "../../etc/passwd"], {"LEM_LOCK_DIR": str(tmp_path)})
    assert [item.what for item in targets] == ["GPU ../../etc/passwd", "GPU GPU-1", "GPU GPU-2"]
    assert {item.path.parent for item in targets} == {tmp_path}


def test_the_refused_one_learns_who_holds_the_lock(tmp_path: Path) -> None:
    with (
        hold_locks([target(tmp_path)], ME),
        pytest.raises(LockedError) as refusal,
        hold_locks([target(tmp_path)], OTHER),
    ):
        pytest.fail("locked twice")
    assert f"GPU a is locked by pid {os.getpid()} on node3, campaign demo" in refusal.value.message
    assert refusal.value.exit_code == ExitCode.LOCKED


def test_a_holder_that_has_not_said_who_it_is_still_refuses(tmp_path: Path) -> None:
    with hold_locks([target(tmp_path)], ME):
        target(tmp_path).path.write_bytes(b"\xff{ half a")
        with pytest.raises(LockedError, match="not yet identified"), hold_locks([target(tmp_path)], OTHER):
            pytest.fail("locked twice")


def test_a_holder_is_named_whatever_its_campaign_is_called(tmp_path: Path) -> None:
    odd = Holder(pid=1, host="node3", campaign=os.fsdecode(b"d\xe9mo ") + "ü", since="2026-07-14T11:00:00Z")
    with (
        hold_locks([target(tmp_path)], odd),
        pytest.raises(LockedError, match=odd.campaign),
        hold_locks([target(tmp_path)], ME),
    ):
        pytest.fail("locked twice")


def test_a_lock_is_free_after_the_block_and_its_file_means_nothing(tmp_path: Path) -> None:
    with hold_locks([target(tmp_path)], ME):
        pass
    assert target(tmp_path).path.exists()
    with hold_locks([target(tmp_path)], OTHER):
        assert read_holder(target(tmp_path).path) == OTHER


def test_a_shorter_holder_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    long = Holder(pid=4_000_000, host="a-very-long-host-name.example.org", campaign="c" * 300, since="then")
    for holder in (long, ME):
        with hold_locks([target(tmp_path)], holder):
            assert read_holder(target(tmp_path).path) == holder


def test_a_holder_with_a_very_long_name_is_still_named(tmp_path: Path) -> None:
    long = Holder(pid=4711, host="node3", campaign="ü" * 5000, since="2026-07-14T11:00:00Z")
    with hold_locks([target(tmp_path)], long):
        found = read_holder(target(tmp_path).path)
        with pytest.raises(LockedError, match="pid 4711 on node3"), hold_locks([target(tmp_path)], ME):
            pytest.fail("locked twice")
    assert found is not None
    assert (found.pid, found.host, found.since) == (long.pid, long.host, long.since)
    assert found.campaign.endswith("…")
    assert long.campaign.startswith(found.campaign[:-1])


def test_all_or_nothing(tmp_path: Path) -> None:
    first, second = target(tmp_path, "a"), target(tmp_path, "b")
    with hold_locks([second], OTHER):
        with pytest.raises(LockedError), hold_locks([first, second], ME):
            pytest.fail("locked twice")
        with hold_locks([first], OTHER):
            pass


def test_an_error_inside_the_block_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="inside"), hold_locks([target(tmp_path)], ME):
        raise RuntimeError("inside")
    with hold_locks([target(tmp_path)], OTHER):
        pass


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path: Path) -> None:
    held = target(tmp_path)
    program = (
        "import fcntl, os, signal\n"
        f"fd = os.open({str(held.path)!r}, os.O_RDWR | os.O_CREAT, 0o666)\n"
        "fcntl.flock(fd, fcntl.LOCK_EX)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    with hold_locks([held], ME):
        pass


def test_a_child_process_does_not_inherit_the_lock(tmp_path: Path) -> None:
    held = target(tmp_path)
    program = [sys.executable, "-c", "print('here', flush=True); input()"]
    with hold_locks([held], ME):
        child = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False)
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
    try:
        with hold_locks([held], OTHER):
            pass
    finally:
        child.communicate(b"\n")


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    with hold_locks([target(tmp_path / "new" / "deep")], ME):
        pass


def test_a_folder_that_is_a_file_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error, hold_locks([target(tmp_path / "file")], ME):
        pytest.fail("locked inside a file")
    assert str(tmp_path / "file") in error.value.message
    assert "LEM_LOCK_DIR" in error.value.hint


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Without root's right to write anywhere."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_folder_that_is_read_only_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with (
        ordinary_user(),
        pytest.raises(UserError, match="Permission denied") as error,
        hold_locks([target(tmp_path)], ME),
    ):
        pytest.fail("locked without a file")
    assert "LEM_LOCK_DIR" in error.value.hint


def test_a_lock_file_that_may_only_be_read_still_excludes(open_folder: Path) -> None:
    held = target(open_folder)
    held.path.write_text("")
    held.path.chmod(0o444)
    with ordinary_user(), hold_locks([held], ME), pytest.raises(LockedError), hold_locks([held], OTHER):
        pytest.fail("locked twice")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user may enter; pytest's own are private."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    target(tmp_path).path.symlink_to(victim)
    with pytest.raises(UserError), hold_locks([target(tmp_path)], ME):
        pytest.fail("followed a link")
    assert victim.read_text() == "precious"


def test_a_second_name_of_a_file_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    target(tmp_path).path.hardlink_to(victim)
    with pytest.raises(UserError, match="not an ordinary file"), hold_locks([target(tmp_path)], ME):
        pytest.fail("wrote through a second name")
    assert victim.read_text() == "precious"


def test_nobody_is_named_by_a_missing_or_foreign_file(tmp_path: Path) -> None:
    assert read_holder(tmp_path / "missing") is None
    for content in (b"", b"4711\n", b'{"pid": 1}', b"\xff"):
        (tmp_path / "file").write_bytes(content)
        assert read_holder(tmp_path / "file") is None


def test_the_environment_chooses_the_folder_of_the_gpu_locks(tmp_path: Path) -> None:
    assert locks.default_gpu_lock_folder({"LEM_LOCK_DIR": str(tmp_path)}) == tmp_path
    assert locks.default_gpu_lock_folder({}).name == "lem"


def test_every_user_of_a_host_finds_the_same_gpu_locks(open_folder: Path) -> None:
    # The folder of temporary files is another one for each user, or each job, that has a TMPDIR.
    for mode, due in ((0o1777, open_folder / "lem"), (0o755, Path("/tmp/lem"))):
        open_folder.chmod(mode)
        assert locks.default_gpu_lock_folder({"TMPDIR": "/var/tmp"}, open_folder) == due
        with ordinary_user():
            assert locks.default_gpu_lock_folder({}, open_folder) == due
    assert locks.default_gpu_lock_folder({}, open_folder / "missing") == Path("/tmp/lem")
