"""What the loop does with experiments that fail, with gaps, deadlines and disks, and what it writes down."""

import errno
import signal

import pytest

from lem.base.errors import EngineError, InfrastructureError, OptionRefused, UserError
from lem.config.campaign_config import CampaignColdStartConfig
from lem.orchestration.resume import RunOptions
from lem.orchestration.schedule import Stopped
from tests.campaign_doubles import Place, make_campaign, write_result
from tests.faulty_disk import watching

FOUR, EIGHT = "pytorch-max_output_tokens=4", "pytorch-max_output_tokens=8"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    return Place(tmp_path)


def _statuses(place):
    return [entry.status for entry in place.manifest().experiments]


def test_every_experiment_runs_once_in_the_order_of_the_plan(place):
    outcome = place.runner(make_campaign(place.folder)).run()
    assert place.asked() == [(FOUR, 1, 1), (EIGHT, 1, 1), (FOUR, 2, 1), (EIGHT, 2, 1)]
    assert _statuses(place) == ["completed"] * 4
    assert (outcome.stopped, outcome.error, outcome.signum) == (None, None, None)
    assert place.kinds() == [
        "campaign_started",
        *["experiment_started", "experiment_completed"] * 4,
        "campaign_finished",
    ]


@pytest.mark.parametrize(
    ("reuse", "kept"),
    [
        ("cycle", [True, False, True, False]),
        ("campaign", [True, True, True, False]),
        ("none", [False, False, False, False]),
    ],
)
def test_the_engine_is_kept_for_as_long_as_the_campaign_says(place, reuse, kept):
    place.runner(make_campaign(place.folder, execution={"reuse": reuse})).run()
    assert [request.keep_engine for request in place.requests] == kept


def test_a_cold_start_ends_the_worker_after_each_experiment(place):
    cold = CampaignColdStartConfig(force_cold_start=True)
    place.runner(make_campaign(place.folder, cold_start=cold)).run()
    assert place.executor.worker.opened == 4
    assert not any(request.keep_engine for request in place.requests)


def test_a_warm_campaign_keeps_its_worker(place):
    place.runner(make_campaign(place.folder)).run()
    assert place.executor.worker.opened == 1


def test_the_cycle_gap_takes_the_place_of_the_configuration_gap(place):
    gaps = {"config_gap_seconds": 5, "cycle_gap_seconds": 30}
    place.runner(make_campaign(place.folder, execution=gaps)).run()
    assert sum(place.stop.waits) == 40.0
    assert [request.gap_s for request in place.requests] == [None, 5.0, 30.0, 5.0]
    assert [(data["gap"], data["cap_s"]) for data in place.told("gap")] == [
        ("configuration", 5.0),
        ("cycle", 30.0),
        ("configuration", 5.0),
    ]


def test_a_gap_is_told_while_it_lasts(place):
    campaign = make_campaign(place.folder, execution={"cycles": 1, "config_gap_seconds": 12})
    place.runner(campaign).run()
    assert [data["left_s"] for data in place.told("tick")] == [12.0, 7.0, 2.0]


def test_a_signal_in_a_gap_starts_nothing_more(tmp_path):
    place = Place(tmp_path, signal_at_s=12.0)
    outcome = place.runner(make_campaign(tmp_path, execution={"config_gap_seconds": 5})).run()
    assert (outcome.stopped, outcome.signum) == (Stopped.SIGNAL, signal.SIGINT)
    assert _statuses(place) == ["completed", "pending", "pending", "pending"]
    assert place.clock.elapsed_s == 12.0


def test_a_signal_in_an_experiment_leaves_it_pending_and_interrupted(tmp_path):
    place = Place(tmp_path, signal_at_s=15.0)
    outcome = place.runner(make_campaign(tmp_path)).run()
    assert (outcome.stopped, outcome.signum) == (Stopped.SIGNAL, signal.SIGINT)
    assert _statuses(place) == ["completed", "pending", "pending", "pending"]
    assert place.manifest().experiments[1].error == "interrupted"
    assert place.kinds()[-3:] == ["experiment_started", "experiment_interrupted", "campaign_finished"]


