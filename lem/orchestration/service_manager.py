"""Telling systemd how a campaign goes, by the protocol of sd_notify(3): one datagram with `NAME=value` lines."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import MutableMapping

__all__ = ["ServiceManager"]

_logger = logging.getLogger(__name__)

_VARIABLE = "NOTIFY_SOCKET"


class ServiceManager:
    """Whoever started this process and wants to hear of it; does nothing where nobody does."""

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._told: set[str] = set()
        self._status = ""

    @classmethod
    def of(cls, environ: MutableMapping[str, str] = os.environ) -> ServiceManager:
        """The manager that the environment names; the name is taken out, so that no child speaks for this process."""
        address = environ.pop(_VARIABLE, None)
        # A name in the abstract space begins with `@` there and with a zero byte in the kernel.
        return cls("\0" + address[1:] if address and address.startswith("@") else address)

    def ready(self) -> None:
        """Say, once, that preflight is over: what was started works."""
        self._once("READY=1")

    def stopping(self) -> None:
        """Say, once, that a stop was asked for; may be called by a signal's handler."""
        self._once("STOPPING=1")

    def status(self, text: str) -> None:
        """Say how far it is: the line that `systemctl status` shows."""
        line = " ".join(text.split())
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def _once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._send(message)

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)) as channel:
            try:
                channel.sendto(message.encode("utf-8", "backslashreplace"), self._address)
            except OSError as error:  # a campaign is worth more than being told of
                _logger.debug("the service manager was not told %s: %s", message, error)
