"""The report in a real browser."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lem.cli.main import main
from lem.results.report import render_report
from lem.results.report.content import compose
from lem.results.run import make_run
from tests.browser import axe_violations, browser, opened
from tests.records import load_sweep
from tests.synthetic_campaign import Campaign, Configuration, sweep

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.needs("chromium")

HOSTILE = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>\'&amp;\u202e name-with-no-end' + "x" * 90
)


def _grid() -> Campaign:
    """Two backends, three batch sizes, two precisions; some throttled, failed, unsteady, with warnings."""
    configurations = []
    for backend, cost in (("pytorch", 1.0), ("vllm", 0.45)):
        for batch in (1, 8, 32):
            for precision in ("float16", "bfloat16"):
                gain = batch**0.45 * (1.05 if precision == "bfloat16" else 1)
                cell = (backend, batch, precision)
                configurations.append(
                    Configuration(
                        f"{backend}-Llama-3.1-8B-fp_precision={precision}-batch={batch}",
                        backend=backend,
                        precision=precision,
                        batch_size=batch,
                        energy_per_output_tok_j=1.4 * cost / gain,
                        output_tok_per_s=150 / cost * gain,
                        ttft_s=0.03 * math.sqrt(batch),
                        throttled_cycles=(1,) if cell == ("vllm", 32, "bfloat16") else (),
                        failed_cycles=(0, 1, 2) if cell == ("pytorch", 32, "float16") else (),
                        capped_ratio=0.3 if batch == 32 else 0.0,
                        warnings=("counter against integrated power: 6 % apart",) if batch == 1 else (),
                        is_steady=batch != 1,
                    )
                )
    return Campaign(tuple(configurations), name="grid", cycles=3, drift=0.03, window_s=8)


_CPU = (
    Configuration("small", energy_per_output_tok_j=None),
    Configuration("large", backend="pytorch", energy_per_output_tok_j=None, output_tok_per_s=900),
)
_HOSTILE = (
    Configuration(HOSTILE, model=HOSTILE, warnings=(HOSTILE,), energy_source="tdp_estimate"),
    Configuration("plain", backend="pytorch", energy_per_output_tok_j=0.9, failed_cycles=(0,)),
)
CAMPAIGNS = {
    "grid": _grid(),
    "cpu": Campaign(_CPU, name="cpu"),
    "hostile": Campaign(_HOSTILE, name="hostile", cycles=2, window_s=5),
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of each campaign."""
    found = {name: write_report(made, tmp_path_factory.mktemp(name)) for name, made in CAMPAIGNS.items()}
    found["loads"] = tmp_path_factory.mktemp("loads") / "report.html"
    records = load_sweep({width: width / 2.5 for width in range(4, 13)}, (1, 2, 4))
    found["loads"].write_text(render_report(compose(make_run(records))), encoding="utf-8")
    return found


def write_report(campaign: Campaign, folder: Path) -> Path:
    written = campaign.write(folder)
    path = folder / "report.html"
    command = ["report", written.campaign, "--results-dir", str(written.results_dir), "--output", str(path)]
    assert main(command, io.StringIO(), io.StringIO()) == 0
    return path


OPEN_ALL = "for (const item of document.querySelectorAll('details')) item.open = true"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
HIDDEN = """[...document.querySelectorAll(".scroll")].filter(item => item.scrollWidth > item.clientWidth + 1)
    .map(item => item.getAttribute("aria-label"))"""
UNNAMED = """[...document.querySelectorAll(".cards tbody :is(th, td)")]
    .filter(cell => cell.checkVisibility() && !cell.textContent.trim()).map(cell => cell.parentElement.textContent)"""
# Texts of drawings that are cut off, lie on another text, or are smaller than ten pixels.
ILLEGIBLE = """() => [...document.querySelectorAll("svg[role=img]")].flatMap(svg => {
    const outer = svg.getBoundingClientRect(), scale = svg.getScreenCTM().a;
    const texts = [...svg.querySelectorAll("text")].map(text => [text, text.getBoundingClientRect()]);
    const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4;
    return texts.flatMap(([text, box], index) => [
        ...box.left < outer.left - 1 || box.right > outer.right + 1 || box.bottom > outer.bottom + 1 ? ["cut"] : [],
        ...texts.slice(index + 1).filter(([, other]) => meet(box, other)).map(([other]) => other.textContent),
        ...scale * parseFloat(getComputedStyle(text).fontSize) < 10 ? ["small"] : [],
    ].map(found => [svg.querySelector("title").textContent, text.textContent, found]));
})"""
PLOTS = """() => [...document.querySelectorAll("svg[role=img]")].map(svg => [
    svg.querySelector(":scope > title").textContent,
    document.getElementById(svg.getAttribute("aria-labelledby")) === svg.querySelector(":scope > title"),
    svg.querySelector(":scope > desc").textContent,
    svg.closest("figure").querySelectorAll("details table tbody tr").length,
])"""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
@pytest.mark.parametrize("name", [*CAMPAIGNS, "loads"])
def test_a_page_fetches_nothing_fits_its_window_and_is_accessible(
    name: str, width: int, scheme: str, pages: dict[str, Path], chromium: Browser
) -> None:
    with opened(chromium, pages[name], width=width, scheme=scheme) as found:
        assert found.evaluate(OVERFLOW) == 0
        found.evaluate(OPEN_ALL)
        assert found.evaluate(OVERFLOW) == 0
        hidden = found.evaluate(HIDDEN)
        assert (found.evaluate(UNNAMED) if width == 390 else [], found.evaluate(ILLEGIBLE)) == ([], [])
        assert hidden == [] or (width > 390 and "Table of all configurations" not in hidden)
        plots = found.evaluate(PLOTS)
        assert len(plots) >= 4
        assert all(map(all, plots)), "each is named, labelled by its name, described, and has a data table"
        assert (found.requests, found.complaints) == ([pages[name].as_uri()], [])
        assert axe_violations(found) == []


