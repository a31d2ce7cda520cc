"""The runner: order, manifest, resume, and everything that has to be fit before a campaign begins."""

import dataclasses
import errno
import json

import pytest

from lem.base.errors import ExitCode, Interrupted, LockedError, OptionRefused, UserError
from lem.config.campaign_config import (
    CampaignColdStartConfig,
)
from lem.config.load import complete_campaign
from lem.orchestration.dispatch import WorkerUnavailable
from lem.orchestration.plan import plan_campaign
from lem.orchestration.resume import RunOptions
from tests.campaign_doubles import ENVIRONMENT, FakeWorker, Place, make_campaign
from tests.faulty_disk import watching

FOUR, EIGHT = "pytorch-max_output_tokens=4", "pytorch-max_output_tokens=8"
RESUME = RunOptions(resume=True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("LEM_LOCK_DIR", str(tmp_path / "locks"))
    return Place(tmp_path)


def _resume(place, campaign, answers=None, **options):
    return place.runner(campaign, answers, options=dataclasses.replace(RESUME, **options)).run()


def _results(place):
    return sorted((place.folder / "results").rglob("result.json"))


def test_the_order_from_the_grid_leaves_named_experiments_out(place):
    named = [{"config_name": "named", "max_output_tokens": 2}]
    campaign = make_campaign(place.folder, experiments=named, execution={"cycles": 1})
    runner = place.runner(campaign)
    assert [item.config_name for item in runner.generate_execution_order()] == ["named", FOUR, EIGHT]
    assert [item.config_name for item in runner.generate_execution_order_from_grid()] == [FOUR, EIGHT]


def test_without_a_grid_there_is_no_order_from_it(place):
    campaign = make_campaign(place.folder, grid=None, experiments=[{"model": "none"}])
    assert place.runner(campaign).generate_execution_order_from_grid() == []


def test_a_new_manifest_holds_the_plan_and_is_not_yet_saved(place):
    runner = place.runner(make_campaign(place.folder, execution={"structure": "shuffled", "seed": 7}))
    order = runner.generate_execution_order()
    manifest = runner.create_manifest(order)
    assert [entry.exp_id for entry in manifest.experiments] == [item.exp_id for item in order]
    assert [entry.order_index for entry in manifest.experiments] == [0, 1, 2, 3]
    assert {entry.status for entry in manifest.experiments} == {"pending"}
    assert (manifest.campaign_id, manifest.total_experiments, manifest.shuffle_seed) == ("fe01ce2a", 4, 7)
    assert manifest.run_id is not None
    assert manifest.run_id.startswith("20260714T120000Z-")
    assert not (place.folder / "state").exists()


@pytest.mark.parametrize(
    ("cold_start", "is_cold"),
    [
        (CampaignColdStartConfig(), False),
        (CampaignColdStartConfig(force_cold_start=True), True),
        (CampaignColdStartConfig(restart_container=True), True),
    ],
)
def test_restarting_the_container_is_a_cold_start_too(place, cold_start, is_cold):
    assert place.runner(make_campaign(place.folder, cold_start=cold_start)).should_cold_start() is is_cold


# --- resume


def test_a_resume_runs_what_failed_and_keeps_the_run_id(place):
    campaign = make_campaign(place.folder)
    place.runner(campaign, {EIGHT: [UserError("gone")]}).run()
    before = place.manifest()
    kept = _results(place)
    outcome = _resume(place, campaign)
    assert place.asked() == [(EIGHT, 1, 2), (FOUR, 2, 1), (EIGHT, 2, 1)]
    assert outcome.manifest.is_complete
    assert place.manifest().run_id == before.run_id
    assert set(kept) < set(_results(place))
    assert [data["text"] for data in place.told("note")] == ["Resuming: 3 remaining (1 completed, 0 failed)"]


def test_failed_experiments_count_as_neither_once_the_resume_has_begun(place):
    campaign = make_campaign(place.folder)
    place.runner(campaign, {FOUR: [OptionRefused("no")]}).run()
    place.events.clear()
    _resume(place, campaign)
    assert [(event.done, event.total) for event in place.events if event.kind == "experiment_started"] == [
        (2, 4),
        (3, 4),
    ]
    assert place.told("note")[0]["text"] == "Resuming: 2 remaining (2 completed, 2 failed)"


def test_a_result_that_is_gone_or_cut_short_is_measured_again_under_a_new_attempt(place):
    campaign = make_campaign(place.folder)
    place.runner(campaign).run()
    gone, cut = _results(place)[:2]
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:100])
    _resume(place, campaign)
    assert sorted(attempt for _, _, attempt in place.asked()) == [2, 2]
    assert place.manifest().is_complete
    assert cut.stat().st_size == 100  # nothing is overwritten


