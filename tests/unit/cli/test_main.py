"""The top of the program, with streams as shells and terminals hand them over, in processes of its own."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.cli.main import COMMANDS, make_parser
from tests.command_rig import run_lem

ROOT = Path(__file__).resolve().parents[3]

CAMPAIGN = 'campaign_name: "Größe ≥ 日本 🎉"\nmodel: none\ngrid: {backends: [pytorch]}\nexecution: {cycles: 1}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CAMPAIGN, encoding="utf-8")
    return tmp_path


def started(*command: str, **how: Any) -> subprocess.CompletedProcess[bytes]:
    """A Python that has this tree; what it writes comes back as bytes."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **how.pop("environ", {})}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.run(command, env=environ, timeout=60, check=False, **pipes)


def lem(*words: str, redirection: str = "", **environ: str) -> subprocess.CompletedProcess[bytes]:
    shell = ("/bin/sh", "-c", f'exec "$@" {redirection}', "sh")
    return started(*shell, sys.executable, "-m", "lem", *words, environ=environ)


@pytest.mark.parametrize("words", [("--help",), ("config", "validate", "c.yaml"), ("campaign", "c.yaml", "--dry-run")])
def test_a_stream_that_cannot_hold_a_character_gets_its_escape(words: tuple[str, ...]) -> None:
    ended = lem(*words, PYTHONIOENCODING="ascii")
    assert (ended.returncode, b"bug:" in ended.stderr) == (0, False)
    assert b"\\u" in ended.stdout + ended.stderr
    (ended.stdout + ended.stderr).decode("ascii")


def test_json_is_json_in_every_encoding() -> None:
    out = lem("config", "validate", "--json", "c.yaml", PYTHONIOENCODING="iso8859-1").stdout.decode("iso8859-1")
    assert ("Größe" in out, json.loads(out)[0]["name"]) == (True, "Größe ≥ 日本 🎉")


def test_a_file_name_that_is_no_utf8_can_be_told(folder: Path) -> None:
    odd = os.fsdecode(b"c-\xff.yaml")
    (folder / "c.yaml").rename(folder / odd)
    ended = lem("config", "validate", odd)
    assert (ended.returncode, ended.stdout.split(b":")[0]) == (0, b"c-\\udcff.yaml")


@pytest.mark.parametrize(
    ("closed", "is_heard"),
    [("<&-", True), ("2>&-", True), (">&-", False), (">&- 2>&-", False), ("<&- >&- 2>&-", False)],
)
def test_a_closed_stream_is_one_without_a_reader(closed: str, is_heard: bool) -> None:
    ended = lem("campaign", "c.yaml", "--dry-run", redirection=closed)
    assert (ended.returncode, b"bug:" in ended.stderr) == (0, False)
    assert (b"experiments:" in ended.stdout) == is_heard


def test_no_file_takes_the_descriptor_of_a_closed_stream() -> None:
    code = (
        "import os, lem.cli.main, sys\n"
        "assert lem.cli.main.main(['presets']) == 0\n"
        "os.write(os.open('opened-later', os.O_WRONLY | os.O_CREAT), b'file\\n')\n"
        "os.write(1, b'for stdout\\n')\n"
        "os.write(2, b'for stderr\\n')\n"
    )
    assert started("/bin/sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", code).returncode == 0
    assert Path("opened-later").read_text(encoding="utf-8") == "file\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full: /dev/full")
@pytest.mark.parametrize("words", [("presets",), ("config", "fields")])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_an_error_in_words(words: tuple[str, ...], unbuffered: str) -> None:
    ended = lem(*words, redirection=">/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert ended.stderr == b"error: cannot write the output: no space left on device\n"
    assert ended.returncode == 2


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = started(sys.executable, "-m", "lem", "config", "fields", stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_bug_is_told_where_no_file_can_be_written() -> None:
    code = (
        "import sys, tempfile, lem.cli.main\n"
        "tempfile.tempdir = '/nowhere/at/all'\n"
        "sys.modules['lem.cli.host'] = object()\n"  # a command without `add_arguments`
        "sys.exit(lem.cli.main.main(['presets']))\n"
    )
    ended = started(sys.executable, "-c", code)
    assert ended.returncode == 70
    assert b"Traceback" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(b"bug: AttributeError: ")


def test_a_current_folder_that_is_gone_is_told(folder: Path) -> None:
    code = (
        "import shutil, sys\n"
        f"shutil.rmtree({str(folder)!r})\n"
        "from lem.cli.main import main\n"
        "sys.exit(main(['doctor']))\n"
    )
    ended = started(sys.executable, "-c", code)
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"error: the current folder no longer exists\n")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE])
def test_a_file_that_the_host_refuses_is_no_bug(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise OSError(code, os.strerror(code), "results/demo")

    monkeypatch.setattr(Path, "is_dir", refuse)  # as it does for a folder that may not be entered
    ended = run_lem("merge", "results", "--output", "merged")
    assert ended.code == 2
    assert ended.err.startswith(f"error: results/demo: {os.strerror(code).lower()}\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("campain", "c.yaml"), "unknown command 'campain' (did you mean 'campaign'?)"),
        (("campaign", "c.yaml", "--cycels=3"), "lem campaign: unknown option '--cycels' (did you mean '--cycles'?)"),
        (("config", "show", "--jsn", "c.yaml"), "lem config show: unknown option '--jsn' (did you mean '--json'?)"),
        (("experiment", "e.yaml", "--dry"), "lem experiment: unknown option '--dry' (did you mean '--dry-run'?)"),
        (("datasets", "gsm8k"), "lem datasets: unexpected argument 'gsm8k'"),
        (("campaign", "c.yaml", "--resume", "--fresh"), "lem campaign: argument --fresh: not allowed with"),
        (("campaign", "c.yaml", "--cycles", "many"), "lem campaign: argument --cycles/-c: invalid int value: 'many'"),
        (("config", "shwo"), "lem config: argument ACTION: invalid choice: 'shwo'"),
        (("-q",), "lem: the following arguments are required: COMMAND"),
        (("help", "campain"), "unknown command 'campain' (did you mean 'campaign'?)"),
        (("check", "demo", "-o", "x"), "lem check: unknown option '-o' (did you mean '--results-dir'?)"),
        (("merge", "a", "--output", "b", "-o", "x"), "lem merge: unknown option '-o' (did you mean '--output'?)"),
    ],
)
def test_a_word_that_is_wrong_is_named_with_the_command_and_what_was_meant(
    words: tuple[str, ...], expected: str
) -> None:
    code, out, err = run_lem(*words)
    assert (code, out) == (2, "")
    error, hint = err.splitlines()
    assert error.startswith(f"error: {expected}")
    assert hint.startswith("hint: see `lem ")


