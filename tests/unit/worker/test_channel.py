from __future__ import annotations

import base64
import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from lem.worker.channel import (
    TAIL_LINES,
    ChannelError,
    EngineLog,
    LineBuffer,
    Outbox,
    RunRequest,
    decode_line,
    encode_line,
    redact,
)
from tests.worker_rig import decode_report

REQUEST = RunRequest(
    config={"model": {"name": "m"}},
    identity={"experiment_id": "abc-c1"},
    result_dir="/results/abc-c1",
    engine_key="k" * 12,
    keep_engine=True,
    secrets={"HF_TOKEN": "hf_not_for_logs"},
)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for descriptor in ends:
        with contextlib.suppress(OSError):  # a test may have closed it
            os.close(descriptor)


@pytest.mark.parametrize("text", ["first\nsecond – naïve", os.fsdecode(b"/data/caf\xe9")])
def test_a_message_survives_the_channel_on_one_line(text: str):
    line = encode_line({"type": "progress", "text": text})

    assert line.count(b"\n") == 1
    assert decode_line(line) == {"type": "progress", "text": text}


def test_a_number_that_json_lacks_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        encode_line({"type": "result", "value": float("nan")})


@pytest.mark.parametrize("line", [b"Loading weights: 10%", b"[1]", b"{}", b'{"type": 1}', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_message_is_refused(line: bytes):
    with pytest.raises(ChannelError, match="not a message"):
        decode_line(line)


@pytest.mark.parametrize(
    "message",
    [
        {"type": "unheard"},
        {"type": "phase", "exp_id": "e"},
        {"type": "phase", "exp_id": None, "phase": "load"},
        {"type": "progress", "exp_id": "e", "done": True, "total": None, "text": ""},
        {"type": "progress", "exp_id": "e", "done": 0.5, "total": None, "text": ""},
        {"type": "result", "exp_id": "e", "engine_reused": 1},
        {"type": "hello", "protocol": 1},
    ],
)
def test_a_report_with_a_missing_or_mistyped_field_is_refused(message: dict[str, object]):
    with pytest.raises(ChannelError):
        decode_report(json.dumps(message).encode())


def test_a_report_may_hold_more_than_is_due():
    line = b'{"type": "progress", "exp_id": "e", "done": 1, "total": null, "text": "", "more": 1}'

    assert decode_report(line)["more"] == 1


def test_a_request_survives_the_channel_and_its_secrets_are_not_shown():
    assert RunRequest.from_message(decode_line(encode_line(REQUEST.to_message()))) == REQUEST
    assert REQUEST.exp_id == "abc-c1"
    assert "hf_not_for_logs" not in repr(REQUEST)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"colour": "red"}, "colour"),
        ({"result_dir": None}, "result_dir"),
        ({"identity": {}}, "experiment_id"),
        ({"secrets": ["HF_TOKEN"]}, "secrets"),
        ({"keep_engine": "yes"}, "keep_engine"),
        ({"engine_key": ...}, "engine_key"),  # left out
    ],
)
def test_a_broken_request_is_refused_with_the_field(change: dict[str, object], complaint: str):
    message = {name: value for name, value in {**REQUEST.to_message(), **change}.items() if value is not ...}
    with pytest.raises(ChannelError, match=complaint):
        RunRequest.from_message(message)


def test_lines_are_whole_however_they_come_and_none_is_endless():
    lines = LineBuffer(max_line_b=10)

    assert lines.feed(b'{"a"') == []
    assert lines.feed(b": 1}\n\n  \n{") == [b'{"a": 1}']
    assert lines.feed(b"}\n") == [b"{}"]
    with pytest.raises(ChannelError, match="more than 10 bytes"):
        lines.feed(b"01234567890")


def fill(outbox: Outbox) -> int:
    """Send until the pipe takes no more; how many messages that took."""
    sent = 0
    while not outbox.is_pending:
        outbox.put({"type": "progress", "number": sent})
        sent += 1
    return sent


