"""The runner: order, manifest, resume, and everything that has to be fit before a campaign begins."""

import dataclasses
import errno
import hashlib
import shutil
from pathlib import Path

import pytest

from lem.base.durable import read_sealed
from lem.base.errors import ExitCode, Interrupted, LockedError, OptionRefused, UserError
from lem.cli.campaign_run import exit_code_of_outcome
from lem.cli.selection import resolve_run
from lem.config.campaign_config import CampaignColdStartConfig
from lem.config.experiment import ExperimentConfig
from lem.config.load import complete_campaign, load_campaign
from lem.config.sections import SloConfig
from lem.orchestration.grid import config_hash, prompts_fingerprint
from lem.orchestration.journal import sealed
from lem.orchestration.manifest import JOURNALED_FROM, ManifestManager
from lem.orchestration.plan import build_plan, plan_campaign
from lem.orchestration.resume import RunOptions
from lem.record import read_record, write_record
from lem.results.check import check_run
from lem.results.compare import compare_configurations
from lem.results.configurations import CONFIGURATIONS_FILE, Reading, read_listing, slo_of
from lem.results.run import read_run
from lem.results.stopping import StoppingRule, parse_target
from lem.results.store import Repository
from lem.worker.prompts import resolve_on_host
from tests.campaign_doubles import EIGHT, ENVIRONMENT, FOUR, FakeStop, Place, make_campaign
from tests.faulty_disk import watching

ROOT = Path(__file__).resolve().parents[3]
RESUME = RunOptions(resume=True)
# Stops the campaign in its first cycle: one experiment is completed, and three are left.
GONE = {EIGHT: [UserError("gone")]}


def _results(place):
    return sorted((place.folder / "results").rglob("result.json"))


def _manifest_path(place):
    return place.folder / "state" / "demo" / "campaign_manifest.json"


def _notes(place):
    return [data["text"] for data in place.told("note")]


def test_the_order_from_the_grid_leaves_named_experiments_out(place):
    named = [{"config_name": "named", "max_output_tokens": 2, "model": "none"}]
    runner = place.runner(make_campaign(place.folder, experiments=named, execution={"cycles": 1}))
    assert [item.config_name for item in runner.generate_execution_order()] == ["named", FOUR, EIGHT]
    assert [item.config_name for item in runner.generate_execution_order_from_grid()] == [FOUR, EIGHT]
    without = make_campaign(place.folder, grid=None, experiments=named)
    assert place.runner(without).generate_execution_order_from_grid() == []


# --- resume


def test_failed_experiments_count_as_neither_once_the_resume_has_begun(place):
    place.run({FOUR: [OptionRefused("no")]})
    place.events.clear()
    place.run(options=RESUME)
    started = [(event.done, event.total) for event in place.events if event.kind == "experiment_started"]
    assert started == [(2, 4), (3, 4)]
    assert _notes(place) == ["Resuming: 2 remaining (2 completed, 2 failed)"]


def test_a_result_that_is_gone_or_cut_short_is_measured_again_under_a_new_attempt(place):
    place.run()
    gone, cut = _results(place)[:2]
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:100])
    place.run(options=RESUME)
    assert sorted(attempt for _, _, attempt in place.asked()) == [2, 2]
    assert place.manifest().is_complete
    assert cut.stat().st_size == 100  # nothing is overwritten


def test_after_an_edit_unchanged_results_stay_new_ones_run_and_removed_ones_are_skipped(place):
    place.run(outputs=(4, 8))
    run_id, new = place.manifest().run_id, "pytorch-max_output_tokens=16"
    place.run(options=RESUME, outputs=(8, 16))
    assert place.asked() == [(new, 1, 1), (new, 2, 1)]
    manifest = place.manifest()
    assert manifest.run_id == run_id
    statuses = {entry.config_name: entry.status for entry in manifest.experiments}
    assert statuses == {FOUR: "skipped", EIGHT: "completed", new: "completed"}
    assert _notes(place)[0] == (
        "Campaign changed since the manifest was written: 2 experiments unchanged, 2 new, 2 removed (marked skipped)"
    )
    place.run(options=RESUME, outputs=(4, 8, 16))
    assert place.requests == []
    assert {entry.status for entry in place.manifest().experiments} == {"completed"}


