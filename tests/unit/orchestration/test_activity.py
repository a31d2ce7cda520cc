"""What a running campaign leaves for those who look from outside."""

import json

import pytest

from lem.orchestration.locks import Holder
from lem.orchestration.resume import RunOptions
from lem.orchestration.status import ACTIVITY_NAME, ActivityWriter, Event, read_activity
from tests.campaign_doubles import FakeClock, Place, make_campaign

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
    place.runner(make_campaign(tmp_path), options=RunOptions(go_on="again")).run()
    activity = read_activity(tmp_path / "state" / "demo")
    assert activity is not None
    assert (activity.doing, activity.stopped, activity.go_on) == ("ended", None, "again")
    assert activity.run_id == place.manifest().run_id


def test_a_campaign_that_was_stopped_has_said_so(tmp_path, monkeypatch):
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    place = Place(tmp_path, signal_at_s=15)
    place.runner(make_campaign(tmp_path)).run()
    activity = read_activity(tmp_path / "state" / "demo")
    assert activity is not None
    assert activity.stopped == "signal"


@pytest.mark.parametrize("length", [10, 100_000])
def test_the_error_that_ended_a_campaign_is_read_whole(written, length):
    written.writer.end("error", "é" * length)
    activity = written.read()
    assert activity is not None
    assert (activity.stopped, activity.message) == ("error", "é" * length)


def test_nothing_but_the_file_is_left(written):
    written.tell("phase", exp_id="abc-c1", phase="window")
    assert [path.name for path in written.folder.iterdir()] == [ACTIVITY_NAME]
