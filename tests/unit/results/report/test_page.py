from __future__ import annotations

import dataclasses
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lem.base.reasons import Reason
from lem.record import Record
from lem.results.axes import Key
from lem.results.compare import compare_configurations
from lem.results.comparison import headline_of
from lem.results.report import render_report
from lem.results.report.content import compose, verdict_of, workloads_of
from lem.results.report.plot import card_labels
from lem.results.run import make_run
from lem.results.stopping import StoppingRule, parse_target
from lem.results.store import Problem
from tests.goldens import assert_golden
from tests.records import make_record
from tests.synthetic_campaign import Campaign, Configuration

VOID = {"meta", "br", "wbr", "link"}
OPEN = {"td", "th", "tr"}  # HTML lets their end tags be left out, and this page leaves them out


class Reader(HTMLParser):
    """Fails where the tags of a page are not balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.feed(page)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID | OPEN:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPEN:
            assert self.stack.pop() == tag


def campaign(*configurations: Configuration, cycles: int = 3) -> list[Record]:
    return Campaign(configurations, name="small", cycles=cycles, has_samples=False).records()


def small() -> list[Record]:
    return campaign(
        Configuration("fast", batch_size=32, energy_per_output_tok_j=0.21, ttft_s=0.05, throttled_cycles=(1,)),
        Configuration("slow", backend="pytorch", batch_size=8, energy_per_output_tok_j=0.83, output_tok_per_s=400),
        Configuration("lost", batch_size=64, invalid_attempts={0: 2, 1: 2, 2: 2}),
    )


def page_of(records: list[Record], **more: object) -> str:
    return render_report(compose(make_run(records, **more)))  # type: ignore[arg-type]


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_the_same_results_give_the_same_bytes_in_whatever_order_they_are_read() -> None:
    records = small()
    shuffled = random.Random(5).sample(records, len(records))
    assert page_of(shuffled) == page_of(records)


def test_a_small_page() -> None:
    rule = StoppingRule(parse_target("ci=2%"), least_cycles=5, most_cycles=8, looks=(5,))
    page = page_of(small(), stopping=rule)
    body = page[page.index("<body>") : page.index("<script>")]
    assert_golden("results/report.html", body.replace("><", ">\n<") + "\n")


def test_one_run_that_is_not_named_is_one_more_run() -> None:
    runs = [Campaign((Configuration("a"),), cycles=1, run_id=f"20260714T10000{n}Z-3fa1") for n in range(4)]
    facts = re.search('<p class="facts">(.*?)</p>', page_of([record for run in runs for record in run.records()]))
    assert facts is not None
    assert facts[1].split(" · ")[2:4] == ["run 20260714T100002Z-3fa1", "1 more run"]


def test_without_energy_the_page_is_about_throughput_and_gives_the_reason() -> None:
    page = page_of([make_record(cycle=cycle, output_tok_per_s=100 + cycle) for cycle in range(3)])
    Reader(page)
    assert "not measured: no energy meter was used." in text_of(page)
    assert ("tok/s" in page, "J/tok" in page) == (True, False)


def test_an_estimate_is_called_one_wherever_it_is_shown() -> None:
    estimated = Configuration("estimated", backend="pytorch", energy_source="tdp_estimate")
    page = page_of(campaign(Configuration("measured"), estimated))
    assert page.count("partly an estimate from TDP") >= 4
    assert "estimated (est.)" in page
    assert '<small class="tag estimate">estimate</small>' in page


def test_no_results_and_no_valid_results_are_pages_too() -> None:
    for records, shown in (
        ([], "No results."),
        ([make_record(is_valid=False, invalid_reasons=("thermal slowdown",))], "thermal slowdown"),
    ):
        page = page_of(records, campaign_name="nothing", run_id="20260714T100000Z-3fa1")
        Reader(page)
        assert shown in page
        assert "<tr class=best>" not in page


def test_what_was_left_out_is_named_whatever_folder_it_is_in() -> None:
    kinds = (("e", "corrupt"), ("f", "half-written"), ("g", "missing"), ("h", "altered"))
    pages = {
        page_of([make_record()], failed={"gone": 3}, problems=[
            Problem(Path(f"{folder}/demo/r/{name}/attempt-1/result.json"), kind, "x", "r", name) for name, kind in kinds
        ])
        for folder in ("/one/results", "results", "/an/other/place")
    }  # fmt: skip
    (text,) = map(text_of, pages)
    assert "Left out: 4 attempts (1 without a result, 1 half-written, 1 corrupt, 1 altered)" in text
    assert "r/e/attempt-1/result.json" in text
    assert "3 files left out" in text
    assert "3 experiments failed" in text


@pytest.mark.parametrize(
    ("baseline", "cycles", "best"), [(None, 5, 1), ("hungry", 5, 1), (None, 1, None), ("hungry", 1, None)]
)
def test_a_row_stands_out_where_the_paired_comparison_finds_a_difference(
    baseline: str | None, cycles: int, best: int | None
) -> None:
    thrifty = Configuration("thrifty", energy_per_output_tok_j=0.2)
    records = campaign(thrifty, Configuration("hungry", backend="pytorch", energy_per_output_tok_j=0.4), cycles=cycles)
    run = make_run(records)
    report = compose(run, run.select(baseline) if baseline else None)
    verdict = verdict_of(report)
    start = "thrifty (1) uses 0.5|thrifty (1) uses 0.498" if baseline else "hungry (2) uses 2.0|hungry (2) uses 1.9"
    assert verdict.sentence.startswith(tuple(start.split("|")))
    assert (verdict.best, render_report(report).count("<tr class=best>")) == (best, int(best is not None))
    chosen = run.select(baseline or "1")
    others = [item for item in run.configurations if item is not chosen]
    assert verdict.sentence == headline_of(compare_configurations(run, chosen, others))


def test_the_verdict_counts_those_that_are_close_and_names_those_that_cannot_be_compared() -> None:
    close = (Configuration(f"c{size}", batch_size=size, energy_per_output_tok_j=0.301) for size in range(2, 6))
    throttled = (Configuration(f"t{size}", batch_size=size, invalid_attempts={0: 2}) for size in (8, 9))
    best = Configuration("best", energy_per_output_tok_j=0.295)
    verdict = verdict_of(compose(make_run(campaign(best, *close, *throttled))))
    assert verdict.best is None
    assert "4 not distinguishable, 2 without a verdict" in verdict.sentence
    assert [whom in " ".join(verdict.remarks) for whom in ("(6 t8)", "(7 t9)")] == [True, True]


def test_there_is_a_frontier_for_each_workload() -> None:
    short = [
        Configuration(f"s{size}", batch_size=size, energy_per_output_tok_j=joules, output_tok_per_s=rate, ttft_s=0.1)
        for size, joules, rate in ((1, 0.3, 800.0), (8, 0.2, 1600.0))
    ]
    long = dataclasses.replace(
        short[0], name="long", energy_per_output_tok_j=0.5, output_tok_per_s=500.0, options={"max_output_tokens": 512}
    )
    report = compose(make_run(campaign(*short, long)))
    assert [[entry.name for entry in group] for group in workloads_of(report.entries)] == [["s1", "s8"], ["long"]]
    text = text_of(render_report(report))
    assert "On the frontier of closed batch, synthetic aaaaaaaa, 128 tokens per answer: 2 s8." in text
    assert "On the frontier of closed batch, synthetic aaaaaaaa, 512 tokens per answer: 3 long." in text
    assert "Grey: 1 that another configuration of the same workload beats in both means." in text


def test_not_measured_is_never_zero_and_a_measured_zero_is_not_a_missing_value() -> None:
    records = [make_record(energy_per_output_tok_j=0.3, cycle=cycle) for cycle in range(3)]
    page = page_of([*records, make_record(config_name="dark", config_hash="d" * 16)])
    row = next(line for line in page.split("<tr>") if "dark" in line and "data-v" in line)
    assert ('data-v=""' in row, "not measured" in row, ">0<" in row) == (True, True, False)
    records = [make_record(cycle=cycle, output_tok_per_s=0.0 if cycle == 1 else 100.0) for cycle in range(3)]
    assert "no geometric mean" in page_of(records)


def strange(record: Record, noise: random.Random) -> Record:
    """The record with some of its values missing, zero, tiny or huge."""
    sections = {}
    for name in ("throughput", "efficiency", "energy", "idle", "window"):
        section = getattr(record, name)
        changes, lost = {}, dict(section.null_reasons)
        for item in dataclasses.fields(section):
            value = getattr(section, item.name)
            is_optional = "None" in str(item.type)
            if isinstance(value, float) and noise.random() < 0.4:
                choices = [0.0, 1e-12, 1e15, -1.0 if "net" in item.name else 0.5, *([None] if is_optional else [])]
                changes[item.name] = noise.choice(choices)
                if changes[item.name] is None:
                    lost[item.name] = Reason.of("verbatim", text="lost")
        sections[name] = dataclasses.replace(section, **changes, null_reasons=lost)
    return dataclasses.replace(record, **sections)


@pytest.mark.parametrize("seed", range(16))
def test_strange_values_give_a_page_without_nan(seed: int) -> None:
    noise = random.Random(seed)
    configurations = tuple(
        Configuration(f"{noise.choice('abc')}-{index}", batch_size=index + 1, ttft_s=noise.choice((None, 0.1)))
        for index in range(noise.randint(1, 12))
    )
    records = campaign(*configurations, cycles=noise.randint(1, 4))
    page = page_of([strange(record, noise) for record in records if noise.random() < 0.8])
    Reader(page)
    assert not re.search(r"\b(nan|inf)\b", text_of(page[page.index("<body>") : page.index("<script>")]))
    assert not re.search(r'="[^"]*\b(nan|inf)\b', page[page.index("<main>") :])


def test_the_power_at_rest_is_the_one_that_net_energy_leaves_out() -> None:
    records = campaign(Configuration("small"))
    idle = dataclasses.replace(records[0].idle, idle_loaded_power_w=70.0, idle_net_power_w=75.0)
    assert "idle power 75 W" in text_of(page_of([dataclasses.replace(item, idle=idle) for item in records]))


def _headings(table: str) -> list[str]:
    return [re.sub("<[^>]+>", "", text) for text in re.findall("<th[^>]*>(.*?)</th>", table.partition("</thead>")[0])]


def test_the_table_has_the_axes_of_the_terminal_as_columns() -> None:
    grid = [
        Configuration(f"{backend}-batch={size}", backend=backend, batch_size=size, failed_cycles=failed)
        for backend, size, failed in (("vllm", 1, ()), ("vllm", 8, ()), ("pytorch", 1, ()), ("pytorch", 8, (0, 1, 2)))
    ]
    run = make_run(campaign(*grid))
    page = render_report(compose(run))
    overview = page[page.index('class="overview') :]
    settings, names = zip(*((item.settings, item.name) for item in run.configurations), strict=True)
    axes = [column.heading.replace("\n", "") for column in Key("1234", settings, names).columns]
    assert axes == ["backend", "batch_size"]
    assert _headings(overview)[:4] == ["No.", *axes, "Energy per output token, J"]


@pytest.mark.parametrize("records", [small(), [make_record()], []])
def test_no_heading_is_above_an_empty_section(records: list[Record]) -> None:
    page = page_of(records)
    sections = re.findall(r"<section\b.*?</section>", page, re.DOTALL)
    empty = [text_of(it)[:60] for it in sections if not re.search("<(svg|table|ul)", it) and 'id="absent"' not in it]
    assert empty == []
    bare = re.findall(r'<h[23]\b[^>]*>[^<]*</h[23]><p[^>]*class="absent"', page.partition('id="absent"')[0])
    assert bare == []
    assert page.count("<li><a href=") == len(sections)


def test_a_name_keeps_its_number_and_punctuation_and_a_number_keeps_its_unit() -> None:
    report = compose(make_run(campaign(Configuration("a-b"), Configuration("a-b-c", batch_size=2))))
    found = report.unbroken("1 % of 5 results (1 a-b, 2 “a-b-c”): 0.5 J, 3 steps, no a-b-d")
    whole = ["(1 a-b,", "2 “a-b-c”):"]
    assert re.findall("<span class=name>(.*?)</span>", found) == whole
    assert found.replace("\u00a0", "_").startswith("1_% of 5 results <span")
    assert found.replace("\u00a0", "_").endswith("</span> 0.5_J, 3 steps, no a-b-d")


def test_the_cells_of_cards_are_named_by_headings_that_cannot_leave_the_style() -> None:
    page = page_of(campaign(Configuration("a", batch_size=1, options={"x": "</style><script>"})))
    (style,) = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    names = re.findall(r'<table class="[^"]*\b(k[0-9]+)">', page)
    assert len(names) > 3
    assert all(f".{name} tbody tr>:nth-child(1)::before{{content:" in style for name in names)
    hostile = card_labels(['<table class="cards k1"><thead><tr><th>&lt;/style&gt;"}</th><th>ü</th></tr></thead>'])
    assert "<" not in hostile.partition("{")[2]
    assert hostile.count('"') % 2 == 0
