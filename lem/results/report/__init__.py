"""The report: one HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from importlib import resources

from lem.base import __version__
from lem.base.units import plural
from lem.results.report.content import Report
from lem.results.report.context import heatmap_section, order_section, traces_section
from lem.results.report.figures import cycles_section, latency_section, pareto_section
from lem.results.report.plot import Markup, tag
from lem.results.report.tables import environment_section, methods_section, results_section, validity_section

_SECTIONS = (
    ("validity", "Validity", validity_section),
    ("results", "Results", results_section),
    ("pareto", "Energy against speed", pareto_section),
    ("cycles", "Every cycle", cycles_section),
    ("grid-map", "Over the grid", heatmap_section),
    ("traces", "Power and temperature over time", traces_section),
    ("latencies", "Latency", latency_section),
    ("drift", "Drift", order_section),
    ("environment", "Environment", environment_section),
    ("methods", "How each number was measured", methods_section),
)


def render_report(report: Report) -> str:
    """The page as text; the same content gives the same text.

    It fetches nothing: its content security policy forbids everything but its own style sheet and script, which are
    named by their hashes.
    """
    style, script = _asset("style.css"), _asset("script.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=Markup(policy)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=f"lem {__version__}"),
        tag("title", f"{report.run.campaign_name or 'Campaign'} – lem report"),
        tag("style", style),
    )
    body = tag("body", *_body(report), tag("script", script))
    return f"<!DOCTYPE html>\n{tag('html', head, Markup(chr(10)), body, lang='en')}\n"


def _body(report: Report) -> Iterator[Markup]:
    titles = {name: title for name, title, _ in _SECTIONS}
    if not report.has_energy:
        titles["pareto"] = "Throughput against latency"
    items = [tag("li", tag("a", title, href=f"#{name}")) for name, title in titles.items()]
    sections = [
        tag("section", tag("h2", titles[name], id=f"{name}-heading"), make(report), id=name,
            aria_labelledby=f"{name}-heading")
        for name, _, make in _SECTIONS
    ]  # fmt: skip
    yield tag("a", "Skip to the results", href="#results", class_="skip")
    yield tag("header", *_heading(report), tag("nav", tag("ul", *items), aria_label="Parts of this page"))
    yield tag("main", *(Markup(f"\n{section}") for section in sections))
    yield tag("footer", tag("p", f"Made by lem {__version__} from the result files alone."))


def _heading(report: Report) -> Iterator[Markup]:
    run = report.run
    more = len(run.run_ids) - 3
    experiments = len({(record.identity.run_id, record.identity.experiment_id) for record in report.records})
    failed = sum(entry.configuration.n_failed for entry in report.entries)
    facts = [
        *(f"run {name}" for name in run.run_ids[:3]),
        *([f"{more} more runs"] if more > 0 else []),
        plural(len(report.entries), "configuration"),
        plural(experiments + failed, "experiment"),
        *(f"host {host}" for host in run.hosts[:4]),
        *run.shared.values(),
    ]
    yield tag("h1", run.campaign_name or "Campaign")
    yield tag("p", " · ".join(facts), class_="facts")


def _asset(name: str) -> Markup:
    """A file beside this module, in the zip too; it is lem's own, so it needs no escaping."""
    return Markup(resources.files("lem.results.report").joinpath(name).read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
