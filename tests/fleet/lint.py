"""The linters of the fleet: `python3 -m tests.fleet.lint`.

yamllint, ansible-lint (production profile, offline), and systemd-analyze on the units: verify, which finds unknown
keys, security, with what a unit may be exposed to, and calendar. What is not on this machine is told, and in CI an
error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from tests.needs import is_ci

ROOT = Path(__file__).resolve().parents[2]
UNITS = tuple(sorted((ROOT / "roles" / "lem_deploy" / "files").glob("lem-campaign@.*")))
SERVICE = ROOT / "roles" / "lem_deploy" / "files" / "lem-campaign@.service"
EXPOSURE_MAX = 25  # tenths
TIMEOUT_S = 600


def main() -> int:
    """0 when nothing was found."""
    calendar = yaml.safe_load((ROOT / "roles/lem_campaign/defaults/main.yml").read_text())["lem_campaign_calendar"]
    codes = [
        _lint("yamllint", "--strict", "."),
        _lint("ansible-lint", "--offline", "--nocolor", "-q"),
        _lint("systemd-analyze", "verify", "--recursive-errors=no", *map(str, UNITS)),
        _lint(
            "systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MAX}", "--no-pager", str(SERVICE)
        ),
        _lint("systemd-analyze", "calendar", "--iterations=3", calendar),
    ]
    return max(codes)


def _lint(*words: str) -> int:
    program = _find(words[0])
    if program is None:
        print(f"{words[0]}: NOT RUN, it is not on this machine", file=sys.stderr)
        return int(is_ci())
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # ansible-lint calls ansible
    ended = subprocess.run(
        [program, *words[1:]],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    print(f"{_named(words)}: {'nothing found' if ended.returncode == 0 else 'failed'}", flush=True)
    if ended.returncode != 0:
        print(ended.stdout + ended.stderr, file=sys.stderr)
    return int(ended.returncode != 0)


def _named(words: Sequence[str]) -> str:
    return " ".join(words[:2] if words[0] == "systemd-analyze" else words[:1])


def _find(name: str) -> str | None:
    """Of the environment that runs this, else of the machine."""
    own = Path(sys.executable).with_name(name)
    return str(own) if own.exists() else shutil.which(name)


if __name__ == "__main__":
    sys.exit(main())
