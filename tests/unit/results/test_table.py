from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import pytest

from lem.base.doc import text_width
from lem.base.measurement import known
from lem.base.reasons import Reason
from lem.config.backends import ENERGY_SCORE_RULES
from lem.config.sections import MeasurementConfig
from lem.record import Machine, Record
from lem.results.aggregation import run_document
from lem.results.compare import compare_configurations
from lem.results.comparison import render_text
from lem.results.detail import render_record
from lem.results.metrics import parse_comparable
from lem.results.run import Run, make_run
from lem.results.table import render_run
from tests.command_rig import on_terminal
from tests.goldens import assert_golden
from tests.records import completed, make_gpu, make_record

# Deviations of the cycles from their middle, so that the intervals have a width.
NOISE = (0.0, 0.012, -0.009, 0.004, -0.006)
GRID = {
    "batch_size=1, max_output_tokens=32": (111.3, 0.302),
    "batch_size=1, max_output_tokens=128": (142.1, 1.204),
    "batch_size=4, max_output_tokens=32": (274.9, 0.305),
    "batch_size=4, max_output_tokens=128": (308.4, 1.211),
}
OTHER = {"config_name": "large", "config_hash": "f" * 16}
LONG = {f"pytorch-tiny-llama-{name}": values for name, values in GRID.items()}


def campaign(
    n_cycles: int = 3, grid: Mapping[str, tuple[float, float]] = GRID, joules: float | None = None, **fields: Any
) -> list[Record]:
    return [
        make_record(
            config_name=name,
            config_hash=f"{number:016x}",
            cycle=cycle,
            order=cycle * len(grid) + number,
            output_tok_per_s=rate * (1 + NOISE[(cycle + number) % len(NOISE)]),
            e2e_p50_s=e2e * (1 - NOISE[cycle]),
            energy_per_output_tok_j=None if joules is None else joules / rate * (1 + NOISE[cycle]),
            **fields,
        )
        for cycle in range(n_cycles)
        for number, (name, (rate, e2e)) in enumerate(grid.items())
    ]


def with_trouble() -> list[Record]:
    first: dict[str, Any] = {"config_name": next(iter(GRID)), "config_hash": f"{0:016x}", "attempt": 2}
    never: dict[str, Any] = {"config_name": "batch_size=64, max_output_tokens=128", "config_hash": "f" * 16}
    slow = "warm-up did not converge within 50 prompts: the first requests of the window may be slow"
    return [
        *campaign(),
        make_record(**first, cycle=1, order=20, output_tok_per_s=112.0, warnings=(slow,)),
        make_record(
            **first, cycle=2, order=21, output_tok_per_s=80, is_valid=False,
            invalid_reasons=("thermal slowdown for 3.2 s of the window",),
        ),
        make_record(
            **never, order=22, output_tok_per_s=500, is_valid=False, invalid_reasons=("5 of 10 requests failed",)
        ),
    ]  # fmt: skip


SUMMARIES: dict[str, Run] = {
    "three_cycles": make_run(campaign()),
    "single_cycle": make_run(campaign(n_cycles=1)),
    "two_cycles": make_run(campaign(n_cycles=2)),
    "energy_and_long_names": make_run(campaign(grid=LONG, joules=60.0, ttft_p50_s=0.0123)),
    "energy_estimate": make_run(campaign(joules=60.0, energy_source="tdp_estimate")),
    "shared_load": make_run(campaign(load_id="one")),
    "trouble": make_run(with_trouble(), failed={"batch_size=4, max_output_tokens=32": 1, "batch_size=256": 3}),
    "unlike_magnitudes": make_run(campaign(grid={"tiny": (12345.6, 0.0004), "huge": (0.0123, 45.0)})),
    "nothing": make_run([]),
    "all_failed": make_run([], failed={"small": 3}, campaign_name="demo", run_id="20260714T100000Z-3fa1"),
}


@pytest.mark.parametrize("name", ["energy_and_long_names", "trouble"])
def test_the_table_is_the_golden_one(name: str) -> None:
    assert_golden(f"results/{name}.txt", render_run(SUMMARIES[name]))


def words_of(run: Run) -> str:
    return " ".join(render_run(run).split())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shared_load", "1 batch_size=1, max_output_tokens=32 3 111.4 – –"),
        ("single_cycle", "1 batch_size=1, max_output_tokens=32 1 111.3 – –"),
        ("unlike_magnitudes", "1 tiny 3 12357 12039 – 12685 12234 – 12494 2 huge 3 0.01233"),
        ("energy_estimate", "Energy per output token, J (an estimate from TDP) geom. 95 % bootstrap"),
        ("nothing", "No results."),
        ("all_failed", "Results # configuration valid invalid failed 1 small 0 0 3"),
    ],
)
def test_a_table_holds(name: str, words: str) -> None:
    assert words in words_of(SUMMARIES[name])


