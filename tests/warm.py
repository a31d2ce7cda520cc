"""Commands of lem as forks of a process that has imported it (tests/doubles/warm_start.py): a tenth of the CPU time.

`tests/integration/test_faults.py` compares such a campaign with one whose processes are Pythons of their own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.doubles import warm_start
from tests.processes import VARIABLE, Marker

ROOT = Path(__file__).resolve().parents[1]
_LOADER = ("LD_PRELOAD", "LD_LIBRARY_PATH")  # read once, when a program is loaded
_START_TIMEOUT_S = 120

_STARTING = threading.Lock()


class WarmProcess:
    """A running command of lem, with the members of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        environ: Mapping[str, str],
        outputs: Sequence[Path] = (),
        *,
        terminal: str | None = None,
        program: Path = ROOT,
        doubles: Path | None = None,
        is_as_others: bool = False,
    ) -> None:
        """Start `lem WORDS` of the program in that folder; with a `terminal`, in the foreground of it.

        `outputs` are opened to append: stdout, stderr.
        """
        loader = tuple((name, environ[name]) for name in _LOADER if name in environ)
        with _STARTING:
            address, _ = _server(program, doubles or program / "tests" / "doubles", loader)
        request = {
            "words": words,
            "folder": str(folder),
            "environ": dict(environ),
            "outputs": [str(path) for path in outputs],
            "terminal": terminal,
            "is_as_others": is_as_others,
        }
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(address))
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self._received = b""
        self.returncode: int | None = None
        self.pid = int(self._line(_START_TIMEOUT_S))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = int(self._line(timeout))
            self._socket.close()
        return self.returncode

    def send_signal(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _line(self, timeout_s: float | None) -> bytes:
        self._socket.settimeout(timeout_s)
        while b"\n" not in self._received:
            try:
                received = self._socket.recv(100)
            except (TimeoutError, BlockingIOError) as error:
                raise subprocess.TimeoutExpired("lem", timeout_s or 0.0) from error
            if not received:
                raise OSError("the server that starts lem has ended")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line


@functools.cache
def _server(program: Path, doubles: Path, loader: tuple[tuple[str, str], ...]) -> tuple[Path, subprocess.Popen[bytes]]:
    """The address of a server for this program, with these variables of the loader; it ends with this process."""
    address = Path(tempfile.mkdtemp(prefix="lem-warm-"), "socket")
    path = os.pathsep.join([str(program), str(doubles)])
    placeholder = "0" * len(Marker().value)
    environ = {**os.environ, **dict(loader), "PYTHONPATH": path, warm_start.VARIABLE: str(address)}
    server = subprocess.Popen(
        [sys.executable, "-m", "warm_start"],
        cwd=program,
        env={**environ, VARIABLE: placeholder},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    if server.stdout is None or server.stdout.readline() != b"listening\n":
        raise OSError("the server that starts lem does not start")
    return address, server
