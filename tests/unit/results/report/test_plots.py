"""What the plots show: the frontier, the axes of the grid, thinned lines."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from lem.cli.report import thin
from lem.results.report.content import Report, compose
from lem.results.report.context import heatmap_section, order_section
from lem.results.report.figures import frontier, pareto_section
from lem.results.run import make_run, read_run
from tests.synthetic_campaign import Campaign, Configuration


def make_report(*configurations: Configuration, cycles: int = 3, drift: float = 0.0, **failed: int) -> Report:
    campaign = Campaign(configurations, cycles=cycles, drift=drift, has_samples=False)
    return compose(make_run(campaign.records(), failed))


def grid(**changes: tuple[int, ...]) -> tuple[Configuration, ...]:
    return tuple(
        Configuration(
            f"{backend}-{batch}",
            backend=backend,
            batch_size=batch,
            energy_per_output_tok_j=cost / batch,
            invalid_attempts=dict.fromkeys(range(3), 2) if changes.get(f"{backend}_{batch}") else {},
        )
        for backend, cost in (("pytorch", 2.0), ("vllm", 1.0))
        for batch in (1, 2, 4)
    )


def test_the_frontier_is_what_no_other_beats() -> None:
    noise = random.Random(3)
    costs = [(noise.random(), noise.random()) for _ in range(200)]
    expected = {
        index for index, (x, y) in enumerate(costs) if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in costs)
    }
    assert set(frontier(costs)) == expected
    assert frontier([]) == ()


def test_equal_points_are_all_on_the_frontier_and_ties_in_one_are_not() -> None:
    assert set(frontier([(1, 1), (1, 1), (1, 2), (2, 1)])) == {0, 1}


def test_dominated_configurations_are_grey_and_the_table_says_so() -> None:
    section = pareto_section(
        make_report(
            Configuration("good", energy_per_output_tok_j=0.1, output_tok_per_s=1000),
            Configuration("bad", backend="pytorch", energy_per_output_tok_j=0.2, output_tok_per_s=500),
        )
    )
    assert 'class="m grey"' in section
    throughput = section[: section.index("pareto-latency")]
    assert throughput.count("<td class=t>yes") == 1
    assert throughput.count("<td class=t>no") == 1
    assert "On the frontier: 1 good." in throughput


def test_the_grid_is_drawn_over_the_two_axes_that_cross() -> None:
    section = heatmap_section(make_report(*grid()))
    assert "batch_size / max_num_seqs →" in section
    assert "backend ↓" in section
    assert section.count("<rect") == 6
    assert "url(#grid-hatch)" not in section


def test_cells_without_a_valid_result_are_hatched_whether_they_left_a_record_or_not(tmp_path: Path) -> None:
    lost, *others = grid(vllm_4=(1,))
    campaign = Campaign((replace(lost, failed_cycles=(0, 1, 2)), *others), cycles=3, has_samples=False)
    written = campaign.write(tmp_path)
    section = heatmap_section(compose(read_run(written.results_dir, written.campaign, written.run_id)))
    assert section.count("url(#grid-hatch)") == 2
    assert section.count("<td>failed") == 2


def test_an_option_of_too_many_values_is_named_as_the_reason_for_no_grid() -> None:
    configurations = tuple(
        Configuration(f"{precision}-{batch}", precision=precision, batch_size=batch)
        for precision in ("float16", "bfloat16")
        for batch in range(1, 31)
    )
    section = heatmap_section(make_report(*configurations, cycles=1))
    assert "vllm.max_num_seqs has 30 values" in section
    assert "Fewer than two settings vary" not in section


def test_without_two_axes_there_is_no_grid() -> None:
    assert "no grid to draw" in heatmap_section(make_report(Configuration("alone")))


def test_drift_is_flagged_above_one_percent_and_not_below() -> None:
    pair = (Configuration("a", batch_size=1), Configuration("b", batch_size=2))
    steady = Campaign(pair, cycles=8, load_sd=0, run_sd=1e-4, drift=0.005, has_samples=False)
    drifting = Campaign(pair, cycles=8, load_sd=0, run_sd=1e-4, drift=0.02, has_samples=False)
    assert '<span class="tag bad">flagged' not in order_section(compose(make_run(steady.records())))
    section = order_section(compose(make_run(drifting.records())))
    assert section.count('<span class="tag bad">flagged') == 1
    assert "Energy per output token drifts by +2.0" in section


def test_thinning_keeps_peaks_and_holes() -> None:
    points = [(float(index), 1.0) for index in range(1000)]
    points[500] = (500.0, 9.0)
    thinned = thin(points, 50, hole_s=3)
    assert len(thinned) <= 100
    assert (500.0, 9.0) in thinned
    assert None not in thinned
    with_hole = thin([*points[:300], *points[400:]], 50, hole_s=3)
    assert with_hole.count(None) == 1
    assert thin([], 50, hole_s=3) == ()
    assert thin([(1.0, 2.0)], 50, hole_s=3) == ((1.0, 2.0),)