def _read(place, **options):
    return read_run(place.folder / "results", "demo", place.manifest().run_id, **options)


def test_a_configuration_stays_one_when_an_edit_of_the_grid_gives_it_another_name(place):
    place.run(outputs=(4,), execution={"cycles": 1})
    (alone,) = _read(place).configurations
    assert alone.name != FOUR
    place.run(options=RESUME, outputs=(4, 8), execution={"cycles": 2})
    assert place.asked() == [(EIGHT, 1, 1), (EIGHT, 2, 1), (FOUR, 2, 1)]
    found = _read(place)
    assert [(item.name, item.n_cycles, item.is_removed) for item in found.configurations] == [
        (FOUR, 2, False),
        (EIGHT, 2, False),
    ]
    assert found.configurations[0].config_hash == alone.config_hash
    assert {row["config_name"] for row in found.rows()} == {FOUR, EIGHT}
    (pair,) = compare_configurations(found, found.with_results[0], found.with_results[1:]).pairs
    assert (pair.baseline.name, pair.other.name) == (FOUR, EIGHT)
    # Without its list, as an earlier build left it: the last name counts.
    (found.folder / CONFIGURATIONS_FILE).unlink()
    assert [item.name for item in _read(place).configurations] == [FOUR, EIGHT]


def test_removed_configurations_are_named_as_removed_and_not_compared_unless_they_are_named(place):
    place.run(outputs=(4, 8))
    place.run(options=RESUME, outputs=(8, 16))
    found, new = _read(place), "pytorch-max_output_tokens=16"
    assert [item.name for item in found.configurations] == [EIGHT, new, f"{FOUR} (removed)"]
    assert [item.name for item in found.with_results] == [EIGHT, new]
    assert found.find(f"{FOUR} (removed)") == found.removed[0]
    assert [item.configurations for item in check_run(found) if item.kind == "removed"] == [(f"{FOUR} (removed)",)]
    place.run(options=RESUME, outputs=(4, 8, 16))
    assert [item.name for item in _read(place).configurations] == [FOUR, EIGHT, new]


def test_two_configurations_of_one_name_are_two(place):
    place.run(outputs=(4,), shared={"max_input_tokens": [64]}, execution={"cycles": 1})
    (before,) = _read(place).configurations
    place.run(options=RESUME, outputs=(4,), shared={"max_input_tokens": [128]}, execution={"cycles": 1})
    found = _read(place)
    assert [(item.name, item.n_cycles) for item in found.configurations] == [
        (before.name, 1),
        (f"{before.name} (removed)", 1),
    ]
    (found.folder / CONFIGURATIONS_FILE).unlink()  # then there is no telling which of them is the current one
    digests = [item.config_hash for item in found.configurations]
    names = {item.name for item in _read(place).configurations}
    assert names == {f"{before.name} {digest[:8]}" for digest in digests}


def _priced(price):
    return {"measurement.price_per_kwh": [price], "measurement.pue": [1.5]}


def test_nothing_is_measured_again_after_a_change_of_timeouts_prices_or_cache_lifetimes(place):
    place.run(shared=_priced(0.2))
    timeouts = {"load_timeout_seconds": 7.0, "silence_timeout_seconds": 8.0, "warmup_timeout_seconds": 9.0}
    place.run(options=RESUME, shared={**_priced(0.3), "baseline.cache_ttl_sec": [1.0]}, execution=timeouts)
    assert place.requests == []
    assert place.manifest().is_complete
    assert _notes(place)[-1].startswith("Resuming: 0 remaining (4 completed")
    assert {record.carbon.price_per_kwh for record in _read(place).records} == {0.3}
    own = Reading({"price_per_kwh": 0.4})
    assert {record.carbon.price_per_kwh for record in _read(place, reading=own).records} == {0.4}
    recorded = {read_record(path).carbon.price_per_kwh for path in _results(place)}
    assert recorded == {None}  # what the worker wrote is as it was