def test_what_may_work_the_second_time_is_tried_twice_inside_its_cycle(place):
    failed = EngineError("the engine died", kind="died")
    place.runner(make_campaign(place.folder), {FOUR: [failed, "ok"]}).run()
    assert place.asked()[:3] == [(FOUR, 1, 1), (FOUR, 1, 2), (EIGHT, 1, 1)]
    entry = place.manifest().experiments[0]
    assert (entry.status, entry.retry_count, entry.error) == ("completed", 1, None)
    assert entry.result_path is not None
    assert entry.result_path.endswith("/attempt-2/result.json")
    assert [(item.number, item.error, item.valid) for item in entry.attempts] == [
        (1, "the engine died", None),
        (2, None, True),
    ]
    assert place.told("experiment_retried")[0]["reason"] == "the engine died"


def test_what_fails_twice_has_failed_and_the_rest_goes_on(place):
    failed = EngineError("the engine died", "look at the log", kind="died")
    outcome = place.runner(make_campaign(place.folder), {FOUR: [failed]}).run()
    assert _statuses(place) == ["failed", "completed", "failed", "completed"]
    assert place.asked() == [(FOUR, 1, 1), (FOUR, 1, 2), (EIGHT, 1, 1), (FOUR, 2, 1), (FOUR, 2, 2), (EIGHT, 2, 1)]
    assert outcome.stopped is None
    told = place.told("experiment_failed")[0]
    assert (told["error"], told["hint"], told["error_kind"], told["log_tail"]) == (
        "the engine died",
        "look at the log",
        "died",
        "last words",
    )


@pytest.mark.parametrize(
    "error",
    [
        OptionRefused("torch_compile is not for this engine"),
        EngineError("out of memory at load", kind="out_of_memory", is_permanent=True),
        EngineError("no such model", kind="model", is_permanent=True),
    ],
)
def test_what_would_fail_the_same_way_again_is_not_tried_again(place, error):
    place.runner(make_campaign(place.folder, execution={"cycles": 1}), {FOUR: [error]}).run()
    assert place.asked() == [(FOUR, 1, 1), (EIGHT, 1, 1)]
    entry = place.manifest().experiments[0]
    assert (entry.status, entry.error, entry.retry_count) == ("failed", error.message, 0)


def test_a_result_that_is_not_valid_is_kept_and_measured_once_more(place):
    place.runner(make_campaign(place.folder), {FOUR: ["invalid", "ok"]}).run()
    entry = place.manifest().experiments[0]
    assert place.asked()[:2] == [(FOUR, 1, 1), (FOUR, 1, 2)]
    assert [attempt.valid for attempt in entry.attempts] == [False, True]
    assert entry.result_path == entry.attempts[1].result_path
    assert all((place.folder / str(attempt.result_path)).is_file() for attempt in entry.attempts)


def test_an_experiment_that_is_never_valid_is_completed_and_says_why(place):
    place.runner(make_campaign(place.folder, execution={"cycles": 1}), {FOUR: ["invalid"]}).run()
    entry = place.manifest().experiments[0]
    assert (entry.status, entry.retry_count) == ("completed", 1)
    assert entry.result_path == entry.attempts[1].result_path
    told = place.told("experiment_completed")[0]
    assert (told["valid"], told["invalid_reasons"]) == (False, ["it was too hot"])


def test_an_invalid_result_stands_when_the_second_try_fails(place):
    answers = {FOUR: ["invalid", EngineError("the engine died", kind="died")]}
    place.runner(make_campaign(place.folder, execution={"cycles": 1}), answers).run()
    entry = place.manifest().experiments[0]
    assert (entry.status, entry.error) == ("completed", None)
    assert entry.result_path == entry.attempts[0].result_path


def test_a_result_that_was_told_and_not_written_is_a_failure(place):
    place.runner(make_campaign(place.folder, execution={"cycles": 1}), {FOUR: ["none"]}).run()
    assert place.manifest().experiments[0].error == "the worker reported a result but did not write one"


def test_the_result_of_another_attempt_is_a_failure(place):
    def confuse(request):
        write_result(request, attempt=7)
        return "none"

    place.runner(make_campaign(place.folder, execution={"cycles": 1}), {FOUR: [confuse]}).run()
    entry = place.manifest().experiments[0]
    assert entry.status == "failed"
    assert "the result belongs to another experiment" in str(entry.error)