@pytest.mark.parametrize(
    ("words", "commands"), [(["--help"], set()), (["--version"], set()), (["check", "--help"], {"check"})]
)
def test_only_the_module_of_the_command_at_hand_is_imported(words: list[str], commands: set[str]) -> None:
    code = (
        "import io, sys\n"
        "from lem.cli.main import COMMANDS, main\n"
        f"assert main({words!r}, io.StringIO(), io.StringIO()) == 0\n"
        "print(*(name for name in COMMANDS if f'lem.cli.{name}' in sys.modules))\n"
    )
    assert set(started(sys.executable, "-c", code).stdout.decode().split()) == commands


def test_a_name_that_is_too_long_for_a_file_is_told_where_it_is_named(folder: Path) -> None:
    ended = lem("status", "x" * 5000)
    assert (ended.returncode, b"bug:" in ended.stderr) == (2, False)
    assert b"x: file name too long" in ended.stderr.replace("…".encode(), b"x")
    (folder / "c.yaml").write_text(f"_extends: {'x' * 5000}\nmodel: gpt2\n", encoding="utf-8")
    ended = lem("config", "validate", "c.yaml")
    assert (ended.returncode, b"c.yaml:1:11: _extends: x" in ended.stderr) == (2, True)


def test_without_a_command_lem_shows_how_to_start() -> None:
    shown = run_lem()
    assert shown == run_lem("help")
    assert (shown.code, shown.err) == (0, "")
    commands = re.findall(r"^  lem ([a-z]+)", shown.out, re.MULTILINE)
    assert set(commands) <= set(COMMANDS)
    assert {"doctor", "experiment", "campaign", "report"} <= set(commands)
    assert max(map(len, shown.out.splitlines())) <= 80


@pytest.mark.parametrize("words", [("campaign",), ("results", "export"), ("help",)])
def test_help_of_a_command_is_that_of_the_option(words: tuple[str, ...]) -> None:
    assert run_lem("help", *words) == run_lem(*words, "--help")


def _options(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from _options(child, (*path, name))
        elif "-o" in action.option_strings:
            yield " ".join(path), action


def test_the_short_option_o_has_two_meanings_and_no_third() -> None:
    assert {name: action.option_strings for name, action in _options(make_parser())} == {
        "campaign": ["--results-dir", "-o"],
        "experiment": ["--results-dir", "-o"],
        "measure": ["--results-dir", "-o"],
        "report": ["--output", "-o"],
        "trend": ["--output", "-o"],
        "results export": ["--output", "-o"],
    }


def test_what_lem_suggests_can_be_copied_from_every_way_to_start_it(folder: Path) -> None:
    ended = lem("campaign", "c.yaml", "--dry-run", "--executor", "local")
    last = ended.stderr.decode().splitlines()[-1]
    assert last == f"next: {shlex.join([sys.executable, '-m', 'lem', 'campaign', 'c.yaml', '--executor', 'local'])}"
    assert b"next:" not in lem("campaign", "c.yaml", "--dry-run", "--executor", "local", "-q").stderr
    program = folder / "bin" / "lem"
    program.parent.mkdir()
    program.write_text("import lem.__main__\nlem.__main__.run()\n", encoding="utf-8")
    program.chmod(0o755)
    command = (sys.executable, str(program), "config", "validate", "c.yaml")
    for path, words in ((os.environ["PATH"], command[:2]), (f"{program.parent}:{os.environ['PATH']}", ("lem",))):
        last = started(*command, environ={"PATH": path}).stderr.decode().splitlines()[-1]
        assert last == f"next: {shlex.join([*words, 'campaign', 'c.yaml', '--dry-run'])}"


def test_help_is_shown_where_argparse_checks_the_help_of_each_command(monkeypatch: pytest.MonkeyPatch) -> None:
    add = argparse._SubParsersAction.add_parser

    def add_and_check(self: Any, name: str, **settings: Any) -> Any:  # as since Python 3.14
        parser = add(self, name, **settings)
        parser._check_help(self._choices_actions[-1])
        return parser

    monkeypatch.setattr(argparse._SubParsersAction, "add_parser", add_and_check)
    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", lambda *_: None, raising=False)
    assert "campaign" in make_parser(()).format_help()