def test_nothing_is_measured_again_after_a_change_of_service_levels(place):
    served = {"traffic_simulation.enabled": [True], "traffic_simulation.slo": [{"ttft_ms": 200.0}]}
    place.run(shared=served)
    levels = {"ttft_ms": 100.0, "attainment_pct": 90.0}
    place.run(options=RESUME, shared={**served, "traffic_simulation.slo": [levels]})
    assert place.requests == []
    assert [item.slo for item in (read_listing(_read(place).folder) or {}).values()] == [levels, levels]
    recounted = Reading(recount=lambda *_: {})
    assert {slo_of(record) for record in _read(place, reading=recounted).records} == {SloConfig(**levels)}
    assert {slo_of(record) for record in _read(place).records} == {SloConfig()}  # as the double recorded it


def test_a_campaign_of_the_first_build_whose_hashes_held_prices_and_timeouts_goes_on(place):
    shared = {**_priced(0.2), "warmup.timeout_seconds": [9.0]}
    plan = place.runner(make_campaign(place.folder, shared=shared))._planned()
    first = plan.as_first_hashed()
    place.runner(plan.campaign, {EIGHT: ["ok", UserError("gone")]}, plan=first).run()
    assert {entry.config_hash for entry in place.manifest().experiments} == {it.config_hash for it in first.given}
    place.run(options=RESUME, shared=_priced(0.3))
    assert place.asked() == [(EIGHT, 2, 2)]
    assert place.manifest().is_complete
    assert [(item.name, item.n_cycles) for item in _read(place).configurations] == [(FOUR, 2), (EIGHT, 2)]
    assert {record.identity.config_hash for record in _read(place).records} == {it.config_hash for it in first.given}


def test_configurations_that_the_first_build_never_began_keep_its_hashes(place):
    changes = {"outputs": (4, 8, 16), "shared": _priced(0.2)}
    plan = place.runner(make_campaign(place.folder, **changes))._planned()
    place.runner(plan.campaign, GONE, plan=plan.as_first_hashed()).run()
    before = {entry.exp_id for entry in place.manifest().experiments}
    place.run(options=RESUME, **changes)
    assert {entry.exp_id for entry in place.manifest().experiments} == before
    assert place.manifest().is_complete


def test_a_recorded_campaign_of_the_first_build_resumes_with_an_edited_grid_and_price(place, monkeypatch):
    recorded = ROOT / "tests/recorded/interrupted"
    monkeypatch.chdir(place.folder)
    shutil.copytree(recorded / "results", "results")
    shutil.copytree(recorded / "state", ".state")
    before = {path: path.read_bytes() for path in Path("results").rglob("result.json")}
    edits = ["grid.shared.max_output_tokens=[4, 8]", "grid.shared.measurement.price_per_kwh=[0.3]"]
    loaded = load_campaign(recorded / "interrupted.yaml", edits)
    options = RunOptions(resume=True, is_environment_change_allowed=True)
    runner = place.runner(loaded.config, options=options, plan=plan_campaign(loaded))
    runner.host = "lab"
    outcome = runner.run()
    assert outcome.manifest.is_complete
    assert place.asked() == [(EIGHT, 2, 2), (FOUR, 3, 1), (EIGHT, 3, 1)]
    assert {path: path.read_bytes() for path in before} == before
    found = read_run(Path("results"), "interrupted", outcome.manifest.run_id)
    assert [(item.name, len(item.attempts)) for item in found.configurations] == [
        (FOUR, 3),
        (EIGHT, 3),
        ("pytorch-max_output_tokens=16 (removed)", 1),
    ]
    assert {item.identity.config_name for item in found.records} == {item.name for item in found.configurations}


@pytest.mark.parametrize("campaign", ["demo", "interrupted", "two-backends"])
def test_what_the_first_build_hashed_is_hashed_alike_from_its_config_file(campaign):
    paths = sorted((ROOT / "tests/recorded" / campaign / "results").rglob("config.json"))
    assert paths
    for path in paths:
        config = ExperimentConfig.from_dict(read_sealed(path)["resolved"])
        prompts = prompts_fingerprint(config, resolve_on_host(config, path.parent))
        digests = {config_hash(config, prompts, is_first=is_first) for is_first in (True, False)}
        assert {digest[:12] for digest in digests} == {path.parents[1].name.rpartition("-c")[0]}


