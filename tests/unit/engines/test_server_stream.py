"""Answers from their bytes: however these are cut, and whether events are sliced or parsed."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence

import pytest

from lem.engines.server.stream import Answer, Arrivals, Framing, read_answer
from tests.scripted_server import DONE, HEAD, LAST_CHUNK, chunk, delta, event, head, token, usage

WORDS = (
    " the",
    " ä€",
    "",
    ' "so"',
    " a\\b",
    "\n",
    " 😀",
    " 12",
    "é",
    "</s>",
    "\u2028",
    " \x7f",
    "data: [DONE]",
    "\\u00e9",
)


def completions(rng: random.Random) -> list[bytes]:
    return [token(rng.choice(WORDS)) for _ in range(30)]


def with_ids(rng: random.Random) -> list[bytes]:
    return [
        token(rng.choice(WORDS), ids=[rng.randrange(9999) for _ in range(rng.choice((1, 1, 2)))]) for _ in range(30)
    ]


def chat(rng: random.Random) -> list[bytes]:
    return [delta(role="assistant", content=""), *(delta(content=rng.choice(WORDS)) for _ in range(30))]


def llamacpp(rng: random.Random) -> list[bytes]:
    return [event({"content": rng.choice(WORDS), "tokens": [rng.randrange(99)], "stop": False}) for _ in range(30)]


def odd(rng: random.Random) -> list[bytes]:
    """Events that look alike and mean other things."""
    events = [*completions(rng), *with_ids(rng)]
    for at, one in enumerate(events):
        document = json.loads(one[6:])
        choice = document["choices"][0]
        document["created"] += at
        document["id"] = f"c-{rng.randrange(3)}"
        if at % 7 == 3:
            choice["content"] = "beside"
        if at % 11 == 5:
            choice["finish_reason"] = "stop"
        if at % 13 == 6:
            document["usage"] = {"completion_tokens": at}
        if at % 17 == 7:
            choice["text"] = 7
        if at % 19 == 8:
            choice["logprobs"] = {"text": "inner", "tokens": ["x"]}
        events[at] = event(document)
    return events


def spaced(rng: random.Random) -> list[bytes]:
    return [b"data: " + json.dumps(json.loads(it[6:])).encode() + b"\n\n" for it in with_ids(rng)]


STREAMS = (completions, with_ids, chat, llamacpp, odd, spaced)


def read(raw: bytes, *, slices: bool, sizes: Sequence[int] = ()) -> Answer:
    sizes = sizes or [len(raw)]
    return read_answer(bytearray(raw), Arrivals(sizes, range(len(sizes))), slices=slices)[1]


def said(answer: Answer) -> object:
    columns = (list(answer.at_ns), answer.texts, answer.ids)
    return (*columns, answer.usage, answer.finish_reason, answer.is_done, answer.error)


@pytest.mark.parametrize("make", STREAMS)
def test_slicing_and_parsing_give_the_same(make) -> None:
    rng = random.Random(7)
    raw = HEAD + b"".join(chunk(it) for it in [*make(rng), usage(30), DONE]) + LAST_CHUNK
    ends = sorted(rng.sample(range(1, len(raw)), 40))
    sizes = [after - before for before, after in itertools.pairwise([0, *ends, len(raw)])]

    assert said(read(raw, slices=True, sizes=sizes)) == said(read(raw, slices=False, sizes=sizes))


def test_most_events_are_sliced() -> None:
    events = [token(f" {at}", ids=[at]) for at in range(300)]
    raw = HEAD + b"".join(map(chunk, [*events, usage(300), DONE])) + LAST_CHUNK

    answer = read(raw, slices=True)

    assert answer.texts == [f" {at}" for at in range(300)]
    assert answer.ids == [(at,) for at in range(300)]
    assert answer.sliced >= 299


@pytest.mark.parametrize("make", STREAMS)
def test_the_end_of_an_answer_is_found_at_its_last_byte(make) -> None:
    events = [*make(random.Random(3))[:4], usage(4), DONE]
    body = b"".join(events)
    for raw in (
        HEAD + b"".join(map(chunk, events)) + LAST_CHUNK,
        HEAD + chunk(body) + b"0\r\nX: y\r\n\r\n",
        head(Content_Length=str(len(body))) + body,
        b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + chunk(body) + LAST_CHUNK,
    ):
        came = bytearray()
        framing = Framing(came)
        parts = b""
        for at, byte in enumerate(raw):
            came.append(byte)
            parts += b"".join(bytes(came[start:end]) for start, end in framing.advance())
            assert framing.is_complete == (at == len(raw) - 1)
        assert parts == body
        assert framing.keeps_alive


def test_an_event_has_the_time_of_its_last_byte() -> None:
    events = [chunk(token(" a")), chunk(token(" b")), chunk(token(" c"))]
    pieces = [HEAD, events[0][:9], events[0][9:], events[1] + events[2][:5], events[2][5:] + chunk(DONE) + LAST_CHUNK]

    arrivals = Arrivals([len(it) for it in pieces], [10, 20, 30, 40, 50])
    _, answer = read_answer(bytearray(b"".join(pieces)), arrivals)

    assert list(answer.at_ns) == [30, 40, 50]
    assert arrivals.shared == []


def test_events_that_share_a_read_are_counted() -> None:
    events = [chunk(token(f" {at}")) for at in range(6)]
    pieces = [
        HEAD + events[0],
        events[1] + events[2] + events[3],
        events[4] + events[5] + chunk(usage(6)) + chunk(DONE),
    ]

    arrivals = Arrivals([*(len(it) for it in pieces), 5], [10, 20, 30, 40])
    _, answer = read_answer(bytearray(b"".join(pieces) + LAST_CHUNK), arrivals)

    assert list(answer.at_ns) == [10, 20, 20, 20, 30, 30]
    assert arrivals.shared == [1, 2]
