"""Messages to systemd by sd_notify(3), and to a webhook on a real HTTP server on the loopback address."""

import contextlib
import logging
import os
import socket

import pytest

from lem.orchestration.systemd import Notification, ServiceManager
from tests.webhook import SECRET, serving_webhook


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


def test_no_listener_is_no_error_and_children_do_not_inherit_the_address(tmp_path):
    environ = {"NOTIFY_SOCKET": str(tmp_path / "gone"), "PATH": "/bin"}
    ServiceManager.of(environ).ready()
    assert environ == {"PATH": "/bin"}
    ServiceManager.of(environ).ready()


@pytest.fixture
def lem_log(caplog):
    """caplog, also where lem's own logger does not hand on to the root."""
    logger = logging.getLogger("lem")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_payload_arrives_as_json(lem_log):
    with serving_webhook() as hook:
        Notification(hook.url, {"campaign": "a", "failed": 0}).settle(10)
        assert hook.next() == (f"/hook/{SECRET}", "application/json", {"campaign": "a", "failed": 0})
    assert lem_log.text == ""


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("{hook}", "500"),
        (f"http://127.0.0.1:{{unused}}/{SECRET}", "could not be reached"),
        (f"http://[{SECRET}", "could not be reached"),
    ],
)
def test_a_failure_is_a_warning_without_the_url(lem_log, url, text):
    with serving_webhook(status=500) as hook, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and nothing listens
        port = unused.getsockname()[1]
        Notification(url.replace("{hook}", hook.url).replace("{unused}", str(port)), {}).settle(10)
    assert text in lem_log.text
    assert SECRET not in lem_log.text


def test_silent_webhook_does_not_hold_the_campaign(lem_log):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        Notification(f"http://127.0.0.1:{listener.getsockname()[1]}/{SECRET}", {}).settle(0.01)
    assert "does not wait" in lem_log.text
    assert SECRET not in lem_log.text
