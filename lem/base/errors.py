"""What can go wrong, and the exit code each kind has."""

from __future__ import annotations

import enum
import errno

# The numbers of an OSError that says the disk, or a quota on it, is full.
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class ExitCode(enum.IntEnum):
    """The exit codes of every command."""

    OK = 0
    EXPERIMENT_FAILED = 1
    USAGE = 2
    REGRESSION = 3
    INCONCLUSIVE = 4
    LOCKED = 5
    BUG = 70
    BUDGET = 124
    SIGINT = 130
    SIGTERM = 143


class LemError(Exception):
    """An error that lem explains in words; anything else that escapes is a bug.

    Attributes:
        message: what happened, where, and what was found.
        hint: what the person can do about it; empty when there is nothing to say.
    """

    exit_code = ExitCode.USAGE

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(LemError):
    """Something a person can fix: usage, configuration, files, the host."""


class ConfigurationError(UserError, ValueError):
    """A configuration that is not accepted; also a `ValueError`, for callers in Python."""


class LockedError(UserError):
    """Another campaign holds the lock."""

    exit_code = ExitCode.LOCKED


class EngineError(LemError):
    """An experiment failed next to its engine.

    Attributes:
        kind: a short stable word: `option`, `model`, `out_of_memory`, `prompts`, `meter`, `timeout`,
            `silent`, `died`, `channel`, `full`, `engine`.
        is_permanent: the same run would fail the same way again, so it is not retried.
    """

    exit_code = ExitCode.EXPERIMENT_FAILED

    def __init__(self, message: str, hint: str = "", *, kind: str = "engine", is_permanent: bool = False) -> None:
        super().__init__(message, hint)
        self.kind = kind
        self.is_permanent = is_permanent


class OptionRefused(EngineError):
    """An option that this backend, or the engine version found, cannot honour."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, kind="option", is_permanent=True)


class InfrastructureError(LemError):
    """What experiments stand on is gone (disk, daemon, worker); the campaign stops with the rest pending."""

    exit_code = ExitCode.EXPERIMENT_FAILED


class Interrupted(LemError):
    """A signal asked the program to stop.

    Attributes:
        signum: the signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum

    @property
    def code(self) -> int:
        """128 + the signal's number, as a shell reports it."""
        return 128 + self.signum


def exit_code_of(error: BaseException) -> int:
    """The exit code for an error that reached the top of the program."""
    if isinstance(error, Interrupted):
        return error.code
    if isinstance(error, LemError):
        return int(error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return int(ExitCode.SIGINT)
    return int(ExitCode.BUG)


class MeterRefused(OptionRefused):
    """An option that needs a meter that is not there."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind = "meter"
