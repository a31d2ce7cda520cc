"""A campaign as others see it: its activity file, and every state and what it is told apart by."""

import dataclasses
import json
from datetime import datetime, timedelta, timezone

import pytest

from lem.base.errors import EngineError, UserError
from lem.orchestration.dispatch import WorkerUnavailable
from lem.orchestration.locks import Holder, campaign_lock, hold_locks
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
from tests.campaign_doubles import FOUR, FakeClock, FakeStop, make_campaign

NOON = FakeClock().now()
HERE = Viewpoint(NOON + timedelta(minutes=2), "here")
PID = 4711


@pytest.fixture
def folder(place):
    return place.folder / "state" / "demo"


@pytest.fixture
def done(place, folder):
    """The state folder of a campaign that ran to its end."""
    place.run()
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


REFUSED = {FOUR: [EngineError("no such option", is_permanent=True)]}


@pytest.mark.parametrize(
    ("answers", "signal_at_s", "deadline_s", "expected"),
    [
        ({}, None, None, ("done", "", 0, 0)),
        (REFUSED, None, None, ("failed", "", 0, 2)),
        ({}, 15, None, ("stopped", "stopped by a signal", 3, 0)),
        ({}, None, 15, ("stopped", "its deadline passed", 2, 0)),
    ],
)
def test_how_a_campaign_ended(place, answers, signal_at_s, deadline_s, expected):
    if signal_at_s is not None:
        place.stop = FakeStop(place.clock, signal_at_s)
    place.run(answers, deadline_s=deadline_s, options=RunOptions(resume_command="again"))
    status = read_status(place.folder / "state" / "demo", HERE)
    assert (status.state, status.reason, status.n_left, status.count("failed")) == expected
    assert status.activity is not None
    assert (status.activity.doing, status.activity.go_on) == ("ended", "again")
    assert status.activity.run_id == place.manifest().run_id


@pytest.mark.parametrize(
    ("status", "change", "viewpoint", "reason"),
    [
        ("running", {}, {}, f"process {PID} ended unexpectedly after 2026-07-14T12:00:40Z"),
        ("pending", {"doing": "gap"}, {}, f"process {PID} ended unexpectedly after 2026-07-14T12:00:40Z"),
        (
            "running",
            {},
            {"booted_at": NOON + timedelta(seconds=50)},
            "the host was restarted at 2026-07-14T12:00:50Z; last sign of life 2026-07-14T12:00:40Z",
        ),
        ("running", {}, {"host": "elsewhere"}, "it ran on here, not on this host (elsewhere)"),
        ("running", None, {}, ""),  # without what the process said
    ],
)
def test_one_that_is_begun_and_nobody_runs_has_crashed(done, status, change, viewpoint, reason):
    _break_off(done, status)
    if change is None:
        (done / ACTIVITY_NAME).unlink()
    else:
        _change(done, **change)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in done.iterdir()}
    found = read_status(done, dataclasses.replace(HERE, **viewpoint))
    assert (found.state, found.reason.startswith(reason)) == ("crashed", True)
    # Looking changes nothing.
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in done.iterdir()} == before


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


def test_a_new_process_over_what_a_crash_left_has_not_begun(done):
    _break_off(done)
    with _held(done, pid=PID + 1, since="2026-07-14T12:01:00.000000Z"):
        status = read_status(done, HERE)
    assert status.state == "waiting"
    assert "not measuring yet" in status.reason


def test_it_waits_between_two_runs_and_before_the_first(place, folder):
    with _held(folder):
        assert read_status(folder, HERE).state == "waiting"
    assert read_status(folder, HERE).state == "none"
    place.run()
    _change(folder, pid=PID)
    with _held(folder):
        assert read_status(folder, HERE).state == "waiting"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 99}'])
def test_a_broken_manifest_is_told(folder, content):
    folder.mkdir(parents=True)
    (folder / "campaign_manifest.json").write_text(content)
    status = read_status(folder, HERE)
    assert status.state == "unreadable"
    assert "campaign_manifest.json" in status.reason


def test_invalid_results_are_counted_among_the_done(place, folder):
    place.run({FOUR: ["invalid"]})
    status = read_status(folder, HERE)
    assert (status.count("completed"), status.n_invalid) == (4, 2)


def test_a_start_that_failed_leaves_no_campaign(place):
    runner = place.runner(make_campaign(place.folder))
    place.executor.worker.open = raise_unavailable
    for _ in range(2):
        with pytest.raises(UserError, match="no such Python"):
            runner.run()
        assert find_folders(place.folder / "state") == ()
    with runner.reserved():  # a daemon that waits for its first run
        assert [path.name for path in find_folders(place.folder / "state")] == ["demo"]


def raise_unavailable(*_: object) -> None:
    raise WorkerUnavailable("no such Python")


def test_folders_of_campaigns_are_told_from_others(place, folder):
    place.run()
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


@pytest.mark.parametrize(
    ("ends", "left_s"),
    [
        ([0, 60, 120, 40000, 40060], 180.0),  # a night lies between the third and the fourth
        ([10], None),
    ],
)
def test_what_is_left_takes_as_long_as_the_usual_step_from_end_to_end(place, ends, left_s):
    place.run(execution={"cycles": (len(ends) + 3) // 2})
    manifest = place.manifest()
    for entry, second in zip(manifest.experiments, ends, strict=False):
        entry.completed_at = NOON + timedelta(seconds=second)
    for entry in manifest.experiments[len(ends) :]:
        entry.status = "pending"
    assert estimate_left_s(manifest) == left_s


# --- clocks


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
        self.clock = clock = FakeClock()
        self.passed: list[Event] = []
        self.writer = ActivityWriter(
            folder, "run-1", HOLDER, self.passed.append, clock.now, clock.monotonic, "lem campaign c.yaml --resume"
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


def test_progress_is_written_every_few_seconds_not_every_time(written):
    written.tell("phase", exp_id="abc-c1", phase="window")
    progress = {"exp_id": "abc-c1", "phase_total": 100, "text": ""}
    assert written.tell("progress", phase_done=1, after_s=1, **progress).phase_done is None
    assert written.tell("progress", phase_done=5, after_s=5, **progress).phase_done == 5


def test_a_gap_says_how_long_it_may_still_be(written):
    assert written.tell("gap", gap="cycle", cap_s=60.0).gap_ends_in_s == 60.0
    activity = written.tell("tick", left_s=50.0, after_s=10)
    assert (activity.doing, activity.gap_ends_in_s) == ("gap", 50.0)


@pytest.mark.parametrize("length", [10, 100_000])
def test_an_end_says_how_and_forgets_the_experiment(written, length):
    written.tell("experiment_started", **STARTED)
    written.writer.end("infrastructure", "é" * length)
    activity = written.read()
    assert (activity.doing, activity.stopped, activity.message) == ("ended", "infrastructure", "é" * length)
    assert activity.exp_id is None
    assert [path.name for path in written.folder.iterdir()] == [ACTIVITY_NAME]


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
