"""The webhook against a real HTTP server on the loopback address."""

import logging
import socket

import pytest

from lem.orchestration.systemd import notify
from tests.webhook import SECRET, serving_webhook


@pytest.fixture
def lem_log(caplog):
    """caplog, also where lem's own logger does not hand on to the root."""
    logger = logging.getLogger("lem")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_payload_arrives_as_json(lem_log):
    with serving_webhook() as hook:
        notify(hook.url, {"campaign": "a", "failed": 0}).settle(10)
        assert hook.next() == (f"/hook/{SECRET}", "application/json", {"campaign": "a", "failed": 0})
    assert lem_log.text == ""


def test_error_answer_is_a_warning_without_the_url(lem_log):
    with serving_webhook(status=500) as hook:
        notify(hook.url, {}).settle(10)
    assert "500" in lem_log.text
    assert SECRET not in lem_log.text


def test_unreachable_webhook_is_a_warning_without_the_url(lem_log):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    notify(f"http://127.0.0.1:{port}/{SECRET}", {}).settle(10)
    assert "could not be reached" in lem_log.text
    assert SECRET not in lem_log.text


def test_malformed_url_is_a_warning_without_the_url(lem_log):
    notify(f"http://[{SECRET}", {}).settle(10)
    assert "could not be reached" in lem_log.text
    assert SECRET not in lem_log.text


def test_silent_webhook_does_not_hold_the_campaign(lem_log):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        notify(f"http://127.0.0.1:{listener.getsockname()[1]}/{SECRET}", {}).settle(0.01)
    assert "does not wait" in lem_log.text
    assert SECRET not in lem_log.text