@pytest.mark.parametrize("name", SUMMARIES)
def test_the_table_fits_80_columns_and_colour_changes_nothing_else(name: str) -> None:
    text = render_run(SUMMARIES[name])
    assert max(map(text_width, text.splitlines())) <= 80
    assert [line for line in text.splitlines() if line != line.rstrip()] == []
    assert re.search(r"[^\n]\n\Z", text)
    assert re.sub(r"\x1b\[[0-9]*m", "", on_terminal(render_run(SUMMARIES[name], is_colour=True))) == text


def test_an_interval_is_shown_as_a_point_only_where_it_is_one() -> None:
    records = [make_record(cycle=cycle, output_tok_per_s=100 + cycle * 0.004) for cycle in range(3)]
    row = next(line for line in render_run(make_run(records)).splitlines() if line.startswith("1  small"))
    low_t, high_t, low, high = re.findall(r"[0-9.]+", row)[3:]
    assert (low_t != high_t, low != high) == (True, True)
    constant = [make_record(cycle=cycle) for cycle in range(3)]
    assert "100.0 – 100.0  100.0 – 100.0" in render_run(make_run(constant))


def test_the_document_holds_what_the_table_shows() -> None:
    document = run_document(SUMMARIES["trouble"])
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["schema_version"] == 1
    assert document["campaign_name"] == "demo"
    assert document["run_ids"] == ["20260714T100000Z-3fa1"]
    by_name = {item["config_name"]: item for item in document["configurations"]}
    assert by_name["batch_size=256"]["n_failed"] == 3
    first = by_name["batch_size=1, max_output_tokens=32"]
    assert (first["n_cycles"], first["n_invalid"]) == (3, 1)
    assert first["throughput"]["output_tok_per_s"]["all_attempts"]["n_cycles"] == 3
    assert first["energy"]["energy_per_output_tok_j"]["null_reason"]


def invalid_record() -> Record:
    invalid, warning = ("5 of 10 requests failed",), ("warm-up did not converge",)
    record = make_record(is_valid=False, invalid_reasons=invalid, warnings=warning)
    return dataclasses.replace(
        record,
        validity=dataclasses.replace(record.validity, warmup_converged=False, engine_reused=True),
        window=dataclasses.replace(record.window, load_s=None, window_repeats=1),
        throughput=make_record(output_tok_per_s=None).throughput,
    )


RECORDS = {
    "detail_cpu": make_record(n_requests=25, ttft_p50_s=0.0123),
    "detail_invalid": invalid_record(),
    "detail_energy": make_record(energy_per_output_tok_j=0.5),
    "detail_estimate": make_record(energy_per_output_tok_j=0.5, energy_source="tdp_estimate"),
}


@pytest.mark.parametrize(("repeats", "said"), [(0, "not every prompt once"), (1, "all prompts once"), (2, "2 times")])
def test_the_window_says_how_often_the_prompts_were_run_and_that_it_was_not_steady(repeats: int, said: str) -> None:
    record = make_record()
    window = dataclasses.replace(record.window, window_repeats=repeats)
    unsteady = dataclasses.replace(record, window=window, validity=dataclasses.replace(record.validity, steady=False))
    (line,) = (text for text in render_record(unsteady).splitlines() if text.startswith("window"))
    assert line.endswith(f"{said}, not steady")


@pytest.mark.parametrize("name", RECORDS)
def test_one_result_fits_80_columns_and_colour_changes_nothing_else(name: str) -> None:
    text = render_record(RECORDS[name])
    assert max(map(text_width, text.splitlines())) <= 80
    assert re.sub(r"\x1b\[[0-9]*m", "", on_terminal(render_record(RECORDS[name], is_colour=True))) == text


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("detail_cpu", ["valid       yes", "warm-up     1.5 s, 5 prompts, converged", "latency"]),
        (
            "detail_cpu",
            ["energy      not measured: no energy meter was used", "tpot, icl, queue: not measured: the engine"],
        ),
        ("detail_invalid", ["valid       no: 5 of 10 requests failed", "warning: warm-up did not converge"]),
        ("detail_invalid", ["load        none, engine reused: 20260714", "throughput  output not measured"]),
        ("detail_energy", ["energy      500 J, 0.5 J per output token, by nvml_counter"]),
        ("detail_estimate", ["energy      500 J (an estimate), 0.5 J per output token, by tdp_estimate"]),
    ],
)
def test_one_result_has_these_lines(name: str, lines: list[str]) -> None:
    found = render_record(RECORDS[name]).splitlines()
    assert [line for line in lines if not any(text.startswith(line) for text in found)] == []


