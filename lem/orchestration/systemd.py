"""Messages to systemd, which shows the state of a service, and to a webhook."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, MutableMapping
from typing import Any

_logger = logging.getLogger(__name__)

_VARIABLE = "NOTIFY_SOCKET"  # sd_notify(3)

_TIMEOUT_S = 10.0


class ServiceManager:
    """The service manager that started this process; without one, messages go nowhere."""

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._sent: set[str] = set()
        self._status = ""

    @classmethod
    def of(cls, environ: MutableMapping[str, str] = os.environ) -> ServiceManager:
        """The manager that the environment names; the name is removed, so that no child speaks for this process."""
        address = environ.pop(_VARIABLE, None)
        # A name in the abstract space begins with `@` there and with a zero byte in the kernel.
        return cls("\0" + address[1:] if address and address.startswith("@") else address)

    def ready(self) -> None:
        """Report, once, that preflight is over."""
        self._once("READY=1")

    def stopping(self) -> None:
        """Report, once, that a stop was requested; may be called by a signal handler."""
        self._once("STOPPING=1")

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows."""
        line = " ".join(text.split())
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def _once(self, message: str) -> None:
        if message not in self._sent:
            self._sent.add(message)
            self._send(message)

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)) as channel:
            try:
                channel.sendto(message.encode("utf-8", "backslashreplace"), self._address)
            except OSError as error:  # a campaign must not fail because of it
                _logger.debug("cannot send %s to the service manager: %s", message, error)


class Notification:
    """A message that is being sent."""

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def settle(self, seconds: float) -> None:
        """Give a message that is still being sent a last moment before the program ends."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            _logger.warning("the webhook has not answered yet; the campaign does not wait for it")


def notify(url: str, payload: Mapping[str, Any]) -> Notification:
    """Send a JSON POST on a thread of its own; a failure is a warning, and the URL, a secret, is never logged."""
    thread = threading.Thread(target=_post, args=(url, dict(payload)), name="webhook", daemon=True)
    thread.start()
    return Notification(thread)


def _post(url: str, payload: dict[str, Any]) -> None:
    data = json.dumps(payload, ensure_ascii=False).encode("utf-8")
    try:
        request = urllib.request.Request(  # noqa: S310 - the scheme is checked with the configuration
            url,
            data=data,
            headers={"Content-Type": "application/json", "User-Agent": "lem"},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
            answer.read(1)
    except urllib.error.HTTPError as error:
        _logger.warning("the webhook answered %s", error.code)
    except (OSError, ValueError) as error:
        # The text of these errors can hold the URL, so only the kind is logged.
        _logger.warning("the webhook could not be reached (%s)", type(error).__name__)