def test_a_whole_result_that_the_manifest_missed_is_adopted(place):
    campaign = make_campaign(place.folder)
    place.runner(campaign).run()
    path = place.folder / "state" / "demo" / "campaign_manifest.json"
    document = json.loads(path.read_text())
    entry = document["experiments"][0]
    entry.update(status="running", result_path=None, completed_at=None)
    entry["attempts"] = [{**entry["attempts"][0], "result_path": None, "valid": None, "completed_at": None}]
    path.write_text(json.dumps(document))
    outcome = _resume(place, campaign)
    assert place.requests == []
    assert outcome.manifest.is_complete
    assert [data["text"] for data in place.told("note")] == [
        "Results on disk that the manifest did not list: 1, adopted",
        "Resuming: 0 remaining (4 completed, 0 failed)",
    ]


def test_after_an_edit_unchanged_results_stay_new_ones_run_and_removed_ones_are_skipped(place):
    place.runner(make_campaign(place.folder, outputs=(4, 8))).run()
    run_id = place.manifest().run_id
    _resume(place, make_campaign(place.folder, outputs=(8, 16)))
    assert place.asked() == [("pytorch-max_output_tokens=16", 1, 1), ("pytorch-max_output_tokens=16", 2, 1)]
    manifest = place.manifest()
    assert manifest.run_id == run_id
    assert {entry.config_name: entry.status for entry in manifest.experiments} == {
        FOUR: "skipped",
        EIGHT: "completed",
        "pytorch-max_output_tokens=16": "completed",
    }
    assert place.told("note")[0]["text"] == (
        "Campaign changed since the manifest was written: 2 experiments unchanged, 2 new, 2 removed (marked skipped)"
    )
    _resume(place, make_campaign(place.folder, outputs=(4, 8, 16)))
    assert place.requests == []
    assert {entry.status for entry in place.manifest().experiments} == {"completed"}


def test_the_seed_in_the_manifest_is_the_one_of_the_order_that_runs(place):
    shuffled = {"structure": "shuffled"}
    place.runner(make_campaign(place.folder, execution={**shuffled, "seed": 1})).run()
    _resume(place, make_campaign(place.folder, outputs=(4, 8, 16), execution={**shuffled, "seed": 2}))
    assert place.manifest().shuffle_seed == 2
    assert {request.identity["shuffle_seed"] for request in place.requests} == {2}


def test_a_fresh_start_sets_the_manifest_aside_and_keeps_the_results(place):
    campaign = make_campaign(place.folder)
    place.runner(campaign).run()
    old = place.manifest()
    kept = {path: path.read_bytes() for path in _results(place)}
    place.clock.elapsed_s += 60
    place.runner(campaign, options=RunOptions(resume=False)).run()
    assert place.manifest().run_id != old.run_id
    assert {path: path.read_bytes() for path in kept} == kept
    assert len(_results(place)) == 8
    aside = [
        path for path in (place.folder / "state" / "demo").iterdir() if path.name.startswith("campaign_manifest.2")
    ]
    assert len(aside) == 1
    assert json.loads(aside[0].read_text())["run_id"] == old.run_id
    assert str(aside[0]) in place.told("note")[0]["text"]


# --- environment


def test_a_missing_engine_is_told_before_anything_is_written(place):
    without = {**ENVIRONMENT, "torch": None}
    with pytest.raises(UserError) as caught:
        place.runner(make_campaign(place.folder), environment=without).run()
    assert "torch is not installed in this Python (3.11.7)" in caught.value.message
    assert "pip install torch" in caught.value.hint
    assert "--python" in caught.value.hint
    assert not (place.folder / "state" / "demo" / "campaign_manifest.json").exists()
    assert place.executor.killed == 1


