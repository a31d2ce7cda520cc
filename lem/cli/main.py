"""The command line: the parser, and the place where errors become messages and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import importlib
import os
import sys

from lem.base import __version__, log
from lem.base.errors import DISK_FULL, ExitCode, LemError, UserError, did_you_mean, exit_code_of, in_brackets
from lem.base.variables import COMPOSE_VARIABLES, VARIABLES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from typing import Any, NoReturn, TextIO

# Each has a function `add_NAME_arguments(parser)`, which sets `run(args, out, err)`: it returns an exit code, or None
# for 0. Only the module of the given command is imported, since imports are most of the start-up time. A command
# without help is internal.
COMMANDS: Mapping[str, str] = {
    "campaign": "run a campaign file, or several experiment files as one campaign",
    "experiment": "run one experiment",
    "measure": "measure any program: what it draws, and its energy per unit of work",
    "status": "show the state of campaigns, running or crashed",
    "check": "list what weakens a campaign's numbers, with remedies",
    "config": "check, show and write configuration files",
    "results": "list, show, export and recompute results",
    "verify": "check that results are as measured and agree with their raw data",
    "compare": "compare configurations or runs; --gate turns it into a check",
    "report": "write a self-contained HTML report",
    "trend": "show the configurations of a campaign over its runs, with change points",
    "presets": "list presets, or show one",
    "datasets": "list data sets with a short name, and where they are",
    "gpus": "list GPUs, their memory and processes, and the energy meters",
    "doctor": "check that this host can run campaigns, with remedies",
    "compose": "print the default compose file",
    "merge": "merge the results of several hosts into one campaign",
    "fleet": "write a job script that runs a stored plan on a cluster",
    "bundle": "pack lem.pyz, images, models and checksums for an offline host",
    "completion": "print a completion script for bash, zsh or fish",
    "help": "show how to start, or the options of a command",
    "worker": "",
}

# Commands that share a module; every other command's module has its name.
_MODULES: Mapping[str, str] = {
    **dict.fromkeys(("doctor", "gpus", "compose", "datasets", "presets"), "host"),
    **dict.fromkeys(("merge", "bundle"), "fleet"),
    "help": "main",
}

_START = """\
lem measures what LLM inference costs: joules, tokens per second, latency, and
their uncertainty.

  lem doctor                            check this machine
  lem experiment --model MODEL          measure one model
  lem config new > campaign.yaml        write a campaign, to edit
  lem campaign campaign.yaml --dry-run  show its plan; without --dry-run, run it
  lem status                            see how far campaigns are
  lem results show CAMPAIGN             show the table of its results
  lem check CAMPAIGN                    list what weakens its numbers
  lem compare CAMPAIGN                  compare its configurations
  lem report CAMPAIGN                   write all of it as one HTML page

