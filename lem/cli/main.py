"""The command line: one parser, one place where errors become words and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import logging
import os
import sys
import traceback
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn, TextIO

from lem.base import __version__, log
from lem.base.doc import prepare_streams
from lem.base.errors import DISK_FULL, ExitCode, LemError, UserError, exit_code_of
from lem.base.variables import COMPOSE_VARIABLES, VARIABLES

# Each has a function `add_NAME_arguments(parser)`, which sets `run(args, out, err) -> int`. Only that of the command at
# hand is imported, since imports are most of the start-up time. The one without help is for programs, not for people.
COMMANDS: Mapping[str, str] = types.MappingProxyType(
    {
        "campaign": "run a campaign file, or several experiment files as one",
        "experiment": "run one experiment here and now",
        "status": "how campaigns are, also after a crash",
        "check": "what weakens a campaign's numbers, and what to do",
        "config": "check, show and write configuration files",
        "results": "list, show and export what was measured",
        "compare": "ratios with intervals; --gate makes a check of it",
        "report": "one self-contained HTML file",
        "presets": "list named starting points, or show one",
        "datasets": "data sets with a short name, and where they are",
        "gpus": "list the GPUs, their memory, who holds it, and what energy can be measured",
        "doctor": "check that this host is fit, with what to do where it is not",
        "compose": "print the default compose file",
        "merge": "make one campaign of the results of several hosts",
        "bundle": "gather pyz, images, models, checksums for a host without network",
        "completion": "let bash, zsh or fish complete the words of lem",
        "worker": "",
    }
)

# The modules of commands that share one; every other command has a module of its own name.
_MODULES = types.MappingProxyType(
    {
        **dict.fromkeys(("doctor", "gpus", "compose", "datasets", "presets"), "host"),
        **dict.fromkeys(("merge", "bundle"), "fleet"),
    }
)

# What a stream says that leads to a full disk or a terminal that is gone. An error of a file names the file.
_STREAM_ERRORS = DISK_FULL | {errno.EFBIG, errno.EIO}


def main(argv: Sequence[str] | None = None, out: TextIO | None = None, err: TextIO | None = None) -> int:
    """The exit code of one command line.

    Args:
        argv: arguments without the program's name; None takes this process's.
        out, err: where results and messages go; None takes this process's streams.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    prepare_streams()
    out, err = out or sys.stdout, err or sys.stderr
    console = log.Console(err)
    try:
        code = _execute(arguments, console, out, err)
        out.flush()
        return code
    except BrokenPipeError:  # the reader of stdout is gone: `lem … | head`
        _give_up(out)
        return int(ExitCode.OK)
    except LemError as error:
        console.error(error.message, error.hint)
        return exit_code_of(error)
    except KeyboardInterrupt:
        return int(ExitCode.SIGINT)
    except Exception as error:  # noqa: BLE001 - the top of the program
        if isinstance(error, OSError) and error.filename is None and error.errno in _STREAM_ERRORS:
            console.error(f"the output cannot be written: {os.strerror(error.errno).lower()}")
            _give_up(out)
            return int(ExitCode.USAGE)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # Python asks whether there is such a file
            console.error(f"{log.shorten(str(error.filename), 80)}: the name is too long for a file")
            return int(ExitCode.USAGE)
        _report_bug(console, error)
        return int(ExitCode.BUG)


