"""The documentation as tests see it: its commands, the files and links in it, and the messages that it explains.

A block of commands is marked ```sh, or begins with the name of a program. A YAML file that commands use has its name in
a comment above it, which readers do not see: <!-- file: my.yaml -->
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Block", "Command", "blocks", "commands", "files", "links", "pages", "prose"]

ROOT = Path(__file__).resolve().parents[1]
MARKED = "sh"

_PROGRAMS = ("ansible-playbook", "cp", "docker", "journalctl", "lem", "make", "pip", "python3", "systemctl")
_BLOCK = re.compile(
    r"^(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_COMMENT = re.compile(r"(^|\s+)# .*$")
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)|<img [^>]*src=\"(?P<source>[^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """Text between two fences.

    Attributes:
        line: of the first line in it.
        file: the name of the file that it is, for the commands of the page.
    """

    page: Path
    line: int
    language: str
    text: str
    file: str | None

    @property
    def is_commands(self) -> bool:
        """Whether its lines are typed into a shell."""
        first = self.text.split(maxsplit=1)[:1]
        return self.language == MARKED or (not self.language and bool(first) and first[0] in _PROGRAMS)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command line, without its comment."""

    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


def pages() -> tuple[Path, ...]:
    """The pages for people who use the program."""
    return (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks(page: Path) -> tuple[Block, ...]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return tuple(
        Block(page, text.count("\n", 0, found.start("text")) + 1, found["language"], found["text"], found["file"])
        for found in _BLOCK.finditer(text)
    )


def commands(page: Path) -> Iterator[Command]:
    """The command lines of a page, in order; one that ends with a backslash goes on in the next line."""
    for block in blocks(page):
        if not block.is_commands:
            continue
        held = ""
        for number, line in enumerate(block.text.splitlines(), block.line):
            whole = held + _COMMENT.sub("", line).strip()
            held = whole[:-1] if whole.endswith("\\") else ""
            if whole and not held:
                yield Command(page, number, whole)


def files(page: Path) -> dict[str, Block]:
    """The files that the commands of a page may use: those of all pages, its own first."""
    found = {block.file: block for other in pages() for block in blocks(other) if block.file}
    return found | {block.file: block for block in blocks(page) if block.file}


def prose(page: Path) -> str:
    """A page without its blocks."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[str]:
    """Where a page leads to, pictures too."""
    for found in _LINK.finditer(prose(page)):
        yield found["target"] or found["source"]
