"""What a session does with experiments that fail, with gaps, deadlines, disks and health, and what it writes down."""

import errno
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from lem.base.errors import EngineError, InfrastructureError, UserError
from lem.base.reasons import Reason
from lem.cli.campaign_run import exit_code_of_outcome
from lem.config.campaign_config import CampaignDaemonConfig, CampaignHealthCheckConfig
from lem.orchestration.manifest import Attempt
from lem.orchestration.plan import build_plan
from lem.orchestration.resume import RunOptions, make_rule
from lem.orchestration.schedule import Scheduler, Stopped
from lem.orchestration.session import Measurement
from lem.orchestration.systemd import find_secrets
from lem.results.stopping import parse_target
from tests.campaign_doubles import EIGHT, FOUR, LoadError, Place, make_campaign, write_result
from tests.records import make_record

ONCE = {"cycles": 1}
DIED = EngineError("the engine died", "look at the log", kind="died")


def test_every_experiment_runs_once_in_the_order_of_the_plan_in_one_worker(place):
    outcome = place.run()
    assert place.asked() == [(FOUR, 1, 1), (EIGHT, 1, 1), (EIGHT, 2, 1), (FOUR, 2, 1)]
    assert place.statuses() == ["completed"] * 4
    assert (outcome.stopped, outcome.error, outcome.signum) == (None, None, None)
    pairs = ["experiment_started", "experiment_completed"] * 4
    assert place.kinds() == ["campaign_started", *pairs, "campaign_finished"]
    assert place.executor.worker.opened == 1
    assert place.executor.calls[-2:] == ["stop", "close"]


@pytest.mark.parametrize(
    ("reuse", "kept"),
    [
        ("cycle", [True, False, True, False]),
        ("campaign", [True, True, True, False]),
        ("none", [False, False, False, False]),
    ],
)
def test_the_engine_is_kept_for_as_long_as_the_campaign_says(place, reuse, kept):
    place.run(execution={"reuse": reuse})
    assert [request.keep_engine for request in place.requests] == kept


# --- gaps and time


def test_the_cycle_gap_takes_the_place_of_the_configuration_gap(place):
    place.run(execution={"config_gap_seconds": 5, "cycle_gap_seconds": 30})
    assert sum(place.stop.waits) == 40.0
    assert [request.gap_s for request in place.requests] == [None, 5.0, 30.0, 5.0]
    gaps = [(data["gap"], data["cap_s"]) for data in place.told("gap")]
    assert gaps == [("configuration", 5.0), ("cycle", 30.0), ("configuration", 5.0)]


def test_a_gap_is_told_while_it_lasts(place):
    place.run(execution={"cycles": 1, "config_gap_seconds": 12})
    assert [data["left_s"] for data in place.told("tick")] == [12.0, 7.0, 2.0]


def test_the_gap_before_another_try_is_its_own_and_recorded_as_such(place):
    execution = {"cycles": 1, "config_gap_seconds": 7}
    place.run({EIGHT: ["invalid", "ok"]}, execution=execution)
    assert [(item.identity["attempt"], item.gap_s) for item in place.requests] == [(1, None), (1, 7.0), (2, 7.0)]
    place.run({FOUR: ["invalid", "ok"]}, execution=execution)
    assert [item.gap_s for item in place.requests] == [None, 7.0, 7.0]


@pytest.mark.parametrize(
    ("reason", "rate", "is_tried_again"),
    [
        (Reason.of("no_output"), 0.0, False),
        (Reason.of("requests_failed", failed=8, total=8, first="too long"), 0.0, False),
        (Reason.of("requests_failed", failed=4, total=8, first="too long"), 100.0, True),
        (Reason.of("none_completed", arrived=8), 0.0, True),
    ],
)
def test_a_result_without_any_output_is_not_measured_again(reason, rate, is_tried_again):
    record = make_record(is_valid=False, output_tok_per_s=rate)
    record = replace(record, validity=replace(record.validity, invalid_reasons=(reason,)))
    found = Measurement(Attempt(1), record).reason_to_try_again
    assert found == (reason.text if is_tried_again else None)


NO_MODEL = LoadError("no such model", kind="model", is_permanent=True)
NO_MEMORY = LoadError("out of memory", kind="out_of_memory", is_permanent=True)


