"""Differences between what two builds did, and which of them are intended."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.equivalence.masks import mask_text
from tests.equivalence.reading import read_facts

ABSENT = "(absent)"


@dataclass(frozen=True)
class Difference:
    """One place in which the builds differ.

    Attributes:
        case: suite, scene and command line.
        part: `exit code`, `stdout`, `stderr`, or `file NAME`.
        where: a JSON path, or `line N`.
        old, new: a value, or the lines of a text.
    """

    case: str
    part: str
    where: str
    old: str
    new: str


@dataclass(frozen=True)
class Intended:
    """Differences that are meant to be.

    Attributes:
        why: for the reader of this list.
        case, part: regular expressions found in the difference's.
        where: a regular expression that is found in the JSON path; of a text, in every line that differs; of numbers in
            a text, it matches all that differ, as in `-2 +1 -1`.
        suite: in which it occurs; it is stale when that suite ran and it matched nothing.
        is_new: only what the old build does not have at all.
    """

    why: str
    case: str
    where: str
    part: str = ""
    suite: str = "static"
    is_new: bool = False

    def matches(self, difference: Difference) -> bool:
        """Whether a difference is one of these."""
        if not re.search(self.case, difference.case) or not re.search(self.part, difference.part):
            return False
        if not difference.case.startswith(f"{self.suite}/") or (self.is_new and difference.old != ABSENT):
            return False
        if difference.where == "numbers":
            return re.fullmatch(self.where, changed_numbers(difference)) is not None
        if not difference.where.startswith("line "):
            return bool(re.search(self.where, difference.where))
        lines = [*difference.old.splitlines(), *difference.new.splitlines()]
        return all(re.search(self.where, line) for line in lines)


@dataclass
class Verdict:
    """What a comparison came to."""

    cases: int = 0
    intended: int = 0
    unexpected: list[Difference] = dataclasses.field(default_factory=list)
    stale: list[Intended] = dataclasses.field(default_factory=list)

    @property
    def is_equivalent(self) -> bool:
        """Whether nothing differs but what is meant to."""
        return not self.unexpected and not self.stale


def judge(differences: Iterable[Difference], intended: Sequence[Intended], suites: Iterable[str]) -> Verdict:
    """Sort differences into intended and unexpected ones.

    Args:
        suites: those that ran completely, whose entries must match something.
    """
    used: set[Intended] = set()
    verdict = Verdict()
    for difference in differences:
        matching = [entry for entry in intended if entry.matches(difference)]
        used.update(matching)
        if matching:
            verdict.intended += 1
        else:
            verdict.unexpected.append(difference)
    verdict.stale = [entry for entry in intended if entry.suite in set(suites) and entry not in used]
    return verdict


def changed_numbers(difference: Difference) -> str:
    """The numbers that went and came, in order: `-2 +1`."""
    old, new = (ast.literal_eval(text) if text != ABSENT else [] for text in (difference.old, difference.new))
    changes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    found: list[str] = []
    for tag, first, last, new_first, new_last in changes:
        if tag != "equal":
            found += [f"-{number}" for number in old[first:last]]
            found += [f"+{number}" for number in new[new_first:new_last]]
    return " ".join(found)


def compare_outcomes(
    case: str, old: Mapping[str, Any], new: Mapping[str, Any], *, is_live: bool, ignore_text: bool
) -> list[Difference]:
    """Where what two builds did differs."""
    found: list[Difference] = []
    if old["code"] != new["code"]:
        found.append(Difference(case, "exit code", "$", str(old["code"]), str(new["code"])))
    for part, key in (("stdout", "out"), ("stderr", "err")):
        found += compare_contents(case, part, old[key], new[key], is_live=is_live, ignore_text=ignore_text)
    for name in sorted({*old["files"], *new["files"]}):
        contents = [side["files"].get(name, {"file": ABSENT}) for side in (old, new)]
        found += compare_contents(case, f"file {name}", *contents, is_live=is_live, ignore_text=ignore_text)
    return found


def compare_contents(case: str, part: str, old: Any, new: Any, *, is_live: bool, ignore_text: bool) -> list[Difference]:
    """Where two outputs of the same name differ."""
    if old == new:
        return []
    sides = [read_facts(content, part, is_live=is_live, ignore_text=ignore_text) for content in (old, new)]
    if sides[0].kind != sides[1].kind:
        return [Difference(case, part, "kind", str(old), str(new))]
    if sides[0].kind == "text":
        return list(_text_differences(case, part, sides[0].lines, sides[1].lines))
    found = list(_value_differences(case, part, sides[0].values, sides[1].values))
    if not found and not is_live and not ignore_text and sides[0].kind == "document":
        is_same = mask_text(str(old), is_live=False) == mask_text(str(new), is_live=False)
        return [] if is_same else [Difference(case, part, "formatting", str(old), str(new))]
    return found


def _value_differences(case: str, part: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Difference]:
    for path in dict.fromkeys([*old, *new]):
        values = [repr(side[path]) if path in side else ABSENT for side in (old, new)]
        if values[0] != values[1] and not _are_close(old.get(path), new.get(path)):
            yield Difference(case, part, path, *values)


def _are_close(old: Any, new: Any) -> bool:
    """Whether two floats differ by the order in which they were summed up alone."""
    return isinstance(old, float) and isinstance(new, float) and math.isclose(old, new, rel_tol=1e-12)


def _text_differences(case: str, part: str, old: Sequence[str], new: Sequence[str]) -> Iterator[Difference]:
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for tag, first, last, new_first, new_last in matcher.get_opcodes():
        if tag != "equal":
            old_text, new_text = "".join(old[first:last]), "".join(new[new_first:new_last])
            yield Difference(case, part, f"line {first + 1}", old_text, new_text)


def unified(difference: Difference) -> str:
    """A difference for people to read."""
    head = f"{difference.case}\n  {difference.part}, {difference.where}\n"
    old, new = difference.old.splitlines(), difference.new.splitlines()
    lines = difflib.unified_diff(old, new, "old", "new", lineterm="", n=1)
    return head + "".join(f"    {line}\n" for line in lines)