def test_the_seed_in_the_manifest_is_the_one_of_the_order_that_runs(place):
    place.run(execution={"structure": "shuffled", "seed": 1})
    place.run(options=RESUME, outputs=(4, 8, 16), execution={"structure": "shuffled", "seed": 2})
    assert place.manifest().shuffle_seed == 2
    assert {request.identity["shuffle_seed"] for request in place.requests} == {2}


def _as_by_older_build(place):
    """Make the manifest one of a build that knew no `balanced`."""
    manifest = place.manifest()
    manifest.structure = None
    ManifestManager(_manifest_path(place)).save(manifest)
    without = _manifest_path(place).read_bytes().replace(b'  "structure": null,\n', b"")
    body = without.split(b"\n", 3)[3]
    _manifest_path(place).write_bytes(b"".join(sealed(lambda: [body])))


def test_a_campaign_that_an_older_build_began_keeps_its_order_its_prompts_and_its_hashes(place):
    wide = {"traffic_simulation.enabled": [True], "traffic_simulation.mode": ["closed"]}
    shared = {**wide, "traffic_simulation.concurrency": [40]}
    older = make_campaign(place.folder, shared=shared, execution={"cycles": 3, "structure": "interleaved"})
    place.runner(older, {EIGHT: ["ok", UserError("gone")]}, plan=build_plan(older).as_by_older_build()).run()
    _as_by_older_build(place)
    before = place.manifest()
    place.events.clear()
    place.run(options=RESUME, shared=shared, execution={"cycles": 3})
    assert place.asked() == [(EIGHT, 2, 2), (FOUR, 3, 1), (EIGHT, 3, 1)]
    assert {request.draw for request in place.requests} == {0}
    assert {len(_prompts(request)) for request in place.requests} == {32}
    manifest = place.manifest()
    assert [item.exp_id for item in manifest.experiments] == [item.exp_id for item in before.experiments]
    assert manifest.is_complete
    assert _notes(place)[0].startswith("Resuming: 3 remaining (3 completed")
    assert "its order stays interleaved" in _notes(place)[1]


def test_every_cycle_draws_prompts_of_its_own_that_its_configurations_share(place):
    place.run({EIGHT: ["invalid", "ok"]})
    drawn: dict[int, set[tuple[str, ...]]] = {}
    for request in place.requests:
        drawn.setdefault(request.identity["cycle_index"], set()).add(_prompts(request))
    assert sorted(map(len, drawn.values())) == [1, 1], "also of a second attempt"
    assert drawn[0].isdisjoint(drawn[1])
    assert {(item.draw, item.identity["cycle_index"]) for item in place.requests} == {(0, 0), (1, 1)}
    assert len(place.requests) == 5


def _prompts(request):
    return tuple((Path(request.result_dir) / "prompts.jsonl").read_text().splitlines())


# --- environment


def test_a_resume_under_another_environment_is_refused_unless_the_change_is_allowed(place):
    place.run(GONE)
    before = _manifest_path(place).read_bytes()
    newer = {**ENVIRONMENT, "torch": "2.14.0"}
    with pytest.raises(UserError) as caught:
        place.run(environment=newer, options=RESUME)
    assert "pytorch.torch: 2.13.0 before, 2.14.0 now" in caught.value.message
    assert "--allow-environment-change" in caught.value.hint
    assert _manifest_path(place).read_bytes() == before
    place.run(environment=newer, options=RunOptions(resume=True, is_environment_change_allowed=True))
    manifest = place.manifest()
    assert manifest.is_complete
    assert manifest.environment["pytorch.torch"] == "2.14.0"
    assert manifest.notes[0]["changes"] == ["pytorch.torch: 2.13.0 before, 2.14.0 now"]