def test_a_result_on_disk_counts_whatever_became_of_the_worker_afterwards(place):
    def die_late(request):
        write_result(request)
        return EngineError("the worker was killed by SIGKILL", kind="died")

    place.runner(make_campaign(place.folder, execution={"cycles": 1}), {FOUR: [die_late]}).run()
    assert place.asked() == [(FOUR, 1, 1), (EIGHT, 1, 1)]
    assert _statuses(place) == ["completed", "completed"]


def test_a_full_results_disk_stops_the_campaign_with_the_rest_pending(place):
    full = EngineError("cannot write result.json: no space left on device", "make room", kind="full")
    outcome = place.runner(make_campaign(place.folder), {EIGHT: [full]}).run()
    assert outcome.stopped is Stopped.INFRASTRUCTURE
    assert isinstance(outcome.error, InfrastructureError)
    assert (outcome.error.message, outcome.error.hint) == (full.message, "make room")
    assert _statuses(place) == ["completed", "pending", "pending", "pending"]
    assert place.manifest().experiments[1].error == full.message


def test_a_worker_that_cannot_be_started_any_more_stops_the_campaign(place):
    gone = UserError("python: no such program", "install it")
    outcome = place.runner(make_campaign(place.folder), {EIGHT: [gone]}).run()
    assert outcome.stopped is Stopped.INFRASTRUCTURE
    assert outcome.error is not None
    assert outcome.error.message == "python: no such program"
    assert _statuses(place) == ["completed", "pending", "pending", "pending"]


@pytest.mark.parametrize("allowed_writes", [1, 2, 3, 4])
def test_a_manifest_that_cannot_be_written_stops_the_campaign_and_a_resume_completes_it(place, allowed_writes):
    writes = []

    def fail_after(event, path):
        if event == "lem.write" and "campaign_manifest" in path:
            writes.append(path)
            if len(writes) > allowed_writes:
                raise OSError(errno.ENOSPC, "No space left on device", path)

    campaign = make_campaign(place.folder)
    with watching(fail_after):
        outcome = place.runner(campaign).run()
    assert outcome.stopped is Stopped.INFRASTRUCTURE
    assert outcome.error is not None
    assert "no space left on device" in outcome.error.message
    assert "--resume" in outcome.error.hint
    assert all(entry.status != "running" for entry in outcome.manifest.experiments)
    done = len(list((place.folder / "results").rglob("result.json")))
    outcome = place.runner(campaign, options=RunOptions(resume=True)).run()
    assert outcome.manifest.is_complete
    assert len(place.requests) == 4 - done
    assert len(list((place.folder / "results").rglob("result.json"))) == 4


def test_fail_fast_ends_after_the_first_failure_with_the_rest_pending(place):
    refused = OptionRefused("no")
    options = RunOptions(is_fail_fast=True)
    outcome = place.runner(make_campaign(place.folder), {EIGHT: [refused]}, options=options).run()
    assert outcome.stopped is Stopped.FAIL_FAST
    assert _statuses(place) == ["completed", "failed", "pending", "pending"]


def test_no_experiment_begins_after_the_deadline_and_the_running_one_finishes(place):
    deadline_s = place.clock.monotonic() + 15
    outcome = place.runner(make_campaign(place.folder)).run(deadline_s=deadline_s)
    assert outcome.stopped is Stopped.DEADLINE
    assert _statuses(place) == ["completed", "completed", "pending", "pending"]
    assert place.clock.elapsed_s == 20.0


def test_a_gap_does_not_outlast_the_deadline(place):
    deadline_s = place.clock.monotonic() + 15
    outcome = place.runner(make_campaign(place.folder, execution={"config_gap_seconds": 60})).run(deadline_s=deadline_s)
    assert outcome.stopped is Stopped.DEADLINE
    assert place.clock.elapsed_s == 15.0
    assert _statuses(place) == ["completed", "pending", "pending", "pending"]


def test_the_time_left_is_told_from_the_experiments_before(place):
    place.runner(make_campaign(place.folder, execution={"config_gap_seconds": 10})).run()
    started = [event.eta_s for event in place.events if event.kind == "experiment_started"]
    completed = [event.eta_s for event in place.events if event.kind == "experiment_completed"]
    # 10 s each, with the configuration gap 20 s: the means are 10, 15 and 13.3 s.
    assert started == [None, pytest.approx(30 - 10), pytest.approx(30), pytest.approx(40 / 3 - 10)]
    assert completed == [pytest.approx(30), pytest.approx(30), pytest.approx(40 / 3), 0.0]
    assert place.events[-1].eta_s == 0.0