`lem help COMMAND` shows the options of a command, `lem --help` all commands.
"""

# Errors of a standard stream on a full disk or a closed terminal; unlike errors of files, they name no file.
_STREAM_ERRORS = DISK_FULL | {errno.EFBIG, errno.EIO}
_FILE_ERRORS = _STREAM_ERRORS | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ESTALE, errno.ENAMETOOLONG}


def main(argv: Sequence[str] | None = None, out: TextIO | None = None, err: TextIO | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        argv: the arguments without the program's name (default: this process's).
        out, err: for results and for messages (default: this process's streams).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    log.prepare_streams()
    out, err = log.Output.over(out or sys.stdout), log.Output.over(err or sys.stderr)
    console = log.Console(err)
    try:
        code = _execute(arguments, console, out, err)
        out.flush()
        return code
    except BrokenPipeError:  # the reader of stdout is gone: `lem … | head`
        discard_output(out)
        return int(ExitCode.OK)
    except LemError as error:
        console.error(error.message, error.hint)
        return exit_code_of(error)
    except KeyboardInterrupt:
        return int(ExitCode.SIGINT)
    except Exception as error:  # noqa: BLE001 - the top of the program
        if isinstance(error, OSError) and (explained := _explain_host(error)) is not None:
            console.error(explained.message, explained.hint)
            if error.filename is None:
                discard_output(out)
            return int(ExitCode.USAGE)
        _report_bug(console, error)
        return int(ExitCode.BUG)


def _explain_host(error: OSError) -> UserError | None:
    """The error in words, with a remedy, if the host caused it; None if it may be a bug of lem."""
    from lem.base import durable  # imported here to keep the start-up fast

    reason = durable.reason_of(error)
    if error.filename is None:
        if error.errno == errno.ENOENT:  # from getcwd, or from tempfile, which found no usable folder
            if "temporary" in reason:
                return UserError(reason, "free some space, or set TMPDIR to another folder")
            return UserError("the current folder no longer exists", "change to another one (cd)")
        return UserError(f"cannot write the output: {reason}") if error.errno in _STREAM_ERRORS else None
    if error.errno not in _FILE_ERRORS:
        return None
    # Python raises many of these when it tests whether a file exists.
    hint = "" if error.errno == errno.ENAMETOOLONG else durable.remedy_for(error)
    return UserError(f"{log.shorten(str(error.filename), 80)}: {reason}", hint)


def _execute(arguments: list[str], console: log.Console, out: TextIO, err: TextIO) -> int:
    try:
        # Imports leave no garbage. The streams are those that argparse writes to.
        with _without_collections(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            args = _parse(arguments)
    except SystemExit as stop:  # argparse: --help, --version, usage errors
        return stop.code if isinstance(stop.code, int) else int(ExitCode.USAGE)
    if args.no_color:
        console.is_colour = False
        os.environ["NO_COLOR"] = "1"  # for streams that are opened later
    log.configure(console, verbosity=-1 if args.quiet else args.verbose)
    for name in sorted(os.environ):
        if name.startswith("LEM_") and name not in VARIABLES | COMPOSE_VARIABLES:
            label, known = console.paint("warning:", "yellow"), ", ".join(sorted(VARIABLES))
            console.line(f"{label} unknown environment variable {name} (known: {known})", log.WARNING)
    with _without_collections() if getattr(args, "is_reader", False) else contextlib.nullcontext():
        code = int(args.run(args, out, err) or ExitCode.OK)
    if args.next and not args.quiet and not getattr(args, "json", False):
        import shlex

        out.flush()
        words = map(str, [*own_call(), *args.next])
        console.line(f"next: {' '.join(word if word == '>' else shlex.quote(word) for word in words)}")
    return code


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """While most objects stay: among thousands of results, looking for garbage takes a fifth of the time."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else this would undo a caller's own
            gc.freeze()
            gc.unfreeze()  # all of it is old now, and not looked through at once
        if is_enabled:
            gc.enable()


def own_call() -> list[str]:
    """The words that started lem, for commands that are to be copied; `lem` where it is on PATH."""
    from pathlib import Path

    started = Path(sys.argv[0])
    is_own = started.suffix == ".pyz" or started.parts[-2:] == ("lem", "__main__.py")
    if not is_own and started.name == "lem":
        import shutil

        is_own = shutil.which("lem") != str(started)
    return sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1] if is_own else ["lem"]


def add_help_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="COMMAND", help="a command, such as campaign or results export")
    parser.set_defaults(run=_help)


def _help(args: argparse.Namespace, out: TextIO, err: TextIO) -> int | None:
    if args.words:
        return main([*args.words, "--help"], out, err)
    out.write(_START)
    return None


