from __future__ import annotations

from pathlib import Path

import pytest

from lem.worker.channel import TAIL_LINES, EngineLog, redact

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


def test_a_short_secret_is_not_looked_for():
    assert redact("a plain text", ["a"]) == "a plain text"
    assert redact(f"GET /?token={SECRET}", [SECRET]) == "GET /?token=[redacted]"


def test_the_log_holds_every_byte_and_the_tail_the_last_lines(tmp_path: Path):
    log = EngineLog(str(tmp_path / "log.txt"))
    lines = [f"line {number}" for number in range(100)]
    for line in lines:
        log.write(f"{line}\n".encode())
    log.write(b"caf\xe9")
    log.close()

    assert (tmp_path / "log.txt").read_bytes() == "\n".join([*lines, ""]).encode() + b"caf\xe9"
    assert log.tail.splitlines() == [*lines[-TAIL_LINES + 1 :], "caf�"]


def test_a_log_that_is_there_is_continued(tmp_path: Path):
    path = tmp_path / "log.txt"
    path.write_text("before\n")
    log = EngineLog(str(path))
    log.write(b"after\n")
    log.close()

    assert path.read_text() == "before\nafter\n"


def test_a_progress_bar_shows_its_last_state(tmp_path: Path):
    log = EngineLog(str(tmp_path / "log.txt"))
    log.write(b"Loading\n 10%\r 50%\r 90%\r")

    assert log.last_line == " 90%"
    assert log.tail == "Loading\n 90%"
    log.close()


def test_a_full_disk_costs_the_log_and_nothing_else():
    log = EngineLog("/dev/full")
    log.write(b"still told\n")
    log.close()

    assert log.tail == "still told"


def test_a_folder_that_is_not_there_is_told_at_once(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        EngineLog(str(tmp_path / "missing" / "log.txt"))
