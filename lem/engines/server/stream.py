"""The answer of a server: HTTP/1.1 (RFC 9112), server-sent events, and the tokens in them, from the bytes that came."""

from __future__ import annotations

import itertools
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from lem.base.log import escaped, shorten
from lem.base.reasons import Reason
from lem.base.units import KIB, MIB

MOST_HEAD_B = 64 * KIB
MOST_LINE_B = MIB
MOST_ANSWER_B = 256 * MIB
_SHOWN = 160  # characters of what a server sent, in a reason
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\r\n]*)?")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")
_BODYLESS = (204, 304)


class BrokenAnswer(ValueError):
    """The bytes of an answer that are not what they must be."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.text)
        self.reason = reason


def quoted(found: bytes | str) -> str:
    """The beginning of what a server sent, in one printable line."""
    text = found.decode("utf-8", "replace") if isinstance(found, bytes) else found
    return shorten(escaped(" ".join(text.split())), _SHOWN)


class Framing:
    """Where the body lies in the bytes of an HTTP/1.1 response, as far as they have come.

    `advance` goes on where it stopped; raises BrokenAnswer.
    """

    def __init__(self, raw: bytearray) -> None:
        self.at = 0  # the first byte that was not taken yet
        self.status: int | None = None
        self.headers: Mapping[str, str] = {}  # by lower-case name; repeated ones joined
        self.is_chunked = False
        self.is_complete = False
        self._raw = raw
        self._is_http_11 = False
        self._left: int | None = None  # bytes of a body of known length; None: it ends with the connection
        self._is_in_trailers = False

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow on the connection, once the answer is complete."""
        words = self.headers.get("connection", "").lower()
        has_end = self.is_chunked or self._left is not None
        return has_end and "close" not in words and (self._is_http_11 or "keep-alive" in words)

    def advance(self, *, is_over: bool = False) -> Iterator[tuple[int, int]]:
        """The parts of the body that have come since; `is_over`: nothing follows, the beginning of a chunk counts."""
        while self.status is None:
            if not self._take_head():
                return
        while not self.is_complete:
            found = self._next_chunk(is_over) if self.is_chunked else self._next_part(is_over)
            if found is None:
                return
            if found[1] > found[0]:
                yield found

    def _take_head(self) -> bool:
        """Whether there was a whole head, also an interim one (1xx), which is passed over."""
        raw, end = self._raw, self._raw.find(b"\n\r\n", self.at) + 3
        if end < 3:
            begun = bytes(raw[self.at : self.at + 12])
            if len(raw) - self.at > MOST_HEAD_B or (len(begun) >= 9 and not begun.startswith(b"HTTP/1.")):
                raise BrokenAnswer(Reason.of("server_not_http", found=quoted(begun)))
            return False
        first, *lines = bytes(raw[self.at : end - 3]).split(b"\n")
        status = _STATUS.fullmatch(first.rstrip(b"\r"))
        if status is None:
            raise BrokenAnswer(Reason.of("server_not_http", found=quoted(first)))
        self.at = end
        number = int(status[2])
        if 100 <= number < 200 and number != 101:
            return True
        self._is_http_11, self.status, self.headers = status[1] == b"1", number, _headers(lines)
        self.is_chunked = self.headers.get("transfer-encoding", "").lower().endswith("chunked")
        length = self.headers.get("content-length")
        if number in _BODYLESS:
            self._left = 0
        elif length is not None and not self.is_chunked:
            lengths = {item.strip() for item in length.split(",")}
            if len(lengths) != 1 or not re.fullmatch("[0-9]{1,15}", next(iter(lengths))):
                raise BrokenAnswer(Reason.of("server_not_http", found=f"Content-Length: {quoted(length)}"))
            self._left = int(lengths.pop())
        return True

    def _next_part(self, is_over: bool) -> tuple[int, int] | None:
        start, end = self.at, len(self._raw)
        if self._left is None:
            self.is_complete = is_over
        else:
            end = min(end, start + self._left)
            self._left -= end - start
            self.is_complete = self._left == 0
        self.at = end
        return (start, end) if self.is_complete or end > start else None

    def _next_chunk(self, is_over: bool) -> tuple[int, int] | None:
        if self._is_in_trailers:
            return self._next_trailer()
        raw, line_end = self._raw, self._raw.find(b"\n", self.at)
        if line_end < 0:
            if len(raw) - self.at > MOST_HEAD_B:
                raise BrokenAnswer(Reason.of("server_not_http", found=quoted(bytes(raw[self.at : self.at + 40]))))
            return None
        size = _CHUNK_SIZE.fullmatch(raw[self.at : line_end].rstrip(b"\r"))
        if size is None:
            raise BrokenAnswer(Reason.of("server_not_http", found=quoted(bytes(raw[self.at : line_end]))))
        start, end = line_end + 1, line_end + 1 + int(size[1], 16)
        if end == start:
            self.at, self._is_in_trailers = start, True
            return start, start
        if len(raw) < end + 2:
            if is_over and len(raw) > start:
                self.at = len(raw)
                return start, min(end, len(raw))
            return None
        if raw[end : end + 2] != b"\r\n":
            raise BrokenAnswer(Reason.of("server_not_http", found=quoted(bytes(raw[end : end + 40]))))
        self.at = end + 2
        return start, end

    def _next_trailer(self) -> tuple[int, int] | None:
        line_end = self._raw.find(b"\n", self.at)
        if line_end < 0:
            return None
        self.is_complete = not self._raw[self.at : line_end].rstrip(b"\r")
        self.at = line_end + 1
        return self.at, self.at