def test_a_failure_without_a_window_costs_no_gap(place):
    execution = {"cycles": 2, "structure": "interleaved", "config_gap_seconds": 5, "cycle_gap_seconds": 30}
    place.run({EIGHT: [NO_MODEL]}, outputs=(4, 8, 16), execution=execution)
    # 5 s after 4, none after 8, 30 s after 16, and the same again.
    assert [request.gap_s for request in place.requests] == [None, 5.0, 5.0, 30.0, 5.0, 5.0]
    assert place.clock.elapsed_s == 4 * 10 + 2 * 2 + 5 + 30 + 5


def test_the_cycle_gap_is_kept_in_full_after_a_failure_without_a_window(place):
    execution = {"cycles": 2, "structure": "interleaved", "config_gap_seconds": 5, "cycle_gap_seconds": 30}
    place.run({EIGHT: [NO_MODEL]}, execution=execution)
    assert [(data["gap"], data["cap_s"]) for data in place.told("gap")][:2] == [("configuration", 5.0), ("cycle", 25.0)]
    assert [request.gap_s for request in place.requests] == [None, 5.0, 30.0, 5.0]


def test_another_attempt_after_one_without_a_window_follows_at_once(place):
    place.run({EIGHT: [LoadError("busy"), "ok"]}, execution={"cycles": 1, "config_gap_seconds": 7})
    assert [(item.identity["attempt"], item.gap_s) for item in place.requests] == [(1, None), (1, 7.0), (2, 7.0)]
    assert len(place.told("gap")) == 1
    place.run({FOUR: [LoadError("busy"), "ok"]}, execution={"cycles": 1, "config_gap_seconds": 7})
    assert [item.gap_s for item in place.requests] == [None, None, 7.0]


@pytest.mark.parametrize(
    ("signal_at_s", "execution", "answers", "statuses"),
    [
        (12.0, {"config_gap_seconds": 5}, {}, ["completed", "pending", "pending", "pending"]),
        (15.0, {}, {}, ["completed", "pending", "pending", "pending"]),
        (30.0, {"cycles": 1, "config_gap_seconds": 1000}, {FOUR: ["invalid"]}, ["pending", "pending"]),
    ],
    ids=["in a gap", "in an experiment", "in the gap before another try"],
)
def test_a_signal_starts_nothing_more_and_leaves_the_rest_pending(
    place, signal_at_s, execution, answers, statuses, tmp_path
):
    place = Place(tmp_path, signal_at_s=signal_at_s)
    outcome = place.run(answers, execution=execution)
    assert (outcome.stopped, outcome.signum) == (Stopped.SIGNAL, signal.SIGINT)
    assert place.statuses() == statuses
    assert place.clock.elapsed_s == signal_at_s
    is_interrupted = signal_at_s > 12
    assert ("experiment_interrupted" in place.kinds()) is is_interrupted
    assert ("interrupted" in [entry.error for entry in place.manifest().experiments]) is is_interrupted


@pytest.mark.parametrize(
    ("gap_s", "elapsed_s", "statuses"),
    [
        (0, 20.0, ["completed", "completed", "pending", "pending"]),  # the running one finishes
        (60, 15.0, ["completed", "pending", "pending", "pending"]),  # a gap does not outlast the deadline
    ],
)
def test_no_experiment_begins_after_the_deadline(place, gap_s, elapsed_s, statuses):
    outcome = place.run(deadline_s=15, execution={"config_gap_seconds": gap_s})
    assert outcome.stopped is Stopped.DEADLINE
    assert (place.clock.elapsed_s, place.statuses()) == (elapsed_s, statuses)


def test_the_end_that_is_told_stays_the_same_from_the_first_result_on(place):
    place.run(execution={"cycles": 3, "config_gap_seconds": 8, "cycle_gap_seconds": 27})
    # 6 experiments of 10 s; the first one has no gap before it.
    assert place.clock.elapsed_s == 6 * 10 + 3 * 8 + 2 * 27
    told = [event.eta_s for event in place.events]
    assert told[:3] == [None] * 3  # started, its first experiment, its window
    assert told[3:] == sorted(told[3:], reverse=True)
    first, last = place.events[3], place.events[-1]
    assert (first.kind, first.eta_s, last.eta_s) == ("experiment_completed", pytest.approx(128.0), 0.0)
    in_gap = [event.eta_s for event in place.events if event.kind == "tick"][:2]
    assert in_gap == pytest.approx([128.0, 123.0])


# --- failures


