"""A fleet that is not there: the real playbooks, with hosts whose connection answers at once (connection/)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.builds import Build
from tests.fleet.controller import Ended

ROOT = Path(__file__).resolve().parents[2]
ANSIBLE = Path(sys.executable).with_name("ansible-playbook")
TIMEOUT_S = 3600

# In the tree of a build: the results of one host, and the same as results of the others.
_COPY_RESULTS = """
import json, shutil, subprocess, sys
from pathlib import Path
source, target, own, *hosts = sys.argv[1:]
for host in hosts:
    for path in sorted(Path(source).rglob("attempt-1/result.json")):
        names = [host if name == own else name for name in path.relative_to(source).parts]
        to = Path(target, host, "results", *names)
        shutil.copytree(path.parent, to.parent)
        document = json.loads(path.read_text())
        document["identity"]["host"] = host
        to.write_text(json.dumps(document))
        try:
            from lem.record import parse_record
            from lem.results.index import record_result
        except ImportError:
            continue
        import hashlib
        run = Path(target, host, "results", *names[:3])
        record_result(run, to, parse_record(to.read_bytes()), hashlib.sha256(to.read_bytes()).hexdigest())
    subprocess.run(["tar", "-C", f"{target}/{host}", "-czf", f"{target}/{host}.tar.gz", "results"], check=True)
"""

_CAMPAIGN = {
    "campaign_name": "bench",
    "model": "none",
    "grid": {
        "backends": ["pytorch"],
        "shared": {
            "max_output_tokens": [4, 8],
            "warmup.enabled": [False],
            "baseline.enabled": [False],
            "measurement.min_window_sec": [0.01],
            "prompts": [{"type": "synthetic", "input_tokens": 3, "sample_size": 2}],
            "gpus": [[]],
        },
    },
    "execution": {"cycles": 2, "config_gap_seconds": 0, "cycle_gap_seconds": 0},
}


@dataclass(frozen=True)
class Played:
    ended: Ended
    cpu_s: float  # of ansible-playbook and all that it started


@dataclass(frozen=True)
class Exchange:
    begin_s: float
    end_s: float
    kind: str  # a module, or `poll`
    what: str


class Simulated:
    """A controller of a build, and its hosts."""

    def __init__(self, build: Build, folder: Path, hosts: Sequence[str], ansible: Path = ANSIBLE) -> None:
        self.build, self.folder, self.hosts, self.ansible = build, folder, tuple(hosts), ansible
        self.double, self.fleet_dir = folder / "double", folder / "fleet"
        self.double.mkdir(parents=True)
        (folder / "tmp").mkdir()
        (folder / "inventory").mkdir()
        (folder / "inventory/group_vars").symlink_to(build.tree / "inventory/group_vars")
        self.campaign = folder / "bench.yaml"
        self.campaign.write_text(json.dumps(_CAMPAIGN))
        self.know(hosts)

    def know(self, hosts: Iterable[str]) -> None:
        """Have these hosts, and no others, in the inventory."""
        variables = {
            "ansible_connection": "lemtest_fleet",
            "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_pipelining": True,
        }
        group = {"hosts": {name: {} for name in hosts}, "vars": variables}
        (self.folder / "inventory/hosts.yml").write_text(json.dumps({"lem": group}))

    def describe(self, host: str, **what: object) -> None:
        """What is particular about a host, for the connection; it begins anew."""
        for path in self.double.glob(f"{host}.*"):
            if path.suffix != ".gz":
                path.unlink()
        (self.double / f"{host}.json").write_text(json.dumps(what))

    def exchanges(self, host: str) -> list[Exchange]:
        """What the last playbook sent to a host."""
        path = self.double / f"{host}.log"
        return [Exchange(*json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    def play(self, playbook: str | Path, *words: str, **variables: Any) -> Played:
        """A playbook of the build's tree, or another one, ended, whatever came of it; None omits a variable."""
        tree = self.build.tree
        given = {
            "lem_pyz": str(self.build.zip),
            "lem_fleet_dir": str(self.fleet_dir),
            "lem_campaign_file": str(self.campaign),
            "lem_fleet_mode": "replicate",
            "lem_campaign_executor": "local",
            "lem_campaign_poll_seconds": 1,
            **variables,
        }
        given = {name: value for name, value in given.items() if value is not None}
        path = playbook if isinstance(playbook, Path) else tree / f"playbooks/{playbook}.yml"
        command = [str(self.ansible), "-i", str(self.folder / "inventory"), "-e", json.dumps(given), *words, str(path)]
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("ANSIBLE_", "LEM"))}
        environ |= {
            "ANSIBLE_CONFIG": str(tree / "ansible.cfg"),
            "ANSIBLE_CONNECTION_PLUGINS": str(ROOT / "tests/fleet/connection"),
            "ANSIBLE_NOCOLOR": "1",
            "LEMTEST_FLEET": str(self.double),
            "TMPDIR": str(self.folder / "tmp"),
        }
        for log in self.double.glob("*.log"):
            log.unlink()
        with (self.folder / "output").open("w+b") as stream:
            process = subprocess.Popen(
                command, cwd=tree, env=environ, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            stream.seek(0)
            text = stream.read().decode(errors="replace")
        return Played(Ended(process.returncode, text), usage.ru_utime + usage.ru_stime)

    def write_results(self) -> None:
        """Store a plan of all hosts, have one run its part for real, and give the others the same results."""
        plan = self.fleet_dir / "bench/plan.json"
        (plan.parent / "hosts").mkdir(parents=True)
        divide = ["--write-plan", str(plan), "--hosts", ",".join(self.hosts), "--replicate"]
        part = ["--plan", str(plan), "--shard", f"1/{len(self.hosts)}", "--yes", "--executor", "local"]
        tree = self.build.tree  # unlike the zip, its bytecode is kept
        path = os.pathsep.join([str(tree), str(tree / "tests/doubles")])
        environ = {**os.environ, "PYTHONPATH": path, "LEM_LOCK_DIR": str(self.folder)}
        for words in (divide, part):
            command = [sys.executable, "-m", "lem", "campaign", str(self.campaign), *words]
            command += ["--results-dir", str(self.folder / "results")]
            subprocess.run(command, cwd=self.folder, env=environ, check=True, capture_output=True, timeout=TIMEOUT_S)
        copy = [sys.executable, "-c", _COPY_RESULTS, str(self.folder / "results"), str(self.double)]
        subprocess.run([*copy, self.hosts[0], *self.hosts], cwd=self.build.tree, check=True, timeout=TIMEOUT_S)