def _parse(arguments: list[str]) -> argparse.Namespace:
    arguments = arguments or ["help"]
    named = next((word for word in arguments if not word.startswith("-")), None)
    if named is not None and named not in COMMANDS:
        raise UserError(f"unknown command {named!r}{did_you_mean(named, list(COMMANDS))}", "see `lem --help`")
    parser = make_parser([] if named is None else [named])
    common = argparse.Namespace(quiet=False, verbose=0, no_color=False, next=(), typed=arguments)
    args, unknown = parser.parse_known_args(arguments, common)
    if unknown:
        name, chosen = unknown[0].partition("=")[0], args.parser
        if not name.startswith("-"):
            chosen.error(f"unexpected argument {unknown[0]!r}")
        options = list(chosen._option_string_actions)  # noqa: SLF001 - as in _add_common
        # A short option is like every other short one.
        near = [it for it in ("--results-dir", "--output") if it in options] if name == "-o" else ()
        chosen.error(f"unknown option {name!r}{in_brackets(near[0]) if near else did_you_mean(name, options)}")
    return args


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **{"width": log.terminal_columns() - 2, **settings})  # as argparse finds it


class _Parser(argparse.ArgumentParser):
    """Reports errors as the rest of lem does; argparse would print the whole usage first."""

    def __init__(self, **settings: Any) -> None:
        # An abbreviation would stop working, or mean something else, once another option begins with it.
        super().__init__(**{"formatter_class": _Formatter, **settings, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}", f"see `{self.prog} --help`")


def discard_output(stream: TextIO) -> None:
    """Discard what is buffered and what follows; otherwise Python reports the error again when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


class _Listed:
    """In the place of the parser of a command that is only listed: making a parser of each takes milliseconds."""

    def _check_help(self, action: argparse.Action) -> None:
        """Nothing; argparse calls it since Python 3.14."""


def make_parser(names: Collection[str] = COMMANDS) -> argparse.ArgumentParser:
    def parser_of(**settings: Any) -> _Parser | _Listed:
        return _Parser(**settings) if settings["prog"].split()[-1] in names else _Listed()

    parser = _Parser(
        prog="lem",
        description="Measure what LLM inference costs: joules, tokens per second, latency, and their uncertainty.",
        epilog="exit codes: 0 success · 1 an experiment failed · 2 usage or configuration error, or unsuitable host · "
        "3 a gate found a regression · 4 a gate is inconclusive, or lem check finds weak numbers · "
        "5 locked by another campaign · 70 bug in lem · 124 time budget reached · "
        "129 SIGHUP · 130 SIGINT · 143 SIGTERM",
    )
    parser.add_argument("--version", action="version", version=f"lem {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=parser_of)  # type: ignore[call-overload]
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
    # argparse has no public way to list the options of a parser.
    taken = parser._option_string_actions  # noqa: SLF001
    common = (
        (("--quiet", "-q"), "store_true", "print only errors and the final summary"),
        (("--verbose", "-v"), "count", "show each command that lem runs; twice: show everything"),
        (("--no-color",), "store_true", "no colour, even on a terminal"),
    )
    for names, action, text in common:
        if not any(name in taken for name in names):
            parser.add_argument(*names, action=action, default=argparse.SUPPRESS, help=text)
    for item in parser._actions:  # noqa: SLF001
        if isinstance(item, argparse._SubParsersAction):  # noqa: SLF001
            helps = {choice.dest: choice.help for choice in item._choices_actions}  # noqa: SLF001
            for name, child in item.choices.items():
                if isinstance(child, _Listed):
                    continue
                text = helps.get(name) or ""
                child.description = child.description or (f"{text[:1].upper()}{text[1:]}." if text else "")
                child.set_defaults(parser=child)
                _add_common(child)


def _report_bug(console: log.Console, error: Exception) -> None:
    # Imported here to keep the start-up fast.
    import tempfile
    import traceback

    from lem.base import durable

    console.close()
    text = f"lem {__version__}, Python {sys.version}\n{''.join(traceback.format_exception(error))}"
    try:
        descriptor, path = tempfile.mkstemp(prefix="lem-bug-", suffix=".log")
        with open(descriptor, "wb") as stream:
            stream.write(durable.utf8(log.escaped(text)))
        where = f" (traceback in {path})"
    except OSError:
        console.line(text)
        where = ""
    summary = f"{type(error).__name__}: {error}".splitlines()[0]
    console.line(f"{console.paint('bug:', 'red')} {log.shorten(summary, 200)}{where}", log.CRITICAL)
