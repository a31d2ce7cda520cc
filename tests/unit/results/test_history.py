"""Configurations over the runs of a campaign: change points, their false alarms, and the versions that changed."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import UserError
from lem.cli.trend import render_history
from lem.results.history import History, differing_facts, find_cuts, history_document, make_history
from lem.results.metrics import parse_comparable
from lem.results.report.trend import render_trend
from lem.results.run import ENERGY, THROUGHPUT, Run, make_run, read_run
from lem.results.trends import FALSE_ALARMS
from tests.command_rig import run_lem
from tests.synthetic_campaign import Campaign, Configuration

ANCHOR = Configuration("anchor", backend="pytorch", energy_per_output_tok_j=0.5)
ENGINE = Configuration("engine")
NEWER = replace(ENGINE, engine_version="0.33.0", energy_per_output_tok_j=0.3 * 1.05, output_tok_per_s=1800 / 1.05)


def noise(rng: random.Random, n: int, *, step: float = 0.0, places: Sequence[int] = ()) -> list[float]:
    """Logs that vary by 1 % from run to run, with a step up or down at each place."""
    return [rng.gauss(0, 0.01) + step * (sum(place <= index for place in places) % 2) for index in range(n)]


@pytest.mark.parametrize("n", [4, 6, 12, 30])
def test_without_a_change_false_alarms_are_as_rare_as_stated(n: int) -> None:
    rng, trials = random.Random(f"no change/{n}"), 1500
    alarms = sum(bool(find_cuts(noise(rng, n), FALSE_ALARMS)) for _ in range(trials))
    limit = FALSE_ALARMS + 3 * (FALSE_ALARMS * (1 - FALSE_ALARMS) / trials) ** 0.5
    assert alarms / trials <= limit
    assert alarms > 0, "the bound would be useless"


@pytest.mark.parametrize(("n", "places"), [(16, (8,)), (30, (10,)), (24, (8, 16))])
def test_a_step_of_five_percent_is_found_where_it_is(n: int, places: tuple[int, ...]) -> None:
    rng, trials = random.Random(f"{n}/{places}"), 200
    found = [[cut.place for cut in find_cuts(noise(rng, n, step=0.0488, places=places), 0.005)] for _ in range(trials)]
    assert sum(len(cuts) == len(places) for cuts in found) / trials >= 0.9
    offsets = [
        abs(one - two) for cuts in found if len(cuts) == len(places) for one, two in zip(cuts, places, strict=True)
    ]
    assert statistics.fmean(offset <= 1 for offset in offsets) >= 0.95


def test_a_step_at_the_last_run_is_found_once_there_are_ten_before_it() -> None:
    rng = random.Random("last")
    found = [find_cuts(noise(rng, 11, step=0.0488, places=(10,)), FALSE_ALARMS) for _ in range(200)]
    assert sum(bool(cuts) for cuts in found) / 200 >= 0.6


@pytest.mark.parametrize("logs", [[], [0.0, 1.0, 1.0], [0.1] * 12, [0.1 + 1e-16 * index for index in range(12)]])
def test_equal_values_and_too_few_have_no_change(logs: list[float]) -> None:
    assert find_cuts(logs, FALSE_ALARMS) == []


def test_a_step_without_any_variation_is_found_exactly() -> None:
    (cut,) = find_cuts([0.0] * 6 + [0.05] * 6, FALSE_ALARMS)
    assert cut.place == 6
    assert cut.p_value < 1e-50


def write_runs(folder: Path, *, until: int = 12, change: int | None = 8, **options: Any) -> list[Run]:
    runs = []
    for number in range(until):
        engine = NEWER if change is not None and number >= change else ENGINE
        run_id = f"202607{number + 1:02}T030000Z-{number:04x}"
        configurations = options.get("configurations", (ANCHOR, engine))
        chosen = {"day_sd": 0.01, "cycles": 3, "has_samples": False, **options, "configurations": configurations}
        written = Campaign(run_id=run_id, **chosen).write(folder)
        runs.append(read_run(written.results_dir, written.campaign, run_id))
    return runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_runs(folder)
    return folder


@pytest.fixture(scope="module")
def history(folder: Path) -> History:
    names = sorted(path.name for path in (folder / "results" / "demo").iterdir())
    return make_history([read_run(folder / "results", "demo", name) for name in names])


def test_the_change_of_an_engine_is_found_relative_to_the_anchor_with_its_version(history: History) -> None:
    assert (history.anchor, history.anchor_moved, history.metrics) == ("anchor", False, (ENERGY, THROUGHPUT))
    found = {(series.name, series.metric.name): series for series, _ in history.changes}
    assert set(found) == {("engine", ENERGY.name), ("engine", THROUGHPUT.name)}
    for series, change in history.changes:
        assert change.run_id == "20260709T030000Z-0008"
        assert change.before == "20260708T030000Z-0007"
        expected = 1.05 if series.metric is ENERGY else 1 / 1.05
        assert change.ratio == pytest.approx(expected, rel=0.01)
        assert change.p_value < FALSE_ALARMS
        assert change.versions == ("vllm 0.32.0 → 0.33.0",)
    assert history.unexplained == []
    engine = found["engine", ENERGY.name]
    assert engine.is_relative
    assert engine.spread == pytest.approx(0.01, rel=0.6), "the days divide out, the loads do not"


def test_a_machine_that_moves_from_day_to_day_is_no_change_of_a_configuration(tmp_path: Path) -> None:
    found = make_history(write_runs(tmp_path, change=None, day_sd=0.05))
    relative = next(item for item in found.series if item.name == "engine" and item.metric is ENERGY)
    anchor = next(item for item in found.series if item.is_anchor and item.metric is ENERGY)
    assert found.changes == []
    assert relative.spread is not None
    assert anchor.spread is not None
    assert anchor.spread > 2 * relative.spread


def test_versions_that_change_without_a_change_point_are_named(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "one", until=5, change=None, driver="575.51.03")
    later = [
        replace(run, records=tuple(_with_driver(item) for item in run.records)) if number >= 3 else run
        for number, run in enumerate(runs)
    ]
    found = make_history(later)
    assert found.changes == []
    (changed,) = found.unexplained
    assert (changed.run_id, changed.texts) == (runs[3].run_id, ("driver 575.51.03 → 580.1",))
    assert changed.names == ("anchor", "engine")
    assert "driver 575.51.03 → 580.1" in render_history(found)


def _with_driver(record: Any) -> Any:
    environment = record.environment
    return replace(record, environment=replace(environment, versions={**environment.versions, "driver": "580.1"}))


def test_without_an_unchanged_configuration_there_is_no_anchor_and_with_a_name_there_is(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, until=5, configurations=(ENGINE,))
    assert make_history(runs).anchor is None
    assert "No anchor" in render_history(make_history(runs))
    assert make_history(runs, anchor="engine").anchor == "engine"
    with pytest.raises(UserError, match="no configuration 'x'"):
        make_history(runs, anchor="x")


def test_few_runs_are_shown_and_the_reason_is_given(tmp_path: Path) -> None:
    found = make_history(write_runs(tmp_path, until=3, change=2))
    assert {item.missing.code for item in found.series if item.missing} == {"few_runs"}
    assert found.changes == []
    assert "needs 4: anchor, engine" in render_history(found)


def test_a_run_without_a_result_of_a_configuration_is_a_gap_with_its_reason(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, until=6, change=None)
    without = replace(runs[2], records=tuple(it for it in runs[2].records if it.identity.config_name != "anchor"))
    found = make_history([*runs[:2], without, *runs[3:]], anchor="anchor")
    engine = next(item for item in found.series if item.name == "engine")
    assert len(engine.points) == 5
    assert engine.missing is not None
    assert engine.missing.code == "anchor_absent"


def _on_host(record: Any, host: str) -> Any:
    identity = record.identity
    return replace(record, identity=replace(identity, host=host, config_name=f"{identity.config_name} @ {host}"))


def test_each_host_of_a_run_has_the_anchor_of_its_own(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, until=6, change=None)
    both = [make_run([_on_host(item, host) for host in ("a", "b") for item in run.records]) for run in runs]
    found = make_history(both)
    assert found.anchor == "anchor"
    engines = [item for item in found.series if item.name.startswith("engine")]
    assert {item.name for item in engines} == {"engine @ a", "engine @ b"}
    assert all(item.is_relative and len(item.points) == 6 for item in engines)
    assert {item.name for item in found.series if item.is_anchor} == {"anchor @ a", "anchor @ b"}
    assert make_history(both, anchor="anchor").anchor == "anchor"


def test_another_model_meter_card_or_clock_is_named_beside_versions(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, until=5, change=None)
    found = make_history([*runs[:3], *(_with_others(run) for run in runs[3:])])
    names = {text.partition(" →")[0].rpartition(" ")[0] for item in found.versions for text in item.texts}
    assert {"model revision", "weights", "meter", "cards", "clocks"} <= names


def _with_others(run: Run) -> Run:
    def changed(record: Any) -> Any:
        environment = replace(
            record.environment, model_revision="1" * 40, weights_sha256="2" * 64, gpu_uuids=("GPU-0badcafe-1",)
        )
        gpus = tuple(replace(gpu, sm_clock_app_hz=1.41e9, clocks_set=True) for gpu in record.gpus)
        energy = replace(record.energy, energy_source="power_instant_integral")
        return replace(record, environment=environment, gpus=gpus, energy=energy)

    return replace(run, records=tuple(map(changed, run.records)))


def test_what_no_run_measured_is_no_lack_of_runs(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, until=5, change=None)
    found = make_history(runs, [parse_comparable("external_energy_per_output_tok_j")])
    codes = {item.missing.code for item in found.series if item.missing}
    assert codes
    assert "few_runs" not in codes
    assert "5 runs without a value" in " ".join(render_history(found).split())


def test_a_value_that_is_not_positive_is_not_called_unmeasured(tmp_path: Path) -> None:
    runs = [
        replace(run, records=tuple(_with_net_energy_below_zero(item) for item in run.records))
        for run in write_runs(tmp_path, until=4, change=None, configurations=(ENGINE,))
    ]
    (series,) = make_history(runs, [parse_comparable("net")]).series
    assert series.missing is not None
    assert series.missing.code == "no_ratio"


def test_an_energy_that_is_an_estimate_is_labelled(tmp_path: Path) -> None:
    estimated = replace(ENGINE, energy_source="tdp_estimate")
    found = make_history(write_runs(tmp_path, until=2, change=None, configurations=(estimated,)))
    text = " ".join(render_history(found).split())
    assert "Energy per output token, J (est.)" in text
    assert "tok/s (est.)" not in text
    assert "(est.): an estimate from TDP, not a measurement." in text
    assert "(est.)" in render_trend(found)
    document = json.loads(json.dumps(history_document(found)))
    assert {item["estimate"] for item in document["series"]} == {"an estimate from TDP", None}


def _with_net_energy_below_zero(record: Any) -> Any:
    return replace(record, energy=replace(record.energy, gpu_energy_net_j=-1.0))


def test_versions_that_changed_in_a_run_without_a_value_belong_to_the_change_point_after_it(tmp_path: Path) -> None:
    runs = write_runs(tmp_path)
    without = replace(runs[8], records=tuple(it for it in runs[8].records if it.identity.config_name != "anchor"))
    found = make_history([*runs[:8], without, *runs[9:]], anchor="anchor")
    assert {(change.before, change.run_id) for _, change in found.changes} == {(runs[7].run_id, runs[9].run_id)}
    assert [item.run_id for item in found.versions] == [runs[8].run_id]
    assert found.unexplained == []


def test_facts_that_appear_and_go_are_changes() -> None:
    assert differing_facts({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == ["a 1 → none", "b 2 → 3", "c none → 4"]


def _in(folder: Path) -> tuple[str | Path, ...]:
    return "--results-dir", folder / "results"


def test_the_command_prints_at_most_eighty_columns_and_writes_a_page(folder: Path) -> None:
    shown = run_lem("trend", "demo", "--output", folder / "trend.html", *_in(folder))
    assert shown.code == 0, shown.err
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "Since run 20260709T030000Z-0008, with it: vllm 0.32.0 → 0.33.0\n" in shown.out
    page = (folder / "trend.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    parser = HTMLParser()
    parser.feed(page)
    assert page.count("<svg") == 4


def test_the_document_has_every_run_and_change(folder: Path) -> None:
    shown = run_lem("trend", "demo", "--json", "--last", "10", "--metric", "energy", *_in(folder))
    assert shown.code == 0, shown.err
    document = json.loads(shown.out)
    assert (len(document["runs"]), document["anchor"], document["series_tested"]) == (10, "anchor", 2)
    anchor, engine = document["series"]
    assert [item["anchor_ratio"] for item in anchor["runs"]] == [None] * 10
    assert [change["run_id"] for change in engine["changes"]] == ["20260709T030000Z-0008"]
    assert engine["changes"][0]["versions"] == ["vllm 0.32.0 → 0.33.0"]


def test_the_same_results_give_the_same_page_and_document(history: History) -> None:
    assert render_trend(history) == render_trend(history)
    json.dumps(history_document(history), allow_nan=False)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("nothing",), "nothing"),
        (("demo", "--last", "0"), "--last"),
        (("20260703T030000Z-0002",), "is one run"),
        (("20260703T030000Z-0002",), "lem trend demo"),
    ],
)
def test_what_cannot_be_shown_is_a_usage_error(folder: Path, words: tuple[str, ...], text: str) -> None:
    shown = run_lem("trend", *words, *_in(folder))
    assert shown.code == 2
    assert text in shown.err