@pytest.mark.parametrize(
    ("source", "scope", "basis"),
    [("nvml_counter", "gpu", "GPU energy only"), ("rapl", "cpu_package", "energy of CPU packages and DRAM only")],
)
def test_emissions_and_cost_are_labelled_with_what_they_contain(source: str, scope: str, basis: str) -> None:
    rates = MeasurementConfig(grid_g_per_kwh=360, pue=1.25, price_per_kwh=0.2)
    records = [
        completed(make_record(**item, cycle=cycle, energy_source=source), rates)
        for cycle in range(3)
        for item in ({"energy_per_output_tok_j": 0.5}, {"energy_per_output_tok_j": 0.4, **OTHER})
    ]
    assert {record.energy.energy_scope for record in records} == {scope}
    carbon = f"carbon 0.0625 g CO₂e, cost 3.472e-05: {basis} × PUE 1.25"
    assert carbon in " ".join(render_record(records[0]).split())
    run = make_run(records)
    assert run_document(run)["configurations"][0]["carbon_basis"] == f"{basis} × PUE"
    metrics = [parse_comparable(name) for name in ("co2e_per_request_g", "cost_per_1000_requests")]
    compared = compare_configurations(run, run.with_results[0], run.with_results[1:], metrics=metrics)
    text = " ".join(render_text(compared).split())
    assert f"CO₂e and cost: of the {basis} × PUE." in text
    assert "emits 0.80" in text


def test_prompts_of_ai_energy_score_have_their_energy_in_its_unit() -> None:
    record = make_record(energy_per_output_tok_j=0.36, n_requests=25)  # 1,000 tokens in 25 requests
    assert "requests, Wh" not in render_run(make_run([record]))
    source = {"hub_name": "AIEnergyScore/text_generation", "count": 25}
    work = dataclasses.replace(record.work, prompt_source=source)
    scored = dataclasses.replace(record, work=work)
    assert re.search(r"per 1,000 requests, Wh.*\n.*1 +small +1 +4\.000 ", render_run(make_run([scored])), re.DOTALL)
    assert "4 Wh per 1,000 prompts" in render_record(scored)
    ruled = dataclasses.replace(record, requested={**record.requested, **ENERGY_SCORE_RULES})
    assert "4 Wh per 1,000 prompts" in render_record(ruled)


def test_settings_of_the_machine_and_its_gpus_are_disclosed_or_absent_with_their_reason() -> None:
    unseen = Reason.of("no_ambient_sensor")
    machine = Machine.of(turbo=False, smt=True, numa_nodes=2, load_1min=0.31, ambient_temp_c=known(None, unseen))
    gpu = dataclasses.replace(make_gpu(), power_limit_w=600.0, sm_clock_app_hz=1.98e9, ecc_mode=True, null_reasons={})
    record = dataclasses.replace(make_record(), machine=machine, gpus=(gpu,))
    lines = render_record(record, width=2000).splitlines()
    (shown,) = (line for line in lines if line.startswith("machine"))
    assert "turbo off, SMT on, NUMA nodes 2, load before 0.31; not known: governor (not told by this kernel)" in shown
    assert f"ambient temperature ({unseen})" in shown
    (shown,) = (line for line in lines if line.startswith("GPU"))
    assert "H200 GPU-1: power limit 600 W, application SM clock 1980 MHz, ECC on; not known: default power" in shown


def test_goodput_is_shown_where_it_was_measured() -> None:
    record = make_record(energy_per_output_tok_j=0.5, n_requests=25)
    assert "Goodput" not in render_run(make_run([record]))
    work = dataclasses.replace(record.work, requests_good=10, null_reasons={})
    reasons = {name: why for name, why in record.throughput.null_reasons.items() if name != "good_requests_per_s"}
    rates = dataclasses.replace(record.throughput, good_requests_per_s=1.0, null_reasons=reasons)
    good = completed(dataclasses.replace(record, work=work, throughput=rates))
    assert good.efficiency.energy_per_good_request_j == 50.0
    text = render_run(make_run([good]))
    assert re.search(r"Goodput, 1/s.*small +1 +1\.000 .*Energy per good request, J.*50\.00 ", text, re.DOTALL)
    shown = " ".join(render_record(good).split())
    assert "25 requests, 10 good, 0 failed" in shown
    assert "goodput 1 requests/s" in shown
    assert "50 J per good request" in shown