def test_each_transition_is_on_disk_before_the_next_thing_happens(place):
    seen = []

    def answer(request):
        seen.append(_statuses(place))
        return "ok"

    place.runner(make_campaign(place.folder, execution={"cycles": 1}), {FOUR: [answer], EIGHT: [answer]}).run()
    assert seen == [["running", "pending"], ["completed", "running"]]


def test_prompts_that_are_gone_fail_their_experiment_alone_and_at_once(place):
    prompts = place.folder / "prompts.txt"
    prompts.write_text("one\ntwo\n")

    def take_away(request):
        prompts.unlink()
        return "ok"

    shared = {"prompts": [{"type": "file", "path": str(prompts)}]}
    campaign = make_campaign(place.folder, shared=shared, execution={"cycles": 1})
    outcome = place.runner(campaign, {FOUR: [take_away]}).run()
    assert outcome.stopped is None
    assert _statuses(place) == ["completed", "failed"]
    assert place.asked() == [(FOUR, 1, 1)]
    told = place.told("experiment_failed")[0]
    assert told["error_kind"] == "prompts"
    assert "prompts.txt" in told["error"]


def test_prompts_that_changed_since_the_plan_are_not_measured_under_its_name(place):
    prompts = place.folder / "prompts.txt"
    prompts.write_text("one\ntwo\n")

    def edit(request):
        prompts.write_text("three\nfour\n")
        return "ok"

    shared = {"prompts": [{"type": "file", "path": str(prompts)}]}
    campaign = make_campaign(place.folder, shared=shared, execution={"cycles": 1})
    place.runner(campaign, {FOUR: [edit]}).run()
    assert _statuses(place) == ["completed", "failed"]
    assert "changed since the campaign was planned" in str(place.manifest().experiments[1].error)


def test_the_worker_is_told_all_that_the_record_will_say(place):
    place.runner(make_campaign(place.folder, execution={"structure": "shuffled", "seed": 7})).run()
    first = place.requests[0]
    entry = place.manifest().experiments[0]
    assert first.identity == {
        "experiment_id": entry.exp_id,
        "config_name": entry.config_name,
        "config_hash": entry.config_hash,
        "campaign_id": place.manifest().campaign_id,
        "campaign_name": "demo",
        "run_id": place.manifest().run_id,
        "host": "here",
        "backend": "pytorch",
        "model": "none",
        "cycle_index": 0,
        "order_index": 0,
        "attempt": 1,
        "shuffle_seed": 7,
    }
    assert first.executor == "local"
    assert entry.host == "here"
    assert sorted(path.name for path in (place.folder / first.result_dir).iterdir()) == [
        "config.json",
        "prompts.jsonl",
        "result.json",
    ]


def test_the_gap_before_another_try_is_its_own_and_recorded_as_such(place):
    execution = {"cycles": 1, "config_gap_seconds": 7}
    place.runner(make_campaign(place.folder, execution=execution), {EIGHT: ["invalid", "ok"]}).run()
    assert [(item.identity["attempt"], item.gap_s) for item in place.requests] == [(1, None), (1, 7.0), (2, 7.0)]
    place.requests.clear()
    place.runner(make_campaign(place.folder, execution=execution), {FOUR: ["invalid", "ok"]}).run()
    assert [item.gap_s for item in place.requests] == [None, 7.0, 7.0]


def test_a_stop_in_the_gap_before_another_try_leaves_the_experiment_pending(tmp_path, monkeypatch):
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    place = Place(tmp_path, signal_at_s=30)
    execution = {"cycles": 1, "config_gap_seconds": 1000}
    outcome = place.runner(make_campaign(place.folder, execution=execution), {FOUR: ["invalid"]}).run()
    assert (outcome.stopped, outcome.signum) == (Stopped.SIGNAL, signal.SIGINT)
    assert _statuses(place) == ["pending", "pending"]
    assert place.asked() == [(FOUR, 1, 1)]
