"""A Docker engine that can be lost: a socket of our own before the real one."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

from tests.lab.places import SOCKET

_CHUNK_B = 65536


class EngineProxy:
    """Passes on what comes to `path` until it is lost, as a daemon is that dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self._is_lost = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def host(self) -> str:
        return f"unix://{self.path}"

    def lose(self) -> None:
        with self._lock:
            self._is_lost = True
            self.path.unlink(missing_ok=True)
            for end in (self._listener, *self._ends):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            engine = socket.socket(socket.AF_UNIX)
            engine.connect(str(SOCKET))
            with self._lock:
                self._ends += [client, engine]
                if self._is_lost:
                    client.close()
                    engine.close()
                    return
            for source, target in ((client, engine), (engine, client)):
                threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK_B):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
