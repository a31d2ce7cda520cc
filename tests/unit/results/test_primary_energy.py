"""*The* energy that counts: every reader shows the one of the record, whichever meter it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lem.base import units
from lem.base.measurement import parts_of_source
from lem.base.reasons import Reason
from lem.meters.energy import EnergyFindings
from lem.meters.external import ExternalReadings
from lem.meters.samples import CpuUse
from lem.record import Energy, Record, decode_record, encode_record
from lem.results.compare import compare_configurations
from lem.results.comparison import render_text
from lem.results.detail import render_record
from lem.results.export import render
from lem.results.report import render_report
from lem.results.report.content import compose
from lem.results.rows import Table, make_table, summary_columns, with_columns
from lem.results.run import make_run
from lem.results.store import StoredResult
from lem.results.table import render_run
from tests.doubles.powercap import Zone
from tests.records import make_record, with_measured
from tests.scripted_attempt import Attempt, at, cpu_attempt, gpu_attempt

LOST = Reason.of("verbatim", text="lost")
BOARD_NOTE = "board sensors"
BOARD_CAUTION = "the power sensor of each board"


def _text(table: Table, form: str) -> str:
    return "".join(render(table, form))


def zone(number: int, name: str) -> Zone:
    """100 W more in the window."""
    powers = ((0, 40.0), (at(15), 140.0), (at(25), 40.0))
    return Zone(f"intel-rapl:{number}", name, powers, max_uj=262_143_328_850, begins_ns=at(-2))


def busy() -> Attempt:
    # Of 4 CPUs the engine has 3.6 in the window, and else 0.4.
    own_s = [0.4 * second + 3.2 * min(10, max(0, second - 15)) for second in range(-1, 35)]
    rows = [CpuUse(at(second), 0.0, own, 4.0 * second - own, 0.0, own) for second, own in enumerate(own_s, start=-1)]
    return cpu_attempt().with_log(usage=tuple(rows))


def by_plug() -> EnergyFindings:
    begin_utc_s = 1767225600.0 + 1.0  # 2026-01-01, a second before which the double's log begins
    times = [begin_utc_s + place / 10 for place in range(350)]
    readings = ExternalReadings("plug.csv", tuple(times), (500.0,) * len(times))
    return cpu_attempt().measured(options={"measurement": {"external_csv": "plug.csv"}}, external=readings)


def by(energy: str, attempt: Attempt, **more: object) -> EnergyFindings:
    return attempt.measured(options={"measurement": {"energy": energy, **more}})


Finder = Callable[[], EnergyFindings]
# How it is measured, joules, source, scope, and the columns of a Markdown table that add up to it.
MEASURED: dict[str, tuple[Finder, float, str, str, list[str]]] = {
    "counter": (lambda: gpu_attempt(2).measured(), 6000, "nvml_counter", "gpu", ["gpu_energy_j"]),
    "power": (lambda: gpu_attempt(counter=None).measured(), 3000, "power_instant_integral", "gpu", ["gpu_energy_j"]),
    "RAPL": (
        lambda: cpu_attempt(zone(0, "package-0"), zone(1, "dram")).measured(),
        2800, "rapl", "cpu_package", ["cpu_package_energy_j", "dram_energy_j"],
    ),
    "RAPL without memory": (
        lambda: by("rapl", cpu_attempt(zone(0, "package-0"))), 1400, "rapl", "cpu_package", ["cpu_package_energy_j"]
    ),
    "estimate": (
        lambda: by("tdp_estimate", busy(), cpu_tdp_w=200), 1800, "tdp_estimate", "cpu_package", ["cpu_package_energy_j"]
    ),
    "the user's meter": (by_plug, 5000, "external_csv", "machine", ["external_energy_j"]),
}  # fmt: skip
FINDERS = {name: case[0] for name, case in MEASURED.items()}


def record_of(find: Finder, config_name: str = "small", cycle: int = 0) -> Record:
    """A record with the energy that the meters found, as read back from its file."""
    config_hash = config_name.encode().hex().ljust(16, "0")[:16]
    made = with_measured(make_record(config_name=config_name, config_hash=config_hash, cycle=cycle), find())
    return decode_record(encode_record(made))


def campaign(find: Finder) -> list[Record]:
    return [record_of(find, name, cycle) for name in ("one", "two") for cycle in range(2)]


@pytest.mark.parametrize("case", MEASURED)
def test_record_and_result_have_the_energy_that_counts_with_its_source_and_scope(case: str) -> None:
    find, expected_j, source, scope, columns = MEASURED[case]
    record = record_of(find)
    found = record.energy.primary_j
    assert found.value == pytest.approx(expected_j, rel=0.01)
    assert (found.source, found.scope, found.null_reason) == (source, scope, None)
    assert found.is_estimate == (source == "tdp_estimate")
    assert found.value is not None
    assert record.efficiency.energy_per_request_j == found.value / (record.work.requests_ok or 1)
    (line,) = (text for text in render_record(record, width=200).splitlines() if text.startswith("energy"))
    assert units.format_energy(found.value) in line
    assert line.endswith(f"by {source}")
    assert ("(an estimate)" in line) == found.is_estimate
    row = summary_of(record)
    assert [name for name in row if name.endswith("energy_j")] == columns
    assert sum(row[name] for name in columns) == found.value


def summary_of(record: Record) -> dict[str, Any]:
    """The row of a Markdown table that no columns were named for."""
    results = [StoredResult("a", record)]
    table = with_columns(make_table(results), summary_columns(results))
    cells = {name: value for name, (value, _) in next(iter(table.rows())).items()}
    shown = _text(table, "markdown")
    assert [value for value in cells.values() if isinstance(value, float) and f"{value:.6g}" not in shown] == []
    return cells


def test_without_a_meter_the_column_of_the_gpus_is_empty() -> None:
    row = summary_of(record_of(lambda: cpu_attempt().measured()))
    assert {name: value for name, value in row.items() if name.endswith("energy_j")} == {"gpu_energy_j": None}


def test_a_package_that_was_not_read_is_not_made_up_for_by_the_memory() -> None:
    energy = Energy(dram_energy_j=5.0, energy_source="rapl", null_reasons={"cpu_package_energy_j": LOST})
    assert (energy.primary_j.value, energy.primary_j.null_reason) == (None, LOST)


def test_a_source_that_only_a_newer_lem_knows_has_no_parts_here() -> None:
    energy = Energy(gpu_energy_j=5.0, energy_source="wattmeter_2030")
    assert parts_of_source("wattmeter_2030") == ()
    assert energy.primary_j.value is None
    assert "wattmeter_2030" in str(energy.primary_j.null_reason)


@pytest.mark.parametrize("case", MEASURED)
def test_only_energy_of_board_sensors_is_said_to_come_from_board_sensors(case: str) -> None:
    run = make_run(campaign(FINDERS[case]))
    comparison = render_text(compare_configurations(run, run.with_results[0], run.with_results[1:]))
    is_on_gpus = MEASURED[case][3] == "gpu"
    assert (BOARD_NOTE in render_run(run)) == is_on_gpus
    assert (BOARD_NOTE in comparison) == is_on_gpus
    assert (BOARD_CAUTION in render_report(compose(run))) == is_on_gpus


@pytest.mark.parametrize(
    ("finders", "said"),
    [
        (("estimate", "estimate"), "an estimate from TDP"),
        (("estimate", "RAPL"), "partly an estimate from TDP"),
        (("RAPL", "RAPL"), ""),
    ],
)
def test_table_and_comparison_agree_on_how_much_is_an_estimate(finders: Sequence[str], said: str) -> None:
    records = [
        record_of(FINDERS[case], name, cycle)
        for name, case in zip(("one", "two"), finders, strict=True)
        for cycle in range(2)
    ]
    run = make_run(records)
    comparison = render_text(compare_configurations(run, run.with_results[0], run.with_results[1:]))
    for text in (comparison, render_run(run)):
        assert ("estimate from TDP" in text) == bool(said)
        assert said in text