def _execute(arguments: list[str], console: log.Console, out: TextIO, err: TextIO) -> int:
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):  # where argparse writes
            args = _parse(arguments)
    except SystemExit as stop:  # argparse: --help, --version, usage errors
        return stop.code if isinstance(stop.code, int) else int(ExitCode.USAGE)
    if getattr(args, "no_color", False):
        console.is_colour = False
        os.environ["NO_COLOR"] = "1"  # for every stream that is looked at later
    log.configure(console, verbosity=-1 if getattr(args, "quiet", False) else getattr(args, "verbose", 0))
    _warn_of_unknown_variables(console)
    code: int = args.run(args, out, err)
    return code


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The command line, taken apart.

    Raises:
        UserError: it is not written as its command wants it.
        SystemExit: it asks for help or the version, which was written.
    """
    named = next((word for word in arguments if not word.startswith("-")), None)
    if named is not None and named not in COMMANDS:
        from lem.config.problems import did_you_mean

        raise UserError(f"no command {named!r}{did_you_mean(named, list(COMMANDS))}", "lem --help lists them")
    args, unknown = make_parser([] if named is None else [named]).parse_known_args(arguments)
    if unknown:
        raise _refuse(args.parser, unknown[0])
    return args


def _refuse(parser: argparse.ArgumentParser, word: str) -> UserError:
    """What to say of a word that the command at hand has no use for."""
    from lem.config.problems import did_you_mean

    if not word.startswith("-"):
        return UserError(f"{parser.prog}: nothing is expected where {word!r} stands", _help_of(parser))
    name = word.partition("=")[0]
    options = list(parser._option_string_actions)  # noqa: SLF001 - as in _add_common
    return UserError(f"{parser.prog}: no option {name!r}{did_you_mean(name, options)}", _help_of(parser))


def _help_of(parser: argparse.ArgumentParser) -> str:
    return f"{parser.prog} --help tells how it is written"


class _Parser(argparse.ArgumentParser):
    """One that tells errors as all of lem does: argparse would put every option there is before them."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}", _help_of(self))


def _give_up(out: TextIO) -> None:
    """Let what is left for stdout go nowhere, or Python would complain of it again when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, out.fileno())
        os.close(nothing)


def make_parser(names: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of command lines: it knows all commands, and what those of these names take."""
    parser = _Parser(
        prog="lem",
        description="Measure what LLM inference costs: joules, tokens per second, latency, and how sure that is.",
        epilog="exit codes: 0 fine · 1 an experiment failed · 2 usage, configuration or host not fit · "
        "3 a gate found a regression · 4 a gate is inconclusive under --strict, or lem check finds numbers weak · "
        "5 locked by another campaign · 124 time budget reached · 70 a bug · 130 SIGINT · 143 SIGTERM",
    )
    parser.add_argument("--version", action="version", version=f"lem {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    parsers = {
        name: subparsers.add_parser(name, help=text) if text else subparsers.add_parser(name)
        for name, text in COMMANDS.items()
    }
    for name in names:
        module = importlib.import_module(f"lem.cli.{_MODULES.get(name, name)}")
        getattr(module, f"add_{name}_arguments")(parsers[name])
    _add_common(parser)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Take the common options before and after the command and its sub-command."""
    # argparse has no public way to look at what a parser has.
    taken = parser._option_string_actions  # noqa: SLF001
    common = (
        (("--quiet", "-q"), "store_true", "errors and the final summary only"),
        (("--verbose", "-v"), "count", "show the commands run, copyable; twice: everything"),
        (("--no-color",), "store_true", "no colour, also on a terminal"),
    )
    for names, action, text in common:
        if not any(name in taken for name in names):
            parser.add_argument(*names, action=action, default=argparse.SUPPRESS, help=text)
    for item in parser._actions:  # noqa: SLF001
        if isinstance(item, argparse._SubParsersAction):  # noqa: SLF001
            said = {choice.dest: choice.help for choice in item._choices_actions}  # noqa: SLF001
            for name, child in item.choices.items():
                child.description = child.description or _sentence(said.get(name) or "")
                child.set_defaults(parser=child)
                _add_common(child)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _warn_of_unknown_variables(console: log.Console) -> None:
    for name in sorted(os.environ):
        if name.startswith("LEM_") and name not in VARIABLES | COMPOSE_VARIABLES:
            label, known = console.paint("warning:", "yellow"), ", ".join(sorted(VARIABLES))
            console.line(f"{label} {name} is set, but lem reads no such variable ({known})", logging.WARNING)


def _report_bug(console: log.Console, error: Exception) -> None:
    # No other command pays for them.
    import tempfile

    from lem.base import durable

    console.close()
    told = f"lem {__version__}, Python {sys.version}\n{''.join(traceback.format_exception(error))}"
    try:
        descriptor, path = tempfile.mkstemp(prefix="lem-bug-", suffix=".log")
        with open(descriptor, "wb") as stream:
            stream.write(durable.utf8(told))
        where = f" (traceback in {path})"
    except OSError:
        console.line(told)
        where = ""
    summary = f"{type(error).__name__}: {error}".splitlines()[0]
    console.line(f"{console.paint('bug:', 'red')} {log.shorten(log.harmless(summary), 200)}{where}", logging.CRITICAL)
