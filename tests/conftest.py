"""Skips what this machine cannot run, and says so where nobody overlooks it."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Generator

import pytest

from tests.needs import NEEDS, RAN_ELSEWHERE, is_ci, lacking, missing

# Containers often forbid bytecode, and then each of the hundreds of processes that tests start compiles all of lem: a
# quarter of what a campaign with the trivial engine costs.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse to start in CI without what CI must have: a skip there would look like a success."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # Under nohup the tests go on, as they should; but what they start would ignore the signal, too.
        signal.signal(signal.SIGHUP, lambda *_: None)
    if is_ci() and not hasattr(session.config, "workerinput") and (lines := lacking(NEEDS)):
        raise pytest.UsageError("CI=true, and this is missing:\n  " + "\n  ".join(lines))


# Tests that share one Docker Engine; `make test` runs them in two processes beside all others. In the second, each
# campaign has a name or a Docker Engine of its own; those of the first have one name, and so the same containers.
_ONE_AT_A_TIME = {"docker", "lab", "fleet"}
_SECOND_LAB = (
    "tests/fleet/", "tests/integration/test_container_health.py", "tests/integration/test_containers_energy.py",
    "tests/integration/test_gpu_reservation.py", "tests/integration/test_weather.py",
)  # fmt: skip

# What hosts with systemd, and a second Docker Engine, leave of themselves in this machine's control groups and bridges
# keeps the lab's engine from telling of memory that ran out: they come when nobody asks it any more.
_LAST = ("tests/fleet/", "tests/integration/test_gpu_reservation.py")

# Files that take minutes. They begin first, after the lab: one that begins last keeps everybody waiting for it.
_LONG = (
    "test_vllm_in_the_lab.py", "test_served_engines.py", "test_playbooks.py", "test_faults.py", "test_linters.py",
    "test_campaign_energy.py", "test_gpu_settings.py", "test_measure.py", "test_first_hour.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give processes whole files, and the lab to two of them; put long ones first, what changes the machine last."""
    orders: dict[pytest.Item, tuple[int, bool]] = {}
    for item in items:
        needs = {name for marker in item.iter_markers("needs") for name in marker.args}
        path = item.nodeid.partition("::")[0]
        lab = "" if not needs & _ONE_AT_A_TIME else "lab-2" if path.startswith(_SECOND_LAB) else "lab-1"
        item.add_marker(pytest.mark.xdist_group(lab or path))
        name = path.rpartition("/")[2]
        rank = _LONG.index(name) if name in _LONG else len(_LONG) + path.startswith("tests/unit/")
        orders[item] = (-int(lab[-1]) if lab else rank, path.startswith(_LAST))
    items.sort(key=orders.__getitem__)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(ids: list[str]) -> None:
    """Refuse a run in several processes whose tests are not grouped: those with Docker would disturb each other."""
    if not all("@" in nodeid for nodeid in ids):
        pytest.exit("xdist has not grouped the tests: run with --dist loadgroup and the pinned versions", returncode=4)


FROZEN = pytest.StashKey[tuple[object, int]]()  # the file, and hundreds of modules loaded, when the heap was frozen
NICE = pytest.StashKey[bool]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if hasattr(item.config, "workerinput") and "@lab-" not in item.nodeid and NICE not in item.config.stash:
        # The lab is what the whole run waits for in the end, so others leave the processors to it.
        os.nice(5)
        item.config.stash[NICE] = True
    # An engine that is unloaded collects garbage, which would look at torch and all that tests keep, each time.
    current = (item.path, len(sys.modules) // 300)
    if item.config.stash.get(FROZEN, None) != current:
        gc.freeze()
        item.config.stash[FROZEN] = current
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            if name not in NEEDS:
                pytest.fail(f"{name!r} is not in tests/needs.py: {', '.join(NEEDS)}", pytrace=False)
            reason = missing(name)
            if reason is not None:
                pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what is not Unicode in captured output: xdist cannot send it, and ends the whole run."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what could not run, and why, most tests first; and what was skipped here and run in another environment."""
    ran_in = _ran_elsewhere(terminalreporter)
    skipped = terminalreporter.getreports("skipped")
    elsewhere = Counter(ran_in[test] for report in skipped if (test := _without_group(report.nodeid)) in ran_in)
    reasons = Counter(_reason(report) for report in skipped if _without_group(report.nodeid) not in ran_in)
    for title, counted in (("RUN IN ANOTHER ENVIRONMENT", elsewhere), ("NOT RUN ON THIS MACHINE", reasons)):
        if counted:
            count = sum(counted.values())
            tests = "1 test" if count == 1 else f"{count} tests"
            terminalreporter.section(f"{title}: {tests}", sep="!", yellow=True, bold=True)
        for text, number in counted.most_common():
            terminalreporter.line(f"{number:5d}  {text}", yellow=True)


def _ran_elsewhere(terminalreporter: pytest.TerminalReporter) -> dict[str, str]:
    """The environment in which a test of this run ran each of the others."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    properties = [value for report in reports for name, value in report.user_properties if name == RAN_ELSEWHERE]
    return {nodeid: environment for environment, nodeids in properties for nodeid in nodeids}


def _without_group(nodeid: str) -> str:
    """The node id without the group that xdist adds behind an "@", as the other environment reports it."""
    name, _, group = nodeid.rpartition("@")
    return nodeid if "]" in group else name or nodeid


def _reason(report: object) -> str:
    """The reason of a skip, which pytest keeps as (file, line, "Skipped: reason")."""
    longrepr = getattr(report, "longrepr", None)
    text = str(longrepr[2] if isinstance(longrepr, tuple) else longrepr)
    return text.removeprefix("Skipped: ")
