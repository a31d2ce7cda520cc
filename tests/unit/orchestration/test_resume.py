"""What is left to run: resume or start afresh, and the cycles that --until adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import UserError
from lem.config.campaign_config import CampaignDaemonConfig
from lem.orchestration.manifest import Attempt, CampaignManifest, CampaignManifestEntry, ManifestManager
from lem.orchestration.resume import (
    RunOptions,
    adopt_environment,
    apply_plan,
    choose_manifest,
    interrupt_entry,
    make_rule,
    needs_cycle,
    reconcile,
)
from lem.orchestration.schedule import Stopped
from lem.results.aggregation import parse_target
from lem.results.store import read_stopping_rule
from tests.campaign_doubles import ENVIRONMENT, Place, make_campaign
from tests.records import make_record

NOW = datetime(2026, 7, 14, 10, tzinfo=timezone.utc)


def entry(exp_id: str = "a", **fields: Any) -> CampaignManifestEntry:
    values = {
        "exp_id": exp_id,
        "config_name": f"config {exp_id}",
        "config_path": f"configs/{exp_id}.yaml",
        "config_hash": exp_id,
        "backend": "pytorch",
        "container": None,
        "cycle_index": 0,
    }
    return CampaignManifestEntry(**{**values, **fields})


def manifest_of(*entries: CampaignManifestEntry) -> CampaignManifest:
    return ManifestManager(Path("nowhere"), now=lambda: NOW).create_manifest("0123abcd", "demo", "f00d", entries)


def result(attempt: int = 1, *, valid: bool = True) -> Attempt:
    return Attempt(attempt, f"attempt-{attempt}/result.json", valid, completed_at="later", host="node3")


def completed(exp_id: str = "a", attempt: int = 1) -> CampaignManifestEntry:
    path = result(attempt).result_path
    attempts = [Attempt(attempt, result_path=path, valid=True)]
    return entry(exp_id, status="completed", result_path=path, completed_at="then", attempts=attempts)


def on_disk(*results: Attempt) -> Callable[[CampaignManifestEntry], Sequence[Attempt]]:
    return lambda _: results


def changed(**names: list[str]) -> dict[str, list[str]]:
    return {"interrupted": [], "adopted": [], "lost": [], **names}


# What lies on disk against what the manifest says


def test_a_completed_experiment_with_its_result_is_left_alone() -> None:
    manifest = manifest_of(completed())
    assert reconcile(manifest, on_disk(result())) == changed()
    assert manifest.experiments == [completed()]


def test_a_completed_experiment_without_its_result_runs_again() -> None:
    manifest = manifest_of(completed())
    assert reconcile(manifest, on_disk()) == changed(lost=["a"])
    (found,) = manifest.experiments
    assert (found.status, found.result_path, found.completed_at) == ("pending", None, None)
    assert found.error == "result missing or broken: attempt-1/result.json"
    assert found.attempts[0].result_path is None


def test_a_completed_experiment_that_lost_its_result_has_an_older_valid_one() -> None:
    lost = completed(attempt=2)
    lost.put_attempt(Attempt(1, result_path=result(1).result_path, valid=True))
    manifest = manifest_of(lost)
    assert reconcile(manifest, on_disk(result(1))) == changed(adopted=["a"])
    assert lost.status == "completed"
    assert lost.result_path == "attempt-1/result.json"


def test_a_running_experiment_was_interrupted_and_runs_again() -> None:
    manifest = manifest_of(entry(status="running", attempts=[Attempt(1, started_at="then")]))
    assert reconcile(manifest, on_disk()) == changed(interrupted=["a"])
    (found,) = manifest.experiments
    assert (found.status, found.error) == ("pending", "interrupted")
    assert found.attempts == (Attempt(1, started_at="then", error="interrupted"),)


@pytest.mark.parametrize("status", ["running", "pending", "failed"])
def test_a_whole_result_that_the_manifest_missed_is_adopted(status: str) -> None:
    manifest = manifest_of(entry(status=status, error="x", attempts=[Attempt(1, started_at="then")]))
    assert reconcile(manifest, on_disk(result())) == changed(adopted=["a"])
    (found,) = manifest.experiments
    assert (found.status, found.error, found.result_path) == ("completed", None, "attempt-1/result.json")
    assert found.completed_at == "later"
    adopted = Attempt(1, "attempt-1/result.json", valid=True, started_at="then", completed_at="later", host="node3")
    assert found.attempts == (adopted,)


def test_a_missed_result_that_is_not_valid_is_kept_and_measured_again() -> None:
    manifest = manifest_of(entry(status="running", attempts=[Attempt(1)]))
    assert reconcile(manifest, on_disk(result(valid=False))) == changed(interrupted=["a"])
    (found,) = manifest.experiments
    assert (found.status, found.result_path) == ("pending", None)
    assert found.attempts[0].result_path == "attempt-1/result.json"
    assert found.attempts[0].valid is False


def test_a_second_result_that_is_not_valid_stands() -> None:
    first = Attempt(1, result_path=result(1).result_path, valid=False)
    manifest = manifest_of(entry(status="running", attempts=[first, Attempt(2)]))
    assert reconcile(manifest, on_disk(result(1, valid=False), result(2, valid=False))) == changed(adopted=["a"])
    assert manifest.experiments[0].result_path == "attempt-2/result.json"


def test_of_valid_results_the_last_is_chosen_as_the_tables_do() -> None:
    manifest = manifest_of(entry(status="running"))
    reconcile(manifest, on_disk(result(2), result(1), result(3, valid=False)))
    assert manifest.experiments[0].result_path == "attempt-2/result.json"


def test_a_valid_result_is_chosen_before_a_later_one_that_is_not() -> None:
    manifest = manifest_of(entry(status="running"))
    reconcile(manifest, on_disk(result(2, valid=False), result(1)))
    assert manifest.experiments[0].result_path == "attempt-1/result.json"


def test_a_failed_experiment_whose_results_are_known_stays_failed() -> None:
    known = Attempt(1, result_path=result(1).result_path, valid=False)
    manifest = manifest_of(entry(status="failed", error="died", attempts=[known, Attempt(2, error="died")]))
    assert reconcile(manifest, on_disk(result(1, valid=False))) == changed()
    assert manifest.experiments[0].error == "died"


def test_an_interruption_leaves_attempts_that_ended_alone() -> None:
    ended = [Attempt(1, error="died"), Attempt(2, result_path="x", valid=False)]
    found = entry(status="running", attempts=[*ended, Attempt(3)])
    interrupt_entry(found)
    assert found.attempts == (*ended, Attempt(3, error="interrupted"))


# An edited campaign


def change(kept: int, queued: int, removed: int) -> str:
    counts = f"{kept} experiments unchanged, {queued} new, {removed} removed (marked skipped)"
    return f"Campaign changed since the manifest was written: {counts}"


def test_an_unchanged_campaign_keeps_everything() -> None:
    manifest = manifest_of(completed("a"), entry("b"))
    assert apply_plan(manifest, [entry("a"), entry("b")], "f00d") == change(2, 0, 0)
    assert manifest.experiments == [completed("a"), entry("b")]


def test_an_edit_keeps_results_queues_the_new_and_skips_the_removed() -> None:
    manifest = manifest_of(completed("a"), completed("b"), entry("c", status="failed"))
    assert apply_plan(manifest, [entry("d"), entry("a")], "beef") == change(1, 1, 2)
    assert [(item.exp_id, item.status) for item in manifest.experiments] == [
        ("d", "pending"),
        ("a", "completed"),
        ("b", "skipped"),
        ("c", "skipped"),
    ]
    assert manifest.total_experiments == 2
    assert manifest.config_hash == "beef"


def test_an_experiment_that_comes_back_brings_its_result() -> None:
    manifest = manifest_of(completed("a"), entry("b"))
    apply_plan(manifest, [entry("b")], "1")
    assert apply_plan(manifest, [entry("a"), entry("b")], "2") == change(1, 1, 0)
    assert manifest.experiments == [completed("a"), entry("b")]


def test_an_experiment_removed_before_is_not_counted_again() -> None:
    manifest = manifest_of(entry("a"), entry("b"))
    apply_plan(manifest, [entry("b")], "1")
    assert apply_plan(manifest, [entry("b")], "2") == change(1, 0, 0)
    assert manifest.experiments[1].status == "skipped"


def test_a_new_name_and_place_are_taken_from_the_plan() -> None:
    manifest = manifest_of(completed("a"))
    apply_plan(manifest, [entry("a", config_name="better", config_path="p", order_index=5, container="c")], "1")
    (found,) = manifest.experiments
    assert (found.config_name, found.config_path, found.order_index, found.container) == ("better", "p", 5, "c")
    assert found.status == "completed"


# The environment


def test_the_first_environment_is_taken_over() -> None:
    manifest = manifest_of(entry())
    assert adopt_environment(manifest, {"driver": "580"}, is_change_allowed=False, now=NOW) == ()
    assert manifest.environment == {"driver": "580"}
    assert manifest.notes == []


def measured_under(environment: dict[str, Any]) -> CampaignManifest:
    manifest = manifest_of(completed())
    manifest.environment = dict(environment)
    return manifest


def test_the_same_environment_and_more_of_it_is_no_change() -> None:
    manifest = measured_under({"driver": "580", "gpu_uuids": ["GPU-1"]})
    assert adopt_environment(manifest, {"driver": "580", "vllm": "0.32"}, is_change_allowed=False, now=NOW) == ()
    assert manifest.environment == {"driver": "580", "gpu_uuids": ["GPU-1"], "vllm": "0.32"}


def test_another_environment_is_refused_with_both_values() -> None:
    manifest = measured_under({"driver": "580", "gpu_uuids": ["GPU-1"]})
    with pytest.raises(UserError) as error:
        adopt_environment(manifest, {"driver": "581", "gpu_uuids": []}, is_change_allowed=False, now=NOW)
    assert "driver: 580 before, 581 now; gpu_uuids: GPU-1 before, none now" in error.value.message
    assert "--allow-environment-change" in error.value.hint
    assert manifest.environment == {"driver": "580", "gpu_uuids": ["GPU-1"]}


def test_an_allowed_change_is_recorded() -> None:
    manifest = measured_under({"driver": "580"})
    adopt_environment(manifest, {"driver": None}, is_change_allowed=True, now=NOW)
    assert manifest.environment == {"driver": None}
    assert manifest.notes == [
        {
            "at": "2026-07-14T10:00:00.000000Z",
            "kind": "environment_change",
            "changes": ["driver: 580 before, unknown now"],
        }
    ]


def _manager(tmp_path, *statuses):
    manager = ManifestManager(tmp_path / "campaign_manifest.json")
    if statuses:
        entries = [
            CampaignManifestEntry(f"e{index}", "n", "p", "h", "pytorch", None, 0, status)
            for index, status in enumerate(statuses)
        ]
        manager.save(manager.create_manifest("id", "demo", "hash", entries))
    return manager


def _choose(manager, **options):
    """Whether it goes on with the manifest."""
    return choose_manifest(manager, "id", RunOptions(**options)) is not None


@pytest.mark.parametrize("resume", [True, False, None])
def test_without_a_manifest_every_start_is_fresh(tmp_path, resume):
    assert not _choose(_manager(tmp_path), resume=resume)


def test_a_complete_campaign_starts_afresh_without_resume(tmp_path):
    manager = _manager(tmp_path, "completed", "skipped")
    assert not _choose(manager, is_yes=True)
    assert _choose(manager, resume=True)


@pytest.mark.parametrize("status", ["pending", "running", "failed"])
def test_an_unfinished_campaign_is_resumed_with_yes_and_left_alone_without_anybody_to_ask(tmp_path, status):
    manager = _manager(tmp_path, "completed", status)
    assert _choose(manager, is_yes=True)
    with pytest.raises(UserError) as caught:
        _choose(manager)
    assert "--resume" in caught.value.hint
    assert "--fresh" in caught.value.hint


@pytest.mark.parametrize("answer", [True, False])
def test_a_person_is_asked(tmp_path, answer):
    asked = []

    def ask(question):
        asked.append(question)
        return answer

    assert _choose(_manager(tmp_path, "completed", "running", "failed", "skipped"), ask=ask) is answer
    assert "2 remaining (1 completed, 1 failed)" in asked[0]


def test_an_unreadable_manifest_stops_everything_but_a_fresh_start(tmp_path):
    manager = _manager(tmp_path)
    manager.manifest_path.write_text('{"schema_version": 1, "campaign')
    for resume in (None, True):
        with pytest.raises(UserError) as caught:
            _choose(manager, resume=resume, is_yes=True)
        assert "campaign_manifest.json" in caught.value.message
        assert "--fresh" in caught.value.hint
    assert not _choose(manager, resume=False)


def test_another_campaigns_manifest_is_refused(tmp_path):
    manager = _manager(tmp_path, "completed")
    with pytest.raises(UserError, match="belongs to another campaign"):
        choose_manifest(manager, "other", RunOptions(resume=True))


def test_a_planned_run_is_gone_on_with_and_another_one_set_aside(tmp_path):
    manager = _manager(tmp_path)
    manifest = manager.create_manifest("id", "demo", "hash", [])
    manifest.run_id = "planned"
    manager.save(manifest)
    assert _choose(manager, run_id="planned")
    assert not _choose(manager, run_id="another")
    with pytest.raises(UserError, match="belongs to run planned"):
        _choose(manager, resume=True, run_id="another")


FOUR, EIGHT = "pytorch-max_output_tokens=4", "pytorch-max_output_tokens=8"


# ±2.1 % with five of them, ±1.6 % with six (t 2.78 and 2.57, over the root of n).

NOISY = [98.3, 101.7, 98.3, 101.7, 100.0, 100.0, 100.0, 100.0]


def _rule(text="ci=2%", max_cycles=None):
    return make_rule(parse_target(text), max_cycles)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    return Place(tmp_path)


def _run(place, campaign, answers=None, *, rule=None, deadline_s=None, resume=None):
    options = RunOptions(until=rule or _rule(), resume=resume)
    return place.runner(campaign, answers, options=options).run(deadline_s=deadline_s)


def _cycles(place):
    return [cycle for _, cycle, _ in place.asked()]


def test_five_cycles_are_run_at_least_and_no_more_where_they_are_enough(place):
    outcome = _run(place, make_campaign(place.folder, execution={"cycles": 2}))
    assert sorted(set(_cycles(place))) == [1, 2, 3, 4, 5]
    assert outcome.stopped is None
    assert outcome.remark == (
        "Top-up: every interval is within ±2 % (output_tok_per_s, 95 % t interval) after 5 cycles"
    )
    assert place.manifest().total_experiments == 10


def test_whole_cycles_are_added_until_every_configuration_is_narrow(place):
    outcome = _run(place, make_campaign(place.folder), {FOUR: list(NOISY)})
    assert place.asked()[10:] == [(FOUR, 6, 1), (EIGHT, 6, 1)]
    manifest = place.manifest()
    assert (manifest.total_experiments, manifest.is_complete) == (12, True)
    assert [entry.order_index for entry in manifest.experiments] == list(range(12))
    assert outcome.remark.endswith("after 6 cycles")
    assert [note["cycles"] for note in manifest.notes] == [6]


def test_the_most_cycles_end_it(place):
    answers = {FOUR: [90.0, 110.0] * 10}
    outcome = _run(place, make_campaign(place.folder), answers, rule=_rule(max_cycles=7))
    assert max(_cycles(place)) == 7
    assert outcome.stopped is None
    assert "7 cycles is the maximum" in outcome.remark
    assert FOUR in outcome.remark


def test_an_added_cycle_has_the_cycle_gap_before_it(place):
    campaign = make_campaign(place.folder, execution={"cycles": 5, "cycle_gap_seconds": 30})
    _run(place, campaign, {FOUR: list(NOISY)})
    assert [gap["gap"] for gap in place.told("gap")] == ["cycle"] * 5


def test_a_shuffled_campaign_goes_on_in_the_order_a_longer_one_has(place):
    shuffled = {"structure": "shuffled", "cycles": 5}
    _run(place, make_campaign(place.folder, outputs=(4, 8, 16), execution=shuffled), {FOUR: list(NOISY)})
    longer = make_campaign(place.folder, outputs=(4, 8, 16), execution={**shuffled, "cycles": 6})
    order = place.runner(longer).generate_execution_order()
    assert [entry.exp_id for entry in place.manifest().experiments] == [item.exp_id for item in order]


def test_after_the_time_is_up_no_cycle_is_added(place):
    # Ten experiments of ten seconds each: it passes while the last of them runs.
    deadline_s = place.clock.monotonic() + 95
    outcome = _run(place, make_campaign(place.folder), {FOUR: list(NOISY)}, deadline_s=deadline_s)
    assert outcome.stopped is Stopped.DEADLINE
    assert place.manifest().total_experiments == 10


def test_a_resume_keeps_the_cycles_that_were_added_and_ends_as_if_never_interrupted(place):
    campaign = make_campaign(place.folder)
    deadline_s = place.clock.monotonic() + 105  # in the first experiment of the sixth cycle
    first = _run(place, campaign, {FOUR: list(NOISY)}, deadline_s=deadline_s)
    assert first.stopped is Stopped.DEADLINE
    assert place.manifest().total_experiments == 12
    second = _run(place, campaign, {FOUR: [100.0]}, resume=True)
    assert place.asked() == [(EIGHT, 6, 1)]
    assert second.remark.endswith("after 6 cycles")
    assert not any("changed since" in note["text"] for note in place.told("note"))


def test_a_resume_without_the_target_runs_what_was_added_and_adds_nothing(place):
    campaign = make_campaign(place.folder, execution={"cycles": 5})
    _run(place, campaign, {FOUR: list(NOISY)}, deadline_s=place.clock.monotonic() + 105)
    place.runner(campaign, options=RunOptions(resume=True)).run()
    assert place.asked() == [(EIGHT, 6, 1)]
    assert place.manifest().is_complete


def test_a_finished_campaign_is_topped_up_when_it_is_resumed_with_a_target(place):
    campaign = make_campaign(place.folder, execution={"cycles": 5})
    place.runner(campaign, {FOUR: list(NOISY)}).run()
    outcome = _run(place, campaign, {FOUR: [100.0]}, resume=True)
    assert place.asked() == [(FOUR, 6, 1), (EIGHT, 6, 1)]
    assert outcome.remark.endswith("after 6 cycles")


def test_another_environment_is_found_out_before_a_finished_campaign_is_topped_up(place):
    campaign = make_campaign(place.folder, execution={"cycles": 5})
    place.runner(campaign, {FOUR: list(NOISY)}).run()
    before = place.manifest()
    options = RunOptions(until=_rule(), resume=True)
    other = {**ENVIRONMENT, "torch": "9.9.9"}
    with pytest.raises(UserError, match="environment"):
        place.runner(campaign, options=options, environment=other).run()
    assert place.manifest().total_experiments == before.total_experiments


def test_a_configuration_that_never_gives_a_result_does_not_keep_it_going(place):
    outcome = _run(place, make_campaign(place.folder), {EIGHT: ["invalid"]})
    assert max(_cycles(place)) == 5
    assert outcome.remark.endswith(f"; ignored, without an interval: {EIGHT} (no valid result)")


def test_cycles_that_share_a_load_never_have_an_interval_and_end_it():
    records = [make_record(cycle=cycle, load_id="one") for cycle in range(5)]
    is_needed, reason = needs_cycle(records, _rule(), 5)
    assert not is_needed
    assert "no cycle is added" in reason
    assert "share an engine load" in reason


def test_the_rule_lies_beside_the_results(place):
    _run(place, make_campaign(place.folder), rule=_rule("ci=3%:e2e_p50_s", 9))
    folder = place.folder / "results" / "demo" / str(place.manifest().run_id)
    assert read_stopping_rule(folder) == _rule("ci=3%:e2e_p50_s", 9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"execution": {"structure": "grouped"}}, "grouped"),
        ({"execution": {"reuse": "campaign"}}, "intervals"),
        ({"execution": {"cycles": 9}}, "more than --max-cycles 8"),
        ({"daemon": CampaignDaemonConfig(enabled=True)}, "daemon"),
    ],
)
def test_what_cannot_be_topped_up_is_refused_before_anything_is_written(place, changes, words):
    with pytest.raises(UserError, match=words):
        _run(place, make_campaign(place.folder, **changes), rule=_rule(max_cycles=8))
    assert not (place.folder / "state").exists()


@pytest.mark.parametrize("most", [0, 4, 21])
def test_the_most_cycles_lie_between_five_and_twenty(most):
    with pytest.raises(UserError, match="expected 5 to 20"):
        make_rule(parse_target("ci=2%"), most)


def test_the_widest_are_named_first_and_many_are_counted():
    records = [
        make_record(config_name=f"c{width}", config_hash=f"{width:016x}", cycle=cycle, output_tok_per_s=rate)
        for width in (3, 9, 5, 7)
        for cycle, rate in enumerate([100.0 - width, 100.0 + width] * 3)
    ]
    is_needed, reason = needs_cycle(records, _rule(), 6)
    assert is_needed
    assert reason.endswith("c9 ±11 %, c7 ±8.4 %, c5 ±5.9 % and 1 more")


def test_energy_is_looked_at_where_every_configuration_has_it():
    records = [make_record(cycle=cycle, energy_per_output_tok_j=0.5) for cycle in range(5)]
    assert "energy_per_output_tok_j" in needs_cycle(records, _rule(), 5)[1]
    without = [*records, *(make_record(config_name="b", config_hash="b" * 16, cycle=cycle) for cycle in range(5))]
    assert "output_tok_per_s" in needs_cycle(without, _rule(), 5)[1]


def test_too_few_valid_cycles_are_wide_even_where_they_agree():
    records = [make_record(cycle=cycle, is_valid=cycle < 4) for cycle in range(5)]
    assert needs_cycle(records, _rule(), 5)[0]


@pytest.mark.parametrize("text", ["2%", "ci=2", "ci=0%", "ci=100%", "ci=2%:nothing", "ci=-1%", ""])
def test_a_target_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=repr(text)):
        parse_target(text)


def test_a_target_may_name_its_metric():
    assert dataclasses.astuple(parse_target("ci=0.5%:ttft_p50_s")) == (0.005, "ttft_p50_s")