def test_a_worker_that_does_not_start_makes_the_host_not_fit(place):
    class Broken(FakeWorker):
        def open(self, stop=None, timeout_s=0.0):
            raise WorkerUnavailable("the worker did not start", "try by hand")

    runner = place.runner(make_campaign(place.folder))
    place.executor.worker = Broken(place.clock, {})
    with pytest.raises(UserError) as caught:
        runner.run()
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.message == "the worker did not start"


def test_a_resume_under_another_environment_is_refused_and_changes_nothing(place):
    campaign = make_campaign(place.folder)
    place.runner(campaign, {EIGHT: [UserError("gone")]}).run()
    path = place.folder / "state" / "demo" / "campaign_manifest.json"
    before = path.read_bytes()
    newer = {**ENVIRONMENT, "torch": "2.14.0"}
    with pytest.raises(UserError) as caught:
        place.runner(campaign, environment=newer, options=RESUME).run()
    assert "pytorch.torch: 2.13.0 before, 2.14.0 now" in caught.value.message
    assert "--allow-environment-change" in caught.value.hint
    assert path.read_bytes() == before


def test_a_change_of_the_environment_that_is_allowed_is_recorded(place):
    campaign = make_campaign(place.folder)
    place.runner(campaign, {EIGHT: [UserError("gone")]}).run()
    allowed = RunOptions(resume=True, is_environment_change_allowed=True)
    place.runner(campaign, environment={**ENVIRONMENT, "torch": "2.14.0"}, options=allowed).run()
    manifest = place.manifest()
    assert manifest.is_complete
    assert manifest.environment["pytorch.torch"] == "2.14.0"
    assert manifest.notes[0]["changes"] == ["pytorch.torch: 2.13.0 before, 2.14.0 now"]


def test_a_fresh_start_that_is_refused_leaves_the_old_manifest_in_place(place):
    campaign = make_campaign(place.folder)
    place.runner(campaign, {EIGHT: [UserError("gone")]}).run()
    path = place.folder / "state" / "demo" / "campaign_manifest.json"
    before = path.read_bytes()
    with pytest.raises(UserError):
        place.runner(campaign, environment={**ENVIRONMENT, "torch": None}, options=RunOptions(resume=False)).run()
    assert path.read_bytes() == before


def test_restarting_containers_is_refused_where_there_are_none(place):
    campaign = make_campaign(place.folder, cold_start=CampaignColdStartConfig(restart_container=True))
    with pytest.raises(UserError) as caught:
        place.runner(campaign).run()
    assert "restart_container" in caught.value.message
    assert "force_cold_start" in caught.value.hint
    assert list(place.folder.iterdir()) == []


# --- folders, locks, signals


def test_a_file_in_the_way_of_the_results_is_told_with_a_remedy(place):
    (place.folder / "results").write_text("in the way")
    with pytest.raises(UserError) as caught:
        place.runner(make_campaign(place.folder)).run()
    assert "results" in caught.value.message
    assert "--results-dir" in caught.value.hint


def test_a_file_in_the_way_of_the_state_is_told(place):
    (place.folder / "state").write_text("in the way")
    with pytest.raises(UserError, match="state"):
        place.runner(make_campaign(place.folder)).run()
    assert place.requests == []


def test_a_full_disk_before_anything_ran_makes_the_host_not_fit(place):
    def fail(event, path):
        if event == "lem.write" and "campaign_manifest" in path:
            raise OSError(errno.ENOSPC, "No space left on device", path)

    with watching(fail), pytest.raises(UserError) as caught:
        place.runner(make_campaign(place.folder)).run()
    assert caught.value.exit_code is ExitCode.USAGE
    assert "no space left on device" in caught.value.message
    assert place.requests == []


def test_a_second_run_of_the_same_campaign_is_locked_out(place):
    campaign = make_campaign(place.folder)
    other = Place(place.folder)

    def try_another(request):
        with pytest.raises(LockedError) as caught:
            other.runner(campaign).run()
        assert "campaign demo" in caught.value.message
        return "ok"

    place.runner(campaign, {FOUR: [try_another]}).run()
    assert place.manifest().is_complete
    assert other.requests == []


