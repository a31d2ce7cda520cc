"""A server whose every byte a test decides: a script plays the answer to each request."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
LAST_CHUNK = b"0\r\n\r\n"
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close by a reset
_LONGEST_S = 20.0


def head(status: str = "200 OK", **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def token(text: str | None, ids: Sequence[int] | None = None, finish: str | None = None, **more: Any) -> bytes:
    """An event of the completions API."""
    choice = {"index": 0, "text": text, "finish_reason": finish, **({} if ids is None else {"token_ids": list(ids)})}
    return event({"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], **more})


def delta(finish: str | None = None, **content: Any) -> bytes:
    """An event of the chat API."""
    choice = {"index": 0, "delta": content, "finish_reason": finish}
    return event({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]})


def usage(output_tok: int, prompt_tok: int = 5, **more: Any) -> bytes:
    counts = {"prompt_tokens": prompt_tok, "completion_tokens": output_tok, "total_tokens": prompt_tok + output_tok}
    return event(
        {"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [], "usage": counts | more}
    )


class Talk:
    """A connection, as a script plays it."""

    def __init__(self, sock: socket.socket, request: bytes) -> None:
        self.sock = sock
        self.request = request
        self.is_closed = False

    def send(self, *parts: bytes) -> None:
        """Each part in a packet of its own."""
        for part in parts:
            self.sock.sendall(part)

    def answer(self, *events: bytes) -> None:
        """A whole chunked answer, an event in each chunk."""
        self.send(HEAD, *map(chunk, events), LAST_CHUNK)

    def close(self) -> None:
        self.is_closed = True
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.close()

    def half_close(self) -> None:
        """Send nothing more, but go on reading."""
        self.sock.shutdown(socket.SHUT_WR)
        self.hang()

    def hang(self) -> None:
        """Do nothing until the client is gone."""
        with contextlib.suppress(OSError):
            while self.sock.recv(65536):
                pass
        self.close()

    def is_idle(self, duration_s: float) -> bool:
        """Whether the client sends nothing, and stays, for so long."""
        return not select.select([self.sock], [], [], duration_s)[0]


Script = Callable[[Talk], None]


class ScriptedServer:
    """Plays one script for all requests, each connection in a thread."""

    def __init__(self, script: Script, tls: ssl.SSLContext | None = None) -> None:
        self.script = script
        self.requests: list[bytes] = []
        self.has_request = threading.Event()
        self.sockets: list[socket.socket] = []
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://127.0.0.1:{self.port}/v1/completions"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.settimeout(_LONGEST_S)
                self.sockets.append(sock)
                thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with sock:
                for request in requests_of(sock):
                    self.requests.append(request)
                    self.has_request.set()
                    talk = Talk(sock, request)
                    self.script(talk)
                    if talk.is_closed:
                        return

    @property
    def connections(self) -> int:
        return len(self.sockets)

    def hang_up(self) -> None:
        """Close every connection, as servers do with those that are idle for long."""
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """Take no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.stop()
        for thread in self._threads:
            thread.join(_LONGEST_S)


def requests_of(sock: socket.socket) -> Iterator[bytes]:
    """The whole requests that come on a connection."""
    came = b""
    while True:
        before, end, after = came.partition(b"\r\n\r\n")
        lengths = [int(line[15:]) for line in before.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        length = sum(lengths)
        if end and len(after) >= length:
            yield before + end + after[:length]
            came = after[length:]
            continue
        data = sock.recv(65536)
        if not data:
            return
        came += data