@pytest.mark.parametrize(
    ("answers", "status", "error", "chosen", "attempts"),
    [
        ([DIED, "ok"], "completed", None, 2, [("the engine died", None), (None, True)]),
        ([DIED], "failed", "the engine died", None, [("the engine died", None), ("the engine died", None)]),
        (["invalid", "ok"], "completed", None, 2, [(None, False), (None, True)]),
        (["invalid"], "completed", None, 2, [(None, False), (None, False)]),
        (["invalid", DIED], "completed", None, 1, [(None, False), ("the engine died", None)]),
    ],
)
def test_what_may_work_the_second_time_is_tried_twice_inside_its_cycle(place, answers, status, error, chosen, attempts):
    outcome = place.run({FOUR: answers}, execution=ONCE)
    assert place.asked() == [(FOUR, 1, 1), (FOUR, 1, 2), (EIGHT, 1, 1)]
    assert outcome.stopped is None
    entry = place.manifest().experiments[0]
    assert (entry.status, entry.retry_count, entry.error) == (status, 1, error)
    assert entry.result_path == (None if chosen is None else entry.attempts[chosen - 1].result_path)
    assert [(item.error, item.valid) for item in entry.attempts] == attempts
    assert all((place.folder / str(item.result_path)).is_file() for item in entry.attempts if item.result_path)


@pytest.mark.parametrize("structure", ["interleaved", "balanced"])
def test_a_campaign_ends_when_every_configuration_has_failed_in_the_same_way(place, structure):
    outcome = place.run({FOUR: [NO_MODEL], EIGHT: [NO_MODEL]}, execution={"cycles": 3, "structure": structure})
    assert place.statuses() == ["failed", "failed", *["pending"] * 4]
    assert (outcome.stopped, exit_code_of_outcome(outcome)) == (Stopped.ALL_FAILED, 1)
    assert outcome.error.message.startswith("every configuration failed in the same way (in phase load)")
    assert outcome.error.message.endswith(": no such model")


@pytest.mark.parametrize(
    "answers",
    [
        {FOUR: [NO_MODEL], EIGHT: [NO_MEMORY]},
        {FOUR: [NO_MODEL], EIGHT: [EngineError("no such model", kind="model", is_permanent=True)]},  # in its window
        {FOUR: [NO_MODEL], EIGHT: ["invalid"]},
        {FOUR: [NO_MODEL]},
    ],
    ids=["another kind", "another phase", "an invalid result", "a result"],
)
def test_a_campaign_goes_on_while_its_configurations_end_differently(place, answers):
    outcome = place.run(answers, execution={"cycles": 2})
    assert outcome.stopped is None
    assert len(place.told("experiment_started")) == 4


def test_a_resumed_campaign_with_results_goes_on_although_all_that_is_left_fails(place):
    place.run({EIGHT: [NO_MODEL]})
    assert place.statuses() == ["completed", "failed", "failed", "completed"]
    outcome = place.run({EIGHT: [NO_MODEL]}, options=RunOptions(resume=True))
    assert (outcome.stopped, len(place.requests)) == (None, 2)


def test_a_part_of_a_plan_ends_when_all_of_its_own_configurations_fail(place):
    campaign = make_campaign(place.folder)
    plan = build_plan(campaign)
    part = replace(plan, experiments=tuple(item for item in plan.experiments if item.config_name == FOUR))
    outcome = place.runner(campaign, {FOUR: [NO_MODEL]}, plan=part).run()
    assert (outcome.stopped, place.asked()) == (Stopped.ALL_FAILED, [(FOUR, 1, 1)])


def test_a_daemon_does_not_run_again_what_failed_in_every_configuration(place):
    daemon = CampaignDaemonConfig(enabled=True, interval="1h", total_duration="1d")
    campaign = make_campaign(place.folder, daemon=daemon)
    runner = place.runner(campaign, {FOUR: [NO_MODEL], EIGHT: [NO_MODEL]})
    scheduler = Scheduler(campaign, place.stop, lambda _text: None, place.clock.now, place.clock.monotonic)
    outcome = scheduler.run(lambda deadline_s: runner.run(deadline_s=deadline_s))
    assert outcome is not None
    assert (outcome.stopped, len(place.requests)) == (Stopped.ALL_FAILED, 2)


def test_fail_fast_comes_before_the_end_of_a_campaign_that_cannot_work(place):
    answers = {FOUR: [NO_MODEL], EIGHT: [NO_MODEL]}
    outcome = place.run(answers, execution={"cycles": 2}, options=RunOptions(is_fail_fast=True))
    assert (outcome.stopped, len(place.requests)) == (Stopped.FAIL_FAST, 1)


