"""`lem completion`: scripts that ask lem itself what may follow, and the answer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

from lem.cli.main import COMMANDS, make_parser
from lem.cli.options import RESULTS_DIR
from lem.results.store import folder_names

_FILES = ("FILE", "PLAN", "PROGRAM", "[KIND=]FILE[:FIELD]")
_RESULTS = ("CAMPAIGN", "ID", "TARGET")

_HOW = """\
bash: lem completion bash > ~/.local/share/bash-completion/completions/lem
zsh:  lem completion zsh > a folder of $fpath/_lem
fish: lem completion fish > ~/.config/fish/completions/lem.fish
or, for this shell alone: eval "$(lem completion bash)" (zsh the same),
lem completion fish | source
"""

# Each asks `lem completion words` with the words up to the cursor, lem itself first. The answer is `file`, `folder`, or
# `words` with a line for each word, and its description after a tab.
_SHELLS: Mapping[str, str] = {
    "bash": """\
# bash completion for lem, made by `lem completion bash`
_lem() {
    local current=${COMP_WORDS[COMP_CWORD]} found
    # bash takes --option=value apart at the =.
    if [[ $current == = ]]; then current=; fi
    mapfile -t found < <("${COMP_WORDS[0]}" completion words "${COMP_WORDS[@]:0:COMP_CWORD+1}" 2>/dev/null)
    COMPREPLY=()
    case ${found[0]} in
        file) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$current") ;;
        folder) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$current") ;;
        words) COMPREPLY=("${found[@]:1}"); COMPREPLY=("${COMPREPLY[@]%%$'\\t'*}") ;;
    esac
}
complete -F _lem lem lem.pyz
""",
    "zsh": """\
#compdef lem lem.pyz
# zsh completion for lem, made by `lem completion zsh`
_lem() {
  local -a found shown
  found=("${(@f)$("${(@Q)words[1]}" completion words "${(@Q)words[1,CURRENT]}" 2>/dev/null)}")
  case $found[1] in
  file) compset -P '--*='; _files ;;
  folder) compset -P '--*='; _files -/ ;;
  words) shown=("${(@)found[2,-1]//:/\\\\:}"); shown=("${(@)shown/$'\\t'/:}"); _describe lem shown ;;
  esac
}
# Autoloaded from a folder of $fpath the file is the function; sourced, it only tells zsh about it.
if [[ "$funcstack[1]" == _lem ]]; then _lem "$@"; else compdef _lem lem lem.pyz; fi
""",
    "fish": """\
# fish completion for lem, made by `lem completion fish`
function __lem_complete
    set -l words (commandline -opc) (commandline -ct)
    set -l found ($words[1] completion words $words 2>/dev/null)
    switch "$found[1]"
        case file
            __fish_complete_path (commandline -ct)
        case folder
            __fish_complete_directories (commandline -ct)
        case words
            printf '%s\\n' $found[2..-1]
    end
end
complete -c lem -f -a '(__lem_complete)'
complete -c lem.pyz -f -a '(__lem_complete)'
""",
}


def add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print a script that lets a shell complete lem's commands, options, and values."
    parser.epilog = _HOW
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=(*_SHELLS, "words"), metavar="SHELL", help=", ".join(_SHELLS))
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, _err: TextIO) -> None:
    if args.shell in _SHELLS and args.words:
        args.parser.error(f"unexpected argument {args.words[0]!r}")
    out.write(_SHELLS.get(args.shell) or "".join(f"{line}\n" for line in answer(args.words[1:])))


def answer(words: Sequence[str]) -> Iterator[str]:
    """What may take the place of the last word, which may be empty, after the others."""
    *before, current = words or [""]
    given = [word for word in before if word != "="]
    if not all(COMMANDS.get(word, word) for word in given):  # an internal command
        return
    parser, option = _reached(given)
    if current.startswith("--") and "=" in current:
        name, _, current = current.partition("=")
        option, start = parser._option_string_actions.get(name), f"{name}="  # noqa: SLF001 - no public way
    else:
        current, start = current.removeprefix("="), ""
    # argparse has no public way to list the arguments of a parser.
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]  # noqa: SLF001
    if option is None and current.startswith("-"):
        flags = {name: action.help or "" for action in shown for name in action.option_strings}
        yield from _words(current, "", flags)
        return
    action = option or next((it for it in shown if not it.option_strings), None)
    kind = "" if action is None else str(action.metavar or action.dest)
    if action is None or action.choices is not None:
        yield from _words(current, start, _described(action))
    elif kind in _RESULTS:
        yield from _words(current, start, dict.fromkeys(folder_names(RESULTS_DIR), ""))
    else:
        yield "file" if kind in _FILES else "folder" if kind == "DIR" else "words"


def _reached(words: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Action | None]:
    parser = make_parser([word for word in words if word in COMMANDS][:1])
    option: argparse.Action | None = None
    for word in words:
        found = parser._option_string_actions.get(word)  # noqa: SLF001
        if option is not None or found is not None:
            option = None if option is not None or found is None or found.nargs == 0 else found
        else:
            below = (it for it in parser._actions if isinstance(it, argparse._SubParsersAction))  # noqa: SLF001
            parser = next((it.choices[word] for it in below if word in it.choices), parser)
    return parser, option


def _described(action: argparse.Action | None) -> Mapping[str, str]:
    if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
        return {choice.dest: choice.help or "" for choice in action._choices_actions}  # noqa: SLF001
    return {} if action is None else {str(it): "" for it in action.choices or () if it != "words"}


def _words(current: str, start: str, described: Mapping[str, str]) -> Iterator[str]:
    yield "words"
    for word, text in described.items():
        if word.startswith(current):
            yield f"{start}{word}\t{text.replace('%%', '%')}".rstrip("\t")
