"""A campaign as others see it: its activity file, and every state and what it is told apart by."""

import dataclasses
import fcntl
import json
import os
from datetime import datetime, timedelta, timezone

import pytest

from lem.base.errors import EngineError
from lem.orchestration.locks import CAMPAIGN_LOCK_NAME, Holder, campaign_lock, hold_locks, is_locked, take
from lem.orchestration.manifest import ManifestManager
from lem.orchestration.resume import RunOptions
from lem.orchestration.status import (
    ACTIVITY_NAME,
    ActivityWriter,
    Event,
    Viewpoint,
    boot_time,
    estimate_left_s,
    find_folders,
    parse_utc,
    read_activity,
    read_status,
)
from tests.campaign_doubles import FakeClock, Place, make_campaign

NOON = FakeClock().now()
HERE = Viewpoint(NOON + timedelta(minutes=2), "here")
PID = 4711


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    return Place(tmp_path)


@pytest.fixture
def folder(place):
    return place.folder / "state" / "demo"


@pytest.fixture
def done(place, folder):
    """The state folder of a campaign that ran to its end."""
    place.runner(make_campaign(place.folder)).run()
    return folder


def _change(folder, **changes):
    """Change what the last process said."""
    path = folder / ACTIVITY_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _break_off(folder, status="running"):
    """Make the manifest what a process leaves that is killed in its last experiment."""
    manager = ManifestManager(folder / "campaign_manifest.json", now=FakeClock().now)
    manifest = manager.load_strict()
    assert manifest is not None
    manifest.experiments[-1].status = status
    manager.save(manifest)
    _change(folder, doing="experiment", phase="window", exp_id=manifest.experiments[-1].exp_id, pid=PID)


def _held(folder, pid=PID, since="2026-07-14T11:59:00.000000Z"):
    return hold_locks([campaign_lock(folder, "demo")], Holder(pid, "here", "demo", since))


def test_a_campaign_that_ran_to_its_end_is_done(done):
    status = read_status(done, HERE)
    assert (status.state, status.reason, status.n_left) == ("done", "", 0)


def test_one_in_which_all_had_their_turn_and_some_failed_has_failed(place, folder):
    error = EngineError("no such option", is_permanent=True)
    place.runner(make_campaign(place.folder), {"pytorch-max_output_tokens=4": [error]}).run()
    status = read_status(folder, HERE)
    assert (status.state, status.count("failed"), status.n_left) == ("failed", 2, 0)


def test_one_that_a_signal_ended_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    place = Place(tmp_path, signal_at_s=15)
    place.runner(make_campaign(tmp_path), options=RunOptions(resume_command="again")).run()
    status = read_status(tmp_path / "state" / "demo", HERE)
    assert (status.state, status.reason, status.n_left) == ("stopped", "stopped by a signal", 3)


def test_one_whose_time_was_up_says_so(place, folder):
    place.runner(make_campaign(place.folder)).run(deadline_s=place.clock.monotonic() + 15)
    assert read_status(folder, HERE).reason == "its deadline passed"


def test_one_that_is_begun_and_nobody_runs_has_crashed(done):
    _break_off(done)
    status = read_status(done, HERE)
    assert status.state == "crashed"
    assert status.reason.startswith(f"process {PID} ended unexpectedly after 2026-07-14T12:00:40Z")


def test_one_that_was_killed_in_a_gap_has_crashed_too(done):
    _break_off(done, "pending")
    _change(done, doing="gap")
    assert read_status(done, HERE).state == "crashed"


def test_a_restart_of_the_host_is_named_as_the_reason(done):
    _break_off(done)
    status = read_status(done, dataclasses.replace(HERE, booted_at=NOON + timedelta(seconds=50)))
    assert status.reason == "the host was restarted at 2026-07-14T12:00:50Z; last sign of life 2026-07-14T12:00:40Z"


def test_of_another_host_it_is_said_that_this_one_cannot_know(done):
    _break_off(done)
    status = read_status(done, Viewpoint(HERE.now, "elsewhere"))
    assert status.reason.startswith("it ran on here, not on this host (elsewhere)")


def test_a_crash_is_found_without_what_the_process_said(done):
    _break_off(done)
    (done / ACTIVITY_NAME).unlink()
    assert read_status(done, HERE).state == "crashed"


def test_what_an_earlier_run_said_is_not_taken_for_this_one(done):
    _change(done, run_id="another", doing="experiment")
    assert read_status(done, HERE).state == "done"


def test_with_its_lock_held_it_is_running_and_says_where_it_is(done):
    _break_off(done)
    _change(done, eta_s=100.0, updated_at="2026-07-14T12:01:50.000000Z")
    with _held(done):
        status = read_status(done, HERE)
    assert (status.state, status.reason) == ("running", "")
    assert status.holder == Holder(PID, "here", "demo", "2026-07-14T11:59:00.000000Z")
    assert status.left_s == 90.0  # ten of them have passed


