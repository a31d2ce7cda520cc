"""Bad weather on real containers: the failure is explained, the rest completes, and a resume completes the campaign."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from tests.campaign_rig import EIGHT, FOUR
from tests.container_rig import ContainerRig, compose_text, container_campaign, docker

pytestmark = [pytest.mark.needs("lab"), pytest.mark.timeout(600)]

EIGHT_ONLY = {"max_output_tokens": 8}
ENGINE_SOCKET = "/var/run/docker.sock"


@pytest.fixture
def rig(tmp_path):
    with ContainerRig(tmp_path).cleaned() as rig:
        yield rig


def once(rig, rule, name="once"):
    """The rule, for the first time alone; the file that says so lies where the container can write."""
    (rig.folder / "results").mkdir(exist_ok=True)
    return {**rule, "once": str(rig.folder / "results" / name)}


def resumes(rig):
    """A resume without any trouble completes the campaign, and leaves nothing."""
    ended = rig.run("--yes", "--resume")
    assert ended.code == 0, ended.err
    assert set(rig.statuses()) == {"completed"}
    assert rig.containers(is_all=True) == {}
    rig.assert_nothing_inside()


# --- what is missing before it begins


@pytest.mark.parametrize(
    ("spoil", "text", "remedy"),
    [
        (
            lambda rig: rig.write(compose_text(rig.folder, rig.name, image="no/such:image"), "docker-compose.yml"),
            "image no/such:image of service pytorch is not there",
            "docker pull no/such:image",
        ),
        (lambda rig: rig.write("services: [", "docker-compose.yml"), "reading", "mend the file"),
        (lambda rig: rig.write("services: {a: {imag: x}}", "docker-compose.yml"), "imag", "mend the file"),
        (lambda rig: rig.write("services: {web: {image: x}}", "docker-compose.yml"), "no service", "lem compose"),
    ],
    ids=["image missing", "compose file no YAML", "compose file invalid", "service missing"],
)
def test_what_is_missing_is_told_before_anything_runs(rig, spoil, text, remedy):
    spoil(rig)
    ended = rig.run("--yes")
    assert ended.code == 2
    assert text in ended.err
    assert remedy in ended.err
    assert rig.containers(is_all=True) == {}
    assert rig.results() == {}
    rig.write(compose_text(rig.folder, rig.name), "docker-compose.yml")
    assert rig.run("--yes").code == 0


def test_a_compose_file_that_is_not_there_is_told(rig):
    ended = rig.run("--yes", "--compose-file", "nowhere.yml")
    assert ended.code == 2
    assert "nowhere.yml: no such compose file" in ended.err
    assert "lem compose" in ended.err


def test_an_engine_that_is_not_there_is_told(rig):
    ended = rig.run("--yes", DOCKER_HOST=f"unix://{rig.folder}/no.sock")
    assert ended.code == 2
    assert "the Docker engine does not answer" in ended.err
    assert "systemctl start docker" in ended.err


# --- what happens to the engine and its container


class Relay:
    """A socket that leads to the Docker engine, until it is cut: then the engine is gone, as far as anybody can see."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ends: list[socket.socket] = []
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(64)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                one, _ = self._server.accept()
            except OSError:
                return
            two = socket.socket(socket.AF_UNIX)
            two.connect(ENGINE_SOCKET)
            self._ends += [one, two]
            for source, sink in ((one, two), (two, one)):
                threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        self._server.close()
        self.path.unlink(missing_ok=True)
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def test_an_engine_that_goes_away_stops_the_campaign_with_the_rest_pending(rig):
    relay = Relay(rig.folder / "d.sock")
    host = {"DOCKER_HOST": f"unix://{relay.path}"}
    running = rig.start("--yes", "--json", rules=[{"at": "generate", "do": "hang", "when": EIGHT_ONLY}], **host)
    running.wait_for_event("phase", phase="window", done=1)
    relay.cut()
    ended = running.wait()
    assert ended.code == 1
    assert "the Docker engine does not answer" in ended.err
    assert "--resume" in ended.err
    assert rig.statuses() == ["completed", "pending"]
    rig.assert_nothing_inside(), "the worker saw the end of its stdin"
    resumes(rig)


