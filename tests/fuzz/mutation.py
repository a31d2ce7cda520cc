"""Hostile inputs: whole documents of which a few places are changed, as text and as bytes.

A document is plain data. It is written as JSON or YAML with a few of its values, keys or branches replaced, and
sometimes the text itself is then cut, doubled or sprinkled with bytes, so that both what a parser lets through and
what it does not are met.
"""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from hypothesis import strategies as st

Draw = Any
Place = tuple["str | int", ...]

# Written as they stand, without quotes: what only a text can say, not a value of Python's.
_RAW_TEXTS = (
    "9" * 5000, "-" + "9" * 400, "1e999", "-0.0", "NaN", "[" * 3000, "{}{}", "!!python/object/apply:os.system [id]",
    "*nobody", "&name *name", "<<", "0x1F", ".inf", "12:30", "no", "~", "${HOME}", "${NOT_SET}", "${NOT_SET:-7}", "${",
    "|", "? x", "%TAG ! x", "---", "\t",
)  # fmt: skip
RAW: Mapping[str, str] = {f"rawtoken{number}end": text for number, text in enumerate(_RAW_TEXTS)}

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**63) - 1, 10**400,
    0.0, 0.5, 1.5, -2.5, 1e308, 5e-324, 1e-9,
    "", " ", "x", "0", "1.5", "true", "null", ".", "..", "../..", "../../../../etc/passwd", "/etc/passwd", "/dev/zero",
    "a/b", "a\\b", "-rf", "--help", "~", "~root", "$(id)", "`id`", "; id", "${HOME}", "${NOT_SET}", "$${x}",
    "a\x00b", "a\nb", "\x1b[2J\x1b]0;x\x07", "\u202eabc", "\ud800", "\U0001f525", "é" * 300, "x" * 5000,
    "<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "</svg>", "=1+1", "@x", "|", "# x", "a: b",
    "%s%n{0}",
    "12:30", "2026-07-14T10:00:00Z", "2026-02-30", "9999-12-31T23:59:59.999999Z", "0001-01-01T00:00:00+23:59", "1d",
    "6h",
    "nan", "inf", "pytorch", "vllm", "tensorrt", "gpt2", "float16", "float32", "cuda:0", "ci=2%",
    [], {}, [[]], [None], [0], ["x"], {"": None}, {"x": {"y": {}}}, ["a", "a"], [1, "x", None, [], {}], [1e308, 1e308],
    *RAW,
)  # fmt: skip

KEYS: tuple[str, ...] = (
    "", "x", "_extends", "model", "model_name", "name", "type", "schema_version", "grid.shared", "__class__", "0", "<<",
    "backend", "a\nb", "\ud800", "x" * 5000, "null", "true", "${HOME}", "../x", "rawtoken8end",
)  # fmt: skip

CHUNKS: tuple[bytes, ...] = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80", b"\xc2\x85", b"\xe2\x80\xa8", b"\r", b"\n",
    b"\n\n", b"\t", b" ", b"'", b'"', b":", b": ", b"- ", b"{", b"}", b"[", b"]", b",", b"#", b"&a ", b"*a", b"!",
    b"!!set ", b"|", b">", b"%", b"@", b"`", b"?", b"---\n", b"...\n", b"<<: ", b"${", b"\\", b"\\u", b"\\ud800",
    b"e9", b"0", b"-", b"1e999", b"null",
)  # fmt: skip

_NESTED = st.recursive(
    st.sampled_from(VALUES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=4,
)
# In a copy: what is drawn becomes part of a document that is changed further.
_VALUE = (st.sampled_from(VALUES) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12) | _NESTED).map(
    copy.deepcopy
)


@st.composite
def _changed(draw: Draw, originals: Sequence[Any]) -> Any:
    """One of the documents with one to three places changed."""
    document = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 3))):
        document = _change(draw, document)
    return document


def _change(draw: Draw, document: Any) -> Any:
    places = list(_places(document))
    place = places[draw(st.integers(0, len(places) - 1))]
    if not place:
        return draw(_VALUE) if len(places) == 1 or draw(st.integers(0, 9)) == 0 else document
    parent = _at(document, place[:-1])
    key: Any = place[-1]
    action = draw(st.sampled_from(("value", "value", "value", "remove", "rename", "add", "copy", "wrap", "number")))
    if action == "value":
        parent[key] = draw(_VALUE)
    elif action == "remove":
        del parent[key]
    elif action == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(KEYS)) or f"{key}s"] = parent.pop(key)
    elif action == "add" and isinstance(parent, dict):
        parent[draw(st.sampled_from(KEYS))] = draw(_VALUE)
    elif action == "copy":
        parent[key] = copy.deepcopy(_at(document, places[draw(st.integers(0, len(places) - 1))]))
    elif action == "wrap":
        parent[key] = draw(st.sampled_from(([parent[key]], {"x": parent[key]}, [parent[key], "x"])))
    elif isinstance(parent[key], (int, float)):
        parent[key] = draw(st.sampled_from((0, -parent[key], parent[key] * 1e6, str(parent[key]), float("1e300"))))
    return document


def _places(document: Any, at: Place = ()) -> Iterator[Place]:
    yield at
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from _places(value, (*at, key))


def _at(document: Any, place: Place) -> Any:
    for part in place:
        document = document[part]
    return document


def as_json(document: Any) -> bytes:
    """The document as JSON, the raw words in it without quotes."""
    return _with_raw(json.dumps(document).encode("ascii"), quote=b'"')


def _as_yaml(document: Any, *, flow: bool) -> bytes:
    text = yaml.safe_dump(document, sort_keys=False, default_flow_style=flow, width=100)
    return _with_raw(text.encode("utf-8", "surrogatepass"), quote=b"")


