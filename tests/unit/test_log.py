"""Colour and redrawing belong on a terminal only."""

import io
import logging
import os

import pytest

from lem.base import log


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_environment_can_forbid_colour_and_redrawing(monkeypatch, name, value):
    assert log.Console(_Terminal()).is_colour
    monkeypatch.setenv(name, value)
    console = log.Console(_Terminal())
    assert (console.is_colour, console.is_live) == (False, False)


def test_a_pipe_gets_no_escape_codes():
    stream = io.StringIO()
    console = log.Console(stream)
    console.live("working")
    console.line(console.paint("done", "green"))
    console.close()
    assert stream.getvalue() == "done\n"


def test_a_line_is_written_above_the_live_line():
    stream = _Terminal()
    console = log.Console(stream)
    console.live("working")
    console.line("news")
    assert stream.getvalue() == "\r\x1b[2Kworking" + "\r\x1b[2Knews\nworking"


def test_a_reader_that_went_away_does_not_end_the_program():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    log.Console(Gone()).line("news")


def test_a_log_on_a_full_disk_costs_its_lines_alone(tmp_path):
    (tmp_path / "full.log").symlink_to("/dev/full")
    handler = log.log_to_file(tmp_path / "full.log")
    logging.getLogger("lem.test").warning("lost")
    logging.getLogger("lem").removeHandler(handler)
    handler.close()


@pytest.mark.parametrize(("verbosity", "seen"), [(-1, "e"), (0, "we"), (1, "iwe"), (2, "diwe")])
def test_verbosity_chooses_what_is_told(verbosity, seen):
    stream = io.StringIO()
    log.configure(log.Console(stream), verbosity=verbosity)
    logger = logging.getLogger("lem.test")
    for level, letter in ((10, "d"), (20, "i"), (30, "w"), (40, "e")):
        logger.log(level, letter)
    assert "".join(line[-1] for line in stream.getvalue().splitlines()) == seen


def test_a_log_file_takes_everything(tmp_path):
    log.configure(log.Console(io.StringIO()), verbosity=-1)
    handler = log.log_to_file(tmp_path / "deep" / "lem.log")
    logging.getLogger("lem.test").debug("a detail")
    logging.getLogger("lem").removeHandler(handler)
    handler.close()
    assert "Z DEBUG lem.test: a detail" in (tmp_path / "deep" / "lem.log").read_text()


def test_a_log_file_holds_names_that_are_no_utf_8_and_survives_a_full_disk(tmp_path, capsys):
    handler = log.log_to_file(tmp_path / "lem.log")
    assert isinstance(handler, logging.FileHandler)
    assert handler.stream is not None
    logging.getLogger("lem.test").info("%s", "r\udcff")
    handler.stream.close()  # whatever is written now fails, as on a full disk
    logging.getLogger("lem.test").info("lost")
    logging.getLogger("lem").removeHandler(handler)
    assert "r\\udcff" in (tmp_path / "lem.log").read_text()
    assert "Traceback" not in capsys.readouterr().err


def test_the_journal_gets_a_priority_a_line_and_no_clock(tmp_path, monkeypatch):
    with (tmp_path / "journal").open("w+") as stream:
        found = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        console = log.Console(stream)
        console.line("one\ntwo")
        log.configure(console, verbosity=0)
        logging.getLogger("lem.test").warning("careful")
        logging.getLogger("lem.test").error("broken")
        stream.seek(0)
        assert stream.read() == "<6>one\n<6>two\n<4>warning: careful\n<3>error: broken\n"
        monkeypatch.setenv("JOURNAL_STREAM", "1:2")
        assert not log.is_journal(stream)
    assert not log.is_journal(io.StringIO())
