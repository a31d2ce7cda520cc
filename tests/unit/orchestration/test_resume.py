from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import UserError
from lem.orchestration.manifest import Attempt, CampaignManifest, CampaignManifestEntry, ManifestManager
from lem.orchestration.resume import (
    PlanChange,
    adopt_environment,
    apply_plan,
    interrupt_entry,
    reconcile,
    resume_text,
)

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


def test_a_missed_result_without_any_attempt_is_adopted_too() -> None:
    manifest = manifest_of(entry())
    reconcile(manifest, on_disk(result()))
    assert manifest.experiments[0].status == "completed"


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


def test_a_skipped_experiment_stays_skipped() -> None:
    manifest = manifest_of(entry(status="skipped"))
    assert reconcile(manifest, on_disk(result())) == changed()


def test_an_interruption_leaves_attempts_that_ended_alone() -> None:
    ended = [Attempt(1, error="died"), Attempt(2, result_path="x", valid=False)]
    found = entry(status="running", attempts=[*ended, Attempt(3)])
    interrupt_entry(found)
    assert found.attempts == (*ended, Attempt(3, error="interrupted"))


# An edited campaign


def test_an_unchanged_campaign_keeps_everything() -> None:
    manifest = manifest_of(completed("a"), entry("b"))
    assert apply_plan(manifest, [entry("a"), entry("b")], "f00d") == PlanChange(kept=2, queued=0, removed=0)
    assert manifest.experiments == [completed("a"), entry("b")]


def test_an_edit_keeps_results_queues_the_new_and_skips_the_removed() -> None:
    manifest = manifest_of(completed("a"), completed("b"), entry("c", status="failed"))
    change = apply_plan(manifest, [entry("d"), entry("a")], "beef")
    assert change == PlanChange(kept=1, queued=1, removed=2)
    assert [(item.exp_id, item.status) for item in manifest.experiments] == [
        ("d", "pending"),
        ("a", "completed"),
        ("b", "skipped"),
        ("c", "skipped"),
    ]
    assert manifest.total_experiments == 2
    assert manifest.config_hash == "beef"
    assert change.describe().endswith("1 experiments unchanged, 1 new, 2 removed (marked skipped)")


def test_an_experiment_that_comes_back_brings_its_result() -> None:
    manifest = manifest_of(completed("a"), entry("b"))
    apply_plan(manifest, [entry("b")], "1")
    assert apply_plan(manifest, [entry("a"), entry("b")], "2") == PlanChange(kept=1, queued=1, removed=0)
    assert manifest.experiments == [completed("a"), entry("b")]


def test_an_experiment_removed_before_is_not_counted_again() -> None:
    manifest = manifest_of(entry("a"), entry("b"))
    apply_plan(manifest, [entry("b")], "1")
    assert apply_plan(manifest, [entry("b")], "2") == PlanChange(kept=1, queued=0, removed=0)
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


def test_without_a_result_another_environment_changes_nothing_measured() -> None:
    manifest = manifest_of(entry(status="failed"))
    manifest.environment = {"driver": "580"}
    adopt_environment(manifest, {"driver": "581"}, is_change_allowed=False, now=NOW)
    assert manifest.environment == {"driver": "581"}


def test_resume_text_counts_the_failed_among_the_remaining() -> None:
    manifest = manifest_of(completed("a"), entry("b"), entry("c", status="failed"), entry("d", status="skipped"))
    assert resume_text(manifest) == "Resuming: 2 remaining (1 completed, 1 failed)"
