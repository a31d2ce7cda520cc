"""A sample log as it is read while it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from lem.meters.samples import (
    CounterChange,
    CpuLoad,
    GpuHeader,
    PartReader,
    SampleHeader,
    SampleLogError,
    encode_header,
    encode_row,
    read_part,
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
        read_part(path)


def test_a_line_that_is_still_being_written_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path, line = tmp_path / "samples.part", encode_row(CpuLoad(5, 0.25))
    add(path, encode_header(HEADER) + "\n" + line[:6])
    reader = PartReader(path)
    assert reader.read().loads == ()
    add(path, line[6:] + "\n")
    assert reader.read().loads == (CpuLoad(5, 0.25),)
    assert reader.read() is reader.read()


def test_a_log_without_its_header_yet_is_none(tmp_path: Path) -> None:
    path = tmp_path / "samples.part"
    add(path, encode_header(HEADER))
    reader = PartReader(path)
    with pytest.raises(SampleLogError, match="header"):
        reader.read()
    add(path, "\n")
    assert reader.read().header == HEADER