# Stops in the second of three cycles, of which one experiment is completed.
IN_SECOND = {FOUR: ["ok", UserError("gone")]}
THREE = {"cycles": 3}


def test_on_another_node_of_the_same_kind_the_unfinished_cycle_starts_over_and_nodes_are_not_pooled(place):
    gpu = {"gpus": ["GPU-1"], "gpu_models": ["H200"], "power_limits": ["GPU-1 700 W"]}
    place.run(IN_SECOND, execution=THREE, environment={**ENVIRONMENT, **gpu})
    assert place.asked() == [(FOUR, 1, 1), (EIGHT, 1, 1), (EIGHT, 2, 1), (FOUR, 2, 1)]
    assert place.manifest().completed_count == 3
    place.node = "there"
    gpu = {**gpu, "gpus": ["GPU-2"], "power_limits": ["GPU-2 700 W"]}
    place.run(options=RESUME, execution=THREE, environment={**ENVIRONMENT, **gpu})
    assert place.asked() == [(EIGHT, 2, 2), (FOUR, 2, 2), (EIGHT, 3, 1), (FOUR, 3, 1)]
    manifest = place.manifest()
    (note,) = manifest.notes
    assert (note["kind"], note["before"], note["now"]) == ("node_change", "here", "there")
    assert [manifest.get_entry(exp_id).config_name for exp_id in note["again"]] == [EIGHT]
    assert {item.identity["node"] for item in place.requests} == {"there"}
    found = read_run(place.folder / "results", "demo", manifest.run_id)
    cycles = {item.name: [record.identity.cycle_index for record in item.records] for item in found.configurations}
    assert cycles == {
        f"{FOUR} @ here": [0],
        f"{FOUR} @ here on there": [1, 2],
        f"{EIGHT} @ here": [0],
        f"{EIGHT} @ here on there": [1, 2],
    }
    place.run(options=RESUME, execution=THREE, environment={**ENVIRONMENT, **gpu})
    assert (place.asked(), place.manifest().notes) == ([], [note])


def test_what_another_node_measured_of_a_cycle_that_started_over_is_not_adopted_again(place):
    place.run(IN_SECOND, execution=THREE)
    place.node = "there"
    place.run({EIGHT: [UserError("gone")]}, options=RESUME, execution=THREE)
    # Its rerun failed: that cell of the cycle is missing, and nothing of the other node takes its place.
    found = read_run(place.folder / "results", "demo", place.manifest().run_id)
    assert {it.name: [record.identity.cycle_index for record in it.records] for it in found.configurations} == {
        FOUR: [0],
        EIGHT: [0],
    }
    place.run(options=RESUME, execution=THREE)
    assert place.asked() == [(EIGHT, 2, 3), (FOUR, 2, 2), (EIGHT, 3, 1), (FOUR, 3, 1)]


def test_without_a_plan_another_node_is_another_host_and_what_started_over_counts_only_there(place):
    place.run(IN_SECOND, execution=THREE)
    runner = place.runner(make_campaign(place.folder, execution=THREE), options=RESUME)
    runner.host = runner.node = "there"
    runner.run()
    found = read_run(place.folder / "results", "demo", place.manifest().run_id)
    assert {it.name: [record.identity.cycle_index for record in it.records] for it in found.configurations} == {
        f"{FOUR} @ here": [0],
        f"{EIGHT} @ here": [0],
        f"{FOUR} @ there": [1, 2],
        f"{EIGHT} @ there": [1, 2],
    }


def test_on_another_node_until_is_about_the_cycles_of_that_node(place):
    until = RunOptions(resume=True, until=StoppingRule(parse_target("each=50%:output_tok_per_s"), 5, 12))
    place.run({FOUR: ["ok", "ok", "ok", UserError("gone")]}, options=RunOptions(until=until.until))
    place.node = "there"
    place.run(options=until)
    assert sorted({cycle for _, cycle, _ in place.asked()}) == [4, 5, 6, 7, 8]
    assert place.manifest().is_complete