def test_a_container_killed_in_the_middle_costs_one_attempt(rig):
    running = rig.start("--yes", "--json", rules=[once(rig, {"at": "generate", "do": "hang", "when": EIGHT_ONLY})])
    running.wait_for_event("phase", phase="window", done=1)
    docker("kill", rig.containers()["pytorch"])
    ended = running.wait()
    assert ended.code == 0, ended.err
    assert rig.statuses() == ["completed", "completed"]
    retried = [event for event in ended.events() if event["event"] == "experiment_retried"]
    assert [event["config_name"] for event in retried] == [EIGHT]
    assert "its container is exited with code 137" in ended.err
    assert rig.containers(is_all=True) == {}


def test_a_container_paused_in_the_middle_is_replaced(rig):
    rig.write(container_campaign(silence_timeout_seconds=3))
    running = rig.start("--yes", "--json", rules=[once(rig, {"at": "generate", "do": "hang", "when": EIGHT_ONLY})])
    running.wait_for_event("phase", phase="window", done=1)
    docker("pause", rig.containers()["pytorch"])
    ended = running.wait()
    assert ended.code == 0, ended.err
    assert rig.statuses() == ["completed", "completed"]
    assert "no sign of progress for 3" in ended.out
    rig.assert_nothing_inside()


def test_a_container_out_of_memory_in_the_middle_is_told_as_that(tmp_path):
    with ContainerRig(tmp_path, limit="160m").cleaned() as rig:
        hoard = {"at": "generate", "do": "allocate", "bytes": 10**9, "when": EIGHT_ONLY}
        rig.write(container_campaign(outputs=(4, 8, 12)))
        ended = rig.run("--yes", "--json", rules=[once(rig, hoard)])
        assert ended.code == 0, ended.err
        (retried,) = [event for event in ended.events() if event["event"] == "experiment_retried"]
        assert "out of memory" in retried["reason"]
        assert "LEM_MEMORY_LIMIT" in retried["hint"]
        assert set(rig.statuses()) == {"completed"}


def test_a_container_out_of_memory_while_loading_is_not_tried_again(tmp_path):
    with ContainerRig(tmp_path, limit="160m").cleaned() as rig:
        rig.write(container_campaign(outputs=(4, 8)))
        hoard = {"at": "load", "do": "allocate", "bytes": 10**9}
        ended = rig.run("--yes", "--json", "--force-cold-start", rules=[{**hoard, "when": EIGHT_ONLY}])
        assert ended.code == 1
        assert not [event for event in ended.events() if event["event"] == "experiment_retried"]
        assert sorted(rig.statuses()) == ["completed", "failed"]
        resumes(rig)


@pytest.mark.parametrize(
    ("rule", "tries", "text"),
    [
        ({"at": "load", "do": "fail", "text": "no such model", "kind": "model", "permanent": True}, 1, "no such model"),
        ({"at": "load", "do": "crash", "text": "it broke"}, 2, "it broke"),
        ({"at": "generate", "do": "crash", "text": "it broke"}, 2, "it broke"),
        ({"at": "generate", "do": "signal", "number": 11}, 2, "SIGSEGV"),
        ({"at": "generate", "do": "hang"}, 2, "no sign of progress"),
        ({"at": "generate", "do": "hold_gil"}, 2, "no sign of progress"),
    ],
    ids=["permanent at load", "raises at load", "raises", "dies", "falls silent", "holds the interpreter"],
)
def test_an_engine_that_fails_costs_its_experiment_alone(rig, rule, tries, text):
    rig.write(container_campaign(outputs=(4, 8, 12), silence_timeout_seconds=3, reuse="none"))
    ended = rig.run("--yes", "--json", rules=[{**rule, "when": EIGHT_ONLY}])
    assert ended.code == 1, ended.err
    assert rig.statuses() == ["completed", "failed", "completed"]
    failed = rig.manifest().experiments[1]
    assert len(failed.attempts) == tries
    assert text in failed.error
    assert (rig.folder / failed.attempts[-1].log_path).is_file()
    assert rig.containers(is_all=True) == {}
    resumes(rig)


def test_an_engine_that_prints_garbage_disturbs_nothing(rig):
    garbage = '\\x00\\xff{"type":"result"}\\n'
    rules = [{"at": "generate", "do": "print", "text": garbage}]
    ended = rig.run("--yes", "--json", rules=rules)
    assert ended.code == 0, ended.err
    assert rig.statuses() == ["completed", "completed"]


