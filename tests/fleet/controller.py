"""The controller of a fleet: an inventory, a folder, and `ansible-playbook` with the project's own configuration."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fleet.hosts import Host, inventory

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOK_TIMEOUT_S = 600
_RECAP = re.compile(r"^(\S+)\s+: (ok=\d+.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Ended:
    code: int
    text: str

    def counts(self, host: str) -> dict[str, int]:
        """Of the recap: ok, changed, unreachable, failed, skipped."""
        found = dict(_RECAP.findall(self.text))
        assert host in found, f"{host} is not in the recap: {self.text[-3000:]}"
        return {name: int(number) for name, number in (word.split("=") for word in found[host].split())}

    def changed(self, *hosts: str) -> int:
        return sum(self.counts(host)["changed"] for host in hosts)


class Controller:
    """Where playbooks are called from."""

    def __init__(self, folder: Path, key: Path, pyz: Path) -> None:
        self.folder, self.key, self.pyz = folder, key, pyz
        self.fleet_dir = folder / "fleet"
        # As a person's own: the group variables of the project beside the hosts of the test.
        (folder / "inventory").mkdir(exist_ok=True)
        if not (folder / "inventory" / "group_vars").exists():
            (folder / "inventory" / "group_vars").symlink_to(ROOT / "inventory" / "group_vars")

    def know(self, *hosts: Host) -> None:
        """Have these hosts, and no others, in the inventory."""
        text = inventory(hosts, self.key, self.folder)
        (self.folder / "inventory" / "hosts.yml").write_text(text, encoding="utf-8")

    def play(self, name: str, *words: str, **variables: Any) -> Ended:
        """A playbook, ended, whatever came of it."""
        given = {"lem_pyz": str(self.pyz), "lem_fleet_dir": str(self.fleet_dir), **variables}
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(self.folder / "inventory")]
        command += ["-e", json.dumps(given), *words, f"playbooks/{name}.yml"]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "LEM"))}
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env={**environ, "PWD": str(ROOT), "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PLAYBOOK_TIMEOUT_S,
            check=False,
        )
        return Ended(ended.returncode, ended.stdout.decode(errors="replace"))

    def must(self, name: str, *words: str, **variables: Any) -> Ended:
        ended = self.play(name, *words, **variables)
        assert ended.code == 0, ended.text[-6000:]
        return ended

    def lem(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", str(self.pyz), *map(str, words)]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False)

    def write_campaign(
        self,
        name: str,
        *,
        outputs: Sequence[int] = (4, 8),
        cycles: int = 2,
        more: Mapping[str, Any] | None = None,
        **axes: Any,
    ) -> str:
        """The path of a campaign file of as little as there can be; `more` at its top, `axes` in its grid."""
        shared = {
            "max_output_tokens": list(outputs),
            "warmup.enabled": [False],
            "baseline.enabled": [False],
            "measurement.min_window_sec": [0.01],
            "measurement.max_wait_pct": [None],
            "fp_precision": ["float32"],
            "prompts": [{"type": "synthetic", "input_tokens": 3, "sample_size": 2}],
            "gpus": [[]],
            **axes,
        }
        document = {
            "campaign_name": name,
            "model": "none",
            "grid": {"backends": ["pytorch"], "shared": shared},
            "execution": {"cycles": cycles, "config_gap_seconds": 0, "cycle_gap_seconds": 0},
            **(more or {}),
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(document), encoding="utf-8")
        return str(path)

    def merged(self, name: str) -> dict[str, bytes]:
        folder = self.fleet_dir / name / "merged"
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("result.json"))}