def test_an_outbox_waits_for_a_slow_reader_and_loses_nothing_but_what_may_be_dropped(pipe: tuple[int, int]):
    reader, writer = pipe
    outbox = Outbox(writer)
    sent = fill(outbox)
    outbox.put({"type": "heartbeat"}, is_droppable=True)
    outbox.put({"type": "result"})

    lines = LineBuffer()
    received: list[dict[str, object]] = []
    while outbox.is_pending or not received or received[-1]["type"] != "result":
        received += [decode_line(line) for line in lines.feed(os.read(reader, 65536))]
        outbox.flush()

    assert [message.get("number") for message in received] == [*range(sent), None]
    assert received[-1] == {"type": "result"}


def test_an_outbox_says_when_nobody_reads_any_more(pipe: tuple[int, int]):
    reader, writer = pipe
    outbox = Outbox(writer)
    os.close(reader)

    with pytest.raises(BrokenPipeError):
        outbox.put({"type": "heartbeat"})
    outbox.drop()
    assert not outbox.is_pending


SECRET = "hf_abcdefghijklmn"


@pytest.mark.parametrize(
    ("parts", "logged"),
    [
        *(((f"token {SECRET[:cut]}", f"{SECRET[cut:]} end"), "token [redacted] end") for cut in range(1, len(SECRET))),
        (("see hf_abc", " and hf_"), "see hf_abc and hf_"),
    ],
)
def test_a_secret_is_redacted_wherever_the_stream_is_cut(tmp_path: Path, parts: tuple[str, ...], logged: str):
    log = EngineLog(str(tmp_path / "log.txt"), [SECRET])
    for part in parts:
        log.write(part.encode())
    log.close()

    assert (tmp_path / "log.txt").read_text() == logged


ODD = "pässwörd+/? 4711%"


def encoded(secret: str) -> list[str]:
    """A secret as programs print it: alone, and within other text that is encoded with it."""
    data = secret.encode()
    around = [(b"u:"[:before] + data + b"@end"[:after]) for before in range(3) for after in range(4)]
    base64s = [one(text).decode() for one in (base64.b64encode, base64.urlsafe_b64encode) for text in around]
    percent = [quote(secret), quote(secret, safe=""), quote_plus(secret), "".join(f"%{byte:02X}" for byte in data)]
    return [
        *base64s,
        *(text.rstrip("=") for text in base64s),
        *percent,
        *(re.sub("%..", lambda found: found[0].lower(), text) for text in percent),
    ]


@pytest.mark.parametrize("text", [*encoded(SECRET), *encoded(ODD)])
def test_a_secret_is_redacted_in_every_encoding_and_wherever_the_stream_is_cut(tmp_path: Path, text: str):
    secrets = [SECRET, f"{ODD}\n"]
    # What may stay are characters that hold bits of the text beside it, too.
    expected = re.compile(r"<[\w+/-]{0,3}\[redacted\][\w+/=-]{0,7}>")
    assert expected.fullmatch(redact(f"<{text}>", secrets))
    for cut in range(len(text)):
        path = tmp_path / str(cut)
        log = EngineLog(str(path), secrets)
        log.write(f"<{text[:cut]}".encode())
        log.write(f"{text[cut:]}>".encode())
        log.close()
        assert expected.fullmatch(path.read_text())


def test_a_short_secret_is_not_looked_for():
    assert redact("a plain text", ["a"]) == "a plain text"
    assert redact(f"GET /?token={SECRET}", [SECRET]) == "GET /?token=[redacted]"


def test_the_log_holds_every_byte_after_what_was_there_and_the_tail_the_last_lines(tmp_path: Path):
    path = tmp_path / "log.txt"
    path.write_text("before\n")
    log = EngineLog(str(path))
    lines = [f"line {number}" for number in range(100)]
    for line in lines:
        log.write(f"{line}\n".encode())
    log.write(b"caf\xe9")
    log.close()

    assert path.read_bytes() == "\n".join(["before", *lines, ""]).encode() + b"caf\xe9"
    assert log.tail().splitlines() == [*lines[-TAIL_LINES + 1 :], "caf�"]


def test_a_progress_bar_shows_its_last_state(tmp_path: Path):
    log = EngineLog(str(tmp_path / "log.txt"))
    log.write(b"Loading\n 10%\r 50%\r 90%\r")
    log.close()

    assert log.tail(1) == " 90%"
    assert log.tail() == "Loading\n 90%"


def test_a_full_disk_costs_the_log_and_nothing_else():
    log = EngineLog("/dev/full")
    log.write(b"still told\n")
    log.close()

    assert log.tail() == "still told"
