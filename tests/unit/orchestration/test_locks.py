"""Locks exclude, name their holder, end with their process, and follow nobody's links."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lem.base.errors import ExitCode, LockedError, UserError
from lem.orchestration import locks
from lem.orchestration.locks import (
    CAMPAIGN_LOCK_NAME,
    Holder,
    LockTarget,
    campaign_lock,
    gpu_locks,
    hold_locks,
    is_locked,
    read_holder,
    take,
)
from tests.processes import ordinary_user

ME = Holder(pid=os.getpid(), host="node3", campaign="demo", since="2026-07-14T10:00:00Z")
OTHER = Holder(pid=1, host="node3", campaign="other", since="2026-07-14T11:00:00Z")


@pytest.fixture
def target(tmp_path: Path) -> LockTarget:
    return LockTarget(tmp_path / "a.lock", "GPU a")


def refused(*targets: LockTarget) -> UserError:
    with pytest.raises(UserError) as caught, hold_locks(targets, OTHER):
        pytest.fail("locked")
    return caught.value


def assert_free(*targets: LockTarget) -> None:
    with hold_locks(targets, OTHER):
        assert read_holder(targets[0].path) == OTHER


def test_gpus_are_locked_once_each_in_one_order_for_everybody_and_inside_their_folder(tmp_path: Path) -> None:
    targets = gpu_locks(["GPU-2", "GPU-1", "GPU-2", "../../etc/passwd"], {"LEM_LOCK_DIR": str(tmp_path)})
    assert [item.what for item in targets] == ["GPU ../../etc/passwd", "GPU GPU-1", "GPU GPU-2"]
    assert {item.path.parent for item in targets} == {tmp_path}


def test_the_refused_one_learns_who_holds_the_lock_even_if_that_is_not_yet_written(target: LockTarget) -> None:
    with hold_locks([target], ME):
        error = refused(target)
        target.path.write_bytes(b"\xff{ half a")
        unknown = refused(target)
    assert f"GPU a is locked by pid {os.getpid()} on node3, campaign demo" in error.message
    assert error.exit_code == ExitCode.LOCKED
    assert isinstance(unknown, LockedError)
    assert "not yet identified" in unknown.message


@pytest.mark.parametrize("campaign", ["demo", os.fsdecode(b"d\xe9mo ") + "ü", "c" * 300, "ü" * 5000])
def test_a_holder_is_named_whatever_its_campaign_is_called(target: LockTarget, campaign: str) -> None:
    holder = Holder(pid=4711, host="node3", campaign=campaign, since="2026-07-14T11:00:00Z")
    with hold_locks([target], holder):
        found = read_holder(target.path)
        assert "pid 4711 on node3" in refused(target).message
    assert found is not None
    assert (found.pid, found.host, found.since) == (holder.pid, holder.host, holder.since)
    assert campaign.startswith(found.campaign.rstrip("…"))
    assert found.campaign.endswith("…") is (len(campaign) > 500)
    assert_free(target)  # whose shorter text leaves nothing of the longer one


def test_a_lock_is_free_after_the_block_or_an_error_in_it_and_its_file_means_nothing(target: LockTarget) -> None:
    with pytest.raises(RuntimeError, match="inside"), hold_locks([target], ME):
        raise RuntimeError("inside")
    assert target.path.exists()
    assert_free(target)


def test_all_or_nothing(tmp_path: Path) -> None:
    first, second = (LockTarget(tmp_path / name, name) for name in "ab")
    with hold_locks([second], ME):
        refused(first, second)
        assert_free(first)


def test_a_child_process_does_not_inherit_the_lock(target: LockTarget) -> None:
    program = [sys.executable, "-c", "print('here', flush=True); input()"]
    with hold_locks([target], ME):
        child = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False)
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
    try:
        assert_free(target)
    finally:
        child.communicate(b"\n")


# --- folders and files


def test_a_folder_that_is_a_file_or_read_only_is_an_error_with_its_remedy(tmp_path: Path, target: LockTarget) -> None:
    (tmp_path / "file").write_text("")
    error = refused(LockTarget(tmp_path / "file" / "a.lock", "a"))
    assert str(tmp_path / "file") in error.message
    assert "LEM_LOCK_DIR" in error.hint
    tmp_path.chmod(0o555)
    with ordinary_user():
        error = refused(target)
    assert "Permission denied" in error.message
    assert "LEM_LOCK_DIR" in error.hint


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user may enter; pytest's own are private."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_lock_file_that_may_only_be_read_still_excludes(open_folder: Path) -> None:
    held = LockTarget(open_folder / "a.lock", "a")
    held.path.write_text("")
    held.path.chmod(0o444)
    with ordinary_user(), hold_locks([held], ME):
        assert isinstance(refused(held), LockedError)


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_link_is_not_written_through(tmp_path: Path, target: LockTarget, link: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    getattr(target.path, link)(victim)
    assert ("not an ordinary file" in refused(target).message) is (link == "hardlink_to")
    assert victim.read_text() == "precious"


def test_nobody_is_named_by_a_missing_or_foreign_file(tmp_path: Path) -> None:
    assert read_holder(tmp_path / "missing") is None
    for content in (b"", b"4711\n", b'{"pid": 1}', b"\xff"):
        (tmp_path / "file").write_bytes(content)
        assert read_holder(tmp_path / "file") is None


def test_every_user_of_a_host_finds_the_same_gpu_locks_unless_the_environment_names_a_folder(open_folder: Path) -> None:
    assert locks.default_gpu_lock_folder({"LEM_LOCK_DIR": str(open_folder)}) == open_folder
    # The folder of temporary files is another one for each user, or each job, that has a TMPDIR.
    for mode, expected in ((0o1777, open_folder / "lem"), (0o755, Path("/tmp/lem"))):
        open_folder.chmod(mode)
        assert locks.default_gpu_lock_folder({"TMPDIR": "/var/tmp"}, open_folder) == expected
        with ordinary_user():
            assert locks.default_gpu_lock_folder({}, open_folder) == expected
    assert locks.default_gpu_lock_folder({}, open_folder / "missing") == Path("/tmp/lem")


# --- a look at a lock


def test_a_lock_is_seen_while_it_is_held_and_no_longer_and_two_may_look_at_once(tmp_path: Path) -> None:
    path = tmp_path / CAMPAIGN_LOCK_NAME
    assert is_locked(path) is False
    with hold_locks([campaign_lock(tmp_path, "demo")], ME):
        assert is_locked(path) is True
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert is_locked(path) is False


@pytest.mark.parametrize("tries_before", [0, 1, 2])
def test_a_look_that_meets_the_taking_of_a_lock_does_not_refuse_it(target: LockTarget, tries_before: int) -> None:
    assert_free(target)
    waits: list[float] = []
    with target.path.open("r+") as looker, target.path.open("r+") as taker:
        fcntl.flock(looker, fcntl.LOCK_SH)

        def look_away(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == tries_before:
                fcntl.flock(looker, fcntl.LOCK_UN)

        if tries_before:
            take(taker.fileno(), look_away)
            assert is_locked(target.path) is True
        else:
            with pytest.raises(BlockingIOError):
                take(taker.fileno(), look_away)


# --- several users, and file systems whose locks do not work


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_lock_files_are_their_owners_alone_also_those_of_older_versions(tmp_path: Path) -> None:
    campaign = campaign_lock(tmp_path, "demo")
    campaign.path.touch()
    campaign.path.chmod(0o666)
    (gpu,) = gpu_locks(["GPU-1"], {"LEM_LOCK_DIR": str(tmp_path)})
    with hold_locks([campaign, gpu], ME):
        assert (mode_of(campaign.own_path), mode_of(gpu.own_path)) == (0o600, 0o600)


def test_users_of_a_host_exclude_each_other_from_a_gpu_though_they_cannot_open_each_others_files(
    open_folder: Path,
) -> None:
    open_folder.chmod(0o1777)
    target, other = gpu_locks(["GPU-1", "GPU-10"], {"LEM_LOCK_DIR": str(open_folder)})
    with hold_locks([target], ME):
        with ordinary_user():
            error = refused(target)
            with hold_locks([other], ME):
                pass
        assert isinstance(error, LockedError)
        assert "GPU GPU-1 is locked by another process of user root" in error.message
    with ordinary_user(), hold_locks([target], OTHER):
        os.seteuid(0)
        error = refused(target)
        assert isinstance(error, LockedError)
        assert "pid 1 on node3" in error.message
        os.seteuid(65534)
    with hold_locks([target], ME):
        assert len(list(open_folder.glob("GPU-1.*"))) == 2


def test_a_gpu_lock_of_an_older_version_excludes(tmp_path: Path) -> None:
    (target,) = gpu_locks(["GPU-1"], {"LEM_LOCK_DIR": str(tmp_path)})
    with hold_locks([LockTarget(tmp_path / "GPU-1.lock", "GPU-1")], ME):
        assert f"pid {os.getpid()}" in refused(target).message


def test_another_users_campaign_lock_is_seen_to_be_held_or_named_with_its_owner(open_folder: Path) -> None:
    target = campaign_lock(open_folder, "demo")
    with hold_locks([target], ME), ordinary_user():
        assert is_locked(target.path) is True
        assert isinstance(refused(target), LockedError)
    with ordinary_user():
        assert is_locked(target.path) is False
        error = refused(target)
    assert not isinstance(error, LockedError)
    assert "as user root" in error.hint


def test_a_lock_whose_file_is_removed_before_it_is_locked_is_taken_on_the_new_file(target: LockTarget) -> None:
    removals = [target.path.unlink]

    def remove(event: str, _arguments: tuple[object, ...]) -> None:
        if event == "fcntl.flock" and removals:
            removals.pop()()

    sys.addaudithook(remove)  # for good, but it does nothing once the file is removed
    with hold_locks([target], ME):
        assert not removals
        assert isinstance(refused(target), LockedError)


def test_a_file_system_on_which_every_lock_succeeds_is_refused(tmp_path: Path) -> None:
    """Four campaigns ran at once on one manifest there."""
    (tmp_path / "flock.c").write_text("int flock(int file, int operation) { return file < 0 || operation < 0; }")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "flock.so", tmp_path / "flock.c"], check=True)
    program = (
        "import sys; from pathlib import Path; from lem.orchestration.locks import *;"
        "from lem.base.errors import UserError\n"
        "try:\n  hold_locks([campaign_lock(Path(sys.argv[1]), 'demo')], Holder(1, 'a', 'b', 'c')).__enter__()\n"
        "except UserError as error: print(error.message, error.hint)"
    )
    environ = {**os.environ, "LD_PRELOAD": str(tmp_path / "flock.so")}
    command = [sys.executable, "-c", program, str(tmp_path)]
    answer = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    assert f"locks do not work in {tmp_path}: campaign.lock can be locked twice" in answer
    assert "io.state_dir" in answer


def test_a_process_that_is_given_the_descriptor_holds_the_lock_after_its_parent(target: LockTarget) -> None:
    with hold_locks([target], ME) as descriptors:
        words = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        child = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=descriptors)
    refused(target)
    child.communicate()
    assert_free(target)
