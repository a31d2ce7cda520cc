"""Compare this tree with the build of the old commit on the same inputs.

    python -m tests.equivalence                  static commands and recorded results
    python -m tests.equivalence --live           live campaigns too (with the trivial engine of tests/doubles)
    python -m tests.equivalence --words          the words of messages and pages too, which were rewritten since
    python -m tests.equivalence --only compare   scenes whose name matches a regular expression
    python -m tests.equivalence --new-tree DIR   another tree instead of this one, such as the old one itself

`make equivalence` runs it in the test environment. The old build is a lem.pyz made of `git archive 524ec81` by that
tree's own build.py; where the commit is not available the harness fails. What the old build did is kept in
build/equivalence, so that the next run plays only the new one.

**Inputs.** *static*: help, wrong usage, listings, every option, the examples, the YAML of the pages, the configurations
and command lines of the old tests (corpus.jsonl), and the fuzz cases. *recorded*: tests/recorded, and campaigns made up
by the old commit's tests/synthetic_campaign.py. *live*: campaigns that run, fail, are interrupted, killed, resumed,
sharded and merged. A scene is a folder with files, and command lines that run in it one after the other; exit code,
stdout, stderr and every file that was changed are compared.

**Masks** (masks.py). Of static and recorded scenes nothing is masked but the version and names in a temporary folder.
Of live ones also times, random ids and what was measured, by the name of the field; null stays null.

**Intended differences** (intended.py) name a command line, a line or JSON path, and why. One that matches nothing
any more fails the harness.

The exit code is 0 when nothing differs but what is meant to, 1 when something does, and 2 when nothing could be
compared. The differences are in build/equivalence/diff.txt.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.equivalence.builds import BUILD, ROOT, Build, HarnessError, build_of, old_build
from tests.equivalence.comparing import Difference, Verdict, compare_outcomes, judge, unified
from tests.equivalence.intended import INTENDED
from tests.equivalence.live import live_scenes
from tests.equivalence.playing import AnyScene, Outcomes, play_forked, play_kept
from tests.equivalence.recorded import recorded_scenes
from tests.equivalence.scenes import static_scenes
from tests.equivalence.staging import play_live

# How the scenes of each are made, and played.
SUITES: Mapping[str, tuple[Callable[[Build], Iterable[AnyScene]], Callable[[Build, Sequence[Any]], Outcomes]]] = {
    "static": (static_scenes, play_forked),
    "recorded": (recorded_scenes, play_forked),
    "live": (live_scenes, play_live),
}
SHOWN = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the comparison."""
    args = _parse(arguments)
    try:
        verdict = compare(args)
    except (HarnessError, FileNotFoundError) as error:
        print(f"equivalence: {error}", file=sys.stderr)
        return 2
    report(verdict)
    return 0 if verdict.is_equivalent else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.equivalence", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", action="append", choices=tuple(SUITES), help="only this one")
    parser.add_argument("--live", action="store_true", help="run campaigns too")
    parser.add_argument("--words", action="store_true", help="compare the words of messages and pages, too")
    parser.add_argument("--only", default="", metavar="REGEX", help="only scenes whose name it matches")
    parser.add_argument("--new-tree", type=Path, default=ROOT, metavar="DIR", help="the tree to compare")
    return parser.parse_args(arguments)


def compare(args: argparse.Namespace) -> Verdict:
    """Play everything that was asked for with both builds.

    Raises:
        HarnessError: there is nothing to compare.
    """
    suites = args.suite or ["static", "recorded", *(["live"] if args.live else [])]
    old, new = old_build(), build_of(args.new_tree.resolve(), BUILD / "new" / "lem.pyz")
    print(f"old {old.digest[:12]}, new {new.digest[:12]}", flush=True)
    differences: list[Difference] = []
    cases = 0
    for suite in suites:
        make_scenes, play = SUITES[suite]
        scenes, before = [scene for scene in make_scenes(old) if re.search(args.only, scene.name)], time.monotonic()
        sides = play_kept(suite, old, scenes, play), play(new, scenes)
        steps = sum(len(scene.commands) for scene in scenes)
        print(f"{suite}: {len(scenes)} scenes, {steps} commands, {time.monotonic() - before:.0f} s", flush=True)
        cases += steps
        differences += differences_of(suite, scenes, *sides, ignore_text=not args.words)
    verdict = judge(differences, INTENDED, [] if args.only else suites)
    verdict.cases = cases
    return verdict


def differences_of(
    suite: str, scenes: Sequence[AnyScene], old: Outcomes, new: Outcomes, *, ignore_text: bool
) -> list[Difference]:
    """Where the outcomes of the same scenes differ."""
    found: list[Difference] = []
    for scene in scenes:
        for command, *outcomes in zip(scene.commands, old[scene.name], new[scene.name], strict=True):
            case = f"{suite}/{scene.name}: lem {command}"
            found += compare_outcomes(case, *outcomes, is_live=suite == "live", ignore_text=ignore_text)
    return found


def report(verdict: Verdict) -> None:
    """Print the summary and the first differences; write all of them down."""
    path = BUILD / "diff.txt"
    texts = [unified(difference) for difference in verdict.unexpected]
    path.write_text("\n".join(texts), encoding="utf-8", errors="backslashreplace")
    for text in texts[:SHOWN]:
        lines = [line[:200] for line in text.splitlines()]
        print("\n".join([*lines[:20], *(["    …"] if len(lines) > 20 else []), ""]))
    for entry in verdict.stale:
        print(f"stale: {entry.case!r} {entry.where!r} matches nothing any more ({entry.why})")
    differing = len({difference.case for difference in verdict.unexpected})
    print(
        f"compared {verdict.cases} commands: {verdict.intended} intended differences, "
        f"{len(verdict.unexpected)} unexpected in {differing} commands"
        + (f", {len(verdict.stale)} stale entries" if verdict.stale else "")
        + (f"; all in {path.relative_to(ROOT)}" if texts else "")
    )


if __name__ == "__main__":
    sys.exit(main())