def test_no_cycles_are_added_to_a_campaign_in_which_everything_fails(place):
    until = make_rule(parse_target("ci=2%"), None)
    outcome = place.run({FOUR: [NO_MODEL], EIGHT: [NO_MODEL]}, options=RunOptions(until=until))
    assert (outcome.stopped, len(place.requests)) == (Stopped.ALL_FAILED, 2)


def test_a_failure_is_told_with_what_helps_to_look_into_it(place):
    place.run({FOUR: [DIED]}, execution=ONCE)
    assert place.told("experiment_retried")[0]["reason"] == "the engine died"
    told = place.told("experiment_failed")[0]
    assert (told["error"], told["hint"], told["error_kind"]) == ("the engine died", "look at the log", "died")
    assert told["log_tail"] == "last words"


def test_a_result_that_is_never_valid_is_told_with_its_reason(place):
    place.run({FOUR: ["invalid"]}, execution=ONCE)
    told = place.told("experiment_completed")[0]
    assert (told["valid"], told["invalid_reasons"]) == (False, ["it was too hot"])


def write_another(request):
    write_result(request, attempt=7)
    return "none"


def die_late(request):
    write_result(request)
    return EngineError("the worker was killed by SIGKILL", kind="died")


@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [
        ("none", "failed", "the worker reported a result but did not write one"),
        (write_another, "failed", "the result belongs to another experiment"),
        (die_late, "completed", ""),
    ],
)
def test_the_result_on_disk_counts_whatever_the_worker_says(place, answer, status, error):
    place.run({FOUR: [answer]}, execution=ONCE)
    entry = place.manifest().experiments[0]
    assert (entry.status, str(entry.error or "").endswith(error)) == (status, True)


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (EngineError("cannot write result.json: no space left on device", "make room", kind="full"), "make room"),
        (UserError("python: no such program", "install it"), "install it"),
    ],
    ids=["a full results disk", "a worker that cannot be started any more"],
)
def test_what_every_experiment_would_meet_stops_the_campaign_with_the_rest_pending(place, error, hint):
    outcome = place.run({EIGHT: [error]})
    assert outcome.stopped is Stopped.INFRASTRUCTURE
    assert isinstance(outcome.error, InfrastructureError)
    assert (outcome.error.message, outcome.error.hint) == (error.message, hint)
    assert place.statuses() == ["completed", "pending", "pending", "pending"]
    assert place.manifest().experiments[1].error == error.message


READ_ONLY = OSError(errno.EROFS, "Read-only file system", "results/e/samples.part")


def fail_after_the_result(request):
    write_result(request)
    return READ_ONLY


@pytest.mark.parametrize(
    ("answers", "status", "error"),
    [
        ([READ_ONLY, "ok"], "completed", None),
        ([fail_after_the_result], "completed", None),
        ([READ_ONLY], "failed", "the host failed during the attempt: results/e/samples.part: read-only file system"),
        ([OSError(errno.EMFILE, "Too many open files")], "failed", "during the attempt: too many open files"),
        ([MemoryError()], "failed", "lem ran out of memory"),
    ],
)
def test_an_error_of_the_host_at_the_end_of_an_attempt_is_a_failed_attempt(place, answers, status, error):
    outcome = place.run({FOUR: answers}, execution=ONCE)
    assert (outcome.stopped, place.statuses()) == (None, [status, "completed"])
    entry = place.manifest().experiments[0]
    assert str(entry.error).endswith(str(error))
    if status == "failed":
        assert (len(entry.attempts), place.told("experiment_failed")[0]["error_kind"]) == (2, "host")


def test_a_disk_that_is_full_at_the_end_of_an_attempt_stops_the_campaign(place):
    outcome = place.run({EIGHT: [OSError(errno.ENOSPC, "No space left on device", "results/x")]}, execution=ONCE)
    assert outcome.stopped is Stopped.INFRASTRUCTURE
    assert outcome.error is not None
    assert (outcome.error.message, "--resume" in outcome.error.hint) == ("results/x: no space left on device", True)
    assert place.statuses() == ["completed", "pending"]


def test_results_that_are_deleted_while_the_campaign_runs_do_not_end_it(place):
    def delete(request):
        shutil.rmtree(place.folder / "results")
        return "none"

    outcome = place.run({FOUR: [delete, "ok"]}, execution=ONCE)
    assert (outcome.stopped, place.statuses()) == (None, ["completed", "completed"])


