"""The Docker Engine of the lab: one that answers already, else a dockerd of the lab's own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from lem.base.durable import read_json, write_json
from lem.base.errors import UserError
from lem.base.process import ProcessId, identify
from tests.lab.places import LABEL, SOCKET, Places
from tests.lab.steps import answer, must, step
from tests.processes import wait_until_ended

START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 60
DOCKER_TIMEOUT_S = 120
# Sockets are made below it, and their names may not be long.
EXEC_ROOT = Path("/run/lem-lab")
RECORD = "dockerd.json"
LOG = "dockerd.log"
LOG_LINES_SHOWN = 15


@dataclass(frozen=True)
class Engine:
    """The dockerd that the lab started and that runs now."""

    process: ProcessId
    log: Path


def engine_version() -> str | None:
    """The version of the engine that `docker` reaches; None when none answers."""
    return answer(["docker", "version", "--format", "{{.Server.Version}}"]) or None


def own_engine(places: Places) -> Engine | None:
    """The lab's own dockerd; None when it does not run."""
    try:
        record = read_json(places.engine / RECORD)
    except (FileNotFoundError, ValueError):
        return None
    process = ProcessId(record["pid"], record["started_ticks"])
    return Engine(process, places.engine / LOG) if process.is_running() else None


def start_engine(places: Places) -> None:
    """Have an engine that `docker` reaches."""
    with step("Docker Engine") as current:
        if version := engine_version():
            return current.skip(f"version {version} answers")
        host = os.environ.get("DOCKER_HOST", f"unix://{SOCKET}")
        if host not in {f"unix://{SOCKET}", f"unix:///run/{SOCKET.name}"}:
            raise UserError(f"DOCKER_HOST={host} does not answer", "start that engine, or unset DOCKER_HOST")
        process = _start(places)
        current.outcome = f"version {engine_version()}, started as process {process.pid}, log {places.engine / LOG}"
    return None


def _start(places: Places) -> ProcessId:
    """A dockerd that says it is ready, in a session of its own, so that it outlives this program."""
    places.engine.mkdir(parents=True, exist_ok=True)
    notices = Path(f"/run/lem-lab-{os.getpid()}.notify")
    command = ["dockerd", f"--host=unix://{SOCKET}", f"--data-root={places.engine / 'data'}"]
    command += [f"--exec-root={EXEC_ROOT}", "--pidfile=/run/lem-lab.pid"]
    path = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
    log = places.engine / LOG
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, log.open("wb") as sink:
        notices.unlink(missing_ok=True)
        ready.bind(str(notices))
        try:
            child = subprocess.Popen(
                command,
                cwd="/",
                env={**os.environ, "PATH": path, "NOTIFY_SOCKET": str(notices)},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
            _await_ready(child, ready, log)
        except FileNotFoundError as error:
            raise UserError("dockerd: no such program", "apt-get install docker.io") from error
        finally:
            notices.unlink(missing_ok=True)
    process = identify(child.pid)
    if process is None:
        raise UserError(f"dockerd ended as soon as it was ready; {_tail(log)}")
    write_json(places.engine / RECORD, {"pid": process.pid, "started_ticks": process.started_ticks})
    # It is meant to go on when this program ends, so nobody waits for it here.
    child.returncode = 0
    return process


def _await_ready(child: subprocess.Popen[bytes], ready: socket.socket, log: Path) -> None:
    """Wait for READY=1 on the socket that sd_notify(3) describes, while the child lives."""
    ready.settimeout(0.5)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if (code := child.poll()) is not None:
            raise UserError(f"dockerd ended with exit code {code}; {_tail(log)}")
        try:
            if b"READY=1" in ready.recv(4096).splitlines():
                return
        except TimeoutError:
            continue
    child.terminate()
    raise UserError(f"dockerd was not ready within {START_TIMEOUT_S} s; {_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:]
    return "\n    ".join([f"the end of {log}:", *lines])


def remove_containers(places: Places) -> None:
    """Remove the lab's containers and the networks of their projects: all of them on the lab's own engine,
    those made from the lab's image on somebody else's.
    """
    with step("containers and networks") as current:
        if engine_version() is None:
            return current.skip("no engine answers")
        chosen = [] if own_engine(places) else ["--filter", f"label={LABEL}"]
        form = '{{.ID}} {{.Label "com.docker.compose.project"}}'
        lines = must(["docker", "ps", "-a", *chosen, "--format", form], timeout_s=DOCKER_TIMEOUT_S).splitlines()
        containers = [line.split()[0] for line in lines]
        projects = {words[1] for line in lines if len(words := line.split()) > 1}
        if containers:
            must(["docker", "rm", "--force", "--volumes", *containers], timeout_s=DOCKER_TIMEOUT_S)
        networks = _networks(places, projects)
        if networks:
            must(["docker", "network", "rm", *networks], timeout_s=DOCKER_TIMEOUT_S)
        current.outcome = f"removed {len(containers)} and {len(networks)}"
    return None


def _networks(places: Places, projects: set[str]) -> list[str]:
    form = '{{.ID}} {{.Name}} {{.Label "com.docker.compose.project"}}'
    lines = must(["docker", "network", "ls", "--format", form], timeout_s=DOCKER_TIMEOUT_S).splitlines()
    found = [(*line.split(), "")[:3] for line in lines]
    if own_engine(places):
        return [identity for identity, name, _ in found if name not in {"bridge", "host", "none"}]
    return [identity for identity, _, project in found if project in projects]


def stop_engine(places: Places) -> None:
    """End the dockerd that the lab started; nobody else's."""
    with step("dockerd") as current:
        engine = own_engine(places)
        if engine is None:
            return current.skip("none of the lab's runs")
        os.kill(engine.process.pid, signal.SIGTERM)
        if not wait_until_ended(engine.process.pid, STOP_TIMEOUT_S):
            # Its containerd and the shims are in the session that it was given.
            os.killpg(engine.process.pid, signal.SIGKILL)
            raise UserError(f"dockerd did not end within {STOP_TIMEOUT_S} s and was killed; {_tail(engine.log)}")
        (places.engine / RECORD).unlink(missing_ok=True)
        unmount_namespaces(EXEC_ROOT)
        _remove_unmounted(EXEC_ROOT)
        current.outcome = f"ended process {engine.process.pid}"
    return None


def remove_data(places: Places) -> None:
    """Remove the data root of the lab's own engine, which does not run any more."""
    with step("engine data") as current:
        if not places.engine.exists():
            return current.skip("none is there")
        if own_engine(places):
            raise UserError("the lab's dockerd still runs", "lab down stops it")
        _remove_unmounted(places.engine)
    return None


def unmount_namespaces(folder: Path) -> None:
    """Unmount the network namespaces there: dockerd leaves that of containers on the host's network."""
    for mount, kind in _mounts(folder):
        if kind == "nsfs":
            subprocess.run(["umount", mount], check=False)  # what is still mounted then is told


def _mounts(folder: Path) -> list[tuple[str, str]]:
    lines = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    return [(place, kind) for _, place, kind, *_ in lines if Path(place).is_relative_to(folder)]


def _remove_unmounted(folder: Path) -> None:
    if inside := _mounts(folder):
        raise UserError(f"still mounted: {inside[0][0]}", "end what uses it, then `umount` it")
    shutil.rmtree(folder, ignore_errors=True)
