"""`lem completion`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from lem.cli.main import make_parser

_PROGRAMS = ("lem", "lem.pyz")
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
    """What an argument takes: one of these words, a file, a folder, or, with none of these, anything."""

    name: str = ""
    choices: tuple[str, ...] = ()

    def path(self, file: str, folder: str) -> str:
        """How a shell completes it, if it is the path of a file or a folder; else empty."""
        return "" if self.choices else file if self.name in _FILES else folder if self.name == "DIR" else ""


@dataclass(frozen=True)
class Flag:
    """An option of a command under all its names."""

    names: tuple[str, ...]
    text: str
    value: Value | None  # None where it takes none
    is_repeatable: bool


@dataclass(frozen=True)
class Command:
    path: tuple[str, ...]  # the words that lead to it; () is lem itself
    flags: tuple[Flag, ...]
    children: tuple[tuple[str, str], ...]  # the word and the help of each sub-command
    values: Value | None  # positional arguments; None where it takes none

    @property
    def words(self) -> str:
        return " ".join(self.path)

    @property
    def key(self) -> str:
        """The path to the parent and the next word, by which a script knows that it is on the way to this command."""
        return f"{' '.join(self.path[:-1])} {self.path[-1]}"


def add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print a script that lets a shell complete lem's commands, options, and values."
    parser.epilog = _HOW
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=tuple(_SHELLS), metavar="SHELL", help=", ".join(_SHELLS))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, _err: TextIO) -> None:
    out.write(_SHELLS[args.shell](tuple(commands_of(make_parser()))))


def commands_of(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[Command]:
    """The commands below a parser, itself first, without those that have no help text, which are internal."""
    # argparse has no public way to list the arguments of a parser.
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]  # noqa: SLF001
    below = [action for action in actions if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001
    children = tuple((item.dest, item.help or "") for action in below for item in action._choices_actions)  # noqa: SLF001
    positional = [action for action in actions if not action.option_strings and action not in below]
    flags = tuple(map(_flag, (action for action in actions if action.option_strings)))
    yield Command(path, flags, children, _value(positional[0]) if positional else None)
    for action in below:
        for name, _ in children:
            yield from commands_of(action.choices[name], (*path, name))


def _flag(action: argparse.Action) -> Flag:
    text = (action.help or "").replace("%%", "%").replace("%(default)s", str(action.default))
    is_repeatable = isinstance(action, (argparse._AppendAction, argparse._CountAction))  # noqa: SLF001
    return Flag(tuple(action.option_strings), text, None if action.nargs == 0 else _value(action), is_repeatable)


def _value(action: argparse.Action) -> Value:
    name = action.metavar if isinstance(action.metavar, str) else action.dest.rpartition(".")[2]
    return Value(name, tuple(map(str, action.choices or ())))


# bash

_BASH_HEAD = """\
# bash completion for lem, made by `lem completion bash`
_lem() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} path= index
    # bash takes --option=value apart at the =.
    if [[ $current == = ]]; then current=; elif [[ $previous == = ]]; then previous=${COMP_WORDS[COMP_CWORD-2]}; fi
    for ((index = 1; index < COMP_CWORD; index++)); do
        case "$path ${COMP_WORDS[index]}" in
"""
_BASH_MIDDLE = """\
        esac
    done
    COMPREPLY=()
    case "$path $previous" in