def test_two_campaigns_on_the_cpu_may_run_at_once(place):
    other = Place(place.folder)

    def run_another(request):
        other.runner(make_campaign(place.folder, campaign_name="another", execution={"cycles": 1})).run()
        return "ok"

    place.runner(make_campaign(place.folder), {FOUR: [run_another, "ok"]}).run()
    assert place.manifest().is_complete
    assert len(other.requests) == 2


def test_a_reserved_campaign_is_locked_between_its_runs_and_free_afterwards(place):
    campaign = make_campaign(place.folder)
    runner = place.runner(campaign)
    with runner.reserved():
        runner.run()
        with pytest.raises(LockedError):
            Place(place.folder).runner(campaign).run()
    assert Place(place.folder).runner(campaign).run().manifest.is_complete


def test_settling_the_opening_asks_once_and_the_run_does_not_ask_again(place):
    campaign = make_campaign(place.folder)
    place.runner(campaign, {EIGHT: [UserError("gone")]}).run()
    questions = []

    def ask(question):
        questions.append(question)
        return True

    runner = place.runner(campaign, options=RunOptions(ask=ask))
    with runner.reserved():
        runner.settle_opening()
        runner.run()
    assert len(questions) == 1
    assert place.manifest().is_complete
    assert len(place.asked()) == 3


def test_a_check_starts_and_ends_a_worker_and_keeps_nothing(place):
    runner = place.runner(make_campaign(place.folder))
    runner.check()
    assert (place.executor.worker.opened, place.executor.ended) == (1, 1)
    assert not (place.folder / "state").exists()
    with pytest.raises(UserError, match="transformers is not installed"):
        place.runner(make_campaign(place.folder), environment={**ENVIRONMENT, "transformers": None}).check()


def test_a_signal_before_the_first_experiment_leaves_a_manifest_that_can_be_resumed(place):
    campaign = make_campaign(place.folder)
    place.stop.request(15)
    outcome = place.runner(campaign).run()
    assert outcome.signum == 15
    assert place.requests == []
    fresh = Place(place.folder)
    assert fresh.runner(campaign, options=RESUME).run().manifest.is_complete


def test_a_second_signal_kills_the_workers_and_the_manifest_is_whole(place):
    def insist(request):
        place.stop.request(2)
        place.stop.request(2)

    outcome = place.runner(make_campaign(place.folder), {EIGHT: [insist]}).run()
    assert outcome.signum == 2
    assert [entry.status for entry in place.manifest().experiments] == ["completed", "pending", "pending", "pending"]


def test_a_bug_in_the_loop_kills_the_workers(place):
    with pytest.raises(ZeroDivisionError):
        place.runner(make_campaign(place.folder), {EIGHT: [ZeroDivisionError()]}).run()
    assert place.executor.killed == 1


def test_a_signal_that_insists_while_workers_end_kills_them_and_the_outcome_stands(place):
    runner = place.runner(make_campaign(place.folder))
    executor = place.executor
    executor.stop = lambda: (_ for _ in ()).throw(Interrupted(2))
    assert runner.run().manifest.is_complete
    assert executor.killed == 1


# --- options that only `lem experiment` looks at


def test_options_of_lem_experiment_are_warned_about_in_a_campaign(place):
    named = [
        {"config_name": "one", "num_cycles": 5},
        {"config_name": "two", "io": {"results_dir": "elsewhere"}, "max_output_tokens": 4},
        {"config_name": "three", "max_output_tokens": 8},
    ]
    plan = plan_campaign(complete_campaign(make_campaign(place.folder, grid=None, experiments=named)))
    assert [(issue.config_desc, issue.reason, issue.severity) for issue in plan.warnings] == [
        ("one", "num_cycles is for lem experiment; in a campaign, execution.cycles decides", "warning"),
        (
            "two",
            "io.results_dir is for lem experiment; in a campaign, the campaign's io.results_dir decides",
            "warning",
        ),
    ]
    assert "2 warnings" in plan.summary