@pytest.mark.parametrize(
    "other",
    [{"driver": "999"}, {"power_limits": ["GPU-2 500 W"]}, {"gpu_models": ["H100"]}],
    ids=lambda it: next(iter(it)),
)
def test_a_node_of_another_kind_is_refused(place, other):
    gpu = {"driver": "580", "gpus": ["GPU-1"], "gpu_models": ["H200"], "power_limits": ["GPU-1 700 W"]}
    place.run(IN_SECOND, execution=THREE, environment={**ENVIRONMENT, **gpu})
    before = _manifest_path(place).read_bytes()
    place.node = "there"
    for options in (RESUME, RunOptions(resume=True, is_environment_change_allowed=True)):
        with pytest.raises(UserError, match="node there is of another kind than here") as caught:
            place.run(options=options, execution=THREE, environment={**ENVIRONMENT, **gpu, "gpus": ["GPU-2"], **other})
        assert next(iter(other)) in caught.value.message
    assert _manifest_path(place).read_bytes() == before


def test_a_fresh_start_that_is_refused_leaves_the_old_manifest_in_place(place):
    place.run(GONE)
    before = _manifest_path(place).read_bytes()
    with pytest.raises(UserError):
        place.run(environment={**ENVIRONMENT, "torch": None}, options=RunOptions(resume=False))
    assert _manifest_path(place).read_bytes() == before


def test_restarting_containers_is_refused_where_there_are_none(place):
    campaign = make_campaign(place.folder, cold_start=CampaignColdStartConfig(restart_container=True))
    runner = place.runner(campaign)
    assert runner.should_cold_start()
    with pytest.raises(UserError, match="restart_container") as caught:
        runner.run()
    assert "force_cold_start" in caught.value.hint
    assert list(place.folder.iterdir()) == []


# --- folders, locks, signals


@pytest.mark.parametrize(("name", "hint"), [("results", "--results-dir"), ("state", "io.state_dir")])
def test_a_file_in_the_way_of_a_folder_is_told_with_a_remedy(place, name, hint):
    (place.folder / name).write_text("in the way")
    with pytest.raises(UserError, match=name) as caught:
        place.run()
    assert hint in caught.value.hint
    assert place.requests == []


def test_a_full_disk_before_anything_ran_makes_the_host_not_fit(place):
    def fail(event, path):
        if event == "lem.write" and "campaign_manifest" in path:
            raise OSError(errno.ENOSPC, "No space left on device", path)

    with watching(fail), pytest.raises(UserError, match="no space left on device") as caught:
        place.run()
    assert caught.value.exit_code is ExitCode.USAGE
    assert place.requests == []


def test_a_second_run_of_the_same_campaign_is_locked_out_and_another_one_on_the_cpu_is_not(place):
    other = Place(place.folder)

    def try_others(request):
        with pytest.raises(LockedError, match="campaign demo"):
            other.run()
        assert other.requests == []
        other.run(campaign_name="another", execution={"cycles": 1})
        return "ok"

    place.run({FOUR: [try_others, "ok"]})
    assert place.manifest().is_complete
    assert len(other.requests) == 2


def test_settling_the_opening_asks_once_and_the_run_does_not_ask_again(place):
    place.run(GONE)
    questions = []

    def ask(question):
        questions.append(question)
        return True

    runner = place.runner(make_campaign(place.folder), options=RunOptions(ask=ask))
    with runner.reserved():
        runner.settle_opening()
        runner.run()
    assert len(questions) == 1
    assert place.manifest().is_complete
    assert len(place.asked()) == 3


def test_a_check_starts_and_ends_a_worker_and_keeps_nothing(place):
    place.runner(make_campaign(place.folder)).check()
    assert (place.executor.worker.opened, place.executor.calls) == (1, ["stop", "close"])
    assert not (place.folder / "state").exists()
    with pytest.raises(UserError, match="transformers is not installed"):
        place.runner(make_campaign(place.folder), environment={**ENVIRONMENT, "transformers": None}).check()


def test_a_bug_in_the_loop_kills_the_workers(place):
    with pytest.raises(ZeroDivisionError):
        place.run({EIGHT: [ZeroDivisionError()]})
    assert place.executor.calls[-2:] == ["kill", "close"]