def test_one_that_has_said_nothing_for_long_is_suspected(done):
    _break_off(done)
    with _held(done):
        status = read_status(done, Viewpoint(NOON + timedelta(minutes=30), "here"))
    assert status.state == "running"
    assert status.reason.startswith("no sign of life since")


def test_between_two_runs_it_waits(done):
    _change(done, pid=PID)
    with _held(done):
        assert read_status(done, HERE).state == "waiting"


def test_a_new_process_over_what_a_crash_left_has_not_begun(done):
    _break_off(done)
    with _held(done, pid=PID + 1, since="2026-07-14T12:01:00.000000Z"):
        status = read_status(done, HERE)
    assert status.state == "waiting"
    assert "not measuring yet" in status.reason


def test_without_a_manifest_it_waits_while_held_and_is_nothing_otherwise(folder):
    with _held(folder):
        assert read_status(folder, HERE).state == "waiting"
    assert read_status(folder, HERE).state == "none"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 99}'])
def test_a_broken_manifest_is_told(folder, content):
    folder.mkdir(parents=True)
    (folder / "campaign_manifest.json").write_text(content)
    status = read_status(folder, HERE)
    assert status.state == "unreadable"
    assert "campaign_manifest.json" in status.reason


def test_invalid_results_are_counted_among_the_done(place, folder):
    place.runner(make_campaign(place.folder), {"pytorch-max_output_tokens=4": ["invalid"]}).run()
    status = read_status(folder, HERE)
    assert (status.count("completed"), status.n_invalid) == (4, 2)


def test_looking_changes_nothing(done):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in done.iterdir()}
    read_status(done, HERE)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in done.iterdir()} == before


def test_folders_of_campaigns_are_told_from_others(place, folder):
    place.runner(make_campaign(place.folder)).run()
    (place.folder / "state" / "something-else").mkdir()
    (place.folder / "state" / "a-file").write_text("")
    assert find_folders(place.folder / "state") == (folder,)
    assert find_folders(place.folder / "nowhere") == ()


def test_a_manifest_of_another_name_is_found_and_one_set_aside_is_not(done):
    (done / "campaign_manifest.json").rename(done / "mine.json")
    assert read_status(done, HERE).state == "done"
    (done / "mine.json").rename(done / "mine.20260714T100000Z.json")
    assert read_status(done, HERE).state == "none"


# --- the estimate


