"""The commands of the documentation, run as they stand there, with an engine that answers at once.

Each page has a folder of its own, in which its commands run one after another: with the files that the pages show, made
short, and with results where a page is about results. What is not run is listed below with the reason.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.campaign_rig import DOUBLES_PATH, LEM, Ended, Running
from tests.documentation import ROOT, Command, commands, files, pages
from tests.processes import Marker
from tests.synthetic_campaign import Campaign, Configuration

# Executors look for what an engine consists of, though the one that answers here is a double.
pytestmark = pytest.mark.needs("torch", "transformers")

TIMEOUT_S = 120
SHELL = set("|&;<>$*`")  # of a command that means something only to a shell

# A pattern of commands, and why they are not run here.
NOT_RUN: Mapping[str, str] = {
    r"make lem\.pyz": "tests/unit/test_build.py builds it",
    r"make (demo|test|lint)\b(?!-).*": "makes an environment of some gigabytes; .ci/run runs it",
    r"make test-long": "takes minutes for each of its tests",
    r"make demo-containers.*": "tests/integration/test_containers_campaign.py runs campaigns in containers",
    r"docker pull .*": "wants the network",
    r"lem campaign rates\.yaml": "wants vLLM; tests/integration/test_served_engines.py runs such campaigns",
    r"lem experiment running\.yaml": "wants a server; tests/unit/orchestration/test_served.py has one",
    r"lem campaign .* --prometheus /.*": "wants the folder of node_exporter; tests/unit/cli/test_prometheus.py has one",
    r"lem measure .* (vllm|guidellm|aiperf|sh) .*": "wants a benchmark; tests/integration/test_measure.py has programs",
    r"(LEM_\w+=\w+ )?lem campaign .*--executor docker.*": "make demo-containers runs one in containers",
    r"lem campaign .*--until .*": "may take any number of cycles; tests/integration/test_campaign_topup.py runs it",
    r"lem merge .*": "wants several hosts; tests/integration/test_campaign_fleet.py runs it",
    r"(ansible-playbook|systemctl|journalctl) .*": "wants hosts; tests/fleet/test_fleet.py runs playbooks and units",
    r"(bash job\.sbatch|sbatch .*)": "wants a cluster; tests/integration/test_slurm.py has one",
    r"cp inventory/.*": "is for the playbooks",
}

# What else than 0 may come out, and why.
CODES: Mapping[str, tuple[int, ...]] = {
    r"(lem|python3 lem\.pyz) check .*": (4,),  # an engine without a pace is not steady
    r"(lem|python3 lem\.pyz) doctor.*": (2,),  # this machine need not have containers
    r".* --gate .*": (3, 4),
}

# So little that an experiment takes a moment.
QUICK = {
    "measurement": {"min_window_sec": 0.01, "max_wait_pct": None, "max_foreign_pct": None},
    "warmup": {"enabled": False},
    "gpus": [],
}
QUICK_AXES = {
    "measurement.max_wait_pct": [None],
    "measurement.min_window_sec": [0.01],
    "warmup.enabled": [False],
    "gpus": [[]],
}
CYCLES = 2


def reason(command: Command) -> str | None:
    """Why a command is not run; None when it is."""
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command.text)), None)


def shortened(text: str) -> str:
    """A campaign or experiment file as the page shows it, made short."""
    document = yaml.safe_load(text)
    if "campaign_name" not in document:
        return yaml.safe_dump({**document, **QUICK})
    gaps = {"config_gap_seconds": 0, "cycle_gap_seconds": 0, "cycles": CYCLES}
    document["execution"] = {**document.get("execution", {}), **gaps}
    if "grid" in document:
        document["grid"]["shared"] = {**document["grid"].get("shared", {}), **QUICK_AXES}
    document["experiments"] = [
        item if "config" in item else {**item, **QUICK} for item in document.get("experiments", [])
    ]
    return yaml.safe_dump(document)


def _results() -> tuple[Campaign, Campaign]:
    """Two runs of the campaign that the page about results is about."""
    before = Campaign(
        (
            Configuration("batch-1", "pytorch", batch_size=1, energy_per_output_tok_j=0.9, output_tok_per_s=150),
            Configuration("batch-8", "pytorch", batch_size=8, energy_per_output_tok_j=0.35, output_tok_per_s=900),
        ),
        name="batch-sizes",
        window_s=8,
        is_verifiable=True,
    )
    return before, replace(before, run_id="20260715T100000Z-77aa")


class Shell:
    """A folder in which a page's commands run."""

    def __init__(self, folder: Path, page: Path) -> None:
        self.folder = folder
        self.marker = Marker()
        self.programs = folder.parent / f"{folder.name}-bin"
        self.programs.mkdir()
        self._program("python3", f'exec "{sys.executable}" "$@"')
        self._program("lem", f'exec "{sys.executable}" -m lem "$@"')
        folder.mkdir()
        self._program("python", f'exec "{sys.executable}" "$@"', folder / "build" / "demo-env" / "bin")  # by make demo
        (folder / "lem.pyz").write_text("import runpy\nrunpy.run_module('lem', run_name='__main__', alter_sys=True)\n")
        shutil.copytree(ROOT / "examples", folder / "examples")
        shutil.copytree(ROOT / "docker", folder / "docker")
        for name, block in files(page).items():
            text = shortened(block.text) if name.endswith((".yaml", ".yml")) else block.text
            (folder / name).write_text(text, encoding="utf-8")

    def _program(self, name: str, text: str, folder: Path | None = None) -> None:
        path = (folder or self.programs) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def run(self, command: Command) -> Ended:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("LEM")}
        environ: dict[str, Any] = {
            **plain,
            **self.marker.environ(),
            "PATH": os.pathsep.join([str(self.programs), os.environ["PATH"]]),
            "PYTHONPATH": DOUBLES_PATH,
            "LEM_LOCK_DIR": str(self.folder / "locks"),
            "LEM_CACHE_DIR": str(self.folder / "cache"),
            "LEMTEST_ENGINE_SCRIPT": json.dumps({"token_s": 0.0005}),  # else a window of seconds is much work
        }
        program, *words = shlex.split(command.text)
        needs_shell = program != "lem" or set(command.text) & SHELL
        line = ["sh", "-c", command.text] if needs_shell else [*LEM, *words]
        return Running(line, self.folder, environ, is_warm=True).wait(TIMEOUT_S)


PAGES = [page for page in pages() if any(reason(command) is None for command in commands(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_do_what_the_page_says(page: Path, tmp_path: Path) -> None:
    shell = Shell(tmp_path / "here", page)
    if page.name in ("results.md", "compare.md", "ci.md"):
        for campaign in _results():
            campaign.write(shell.folder)
            replace(campaign, name="nightly", run_id=campaign.run_id.replace("2026", "2025")).write(shell.folder)
    try:
        for command in commands(page):
            if reason(command) is not None:
                continue
            ended = shell.run(command)
            others = next((codes for pattern, codes in CODES.items() if re.fullmatch(pattern, command.text)), ())
            assert ended.code in (0, *others), f"{command}\n{ended.out}\n{ended.err}"
            assert "Traceback" not in ended.err, f"{command}\n{ended.err}"
    finally:
        shell.marker.kill()


def test_what_is_not_run_is_in_the_documentation_and_what_runs_it_instead_is_there() -> None:
    every = [command.text for page in pages() for command in commands(page)]
    for pattern, why in NOT_RUN.items():
        assert any(re.fullmatch(pattern, text) for text in every), f"no page has {pattern} any more"
        for named in re.findall(r"\S+\.py|\.ci/run", why):
            assert (ROOT / named).is_file(), f"{named}: no such file"
