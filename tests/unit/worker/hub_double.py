"""As much of a hub as `datasets` asks of one: a repository with one file, its commit, and 404 for the rest."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator

NAME = "owner/name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE = "train.jsonl"
CONTENT = b'{"prompt": "first of the hub"}\n{"prompt": "second of the hub"}\n'


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        entry = [{"type": "file", "path": FILE, "size": len(CONTENT), "oid": "a" * 40}]
        if path.startswith(f"/api/datasets/{NAME}/tree/{COMMIT}"):
            self._answer(200, json.dumps(entry).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/api/datasets/{NAME}"):
            facts = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": FILE}], "tags": [], "private": False}
            self._answer(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/datasets/{NAME}/resolve/") and path.endswith(FILE):
            self._answer(200, CONTENT, {"X-Repo-Commit": COMMIT, "ETag": f'"{"b" * 40}"'})
        else:
            code = "EntryNotFound" if NAME in path else "RepoNotFound"
            self._answer(404, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    do_HEAD = do_GET  # noqa: N815 (as http.server wants it)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The address of a running hub."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