def _manifest_with_ends(place, seconds, n_left):
    place.runner(make_campaign(place.folder, execution={"cycles": (len(seconds) + n_left) // 2})).run()
    manifest = place.manifest()
    for entry, second in zip(manifest.experiments, seconds, strict=False):
        entry.completed_at = NOON + timedelta(seconds=second)
    for entry in manifest.experiments[len(seconds) :]:
        entry.status = "pending"
    return manifest


def test_what_is_left_takes_as_long_as_the_usual_step_from_end_to_end(place):
    # A night lies between the third and the fourth.
    assert estimate_left_s(_manifest_with_ends(place, [0, 60, 120, 40000, 40060], 3)) == 180.0


def test_one_end_gives_no_estimate(place):
    assert estimate_left_s(_manifest_with_ends(place, [10], 3)) is None


# --- locks, clocks


def test_a_lock_is_seen_while_it_is_held_and_no_longer(folder):
    assert is_locked(folder / CAMPAIGN_LOCK_NAME) is False
    with _held(folder):
        assert is_locked(folder / CAMPAIGN_LOCK_NAME) is True
    assert is_locked(folder / CAMPAIGN_LOCK_NAME) is False


def test_two_may_look_at_once(folder):
    with _held(folder):
        pass
    descriptor = os.open(folder / CAMPAIGN_LOCK_NAME, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    assert is_locked(folder / CAMPAIGN_LOCK_NAME) is False
    os.close(descriptor)


@pytest.mark.parametrize("tries_before", [0, 1, 2])
def test_a_look_that_meets_the_taking_of_a_lock_does_not_refuse_it(folder, tries_before):
    with _held(folder):
        pass
    looker, taker = (os.open(folder / CAMPAIGN_LOCK_NAME, os.O_RDWR) for _ in range(2))
    fcntl.flock(looker, fcntl.LOCK_SH)
    waits: list[float] = []

    def look_away(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == tries_before:
            fcntl.flock(looker, fcntl.LOCK_UN)

    if tries_before:
        take(taker, look_away)
        assert is_locked(folder / CAMPAIGN_LOCK_NAME) is True
    else:
        with pytest.raises(BlockingIOError):
            take(taker, look_away)
    os.close(looker)
    os.close(taker)


def test_the_boot_time_is_the_kernels(tmp_path):
    (tmp_path / "stat").write_text("cpu 1 2 3\nbtime 1783987200\nprocesses 5\n")
    assert boot_time(tmp_path / "stat") == datetime(2026, 7, 14, tzinfo=timezone.utc)
    assert boot_time(tmp_path / "nothing") is None
    (tmp_path / "stat").write_text("cpu 1 2 3\n")
    assert boot_time(tmp_path / "stat") is None


@pytest.mark.parametrize("label", [None, "", "yesterday", "2026-07-14T12:00:00"])
def test_what_is_no_utc_label_is_no_moment(label):
    assert parse_utc(label) is None


HOLDER = Holder(4711, "here", "demo", "2026-07-14T12:00:00Z")
STARTED = {"exp_id": "abc-c1", "config_name": "small"}


class _Written:
    """A writer on a clock, and what it wrote."""

    def __init__(self, folder):
        self.folder = folder
        self.clock = FakeClock()
        self.passed: list[Event] = []
        self.writer = ActivityWriter(
            folder,
            "run-1",
            HOLDER,
            self.passed.append,
            now=self.clock.now,
            monotonic=self.clock.monotonic,
            go_on="lem campaign c.yaml --resume",
        )

    def tell(self, kind, *, after_s=0.0, eta_s=None, **data):
        self.clock.elapsed_s += after_s
        self.writer(Event(kind, 1, 4, eta_s, data))
        return self.read()

    def read(self):
        return read_activity(self.folder)


@pytest.fixture
def written(tmp_path):
    return _Written(tmp_path)


def test_it_says_from_the_start_who_runs_what_and_how_to_go_on(written):
    activity = written.read()
    assert (activity.run_id, activity.pid, activity.host) == ("run-1", 4711, "here")
    assert (activity.doing, activity.go_on) == ("starting", "lem campaign c.yaml --resume")
    assert activity.since == "2026-07-14T12:00:00.000000Z"


def test_events_are_passed_on(written):
    written.tell("note", text="x")
    assert [event.kind for event in written.passed] == ["note"]


def test_the_phase_of_an_experiment_is_told_with_the_moment_it_began(written):
    written.tell("experiment_started", **STARTED)
    activity = written.tell("phase", after_s=3, exp_id="abc-c1", phase="window", eta_s=90.0)
    assert (activity.doing, activity.exp_id, activity.config_name) == ("experiment", "abc-c1", "small")
    assert (activity.phase, activity.since, activity.eta_s) == ("window", "2026-07-14T12:00:03.000000Z", 90.0)


def test_progress_is_written_every_few_seconds_not_every_time(written):
    written.tell("phase", exp_id="abc-c1", phase="window")
    progress = {"exp_id": "abc-c1", "phase_total": 100, "text": ""}
    assert written.tell("progress", phase_done=1, after_s=1, **progress).phase_done is None
    assert written.tell("progress", phase_done=5, after_s=5, **progress).phase_done == 5


def test_a_gap_says_how_long_it_may_still_be(written):
    assert written.tell("gap", gap="cycle", cap_s=60.0).gap_ends_in_s == 60.0
    activity = written.tell("tick", left_s=50.0, after_s=10)
    assert (activity.doing, activity.gap_ends_in_s) == ("gap", 50.0)


def test_an_end_says_how_and_forgets_the_experiment(written):
    written.tell("experiment_started", **STARTED)
    written.writer.end("infrastructure", "the disk is full")
    activity = written.read()
    assert (activity.doing, activity.stopped, activity.message) == ("ended", "infrastructure", "the disk is full")
    assert activity.exp_id is None


def test_a_folder_that_cannot_be_written_does_not_matter(tmp_path):
    written = _Written(tmp_path / "nowhere")
    assert written.tell("phase", exp_id="abc-c1", phase="window") is None
    assert len(written.passed) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b'{"schema_version": 2}', b'{"schema_version": 1}', b"[" * 50_000],
)
def test_a_file_that_is_not_ours_is_none(tmp_path, content):
    (tmp_path / ACTIVITY_NAME).write_bytes(content)
    assert read_activity(tmp_path) is None


@pytest.mark.parametrize(("name", "value"), [("pid", "x"), ("phase", 3), ("eta_s", "soon"), ("since", None)])
def test_a_value_of_another_type_is_none(written, name, value):
    path = written.folder / ACTIVITY_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    assert written.read() is None


def test_a_campaign_that_ran_to_its_end_has_said_so(tmp_path, monkeypatch):
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    place = Place(tmp_path)
    place.runner(make_campaign(tmp_path), options=RunOptions(resume_command="again")).run()
    activity = read_activity(tmp_path / "state" / "demo")
    assert activity is not None
    assert (activity.doing, activity.stopped, activity.go_on) == ("ended", None, "again")
    assert activity.run_id == place.manifest().run_id


@pytest.mark.parametrize("length", [10, 100_000])
def test_the_error_that_ended_a_campaign_is_read_whole(written, length):
    written.writer.end("error", "é" * length)
    activity = written.read()
    assert activity is not None
    assert (activity.stopped, activity.message) == ("error", "é" * length)


def test_nothing_but_the_file_is_left(written):
    written.tell("phase", exp_id="abc-c1", phase="window")
    assert [path.name for path in written.folder.iterdir()] == [ACTIVITY_NAME]