"""


def _bash(commands: Sequence[Command]) -> str:
    paths, values, words = [], [], []
    for command in commands:
        if command.path:
            paths.append(f"            {shlex.quote(command.key)}) path={shlex.quote(command.words)} ;;\n")
        for flag in command.flags:
            if flag.value is not None:
                keys = "|".join(shlex.quote(f"{command.words} {name}") for name in flag.names)
                values.append(f"    {keys}) {_bash_reply(flag.value)}; return ;;\n")
        flags = _bash_reply(Value(choices=tuple(name for flag in command.flags for name in flag.names)))
        own = _bash_reply(command.values or Value(choices=tuple(name for name, _ in command.children)))
        words.append(f"    {shlex.quote(command.words)}) if [[ $current == -* ]]; then {flags}; else {own}; fi ;;\n")
    tail = f"    esac\n}}\ncomplete -F _lem {' '.join(_PROGRAMS)}\n"
    return "".join([_BASH_HEAD, *paths, _BASH_MIDDLE, *values, '    esac\n    case "$path" in\n', *words, tail])


def _bash_reply(value: Value) -> str:
    if kind := value.path("-f", "-d"):
        return f'compopt -o filenames; mapfile -t COMPREPLY < <(compgen {kind} -- "$current")'
    if not value.choices:
        return ":"
    return f'mapfile -t COMPREPLY < <(compgen -W {shlex.quote(" ".join(value.choices))} -- "$current")'


# zsh


def _zsh(commands: Sequence[Command]) -> str:
    programs, functions = " ".join(_PROGRAMS), "".join(map(_zsh_function, commands))
    head = f"#compdef {programs}\n# zsh completion for lem, made by `lem completion zsh`\n"
    # Autoloaded from a folder of $fpath the file is the function; sourced, it only tells zsh about it.
    tail = f'if [[ "$funcstack[1]" == _lem ]]; then\n  _lem "$@"\nelse\n  compdef _lem {programs}\nfi\n'
    return head + functions + tail


def _zsh_function(command: Command) -> str:
    lines = [_zsh_flag(flag) for flag in command.flags]
    if command.children:
        lines += ["'1: :->command'", "'*:: :->rest'"]
    elif command.values is not None and _zsh_value(command.values).strip():
        lines.append(shlex.quote(f"*:{_zsh_text(command.values.name)}:{_zsh_value(command.values)}"))
    arguments = "".join(f" \\\n    {line}" for line in lines)
    function, children = "_".join(("_lem", *command.path)), ""
    if command.children:
        named = " ".join(shlex.quote(f"{name}:{text}") for name, text in command.children)
        calls = "".join(f"      {name}) {function}_{name} ;;\n" for name, _ in command.children)
        children = (
            f"  case $state in\n  command)\n    local -a commands=({named})\n    _describe command commands ;;\n"
            f"  rest)\n    case $line[1] in\n{calls}    esac ;;\n  esac\n"
        )
    begin = f"{function}() {{\n  local context state state_descr line\n  typeset -A opt_args\n"
    return f"{begin}  _arguments -C{arguments}\n{children}}}\n"


def _zsh_flag(flag: Flag) -> str:
    excluded = "*" if flag.is_repeatable else f"({' '.join(flag.names)})"
    text = f"[{_zsh_text(flag.text)}]"
    if flag.value is not None:
        text += f":{_zsh_text(flag.value.name)}:{_zsh_value(flag.value)}"
    if len(flag.names) == 1:
        return shlex.quote(f"{excluded}{flag.names[0]}{text}")
    return f"{shlex.quote(excluded)}{{{','.join(flag.names)}}}{shlex.quote(text)}"


def _zsh_value(value: Value) -> str:
    return f"({' '.join(value.choices)})" if value.choices else value.path("_files", "_files -/") or " "


def _zsh_text(text: str) -> str:
    for character in "\\[]:":
        text = text.replace(character, f"\\{character}")
    return text


# fish

_FISH_HEAD = """\
# fish completion for lem, made by `lem completion fish`
function __lem_path
    set -l path
    for word in (commandline -opc)[2..-1]
        switch "$path $word"
"""


def _fish(commands: Sequence[Command]) -> str:
    cases = []
    for command in commands:
        if command.path:
            word, path = _fish_word(command.key), _fish_word(command.words)
            cases.append(f"            case {word}\n                set path {path}\n")
    tail = '        end\n    end\n    test "$path" = "$argv[1]"\nend\n'
    lines = [line for command in commands for line in _fish_lines(command)]
    return "".join([_FISH_HEAD, *cases, tail, *(f"complete -c {name} -f\n" for name in _PROGRAMS), *lines])


def _fish_lines(command: Command) -> list[str]:
    here = _fish_word(f"__lem_path {_fish_word(command.words)}")
    words = [f"-a {_fish_word(name)} -d {_fish_word(text)}" for name, text in command.children]
    if command.values is not None:
        words += _fish_value(command.values)
    for flag in command.flags:
        names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names]
        value = [] if flag.value is None else [flag.value.path("-r", "") or "-x", *_fish_value(flag.value)]
        words.append(" ".join([*names, *value, "-d", _fish_word(flag.text)]))
    return [f"complete -c {program} -n {here} {word}\n" for program in _PROGRAMS for word in words]


def _fish_value(value: Value) -> list[str]:
    if value.choices:
        return [f"-a {_fish_word(' '.join(value.choices))}"]
    return [*filter(None, (value.path("-F", "-a '(__fish_complete_directories)'"),))]


def _fish_word(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


_SHELLS: Mapping[str, Callable[[Sequence[Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
