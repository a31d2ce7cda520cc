"""The report: one HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Sequence
from importlib import resources

from lem.base import __version__
from lem.base.units import plural
from lem.record import Record
from lem.results.report.content import Entry, FailedSettings, Report, flat_settings
from lem.results.report.cycles import cycles_section
from lem.results.report.environment import environment_section, methods_section
from lem.results.report.heatmap import heatmap_section
from lem.results.report.latency import latency_section
from lem.results.report.markup import Markup, tag
from lem.results.report.order import order_section
from lem.results.report.pareto import pareto_section
from lem.results.report.tables import results_section, validity_section
from lem.results.report.traces import traces_section
from lem.results.run import Run
from lem.results.store import Problem, StoredResult, config_beside, configuration_of, configured_name

_SECTIONS: tuple[tuple[str, str, Callable[[Report], Markup]], ...] = (
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

    Nothing on it is fetched: its content security policy forbids everything but the style sheet and the script in it,
    which are named by their hashes.
    """
    style, script = _asset("style.css"), _asset("script.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    title = f"{report.run.campaign_name or 'Campaign'} – lem report"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=Markup(policy.replace('"', "&quot;"))),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=f"lem {__version__}"),
        tag("title", title),
        tag("style", style),
    )
    body = tag("body", *_body(report), tag("script", script))
    return f"<!DOCTYPE html>\n{tag('html', head, Markup(chr(10)), body, lang='en')}\n"


def _body(report: Report) -> Iterable[Markup]:
    yield tag("a", "Skip to the results", href="#results", class_="skip")
    sections = [(name, _title(name, title, report), make) for name, title, make in _SECTIONS]
    links = [("validity", "Validity"), ("results", "Results"), *((name, title) for name, title, _ in sections)]
    items = [tag("li", tag("a", title, href=f"#{name}")) for name, title in links]
    yield tag("header", *_heading(report), tag("nav", tag("ul", *items), aria_label="Parts of this page"))
    parts = [
        _section("validity", "Validity", validity_section(report)),
        _section("results", "Results", results_section(report)),
        *(_section(name, title, make(report)) for name, title, make in sections),
    ]
    yield tag("main", *parts)
    yield tag("footer", tag("p", f"Made by lem {__version__} from the result files alone."))


def _section(name: str, title: str, content: Markup) -> Markup:
    return Markup("\n" + tag("section", tag("h2", title, id=f"{name}-heading"), content, id=name,
                              aria_labelledby=f"{name}-heading"))  # fmt: skip


def _title(name: str, title: str, report: Report) -> str:
    return "Throughput against latency" if name == "pareto" and not report.has_energy else title


def _heading(report: Report) -> Iterable[Markup]:
    summary = report.run
    runs = [f"run {run}" for run in summary.run_ids[:3]]
    more = len(summary.run_ids) - len(runs)
    experiments = len({(record.identity.run_id, record.identity.experiment_id) for record in report.records})
    failed = sum(entry.aggregate.n_failed for entry in report.entries)
    facts = [
        *runs,
        *([f"{more} more runs"] if more > 0 else []),
        plural(len(report.entries), "configuration"),
        plural(experiments + failed, "experiment"),
        *(f"host {host}" for host in summary.hosts[:4]),
        *summary.shared.values(),
    ]
    yield tag("h1", summary.campaign_name or "Campaign")
    yield tag("p", " · ".join(facts), class_="facts")


def _asset(name: str) -> Markup:
    """A file that lies beside this module, in the zip too; it is our own, so it is markup as it stands."""
    return Markup(resources.files("lem.results.report").joinpath(name).read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


_TRACES_SHOWN = 12
_FAULTY_FIRST = 4


def failed_settings(run: Run) -> tuple[FailedSettings, ...]:
    """The settings of configurations without any whole result, from the `config.json` beside what is missing."""
    known = {configuration_of(record.identity.experiment_id) for record in run.records}
    found: dict[str, FailedSettings] = {}
    for problem in run.problems:
        key = configuration_of(problem.exp_id)
        if not problem.exp_id or key in known or key in found:
            continue
        settings = _read_settings(problem, key)
        if settings is not None:
            found[key] = settings
    return tuple(found.values())


def select_traced(entries: Sequence[Entry], results: Sequence[StoredResult]) -> tuple[StoredResult, ...]:
    """The results whose power over time is drawn: some that were invalid or throttled, then one a configuration.

    All of them when there are few enough; else configurations in the order of their merit.
    """
    if len(results) <= _TRACES_SHOWN:
        return tuple(results)
    faulty = [item for item in results if not item.record.validity.valid or _is_throttled(item.record)]
    chosen = faulty[:_FAULTY_FIRST]
    by_key = {item.record.identity.key: item for item in results}
    for entry in entries:
        own = (by_key[record.identity.key] for record in entry.used if record.identity.key in by_key)
        first = next(own, None)
        if len(chosen) < _TRACES_SHOWN and first is not None and first not in chosen:
            chosen.append(first)
    return tuple(chosen)


def _is_throttled(record: Record) -> bool:
    return any(gpu.was_slowed for gpu in record.gpus)


def _read_settings(problem: Problem, key: str) -> FailedSettings | None:
    config = config_beside(problem)
    requested = config.get("requested")
    if not isinstance(requested, dict):
        return None
    return FailedSettings(configured_name(config) or key, flat_settings(requested))