def _with_raw(data: bytes, quote: bytes) -> bytes:
    if b"rawtoken" in data:
        for word, text in RAW.items():
            data = data.replace(quote + word.encode() + quote, text.encode()).replace(word.encode(), text.encode())
    return data


@st.composite
def json_near(draw: Draw, *originals: Any) -> bytes:
    """JSON near one of the documents; one in eight is damaged as text."""
    return _sometimes_damaged(draw, as_json(draw(_changed(originals))))


@st.composite
def json_lines_near(draw: Draw, *originals: Sequence[Any]) -> bytes:
    """Lines of JSON near one of the lists of documents; one in eight is damaged as text."""
    lines = draw(_changed([list(item) for item in originals]))
    lines = lines if isinstance(lines, list) else [lines]
    return _sometimes_damaged(draw, b"".join(as_json(line) + b"\n" for line in lines))


@st.composite
def yaml_near(draw: Draw, *originals: Any) -> bytes:
    """YAML near one of the documents; one in eight is damaged as text."""
    document = draw(_changed(originals))
    try:
        data = _as_yaml(document, flow=draw(st.integers(0, 3)) == 0)
    except ValueError:  # an integer of more digits than Python prints
        data = b"campaign_name: x\n"
    return _sometimes_damaged(draw, data)


@st.composite
def text_near(draw: Draw, *originals: str) -> bytes:
    """Text near one of the originals: its lines moved, doubled, indented and mixed with hostile ones."""
    lines = draw(st.sampled_from(originals)).splitlines()
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(0, max(0, len(lines) - 1)))
        line = lines[number] if lines else ""
        action = draw(st.sampled_from(("double", "drop", "indent", "outdent", "value", "insert", "cell")))
        word = RAW.get(word := str(draw(st.sampled_from(VALUES))), word)
        before, colon, _ = line.partition(":")
        cells = line.split(",")
        cells[draw(st.integers(0, len(cells) - 1))] = word
        lines[number : number + 1] = {
            "double": [line, line],
            "drop": [],
            "indent": [f"  {line}"],
            "outdent": [line.removeprefix("  ")],
            "value": [f"{before}{colon} {word}"],
            "insert": [line, word],
            "cell": [",".join(cells)],
        }[action]
    return _sometimes_damaged(draw, "\n".join([*lines, ""]).encode("utf-8", "surrogatepass"))


@st.composite
def words_near(draw: Draw, *originals: str) -> bytes:
    """One to three words `key=value` near the originals, a line each."""
    words = []
    for _ in range(draw(st.integers(1, 3))):
        key, equals, value = draw(st.sampled_from(originals)).partition("=")
        parts = key.split(".")
        if draw(st.integers(0, 2)) == 0:
            parts[draw(st.integers(0, len(parts) - 1))] = draw(st.sampled_from(KEYS))
        if draw(st.integers(0, 4)) == 0:
            parts.insert(draw(st.integers(0, len(parts))), draw(st.sampled_from(KEYS)))
        shown = draw(_VALUE)
        if draw(st.integers(0, 3)):
            value = RAW.get(str(shown), json.dumps(shown) if isinstance(shown, (dict, list)) else _text(shown))
        words.append(f"{'.'.join(parts)}{equals if draw(st.integers(0, 9)) else ''}{value}")
    # No line of an argument, nor NUL: a program is never given one.
    return "\n".join(word.replace("\n", " ").replace("\x00", "") for word in words).encode("utf-8", "surrogatepass")


@st.composite
def arguments_near(draw: Draw, *originals: Sequence[str]) -> bytes:
    """The words of a command line near one of the originals, a line each."""
    words = list(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(1, len(words) - 1))
        value = RAW.get(text := _text(draw(_VALUE)), text)
        words[place : place + 1] = draw(
            st.sampled_from(([value], [value], [words[place], value], [], [words[place]] * 2))
        )
        if len(words) < 2:
            break
    return "\n".join(word.replace("\n", " ").replace("\x00", "") for word in words).encode("utf-8", "surrogatepass")


def _text(value: Any) -> str:
    try:
        return str(value)
    except ValueError:
        return "9" * 5000


@st.composite
def bytes_near(draw: Draw, *originals: bytes) -> bytes:
    """Bytes near one of the originals, or any bytes."""
    if draw(st.integers(0, 9)) == 0:
        data: bytes = draw(st.binary(max_size=200))
        return data
    return _damaged(draw, draw(st.sampled_from(originals)))


@st.composite
def gzipped(draw: Draw, inner: st.SearchStrategy[bytes]) -> bytes:
    """What the strategy gives, compressed; one in eight is damaged after that."""
    return _sometimes_damaged(draw, gzip.compress(draw(inner), compresslevel=1, mtime=0))


def _sometimes_damaged(draw: Draw, data: bytes) -> bytes:
    return _damaged(draw, data) if draw(st.integers(0, 7)) == 0 else data


def _damaged(draw: Draw, data: bytes) -> bytes:
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.sampled_from((0, 0, 1, 2, 8, 60))))
        action = draw(st.sampled_from(("insert", "insert", "drop", "cut", "double", "flip")))
        if action == "insert":
            data = data[:begin] + draw(st.sampled_from(CHUNKS)) + data[end:]
        elif action == "drop":
            data = data[:begin] + data[end:]
        elif action == "cut":
            data = data[:begin]
        elif action == "double":
            data = data[:end] + data[begin:]
        elif data[begin:]:
            data = data[:begin] + bytes([data[begin] ^ (1 << draw(st.integers(0, 7)))]) + data[begin + 1 :]
    return data
