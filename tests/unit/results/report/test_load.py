from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from lem.record import Record
from lem.results.report import render_report
from lem.results.report.content import compose
from lem.results.report.load import load_section
from lem.results.run import make_run
from tests.records import load_sweep, make_record, under_load

LOADS = (1, 2, 4, 8, 16)


def section_of(records: Sequence[Record]) -> str:
    return load_section(compose(make_run(records)))


def figure(section: str, name: str) -> str:
    (found,) = re.findall(rf'<figure id="?{name}-target_qps-1"?.*?</figure>', section, re.DOTALL)
    return str(found)


def test_each_series_is_a_line_with_a_point_for_each_load_and_an_interval() -> None:
    section = section_of(load_sweep({8: 3.0, 32: 9.0}, LOADS))
    energy = figure(section, "load-energy")
    lines = re.findall(r'<path d="([^"]*)" class="line g([01])"', energy)
    assert [(drawn.count("L"), group) for drawn, group in lines] == [(2, "0"), (4, "1")]
    assert [drawn.count("V") for drawn in re.findall(r'<path d="([^"]*)" class="span"', energy)] == [3, 5]
    assert "Without a valid result: number 4, 5." in energy, "their queue grew"
    rows = re.findall(r"<tr>(.*?)(?=<tr>|</tbody>)", energy.partition("<tbody>")[2], re.DOTALL)
    assert len(rows) == 10
    assert re.findall(r">([0-9.]+ – [0-9.]+)", rows[0]), "with its interval"


def test_the_share_of_good_requests_has_the_share_that_the_slo_demands() -> None:
    section = section_of(load_sweep({8: 3.0}, LOADS, slo={"ttft_ms": 200, "attainment_pct": 90}))
    share = figure(section, "load-good")
    assert share.count('class="front"') == 1
    assert "at which 90 % of requests have TTFT ≤ 200 ms".replace(" %", "\u00a0%").replace(" ms", "\u00a0ms") in section
    assert "load-good" not in section_of(load_sweep({8: 3.0}, LOADS, slo={})), "without an SLO"


@pytest.mark.parametrize(
    ("knee", "loads", "interval", "code"),
    [
        (3.0, LOADS, "2 – 4", None),
        (99.0, LOADS, "≥ 16", "no load is known to break the SLO, 16 still keeps it: try higher ones"),
        (0.5, (1, 2), "&lt; 1", "no load is known to keep the SLO, 1 already breaks it: try lower ones"),
    ],
)
def test_knees_are_a_table_and_a_bar_below_the_plot(
    knee: float, loads: Sequence[float], interval: str, code: str | None
) -> None:
    section = section_of(load_sweep({8: knee}, loads))
    assert f"<td>{interval}" in section.partition("<figure")[0]
    assert figure(section, "load-energy").count('class="bar g0"') == 1
    assert ("try " in section) == (code is not None)
    assert code is None or code in section


def test_small_shares_are_on_an_axis_from_zero_and_not_on_a_logarithmic_one() -> None:
    records = [under_load(make_record(config_name=f"c{n}", n_requests=100), n, good) for n, good in ((1, 100), (2, 2))]
    labels = re.findall(r">([0-9.]+)</text>", figure(section_of(records), "load-good").partition("<table")[0])
    assert {"0", "20", "60", "100"} <= set(labels)


def test_without_energy_the_throughput_is_drawn() -> None:
    records = [under_load(make_record(config_name=f"c{n}", n_requests=9), n, 9) for n in (1, 2)]
    page = render_report(compose(make_run(records)))
    assert "load-throughput-target_qps-1" in page
    assert "Throughput against load" in page


def test_more_series_than_colours_are_drawn_in_several_figures() -> None:
    section = section_of(load_sweep(dict.fromkeys(range(1, 11), 3.0), (1, 2), cycles=1))
    assert [section.count(f'id="load-energy-target_qps-{n}"') for n in (1, 2, 3)] == [1, 1, 0]


def test_a_batch_has_no_section_and_a_single_load_says_why_there_is_no_figure() -> None:
    assert section_of([make_record()]) == ""
    assert "No two configurations differ only in their load." in section_of(load_sweep({8: 3.0}, (1,)))
    page = render_report(compose(make_run([make_record()])))
    assert 'id="load"' not in page
