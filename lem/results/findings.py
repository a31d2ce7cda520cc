"""One thing that weakens a campaign's numbers, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lem.record import Record
from lem.results.compare import RunResults

__all__ = ["Finding", "Found", "among_results"]


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        kind: a short stable word.
        is_weak: numbers or verdicts are not to be relied on for it; else it is something to know about them.
        text: what, with its figures.
        remedy: what to do.
        configurations: whom it concerns; () for the campaign as a whole.
    """

    kind: str
    is_weak: bool
    text: str
    remedy: str
    configurations: tuple[str, ...] = ()


Found = Iterable[Finding]


def among_results(
    run: RunResults,
    kind: str,
    what: str,
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
        yield Finding(kind, is_weak, f"{what} in {sum(counts.values())} of {total} results", remedy, concerned)
