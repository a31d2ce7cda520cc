"""A webhook on the loopback address that keeps what it is told."""

from __future__ import annotations

import contextlib
import http.server
import json
import queue
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.processes import PATIENCE_S

SECRET = "canary-webhook-4711"


class Webhook:
    """A server that answers with a status; its URL holds the secret."""

    def __init__(self, status: int) -> None:
        self._received: queue.Queue[tuple[str, str, dict[str, Any]]] = queue.Queue()
        received = self._received

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.put((self.path, self.headers["Content-Type"], json.loads(body)))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                """Keep the test's output clean."""

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook/{SECRET}"

    def next(self) -> tuple[str, str, dict[str, Any]]:
        """Path, content type and content of the next message, once it is there."""
        return self._received.get(timeout=PATIENCE_S)

    @property
    def has_more(self) -> bool:
        return not self._received.empty()


@contextmanager
def serving_webhook(status: int = 204) -> Iterator[Webhook]:
    hook = Webhook(status)
    thread = threading.Thread(target=hook.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hook
    finally:
        hook.server.shutdown()
        hook.server.server_close()
        thread.join()


@contextmanager
def answering(*parts: bytes, is_endless: bool = False) -> Iterator[tuple[str, list[bytes]]]:
    """A server that sends these bytes to who connects, whatever is asked; its URL, and what it was asked.

    Args:
        is_endless: send the last part again and again, until the client goes.
    """
    asked: list[bytes] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(self.request.recv(65536))
            with contextlib.suppress(OSError):
                for part in parts:
                    self.request.sendall(part)
                while is_endless:
                    self.request.sendall(parts[-1])

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/hook/{SECRET}", asked
        server.shutdown()
        thread.join()
