"""The playbooks over a fleet that is not there, old build and new: `python3 -m tests.bench fleet [HOSTS]`.

What is measured is the controller: CPU time of ansible-playbook with all that it starts, and the time from the first
poll to the last host's first answer. What a poll costs on a host is measured by running here what a host was sent,
without sudo and with a systemctl that only answers; then the polls of both builds take as long as that on each host.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.builds import BUILD, Build, build_of, old_build
from tests.bench.host import Figure
from tests.fleet.simulated import Simulated

ROOT = Path(__file__).resolve().parents[2]
POLLS = 15
_SUDO = 'while [ "$1" != /bin/sh ]; do shift; done; exec "$@"'


@dataclass(frozen=True)
class Found:
    playbook_s: dict[str, float]  # CPU time of the controller, for each host
    round_s: float  # from the first poll to the last host's first answer
    poll_s: float  # CPU time on a host


def fleet(hosts: int = 100) -> Iterator[Figure]:
    """Each figure of the new build has a share of the old build's as its target."""
    with tempfile.TemporaryDirectory() as folder:
        old = measure(old_build(), Path(folder, "old"), hosts)
        new = measure(build_of(ROOT, BUILD / "now" / "lem.pyz"), Path(folder, "new"), hosts)
    for name, value in old.playbook_s.items():
        yield Figure(f"{hosts} hosts: {name}, controller CPU a host, 524ec81", 1000 * value, "ms")
        yield Figure(f"{hosts} hosts: {name}, controller CPU a host", 1000 * new.playbook_s[name], "ms", 500 * value)
    yield Figure(f"{hosts} hosts: a round of polls, 524ec81", old.round_s, "s")
    yield Figure(f"{hosts} hosts: a round of polls", new.round_s, "s", old.round_s / 4)
    yield Figure("a poll, CPU time on the host, 524ec81", 1000 * old.poll_s, "ms")
    yield Figure("a poll, CPU time on the host", 1000 * new.poll_s, "ms", 1000 * min(old.poll_s / 10, 0.05))


def measure(build: Build, folder: Path, count: int) -> Found:
    hosts = [f"gpu{number:03}" for number in range(1, count + 1)]
    simulated = Simulated(build, folder, hosts)
    simulated.write_results()
    # Around the tasks alone.
    play = {"name": "Merge", "hosts": "localhost", "connection": "local", "gather_facts": False}
    tasks = [{"ansible.builtin.include_tasks": {"file": str(build.tree / "playbooks/tasks/merge.yml")}}]
    (folder / "merge.yml").write_text(json.dumps([{**play, "tasks": tasks}]))
    poll_s = _poll_cost(simulated)
    costs_s, round_s = dict[str, float](), 0.0
    playbooks: dict[str, str | Path] = {
        "run_campaign": "run_campaign",
        "collect": "collect_results",
        "merge": folder / "merge.yml",
    }
    for name, playbook in playbooks.items():
        played = simulated.play(playbook, lem_fleet_anchor_tolerance="1e9%")
        if played.ended.code != 0:
            raise RuntimeError(f"{name} fails with {played.ended.code}:\n{played.ended.text[-4000:]}")
        costs_s[name] = played.cpu_s / count
        if name == "run_campaign":
            round_s = _round_s(simulated)
    return Found(costs_s, round_s, poll_s)


def _round_s(simulated: Simulated) -> float:
    first = [next(item for item in simulated.exchanges(host) if item.kind == "poll") for host in simulated.hosts]
    return max(item.end_s for item in first) - min(item.begin_s for item in first)


def _poll_cost(simulated: Simulated) -> float:
    """The median; from now on, a poll takes that long on each host."""
    # With one host of many, results are missing, which the playbook reports.
    simulated.know(simulated.hosts[:1])
    simulated.play("run_campaign")
    simulated.know(simulated.hosts)
    (sent,) = simulated.double.glob("poll.*")
    command, payload = json.loads(sent.read_text())
    programs = simulated.folder / "bin"
    programs.mkdir()
    for name, text in (("systemctl", "echo ActiveState=active"), ("sudo", _SUDO)):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    costs_s = []
    for _ in range(POLLS):
        before = _children_s()
        subprocess.run(["/bin/sh", "-c", command], input=payload.encode(), env=environ, check=True, capture_output=True)
        costs_s.append(_children_s() - before)
    cost_s = statistics.median(costs_s)
    for host in simulated.hosts:
        simulated.describe(host, latency_s=cost_s)
    return cost_s


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
