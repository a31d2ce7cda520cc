"""`lem completion`: what the shells themselves make of the scripts."""

from __future__ import annotations

import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lem.cli.completion import answer
from lem.cli.main import COMMANDS
from tests.command_rig import run_lem

TIMEOUT_S = 120
ROOT = Path(__file__).resolve().parents[3]
ENVIRON = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TERM": "dumb"}


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    return {shell: run_lem("completion", shell).out for shell in ("bash", "zsh", "fish")}


@pytest.fixture
def folder(tmp_path: Path, scripts: dict[str, str]) -> Path:
    """A working directory with a file and a folder in it, and the scripts and lem itself beside it."""
    (tmp_path / "bin").mkdir()
    own = tmp_path / "bin" / "lem"
    own.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m lem "$@"\n', encoding="utf-8")
    own.chmod(0o755)
    for shell, script in scripts.items():
        (tmp_path / f"lem.{shell}").write_text(script, encoding="utf-8")
    work = tmp_path / "work"
    (work / "mine").mkdir(parents=True)
    (work / "my campaign.yaml").touch()
    (work / "my-plan.json").touch()
    return work


def in_bash(line: str, folder: Path) -> list[str]:
    """What bash offers at the end of a line, which it has split as it does."""
    words = line.replace("=", " = ").split(" ")
    code = (
        f"source ../lem.bash; complete -p lem | grep -q -- '-F _lem lem$' || exit 9; compopt() {{ :; }}\n"
        f"COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}\n"
        'COMPREPLY=(); _lem; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return said_by(["bash", "--norc", "--noprofile", "-c", code], folder)


def in_fish(line: str, folder: Path) -> list[str]:
    code = f"source ../lem.fish; complete -C {shlex.quote(line)}"
    return [found.partition("\t")[0] for found in said_by(["fish", "--no-config", "-c", code], folder)]


def environ_of(folder: Path) -> dict[str, str]:
    return {**ENVIRON, "PATH": f"{folder.parent / 'bin'}:{ENVIRON['PATH']}"}


def said_by(command: list[str], folder: Path) -> list[str]:
    environ = {**environ_of(folder), "HOME": str(folder.parent)}
    ended = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return [found for found in ended.stdout.splitlines() if found]


def in_zsh(line: str, folder: Path) -> str:
    """The line after Tab, in a zsh on a terminal; it writes down what it has before it leaves."""
    (folder.parent / ".zshrc").write_text(
        "autoload -Uz compinit; compinit -u -D\nsource ../lem.zsh\n"
        "keep() { print -r -- $BUFFER > ../buffer; exit 0 }\nzle -N keep\nbindkey '^X' keep\n"
    )
    ours, theirs = pty.openpty()
    environ = {**environ_of(folder), "HOME": str(folder.parent), "ZDOTDIR": str(folder.parent)}
    os.write(ours, f"{line}\t\x18".encode())  # in order, whenever zsh gets to it
    child = subprocess.Popen(
        ["zsh", "-d", "-i"], cwd=folder, env=environ, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    try:
        while os.read(ours, 4096):
            pass
    except OSError:  # EIO: zsh has left its terminal
        pass
    finally:
        child.wait(TIMEOUT_S)
        os.close(ours)
    return (folder.parent / "buffer").read_text().rstrip("\n")


def test_every_command_for_people_is_offered_and_flags_come_with_their_help() -> None:
    kind, *lines = answer([""])
    assert (kind, {line.partition("\t")[0] for line in lines}) == ("words", set(COMMANDS) - {"worker"})
    assert [*answer(["results", "export", "--att"])] == [
        "words",
        "--attempts\tused: one row per experiment, its last valid attempt or else its last; all: one row per attempt",
    ]


def test_campaigns_with_results_are_offered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "results" / "night").mkdir(parents=True)
    for words in (["check", ""], ["compare", "n"], ["results", "show", "ni"], ["report", ""]):
        assert [*answer(words)] == ["words", "night"]


CASES = [
    ("lem camp", ["campaign"]),
    ("lem results ", ["export", "list", "recompute", "show"]),
    ("lem results exp", ["export"]),
    ("lem -q config va", ["validate"]),
    ("lem campaign --executor ", ["auto", "docker", "local"]),
    ("lem campaign c.yaml --structure sh", ["shuffled"]),
    ("lem completion ", ["bash", "fish", "zsh"]),
    ("lem results export --form", ["--format"]),
    ("lem campaign --model ", []),
    ("lem worker --eng", []),
    ("lem --", ["--help", "--no-color", "--quiet", "--verbose", "--version"]),
]


FILES = ["my campaign.yaml", "my-plan.json"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        *CASES,
        ("lem campaign my", FILES),
        ("lem campaign --results-dir m", ["mine"]),
        ("lem campaign --executor=lo", ["local"]),
    ],
)
def test_bash_offers_what_fits(folder: Path, line: str, offered: list[str]) -> None:
    assert sorted(in_bash(line, folder)) == offered


@pytest.mark.needs("fish")
@pytest.mark.parametrize(("line", "offered"), [*CASES, ("lem campaign --results-dir m", ["mine/"])])
def test_fish_offers_what_fits(folder: Path, line: str, offered: list[str]) -> None:
    assert sorted(in_fish(line, folder)) == offered


@pytest.mark.needs("fish")
def test_fish_offers_files(folder: Path) -> None:
    assert set(FILES) <= set(in_fish("lem campaign my", folder))


@pytest.mark.needs("zsh")
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("lem camp", "lem campaign "),
        ("lem results exp", "lem results export "),
        ("lem -q config va", "lem -q config validate "),
        ("lem campaign --executor lo", "lem campaign --executor local "),
        ("lem campaign c.yaml --structure sh", "lem campaign c.yaml --structure shuffled "),
        ("lem results export --form", "lem results export --format "),
        ("lem campaign --results-dir m", "lem campaign --results-dir mine/"),
        ("lem campaign my\\ c", "lem campaign my\\ campaign.yaml "),
        ("lem worker --eng", "lem worker --eng"),
    ],
)
def test_zsh_completes_what_fits(folder: Path, line: str, completed: str) -> None:
    assert in_zsh(line, folder) == completed


@pytest.mark.parametrize("word", ["extra", "--help"])
def test_what_follows_the_shell_is_refused(word: str) -> None:
    ended = run_lem("completion", "bash", word)
    assert (ended.code, ended.out) == (2, "")
    assert f"unexpected argument {word!r}" in ended.err
