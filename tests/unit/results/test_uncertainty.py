"""One combined uncertainty: it covers the truth where the spread of cycles alone does not."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest

from lem.base.measurement import Measured
from lem.record import Record
from lem.results.aggregation import run_document
from lem.results.compare import compare_configurations
from lem.results.comparison import comparison_document, render_text
from lem.results.detail import render_record
from lem.results.metrics import METRIC_BY_NAME
from lem.results.run import ENERGY, THROUGHPUT, Run, make_run
from lem.results.stats import Effect
from lem.results.table import render_run
from lem.results.uncertainty import combine, over_anchor
from tests.synthetic_campaign import Campaign, Configuration

PYTORCH = Configuration("pytorch", backend="pytorch", energy_per_output_tok_j=0.5)
VLLM = Configuration("vllm", energy_per_output_tok_j=0.2)
NAMED = METRIC_BY_NAME


def with_budget(record: Record, **shares: float) -> Record:
    """The record with these relative standard uncertainties of its energy, by cause."""
    energy_j = record.energy.gpu_energy_j
    assert energy_j is not None
    budget = {cause: share * energy_j for cause, share in shares.items()}
    reasons = {
        name: reason
        for name, reason in record.energy.null_reasons.items()
        if name not in ("uncertainty_budget_j", "energy_uncertainty_j")
    }
    energy = dataclasses.replace(
        record.energy,
        uncertainty_budget_j=budget,
        energy_uncertainty_j=math.hypot(*budget.values()),
        null_reasons=reasons,
    )
    return dataclasses.replace(record, energy=energy)


def run_of(*configurations: Configuration, cycles: int = 5, **shares: float) -> Run:
    records = Campaign(configurations, cycles=cycles, run_sd=0.005, load_sd=0.0).records()
    return make_run([with_budget(record, **shares) for record in records] if shares else records)


def test_what_all_windows_share_adds_to_the_spread_and_what_differs_is_in_it() -> None:
    (vllm,) = run_of(VLLM, edges=0.5, sensor=0.03, lag=0.004).configurations
    estimate = vllm.estimate(ENERGY)
    found = estimate.combined.value
    assert found is not None
    logs = [math.log(value) for value in estimate.values]
    mean = sum(logs) / 5
    std_error = math.sqrt(sum((log - mean) ** 2 for log in logs) / 4 / 5)
    assert dict(found.budget) == pytest.approx({"cycles": std_error, "sensor": 0.03, "lag": 0.004})
    assert found.standard == pytest.approx(math.sqrt(std_error**2 + 0.03**2 + 0.004**2))
    assert found.df == pytest.approx(4 * (found.standard / std_error) ** 4, rel=1e-6)
    assert found.centre == estimate.value
    width = math.exp(found.factor * found.standard)
    assert found.interval == pytest.approx((found.centre / width, found.centre * width))
    assert found.expanded == pytest.approx(math.exp(1.96 * found.standard) - 1, rel=0.01)


def test_without_other_causes_it_is_the_t_interval() -> None:
    estimate = run_of(VLLM, edges=0.01).configurations[0].estimate(ENERGY)
    assert estimate.combined.value is not None
    assert estimate.combined.value.interval == pytest.approx((estimate.low, estimate.high))


def test_it_covers_the_truth_where_a_sensor_is_off_and_the_spread_alone_does_not() -> None:
    chance, covered, by_spread, trials = random.Random(13), 0, 0, 2000
    for _ in range(trials):
        sensor = chance.uniform(-0.05, 0.05)  # one card, so it is the same in all cycles
        logs = [sensor + chance.gauss(0, 0.01) for _ in range(5)]
        mean = sum(logs) / 5
        effect = Effect(mean, math.sqrt(sum((log - mean) ** 2 for log in logs) / 4 / 5), 4, (5,))
        low, high = combine(effect, {"sensor": 0.05 / math.sqrt(3)}).interval
        covered += low < 1 < high
        within = effect.interval()
        assert within is not None
        by_spread += within[0] < 1 < within[1]
    assert covered / trials > 0.95
    assert by_spread / trials < 0.5


@pytest.mark.parametrize(
    ("run", "metric", "code"),
    [
        (run_of(VLLM), ENERGY, "verbatim"),
        (run_of(VLLM, cycles=1, sensor=0.03), ENERGY, "one_cycle"),
        (run_of(VLLM, sensor=0.03), THROUGHPUT, "no_meter_uncertainty"),
        (run_of(VLLM, sensor=0.03), NAMED["gpu_energy_net_j"], "verbatim"),
        (run_of(dataclasses.replace(VLLM, energy_per_output_tok_j=None)), ENERGY, "nothing_to_compare"),
    ],
)
def test_what_is_missing_has_its_reason(run: Run, metric: object, code: str) -> None:
    found = run.configurations[0].estimate(metric).combined  # type: ignore[arg-type]
    assert found is not None
    assert found.value is None
    assert found.null_reason is not None
    assert found.null_reason.code == code


def shares(run: Run, *budgets: dict[str, float]) -> Run:
    """The run whose configurations have these budgets, in their order."""
    by_name = dict(zip((item.name for item in run.configurations), budgets, strict=True))
    return make_run([with_budget(it, **by_name[it.identity.config_name]) for it in run.records])


def budget_of_ratio(run: Run) -> dict[str, float]:
    baseline, other = run.configurations
    (pair,) = compare_configurations(run, baseline, [other]).pairs
    (row,) = (row for row in pair.rows if row.metric is ENERGY)
    assert row.combined is not None
    assert row.combined.value is not None
    return {name: part for name, part in row.combined.value.budget.items() if name != "cycles"}


def other_card(records: Sequence[Record]) -> list[Record]:
    return [
        dataclasses.replace(it, environment=dataclasses.replace(it.environment, gpu_uuids=("GPU-other",)))
        if it.identity.config_name == "vllm"
        else it
        for it in records
    ]


def test_of_a_ratio_on_one_card_the_sensor_divides_out() -> None:
    first, second = {"sensor": 0.03, "lag": 0.004, "closing": 0.003}, {"sensor": 0.03, "lag": 0.001, "closing": 0.004}
    run = shares(run_of(PYTORCH, VLLM), first, second)
    assert budget_of_ratio(run) == pytest.approx({"lag": 0.003, "closing": 0.005})
    assert budget_of_ratio(make_run(other_card(run.records))) == pytest.approx(
        {"sensor": math.hypot(0.03, 0.03), "lag": math.hypot(0.004, 0.001), "closing": 0.005}
    )


def test_two_ratios_of_different_days_add_up_as_squares() -> None:
    assert over_anchor(Measured({"lag": 0.003}), Measured({"lag": 0.004})).value == pytest.approx({"lag": 0.005})


def test_table_and_documents_show_it_and_the_budget_on_request() -> None:
    run = run_of(PYTORCH, VLLM, sensor=0.03, lag=0.004)
    text = render_run(run)
    assert "combined" in text
    assert "±6.1 %" in text or "±6.2 %" in text
    assert "(k = 1)" not in text
    asked = render_run(run, has_budget=True)
    budget = [line.split() for line in asked.splitlines() if line.startswith("2 ")][-1]
    assert (budget[2:4], budget[-2:]) == (["3", "0.4"], ["±6.1", "%"])
    assert max(map(len, asked.splitlines())) <= 80
    document = run_document(run)["configurations"][0]["energy"]["energy_per_output_tok_j"]["combined"]
    assert document["budget"]["sensor"] == pytest.approx(0.03)
    assert document["ci_lower"] < run.configurations[0].estimate(ENERGY).low
    rates = run_document(run)["configurations"][0]["throughput"]["output_tok_per_s"]["combined"]
    assert rates["null_reason"]

    comparison = compare_configurations(run, run.configurations[0], run.configurations[1:])
    assert "combined" in render_text(comparison)
    row = comparison_document(comparison)["pairs"][0]["metrics"]["energy_per_output_tok_j"]["combined"]
    assert set(row["budget"]) == {"cycles", "lag"}
    assert "lag" not in render_text(comparison)
    assert "lag" in render_text(comparison, has_budget=True)


def test_a_result_in_full_states_its_own_uncertainty_and_causes() -> None:
    record = run_of(VLLM, sensor=0.03, lag=0.004).records[0]
    (line,) = (line for line in render_record(record).splitlines() if line.startswith("uncertainty"))
    assert "±3 % (k = 1)" in line
    assert "sensor 3 %, lag 0.4 %" in line
