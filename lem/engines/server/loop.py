"""The process of the load client: one thread, one epoll loop over plain sockets.

Within the window it stamps and stores bytes, and nothing else; answers are read afterwards. The time of bytes is the
kernel's where it gives one (SO_TIMESTAMPNS, socket(7)): however late they are read, TTFT and ICL are right, as long as
no two events of a stream wait for the same read.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import resource
import select
import socket
import sys
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from lem.base import process
from lem.base.codec import decode, unpack
from lem.base.errors import EngineError
from lem.base.reasons import Reason
from lem.base.units import NS_PER_MS, NS_PER_S
from lem.engines.server.client import SALT, Call, Target
from lem.engines.server.outcome import Exchange, Load, Usage, conclude, realtime_ahead_ns
from lem.engines.server.stream import MOST_ANSWER_B, BrokenAnswer
from lem.engines.traffic import TrafficPlan, WindowRule

_SO_TIMESTAMPNS = 35  # asm-generic/socket.h
# Bytes, and a timespec. Larger buffers would be mapped anew for each read: see MALLOC_MMAP_THRESHOLD_ in client.py.
_READ_B, _AUX_B = 8_192, socket.CMSG_SPACE(16)
_NO_STAMP = bytes(16)
_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_MOST_EVENTS = 1024
# Every chunked answer ends with the first. When [DONE] is before it, there is no need to follow the framing.
_END = b"\r\n\r\n"
_DONE_ENDS = (b"data: [DONE]\n\n\r\n0\r\n\r\n", b"data: [DONE]\r\n\r\n\r\n0\r\n\r\n")
_SWEEP_NS = NS_PER_S // 5
_REPORT_NS = NS_PER_S
_PRECISE_NS = 5 * NS_PER_MS  # epoll rounds its timeout to milliseconds, select does not
# At a high rate of tokens, a short rest lets many come that are read at the cost of one wake. Their stamps are the
# kernel's, so none is read too late, as long as no stream has two tokens within a rest.
_REST_NS = NS_PER_MS
_REST_LEAST = 4  # reads within a rest
_REST_MOST = 1 / 20  # tokens of one stream within a rest
_SPARE_LINKS = 4
_MOST_REFUSED = 64  # connections in a row
_WARM = -1  # the call of a request that only warms a connection
_OPEN_LINKS = 32  # at the start of an open loop
_STDIN = 0
_SALT = SALT.encode()


class _Link:
    """A connection."""

    __slots__ = ("exchange", "has_waited", "opened_ns", "receive", "sock", "state", "uses")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.receive: Callable[..., Any] = sock.recvmsg
        self.state = "connecting"  # then `handshake` (TLS), and `open`
        self.exchange: Exchange | None = None
        self.uses = 0
        self.has_waited = False  # without a request, so that the server may have given it up
        self.opened_ns = time.monotonic_ns()


class Loop:
    """Sends requests to one target; `tell` takes messages for the holder."""

    def __init__(self, target: Target, tell: Callable[[str, Any], None]) -> None:
        self._target = target
        self._tell = tell
        url = urllib.parse.urlsplit(target.url)
        self._host, self._netloc = url.hostname or "", url.netloc.rpartition("@")[2]
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._path = urllib.parse.urlunsplit(("", "", url.path or "/", url.query, ""))
        self._tls = _tls_context() if url.scheme == "https" else None
        self._address: tuple[int, Any] | None = None  # family and address, once there was a connection
        self._epoll = select.epoll()
        self._epoll.register(_STDIN, _IN)
        self._links: dict[int, _Link] = {}
        self._idle: list[_Link] = []
        self._waiting: deque[Exchange] = deque()
        self._refused = 0  # connections in a row
        self._error = os.strerror(errno.ETIMEDOUT)  # of the last one
        self._begin((), None)

    def _begin(self, calls: Sequence[Call], plan: TrafficPlan | None) -> None:
        self._requests = [self._request("POST", self._path, call.body.encode()) for call in calls]
        self._plan = plan
        self._is_open = plan is not None and plan.is_open
        self._due = len(calls)  # of a closed set: the requests of its passes so far
        self._exchanges: list[Exchange] = []
        self._in_flight = self._finished = self._connections = self._reconnects = 0
        self._next_ns = self._reported_ns = self._sweep_ns = self._swept_ns = self._reads = 0
        self._rests = False
        self._rule: WindowRule | None = None
        self._opening: Usage | None = None
        self._closing: Usage | None = None

    def run(self, calls: Sequence[Call], plan: TrafficPlan | None, concurrency: int, least_s: float = 0.0) -> None:
        """One load, to its end; raises EngineError."""
        self._begin(calls, plan)
        self._prepare(_OPEN_LINKS if self._is_open else concurrency)
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            for kind, value in conclude(self._measure(concurrency, least_s), calls, self._target):
                self._tell(kind, value)
        except EngineError:
            for link in list(self._links.values()):
                self._drop(link)
            self._waiting.clear()
            raise
        finally:
            gc.enable()
            gc.unfreeze()

    def _measure(self, concurrency: int, least_s: float) -> Load:
        begun, ahead_ns, plan = Usage(), realtime_ahead_ns(), self._plan
        rule = self._rule = None if plan is None else WindowRule(plan, len(self._requests), begun.at_ns)
        for _ in range(0 if self._is_open else concurrency):
            self._go_on(time.monotonic_ns())
        until_ns = begun.at_ns + round(least_s * NS_PER_S)
        while self._in_flight or (
            self._repeats(concurrency, until_ns) if rule is None else not rule.is_over(time.monotonic_ns())
        ):
            self._step()
        ended, last_ns = Usage(), max((it.last_ns for it in self._exchanges), default=begun.at_ns)
        return Load(
            exchanges=self._exchanges,
            opened_ns=begun.at_ns if rule is None else rule.opened_ns or begun.at_ns,
            closed_ns=last_ns if rule is None else rule.closed_ns or last_ns,
            has_turned_over=rule is None or rule.has_turned_over,
            ahead_ns=(ahead_ns, realtime_ahead_ns()),
            used=(self._opening or begun, self._closing or ended),
            concurrency=None if self._is_open or plan is None else concurrency,
            connections=self._connections,
            reconnects=self._reconnects,
        )

    # Requests

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._netloc}", "Accept: text/event-stream"]
        lines += [] if self._target.keeps_alive else ["Connection: close"]
        lines += [
            "Accept-Encoding: identity",
            *(f"{name}: {value.strip()}" for name, value in self._target.headers.items()),
        ]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"] if body else []
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body

    def _is_over(self, now_ns: int) -> bool:
        """Whether nothing more is sent."""
        if self._rule is None:
            return len(self._exchanges) >= self._due
        return self._rule.is_over(now_ns)

    def _repeats(self, concurrency: int, until_ns: int) -> bool:
        """Begin another pass over a closed set, unless its time is over or the last pass failed as a whole."""
        now_ns = time.monotonic_ns()
        is_over = now_ns >= until_ns or not any(it.is_whole for it in self._exchanges[-len(self._requests) :])
        if not is_over:
            self._due += len(self._requests)
            for _ in range(concurrency):
                self._go_on(now_ns)
        return not is_over

    def _go_on(self, now_ns: int, link: _Link | None = None) -> None:
        """Send the next request of a closed loop, if there is one, on this connection or another."""
        if self._is_over(now_ns):
            if link is not None:
                self._rest(link)
            return
        self._start(None, link)

    def _start(self, scheduled_ns: int | None, link: _Link | None = None) -> None:
        turn, call = divmod(len(self._exchanges), len(self._requests))
        exchange = Exchange(call, scheduled_ns, turn)
        self._exchanges.append(exchange)
        self._in_flight += 1
        if self._rule is not None:
            self._rule.arrive(self._in_flight)
        self._place(exchange, link)

    def _place(self, exchange: Exchange, link: _Link | None = None) -> None:
        link = link or (self._idle.pop() if self._idle else None)
        if link is not None:
            return self._send(link, exchange)
        self._waiting.append(exchange)
        if not self._target.keeps_alive:
            exchange.sent_ns = time.monotonic_ns()
        if sum(it.state != "open" for it in self._links.values()) < len(self._waiting):
            self._open_link()
        return None

    def _send(self, link: _Link, exchange: Exchange) -> None:
        data = self._warm_request if exchange.call == _WARM else self._requests[exchange.call]
        if _SALT in data:
            data = data.replace(_SALT, _SALT[:-8] + b"%08d" % exchange.turn)
        link.exchange = exchange
        exchange.sent_ns = exchange.sent_ns or time.monotonic_ns()
        exchange.unsent = memoryview(data)
        self._send_more(link, exchange)

    def _send_more(self, link: _Link, exchange: Exchange) -> None:
        unsent, was_begun = exchange.unsent, exchange.body_sent_ns is not None
        if unsent is None:
            return
        try:
            unsent = unsent[link.sock.send(unsent) :]
        except OSError as error:
            if not _is_pending(error):  # the next event of the connection is its end
                unsent = unsent[:0]
        exchange.body_sent_ns = time.monotonic_ns()
        exchange.unsent = unsent if len(unsent) else None
        if exchange.unsent is not None or was_begun:
            self._epoll.modify(link.sock, _IN if exchange.unsent is None else _IN | _OUT)

    # Connections

    @property
    def _warm_request(self) -> bytes:
        return self._request("GET", self._target.warm_path or "/", b"")

    def _prepare(self, concurrency: int) -> None:
        """Open the connections and use each once."""
        self._dispatch(self._epoll.poll(0, _MOST_EVENTS))  # those that the server has closed
        wanted = concurrency + _SPARE_LINKS
        _allow_files(wanted)
        if self._address is None:
            self._find_address()
        if not self._target.keeps_alive:
            return
        while len(self._links) < wanted:
            self._open_link()
        until_ns = time.monotonic_ns() + round(self._target.connect_s * NS_PER_S)
        while any(it.state != "open" for it in self._links.values()) and time.monotonic_ns() < until_ns:
            self._step()
        if not self._idle:
            raise EngineError(f"{self._host}:{self._port}: cannot connect: {self._error}", "is the server running?")
        if self._target.warm_path is not None:
            for link in [it for it in self._idle if not it.uses]:
                self._idle.remove(link)
                self._send(link, Exchange(_WARM, None))
            while any(it.exchange is not None for it in self._links.values()) and time.monotonic_ns() < until_ns:
                self._step()
            for link in [it for it in self._links.values() if it.exchange is not None]:
                self._drop(link)

    def _find_address(self) -> None:
        where = f"{self._host}:{self._port}"
        try:
            sock = socket.create_connection((self._host, self._port), timeout=self._target.connect_s)
        except (OSError, UnicodeError) as error:
            raise EngineError(f"{where}: cannot connect: {_text_of(error)}", "is the server running?") from error
        self._address = (sock.family, sock.getpeername())
        if self._target.keeps_alive:
            self._adopt(sock)
        else:
            sock.close()

    def _open_link(self) -> None:
        family, address = self._address or (socket.AF_INET, None)
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            raise EngineError(f"the load client cannot open a connection: {_text_of(error)}") from error
        self._adopt(sock, address)

    def _adopt(self, sock: socket.socket, address: Any = None) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is None:
            with contextlib.suppress(OSError):  # a kernel without it: stamps are taken when bytes are read
                sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        link = _Link(sock)
        self._links[sock.fileno()] = link
        self._connections += 1
        self._epoll.register(sock, _IN | _OUT)
        code = 0 if address is None else sock.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            self._refuse(link, os.strerror(code))

    def _proceed(self, link: _Link) -> None:
        """A connection that is being made can go on."""
        if link.state == "connecting":
            code = link.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                return self._refuse(link, os.strerror(code))
            if self._tls is not None:
                link.sock = self._tls.wrap_socket(link.sock, server_hostname=self._host, do_handshake_on_connect=False)
                link.state, link.receive = "handshake", _tls_receiver(link.sock)
        if link.state == "handshake":
            try:
                link.sock.do_handshake()  # type: ignore[attr-defined]
            except OSError as error:
                if _is_pending(error):
                    self._epoll.modify(link.sock, _OUT if error.errno == _WANTS_WRITE else _IN)
                    return None
                return self._refuse(link, _text_of(error))
        link.state, self._refused = "open", 0
        self._epoll.modify(link.sock, _IN)
        return self._release(link)

    def _release(self, link: _Link) -> None:
        """A connection is free."""
        if self._waiting:
            self._send(link, self._waiting.popleft())
        else:
            self._rest(link)

    def _rest(self, link: _Link) -> None:
        if not self._target.keeps_alive:
            return self._drop(link)
        link.has_waited = True
        return self._idle.append(link)

    def _refuse(self, link: _Link, error: str) -> None:
        self._error = error
        self._drop(link)
        self._refused += 1
        if self._refused >= _MOST_REFUSED:
            where = f"{self._host}:{self._port}"
            raise EngineError(f"{where}: {self._refused} connections in a row failed: {error}", "is the server alive?")
        if self._waiting:
            exchange = self._waiting.popleft()
            exchange.lost = Reason.of("server_unreachable", error=error)
            self._finish(exchange)

    def _drop(self, link: _Link) -> None:
        self._links.pop(link.sock.fileno(), None)
        if link in self._idle:
            self._idle.remove(link)
        link.sock.close()

    # What happens

    def _step(self) -> None:
        """Wait for what happens next, and deal with it."""
        now_ns = time.monotonic_ns()
        if now_ns >= self._next_ns:
            self._tick(now_ns)
            now_ns = time.monotonic_ns()
        wait_ns = max(0, self._next_ns - now_ns)
        if self._rests and wait_ns > _REST_NS:
            time.sleep(_REST_NS / NS_PER_S)
        if wait_ns < _PRECISE_NS and self._is_open:
            select.select([self._epoll], [], [], wait_ns / NS_PER_S)
            ready = self._epoll.poll(0, _MOST_EVENTS)
        else:
            ready = self._epoll.poll(wait_ns / NS_PER_S, _MOST_EVENTS)
        self._reads += len(ready)
        self._dispatch(ready)

    def _dispatch(self, ready: Sequence[tuple[int, int]]) -> None:
        links, now_ns = self._links, time.monotonic_ns()
        for fd, mask in ready:
            link = links.get(fd)
            if link is None:
                self._hear(fd)
                continue
            exchange = link.exchange
            if exchange is None or mask & _OUT:
                self._handle(link, mask)
                continue
            try:
                data, aux, _, _ = link.receive(_READ_B, _AUX_B)
            except OSError as error:
                if not _is_pending(error):
                    self._lose(link, Reason.of("server_reset", error=_text_of(error)))
                continue
            exchange.seen_ns.append(now_ns)
            exchange.raw += data
            exchange.sizes.append(len(data))
            exchange.stamps += aux[0][2] if aux else _NO_STAMP
            if exchange.looks or data.endswith(_END) or len(data) < 4:
                self._look(link, exchange, is_over=not data)

    def _handle(self, link: _Link, mask: int) -> None:
        if link.state != "open":
            self._proceed(link)
        elif link.exchange is None:
            # An idle connection has no answer to read: the server closes it, or, with TLS 1.3, sends tickets.
            try:
                link.receive(_READ_B, _AUX_B)
            except OSError as error:
                if _is_pending(error):
                    return
            self._drop(link)
        else:
            self._send_more(link, link.exchange)
            if mask & ~_OUT and link.exchange is not None:
                self._dispatch([(link.sock.fileno(), mask & ~_OUT)])

    def _hear(self, fd: int) -> None:
        """The holder gives no order while a load runs; it is gone."""
        if fd == _STDIN and not os.read(_STDIN, 1):
            sys.exit(0)

    def _look(self, link: _Link, exchange: Exchange, *, is_over: bool = False) -> None:
        """See whether an answer is whole."""
        framing = exchange.framing
        is_whole = framing.is_chunked and exchange.raw.endswith(_DONE_ENDS)
        if not is_whole:
            try:
                for _ in framing.advance(is_over=is_over):
                    pass
            except BrokenAnswer as broken:
                self._end(link, exchange, broken.reason)
                return
            is_whole = framing.is_complete
            exchange.looks = not framing.is_chunked
        if is_whole:
            exchange.is_whole = True
            self._end(link, exchange, None)
        elif is_over:
            received = len(exchange.raw)
            self._lose(link, Reason.of("server_closed", received=received))

    def _lose(self, link: _Link, reason: Reason) -> None:
        """The connection is lost; a server may have closed one that it kept alive just when a request was sent."""
        exchange = link.exchange
        if exchange is None:
            return self._drop(link)
        if exchange.raw or not link.has_waited or exchange.tries or exchange.call == _WARM:
            return self._end(link, exchange, reason)
        self._drop(link)
        exchange.restart()
        self._reconnects += 1
        return self._place(exchange)

    def _end(self, link: _Link, exchange: Exchange, reason: Reason | None) -> None:
        exchange.lost = reason
        link.exchange = None
        link.uses += 1
        link.has_waited = True
        free: _Link | None = link
        keeps_alive = self._target.keeps_alive and exchange.framing.keeps_alive
        if reason is not None or not keeps_alive or exchange.unsent is not None:
            self._drop(link)
            free = None
            if self._target.keeps_alive and exchange.call != _WARM and len(self._idle) < _SPARE_LINKS:
                self._open_link()
        if exchange.call != _WARM:
            self._finish(exchange, free)
        elif free is not None:
            self._rest(free)

    def _finish(self, exchange: Exchange, link: _Link | None = None) -> None:
        """A request is finished, and its connection free if it is given."""
        self._in_flight -= 1
        self._finished += 1
        now_ns = exchange.ended_ns = time.monotonic_ns()
        if self._rule is not None:
            is_done = b"[DONE]" in exchange.raw[-64:] or not self._target.needs_done
            self._rule.answer(now_ns, is_good=exchange.is_whole and exchange.framing.status == 200 and is_done)
            self._advance(now_ns)
        if not self._is_open:
            self._go_on(now_ns, link)
        elif link is not None:
            self._release(link)

    def _advance(self, now_ns: int) -> None:
        rule = self._rule
        if rule is None:
            return
        rule.advance(now_ns)
        # A load that failed as a whole opens and closes its window at once, over all of it.
        if rule.opened_ns is not None and self._opening is None and not rule.is_over(now_ns):
            self._opening = Usage()
        if rule.is_over(now_ns) and self._closing is None:
            self._closing = Usage()
            # Nothing more is handed out.
            self._in_flight -= len(self._waiting)
            while self._waiting:
                self._waiting.popleft().restart()

    def _tick(self, now_ns: int) -> None:
        if self._rule is not None:
            for scheduled_ns in self._rule.arrivals(now_ns):
                self._start(scheduled_ns)
            self._advance(now_ns)
        if now_ns >= self._sweep_ns:
            self._sweep(now_ns)
            self._sweep_ns = now_ns + _SWEEP_NS
        if now_ns >= self._reported_ns + _REPORT_NS:
            self._reported_ns = now_ns
            self._tell("progress", self._finished)
        self._next_ns = self._sweep_ns
        if self._is_open and self._rule is not None and not self._rule.is_over(now_ns):
            self._next_ns = min(self._sweep_ns, self._rule.next_ns)

    def _sweep(self, now_ns: int) -> None:
        """Give up what takes too long, and see whether the loop may rest."""
        target = self._target
        reads = self._reads * _REST_NS / max(1, now_ns - self._swept_ns)  # within a rest
        self._rests = self._tls is None and _REST_LEAST < reads < _REST_MOST * self._in_flight
        self._swept_ns, self._reads = now_ns, 0
        for link in list(self._links.values()):
            exchange = link.exchange
            if link.state != "open" and now_ns - link.opened_ns > target.connect_s * NS_PER_S:
                self._refuse(link, os.strerror(errno.ETIMEDOUT))
            if exchange is None or exchange.sent_ns is None:
                continue
            if exchange.raw and not exchange.looks and now_ns - exchange.last_ns > _SWEEP_NS:
                self._look(link, exchange)
            if link.exchange is not exchange:
                continue
            if now_ns - exchange.last_ns > target.silence_s * NS_PER_S:
                self._end(link, exchange, Reason.of("server_hung", silence_s=target.silence_s))
            elif now_ns - exchange.sent_ns > target.total_s * NS_PER_S:
                self._end(link, exchange, Reason.of("server_too_slow", total_s=target.total_s))
            elif len(exchange.raw) > MOST_ANSWER_B:
                self._end(link, exchange, Reason.of("server_too_long", found="the whole answer"))


_WANTS_READ, _WANTS_WRITE = 2, 3  # ssl.SSL_ERROR_WANT_READ and _WRITE; importing ssl takes longer than all else


def _is_pending(error: OSError) -> bool:
    is_tls = type(error).__module__ == "ssl"
    return isinstance(error, BlockingIOError) or (is_tls and error.errno in (_WANTS_READ, _WANTS_WRITE))


def _text_of(error: OSError | UnicodeError) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _tls_context() -> Any:
    import ssl

    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _tls_receiver(sock: Any) -> Callable[[int, int], tuple[bytes, tuple[()], int, None]]:
    def receive(most_b: int, _: int) -> tuple[bytes, tuple[()], int, None]:
        """As `recvmsg`; takes all that was decrypted, which epoll does not see."""
        data = sock.recv(most_b)
        while sock.pending() and len(data) < 3 * most_b:
            data += sock.recv(most_b)
        return data, (), 0, None

    return receive


def _allow_files(links: int) -> None:
    """Raise the limit of open files as far as it goes: an open loop may need any number. EngineError: it is too low."""
    needed = links + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise EngineError(f"{links} connections need {needed} open files, the hard limit is {hard}", "ulimit -Hn")
    if soft not in (hard, resource.RLIM_INFINITY):
        most = max(soft, needed) if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def serve_pipes() -> int:
    """The process: a target and then loads in the lines of stdin, messages on stdout; it ends with its holder."""
    process.die_with_parent(os.getppid())
    out = sys.stdout.buffer

    def tell(kind: str, value: Any) -> None:
        out.write(json.dumps((kind, value), separators=(",", ":")).encode() + b"\n")
        if kind != "reply":
            out.flush()

    loop = None
    while line := sys.stdin.buffer.readline():
        order = json.loads(line)
        if loop is None:
            loop = Loop(decode(Target, order, "target"), tell)
            continue
        calls, plan = unpack(tuple[Call, ...], order["calls"]), unpack(TrafficPlan | None, order["plan"])
        try:
            loop.run(calls, plan, order["concurrency"], order["least_s"])
        except EngineError as error:
            tell("failed", [error.message, error.hint])
    return 0
