"""What every step looks like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from tests.gpu.bench import Bench
from tests.gpu.finding import Finding

__all__ = ["Step"]


class Step(Protocol):
    """Something to find out about a GPU. Steps know nothing of each other; each may fail by itself."""

    @property
    def name(self) -> str:
        """For the command line."""

    @property
    def title(self) -> str:
        """For people."""

    @property
    def is_brief(self) -> bool:
        """Whether it only reads what is there, so that it is gone through when time is over, too."""

    def run(self, bench: Bench) -> Iterator[Finding]:
        """Findings, each as soon as it is known.

        Raises:
            LeftOut: it cannot be found out here.
            Exception: anything; the other steps go on.
        """
