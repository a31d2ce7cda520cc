"""One thing that weakens a campaign's numbers, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lem.reasons import Reason
from lem.record import Record
from lem.results.compare import RunResults

__all__ = ["Finding", "Found", "among_results"]


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        kind: a short stable word.
        is_weak: numbers or verdicts are not to be relied on for it; else it is something to know about them.
        reason: what, with its figures.
        remedy: what to do.
        configurations: whom it concerns; () for the campaign as a whole.
    """

    kind: str
    is_weak: bool
    reason: Reason
    remedy: str
    configurations: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """It in words; those of other programs, which warnings pass on, may end in a full stop."""
        return self.reason.text.rstrip(".") if self.kind == "warning" else self.reason.text


Found = Iterable[Finding]


def among_results(
    run: RunResults,
    kind: str,
    what: Reason,
    remedy: str,
    concerns: Callable[[Record], bool],
    *,
    is_weak: bool = True,
) -> Found:
    """A finding about the used results for which `concerns` holds, with how many; none where there are none."""
    looked_at = {subject.name: subject.used for subject in run.subjects}
    counts = {name: sum(map(concerns, records)) for name, records in looked_at.items()}
    concerned = tuple(name for name, count in counts.items() if count)
    if concerned:
        total = sum(len(looked_at[name]) for name in concerned)
        reason = Reason.of("some_results", what=what, count=sum(counts.values()), total=total)
        yield Finding(kind, is_weak, reason, remedy, concerned)
