"""Secrets from systemd, messages to it, which shows the state of a service, and to a webhook."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lem.base import durable
from lem.base.durable import reason_of
from lem.base.errors import UserError
from lem.base.log import escaped
from lem.base.variables import TOKEN_VARIABLE

if TYPE_CHECKING:
    import http.client

_logger = logging.getLogger(__name__)

_VARIABLE = "NOTIFY_SOCKET"  # sd_notify(3)
_CREDENTIALS_VARIABLE = "CREDENTIALS_DIRECTORY"  # systemd.exec(5), LoadCredential=


def find_secrets(environ: Mapping[str, str], names: Iterable[str] = (TOKEN_VARIABLE,)) -> dict[str, str]:
    """The secrets that are set, by name; the environment wins over a credential of systemd."""
    folder = environ.get(_CREDENTIALS_VARIABLE)
    found = {name: environ.get(name, "") or _credential(folder, name) for name in names}
    return {name: value for name, value in found.items() if value}


def _credential(folder: str | None, name: str) -> str:
    path = Path(folder or "", name)
    try:
        return durable.read_bytes(path).decode("utf-8").strip() if folder else ""
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"credential {path}: {reason}") from error


class ServiceManager:
    def __init__(self, address: str | None) -> None:
        self._address = address
        self._last = {"STATUS": ""}  # what was sent last

    @classmethod
    def of(cls, environ: MutableMapping[str, str] = os.environ) -> ServiceManager:
        address = environ.pop(_VARIABLE, None)
        # A name in the abstract space begins with `@` there and with a zero byte in the kernel.
        return cls("\0" + address[1:] if address and address.startswith("@") else address)

    def ready(self) -> None:
        self._send("READY", "1")

    def stopping(self) -> None:
        """Report, once, that a stop was requested; may be called by a signal handler."""
        self._send("STOPPING", "1")

    def status(self, text: str) -> None:
        self._send("STATUS", escaped(" ".join(text.split())))

    def _send(self, name: str, value: str) -> None:
        if self._last.get(name) == value:
            return
        self._last[name] = value
        if self._address is None:
            return
        message = f"{name}={value}"
        try:
            with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)) as channel:
                channel.sendto(message.encode("utf-8", "backslashreplace"), self._address)
        except OSError as error:  # a campaign must not fail because of it
            _logger.debug("cannot send %s to the service manager: %s", message, error)


class Notification(threading.Thread):
    def __init__(self, url: str, payload: Mapping[str, Any], timeout_s: float = 10.0) -> None:
        super().__init__(name="webhook", daemon=True)
        self._url = url
        self._timeout_s = timeout_s
        self._payload = payload
        self.start()

    def settle(self, seconds: float) -> None:
        self.join(seconds)
        if self.is_alive():
            _logger.warning("the webhook has not answered yet; the campaign does not wait for it")

    def run(self) -> None:
        # The text of an error can hold the URL, so only the kind is logged.
        try:
            data = json.dumps(self._payload, ensure_ascii=False).encode("utf-8", "backslashreplace")
            status = _post(self._url, data, self._timeout_s)
        except Exception as error:  # noqa: BLE001 - a thread would print a traceback with the URL
            _logger.warning("the webhook could not be reached (%s)", type(error).__name__)
            return
        if not 200 <= status < 300:
            is_moved = 300 <= status < 400
            _logger.warning("the webhook answered %d%s", status, "; redirects are not followed" * is_moved)


def _post(url: str, data: bytes, timeout_s: float) -> int:
    """The status that a server answers; the rest of the answer is not read, and redirects are not followed."""
    headers = {"Content-Type": "application/json", "User-Agent": "lem"}
    connection, path = _connection_for(url, headers, timeout_s)
    connection.connect()
    # The timeout above is that of one read; an answer may need any number of them.
    timer = threading.Timer(timeout_s, _shut, (connection,))
    timer.daemon = True
    timer.start()
    try:
        connection.request("POST", path, data, headers)
        return connection.getresponse().status
    finally:
        timer.cancel()
        connection.close()


def _connection_for(url: str, headers: dict[str, str], timeout_s: float) -> tuple[http.client.HTTPConnection, str]:
    # OpenSSL takes 6 MiB, and few campaigns have a webhook.
    import http.client
    import urllib.parse
    import urllib.request

    target = urllib.parse.urlsplit(url)
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    is_secure = target.scheme == "https"
    kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
    proxy = None if urllib.request.proxy_bypass(target.netloc) else urllib.request.getproxies().get(target.scheme)
    if proxy is None:
        return kind(target.hostname or "", target.port, timeout=timeout_s), path
    through = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    login = {}
    if through.username:
        words = ":".join(urllib.parse.unquote(word or "") for word in (through.username, through.password))
        login = {"Proxy-Authorization": f"Basic {base64.b64encode(words.encode()).decode()}"}
    connection = kind(through.hostname or "", through.port, timeout=timeout_s)
    if is_secure:
        connection.set_tunnel(target.hostname or "", target.port, login)
        return connection, path
    headers |= login
    return connection, f"{target.scheme}://{target.netloc}{path}"


def _shut(connection: http.client.HTTPConnection) -> None:
    with contextlib.suppress(OSError, AttributeError):  # it has ended
        connection.sock.shutdown(socket.SHUT_RDWR)
