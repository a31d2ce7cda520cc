"""`lem completion`: a script that lets a shell complete lem's commands, options and their values."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from lem.errors import ExitCode

__all__ = ["Command", "Option", "Value", "add_arguments", "commands_of", "run"]

SHELLS = ("bash", "zsh", "fish")

_FOLDERS = ("DIR",)
_FILES = ("FILE", "PLAN", "PROGRAM")

_HOW = """\
bash: lem completion bash > ~/.local/share/bash-completion/completions/lem
zsh:  lem completion zsh > a folder of $fpath/_lem
fish: lem completion fish > ~/.config/fish/completions/lem.fish
or, for this shell alone: eval "$(lem completion bash)" (zsh the same),
lem completion fish | source
"""


@dataclass(frozen=True)
class Value:
    """What can stand for a value: one of these words, a file, a folder, or, with none of these, anything."""

    name: str = ""
    choices: tuple[str, ...] = ()
    is_file: bool = False
    is_folder: bool = False


@dataclass(frozen=True)
class Option:
    """An option under all its names; `value` is None where it takes none."""

    names: tuple[str, ...]
    text: str
    value: Value | None
    is_repeatable: bool


@dataclass(frozen=True)
class Command:
    """A command of the tree.

    Attributes:
        path: the words that lead to it; () is lem itself.
        children: the word and the help of each sub-command.
        values: what stands without an option; None where nothing may.
    """

    path: tuple[str, ...]
    options: tuple[Option, ...]
    children: tuple[tuple[str, str], ...]
    values: Value | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `lem completion` takes."""
    parser.description = "Print a script that lets a shell complete lem's commands, options, and values."
    parser.epilog = _HOW
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:  # noqa: ARG001 - as every command is called
    """The exit code."""
    from lem.cli.completion_scripts import render
    from lem.cli.main import make_parser

    out.write(render(args.shell, tuple(commands_of(make_parser()))))
    return int(ExitCode.OK)


def commands_of(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[Command]:
    """The commands below a parser, itself first; those without a help text are not for people and left out."""
    # argparse has no public way to look at what a parser has.
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]  # noqa: SLF001
    below = [action for action in actions if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001
    children = tuple((item.dest, item.help or "") for action in below for item in action._choices_actions)  # noqa: SLF001
    positional = [action for action in actions if not action.option_strings and action not in below]
    yield Command(
        path,
        tuple(_option(action) for action in actions if action.option_strings),
        children,
        _value(positional[0]) if positional else None,
    )
    for action in below:
        for name, _ in children:
            yield from commands_of(action.choices[name], (*path, name))


def _option(action: argparse.Action) -> Option:
    text = (action.help or "").replace("%%", "%").replace("%(default)s", str(action.default))
    is_repeatable = isinstance(action, (argparse._AppendAction, argparse._CountAction))  # noqa: SLF001
    return Option(tuple(action.option_strings), text, None if action.nargs == 0 else _value(action), is_repeatable)


def _value(action: argparse.Action) -> Value:
    name = action.metavar if isinstance(action.metavar, str) else action.dest
    choices = tuple(map(str, action.choices or ()))
    return Value(name, choices, is_file=not choices and name in _FILES, is_folder=not choices and name in _FOLDERS)
