"""What weakens the numbers of a campaign, each with what to do about it, in the manner of `pyperf check`.

A finding is *weak* where numbers or verdicts should not be relied on for it (its windows were not steady, its cycles
are no replicates, its sensors disagree), else something to know about them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lem.reasons import Reason
from lem.record import Record
from lem.results.check_results import check_results
from lem.results.check_trends import TREND_METRICS, check_trends
from lem.results.compare import RunResults, gather
from lem.results.findings import Finding, Found
from lem.results.precision import UNACCOUNTED, StoppingRule
from lem.results.repository import Problem
from lem.units import plural

__all__ = ["Check", "check_run"]

_DAMAGE_SHOWN = 3


@dataclass(frozen=True)
class Check:
    """What was found about a run.

    Attributes:
        run: its configurations; None where there is no whole result.
        findings: the weak ones first.
        n_results: whole results looked at, of all attempts.
    """

    campaign_name: str
    run_id: str
    run: RunResults | None
    findings: tuple[Finding, ...]
    n_results: int

    @property
    def is_weak(self) -> bool:
        """Whether a finding is weak."""
        return any(item.is_weak for item in self.findings)


def check_run(
    records: Sequence[Record],
    *,
    failed: Mapping[str, int] | None = None,
    problems: Sequence[Problem] = (),
    stopping: StoppingRule | None = None,
    campaign_name: str = "",
    run_id: str = "",
) -> Check:
    """Everything that weakens the numbers of one run.

    Args:
        records: all its whole results, valid or not, of all attempts.
        failed: per configuration name, how many experiments gave no result.
        problems: what stands in the place of results.
        stopping: the rule by which cycles were added.
        campaign_name, run_id: what to call a run of which there is no result that says it.
    """
    run = gather(records, failed, metrics=TREND_METRICS) if records else None
    found = [*_damage(problems), *_failures(failed or {})]
    if run is None:
        found.append(
            Finding("no_results", True, Reason.of("no_results"), "run the campaign; lem status says how it is")
        )
    else:
        found += [*check_results(run, records), *check_trends(run), *_stopping(stopping)]
    return Check(
        run.campaign_name if run else campaign_name,
        run.run_id if run else run_id,
        run,
        tuple(sorted(found, key=lambda item: not item.is_weak)),
        len(records),
    )


def _damage(problems: Iterable[Problem]) -> Found:
    damaged = [item for item in problems if item.kind != "missing"]
    if damaged:
        named = ", ".join(f"{item.path} ({item.kind})" for item in damaged[:_DAMAGE_SHOWN])
        more = f" and {len(damaged) - _DAMAGE_SHOWN} more" if len(damaged) > _DAMAGE_SHOWN else ""
        yield Finding(
            "damaged",
            True,
            Reason.of("results_damaged", named=named + more),
            "bring them back from a copy, or measure them again: lem campaign --resume runs what has no whole result",
        )


def _failures(failed: Mapping[str, int]) -> Found:
    count = sum(failed.values())
    if count:
        yield Finding(
            "failed",
            True,
            Reason.of("results_missing", experiments=plural(count, "experiment")),
            "lem status names the reason of each that failed, and its log; lem campaign --resume runs them again",
            tuple(failed),
        )


def _stopping(rule: StoppingRule | None) -> Found:
    if rule is not None:
        yield Finding(
            "stopping",
            False,
            Reason.of("cycles_added", rule=rule.describe(), unaccounted=UNACCOUNTED),
            "for a verdict that hangs on the third digit measure a fixed number of cycles anew",
        )
