"""Campaigns whose server is in a container, on this machine, or there already; and who is killed in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.record import Record
from tests.campaign_rig import Running
from tests.container_rig import ROOT, ContainerRig, docker
from tests.lab.places import BASE_IMAGE
from tests.processes import wait_for, wait_until_ended

pytestmark = [pytest.mark.needs("lab"), pytest.mark.timeout(600)]

DOUBLE = ROOT / "tests" / "doubles" / "openai_server.py"
INSIDE = "/doubles/openai_server.py"
PORT_INSIDE = 8000


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class ServedRig(ContainerRig):
    """A campaign, and a compose file with a service that is a server (`llm`) and one that waits (`tools`)."""

    is_warm = False  # its processes are known by their command lines

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        doubles = {"type": "bind", "source": str(DOUBLE.parent), "target": "/doubles", "read_only": True}
        usual = {"image": BASE_IMAGE, "init": True, "volumes": [doubles]}
        self.port = free_port()
        llm = {
            **usual,
            "entrypoint": ["python3", "-u", INSIDE, "--host", "0.0.0.0"],  # noqa: S104 - in the container
            "command": ["--port", str(PORT_INSIDE)],
            "ports": [f"127.0.0.1:{self.port}:{PORT_INSIDE}"],
            "restart": "always",
        }
        self.write(
            json.dumps({"services": {"llm": llm, "tools": {**usual, "command": ["sleep", "infinity"]}}}),
            "docker-compose.yml",
        )

    def write_campaign(self, *servers: dict[str, Any], **execution: Any) -> None:
        usual = {
            "model": str(self.folder),
            "backend": "server",
            "gpus": [],
            "max_output_tokens": 4,
            "decoder": {"preset": "deterministic"},
            "warmup": {"enabled": False},
            "measurement": {"min_window_sec": 0.01, "max_wait_pct": None, "max_foreign_pct": None},
            "prompts": {"type": "synthetic", "input_tokens": 3, "sample_size": 2},
        }
        chosen = {"cycles": 1, "config_gap_seconds": 0, "cycle_gap_seconds": 0, **execution}
        listed = [{**usual, "server": {"engine": "vllm", **server}} for server in servers]
        self.write(json.dumps({"campaign_name": "demo", "experiments": listed, "execution": chosen}))

    def command(self, *options: str, file: str = "c.yaml") -> list[str]:
        return [sys.executable, "-m", "lem", "campaign", file, *options]

    def ids(self) -> list[str]:
        return list(self.containers(is_all=True).values())

    def assert_nothing_left(self) -> None:
        self.assert_no_process_left()
        wait_for(lambda: None if self.ids() else True)


SLOW = {"service": "llm", "options": {"token-s": 1.0}}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ServedRig]:
    with (rig := ServedRig(tmp_path)).cleaned():
        yield rig


def test_every_form_is_measured_with_fresh_loads_and_leaves_nothing(rig: ServedRig) -> None:
    here = {"command": [sys.executable, str(DOUBLE), "--port", "{port}"]}
    there = {"command": ["python3", INSIDE, "--port", "{port}"], "service": "tools"}
    rig.write_campaign({"service": "llm"}, there, here, cycles=2)
    ended = rig.run("--yes", "--json")
    assert ended.code == 0, ended.err
    assert rig.statuses() == ["completed"] * 6
    image = docker("image", "inspect", "--format", "{{.Id}}", BASE_IMAGE).strip()
    places = {(it.container, record_of(rig, it.exp_id).environment.executor) for it in rig.manifest().experiments}
    assert places == {("llm", "local"), ("tools", "docker"), (None, "local")}
    records = rig.records()
    images = {record.environment.image for record in records}
    assert images == {image, None}
    assert len({record.validity.engine_load_id for record in records}) == len(records) >= 6
    rig.assert_nothing_left()


def record_of(rig: ServedRig, exp_id: str) -> Record:
    return next(record for record in rig.records() if record.identity.experiment_id == exp_id)


def test_options_and_variables_reach_a_service_that_is_the_server(rig: ServedRig) -> None:
    served = [{**SLOW, "options": {"token-s": 1.0, "max-num-seqs": n}, "env": {"GREETING": "hello"}} for n in (2, 3)]
    rig.write_campaign(*served)
    running = rig.start("--yes", "--json", "--fail-fast")
    seen = []
    for _ in served:
        running.wait_for_event("phase", phase="window")
        (container,) = rig.containers().values()
        seen.append(json.loads(docker("inspect", "--format", "{{json .Config}}", container)))
        break
    running.send(signal.SIGTERM)
    assert running.wait().code == 143
    (first,) = seen
    assert first["Cmd"] == ["--port", str(PORT_INSIDE), "--token-s", "1.0", "--max-num-seqs", "2"]
    assert "GREETING=hello" in first["Env"]
    rig.assert_nothing_left()


def kill_host(rig: ServedRig, running: Running) -> None:
    running.process.kill()


def stop_host(rig: ServedRig, running: Running) -> None:
    running.send(signal.SIGTERM)


def kill_one(rig: ServedRig, *words: str) -> None:
    """Kill the process of lem that was started with these words; of two, the one that the other has forked."""

    def find() -> int | None:
        found = []
        for pid in rig.marker.pids():
            with contextlib.suppress(OSError):
                given = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[3:-1]
                found += [pid] if tuple(given[: len(words)]) == words and (len(words) > 1 or len(given) == 1) else []
        return max(found, default=None)

    os.kill(wait_for(find), signal.SIGKILL)


def kill_worker(rig: ServedRig, _: Running) -> None:
    kill_one(rig, "worker")


def kill_engine(rig: ServedRig, _: Running) -> None:
    kill_one(rig, "worker", "--engine")


def kill_command(rig: ServedRig, _: Running) -> None:
    kill_one(rig, "worker", "--service")


def kill_server(rig: ServedRig, running: Running) -> None:
    docker("kill", *rig.containers().values())


@pytest.mark.parametrize(("end", "code"), [(kill_host, -9), (stop_host, 143)])
def test_a_host_that_ends_leaves_no_server_and_is_resumed(
    rig: ServedRig, end: Callable[[ServedRig, Running], None], code: int
) -> None:
    rig.write_campaign(SLOW)
    running = rig.start("--yes", "--json")
    running.wait_for_event("phase", phase="window")
    assert list(rig.containers()) == ["llm"]
    end(rig, running)
    assert running.wait().code == code
    rig.assert_nothing_left()
    ended = rig.run("--yes", "--resume")
    assert ended.code == 0, ended.err
    assert rig.statuses() == ["completed"]
    rig.assert_nothing_left()


@pytest.mark.parametrize("end", [kill_worker, kill_engine, kill_command, kill_server])
def test_an_attempt_whose_server_or_worker_dies_fails_with_the_reason_and_is_made_again(
    rig: ServedRig, end: Callable[[ServedRig, Running], None]
) -> None:
    rig.write_campaign(SLOW)
    running = rig.start("--yes", "--json")
    running.wait_for_event("phase", phase="window")
    end(rig, running)
    ended = running.wait()
    assert ended.code == 0, ended.err
    (retried,) = [event for event in ended.events() if event["event"] == "experiment_retried"]
    assert "killed by SIGKILL" in retried["reason"]
    (entry,) = rig.manifest().experiments
    failed, made_again = entry.attempts
    assert (failed.result_path, made_again.error) == (None, None)
    rig.assert_nothing_left()


def test_a_server_that_does_not_start_says_why_and_is_not_tried_again(rig: ServedRig) -> None:
    rig.write_campaign({"service": "llm", "options": {"no-such-option": 1}})
    ended = rig.run("--yes", "--json")
    assert ended.code == 1, ended.err
    (entry,) = rig.manifest().experiments
    (attempt,) = entry.attempts
    assert "unrecognized arguments: --no-such-option" in str(attempt.error)
    assert "unrecognized arguments" in (rig.folder / str(attempt.log_path)).read_text()
    rig.assert_nothing_left()


def test_cycles_on_a_server_that_runs_already_share_its_load(rig: ServedRig) -> None:
    command = [sys.executable, str(DOUBLE), "--port", str(rig.port)]
    with subprocess.Popen(command, start_new_session=True) as server:
        try:
            wait_for(lambda: is_listening(rig.port) or None)
            rig.write_campaign({"url": f"http://127.0.0.1:{rig.port}"}, cycles=2)
            ended = rig.run("--yes", "--json")
            assert ended.code == 0, ended.err
            records = rig.records()
            assert len({record.validity.engine_load_id for record in records}) == 1
            assert server.poll() is None
        finally:
            server.kill()
    assert wait_until_ended(server.pid)


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
