"""A plan as text and as JSON, before it runs."""

from __future__ import annotations

import bisect
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from lem.base import units
from lem.base.doc import Column, columns, paint
from lem.base.log import WIDTH
from lem.config.campaign_config import CampaignConfig
from lem.orchestration.plan import CampaignExperiment, ExpectedDurations, Plan
from lem.results.store import StoppingRule

_REASONS_SHOWN = 10
_ORDER_SHOWN = 30


def render_findings(plan: Plan, *, is_colour: bool = False) -> str:
    """The number of experiments, and the filtered ones and warnings grouped by reason."""
    lines = [plan.summary]
    lines += _reasons(paint("filtered:", "red", is_colour=is_colour), plan.filtered_by_reason)
    lines += _reasons(paint("warning:", "yellow", is_colour=is_colour), plan.warnings_by_reason)
    return "\n".join(lines) + "\n"


def render_plan(
    plan: Plan,
    campaign: CampaignConfig,
    place: str,
    durations: ExpectedDurations,
    *,
    rule: StoppingRule | None = None,
    longest: Plan | None = None,
    budget_s: float | None = None,
) -> str:
    """The plan: configurations, order, engine loads, expected time, and where it runs.

    Args:
        place: the executor and why it was chosen.
        durations: from earlier runs.
        rule, longest: the stopping rule that adds cycles, and the plan with the maximum number of cycles.
        budget_s: seconds after which no experiment starts.
    """
    execution = campaign.execution
    loads = plan.loads()
    facts = {
        "campaign": f"{campaign.campaign_name} ({campaign.campaign_id})",
        "experiments": f"{units.plural(len(plan.configurations), 'configuration')} × "
        f"{units.plural(execution.cycles, 'cycle')} = {len(plan.experiments)}",
        "order": execution.structure + (f", seed {plan.shuffle_seed}" if plan.shuffle_seed is not None else ""),
        "engine loads": f"{sum(loads)} (reuse: {'none, cold start' if plan.is_cold else execution.reuse})",
        "expected time": _expected(plan, durations),
        **_bounds(plan, durations, rule, longest, budget_s),
        "runs on": place,
        "results in": f"{campaign.io.results_dir}/{campaign.slug}",
    }
    width = max(map(len, facts)) + 2
    lines = [line for name, text in facts.items() for line in _fact(name, text, width)]
    lines += ["", *_order(plan.experiments, loads, plan)]
    return "\n".join(lines) + "\n"


def plan_document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values."""
    gaps = [plan.gap_cap_s(kind) for kind in plan.gap_kinds()]
    return {
        "generated": plan.total_generated,
        "filtered": [{"reason": reason, "count": count} for reason, count in plan.filtered_by_reason],
        "warnings": [{"reason": reason, "count": count} for reason, count in plan.warnings_by_reason],
        "engine_loads": sum(plan.loads()),
        "shuffle_seed": plan.shuffle_seed,
        "experiments": [
            {
                "exp_id": item.exp_id,
                "config_name": item.config_name,
                "backend": item.backend,
                "cycle_index": item.cycle_index,
                "order_index": item.order_index,
                "loads_engine": is_load,
                "gap_cap_s": gap_s,
            }
            for item, is_load, gap_s in zip(plan.experiments, plan.loads(), gaps, strict=True)
        ],
    }


def expected_document(plan: Plan, durations: ExpectedDurations) -> dict[str, Any]:
    """The expected duration of the plan in seconds, as JSON values; None if there are no earlier results."""
    expected = plan.expected_time(durations)
    return {
        "total": expected.total_s,
        "measuring": expected.measured_s,
        "loading": expected.loading_s,
        "gaps": expected.gaps_s,
        "gaps_at_most": plan.expected_time(replace(durations, gap_s=None)).gaps_s,
        "is_complete": expected.is_complete,
    }


def _reasons(label: str, reasons: Sequence[tuple[str, int]]) -> Iterable[str]:
    for reason, count in reasons[:_REASONS_SHOWN]:
        yield f"{label} {reason}" + (f" × {count}" if count > 1 else "")
    if len(reasons) > _REASONS_SHOWN:
        yield f"{label} and {len(reasons) - _REASONS_SHOWN} more reasons"


def _fact(name: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{name + ':':<{width}}", subsequent_indent=" " * width)


def _expected(plan: Plan, durations: ExpectedDurations, about: str = "about ") -> str:
    expected, gaps = plan.expected_time(durations), _gaps(plan, durations)
    if expected.measured_s is None or expected.loading_s is None or expected.total_s is None:
        return f"unknown before the first run; {gaps}"
    guess = "" if expected.is_complete else ", partly estimated from other configurations"
    return (
        f"{about}{units.format_duration(expected.total_s)} (measuring {units.format_duration(expected.measured_s)}, "
        f"loading {units.format_duration(expected.loading_s)}, {gaps}{guess})"
    )


def _gaps(plan: Plan, durations: ExpectedDurations) -> str:
    """`gaps 4m 00s, at most 20m 00s`: as in earlier runs, and their maximum."""
    usual_s, most_s = plan.expected_time(durations).gaps_s, plan.expected_time(replace(durations, gap_s=None)).gaps_s
    if not most_s:
        return "no gaps"
    usual = f"gaps {units.format_duration(usual_s)}, at most" if usual_s < most_s else "gaps at most"
    return f"{usual} {units.format_duration(most_s)}"


def _bounds(
    plan: Plan,
    durations: ExpectedDurations,
    rule: StoppingRule | None,
    longest: Plan | None,
    budget_s: float | None,
) -> dict[str, str]:
    """How a top-up prolongs the plan, or a budget shortens it."""
    facts = {}
    if rule is not None and longest is not None:
        facts["top-up"] = f"{rule.describe()}; at most {_expected(longest, durations, about='')}"
    if budget_s is not None:
        facts["budget"] = f"{units.format_duration(budget_s)}, {_fitting(plan, durations, budget_s)}"
    return facts


def _fitting(plan: Plan, durations: ExpectedDurations, budget_s: float) -> str:
    """How many experiments start within the budget; the last one of them finishes."""
    total = plan.expected_time(durations).total_s
    if total is None:
        return "how much of the plan fits is unknown before the first run"
    if total <= budget_s:
        return "enough for the whole plan"

    def time_before(place: int) -> float:
        return plan.expected_time(durations, plan.experiments[:place]).total_s or 0.0

    started = bisect.bisect_left(range(len(plan.experiments)), budget_s, key=time_before)
    return f"enough to start about {started} of {len(plan.experiments)} experiments; --resume runs the rest"


def _order(experiments: Sequence[CampaignExperiment], loads: Sequence[bool], plan: Plan) -> list[str]:
    shown = experiments[:_ORDER_SHOWN]
    gaps = [plan.gap_cap_s(kind) for kind in plan.gap_kinds()]
    table = [
        Column("cycle", tuple(str(item.cycle_index + 1) for item in shown)),
        Column("backend", tuple(item.backend for item in shown)),
        Column("engine", tuple("load" if is_load else "reuse" for is_load in loads[: len(shown)])),
        Column("gap before", tuple(units.format_duration(gap) if gap else "–" for gap in gaps[: len(shown)])),
    ]
    lines = columns("experiment", [item.config_name for item in shown], table, WIDTH)
    if len(experiments) > len(shown):
        lines = [*lines, f"and {len(experiments) - len(shown)} more"]
    return list(lines)