def test_a_signal_that_insists_while_workers_end_kills_them_and_the_outcome_stands(place):
    runner = place.runner(make_campaign(place.folder))
    place.executor.stop = lambda: (_ for _ in ()).throw(Interrupted(2))
    assert runner.run().manifest.is_complete
    assert place.executor.calls[-2:] == ["kill", "close"]


def test_options_of_lem_experiment_are_warned_about_in_a_campaign(place):
    named = [
        {"config_name": "one", "num_cycles": 5},
        {"config_name": "two", "io": {"results_dir": "elsewhere"}, "max_output_tokens": 4},
        {"config_name": "three", "max_output_tokens": 8},
    ]
    plan = plan_campaign(complete_campaign(make_campaign(place.folder, grid=None, experiments=named)))
    assert plan.warnings == {
        "num_cycles is for lem experiment; in a campaign, execution.cycles decides": 1,
        "io.results_dir is for lem experiment; in a campaign, the campaign's io.results_dir decides": 1,
    }


# --- results that are gone or changed, the order of runs, and folders


def test_a_campaign_whose_results_vanish_while_it_runs_does_not_report_them_as_completed(place):
    def remove_the_others(request):
        for path in _results(place):
            path.unlink()
        return "ok"

    outcome = place.run({EIGHT: ["ok", remove_the_others]}, execution={"structure": "interleaved"})
    assert place.statuses().count("completed") == outcome.manifest.completed_count == 1
    assert outcome.error is not None
    assert outcome.error.message.startswith("3 results missing, or not as measured: ")
    assert "--resume" in outcome.error.hint
    assert exit_code_of_outcome(outcome) == ExitCode.EXPERIMENT_FAILED
    place.run(options=RESUME)
    assert len(place.asked()) == 3
    assert place.manifest().is_complete


def _edit(path):
    """Change a result, as a person could, in a way that contradicts nothing in it."""
    record = read_record(path)
    write_record(path, dataclasses.replace(record, window=dataclasses.replace(record.window, warmup_s=99.0)))


def test_a_result_that_was_edited_is_measured_again_and_never_counts_until_it_is_as_before(place):
    place.run()
    edited = _results(place)[0]
    before = edited.read_bytes()
    assert _digests(place)[str(edited)] == hashlib.sha256(before).hexdigest()
    _edit(edited)
    place.run(options=RESUME)
    assert [attempt for _, _, attempt in place.asked()] == [2]
    assert 99.0 not in {item.record.window.warmup_s for item in _scan(place).results}
    place.run(options=RESUME)
    assert place.asked() == []
    chosen = [entry.result_path for entry in place.manifest().experiments]
    assert str(edited) not in chosen
    again = next(path for path in map(Path, chosen) if path.parent.parent == edited.parent.parent)
    again.unlink()
    edited.write_bytes(before)
    place.run(options=RESUME)
    assert place.asked() == []
    assert str(edited) in [entry.result_path for entry in place.manifest().experiments]


def _scan(place):
    return Repository(place.folder / "results", "demo").scan()


def _digests(place):
    attempts = [attempt for entry in place.manifest().experiments for attempt in entry.attempts]
    return {attempt.result_path: attempt.result_sha256 for attempt in attempts}


def test_results_of_a_manifest_without_digests_are_kept_and_get_theirs_at_the_resume(place):
    place.run()
    manifest = place.manifest()
    for entry in manifest.experiments:
        entry.attempts = [dataclasses.replace(attempt, result_sha256=None) for attempt in entry.attempts]
    ManifestManager(_manifest_path(place)).save(manifest)
    place.run(options=RESUME)
    assert place.asked() == []
    assert _digests(place) == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in _results(place)}


def test_a_whole_result_that_the_manifest_does_not_list_is_adopted_with_its_digest(place):
    place.run()
    manifest = place.manifest()
    manifest.experiments[0].attempts = ()
    manifest.experiments[0].status, manifest.experiments[0].result_path = "pending", None
    ManifestManager(_manifest_path(place)).save(manifest)
    place.run(options=RESUME)
    assert place.asked() == []
    assert _digests(place) == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in _results(place)}