def test_a_worker_that_talks_nonsense_costs_one_attempt(rig):
    # What stands in the way of the program itself, not of its engine: an interpreter that prints at its start.
    noisy = rig.folder / "noisy"
    noisy.mkdir()
    (noisy / "sitecustomize.py").write_text("print('hello, world', flush=True)\n")
    text = compose_text(rig.folder, rig.name).replace(str(rig.folder / "distributions"), str(noisy))
    rig.write(text.replace("/doubles:/distributions", "/distributions"), "docker-compose.yml")
    ended = rig.run("--yes")
    assert ended.code == 2
    assert "hello, world" in ended.err
    assert rig.containers(is_all=True) == {}
    rig.write(compose_text(rig.folder, rig.name), "docker-compose.yml")
    assert rig.run("--yes").code == 0


@pytest.mark.parametrize("phase", ["load", "window"])
def test_a_killed_host_leaves_nothing_inside(rig, phase):
    at = {"load": "load", "window": "generate"}[phase]
    rules = [{"at": at, "do": "spawn", "own_session": True}, {"at": at, "do": "ignore_term"}, {"at": at, "do": "hang"}]
    running = rig.start("--yes", "--json", rules=rules)
    running.wait_for_event("phase", phase=phase)
    running.send(signal.SIGKILL)
    running.wait()
    rig.assert_nothing_inside(10.0)
    rig.assert_no_process_left()
    resumes(rig)


def test_ctrl_c_stops_inside_and_writes_everything(rig):
    running = rig.start("--yes", "--json", rules=[{"at": "generate", "do": "hang", "when": EIGHT_ONLY}])
    running.wait_for_event("phase", phase="window", done=1)
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130
    assert "go on with:" in ended.err
    assert rig.statuses() == ["completed", "pending"]
    rig.assert_nothing_inside(0.5)
    assert rig.containers(is_all=True) == {}
    resumes(rig)


def test_a_second_ctrl_c_kills_at_once(rig):
    rules = [{"at": "generate", "do": "ignore_term"}, {"at": "generate", "do": "hold_gil"}]
    running = rig.start("--yes", "--json", rules=rules)
    running.wait_for_event("phase", phase="window")
    running.send(signal.SIGINT)
    running.wait_for_text("a second signal")
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130
    rig.assert_nothing_inside(10.0)
    assert rig.containers(is_all=True) == {}
    resumes(rig)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own that is nearly full."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a disk can be mounted by root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_results_disk_stops_the_campaign_with_the_rest_pending(rig, small_disk):
    fill = {"at": "generate", "do": "shell", "command": f"dd if=/dev/zero of='{small_disk}/results/filler' bs=4k 2>&- || true"}
    ended = rig.run("--yes", "--results-dir", str(small_disk / "results"), rules=[{**fill, "when": EIGHT_ONLY}])
    assert ended.code == 1
    assert "no space" in ended.err.lower()
    assert rig.statuses() == ["completed", "pending"]
    assert rig.containers(is_all=True) == {}
    (small_disk / "results" / "filler").unlink()
    again = rig.run("--yes", "--resume", "--results-dir", str(small_disk / "results"))
    assert again.code == 0, again.err
    assert rig.statuses() == ["completed", "completed"]


def test_restarts_that_are_used_up_stop_the_campaign_with_the_rest_pending(rig):
    rig.write(container_campaign(outputs=(4, 8, 12), more="health_check: {max_restarts: 1}\n"))
    hang = {"at": "generate", "do": "hang"}
    rules = [once(rig, {**hang, "when": {"max_output_tokens": value}}, str(value)) for value in (4, 8)]
    running = rig.start("--yes", "--json", rules=rules)
    for name in (FOUR, EIGHT):
        started = running.wait_for_event("experiment_started", config_name=name)
        running.wait_for_event("phase", phase="window", exp_id=started["exp_id"])
        docker("kill", rig.containers()["pytorch"])
    ended = running.wait()
    assert ended.code == 1
    assert "does not come back after 1 restarts" in ended.err
    assert rig.statuses() == ["completed", "pending", "pending"]
    shutil.rmtree(rig.folder / "results" / "8", ignore_errors=True)
    resumes(rig)
