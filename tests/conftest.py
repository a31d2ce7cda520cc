"""Skips what this machine cannot run, and says so where nobody overlooks it."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.needs import NEEDS, is_ci, lacking, missing


def pytest_sessionstart() -> None:
    """Refuse to start in CI without what CI must have: a skip there would look like a success."""
    if is_ci() and (lines := lacking(NEEDS)):
        raise pytest.UsageError("CI=true, and this is missing:\n  " + "\n  ".join(lines))


# What hosts with systemd, and a second Docker Engine, leave of themselves in this machine's control groups and bridges
# keeps the lab's engine from telling of memory that ran out: they come when nobody asks it any more.
_LAST = ("tests/fleet/", "tests/integration/test_gpu_reservation.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what changes the machine behind everything else."""
    items.sort(key=lambda item: item.nodeid.startswith(_LAST))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs what is not here."""
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            if name not in NEEDS:
                pytest.fail(f"{name!r} is not in tests/needs.py: {', '.join(NEEDS)}", pytrace=False)
            reason = missing(name)
            if reason is not None:
                pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what could not run, and why, most tests first."""
    reasons = Counter(_reason(report) for report in terminalreporter.getreports("skipped"))
    if not reasons:
        return
    count = sum(reasons.values())
    terminalreporter.section(f"NOT RUN ON THIS MACHINE: {count} tests", sep="!", yellow=True, bold=True)
    for reason, number in reasons.most_common():
        terminalreporter.line(f"{number:5d}  {reason}", yellow=True)


def _reason(report: object) -> str:
    """The reason of a skip, which pytest keeps as (file, line, "Skipped: reason")."""
    longrepr = getattr(report, "longrepr", None)
    text = str(longrepr[2] if isinstance(longrepr, tuple) else longrepr)
    return text.removeprefix("Skipped: ")
