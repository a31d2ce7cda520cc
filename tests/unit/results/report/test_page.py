"""The page as a whole: its parts, its bytes, what it says of damage, estimates and what was not measured."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import random
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lem.record import Record
from lem.results.report import render_report
from lem.results.report.content import Report, compose
from lem.results.run import StoppingRule, make_run, parse_target
from lem.results.store import Problem
from tests.goldens import assert_golden
from tests.records import make_record
from tests.synthetic_campaign import Campaign, Configuration

PARTS = (
    "validity",
    "results",
    "pareto",
    "cycles",
    "grid-map",
    "traces",
    "latencies",
    "drift",
    "environment",
    "methods",
)
VOID = {"meta", "br", "wbr", "link"}
# Elements whose end tag HTML lets be left out, and which this page leaves out.
OPEN = {"td", "th", "tr"}


class Reader(HTMLParser):
    """Checks that tags are balanced; collects ids, references to them, and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.addresses: list[str] = []
        self.inline_styles = 0
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID | OPEN:
            self.stack.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPEN:
            assert self.stack.pop() == tag

    def _attributes(self, attrs: Iterable[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name in ("aria-labelledby", "aria-describedby") and value:
                self.references.append(value)
            if name in ("href", "src") and value:
                self.addresses.append(value)
            self.inline_styles += name == "style"
            if name.startswith("on"):
                self.handlers.append(name)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.stack == []
    return reader


def small() -> Campaign:
    return Campaign(
        (
            Configuration("fast", batch_size=32, energy_per_output_tok_j=0.21, ttft_s=0.05, throttled_cycles=(1,)),
            Configuration("slow", backend="pytorch", batch_size=8, energy_per_output_tok_j=0.83, output_tok_per_s=400),
            Configuration("lost", batch_size=64, invalid_attempts={0: 2, 1: 2, 2: 2}),
        ),
        name="small",
        cycles=3,
        has_samples=False,
    )


def page_of(records: list[Record], **more: object) -> str:
    return render_report(compose(make_run(records, **more)))  # type: ignore[arg-type]


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_all_parts_are_there_validity_first_and_everything_refers_to_something() -> None:
    reader = read(page_of(small().records()))
    assert tuple(name for name in reader.ids if name in PARTS) == PARTS
    assert len(set(reader.ids)) == len(reader.ids)
    assert set(reader.references) <= set(reader.ids)
    assert {f"#{name}" for name in PARTS} <= set(reader.addresses)


def test_nothing_is_fetched_and_style_and_script_are_named_by_their_hashes() -> None:
    page = page_of(small().records())
    reader = read(page)
    assert all(address.startswith("#") for address in reader.addresses)
    assert (reader.inline_styles, reader.handlers) == (0, [])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; ")
    for element in ("style", "script"):
        content = re.search(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy[1]
    assert "http" not in text_of(page)


def test_the_same_results_give_the_same_bytes_in_whatever_order_they_are_read() -> None:
    records = small().records()
    page = page_of(records)
    shuffled = [*records]
    random.Random(5).shuffle(shuffled)
    assert page_of(shuffled) == page


def test_a_small_page() -> None:
    page = page_of(small().records())
    body = page[page.index("<body>") : page.index("<script>")]
    assert_golden("results/report.html", body.replace("><", ">\n<") + "\n")


def test_hostile_names_stay_text() -> None:
    name = "</title></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    records = [
        make_record(config_name=name, model=name, host="h", cycle=cycle, warnings=(name,), requested={name: name})
        for cycle in range(3)
    ]
    page = page_of([*records, make_record(config_name=name + "2", config_hash="f" * 16)], campaign_name=name)
    reader = read(page)
    assert reader.handlers == []
    assert page.count("<script>") == 1
    assert "<img" not in page


def test_no_energy_anywhere_gives_a_page_about_throughput_with_the_reason() -> None:
    records = [make_record(cycle=cycle, output_tok_per_s=100 + cycle) for cycle in range(3)]
    page = page_of(records)
    read(page)
    text = text_of(page)
    assert "no energy not measured: no energy meter was used. The page is about throughput instead." in text
    assert "tok/s" in text
    assert "J/tok" not in text
    assert "nan" not in text.lower().split()


def test_an_estimate_is_called_one_wherever_it_is_shown() -> None:
    records = Campaign(
        (
            Configuration("measured"),
            Configuration("estimated", backend="pytorch", energy_source="tdp_estimate"),
        ),
        cycles=3,
        has_samples=False,
    ).records()
    page = page_of(records)
    text = text_of(page)
    assert text.count("partly an estimate from TDP") >= 4
    assert "estimated (est.)" in text
    assert '<small class="tag estimate">estimate</small>' in page
    assert "design power (TDP)" in text


def test_no_results_and_no_valid_results_are_pages_too() -> None:
    empty = page_of([], campaign_name="nothing", run_id="20260714T100000Z-3fa1")
    read(empty)
    assert "No results." in empty
    invalid = page_of([make_record(is_valid=False, invalid_reasons=("thermal slowdown",))])
    read(invalid)
    assert "No configuration has a valid result" in invalid
    assert "thermal slowdown" in invalid


def test_what_was_left_out_is_named() -> None:
    problems = [
        Problem(Path("results/demo/r/e/attempt-1/result.json"), "corrupt", "not JSON: line 1", "r", "e"),
        Problem(Path("results/demo/r/f/attempt-1"), "half-written", "writing was cut off", "r", "f"),
        Problem(Path("results/demo/r/g/attempt-1"), "missing", "no result.json", "r", "g"),
    ]
    text = text_of(page_of([make_record()], problems=problems, failed={"gone": 3}))
    assert "Left out: 3 attempts (1 without a result, 1 half-written, 1 corrupt)" in text
    assert "r/e/attempt-1/result.json" in text
    assert "2 files left out" in text
    assert "3 experiments failed" in text


def test_an_unequal_exclusion_is_no_verdict_and_all_attempts_are_shown_beside() -> None:
    text = text_of(page_of(small().records()))
    assert "no verdict on the next best" in text
    assert "unequally much was excluded" in text
    assert "all attempts" in text


def test_the_verdict_is_paired_and_corrected() -> None:
    pair = (
        Configuration("thrifty", energy_per_output_tok_j=0.2),
        Configuration("hungry", backend="pytorch", energy_per_output_tok_j=0.4),
    )
    text = text_of(page_of(Campaign(pair, cycles=5, has_samples=False).records()))
    assert re.search(
        r"“thrifty” uses the least energy per output token: 0\.\d+ J \(95 % 0\.\d+ – 0\.\d+\), 5 cycles", text
    )
    assert re.search(r"It uses 0\.[45]\d+ × the energy per output token of “hungry”", text)
    assert "Holm-adjusted p &lt; 0.001" in text


def test_what_lem_check_finds_stands_at_the_top_with_what_to_do() -> None:
    text = text_of(page_of([make_record(cycle=0)]))
    assert "few cycles one cycle has no interval → use --cycles 5, or --until ci=2%" in text
    assert text.index("few cycles") < text.index("makes the most") if "makes the most" in text else True


def test_net_energy_stands_beside_gross_and_is_not_it() -> None:
    page = page_of(small().records())
    start = page.index("More figures of every configuration")
    heads, row = page[start:].split("<tr>")[1:3]
    assert "Net energy per output token, J" in heads
    net = float(row.split("<td>")[2])
    assert 0 < net < 0.21


def test_cycles_added_until_an_interval_was_narrow_are_said_to_be() -> None:
    rule = StoppingRule(parse_target("ci=2%"), least_cycles=5, most_cycles=8)
    text = text_of(page_of(small().records(), stopping=rule))
    assert "Cycles were added" in text


def test_not_measured_is_never_zero() -> None:
    records = [dataclasses.replace(make_record(energy_per_output_tok_j=0.3, cycle=cycle)) for cycle in range(3)]
    report: Report = compose(make_run([*records, make_record(config_name="dark", config_hash="d" * 16)]))
    page = render_report(report)
    row = next(line for line in page.split("<tr>") if "dark" in line and "data-v" in line)
    assert 'data-v=""' in row
    assert "not measured" in row
    assert ">0<" not in row


def strange(record: Record, noise: random.Random) -> Record:
    """The record with some of its values gone, zero, tiny or huge."""
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
                    lost[item.name] = "lost"
        sections[name] = dataclasses.replace(section, **changes, null_reasons=lost)
    return dataclasses.replace(record, **sections)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_records_hold_there_is_a_page(seed: int) -> None:
    noise = random.Random(seed)
    configurations = tuple(
        Configuration(f"{noise.choice('abc')}-{index}", batch_size=index + 1, ttft_s=noise.choice((None, 0.1)))
        for index in range(noise.randint(1, 12))
    )
    records = Campaign(configurations, cycles=noise.randint(1, 4), has_samples=False).records()
    page = page_of([strange(record, noise) for record in records if noise.random() < 0.8])
    read(page)
    assert not re.search(r"\b(nan|inf)\b", text_of(page[page.index("<body>") : page.index("<script>")]))
    assert not re.search(r'="[^"]*\b(nan|inf)\b', page[page.index("<main>") :])


def test_a_zero_that_was_measured_is_no_missing_value() -> None:
    records = [make_record(cycle=cycle, output_tok_per_s=0.0 if cycle == 1 else 100.0) for cycle in range(3)]
    text = text_of(page_of(records))
    assert "no geometric mean" in text


def test_a_row_stands_out_only_where_the_verdict_holds() -> None:
    pair = (Configuration("a", energy_per_output_tok_j=0.2), Configuration("b", backend="pytorch"))
    told = page_of(Campaign(pair, cycles=5, has_samples=False).records())
    untold = page_of(Campaign(pair, cycles=1, has_samples=False).records())
    assert (told.count("<tr class=best>"), untold.count("<tr class=best>")) == (1, 0)


def test_the_page_does_not_depend_on_where_the_results_lie() -> None:
    pages = {
        page_of([make_record()], problems=[Problem(Path(f"{folder}/demo/r/e/a/result.json"), "corrupt", "x", "r", "e")])
        for folder in ("/one/results", "results", "/an/other/place")
    }
    assert len(pages) == 1
