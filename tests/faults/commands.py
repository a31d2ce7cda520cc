"""Faults in the commands that write files from results: what they write is whole or not there, and comes the next time.

Each runs on two hosts' results of one campaign, in a folder that holds nothing else.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lem.base.durable import TEMPORARY_PREFIX
from lem.base.errors import UserError
from lem.results.index import INDEX_FILE
from lem.results.merge import read_plan
from tests.doubles.fault_injector import ERRORS, read_journal
from tests.faults.campaigns import CampaignFailed
from tests.faults.points import Point, points_of
from tests.faults.sandbox import Sandbox
from tests.faults.scenarios import PLAIN, Tools
from tests.faults.verdict import Verdict
from tests.synthetic_campaign import Campaign, Configuration

Pieces = Mapping[str, str]
"""What a command wrote, by name, with a digest; a piece is there whole or not at all."""

_HOSTS = ("one", "two")


@dataclass(frozen=True)
class Command:
    """A command of lem that writes files."""

    name: str
    words: tuple[str, ...]
    look: Callable[[Path], Pieces]  # the pieces that lie in a folder
    options: tuple[str, ...] = ()

    def prepare(self, work: Path, rig: Path, tools: Tools) -> dict[str, str]:
        """Write what the command reads."""
        for host in _HOSTS:
            _CAMPAIGN_OF[host].write(work / host)
        (work / "model").mkdir()
        (work / "model" / "weights").write_bytes(bytes(1000))
        (work / "prompts.txt").write_text("one two three\n", encoding="utf-8")
        (work / "faults.yaml").write_text(PLAIN.campaign, encoding="utf-8")
        return {}


_CONFIGURATIONS = (
    Configuration("slow", backend="pytorch", output_tok_per_s=900),
    Configuration("fast", backend="vllm", energy_per_output_tok_j=0.2),
)
_CAMPAIGN = Campaign(_CONFIGURATIONS, cycles=2)
_CAMPAIGN_OF = {host: replace(_CAMPAIGN, host=host) for host in _HOSTS}


def _files(*names: str) -> Callable[[Path], Pieces]:
    def look(work: Path) -> Pieces:
        return {name: _digest(work / name) for name in names if (work / name).exists()}

    return look


def _folders(pattern: str) -> Callable[[Path], Pieces]:
    def look(work: Path) -> Pieces:
        found = (path for path in work.glob(pattern) if not path.name.startswith(TEMPORARY_PREFIX))
        return {str(path.relative_to(work)): _digest(path) for path in found}

    return look


def _digest(path: Path) -> str:
    """Of a file's bytes, or of a folder's names and bytes; an index is made anew by whoever reads it."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = (item for item in sorted(path.rglob("*")) if item.is_file() and item.name != INDEX_FILE)
    inside = {str(item.relative_to(path)): _digest(item) for item in files}
    return hashlib.sha256(json.dumps(inside).encode()).hexdigest()


def _plan(work: Path) -> Pieces:
    """Every plan has a run_id of its own, so one that can be read is as good as another."""
    path = work / "plan.json"
    if not path.exists():
        return {}
    try:
        return {path.name: read_plan(path).mode}
    except UserError:
        return {path.name: "broken"}


COMMANDS = (
    Command("merge", ("merge", "one/results", "two/results", "--output", "merged"), _folders("merged/*/*/*/attempt-*")),
    Command("report", ("report", "demo", "--results-dir", "one/results", "--output", "demo.html"), _files("demo.html")),
    Command(
        "export", ("results", "export", "demo", "--results-dir", "one/results", "-o", "demo.csv"), _files("demo.csv")
    ),
    Command("bundle", ("bundle", "make", "bundles", "--model", "model"), _folders("bundles/*")),
    Command("plan", ("campaign", "faults.yaml", "--write-plan", "plan.json", "--hosts", "one,two"), _plan),
)


def command_points(folder: Path, tools: Tools, command: Command) -> tuple[tuple[Point, ...], Pieces]:
    """The points of the undisturbed command, and what it writes."""
    sandbox = Sandbox(folder, tools, command)
    code = sandbox.start_lem(*command.words, fault=sandbox.fault()).wait()
    pieces = command.look(sandbox.folder)
    if code != 0 or not pieces:
        raise CampaignFailed(f"lem {command.name} fails with {code}:\n{sandbox.output.read_text()[-4000:]}")
    return points_of(read_journal(sandbox.journal)), pieces


def try_command(point: Point, action: str, command: Command, due: Pieces, sandbox: Sandbox) -> Verdict:
    """What the fault cost at that point: what was read, what was written, and what the command then writes again."""
    begin = time.monotonic()
    inputs = _inputs(sandbox)
    code = sandbox.start_lem(*command.words, fault=sandbox.fault(point.process, point.event, point.nth, action)).wait()
    left = sandbox.processes_left()
    sandbox.make_writable()
    found = command.look(sandbox.folder)
    partial = _unlike(found, due)
    if action in ERRORS:  # the program was there to clean up
        partial += sum(1 for _ in sandbox.folder.rglob(f"{TEMPORARY_PREFIX}*"))
    again = sandbox.start_lem(*command.words).wait()
    after = command.look(sandbox.folder)
    return Verdict(
        f"lem {command.name}: {action}",
        point.case(action),
        any(entry.action for entry in read_journal(sandbox.journal)),
        lost=_inputs(sandbox) != inputs,
        partial=partial + _unlike(after, due),
        incomplete=len(due.keys() - after.keys()),
        wrong_ends=sandbox.bugs + (code == 0 and found.keys() != due.keys()),
        processes_left=left + sandbox.processes_left(),
        notes=f"exit codes {code}, {again} in {time.monotonic() - begin:.1f} s; in {sandbox.folder.parent}",
    )


def _inputs(sandbox: Sandbox) -> str:
    return "".join(_digest(sandbox.folder / name) for name in (*_HOSTS, "model"))


def _unlike(found: Pieces, due: Pieces) -> int:
    return sum(due.get(name) != digest for name, digest in found.items())
