"""systemd hears of a campaign what sd_notify(3) says, and its absence hurts nobody."""

import contextlib
import os
import socket

import pytest

from lem.orchestration.systemd import ServiceManager


@pytest.fixture
def listener(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(10)
        yield channel, str(tmp_path / "notify")


def _heard(channel):
    """Everything said so far: what was sent to a local socket is there when `sendto` returns."""
    channel.setblocking(False)
    messages = []
    with contextlib.suppress(BlockingIOError):
        while True:
            messages.append(channel.recv(4096).decode())
    return messages


def test_readiness_is_said_once_and_progress_as_one_line(listener):
    channel, address = listener
    manager = ServiceManager.of({"NOTIFY_SOCKET": address})
    manager.ready()
    manager.status("[1/4] small ·\n measuring")
    manager.status("[1/4] small · measuring")
    manager.ready()
    manager.stopping()
    manager.stopping()
    assert _heard(channel) == ["READY=1", "STATUS=[1/4] small · measuring", "STOPPING=1"]


def test_an_abstract_address_is_reached():
    name = f"lem-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(f"\0{name}")
        ServiceManager.of({"NOTIFY_SOCKET": f"@{name}"}).ready()
        assert _heard(channel) == ["READY=1"]


def test_children_do_not_inherit_the_address(listener):
    environ = {"NOTIFY_SOCKET": listener[1], "PATH": "/bin"}
    ServiceManager.of(environ)
    assert environ == {"PATH": "/bin"}


def test_nobody_listening_is_no_error(tmp_path):
    ServiceManager.of({}).ready()
    ServiceManager.of({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()
