from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lem.results.report.content import Report, compose, frontier
from lem.results.report.context import heatmap_section, order_section
from lem.results.report.figures import latency_section, pareto_section
from lem.results.run import make_run, read_run
from tests.synthetic_campaign import Campaign, Configuration, sweep


def report_of(*configurations: Configuration, cycles: int = 3) -> Report:
    return compose(make_run(Campaign(configurations, cycles=cycles, has_samples=False).records()))


def grid() -> list[Configuration]:
    return [
        Configuration(f"{backend}-{batch}", backend=backend, batch_size=batch, energy_per_output_tok_j=cost / batch)
        for backend, cost in (("pytorch", 2.0), ("vllm", 1.0))
        for batch in (1, 2, 4)
    ]


def test_the_frontier_is_what_no_other_beats() -> None:
    noise = random.Random(3)
    costs = [(noise.random(), noise.random()) for _ in range(200)]
    expected = {
        index for index, (x, y) in enumerate(costs) if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in costs)
    }
    assert set(frontier(costs)) == expected
    assert frontier([]) == ()
    assert set(frontier([(1, 1), (1, 1), (1, 2), (2, 1)])) == {0, 1}, "equal points are all on it, ties in one are not"


def test_dominated_configurations_are_grey_and_the_table_says_so() -> None:
    bad = Configuration("bad", backend="pytorch", energy_per_output_tok_j=0.2, output_tok_per_s=500)
    section = pareto_section(report_of(Configuration("good", energy_per_output_tok_j=0.1, output_tok_per_s=1000), bad))
    throughput = section[: section.index("pareto-latency")]
    assert throughput.count('class="m grey"') == 1
    assert [throughput.count(f"<td class=t>{answer}") for answer in ("yes", "no")] == [1, 1]
    assert "On the frontier: 1 good." in throughput


def test_the_grid_is_drawn_over_the_axes_that_cross_and_without_a_valid_result_it_is_hatched(tmp_path: Path) -> None:
    section = heatmap_section(report_of(*grid()))
    assert ("backend →" in section, "batch_size ↓" in section) == (True, True)
    assert (section.count("<rect"), section.count("url(#grid-hatch)")) == (6, 0)
    lost, *others, invalid = grid()  # one without a record, one with invalid records alone
    configurations = (
        replace(lost, failed_cycles=(0, 1, 2)),
        *others,
        replace(invalid, invalid_attempts=dict.fromkeys(range(3), 2)),
    )
    written = Campaign(configurations, cycles=3, has_samples=False).write(tmp_path)
    section = heatmap_section(compose(read_run(written.results_dir, written.campaign, written.run_id)))
    assert [section.count(text) for text in ("url(#grid-hatch)", "<td>failed")] == [2, 2]


def test_configurations_that_share_a_cell_show_the_best_of_them() -> None:
    models = [  # too many for an axis
        Configuration(str(cost), ("pytorch", "vllm")[cost % 2], f"m{cost}", batch_size=1 + cost // 2 % 2,
                      energy_per_output_tok_j=1.0 + cost)
        for cost in range(28)
    ]  # fmt: skip
    section = heatmap_section(report_of(*models, cycles=1))
    assert "Up to 7 configurations share a cell, which shows the best of them." in section
    shown = re.findall(r'class="on-\w+" text-anchor="middle">([0-9.]+)<', section)
    assert [round(float(best)) for best in sorted(shown)] == [1, 2, 3, 4]


def test_more_than_200_configurations_have_their_latencies_in_a_table_alone() -> None:
    section = latency_section(compose(make_run(sweep(260, cycles=1).records())))
    assert "configurations 41 to 80</summary><figure" in section
    assert "configurations 201 to 260, as a table only</summary><div" in section


def test_an_option_of_too_many_values_is_named_as_the_reason_for_no_grid() -> None:
    configurations = [
        Configuration(f"{precision}-{batch}", precision=precision, batch_size=batch)
        for precision in ("float16", "bfloat16")
        for batch in range(1, 31)
    ]
    assert "vllm.max_num_seqs has 30 values" in heatmap_section(report_of(*configurations, cycles=1))
    assert "<svg" not in heatmap_section(report_of(Configuration("alone")))


@pytest.mark.parametrize(("drift", "n_flagged"), [(0.005, 0), (0.02, 1)])
def test_drift_is_flagged_above_one_percent_and_not_below(drift: float, n_flagged: int) -> None:
    pair = (Configuration("a", batch_size=1), Configuration("b", batch_size=2))
    campaign = Campaign(pair, cycles=8, load_sd=0, run_sd=1e-4, drift=drift, has_samples=False)
    section = order_section(compose(make_run(campaign.records())))
    assert section.count('<span class="tag bad">flagged') == n_flagged
    assert f"Energy per output token rises by {100 * drift:g}" in section
