"""The kinds of errors, and their exit codes."""

from __future__ import annotations

import enum
import errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# The numbers of an OSError for a full disk or quota.
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


# Errors of Python that the same work brings again; others may come from the machine, a device or the network.
REPEATING: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(NameError, NotImplementedError, TypeError, ValueError),
)


class ExitCode(enum.IntEnum):
    OK = 0
    EXPERIMENT_FAILED = 1
    USAGE = 2
    REGRESSION = 3
    INCONCLUSIVE = 4
    LOCKED = 5
    BUG = 70
    BUDGET = 124
    SIGHUP = 129
    SIGINT = 130
    SIGTERM = 143


class LemError(Exception):
    """An error that lem explains: what happened where, and a hint at the remedy. Any other that escapes is a bug."""

    exit_code = ExitCode.USAGE

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(LemError):
    """Something the user can fix: usage, configuration, files, the host."""


class ConfigurationError(UserError, ValueError):
    """An invalid configuration; also a `ValueError`, for callers in Python."""


class LockedError(UserError):
    exit_code = ExitCode.LOCKED


class EngineError(LemError):
    """A failed experiment.

    Its `kind` is a stable word: `option`, `model`, `out_of_memory`, `prompts`, `meter`, `timeout`, `silent`, `died`,
    `channel`, `full`, `host`, `settings`, `engine`. One that `is_permanent` would fail the same way again and is not
    retried.
    """

    exit_code = ExitCode.EXPERIMENT_FAILED

    def __init__(self, message: str, hint: str = "", *, kind: str = "engine", is_permanent: bool = False) -> None:
        super().__init__(message, hint)
        self.kind = kind
        self.is_permanent = is_permanent


class OptionRefused(EngineError):
    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, kind="option", is_permanent=True)


class MeterRefused(OptionRefused):
    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind = "meter"


class InfrastructureError(LemError):
    """The disk, a daemon or the worker is gone: the campaign stops, and the remaining experiments stay pending."""

    exit_code = ExitCode.EXPERIMENT_FAILED


class Interrupted(LemError):
    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum

    @property
    def code(self) -> int:
        """128 + the signal's number, as a shell reports it."""
        return 128 + self.signum


def exit_code_of(error: BaseException) -> int:
    if isinstance(error, Interrupted):
        return error.code
    if isinstance(error, LemError):
        return int(error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return int(ExitCode.SIGINT)
    return int(ExitCode.BUG)


def nearest(word: str, candidates: Sequence[str], cutoff: float = 0.6) -> str | None:
    import difflib  # only mistakes need it

    by_lower = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    return in_brackets(nearest(word, candidates))


def in_brackets(suggestion: str | None) -> str:
    return "" if suggestion is None else f" (did you mean '{suggestion}'?)"
