"""Options that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from lem.base.errors import UserError

RESULTS_DIR, STATE_DIR = Path("results"), Path(".state")
HIDDEN = "(hidden)"

T = TypeVar("T")


def add_results_dir(parser: argparse.ArgumentParser) -> None:
    text = f"results folder (default: {RESULTS_DIR})"
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR, metavar="DIR", help=text)
    parser.set_defaults(is_reader=True)


def add_state_dir(parser: argparse.ArgumentParser) -> None:
    text = f"state folder (default: {STATE_DIR})"
    parser.add_argument("--state-dir", type=Path, default=STATE_DIR, metavar="DIR", help=text)


def folder_options(results_dir: Path, state_dir: Path = STATE_DIR) -> list[str]:
    given = {"--results-dir": (results_dir, RESULTS_DIR), "--state-dir": (state_dir, STATE_DIR)}
    return [word for name, (path, usual) in given.items() if path != usual for word in (name, str(path))]


def typed_again(args: argparse.Namespace, *dropped: str) -> list[str]:
    kept: list[str] = []
    for before, word in zip(["", *args.typed], args.typed, strict=False):
        takes_value = before in dropped and not isinstance(getattr(args, before[2:].replace("-", "_"), True), bool)
        if word.partition("=")[0] not in dropped and not takes_value:
            kept.append(without_secret(word))
    return kept


def without_secret(word: str) -> str:
    from lem.config.campaign_config import CampaignConfig  # not every command reads configurations
    from lem.config.option import is_secret

    start = "--set=" if word.startswith("--set=") else ""
    key, sign, _ = word[len(start) :].partition("=")
    return f"{start}{key}={HIDDEN}" if sign and is_secret(CampaignConfig, tuple(key.split("."))) else word


def add_json(parser: argparse._ActionsContainer, text: str = "print one JSON document") -> None:
    parser.add_argument("--json", action="store_true", help=text)


def add_budget(parser: argparse._ActionsContainer) -> None:
    text = "also list what the combined uncertainty of each energy consists of"
    parser.add_argument("--budget", action="store_true", help=text)


def add_repeated(parser: argparse._ActionsContainer, name: str, metavar: str, text: str, kind: Any = str) -> None:
    parser.add_argument(name, action="append", default=[], type=kind, metavar=metavar, help=f"{text}; may be repeated")


def checked(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_junit(parser: argparse._ActionsContainer, what: str) -> None:
    text = f"also write {what} as JUnit XML, for a CI system"
    parser.add_argument("--junit", type=Path, metavar="FILE", help=text)


def write_file(path: Path, text: str | Iterable[str], option: str = "--output") -> None:
    from lem.base import durable

    parts = map(durable.utf8, (text,) if isinstance(text, str) else text)
    try:
        # A new file must not replace a device or pipe, or the link to one: /dev/stdout may lead to a file.
        is_device = path.exists() and not (path.is_file() or path.is_dir())
        if is_device or (path.is_symlink() and path.parts[1:2] in (("dev",), ("proc",))):
            with open(path, "wb") as stream:
                stream.writelines(parts)
        else:
            durable.write_parts(path, parts)
    except OSError as error:
        raise UserError(f"{path}: {durable.reason_of(error)}", f"name another file with {option}") from error