def test_the_policy_forbids_other_scripts_and_pictures_and_hostile_names_are_text(
    pages: dict[str, Path], chromium: Browser
) -> None:
    with opened(chromium, pages["hostile"]) as found:
        assert found.evaluate("[window.hacked, document.images.length, document.scripts.length]") == [None, 0, 1]
        titles = "[...document.querySelectorAll('table.overview span[title]')].map(item => item.title).join()"
        assert "<img src=x" in found.evaluate(titles)  # the whole name, of which the cell shows the ends
        found.evaluate("""() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            const picture = document.createElement("img");
            picture.src = "https://example.org/picture.png";
            document.body.append(script, picture);
        }""")
        assert found.evaluate("window.hacked") is None
        assert len(found.complaints) == 2
        assert all("Content Security Policy" in text for text in found.complaints)


def test_dark_is_dark_and_print_is_on_white(pages: dict[str, Path], chromium: Browser) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    with opened(chromium, pages["grid"], scheme="dark") as found:
        assert found.evaluate(background) == "rgb(20, 23, 27)"
        found.page.emulate_media(media="print", color_scheme="dark")
        assert found.evaluate(background) == "rgb(255, 255, 255)"
        assert not found.page.is_visible("nav")
        assert found.page.is_visible("table.overview")
    with opened(chromium, pages["grid"]) as found:
        assert found.evaluate(background) == "rgb(255, 255, 255)"


COLUMN = """column =>
    [...document.querySelectorAll("table.overview tbody tr")].map(row => row.cells[column].dataset.v)"""


def test_the_keyboard_sorts_and_what_is_not_measured_stays_last(pages: dict[str, Path], chromium: Browser) -> None:
    with opened(chromium, pages["grid"]) as found:
        heads = found.page.locator("table.overview thead th")
        column = next(i for i, text in enumerate(heads.all_inner_texts()) if "Output throughput" in text)
        head, sorted_heads = heads.nth(column), found.page.locator("table.overview thead th[aria-sort]")
        assert sorted_heads.count() == 1
        assert "No." in sorted_heads.inner_text()
        head.locator("button").focus()
        for key, order, sign in (("Enter", "ascending", 1), ("Space", "descending", -1)):
            found.page.keyboard.press(key)
            assert (sorted_heads.count(), head.get_attribute("aria-sort")) == (1, order)
            *values, last = found.page.evaluate(COLUMN, column)
            assert last == "", "the configuration without a value is last in both orders"
            numbers = [sign * float(value) for value in values]
            assert numbers == sorted(numbers)
        assert "descending" in found.page.locator("#results [role=status]").inner_text()


def test_every_button_is_reached_by_tabbing(pages: dict[str, Path], chromium: Browser) -> None:
    with opened(chromium, pages["cpu"]) as found:
        names = found.evaluate("[...document.querySelectorAll('button, summary')].map(item => item.textContent.trim())")
        left, stops = set(names), 0
        while left and stops < 300:
            found.page.keyboard.press("Tab")
            left.discard(found.evaluate("document.activeElement.textContent.trim()"))
            stops += 1
        assert not left


def test_the_page_is_whole_without_a_script(pages: dict[str, Path], chromium: Browser) -> None:
    with opened(chromium, pages["grid"], has_script=False) as found:
        assert found.page.locator("table.overview tbody tr").count() == 12
        assert found.page.locator("table.overview button").count() == 0
        found.page.locator("#cycles summary").first.click()
        assert found.page.locator("#cycles details table").first.is_visible()


@pytest.mark.parametrize("cycles", [1, 5])
def test_a_thousand_experiments_take_less_than_two_megabytes(cycles: int, tmp_path: Path, chromium: Browser) -> None:
    path = write_report(sweep(1000, cycles=cycles), tmp_path)
    assert path.stat().st_size < 2_000_000
    with opened(chromium, path, width=360) as found:
        assert found.page.locator("table.overview tbody tr").count() == 1000 // cycles
        assert (found.complaints, found.evaluate(OVERFLOW)) == ([], 0)
