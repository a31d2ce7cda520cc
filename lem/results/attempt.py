"""The folder of one attempt: its name, its files, and the error when the disk refuses them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem import durable
from lem.durable import reason_of, remedy_for
from lem.errors import InfrastructureError, UserError
from lem.record import CONFIG_FILE, LOG_FILE, PROMPTS_FILE, RESULT_FILE

__all__ = [
    "AttemptFolder",
    "attempt_number",
    "check_name",
    "is_name",
    "stopping_campaign",
]


CONFIG_SCHEMA_VERSION = 1

# One path component that is the same on every file system, is hidden from nobody, and leads nowhere else.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,254}")
_ATTEMPT = re.compile(r"attempt-([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class AttemptFolder:
    """A new folder for one attempt.

    Attributes:
        path: where it is.
        number: which attempt, from 1.
    """

    path: Path
    number: int

    @property
    def result_path(self) -> Path:
        """Where the worker writes the result, last."""
        return self.path / RESULT_FILE

    @property
    def log_path(self) -> Path:
        """Where the engine's own output goes."""
        return self.path / LOG_FILE

    def write_config(self, requested: Mapping[str, Any], resolved: Mapping[str, Any]) -> Path:
        """The `config.json` written.

        Args:
            requested: the configuration as it was given, `${VAR}` unexpanded.
            resolved: `ExperimentConfig.to_dict()`, with every default.

        Raises:
            InfrastructureError: it cannot be written.
            ValueError: a value that JSON does not have.
        """
        path = self.path / CONFIG_FILE
        document = {"schema_version": CONFIG_SCHEMA_VERSION, "requested": requested, "resolved": resolved}
        with stopping_campaign(path):
            durable.write_json(path, document)
        return path

    def write_prompts(self, prompts: Iterable[Mapping[str, Any]]) -> Path:
        """The `prompts.jsonl` written, one object a line.

        Args:
            prompts: each `{"prompt": str, "input_tokens": int | None, "output_tokens": int | None}`: an exact length
                to cut or extend to, and a bound on the output of its own.

        Raises:
            InfrastructureError: it cannot be written.
            UserError: a prompt that is not Unicode text.
        """
        path = self.path / PROMPTS_FILE
        data = b"".join(_prompt_line(number, prompt) for number, prompt in enumerate(prompts, 1))
        with stopping_campaign(path):
            durable.write_bytes(path, data)
        return path


def attempt_number(name: str) -> int | None:
    """The number in the name of an attempt's folder; None for another name."""
    match = _ATTEMPT.fullmatch(name)
    return int(match[1]) if match else None


def is_name(text: str) -> bool:
    """Whether `text` can name a folder of campaign, run or experiment, and cannot leave the one it stands in."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str, what: str) -> str:
    """`text`, where `is_name`.

    Raises:
        UserError: empty, too long, or with anything but letters, digits and `. _ = + -`, letter or digit first.
    """
    if not is_name(text):
        raise UserError(
            f"{what} {text[:80]!r} cannot name a results folder",
            "use letters, digits and . _ = + - (at most 255, a letter or digit first)",
        )
    return text


@contextlib.contextmanager
def stopping_campaign(path: Path) -> Iterator[None]:
    """Turn a failed write at `path` into the error that stops a campaign with the rest pending."""
    try:
        yield
    except OSError as error:
        hint = remedy_for(error, "--results-dir") + "; then go on with --resume"
        raise InfrastructureError(f"results: {path}: {reason_of(error)}", hint) from error


def _prompt_line(number: int, prompt: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(dict(prompt), ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError as error:
        raise UserError(
            f"prompt {number} is not Unicode text: it holds half of a surrogate pair",
            "write the whole character instead of a lone \\ud800 to \\udfff",
        ) from error
