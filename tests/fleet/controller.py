"""The controller of a fleet: an inventory, a folder, and `ansible-playbook` with the project's own configuration."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.fleet.hosts import DOUBLES, Host, inventory

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOK_TIMEOUT_S = 600
_RECAP = re.compile(r"^(\S+)\s+: (ok=\d+.*)$", re.MULTILINE)


# The trivial engine measures nothing, so hosts are never alike in it.
ANY = "1e9%"
HOLD = "/var/lib/lem-hold"


def environment(*rules: dict[str, Any]) -> dict[str, str]:
    """The environment of a unit that runs the trivial engine by these rules."""
    return {"PYTHONPATH": DOUBLES, "LEMTEST_ENGINE_SCRIPT": json.dumps({"rules": list(rules)})}


def trivial(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "lem_campaign_executor": "local",
        "lem_campaign_environment": environment(*rules),
        "lem_campaign_poll_seconds": 1,
        "lem_fleet_anchor_tolerance": ANY,
        **more,
    }


def held(when: dict[str, Any]) -> dict[str, Any]:
    """A rule by which an experiment goes on only when the host's hold is lifted."""
    command = f"while [ -e {HOLD} ]; do sleep 0.1; done"
    return {"at": "generate", "do": "shell", "command": command, "when": when}


def unit(name: str) -> str:
    return f"lem-campaign@{name}.service"


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


@dataclass(frozen=True)
class Playing:
    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def text(self) -> str:
        """What it has printed until now."""
        length = os.fstat(self.output.fileno()).st_size
        return os.pread(self.output.fileno(), length, 0).decode(errors="replace")

    def wait(self) -> Ended:
        code = self.process.wait(PLAYBOOK_TIMEOUT_S)
        return Ended(code, self.text())


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
        with self.start(name, *words, **variables) as playing:
            return playing.wait()

    @contextlib.contextmanager
    def start(self, name: str | Path, *words: str, **variables: Any) -> Iterator[Playing]:
        """A running playbook of the project, or another one beside its hosts.yml; it ends with the block."""
        given = {"lem_pyz": str(self.pyz), "lem_fleet_dir": str(self.fleet_dir), **variables}
        path = name if isinstance(name, Path) else Path(f"playbooks/{name}.yml")
        hosts = path.parent / "hosts.yml" if path.is_absolute() else self.folder / "inventory"
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(hosts)]
        command += ["-e", json.dumps(given), *words, str(path)]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "LEM"))}
        folder = path.parent if path.is_absolute() else ROOT
        environ |= {"PWD": str(folder), "ANSIBLE_CONFIG": str(folder / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        with tempfile.TemporaryFile() as stream:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield Playing(process, stream)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

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


def install_collection(folder: Path, galaxy: Path) -> None:
    """Build the collection from a copy of the checkout, and install it where the playbooks of `folder` find it."""
    tree = folder / "tree"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    run = [str(galaxy), "collection"]
    subprocess.run([*run, "build", "--output-path", str(folder)], cwd=tree, check=True, capture_output=True)
    (archive,) = folder.glob("lem-energy-*.tar.gz")
    target = folder / "collections"
    subprocess.run([*run, "install", "--offline", str(archive), "-p", str(target)], check=True, capture_output=True)
    (folder / "ansible.cfg").write_text(f"[defaults]\ncollections_path = {target}\n")
