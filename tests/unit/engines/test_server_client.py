"""The load client against a scripted server: each way to answer has the outcome that it must have, and none hangs."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import resource
import signal
import socket
import ssl
import struct
import subprocess
import termios
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lem.base import process
from lem.base.errors import EngineError
from lem.engines.server.client import SALT, Call, LoadClient, LoadResult, Reply, Target
from lem.engines.traffic import TrafficPlan
from tests.processes import PATIENCE_S, wait_for, wait_until_ended
from tests.scripted_server import (
    DONE,
    HEAD,
    LAST_CHUNK,
    Script,
    ScriptedServer,
    Talk,
    chunk,
    delta,
    event,
    head,
    requests_of,
    token,
    usage,
)

TOKENS = (token(" a"), token(" b"), token(" c", finish="length"))
GOOD = (*TOKENS, usage(3), DONE)
STREAM = b"".join(GOOD)
HANGS_S = 0.4


USUAL = Target("", silence_s=HANGS_S, total_s=5.0)


@dataclass(frozen=True)
class Case:
    script: Script
    error: str | None = None
    texts: tuple[str, ...] | None = (" a", " b", " c")  # None: as many as came through
    notes: tuple[str, ...] = ()
    ids: tuple[tuple[int, ...], ...] | None = None
    least_tok: int = 0
    finish: str | None = "length"
    target: Target = USUAL


def says(*events: bytes) -> Script:
    """A whole answer with these events."""
    return lambda talk: talk.answer(*events)


def sends(*parts: bytes) -> Script:
    return lambda talk: talk.send(*parts)


def then(script: Script, *ends: Callable[[Talk], None]) -> Script:
    def play(talk: Talk) -> None:
        script(talk)
        for end in ends:
            end(talk)

    return play


def refuses(status: str, body: bytes = b"", **headers: str) -> Script:
    return sends(head(status, Content_Length=str(len(body)), **headers) + body)


def split(data: bytes, size: int = 1) -> Script:
    """In packets of one size, which cut everything there is to cut."""
    return sends(*(data[at : at + size] for at in range(0, len(data), size)))


def pings(talk: Talk) -> None:
    """Comments without end."""
    talk.send(HEAD)
    while talk.is_idle(0.05):
        talk.send(chunk(b": ping\n\n"))


def late(talk: Talk) -> None:
    assert talk.is_idle(0.2)
    talk.answer(*GOOD)


def failed(code: str, script: Script, *texts: str, finish: str | None = None) -> Case:
    return Case(script, code, texts, finish=finish)


WHOLE = HEAD + b"".join(map(chunk, GOOD)) + LAST_CHUNK
CRLF = STREAM.replace(b"\n", b"\r\n")
UTF8 = (token(" ä€😀"), token(" b"), token(" c", finish="length"), usage(3), DONE)
TYPE = {"Content_Type": "text/event-stream"}
CHUNKED = {**TYPE, "Transfer_Encoding": "chunked"}
CALLED = ({"name": " a", "arguments": ""}, {"arguments": " b"}, {"arguments": " c"})
LLAMACPP = {"content": "", "tokens": [], "stop": True, "tokens_predicted": 3, "tokens_evaluated": 7}

# What is fine, however it comes.
FINE: dict[str, Case] = {
    "a chunk per token": Case(says(*GOOD)),
    "all in one packet": Case(sends(WHOLE)),
    "packets of one byte": Case(split(WHOLE)),
    "packets of seven bytes": Case(split(WHOLE, 7)),
    "events split across chunks": Case(
        sends(HEAD, *(chunk(STREAM[at : at + 9]) for at in range(0, len(STREAM), 9)), LAST_CHUNK)
    ),
    "several events in a chunk": Case(sends(HEAD, chunk(STREAM), LAST_CHUNK)),
    "split UTF-8": Case(split(HEAD + b"".join(map(chunk, UTF8)) + LAST_CHUNK, 3), texts=(" ä€😀", " b", " c")),
    "split UTF-8 across chunks": Case(
        sends(HEAD, *(chunk(bytes([byte])) for byte in b"".join(UTF8)), LAST_CHUNK), texts=(" ä€😀", " b", " c")
    ),
    "CRLF": Case(sends(HEAD, *map(chunk, CRLF.splitlines(keepends=True)), LAST_CHUNK)),
    "CRLF, an event in each chunk": Case(says(*(it.replace(b"\n", b"\r\n") for it in GOOD))),
    "CRLF in packets of one byte": Case(split(HEAD + chunk(CRLF) + LAST_CHUNK)),
    "comments": Case(says(b": ping\n\n", TOKENS[0], b":\n\n", *GOOD[1:])),
    "keep-alive comments in events": Case(says(b": ping\n" + TOKENS[0], *GOOD[1:])),
    "a null event": Case(says(b"data: null\n\n", *GOOD)),
    "an empty event": Case(says(b"data:\n\n", b"event: x\n\n", b"\n\n", *GOOD[:-1], DONE), "server_bad_event"),
    "an empty first chunk": Case(says(token(""), *GOOD)),
    "a text that is null": Case(says(token(None), *GOOD)),
    "a role chunk": Case(
        says(
            delta(role="assistant", content=""),
            *(delta(content=it) for it in (" a", " b")),
            delta("stop", content=" c"),
            usage(3),
            DONE,
        ),
        finish="stop",
    ),
    "reasoning": Case(
        says(delta(reasoning_content=" a"), delta(content=" b"), delta("stop", content=" c"), usage(3), DONE),
        finish="stop",
    ),
    "reasoning by its other name": Case(
        says(delta(reasoning=" a"), delta(content=" b"), delta("stop", content=" c"), usage(3), DONE), finish="stop"
    ),
    "reasoning by both names": Case(
        says(
            delta(reasoning=" a", reasoning_content=" a"), *(delta(content=it) for it in (" b", " c")), usage(3), DONE
        ),
        finish=None,
    ),
    "a call of a tool": Case(
        says(*(delta(tool_calls=[{"index": 0, "function": it}]) for it in CALLED), usage(3), DONE), finish=None
    ),
    "a finish reason of its own": Case(
        says(token(" a"), token(" b"), token(" c"), token("", finish="length"), usage(3), DONE)
    ),
    "several tokens in a chunk": Case(
        says(token(" a b", ids=[1, 2]), token(" c", ids=[3], finish="length"), usage(3), DONE),
        texts=(" a b", " c"),
        ids=((1, 2), (3,)),
    ),
    "ids of a token without text": Case(
        says(token("", ids=[1]), token(" é", ids=[2]), token(" c", ids=[3], finish="length"), usage(3), DONE),
        texts=("", " é", " c"),
        ids=((1,), (2,), (3,)),
    ),
    "usage with another number": Case(
        says(token(" a", ids=[1]), token(" b", ids=[2]), token(" c", ids=[3], finish="stop"), usage(2), DONE),
        notes=("server_usage_differs",),
        ids=((1,), (2,), (3,)),
        finish="stop",
    ),
    "cached tokens": Case(
        says(*TOKENS, usage(3, prompt_tokens_details={"cached_tokens": 4}), DONE), notes=("server_cached",)
    ),
    "usage in every chunk": Case(says(*(it for part in TOKENS for it in (part, usage(1))), usage(3), DONE)),
    "a body of known length": Case(sends(head(**TYPE, Content_Length=str(len(STREAM))), STREAM[:50], STREAM[50:])),
    "a body up to the end": Case(then(sends(head(**TYPE), STREAM), Talk.close)),
    "a connection that is closed after each answer": Case(
        then(sends(head(**CHUNKED, Connection="close"), chunk(STREAM), LAST_CHUNK), Talk.close)
    ),
    "trailers": Case(sends(HEAD, *map(chunk, GOOD), b"0\r\nServer-Timing: a\r\nX: y\r\n\r\n")),
    "extensions of chunks": Case(sends(HEAD, b"%x;a=b\r\n%s\r\n" % (len(STREAM), STREAM), LAST_CHUNK)),
    "sizes in capitals with zeros": Case(sends(HEAD, b"000%X\r\n%s\r\n" % (len(STREAM), STREAM), LAST_CHUNK)),
    "100 Continue": Case(sends(b"HTTP/1.1 100 Continue\r\n\r\n", WHOLE)),
    "early hints": Case(sends(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + WHOLE)),
    "duplicate headers": Case(
        sends(head(**CHUNKED, X="1")[:-2] + b"X: 2\r\nDate: a\r\nDate: a\r\n\r\n", chunk(STREAM), LAST_CHUNK)
    ),
    "headers in odd case": Case(
        sends(
            b"HTTP/1.1 200\r\nCONTENT-TYPE:Text/Event-Stream; charset=utf-8\r\ntransfer-ENCODING: Chunked\r\n\r\n",
            chunk(STREAM),
            LAST_CHUNK,
        )
    ),
    "names and ids of events": Case(says(*(b"event: completion\nid: 7\nretry: 10\n" + it for it in GOOD))),
    "data over two lines": Case(
        says(*TOKENS[:2], TOKENS[2].replace(b',"choices"', b'\ndata: ,"choices"'), usage(3), DONE)
    ),
    "no blank after the colon": Case(says(*(it.replace(b"data: ", b"data:") for it in GOOD))),
    "a byte order mark": Case(says(b"\xef\xbb\xbf" + TOKENS[0], *GOOD[1:])),
    "escaped text": Case(
        says(token(' "\\\n\x7f'), token(" b"), token(" c", finish="length"), usage(3), DONE),
        texts=(' "\\\n\x7f', " b", " c"),
    ),
    "a slow first byte": Case(late),
    "the end without its blank line": Case(says(*GOOD[:-1], b"data: [DONE]")),
    "the last chunk alone": Case(sends(HEAD, *map(chunk, GOOD), b"0", b"\r", b"\n\r\n")),
    "llama.cpp's own API": Case(
        says(
            *(event({"content": it, "tokens": [7], "stop": False}) for it in (" a", " b", " c")),
            event({**LLAMACPP, "stop_type": "limit", "timings": {"cache_n": 4}}),
        ),
        notes=("server_cached",),
        ids=((7,), (7,), (7,)),
        target=Target("", needs_done=False),
    ),
}
FINE["an empty event"] = replace(FINE["an empty event"], script=says(b"event: x\n\n", b"\n\n", *GOOD), error=None)

# What fails a request, and how that is named.
FAILS: dict[str, Case] = {
    "an error event behind a 200": failed(
        "server_error_event", says(TOKENS[0], event({"error": {"message": "out of memory", "code": 500}}), DONE), " a"
    ),
    "an error event by its name": failed("server_error_event", says(b'event: error\ndata: {"message": "no"}\n\n')),
    "an error object of vLLM": failed(
        "server_error_event", says(event({"object": "error", "message": "no", "code": 400}), DONE)
    ),
    "429 with Retry-After": failed(
        "server_busy", refuses("429 Too Many Requests", b'{"error":{"message":"slow down"}}', Retry_After="7")
    ),
    "503 with Retry-After": failed("server_busy", refuses("503 Service Unavailable", b"loading", Retry_After="1")),
    "429": failed("server_refused", refuses("429 Too Many Requests")),
    "503": failed("server_refused", refuses("503 Service Unavailable", b"<html>busy</html>", Content_Type="text/html")),
    "500": failed("server_refused", refuses("500 Internal Server Error", b"oops")),
    "400 with a message": failed("server_refused", refuses("400 Bad Request", b'{"detail":"too long"}')),
    "401": failed("server_refused", refuses("401 Unauthorized", b'{"error":"no key"}', WWW_Authenticate="Bearer")),
    "404": failed("server_refused", refuses("404 Not Found", b'{"object":"error","message":"no model"}')),
    "204": failed("server_refused", sends(head("204 No Content"))),
    "201 with a stream": failed("server_refused", sends(head("201 Created", **CHUNKED), chunk(STREAM), LAST_CHUNK)),
    "a redirect": failed("server_redirects", refuses("307 Temporary Redirect", Location="http://127.0.0.1:1/v2")),
    "an answer without a stream": failed(
        "server_other_type", refuses("200 OK", b'{"choices":[{"text":"a"}]}', Content_Type="application/json")
    ),
    "no content type": failed("server_other_type", sends(head(Transfer_Encoding="chunked"), chunk(STREAM), LAST_CHUNK)),
    "a compressed stream": failed(
        "server_other_type", sends(head(**CHUNKED, Content_Encoding="gzip"), chunk(STREAM), LAST_CHUNK)
    ),
    "another protocol": failed("server_not_http", then(sends(b"SSH-2.0-OpenSSH_9.2\r\n"), Talk.hang)),
    "a status that is none": failed("server_not_http", then(sends(b"HTTP/1.1 two hundred\r\n\r\n"), Talk.hang)),
    "switching protocols": failed("server_refused", then(sends(head("101 Switching Protocols")), Talk.close)),
    "a head without end": failed(
        "server_not_http", then(sends(b"HTTP/1.1 200 OK\r\n", *(b"X: %d\r\n" % it for it in range(20_000))), Talk.hang)
    ),
    "a wrong chunk size": failed("server_not_http", then(sends(HEAD, chunk(TOKENS[0]), b"zz\r\n"), Talk.hang)),
    "a chunk that is longer than it says": failed("server_not_http", then(sends(HEAD, b"3\r\nabcde\r\n"), Talk.hang)),
    "two content lengths": failed("server_not_http", then(sends(head(**TYPE, Content_Length="5, 6")), Talk.hang)),
    "a reset before the answer": failed("server_reset", Talk.reset),
    "a reset in the stream": replace(
        failed("server_reset", then(sends(HEAD, chunk(TOKENS[0])), Talk.reset)), texts=None
    ),
    "a close before the answer": failed("server_closed", Talk.close),
    "a close in the head": failed("server_closed", then(sends(HEAD[:20]), Talk.close)),
    "a close in the stream": failed("server_closed", then(sends(HEAD, chunk(TOKENS[0])), Talk.close), " a"),
    "a close in an event": failed(
        "server_closed", then(sends(HEAD, chunk(TOKENS[0]), chunk(TOKENS[1])[:40]), Talk.close), " a"
    ),
    "a half close": failed("server_closed", then(sends(HEAD, chunk(TOKENS[0])), Talk.half_close), " a"),
    "a body that is shorter than it says": failed(
        "server_closed",
        then(sends(head(**TYPE, Content_Length="9000"), STREAM), Talk.close),
        " a",
        " b",
        " c",
        finish="length",
    ),
    "a hang before the answer": failed("server_hung", Talk.hang),
    "a hang in the stream": failed("server_hung", then(sends(HEAD, chunk(TOKENS[0])), Talk.hang), " a"),
    "a hang before the last chunk": failed(
        "server_hung", then(sends(HEAD, *map(chunk, GOOD)), Talk.hang), " a", " b", " c", finish="length"
    ),
    "comments without end": replace(failed("server_too_slow", pings), target=Target("", total_s=HANGS_S)),
    "truncated JSON": failed("server_bad_event", says(TOKENS[0], TOKENS[1][:30] + b"\n\n", DONE), " a"),
    "invalid UTF-8": failed("server_bad_event", says(TOKENS[0], token(" b").replace(b" b", b"\xff\xfe"), DONE), " a"),
    "an event that is a list": failed("server_bad_event", says(b"data: [1]\n\n", DONE)),
    "an event that is no JSON": failed("server_bad_event", says(b"data: hello\n\n", DONE)),
    "brackets without end": failed("server_bad_event", says(b"data: " + b"[" * 100_000 + b"\n\n", DONE)),
    "a very long line": failed("server_too_long", says(TOKENS[0], b"data: " + b"x" * (1 << 21) + b"\n\n")),
    "no [DONE]": failed("server_no_end", says(*GOOD[:-1]), " a", " b", " c", finish="length"),
    "no usage": failed("server_no_usage", says(*TOKENS, DONE), " a", " b", " c", finish="length"),
    "no tokens": failed("server_empty", says(usage(0), DONE)),
    "no events": failed("server_no_end", sends(HEAD, LAST_CHUNK)),
    "fewer tokens than promised": replace(
        failed(
            "server_other_length",
            says(token(" a"), token(" b", finish="stop"), usage(2), DONE),
            " a",
            " b",
            finish="stop",
        ),
        least_tok=3,
    ),
    "a cut at the context limit": failed(
        "server_cut", says(token(" a"), token(" b", finish="length"), usage(2), DONE), " a", " b", finish="length"
    ),
    "more tokens than asked for": failed(
        "server_other_length",
        says(*TOKENS[:2], token(" c"), token(" d", finish="stop"), usage(4), DONE),
        " a",
        " b",
        " c",
        " d",
        finish="stop",
    ),
}


def answer_to(server: ScriptedServer, case: Case, turns: int = 1) -> tuple[Reply, ...]:
    body = json.dumps({"prompt": "x", "max_tokens": 3, "stream": True})
    with LoadClient(replace(case.target, url=server.url)) as client:
        return client.run_all([Call(body, 3, case.least_tok)] * turns, 1, lambda _: None).replies


@pytest.mark.parametrize("name", [*FINE, *FAILS])
def test_every_answer_has_its_outcome(name: str) -> None:
    case = (FINE | FAILS)[name]
    with ScriptedServer(case.script) as server:
        reply, again = answer_to(server, case, turns=2)

    for found in (reply, again):
        assert (found.error and found.error.code) == case.error, found.error
        assert case.texts in (None, tuple(found.texts or ()))
        assert tuple(note.code for note in found.notes) == case.notes
        assert found.finish_reason == case.finish
        assert found.ids == case.ids
    assert reply.sent_ns is not None
    times_ns = [reply.sent_ns, *reply.times_ns]
    assert times_ns == sorted(times_ns)


def test_a_request_is_what_the_call_says() -> None:
    with ScriptedServer(says(*GOOD)) as server:
        answer_to(server, Case(says(), target=Target("", headers={"Authorization": "Bearer key"})))

    (request,) = server.requests
    lines, _, body = request.partition(b"\r\n\r\n")
    assert json.loads(body) == {"prompt": "x", "max_tokens": 3, "stream": True}
    assert lines.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert {b"Authorization: Bearer key", b"Host: 127.0.0.1:%d" % server.port} <= set(lines.split(b"\r\n"))


def test_tokens_are_counted_by_ids_by_usage_or_by_chunks() -> None:
    by_ids = says(token(" a b", ids=[1, 2]), token(" c", ids=[3], finish="length"), usage(3), DONE)
    found = []
    for script in (by_ids, says(token(" a b"), token(" c", finish="length"), usage(3), DONE), says(*TOKENS, DONE)):
        with ScriptedServer(script) as server:
            (reply,) = answer_to(server, Case(script, target=Target("", needs_usage=False)))
            found.append((reply.output_tok, reply.token_source))
    assert found == [(3, "ids"), (3, "usage"), (3, "chunks")]


def test_ids_that_got_lost_leave_the_count_to_usage() -> None:
    script = says(token(" a", ids=[1]), token("é", ids=[2], finish="length"), usage(3), DONE)
    with ScriptedServer(script) as server:
        (reply,) = answer_to(server, Case(script))
    assert (reply.output_tok, reply.token_source) == (3, "usage")
    assert [note.data for note in reply.notes] == [{"ids": 2, "usage": 3}]


def test_a_kept_connection_that_the_server_closed_is_replaced() -> None:
    def once(talk: Talk) -> None:
        """Keep the connection, and close it when the next request comes."""
        if len(server.requests) in (1, 3):
            talk.reset()
        else:
            talk.answer(*GOOD)

    with ScriptedServer(once) as server, LoadClient(Target(server.url)) as client:
        result = client.run_all([Call("{}", 3)] * 3, 1, lambda _: None)

    assert [reply.error for reply in result.replies] == [None, None, None]
    assert result.check.reconnects == 2
    assert len(server.requests) == 5


def test_connections_are_used_once_before_the_load() -> None:
    def answer(talk: Talk) -> None:
        if talk.request.startswith(b"GET /health "):
            talk.send(head("404 Not Found", Content_Length="0"))
        else:
            talk.answer(*GOOD)

    with ScriptedServer(answer) as server, LoadClient(Target(server.url, warm_path="/health")) as client:
        result = client.run_all([Call("{}", 3)] * 4, 4, lambda _: None)

    posts = [request for request in server.requests if request.startswith(b"POST")]
    assert len(posts) == 4
    assert len(server.requests) - len(posts) == server.connections == result.check.connections
    assert result.check.unstamped_reads == 0
    assert result.check.stamp_source == "kernel"


def test_a_server_that_is_not_there_is_an_error() -> None:
    with ScriptedServer(says()) as server:
        target = Target(server.url)
    with LoadClient(target) as client, pytest.raises(EngineError, match="cannot connect") as caught:
        client.run_all([Call("{}", 3)], 1, lambda _: None)
    assert caught.value.kind == "engine"


def plan(mode: str, concurrency: int = 1, qps: float = 100.0, min_window_s: float = 0.3) -> TrafficPlan:
    return TrafficPlan(mode, qps, concurrency, seed=1, min_window_s=min_window_s, ramp_limit_s=1.0)


def test_a_server_that_dies_under_load_ends_it() -> None:
    def die(talk: Talk) -> None:
        if len(server.requests) > 20:
            server.stop()
            talk.reset()
        else:
            talk.answer(*GOOD)

    refused = pytest.raises(EngineError, match="in a row failed: Connection refused")
    with ScriptedServer(die) as server, LoadClient(Target(server.url)) as client, refused:
        client.run_traffic([Call("{}", 3)], plan("closed", min_window_s=30.0), lambda _: None)


def run(server: ScriptedServer, traffic: TrafficPlan, calls: int = 4) -> LoadResult:
    with LoadClient(Target(server.url)) as client:
        return client.run_traffic([Call(json.dumps({"call": at}), 3) for at in range(calls)], traffic, lambda _: None)


def test_a_closed_loop_keeps_its_concurrency() -> None:
    at_once = threading.Semaphore(0)
    most = 0
    lock, there = threading.Lock(), 0

    def count(talk: Talk) -> None:
        nonlocal there, most
        with lock:
            there += 1
            most = max(most, there)
        at_once.release()
        assert talk.is_idle(0.02)
        with lock:
            there -= 1
        talk.answer(*GOOD)

    with ScriptedServer(count) as server:
        result = run(server, plan("closed", concurrency=3))

    assert most == 3
    assert {reply.call for reply in result.replies} == {0, 1, 2, 3}
    assert all(reply.error is None and reply.scheduled_ns is None for reply in result.replies)
    assert result.has_turned_over
    assert result.closed_ns - result.opened_ns >= 0.3e9
    assert result.check.concurrency_asked == 3
    assert result.check.concurrency_reached <= 3


def test_arrivals_of_an_open_loop_are_where_the_plan_puts_them() -> None:
    with ScriptedServer(says(*GOOD)) as server:
        result = run(server, plan("constant", qps=50.0))

    times_ns = [reply.scheduled_ns or 0 for reply in result.replies]
    assert len(times_ns) >= 15
    assert {after - before for before, after in itertools.pairwise(times_ns)} == {20_000_000}
    sent = [(reply.sent_ns or 0) - (reply.scheduled_ns or 0) for reply in result.replies]
    assert min(sent) >= 0
    assert result.check.late_p50_us is not None
    assert result.check.late_p50_us == sorted(sent)[(len(sent) - 1) // 2] / 1000


def test_a_load_that_fails_as_a_whole_is_not_kept_up() -> None:
    with ScriptedServer(refuses("500 Internal Server Error")) as server:
        result = run(server, plan("closed", concurrency=2, min_window_s=60.0))
    assert 4 <= len(result.replies) <= 6
    assert {reply.error and reply.error.code for reply in result.replies} == {"server_refused"}


def test_a_load_that_fails_as_a_whole_is_not_blamed_on_the_client() -> None:
    with ScriptedServer(refuses("500 Internal Server Error")) as server:
        result = run(server, plan("constant", min_window_s=60.0))
    assert {reply.error and reply.error.code for reply in result.replies} == {"server_refused"}
    assert result.bound is None


def test_a_request_without_an_answer_is_in_flight_no_longer_than_its_connection() -> None:
    def answer(talk: Talk) -> None:
        if len(server.requests) % 10 < 2:  # two in a row, since the first is sent again
            talk.reset()
        else:
            talk.answer(*GOOD)

    with ScriptedServer(answer) as server:
        result = run(server, plan("closed"))
    lost = [reply for reply in result.replies if reply.error is not None]
    assert {reply.error.code for reply in lost if reply.error is not None} == {"server_reset"}
    assert all((reply.sent_ns or 0) < (reply.ended_ns or 0) and reply.finished_ns is None for reply in lost)
    assert result.check.concurrency_reached <= 1


def test_an_open_loop_may_need_more_files_than_the_soft_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as silent:
        target = Target(f"http://127.0.0.1:{silent.getsockname()[1]}/", silence_s=HANGS_S)
        with LoadClient(target) as client:
            resource.prlimit(client.pid, resource.RLIMIT_NOFILE, (110, hard))
            result = client.run_traffic([Call("{}", 3)], plan("constant", qps=400.0), lambda _: None)
    assert {reply.error.code for reply in result.replies if reply.error is not None} == {"server_hung"}
    assert result.check.connections > 110


def test_repeated_calls_differ_in_their_salt() -> None:
    body = json.dumps({"cache_salt": f"x-{SALT}"})
    with ScriptedServer(says(*GOOD)) as server, LoadClient(Target(server.url)) as client:
        result = client.run_traffic([Call(body, 3)], plan("closed", min_window_s=0.05), lambda _: None)

    salts = [json.loads(request.partition(b"\r\n\r\n")[2])["cache_salt"] for request in server.requests]
    assert salts == [f"x-lem-salt-{turn:08d}" for turn in range(len(result.replies))]


def test_two_loads_of_one_client_use_the_same_connections() -> None:
    with ScriptedServer(says(*GOOD)) as server, LoadClient(Target(server.url)) as client:
        first = client.run_all([Call("{}", 3)] * 2, 2, lambda _: None)
        second = client.run_all([Call("{}", 3)] * 3, 2, lambda _: None)
    assert (len(first.replies), len(second.replies)) == (2, 3)
    assert second.check.connections == 0


def test_each_request_has_a_connection_of_its_own_where_none_is_kept_alive() -> None:
    with ScriptedServer(says(*GOOD)) as server:
        target = Target(server.url, keeps_alive=False, warm_path="/health")
        with LoadClient(target) as client:
            result = client.run_all([Call("{}", 3)] * 5, 2, lambda _: None)

    assert [reply.error for reply in result.replies] == [None] * 5
    assert len(server.requests) == result.check.connections == 5
    assert all(b"\r\nConnection: close\r\n" in request for request in server.requests)
    assert server.connections == 6  # with the one that showed that there is a server


def test_connections_that_the_server_closed_between_two_loads_are_opened_again() -> None:
    with ScriptedServer(says(*GOOD)) as server, LoadClient(Target(server.url)) as client:
        client.run_all([Call("{}", 3)] * 200, 200, lambda _: None)
        server.hang_up()
        result = client.run_all([Call("{}", 3)] * 200, 200, lambda _: None)
    assert [reply.error for reply in result.replies] == [None] * 200


def test_texts_are_left_out_when_they_are_not_wanted() -> None:
    with ScriptedServer(says(*GOOD)) as server:
        (reply,) = answer_to(server, Case(says(), target=Target("", keeps_texts=False)))
    assert (reply.texts, len(reply.times_ns)) == (None, 3)
    assert reply.output_tok == 3


def test_a_client_that_is_killed_is_an_error() -> None:
    with ScriptedServer(Talk.hang) as server, LoadClient(Target(server.url)) as client:
        server.script = then(lambda _: os.kill(client.pid, signal.SIGKILL), Talk.hang)
        with pytest.raises(EngineError, match="the load client was killed by SIGKILL"):
            client.run_all([Call("{}", 3)], 1, lambda _: None)


def test_a_client_that_is_killed_while_it_reports_is_an_error() -> None:
    long = says(*[token(" some text")] * 4000, usage(4000), DONE)

    def kill(_: int) -> None:
        """Once the beginning of a reply, which is longer than a pipe holds, is there."""
        with Path(f"/proc/{client.pid}/fd/1").open("rb") as pipe:
            wait_for(lambda: struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0] > 4096 or None)
        os.kill(client.pid, signal.SIGKILL)
        os.waitid(os.P_PID, client.pid, os.WEXITED | os.WNOWAIT)

    killed = pytest.raises(EngineError, match="the load client was killed by SIGKILL")
    with ScriptedServer(long) as server, LoadClient(Target(server.url)) as client, killed:
        client.run_all([Call("{}", 4000)], 1, kill)


HOLDER = """
import sys
from lem.engines.server.client import Call, LoadClient, Target
client = LoadClient(Target(sys.argv[1]))
print(client.pid, flush=True)
client.run_all([Call("{}", 3)], 1, lambda _: None)
"""


def test_a_client_ends_with_its_holder_in_the_middle_of_a_load() -> None:
    with ScriptedServer(Talk.hang) as server:
        root = Path(__file__).parents[3]
        holder = process.spawn([*("python3", "-c", HOLDER), server.url], cwd=root)
        client = process.identify(int(process.pipes(holder)[1].read(16)))
        assert client is not None
        assert server.has_request.wait(PATIENCE_S)
        holder.kill()
        holder.communicate()
        assert wait_until_ended(client.pid, PATIENCE_S)


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "server.pem"
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    command = ["openssl", *words.split(), "-keyout", str(path), "-out", str(tmp_path / "certificate.pem")]
    subprocess.run(command, check=True, capture_output=True)
    with path.open("a") as file:
        file.write((tmp_path / "certificate.pem").read_text())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    return path


def test_https_is_stamped_when_it_is_read(certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ScriptedServer(says(*GOOD), tls=context) as server, LoadClient(Target(server.url)) as client:
        result = client.run_all([Call("{}", 3)] * 5, 2, lambda _: None)

    assert [(reply.error, reply.texts) for reply in result.replies] == [(None, [" a", " b", " c"])] * 5
    assert result.check.stamp_source == "user"
    assert "client_user_stamps" in {warning.code for warning in result.warnings}


def test_tickets_of_tls_do_not_end_an_idle_connection(certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.minimum_version, context.num_tickets = ssl.TLSVersion.TLSv1_3, 8
    with ScriptedServer(says(*GOOD), tls=context) as server, LoadClient(Target(server.url)) as client:
        for _ in range(3):
            result = client.run_all([Call("{}", 3)] * 2, 2, lambda _: None)
            assert [reply.error for reply in result.replies] == [None, None]
        assert server.connections == 6  # two, and four to spare
        server.hang_up()
        result = client.run_all([Call("{}", 3)] * 2, 2, lambda _: None)
    assert [reply.error for reply in result.replies] == [None, None]


def test_a_certificate_that_nobody_vouches_for_is_refused(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    refused = pytest.raises(EngineError, match="certificate verify failed")
    with ScriptedServer(says(*GOOD), tls=context) as server, LoadClient(Target(server.url)) as client, refused:
        client.run_all([Call("{}", 3)], 1, lambda _: None)


def test_requests_of_a_connection_are_told_apart() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"GET / HTTP/1.1\r\n\r\nPOST / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc")
        ours.shutdown(socket.SHUT_WR)
        assert [it[-3:] for it in requests_of(theirs)] == [b"\n\r\n"[-3:], b"abc"]