def _headers(lines: Sequence[bytes]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.decode("latin-1").strip().partition(":")
        if colon:
            name = name.strip().lower()
            found[name] = f"{found[name]}, {value.strip()}" if name in found else value.strip()
    return found


class Arrivals:
    """When the bytes of an answer came: the end of each read in them, and its time."""

    def __init__(self, sizes: Sequence[int], times_ns: Sequence[int]) -> None:
        self.ends = tuple(itertools.accumulate(sizes))
        self.times_ns = times_ns
        self.shared: list[int] = []  # the places of reads with more than one event that brought tokens
        self._read = 0
        self._used = -1  # the last read with such an event

    def of_all(self, ends: Iterable[int]) -> Iterator[int]:
        """The times of the bytes in front of each end; to be asked in order, once for each event with tokens."""
        read, used, read_ends, times_ns = self._read, self._used, self.ends, self.times_ns
        for end in ends:
            while read_ends[read] < end:
                read += 1
            if read == used and self.shared[-1:] != [read]:
                self.shared.append(read)
            used = read
            yield times_ns[read]
        self._read, self._used = read, used


class Answer:
    """What the events of an answer say; token events as columns of equal length."""

    def __init__(self) -> None:
        self.at_ns = array("q")
        self.texts: list[str] = []
        self.ids: list[tuple[int, ...]] = []  # empty for an event without ids
        self.usage: Mapping[str, Any] | None = None
        self.finish_reason: str | None = None
        self.is_done = False
        self.error: Reason | None = None
        self.sliced = 0  # events that were not parsed one by one

    def take(self, data: bytes, arrivals: Arrivals, end: int) -> bool:
        """Take the data of an event that ends there; whether it brought tokens."""
        if data.strip() == b"[DONE]":
            self.is_done = True
            return False
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            self._fail("server_bad_event", found=quoted(data))
            return False
        if document is None:
            return False
        if not isinstance(document, dict):
            self._fail("server_bad_event", found=quoted(data))
            return False
        error = document if document.get("object") == "error" else document.get("error")
        if error is not None:
            self._fail("server_error_event", message=quoted(_message_of(error)))
            return False
        event = read_event(document)
        self.usage = self.usage if event.usage is None else event.usage
        self.finish_reason = event.finish_reason or self.finish_reason
        if not event.text and not event.ids:
            return False
        self.at_ns.extend(arrivals.of_all((end,)))
        self.texts.append(event.text)
        self.ids.append(event.ids)
        return True

    def take_error(self, data: bytes) -> None:
        """Take the data of an event that is called an error."""
        self._fail("server_error_event", message=message_in(data))

    def _fail(self, code: str, **data: str) -> None:
        self.error = self.error or Reason.of(code, **data)

    @property
    def ids_tok(self) -> int | None:
        """Tokens by their ids; None if an event has none."""
        return sum(map(len, self.ids)) if self.ids and all(self.ids) else None

    @property
    def usage_tok(self) -> int | None:
        return number_of(self.usage, "completion_tokens")


def number_of(usage: Mapping[str, Any] | None, *path: str) -> int | None:
    found: Any = usage
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 2**53 else None


def message_in(body: bytes) -> str:
    """The message of an error in what a server sent, JSON or not."""
    try:
        return quoted(_message_of(json.loads(body)))
    except (ValueError, RecursionError):
        return quoted(body)


def _message_of(error: Any) -> str:
    """As servers word it: text, or an object with it at one of some places."""
    while isinstance(error, Mapping):
        inner = next((error[name] for name in ("message", "error", "detail") if error.get(name)), None)
        if inner is None:
            break
        error = inner
    return error if isinstance(error, str) else json.dumps(error)


class Event(NamedTuple):
    text: str
    ids: tuple[int, ...]
    usage: Mapping[str, Any] | None
    finish_reason: str | None


def read_event(document: Mapping[str, Any]) -> Event:
    """The first choice of an event of the completions or the chat API, or an event of llama.cpp's own API."""
    if document.get("stop") is True and "tokens_predicted" in document:
        document = {**document, **_last_of_llamacpp(document)}
    choices = document.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else document
    delta = choice.get("delta")
    inner = delta if isinstance(delta, dict) else choice
    texts = [inner.get(name) for name in ("content", "text")]
    # Servers call what is thought by one of these names or, while they rename it, by both.
    texts.insert(0, inner.get("reasoning_content") or inner.get("reasoning"))
    texts += _texts_of_tools(inner.get("tool_calls"))
    ids = next((found for name in ("token_ids", "tokens") if (found := choice.get(name))), ())
    is_ids = isinstance(ids, list) and all(type(item) is int for item in ids)
    usage, finish = document.get("usage"), choice.get("finish_reason")
    return Event(
        "".join(text for text in texts if isinstance(text, str)),
        tuple(ids) if is_ids else (),
        usage if isinstance(usage, dict) else None,
        finish if isinstance(finish, str) else None,
    )


def _texts_of_tools(calls: Any) -> list[Any]:
    """What the model wrote in order to call tools: their names and arguments, in parts."""
    found = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [item.get(name) for item in found if isinstance(item, dict) for name in ("name", "arguments")]


def _last_of_llamacpp(document: Mapping[str, Any]) -> Mapping[str, Any]:
    cached = {"cached_tokens": number_of(document, "timings", "cache_n")}
    prompt, output = document.get("tokens_evaluated"), document.get("tokens_predicted")
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": cached}
    return {"usage": usage, "finish_reason": "length" if document.get("stop_type") == "limit" else "stop"}


# Most events of a stream differ only in text, ids and some stamps: they are cut out by a pattern that is made from one
# of them, at a tenth of the time of json.loads. JSON text without quote, backslash and control characters is itself.
_VALUES = re.compile(
    rb'"(text|content|token_ids|tokens|id|created)":(\s*)("[^"\\\x00-\x1f]*"|\[[0-9, ]*\]|[0-9]+)(?=\s*[,}])'
)
_KEPT = rb'"([^"\\\x00-\x1f]*)"'
_KEPT_IDS = rb"\[([0-9, ]*)\]"
_MOST_PATTERNS = 64
_PATTERNS: dict[bytes, re.Pattern[bytes] | None] = {}


def _pattern_of(data: bytes) -> re.Pattern[bytes] | None:
    """A pattern of whole chunks (size, text, ids) with one event like this one; None if it cannot tell enough."""
    skeleton = _VALUES.sub(rb'"\1":\2', data)
    if skeleton not in _PATTERNS and len(_PATTERNS) < _MOST_PATTERNS:
        _PATTERNS[skeleton] = _make_pattern(data)
    return _PATTERNS.get(skeleton)


def _make_pattern(data: bytes) -> re.Pattern[bytes] | None:
    parts, trial, end, groups = [], [], 0, []
    for match in _VALUES.finditer(data):
        name, value = match[1], match[3]
        is_text, is_ids = name in (b"text", b"content") and value[:1] == b'"', value[:1] == b"["
        kept = _KEPT if is_text else _KEPT_IDS if is_ids else rb'"[^"\\\x00-\x1f]*"' if value[:1] == b'"' else b"[0-9]+"
        groups += [is_text] if is_text or is_ids else []
        parts += [re.escape(data[end : match.start(3)]), kept]
        trial += [data[end : match.start(3)], b'"a trial"' if is_text else b"[7, 77]" if is_ids else value]
        end = match.end()
    # Another event with other values in these places must read as such.
    event, other = read_event(json.loads(data)), read_event(json.loads(b"".join([*trial, data[end:]])))
    expected = Event("a trial", (7, 77) if False in groups else (), None, None)
    if other != expected or event.finish_reason or groups not in ([True], [True, False]):
        return None
    ids = b"" if False in groups else b"()"
    body = b"".join([*parts, re.escape(data[end:])])
    return re.compile(rb"([0-9A-Fa-f]+)\r\n(data: ?" + body + rb"\n\n)\r\n" + ids)


def _slice(raw: bytearray, at: int, pattern: re.Pattern[bytes], arrivals: Arrivals, answer: Answer) -> int:
    """Take the chunks from `at` on that fit the pattern; where the first other one begins."""
    ends, texts, all_ids = array("q"), answer.texts, answer.ids
    for match in pattern.finditer(raw, at):
        size, event, text, ids = match.groups()
        end = at + len(size) + 2 + len(event)
        if match.end(2) != end or int(size, 16) != len(event):
            break
        if text or ids:
            try:
                texts.append(text.decode())
            except UnicodeDecodeError:
                break
            ends.append(end)
            all_ids.append(tuple(map(int, ids.split(b","))) if ids.strip() else ())
        at = end + 2
        answer.sliced += 1
    answer.at_ns.extend(arrivals.of_all(ends))
    return at


def read_answer(raw: bytearray, arrivals: Arrivals, *, slices: bool = True) -> tuple[Framing, Answer]:
    """What a server answered, by all bytes that came; errors of the events are in the answer, BrokenAnswer is not."""
    framing, answer = Framing(raw), Answer()
    line, line_end = b"", 0  # the line that has begun
    data: list[bytes] = []
    kind = b""

    def dispatch(end: int) -> None:
        nonlocal data, kind
        if data and kind.strip() == b"error":
            answer.take_error(b"\n".join(data))
        elif data and answer.take(whole := b"\n".join(data), arrivals, end) and slices:
            pattern = _pattern_of(whole)
            if pattern is not None and framing.is_chunked and end == line_end:
                framing.at = _slice(raw, framing.at, pattern, arrivals, answer)
        data, kind = [], b""

    for start, end in framing.advance(is_over=True):
        if framing.status != 200 or not is_stream(framing):
            continue
        pieces = (line + raw[start:end]).split(b"\n")
        offset, line_end = start - len(line), end
        for piece in pieces[:-1]:
            offset += len(piece) + 1
            text = piece[:-1] if piece.endswith(b"\r") else piece
            if not text:
                dispatch(offset)
            elif len(text) > MOST_LINE_B:
                raise BrokenAnswer(Reason.of("server_too_long", found=quoted(bytes(text[:_SHOWN]))))
            else:
                field, _, value = bytes(text).removeprefix(b"\xef\xbb\xbf").partition(b":")
                value = value.removeprefix(b" ")
                data += [value] if field == b"data" else []
                kind = value if field == b"event" else kind
        line = bytes(pieces[-1])
    if framing.is_complete:
        data += [line.removeprefix(b"data:").strip()] if line.startswith(b"data:") else []
        dispatch(len(raw))
    return framing, answer


def is_stream(framing: Framing) -> bool:
    kind = framing.headers.get("content-type", "").lower().lstrip()
    return kind.startswith("text/event-stream") and framing.headers.get("content-encoding", "identity") == "identity"


def refusal(framing: Framing, raw: bytearray) -> Reason | None:
    """Why the head of an answer says that it is not a stream of tokens."""
    status, headers = cast("int", framing.status), framing.headers
    if status == 200 and "retry-after" not in headers and is_stream(framing):
        return None
    message = message_in(_body(raw, framing))
    if 300 <= status < 400:
        return Reason.of("server_redirects", status=status, location=quoted(headers.get("location", "")))
    if "retry-after" in headers:
        return Reason.of("server_busy", status=status, wait=quoted(headers["retry-after"]), message=message)
    if status != 200:
        return Reason.of("server_refused", status=status, message=message)
    kind = " ".join(filter(None, (headers.get("content-encoding"), headers.get("content-type"))))
    return Reason.of("server_other_type", kind=quoted(kind), message=message)


def _body(raw: bytearray, framing: Framing) -> bytes:
    again = Framing(raw)
    parts = (bytes(raw[start:end]) for start, end in again.advance(is_over=framing.is_complete))
    return b"".join(itertools.islice(parts, 16))[: 16 * KIB]
