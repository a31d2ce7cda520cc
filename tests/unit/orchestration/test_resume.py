"""What is left to run: resume or start afresh, and the cycles that --until adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
from lem.results.run import make_run
from lem.results.stopping import parse_target, read_stopping_rule
from tests.campaign_doubles import EIGHT, ENVIRONMENT, FOUR, make_campaign
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


# What lies on disk against what the manifest says

PATH = "attempt-1/result.json"
BROKEN = f"result missing, or not as it was measured: {PATH}"
KNOWN = Attempt(1, PATH, valid=False)  # a result that is not valid
DIED = entry(status="failed", error="died", attempts=[KNOWN, Attempt(2, error="died")])


def adopted(*results: Attempt, chosen: int = 1, before: Sequence[Attempt] = ()) -> CampaignManifestEntry:
    path = result(chosen).result_path
    return entry(status="completed", result_path=path, completed_at="later", attempts=[*before, *results])


def begun(status: str) -> CampaignManifestEntry:
    return entry(status=status, error="x", attempts=[Attempt(1, started_at="then")])


@pytest.mark.parametrize(
    ("before", "results", "change", "after"),
    [
        (completed(), [result()], None, completed()),
        # A completed experiment without its result runs again, unless it has an older one.
        (completed(), [], "lost", entry(error=BROKEN, attempts=[Attempt(1, error=BROKEN)])),
        (
            entry(
                status="completed",
                result_path=PATH,
                completed_at="x",
                attempts=[Attempt(1, PATH, True)],
            ),
            [result(2)],
            "adopted",
            adopted(result(2), chosen=2, before=[Attempt(1, error=BROKEN)]),
        ),
        # A running one was interrupted.
        (
            begun("running"),
            [],
            "interrupted",
            entry(error="interrupted", attempts=[Attempt(1, started_at="then", error="interrupted")]),
        ),
        # A whole result that the manifest missed is adopted.
        *(
            (begun(status), [result()], "adopted", adopted(dataclasses.replace(result(), started_at="then")))
            for status in ("running", "pending", "failed")
        ),
        # One that is not valid is kept and measured again; a second one stands.
        (
            entry(status="running", attempts=[Attempt(1)]),
            [result(valid=False)],
            "interrupted",
            entry(error="interrupted", attempts=[result(valid=False)]),
        ),
        (
            entry(status="running", attempts=[KNOWN, Attempt(2)]),
            [result(1, valid=False), result(2, valid=False)],
            "adopted",
            adopted(result(2, valid=False), chosen=2, before=[KNOWN]),
        ),
        # Of valid results the last is chosen, as the tables do, also before a later one that is not.
        (
            entry(status="running"),
            [result(2), result(1), result(3, valid=False)],
            "adopted",
            adopted(result(1), result(2), result(3, valid=False), chosen=2),
        ),
        (
            entry(status="running"),
            [result(2, valid=False), result(1)],
            "adopted",
            adopted(result(1), result(2, valid=False)),
        ),
        # A failed experiment whose results are known stays failed.
        (DIED, [result(1, valid=False)], None, dataclasses.replace(DIED)),
    ],
)
def test_a_manifest_is_corrected_by_the_whole_results_on_disk(
    before: CampaignManifestEntry, results: list[Attempt], change: str | None, after: CampaignManifestEntry
) -> None:
    manifest = manifest_of(before)
    changes = reconcile(manifest, lambda _: results)
    assert {name: ids for name, ids in changes.items() if ids} == ({change: ["a"]} if change else {})
    assert manifest.experiments == [after]


def test_an_interruption_leaves_attempts_that_ended_alone() -> None:
    ended = [Attempt(1, error="died"), Attempt(2, result_path="x", valid=False)]
    found = entry(status="running", attempts=[*ended, Attempt(3)])
    interrupt_entry(found)
    assert found.attempts == (*ended, Attempt(3, error="interrupted"))


# An edited campaign


def change(kept: int, queued: int, removed: int) -> str:
    counts = f"{kept} experiments unchanged, {queued} new, {removed} removed (marked skipped)"
    return f"Campaign changed since the manifest was written: {counts}"


def test_an_experiment_that_comes_back_brings_its_result_and_one_removed_before_is_not_counted_again() -> None:
    manifest = manifest_of(completed("a"), entry("b"))
    planned = [entry("a"), entry("b")]
    assert apply_plan(manifest, planned, "f00d") == change(2, 0, 0)
    assert apply_plan(manifest, planned[1:], "1") == change(1, 0, 1)
    assert apply_plan(manifest, planned[1:], "2") == change(1, 0, 0)
    assert manifest.experiments[1].status == "skipped"
    assert apply_plan(manifest, planned, "3") == change(1, 1, 0)
    assert manifest.experiments == [completed("a"), entry("b")]


def test_a_new_name_and_place_are_taken_from_the_plan() -> None:
    manifest = manifest_of(completed("a"))
    named = {"config_name": "better", "config_path": "p", "order_index": 5, "container": "c"}
    apply_plan(manifest, [entry("a", **named)], "1")
    (found,) = manifest.experiments
    assert {name: getattr(found, name) for name in named} == named
    assert found.status == "completed"


# The environment


def measured_under(environment: dict[str, Any]) -> CampaignManifest:
    manifest = manifest_of(completed())
    manifest.environment = dict(environment)
    return manifest


@pytest.mark.parametrize(
    ("known", "current"),
    [
        ({}, {"driver": "580"}),
        ({"driver": "580", "gpu_uuids": ["GPU-1"]}, {"driver": "580", "vllm": "0.32"}),
    ],
    ids=["the first", "the same, and more of it"],
)
def test_an_environment_that_does_not_differ_is_taken_over(known: dict[str, Any], current: dict[str, Any]) -> None:
    manifest = measured_under(known)
    assert adopt_environment(manifest, current, is_change_allowed=False, now=NOW) == ()
    assert manifest.environment == {**known, **current}
    assert manifest.notes == []


def test_another_environment_is_refused_with_both_values_and_recorded_where_it_is_allowed() -> None:
    known = {"driver": "580", "gpu_uuids": ["GPU-1"], "image": "a"}
    current: dict[str, Any] = {"driver": "581", "gpu_uuids": [], "image": None}
    manifest = measured_under(known)
    changes = ["driver: 580 before, 581 now", "gpu_uuids: GPU-1 before, none now", "image: a before, unknown now"]
    with pytest.raises(UserError) as error:
        adopt_environment(manifest, current, is_change_allowed=False, now=NOW)
    assert "; ".join(changes) in error.value.message
    assert "--allow-environment-change" in error.value.hint
    assert manifest.environment == known
    adopt_environment(manifest, current, is_change_allowed=True, now=NOW)
    assert manifest.environment == current
    at = "2026-07-14T10:00:00.000000Z"
    assert manifest.notes == [{"at": at, "kind": "environment_change", "changes": changes}]


# How a run begins


def _manager(tmp_path, *statuses):
    manager = ManifestManager(tmp_path / "campaign_manifest.json")
    if statuses:
        entries = [entry(f"e{index}", status=status) for index, status in enumerate(statuses)]
        manager.save(manager.create_manifest("id", "demo", "hash", entries))
    return manager


def _choose(manager, **options):
    """Whether it goes on with the manifest."""
    return choose_manifest(manager, "id", RunOptions(**options)) is not None


def test_a_start_is_fresh_without_a_manifest_and_after_a_complete_campaign(tmp_path):
    assert not any(_choose(_manager(tmp_path), resume=resume) for resume in (True, False, None))
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


def test_an_unreadable_manifest_stops_everything_but_a_fresh_start(tmp_path):
    manager = _manager(tmp_path)
    manager.manifest_path.write_text('{"schema_version": 1, "campaign')
    for resume in (None, True):
        with pytest.raises(UserError, match=r"campaign_manifest\.json") as caught:
            _choose(manager, resume=resume, is_yes=True)
        assert "--fresh" in caught.value.hint
    assert not _choose(manager, resume=False)


def test_another_campaigns_manifest_is_refused(tmp_path):
    manager = _manager(tmp_path, "completed")
    assert manager.load("other") is None
    with pytest.raises(UserError, match="belongs to another campaign, 'demo'"):
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


# The cycles that --until adds


# The ratio of the two is within ±3.0 % with five cycles, ±2.4 % with six; after an unplanned stage ±5.2 and ±3.9 %.
NOISY = {FOUR: [98.3, 101.7, 98.3, 101.7, 100.0, 100.0, 100.0, 100.0]}
FIVE = {"cycles": 5}


def _rule(text="ci=2.7%", max_cycles=None):
    return make_rule(parse_target(text), max_cycles)


def _kept(place):
    return read_stopping_rule(place.folder / "results" / "demo" / str(place.manifest().run_id))


def _run(place, answers=None, *, rule=None, resume=None, **more):
    return place.run(answers, options=RunOptions(until=rule or _rule(), resume=resume), **more)


def test_five_cycles_are_run_at_least_and_no_more_where_they_are_enough(place):
    rule = _rule("ci=3%", 9)
    outcome = _run(place, rule=rule)
    assert sorted({cycle for _, cycle, _ in place.asked()}) == [1, 2, 3, 4, 5]
    assert outcome.stopped is None
    within = "every ratio is within ±3 % after 5 cycles (output_tok_per_s, t intervals at 3.4 %)"
    assert outcome.remark == f"Top-up: {within}"
    assert place.manifest().total_experiments == 10
    assert read_stopping_rule(place.folder / "results" / "demo" / str(place.manifest().run_id)) == dataclasses.replace(
        rule, looks=(5,)
    )


def test_whole_cycles_are_added_until_every_configuration_is_narrow(place):
    outcome = _run(place, NOISY, execution={"cycles": 5, "cycle_gap_seconds": 30})
    assert place.asked()[10:] == [(EIGHT, 6, 1), (FOUR, 6, 1)]
    manifest = place.manifest()
    assert (manifest.total_experiments, manifest.is_complete) == (12, True)
    assert [entry.order_index for entry in manifest.experiments] == list(range(12))
    assert "after 6 cycles" in outcome.remark
    assert [note["cycles"] for note in manifest.notes] == [6]
    assert [gap["gap"] for gap in place.told("gap")] == ["cycle"] * 5


def test_a_shuffled_campaign_goes_on_in_the_order_a_longer_one_has(place):
    shuffled = {"structure": "shuffled", "cycles": 5}
    _run(place, NOISY, rule=_rule("ci=3.2%"), outputs=(4, 8, 16), execution=shuffled)
    longer = make_campaign(place.folder, outputs=(4, 8, 16), execution={**shuffled, "cycles": 6})
    order = place.runner(longer).generate_execution_order()
    assert [entry.exp_id for entry in place.manifest().experiments] == [item.exp_id for item in order]


def test_after_the_time_is_up_no_cycle_is_added(place):
    # Ten experiments of ten seconds each: it passes while the last of them runs.
    assert _run(place, NOISY, deadline_s=95).stopped is Stopped.DEADLINE
    assert place.manifest().total_experiments == 10


@pytest.mark.parametrize("is_topped_up", [True, False])
def test_a_resume_keeps_the_cycles_that_were_added_and_ends_as_if_never_interrupted(place, is_topped_up):
    # In the first experiment of the sixth cycle the time is up.
    assert _run(place, NOISY, deadline_s=105, execution=FIVE).stopped is Stopped.DEADLINE
    assert place.manifest().total_experiments == 12
    options = RunOptions(until=_rule() if is_topped_up else None, resume=True)
    second = place.run({FOUR: [100.0]}, options=options, execution=FIVE)
    assert place.asked() == [(FOUR, 6, 1)]
    assert place.manifest().is_complete
    assert ("after 6 cycles" in second.remark) is is_topped_up
    assert _kept(place).looks == ((5, 6) if is_topped_up else (5,))
    assert not any("changed since" in note["text"] for note in place.told("note"))


def test_a_finished_campaign_is_topped_up_when_it_is_resumed_with_a_target_in_the_same_environment(place):
    place.run(NOISY, execution=FIVE)
    with pytest.raises(UserError, match="environment"):
        _run(place, resume=True, environment={**ENVIRONMENT, "torch": "9.9.9"}, execution=FIVE)
    assert place.manifest().total_experiments == 10
    outcome = _run(place, {FOUR: [100.0]}, rule=_rule("ci=4.5%"), resume=True, execution=FIVE)
    assert place.asked() == [(EIGHT, 6, 1), (FOUR, 6, 1)]
    assert "after 6 cycles" in outcome.remark
    assert (_kept(place).looks, _kept(place).added) == ((5, 6), (5,))


def test_cycles_that_are_added_by_hand_are_counted_with_the_results(place):
    place.run(execution={"cycles": 3})
    assert _kept(place) is None
    place.run(options=RunOptions(resume=True), execution={"cycles": 3})
    assert _kept(place) is None
    for cycles in (4, 4, 6):
        place.run(options=RunOptions(resume=True), execution={"cycles": cycles})
    assert (_kept(place).target, _kept(place).added) == (None, (3, 4))


def test_a_configuration_that_never_gives_a_result_does_not_keep_it_going(place):
    outcome = _run(place, {EIGHT: ["invalid"]})
    assert max(cycle for _, cycle, _ in place.asked()) == 5
    assert outcome.remark.endswith(f"; ignored, without an interval: {EIGHT} (no value for {EIGHT}: no valid result)")


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
        _run(place, rule=_rule(max_cycles=8), **changes)
    assert not (place.folder / "state").exists()


@pytest.mark.parametrize("most", [0, 4, 21])
def test_the_most_cycles_lie_between_five_and_twenty(most):
    with pytest.raises(UserError, match="expected 5 to 20"):
        make_rule(parse_target("ci=2%"), most)


def test_energy_is_looked_at_where_every_configuration_has_it():
    records = [make_record(cycle=cycle, energy_per_output_tok_j=0.5) for cycle in range(5)]
    assert "energy_per_output_tok_j" in needs_cycle(make_run(records), _rule(), 5)[1]
    without = [*records, *(make_record(config_name="b", config_hash="b" * 16, cycle=cycle) for cycle in range(5))]
    assert "output_tok_per_s" in needs_cycle(make_run(without), _rule(), 5)[1]


def test_cycles_that_share_a_load_never_have_an_interval_and_too_few_valid_ones_are_wide():
    is_needed, reason = needs_cycle(make_run(make_record(cycle=cycle, load_id="one") for cycle in range(5)), _rule(), 5)
    assert not is_needed
    assert "no cycle is added" in reason
    assert "share an engine load" in reason
    assert needs_cycle(make_run(make_record(cycle=cycle, is_valid=cycle < 4) for cycle in range(5)), _rule(), 5)[0]
