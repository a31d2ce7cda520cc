"""Cycles added to a campaign until its intervals are narrow enough: whether, and what that changes. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lem.base.durable import GROUPED
from lem.base.errors import UserError
from lem.base.units import some_of
from lem.config.campaign_config import CampaignConfig
from lem.orchestration.manifest import TOP_UP_NOTE, CampaignManifest
from lem.record import Record
from lem.results.run import LEAST_CYCLES, MOST_CYCLES, Precision, StoppingRule, Target, measure_precision

_SHOWN = 3


@dataclass(frozen=True)
class Decision:
    """Whether another cycle is due.

    Attributes:
        is_due: it is.
        text: why, or why not, for a person.
    """

    is_due: bool
    text: str


def make_rule(target: Target, max_cycles: int | None) -> StoppingRule:
    """The rule that the command line asks for.

    Raises:
        UserError: fewer cycles at most than at least, or more than a campaign can have.
    """
    most = MOST_CYCLES if max_cycles is None else max_cycles
    if not LEAST_CYCLES <= most <= MOST_CYCLES:
        raise UserError(
            f"--max-cycles {most}: {LEAST_CYCLES} to {MOST_CYCLES} are due",
            f"--until looks at intervals from {LEAST_CYCLES} cycles on",
        )
    return StoppingRule(target, LEAST_CYCLES, most)


def check_rule(campaign: CampaignConfig, rule: StoppingRule) -> None:
    """Refuse a campaign whose cycles cannot be added one after the other.

    Raises:
        UserError: says which part of it is in the way.
    """
    execution, daemon = campaign.execution, campaign.daemon
    if daemon is not None and daemon.enabled:
        raise UserError("--until and a daemon exclude each other", "a daemon runs the campaign as it stands, again")
    if execution.structure == GROUPED:
        raise UserError(
            "--until adds whole cycles, and structure grouped has none: AAA BBB",
            "use --structure interleaved or shuffled",
        )
    if execution.reuse == "campaign":
        raise UserError(
            "--until needs intervals, and with execution.reuse campaign there are none",
            "use --set execution.reuse=cycle: each cycle then loads its engines anew",
        )
    if execution.cycles > rule.most_cycles:
        raise UserError(
            f"{execution.cycles} cycles are planned, over --max-cycles {rule.most_cycles}",
            "lower --cycles or raise --max-cycles",
        )


def with_cycles(campaign: CampaignConfig, cycles: int) -> CampaignConfig:
    """The campaign with at least so many cycles."""
    execution = campaign.execution
    return replace(campaign, execution=replace(execution, cycles=max(execution.cycles, cycles)))


def decide(records: Iterable[Record], rule: StoppingRule, cycles: int) -> Decision:
    """Whether another cycle is due after so many.

    Args:
        records: all whole results of the run.
    """
    found = measure_precision(records, rule.target, rule.least_cycles)
    what = f"{rule.target.describe()} ({found.metric}, 95 % t interval)"
    without = [f"{name} ({reason})" for name, reason in found.without]
    left_out = f"; without an interval, and left out: {some_of(without, _SHOWN)}" if without else ""
    if not found.wide:
        said = f"every interval is within {what} after {cycles} cycles" if found.narrow else "no cycle is added"
        said += "" if found.narrow or found.without else ", since there is no result to look at"
        return Decision(False, f"Top-up: {said}{left_out}")
    wide = some_of([item.describe() for item in sorted(found.wide, key=_width, reverse=True)], _SHOWN)
    if cycles >= rule.most_cycles:
        return Decision(False, f"Top-up: {cycles} cycles are the most, and wider than {what} is {wide}{left_out}")
    return Decision(True, f"Top-up: cycle {cycles + 1} is added, wider than {what} is {wide}{left_out}")


def added_cycles(manifest: CampaignManifest) -> int:
    """The number of cycles that top-ups have brought a campaign to; 0 without any."""
    notes = (note for note in manifest.notes if note.get("kind") == TOP_UP_NOTE)
    return max((note["cycles"] for note in notes if isinstance(note.get("cycles"), int)), default=0)


def note_cycles(manifest: CampaignManifest, cycles: int, at: str, reason: str) -> None:
    """Keep in the manifest that a cycle was added, so that a resume has it too."""
    manifest.notes.append({"at": at, "kind": TOP_UP_NOTE, "cycles": cycles, "reason": reason})


def _width(item: Precision) -> float:
    return float("inf") if item.half_width is None else item.half_width
