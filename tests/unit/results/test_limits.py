from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping

import pytest

from lem.results.aggregation import run_document
from lem.results.limits import Sweep, change_text, find_sweeps, least_text
from lem.results.metrics import by_cycle
from lem.results.report.content import compose
from lem.results.report.limits import limits_section
from lem.results.run import ENERGY, THROUGHPUT, make_run
from tests.records import limit_sweep, make_record

ENERGIES = {None: 4.0, 500.0: 3.6, 400.0: 3.0, 300.0: 3.4, 200.0: 3.9}


def sweep_of(energies: Mapping[float | None, float], cycles: int = 5, spread: float = 0.01) -> Sweep:
    (found,) = find_sweeps(make_run(limit_sweep(energies, cycles, spread)).with_results)
    return found


def test_limits_are_in_order_and_null_is_the_limit_that_was_in_force() -> None:
    sweep = sweep_of(ENERGIES)
    assert (sweep.setting, sweep.unit, sweep.label) == ("power_limit_w", "W", "")
    assert [(value, item.name) for value, item in sweep.points] == [
        (200.0, "limit=200.0"),
        (300.0, "limit=300.0"),
        (400.0, "limit=400.0"),
        (500.0, "limit=500.0"),
        (700.0, "limit=None"),
    ]


def test_the_least_energy_is_certain_where_it_is_the_least_in_every_cycle() -> None:
    sweep = sweep_of(ENERGIES)
    least = sweep.least
    assert least is not None
    assert (sweep.points[least.index][0], least.low, least.high, least.n_cycles) == (400.0, 400.0, 400.0, 5)
    assert least_text(sweep, least).startswith("Least energy: at 400 W (interval 400 W), 3 J per output token (2.")


def test_the_interval_holds_each_setting_that_resampled_cycles_choose() -> None:
    sweep = sweep_of({None: 4.0, 400.0: 3.0, 300.0: 3.01, 200.0: 3.9}, spread=0.02)
    least = sweep.least
    assert least is not None
    assert (least.low, least.high) == (300.0, 400.0)
    assert sweep.interval_text() == "300 W – 400 W"


def test_one_cycle_has_no_interval_and_an_end_is_named() -> None:
    sweep = sweep_of({None: 4.0, 300.0: 3.4, 200.0: 3.0}, cycles=1)
    least = sweep.least
    assert least is not None
    assert (least.low, least.high) == (None, None)
    text = least_text(sweep, least)
    assert "no interval" in text
    assert text.endswith("; the least may be lower than all that were tried")


def test_cycles_that_share_an_engine_load_have_no_interval() -> None:
    records = [
        dataclasses.replace(it, validity=dataclasses.replace(it.validity, engine_load_id="one"))
        for it in limit_sweep(ENERGIES)
    ]
    (sweep,) = find_sweeps(make_run(records).with_results)
    assert sweep.least is not None
    assert (sweep.least.low, sweep.least.high) == (None, None)
    for metric in (ENERGY, THROUGHPUT):
        change = sweep.change(0, metric)
        assert change is not None
        assert change.interval() is None
        assert change_text(change).endswith(" %")


def test_changes_are_against_the_highest_setting() -> None:
    sweep = sweep_of({None: 4.0, 400.0: 3.0}, spread=0.0)
    energy, throughput = (sweep.change(0, metric) for metric in (ENERGY, THROUGHPUT))
    assert energy is not None
    assert throughput is not None
    assert energy.ratio == pytest.approx(0.75)
    assert throughput.ratio == pytest.approx(0.9 + 0.1 * 400 / 700)
    assert change_text(energy) == "-25.0 % (-25.0 to -25.0)"
    assert change_text(sweep.change(1, ENERGY)) == "–"


def test_other_options_make_other_sweeps_and_an_unlocked_clock_is_the_highest() -> None:
    records = [
        make_record(
            config_name=f"{clock}-{batch}",
            cycle=cycle,
            energy_source="nvml_counter",
            energy_per_output_tok_j=2.0 + (clock or 1980) / 1980,
            requested={"gpu": {"lock_clock_mhz": clock}, "pytorch": {"batch_size": batch}},
        )
        for cycle in range(2)
        for clock in (None, 1005)
        for batch in (1, 8)
    ]
    found = find_sweeps(make_run(records).with_results)
    assert [(sweep.setting, sweep.label) for sweep in found] == [
        ("lock_clock_mhz", "batch_size=1"),
        ("lock_clock_mhz", "batch_size=8"),
    ]
    assert [value for value, _ in found[0].points] == [1005.0, math.inf]
    assert found[0].text(math.inf) == "unlocked"
    document = run_document(make_run(records))["gpu_settings"]
    assert [item["settings"] for item in document] == [[1005.0, None], [1005.0, None]]
    json.dumps(document, allow_nan=False)


def test_without_a_setting_there_is_neither_a_sweep_nor_a_section() -> None:
    run = make_run(
        [make_record(config_name=name, energy_source="nvml_counter", energy_per_output_tok_j=1.0) for name in "ab"]
    )
    assert find_sweeps(run.with_results) == ()
    assert limits_section(compose(run)) == ""


def test_a_cycle_that_a_limit_lost_does_not_count_for_the_least() -> None:
    records = limit_sweep(ENERGIES, 3)
    lost = [it for it in records if not (it.identity.cycle_index == 1 and it.identity.config_name == "limit=300.0")]
    assert len(by_cycle(lost)) == 3
    (sweep,) = find_sweeps(make_run(lost).with_results)
    assert sweep.least is not None
    assert sweep.least.n_cycles == 2


def test_the_report_draws_each_limit_with_its_name_and_rings_the_least() -> None:
    section = str(limits_section(compose(make_run(limit_sweep(ENERGIES)))))
    for name in ("200 W", "300 W", "400 W", "500 W", "700 W"):
        assert f">{name}</text>" in section.replace("\u00a0", " ")
    assert section.count('class="ring"') == 1
    rows = section.partition("<tbody>")[2]
    assert rows.count("<tr>") == 5
    assert rows.count("yes") == 1
