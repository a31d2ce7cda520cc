"""A sample log as it is read while it is written."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from pathlib import Path

import pytest

from lem.meters.samples import (
    CounterChange,
    CpuLoad,
    GpuHeader,
    Mark,
    MeterError,
    PartReader,
    SampleHeader,
    SampleLog,
    SampleLogError,
    encode_header,
    encode_row,
    read_finished,
    write_finished,
)

HEADER = SampleHeader(1, "2026-01-01T00:00:00+00:00", "host", 100, (GpuHeader(0, "GPU-1", "H200", "575"),))


def add(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_what_was_read_before_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "samples.part"
    add(path, encode_header(HEADER) + "\n" + encode_row(CpuLoad(5, None)) + "\n")
    reader = PartReader(path)
    assert reader.read().loads == (CpuLoad(5, None),)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"x" * size)  # whoever looks there again finds no log
    add(path, encode_row(CounterChange(0, 5, 6, 7)) + "\n")
    log = reader.read()
    assert (log.header, log.loads, log.counters) == (HEADER, (CpuLoad(5, None),), (CounterChange(0, 5, 6, 7),))
    with pytest.raises(SampleLogError):
        PartReader(path).read()


def test_a_line_that_is_still_being_written_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path, line = tmp_path / "samples.part", encode_row(CpuLoad(5, 0.25))
    add(path, encode_header(HEADER))
    reader = PartReader(path)
    with pytest.raises(SampleLogError, match="header"):
        reader.read()
    add(path, "\n" + line[:6])
    assert reader.read().loads == ()
    add(path, line[6:] + "\n")
    assert reader.read().loads == (CpuLoad(5, 0.25),)
    assert reader.read() is reader.read()


def test_rows_that_arrive_do_not_have_the_others_copied(tmp_path: Path) -> None:
    path, count = tmp_path / "samples.part", 10_000
    add(path, encode_header(HEADER) + "\n")
    add(path, "".join(f"{encode_row(CounterChange(0, at, at + 1, at))}\n" for at in range(count)))
    reader = PartReader(path)
    before = reader.read()
    tracemalloc.start()
    for at in range(20):
        add(path, encode_row(CounterChange(0, count + at, count + at + 1, at)) + "\n")
        add(path, encode_row(CpuLoad(2 * count + at, 0.5)) + "\n")
        assert reader.latest_ns([CounterChange]) == count + at + 1
        assert reader.latest_ns([CounterChange, CpuLoad]) == 2 * count + at
    _, peak_b = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_b < sys.getsizeof(before.counters)
    assert reader.latest_ns([MeterError]) == HEADER.started_ns
    counters = reader.read().counters
    assert len(counters) == count + 20
    add(path, encode_row(CpuLoad(3 * count, 0.5)) + "\n")
    assert reader.read().counters is counters
    assert len(reader.read().loads) == 21


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('["l",5]', "CpuLoad: expected 2 values, got 1"),
        ('["l","5",null]', "CpuLoad.at_ns: expected an integer, got '5'"),
        ('["c",1,5,6,7]', "a row of device 1, which is not in the header"),
        ('["r",0,5,6]', "a row of device 0, which is not in the header"),
        ('["s",-1,5,null,null,null,null,null,null]', "a row of device -1, which is not in the header"),
        ('["l",5,1e999]', "CpuLoad: inf is out of range"),
        ('["z"]', "unknown kind of row: 'z'"),
        ("[[1]]", "unknown kind of row: "),
        ("7", ""),
        ("[]", ""),
        ("[" * 100_000, ""),
    ],
)
def test_a_row_that_is_none_is_refused_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "samples.part"
    add(path, f"{encode_header(HEADER)}\n{encode_row(CpuLoad(5, None))}\n{line}\n")
    with pytest.raises(SampleLogError) as found:
        PartReader(path).read()
    assert str(found.value).startswith(f"{path}:3: not a sample log: {said}")


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 99},
        {"interval_ms": -1},
        {"interval_ms": 10**30},
        {"interval_ms": "1"},
        {"gpus": [7]},
        {"gpus": None},
        {"x": 1},
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "samples.part"
    add(path, json.dumps({**json.loads(encode_header(HEADER)), **change}) + "\n")
    with pytest.raises(SampleLogError, match=":1: not a sample log: "):
        PartReader(path).read()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no gzip",
        *(gzip.compress(text, mtime=0) for text in (b"[]\n", b'{"marks":[["a",1]]}\n')),
        gzip.compress(b"x", mtime=0)[:-9],
    ],
    ids=["empty", "no gzip", "no marks", "half a mark", "cut off"],
)
def test_a_finished_log_that_is_none_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "samples.jsonl.gz"
    path.write_bytes(data)
    with pytest.raises(SampleLogError, match="not a finished sample log"):
        read_finished(path)


def test_the_log_of_an_attempt_beside_which_no_sampler_ran_can_be_read_again(tmp_path: Path) -> None:
    # It has the pair of clocks by which a meter of the user's own is aligned.
    log = SampleLog(SampleHeader(5, "2026-01-01T00:00:00+00:00", "here", 0, gpu_error="no driver"))
    write_finished(tmp_path / "log", log, [Mark("window", 6, 7)])
    assert read_finished(tmp_path / "log") == (log, (Mark("window", 6, 7),))


def finished(folder: Path) -> tuple[Path, int]:
    """A finished log of a thousand readings, and its size when unpacked."""
    path = folder / "samples.jsonl.gz"
    write_finished(path, SampleLog(HEADER, loads=tuple(CpuLoad(number, 0.5) for number in range(1000))), [])
    return path, len(gzip.decompress(path.read_bytes()))


LAST_LINE_B = len(encode_row(CpuLoad(999, 0.5))) + 1


@pytest.mark.parametrize("fewer_b", [1, LAST_LINE_B, 4000])
def test_a_log_above_the_limit_is_an_error_that_names_the_limit(tmp_path: Path, fewer_b: int) -> None:
    path, size_b = finished(tmp_path)
    assert len(read_finished(path, most_b=size_b)[0].loads) == 1000
    with pytest.raises(SampleLogError) as found:
        read_finished(path, most_b=size_b - fewer_b)
    assert str(found.value).startswith(f"{path}: more than {size_b - fewer_b} bytes ")


def test_rows_of_one_error_over_and_over_are_read_and_rows_made_to_fill_the_memory_are_not(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl.gz"
    errors = tuple(MeterError(10**15 + number * 20_000_000, "gpu0.power", "x" * 300) for number in range(30_000))
    write_finished(path, SampleLog(HEADER, errors=errors), [])
    size_b = len(gzip.decompress(path.read_bytes()))
    assert size_b > 8 * 2**20
    assert size_b / path.stat().st_size > 40
    assert len(read_finished(path)[0].errors) == 30_000

    lines = [b'{"marks":[]}', encode_header(HEADER).encode(), *[encode_row(CpuLoad(1, 0.5)).encode()] * 300_000]
    path.write_bytes(gzip.compress(b"\n".join(lines), compresslevel=9))
    most_b = 2**20 + 120 * path.stat().st_size
    assert most_b < len(b"\n".join(lines))
    tracemalloc.start()
    with pytest.raises(SampleLogError, match=f"more than {most_b} bytes when unpacked"):
        read_finished(path)
    assert tracemalloc.get_traced_memory()[1] < 40 * most_b
    tracemalloc.stop()


def test_one_endless_line_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"marks":[' + b" " * (64 * 2**20)))
    tracemalloc.start()
    with pytest.raises(SampleLogError):
        read_finished(path)
    assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    tracemalloc.stop()
