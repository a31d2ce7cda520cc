"""Inputs tried one after the other, and what came of them."""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider

from tests.fuzz import bundles, channel, configurations, results
from tests.fuzz.trial import Find, Outcome, Surface

SURFACES: tuple[Surface, ...] = (*configurations.SURFACES, *results.SURFACES, *channel.SURFACES, *bundles.SURFACES)
CASES = Path(__file__).parent / "cases"
STEADY = "lem-steady"


@dataclass
class Tally:
    """What came of the inputs of one surface."""

    counts: Counter[str] = field(default_factory=Counter)  # by outcome, and by the kind of a find
    finds: dict[str, tuple[bytes, str]] = field(default_factory=dict)  # the smallest input of each, and its text

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def is_good(self) -> bool:
        """Whether every input was accepted, or refused with a place."""
        return set(self.counts) <= {Outcome.ACCEPTED.value, Outcome.REFUSED.value}

    def note(self, data: bytes, error: BaseException) -> None:
        """Count an input that is a find, and keep it where it is the smallest of its kind."""
        kind = error.kind if isinstance(error, Find) else "traceback"
        self.counts[kind] += 1
        text = "".join(traceback.format_exception(error))
        where = [line.strip() for line in text.splitlines() if 'File "' in line and f"{os.sep}lem{os.sep}" in line]
        key = f"{kind}: {where[-1] if where else ''} {text.strip().splitlines()[-1][:80]}"
        if kind == "place":
            key = f"place: {str(error)[:60]}"
        known = self.finds.get(key)
        if known is None or len(data) < len(known[0]):
            self.finds[key] = (data, text)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder to work in, deep enough that a name with `..` in it shows, as the working directory."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="lem-fuzz-") as name:
        folder = Path(name, "a", "b", "work")
        folder.mkdir(parents=True)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def cases_of(surface: Surface) -> tuple[Path, ...]:
    return tuple(sorted((CASES / surface.name).glob("*"))) if (CASES / surface.name).is_dir() else ()


class SteadyProvider(HypothesisProvider):
    """Random choices that are the same whatever the project holds.

    Hypothesis picks up numbers and texts from the source of every module that is loaded, so that a change somewhere
    would give the test suite other inputs, and a find to whoever made that change.
    """

    def _maybe_draw_constant(self, *_args: Any, **_options: Any) -> None:
        return None


AVAILABLE_PROVIDERS[STEADY] = f"{__name__}.{SteadyProvider.__name__}"


def fuzz(surface: Surface, examples: int, folder: Path, seed_value: int | None) -> Tally:
    """So many inputs of a surface, and what came of each; a find does not end it. Without a seed they never change."""
    tally = Tally()

    @settings(
        max_examples=examples,
        backend="hypothesis" if seed_value is not None else STEADY,
        database=None,
        deadline=None,
        derandomize=seed_value is None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(surface.make_inputs())
    def attempt(data: bytes) -> None:
        try:
            tally.counts[surface.trial(data, folder, is_thorough=False).value] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            tally.note(data, error)

    (attempt if seed_value is None else seed(seed_value)(attempt))()
    return tally
