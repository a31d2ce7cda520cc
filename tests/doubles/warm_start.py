"""Starts lem without importing it anew, which is nine tenths of the CPU time of a small campaign.

`python -m warm_start`, with sitecustomize on PYTHONPATH, imports lem once, listens at the Unix socket LEMTEST_WARM, in
a folder of its own, and forks for each command of lem that a client sends; it ends with its stdin. A process so made
starts its workers as forks of itself: `subprocess` still makes the child, with its pid, session, descriptors, folder
and environment, and only the last step, the exec of Python, is left out. Everything that a new interpreter would have
of its own is made anew: arguments, streams, signals, log handlers. Command lines in /proc remain those of the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import io
import json
import logging
import os
import pkgutil
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import traceback
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

VARIABLE = "LEMTEST_WARM"
MARK_VARIABLE = "LEMTEST_MARKER"  # of the server: as long as each mark that takes its place
_LAUNCH = os.path.join("lem", "base", "launch.py")  # noqa: PTH118 - the end of an argument
_FIRST_FREE = 100  # above the descriptors that are replaced

# linux/capability.h, linux/prctl.h
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC = (1, 2)  # DAC_OVERRIDE, DAC_READ_SEARCH
_PR_CAPBSET_DROP = 24


def install() -> None:
    """Start workers as forks from here on; Python 3.10 cannot, and starts them as ever."""
    plain = getattr(subprocess, "_fork_exec", None)
    if plain is None:
        return

    def fork_exec(*arguments: Any) -> int:
        words = [os.fsdecode(word) for word in arguments[0]]
        if words[0] != sys.executable or not words[2:] or not words[2].endswith(_LAUNCH):
            return int(plain(*arguments))
        return os.fork() or _become_child(words, arguments)

    subprocess._fork_exec = fork_exec  # type: ignore[attr-defined]


def _become_child(words: list[str], arguments: Sequence[Any]) -> NoReturn:
    """Be what `_posixsubprocess.fork_exec` would have started with these arguments."""
    keep, folder, environ = set(arguments[3]) - {arguments[13]}, arguments[4], arguments[5]
    if arguments[15]:  # start_new_session
        os.setsid()
    _take_descriptors((arguments[6], arguments[9], arguments[11]), keep)
    if folder is not None:
        os.chdir(folder)
    if environ is not None:
        pairs = (item.partition(b"=") for item in environ)
        _set_environ({os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs})
    _run_lem(words)


def _take_descriptors(standard: Sequence[int], keep: Collection[int]) -> None:
    """Have these (-1: unchanged) as 0, 1 and 2, and beside them only those to keep."""
    copies = [
        fcntl.fcntl(item if item >= 0 else place, fcntl.F_DUPFD, _FIRST_FREE) for place, item in enumerate(standard)
    ]
    for place, copy in enumerate(copies):
        os.dup2(copy, place)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - quick, and names are numbers
        if int(name) > 2 and int(name) not in keep:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(int(name))
    for descriptor in keep:
        os.set_inheritable(descriptor, True)


def _set_environ(environ: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ)


def _run_lem(words: list[str]) -> NoReturn:
    """`python -u launch.py …` or `python -m lem …` in this process, to its end."""
    _forget()
    program = importlib.import_module("lem").__path__[0]
    sys.orig_argv, sys.argv = words, [os.path.join(program, "__main__.py"), *words[3:]]  # noqa: PTH118 - a text
    importlib.import_module("fault_injector").install()
    code: object = 1
    try:
        runpy.run_module("lem", run_name="__main__")
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001 - as at the end of any Python
        traceback.print_exc()
    finally:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _forget() -> None:
    """Undo what the process before the fork had set for itself."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    logging.getLogger("lem").handlers.clear()
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _stream(1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(2)  # type: ignore[misc]


def _stream(descriptor: int) -> io.TextIOWrapper:
    raw = open(descriptor, "wb", buffering=0, closefd=False)  # noqa: SIM115 - to the end of the process
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)


def main() -> None:
    """Serve until stdin ends."""
    import lem

    for module in pkgutil.walk_packages(lem.__path__, "lem."):
        # Engines belong to libraries that are not there; a main module is run, not imported.
        if not module.name.startswith("lem.engines.") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    mark_at = libc.getenv(MARK_VARIABLE.encode())
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.environ[VARIABLE])
    listener.listen()
    print("listening", flush=True)
    while True:
        ready, _, _ = select.select([listener.fileno(), 0], [], [])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if 0 in ready:
            shutil.rmtree(os.path.dirname(os.environ[VARIABLE]))  # noqa: PTH120 - a text
            return
        client, _ = listener.accept()
        with client:
            if os.fork() == 0:
                try:
                    _answer(client, mark_at)
                finally:
                    os._exit(0)


def _answer(client: socket.socket, mark_at: int) -> None:
    """Start one command in a process of its own, and tell its pid and, once it has ended, its exit code."""
    with client.makefile("rw", encoding="utf-8") as file:
        request = json.loads(file.readline())
        is_terminal = request["terminal"] is not None
        if is_terminal:
            standard = [os.open(request["terminal"], os.O_RDWR | os.O_NOCTTY)] * 3
        else:
            outputs = [os.open(path, os.O_WRONLY | os.O_APPEND) for path in request["outputs"]]
            standard = [os.open(os.devnull, os.O_RDONLY), *outputs]
        pid = os.fork()
        if pid == 0:
            if is_terminal:
                os.setsid()
                fcntl.ioctl(standard[0], termios.TIOCSCTTY, 0)
            _take_descriptors(standard, ())
            os.chdir(request["folder"])
            _set_environ(request["environ"])
            # /proc shows the environment as it was at the start; the mark is sought there.
            ctypes.memmove(mark_at, os.environb[MARK_VARIABLE.encode()], len(os.environ[MARK_VARIABLE]))
            if "LD_PRELOAD" in os.environ:
                ctypes.CDLL(os.environ["LD_PRELOAD"]).map_offset()
            if request["is_as_others"]:
                _give_up_writing_everywhere()
            _run_lem([sys.executable, "-m", "lem", *request["words"]])
        for descriptor in set(standard):
            os.close(descriptor)
        file.write(f"{pid}\n")
        file.flush()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        file.write(f"{code}\n")


def _give_up_writing_everywhere() -> None:
    """Be bound by permissions like every other user, as is whatever this process starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then those above 31
    calls = [libc.prctl(_PR_CAPBSET_DROP, item, 0, 0, 0) for item in _CAP_DAC]
    calls.append(libc.capget(header, sets))
    for place in range(3):
        sets[place] &= ~sum(1 << item for item in _CAP_DAC)
    calls.append(libc.capset(header, sets))
    if any(calls):
        raise OSError(ctypes.get_errno(), "rights cannot be given up")


if __name__ == "__main__":
    main()