def test_a_results_folder_that_becomes_a_file_stops_the_campaign_with_the_remedy(place):
    def replace(request):
        shutil.rmtree(place.folder / "results")
        (place.folder / "results").write_text("")
        return "none"

    outcome = place.run({FOUR: [replace]}, execution=ONCE)
    assert outcome.stopped is Stopped.INFRASTRUCTURE
    assert outcome.error is not None
    assert "expected a folder, found a file" in outcome.error.message
    assert "--results-dir" in outcome.error.hint
    assert place.statuses() == ["pending", "pending"]


# --- prompts, identity, secrets


@pytest.mark.parametrize(
    ("text", "error"), [(None, "prompts.txt"), ("three\nfour\n", "changed since the campaign was planned")]
)
def test_prompts_that_are_gone_or_changed_fail_their_experiment_alone_and_at_once(place, text, error):
    prompts = place.folder / "prompts.txt"
    prompts.write_text("one\ntwo\n")

    def edit(request):
        prompts.unlink() if text is None else prompts.write_text(text)
        return "ok"

    shared = {"prompts": [{"type": "file", "path": str(prompts)}]}
    assert place.run({FOUR: [edit]}, shared=shared, execution=ONCE).stopped is None
    assert place.statuses() == ["completed", "failed"]
    assert place.asked() == [(FOUR, 1, 1)]
    told = place.told("experiment_failed")[0]
    assert told["error_kind"] == "prompts"
    assert error in told["error"]


def test_a_chat_template_is_copied_for_the_worker_and_one_that_changes_fails_its_experiment(place):
    template = place.folder / "own.jinja"
    template.write_text("{{ messages }}")

    def edit(request):
        copy = Path(request.result_dir) / "chat_template.jinja"
        assert copy.read_text() == "{{ messages }}"
        template.write_text("{{ messages }}!")
        return "ok"

    assert place.run({FOUR: [edit]}, shared={"chat_template": [str(template)]}, execution=ONCE).stopped is None
    assert place.statuses() == ["completed", "failed"]
    assert f"changed since the campaign was planned: {template}" in place.told("experiment_failed")[0]["error"]


def test_secrets_come_from_the_environment_or_a_credential_and_from_nowhere_else(tmp_path):
    folder = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert find_secrets({}) == find_secrets({**folder, "HF_TOKEN": ""}) == {}
    (tmp_path / "HF_TOKEN").write_text("from-systemd\n")
    assert find_secrets(folder) == {"HF_TOKEN": "from-systemd"}
    assert find_secrets({**folder, "HF_TOKEN": "from-here"}) == {"HF_TOKEN": "from-here"}
    (tmp_path / "HF_TOKEN").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"credential .*HF_TOKEN: not UTF-8 text"):
        find_secrets(folder)


def test_a_credential_that_cannot_be_used_is_found_before_anything_is_started_or_written(place, monkeypatch):
    place.run()
    path = place.folder / "state" / "demo" / "campaign_manifest.json"
    before = path.read_bytes()
    (place.folder / "HF_TOKEN").write_bytes(b"\xff\xfe")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(place.folder))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    runner = place.runner(make_campaign(place.folder), options=RunOptions(resume=False))
    for begin in (runner.check, runner.run):
        with pytest.raises(UserError, match="not UTF-8 text"):
            begin()
    assert [found.name for found in path.parent.glob("campaign_manifest*.json")] == [path.name]
    assert path.read_bytes() == before


# --- the health of containers


@pytest.mark.parametrize(
    ("structure", "health", "checks"),
    [
        ("interleaved", {}, 3),
        ("grouped", {}, 2),
        ("interleaved", {"interval_experiments": 1}, 6),
        ("interleaved", {"interval_experiments": 3}, 4),
        ("interleaved", {"enabled": False, "interval_experiments": 1}, 0),
    ],
)
def test_containers_are_checked_once_a_cycle_or_block_and_every_so_many_experiments(place, structure, health, checks):
    execution = {"cycles": 3, "structure": structure}
    place.run(execution=execution, health_check=CampaignHealthCheckConfig(**health))
    assert place.executor.calls.count("look_after") == checks


@pytest.mark.parametrize("error", [InfrastructureError("lost"), UserError("lost")])
def test_what_cannot_be_made_well_stops_the_campaign_with_the_rest_pending(place, error):
    runner = place.runner(make_campaign(place.folder))
    place.executor.look_error = error
    outcome = runner.run()
    assert outcome.stopped is Stopped.INFRASTRUCTURE
    assert outcome.error is not None
    assert outcome.error.message == "lost"
    assert outcome.manifest.pending_count == 4
