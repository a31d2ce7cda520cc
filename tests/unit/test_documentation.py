"""What can be told of the documentation without running it: links, files, messages, and what each page promises."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lem.base.errors import UserError
from lem.base.reasons import TEXTS
from lem.cli.main import make_parser
from lem.config import introspection
from lem.config.load import load_campaign, load_experiment
from lem.record import Record
from lem.results.metrics import METRIC_BY_NAME, parse_comparable
from lem.results.rows import make_table
from lem.results.store import StoredResult
from tests.documentation import ROOT, blocks, commands, files, links, pages, prose
from tests.records import make_record

ALL_PAGES = (*pages(), ROOT / "SECURITY.md", *sorted(ROOT.glob("tests/*/README.md")))
NAMES = [str(page.relative_to(ROOT)) for page in ALL_PAGES]
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"

_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_ENTRY = re.compile(r"^- (?P<messages>`.*?) — ", re.MULTILINE | re.DOTALL)
_ELLIPSIS = "…"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(prose(page)))
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_within_the_project_leads_somewhere(name: str) -> None:
    page = ROOT / name
    dead = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        is_there = target.exists() and target.is_relative_to(ROOT)
        if not is_there or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        within = [link.partition("#")[0] for link in links(page) if not re.match(r"[a-z]+:", link)]
        found = {(page.parent / link).resolve() for link in within}
        waiting += [path for path in found if path.suffix == ".md" and path not in reached]
    assert {page.name for page in pages() if page not in reached} == set()


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_file_that_is_shown_is_valid(page: Path, tmp_path: Path) -> None:
    for name, block in files(page).items():
        (tmp_path / name).write_text(block.text, encoding="utf-8")
    for block in blocks(page):
        if block.language in ("yaml", "yml"):
            assert block.file, f"{block}: name the file in a comment above it, or use a block without a language"
            load = load_campaign if "campaign_name:" in block.text else load_experiment
            load(tmp_path / block.file)


@functools.cache
def messages() -> tuple[str, ...]:
    """Every text in the program, with an ellipsis for what is filled in."""
    found = list(TEXTS.values())
    for path in sorted((ROOT / "lem").rglob("*.py")):
        if "_vendor" not in path.parts:
            found += [_text(node) for node in ast.walk(ast.parse(path.read_bytes())) if _is_text(node)]
    return tuple(found)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else _ELLIPSIS


def explained() -> Iterator[str]:
    for entry in _ENTRY.finditer(prose(TROUBLESHOOTING)):
        yield from re.findall(r"`([^`]+)`", " ".join(entry["messages"].split()))


def test_every_message_that_is_explained_is_one_of_the_program() -> None:
    asked = tuple(explained())
    assert len(asked) > 50
    lost = []
    for message in asked:
        pieces = [re.escape(piece.strip()) for piece in message.split(_ELLIPSIS) if piece.strip()]
        pattern = re.compile(".*".join(pieces), re.DOTALL)
        if not any(pattern.search(text) for text in messages()):
            lost.append(message)
    assert lost == []


def test_every_section_of_the_record_is_described() -> None:
    table = prose(ROOT / "docs" / "measurement.md").partition("## The record")[2].partition("\n## ")[0]
    told = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    assert told == [item.name for item in dataclasses.fields(Record)]


def test_commands_are_marked_so_that_they_are_run() -> None:
    assert all(any(True for _ in commands(page)) for page in pages() if page.name in ("README.md", "campaigns.md"))


def test_no_page_names_a_folder_of_somebodys_machine() -> None:
    found = [
        f"{page.name}:{number}"
        for page in pages()
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"(^|[\s`(])/(home|root|work|Users|tmp)/", line)
    ]
    assert found == []


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def test_every_command_says_what_it_does_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for parser in parsers(make_parser()):
        assert parser.description, parser.prog
        assert [line for line in parser.format_help().splitlines() if len(line) > 80] == [], parser.prog
        for action in parser._actions:
            is_told = action.help or isinstance(action, argparse._SubParsersAction)
            assert is_told, f"{parser.prog}: {action.dest}"


def _expanded(name: str) -> Iterator[str]:
    """The names that `a_{b,c}` stands for, as in a shell."""
    head, brace, rest = name.partition("{")
    choices, _, tail = rest.partition("}")
    if not brace:
        yield name
    for choice in choices.split(",") if brace else ():
        yield from _expanded(f"{head}{choice}{tail}")


def _names(page: str) -> set[str]:
    """The names of data on a page: words with an underscore, in code or in a command."""
    of_commands = [command.text for command in commands(ROOT / "docs" / page)]
    spans = [*re.findall(r"`([^`\n]+)`", prose(ROOT / "docs" / page)), *of_commands]
    words = (word for span in spans for word in re.findall(r"[\w{},.…]*_[\w{},.…]*", span))
    return {name for word in words for name in _expanded(word)}


@pytest.mark.parametrize("page", ["results.md", "compare.md"])
def test_pages_on_results_use_only_names_that_exist(page: str) -> None:
    exported = make_table([StoredResult("x", make_record())]).columns
    campaign = {*introspection.get_campaign_params(), *introspection.get_experiment_params()}
    known = {*METRIC_BY_NAME, *exported, *campaign, *(name.rpartition(".")[2] for name in campaign)}
    named = {part for name in _names(page) for part in name.split(",") if "_" in part}
    assert len(named) > 2
    assert {name for name in named if name not in known and f"requested.{name}" not in known} == set()


def test_the_page_on_comparisons_has_every_metric_that_can_be_compared() -> None:
    named = _names("compare.md")
    outdated = {name for name in METRIC_BY_NAME if name.startswith("itl_")}  # of old results
    assert {name for name in METRIC_BY_NAME if _is_comparable(name)} - outdated - named == set()


def _is_comparable(name: str) -> bool:
    try:
        parse_comparable(name)
    except UserError:
        return False
    return True
