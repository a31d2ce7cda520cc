"""Messages to systemd by sd_notify(3), and to a webhook on a real HTTP server on the loopback address."""

import contextlib
import logging
import os
import socket

import pytest

from lem.orchestration.systemd import Notification, ServiceManager
from tests.webhook import SECRET, answering, serving_webhook


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
        (f"http://user:{SECRET}@127.0.0.1:{{unused}}/", "could not be reached"),
        (f"http://127.0.0.1:{SECRET}/", "could not be reached"),
        (f"http://127.0.0.1:{{unused}}/a b/{SECRET}", "could not be reached"),
        (f"http://{SECRET}..invalid/", "could not be reached"),
        (f"https://127.0.0.1:{{unused}}/ü{SECRET}", "could not be reached"),
    ],
)
def test_a_failure_is_a_warning_without_the_url(lem_log, url, text):
    with serving_webhook(status=500) as hook, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and nothing listens
        port = unused.getsockname()[1]
        Notification(url.replace("{hook}", hook.url).replace("{unused}", str(port)), {}).settle(10)
    assert text in lem_log.text
    assert SECRET not in lem_log.text


OK = b"HTTP/1.1 204 No Content\r\n\r\n"


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("answer", "is_endless", "text"),
    [
        ([b"SSH-2.0-OpenSSH_9.2\r\n"], False, "could not be reached (BadStatusLine)"),
        ([b"\xff\xfe\x00" * 10], False, "could not be reached"),
        ([b""], False, "could not be reached (RemoteDisconnected)"),
        ([b"HTTP/1.1 99999 Secret\r\n\r\n"], False, "could not be reached (BadStatusLine)"),
        ([b"HTTP/1.1 200 OK\r\n", b"A: 1\r\n" * 200, b"\r\n"], False, "could not be reached (HTTPException)"),
        ([b"HTTP/1.1 200 OK\r\n", b"A: " + b"1" * 70_000], False, "could not be reached (LineTooLong)"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: nonsense\r\n\r\n", b"body" * 1000], True, ""),
        ([b"HTTP/1.1 100 Continue\r\n\r\n"], True, "could not be reached"),
        ([b"HTTP/1.1 404 Not Found\r\n\r\n"], False, "the webhook answered 404"),
        ([OK], False, ""),
    ],
)
def test_whatever_a_server_answers_is_at_most_a_warning(lem_log, answer, is_endless, text):
    with answering(*answer, is_endless=is_endless) as (url, asked):
        notification = Notification(url, {}, timeout_s=0.3 if is_endless else 10)
        notification.settle(20)
        assert not notification.is_alive()
    assert asked[0].startswith(f"POST /hook/{SECRET} HTTP/1.1\r\n".encode())
    assert text in lem_log.text
    assert bool(text) == bool(lem_log.text)
    assert SECRET not in lem_log.text


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(lem_log, status):
    with serving_webhook() as elsewhere:
        answer = f"HTTP/1.1 {status} Moved\r\nLocation: {elsewhere.url}\r\nContent-Length: 0\r\n\r\n".encode()
        with answering(answer) as (url, _):
            Notification(url, {}).settle(10)
        assert not elsewhere.has_more
    assert f"answered {status}; redirects are not followed" in lem_log.text
    assert SECRET not in lem_log.text


def test_the_proxy_of_the_environment_is_used(lem_log, monkeypatch):
    with answering(OK) as (url, asked):
        monkeypatch.setenv("http_proxy", url.replace("//", "//me:a%20b@").partition("/hook")[0])
        monkeypatch.setenv("no_proxy", "")
        Notification("http://hooks.invalid/a?b=c", {}).settle(10)
    assert asked[0].startswith(b"POST http://hooks.invalid/a?b=c HTTP/1.1\r\nHost: hooks.invalid\r\n")
    assert b"Proxy-Authorization: Basic bWU6YSBi\r\n" in asked[0]
    assert lem_log.text == ""


def test_silent_webhook_does_not_hold_the_campaign(lem_log):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        Notification(f"http://127.0.0.1:{listener.getsockname()[1]}/{SECRET}", {}).settle(0.01)
    assert "does not wait" in lem_log.text
    assert SECRET not in lem_log.text