def _writes(place, run):
    """How often each file of the manifest was written by a run."""
    names = []
    with watching(
        lambda event, path: names.append(Path(path).suffix) if event == "lem.write" and "manifest" in path else None
    ):
        run()
    return {suffix: names.count(suffix) for suffix in (".json", ".journal")}


def test_a_long_campaign_writes_a_line_for_each_change_and_the_snapshot_when_it_starts_stops_and_ends(place):
    outputs, once = range(1, JOURNALED_FROM + 1), {"cycles": 1}
    for options, completed in ((RunOptions(), 9), (RESUME, 18)):
        place.stop = FakeStop(place.clock, signal_at_s=place.clock.elapsed_s + 95)  # in the tenth experiment
        written = _writes(place, lambda options=options: place.run(outputs=outputs, execution=once, options=options))
        assert written == {".json": 2, ".journal": 9 * 2 + 1}
        assert not _manifest_path(place).with_suffix(".journal").exists()
        assert place.statuses().count("completed") == completed
        assert place.statuses().count("pending") == JOURNALED_FROM - completed


def test_the_last_run_is_the_last_one_whatever_the_clock_did(place):
    run_ids = []
    for step_s in (0, -3600, -86400, 86400 * 400, 0):
        place.clock.elapsed_s += step_s
        place.run(options=RunOptions(resume=False))
        run_ids.append(place.manifest().run_id)
        assert resolve_run(place.folder / "results", "demo").run_id == run_ids[-1]
    assert run_ids == sorted(set(run_ids))
    place.clock.elapsed_s = 0
    shutil.rmtree(place.folder / "results")  # manifests that were set aside are enough
    place.run(options=RunOptions(resume=False))
    assert place.manifest().run_id > run_ids[-1]
    assert any("dated in the future" in note for note in _notes(place))


def test_a_copy_of_a_run_under_another_name_is_not_the_last_run(place, caplog):
    place.run()
    run_id = place.manifest().run_id
    for name in ("20990101T000000Z-copy", f"{run_id}-old", "zzz"):
        shutil.copytree(place.folder / "results" / "demo" / run_id, place.folder / "results" / "demo" / name)
    assert resolve_run(place.folder / "results", "demo").run_id == run_id
    assert "future" not in caplog.text
    (place.folder / "results" / "demo" / run_id).rename(place.folder / "results" / "demo" / "29990101T000000Z-0000")
    resolve_run(place.folder / "results", "demo")
    assert "run 29990101T000000Z-0000 is dated in the future" in caplog.text


@pytest.mark.parametrize(
    ("step_s", "text"),
    [
        (-3600, "the clock was set back by 1h 00m; durations are not affected"),
        (7200, "the clock moved ahead by 2h 00m: it was set, or the machine was suspended; durations"),
    ],
)
def test_a_clock_that_is_set_during_a_campaign_is_reported_once_and_noted(place, step_s, text):
    def set_clock(request):
        place.clock.set_ahead(step_s)
        return "ok"

    place.run({FOUR: [set_clock, "ok"]})
    (note,) = _notes(place)
    assert note.startswith(text)
    assert [(item["kind"], item["reason"]) for item in place.manifest().notes] == [("clock_step", note)]


@pytest.mark.parametrize("folder", ["state", "results"])
def test_two_campaigns_do_not_share_a_folder(place, folder):
    place.run(campaign_name="a-b")
    if folder == "results":
        shutil.rmtree(place.folder / "state")
    before = {path: path.read_bytes() for path in place.folder.rglob("*.json")}
    for resume in (None, True, False):
        with pytest.raises(UserError, match="belongs to campaign 'a-b'") as caught:
            place.run(campaign_name="a b", options=RunOptions(resume=resume))
        assert "io.results_dir" in caught.value.hint
    assert {path: path.read_bytes() for path in place.folder.rglob("*.json")} == before
    place.run(campaign_name="a-b", options=RunOptions(resume=False))
