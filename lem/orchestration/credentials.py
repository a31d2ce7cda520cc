"""Secrets that an engine may need: of the environment, or of systemd's credentials, which no child process inherits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lem.durable import reason_of
from lem.errors import UserError
from lem.variables import TOKEN_VARIABLE

__all__ = ["find_secrets"]

SECRET_VARIABLES = (TOKEN_VARIABLE,)

_FOLDER_VARIABLE = "CREDENTIALS_DIRECTORY"  # systemd.exec(5), LoadCredential=


def find_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The secrets that are there, by name; what the environment says wins over a credential.

    Raises:
        UserError: a credential is there and cannot be read.
    """
    found = {}
    folder = environ.get(_FOLDER_VARIABLE)
    for name in SECRET_VARIABLES:
        value = environ.get(name) or (_read(Path(folder) / name) if folder else "")
        if value:
            found[name] = value
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "it is no text"
        raise UserError(f"credential {path}: {reason}") from error
