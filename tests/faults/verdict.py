"""What a fault cost, and the table of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_FILES = ("results lost", "partial", "duplicates", "incomplete")
_COLUMNS = ("tried", "struck", *_FILES, "wrong times", "wrong ends", "processes left")


@dataclass(frozen=True)
class Verdict:
    """What one fault cost."""

    what: str  # the fault, for the table
    case: str  # the fault, exactly
    has_happened: bool  # it struck before the run was over
    lost: int = 0  # results that were whole after the fault and are not there, or not the same, after the resume
    # results, sample logs or manifest that are there and not whole, after the fault or after the resume
    partial: int = 0
    duplicates: int = 0  # experiments with more than one valid result at the end
    incomplete: int = 0  # experiments without a result, or not marked completed, at the end
    wrong_times: int = 0  # durations in the results that are negative, or longer than everything took
    wrong_ends: int = 0  # commands that end with a bug of lem, or with success although results are missing
    processes_left: int = 0  # processes alive after the fault or after the resume
    notes: str = ""  # exit codes, and what else a person needs who looks into it

    @property
    def costs(self) -> tuple[int, ...]:
        files = (self.lost, self.partial, self.duplicates, self.incomplete)
        return (*files, self.wrong_times, self.wrong_ends, self.processes_left)

    @property
    def is_good(self) -> bool:
        return not any(self.costs)


def format_table(verdicts: Iterable[Verdict]) -> str:
    """One line a kind of fault, and one for all: how many were tried, and what they cost together."""
    every = list(verdicts)
    kinds: dict[str, list[Verdict]] = {}
    for verdict in every:
        kinds.setdefault(verdict.what, []).append(verdict)
    lines = [f"{'fault':<34}" + "".join(f"{name:>{len(name) + 2}}" for name in _COLUMNS)]
    return "\n".join([*lines, *(_line(what, group) for what, group in sorted(kinds.items())), _line("all", every)])


def _line(what: str, group: list[Verdict]) -> str:
    costs = (sum(column) for column in zip(*(item.costs for item in group), strict=True))
    sums = (len(group), sum(item.has_happened for item in group), *costs)
    return f"{what:<34}" + "".join(f"{value:>{len(name) + 2}}" for name, value in zip(_COLUMNS, sums, strict=False))
