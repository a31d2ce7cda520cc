"""Campaigns over the real servers of the lab, run as a person runs them."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.record import Record
from tests.campaign_rig import ROOT, CampaignRig, Ended, Running
from tests.container_rig import docker
from tests.lab.places import LAB_COMPOSE_FILES, Places
from tests.lab.servers import (
    LLAMA_SERVER,
    READY_TIMEOUT_S,
    VLLM_ENVIRONMENT,
    VLLM_MODULE,
    free_port,
    llama_server,
    vllm_serve,
)
from tests.processes import wait_for

RUN_TIMEOUT_S = 800
MODEL = "demo"  # tokens of the tiny one are so short after each other that they arrive together
OUTPUT_TOK = 16
INPUT_TOK = 24
Options = Mapping[str, Any]

# Little work, on a machine that other tests use, too.
EXPERIMENT: Options = {
    "max_input_tokens": 32,
    "max_output_tokens": OUTPUT_TOK,
    "ignore_eos": True,
    "decoder": {"preset": "deterministic"},
    "prompts": {"type": "synthetic", "input_tokens": INPUT_TOK, "sample_size": 8},
    "measurement": {"min_window_sec": 1.0, "max_wait_pct": None, "max_foreign_pct": None},
    "warmup": {"enabled": False},
    "baseline": {"enabled": False},
    "gpus": [],
}


def llamacpp(size: str = MODEL, **more: Any) -> Options:
    """The section `server` for llama.cpp's."""
    return {"engine": "llamacpp", "command": [*llama_server(Places.of(), size), "--metrics"], **more}


def vllm(size: str = MODEL, **more: Any) -> Options:
    """The section `server` for vLLM's."""
    command = [*vllm_serve(Places.of(), size), "--max-model-len", "256"]
    return {"engine": "vllm", "command": command, "env": VLLM_ENVIRONMENT, **more}


def rate(qps: float) -> Options:
    # Beside other tests, a server may not keep up.
    return {"enabled": True, "target_qps": qps, "allow_overload": True}


def served(name: str, server: Options, **more: Any) -> Options:
    """One experiment; `more` are options beside those that all share."""
    return {"config_name": name, "backend": "server", **EXPERIMENT, "server": server, **more}


def served_campaign(experiments: Sequence[Options], *, size: str = MODEL, cycles: int = 1, **more: Any) -> str:
    """As JSON, which is YAML; `more` are keys at the top."""
    execution = {"cycles": cycles, "config_gap_seconds": 0, "cycle_gap_seconds": 0}
    document = {
        "campaign_name": "demo",
        "model": str(Places.of().models / size),
        "experiments": list(experiments),
        "execution": execution,
    }
    return json.dumps(document | more, indent=1)


class ServedRig(CampaignRig):
    """As for any campaign, but without the trivial engine."""

    executor = "local"

    def environ(self, rules: Sequence[Mapping[str, Any]] = (), **more: str) -> dict[str, str]:
        return {**super().environ(rules, **more), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    def command(self, *options: str, file: str = "c.yaml") -> list[str]:
        return [sys.executable, "-m", "lem", "campaign", file, "--executor", self.executor, "--yes", "--json", *options]

    def start(self, *options: str, **more: Any) -> Running:
        running = super().start(*options, **more)
        running.patience_s = READY_TIMEOUT_S
        return running

    def run(self, *options: str, **more: Any) -> Ended:
        return self.start(*options, **more).wait(RUN_TIMEOUT_S)

    def pid_of_server(self) -> int:
        """The process of the command, once it is there; not the one of lem that watches over it."""

        def look() -> int | None:
            found = []
            for pid in self.marker.pids():
                words = _words(pid)
                is_server = {str(LLAMA_SERVER), VLLM_MODULE} & set(words)
                found += [pid] if is_server and "--program" not in words else []
            return found[0] if len(found) == 1 else None

        return wait_for(look)

    def requests(self, record: Record) -> list[dict[str, Any]]:
        """What an attempt has in requests.jsonl.gz."""
        identity = record.identity
        (path,) = self.folder.glob(f"results/**/{identity.experiment_id}/attempt-{identity.attempt}/requests.jsonl.gz")
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines][1:]

    def outputs(self, record: Record) -> list[dict[str, Any]]:
        """What it has in outputs.jsonl."""
        identity = record.identity
        (path,) = self.folder.glob(f"results/**/{identity.experiment_id}/attempt-{identity.attempt}/outputs.jsonl")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class ServedContainersRig(ServedRig):
    """Servers in containers of the lab, with the compose files of this project."""

    executor = "docker"

    def environ(self, rules: Sequence[Mapping[str, Any]] = (), **more: str) -> dict[str, str]:
        files = {"COMPOSE_FILE": ":".join(map(str, LAB_COMPOSE_FILES)), "LEM_CACHE_DIR": str(self.folder / "cache")}
        port = {"LEM_LLAMACPP_PORT": str(self._port)}
        return {**super().environ(rules), **Places.of().variables(), **files, **port, **more}

    @functools.cached_property
    def _port(self) -> int:
        return free_port()

    @property
    def project(self) -> str:
        name: str = json.loads((self.folder / "c.yaml").read_text(encoding="utf-8"))["campaign_name"]
        return f"lem-{name}"

    def containers(self) -> list[str]:
        """The names of this rig's containers, those that have ended among them."""
        label = f"label=com.docker.compose.project={self.project}"
        return docker("ps", "--all", "--filter", label, "--format", "{{.Names}}").split()

    @contextlib.contextmanager
    def cleaned(self) -> Iterator[ServedContainersRig]:
        try:
            yield self
        finally:
            self.marker.kill()
            if left := self.containers():
                docker("rm", "--force", "--volumes", *left)


def _words(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    return []
