"""`lem status`: how campaigns are, from their files alone, while one runs and after it crashed."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lem.cli.streams import write_json
from lem.errors import ExitCode, UserError
from lem.log import WIDTH, bounded_width, is_colour_wanted

if TYPE_CHECKING:
    from lem.orchestration.status import CampaignStatus, Onlooker

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `lem status` takes."""
    parser.description = __doc__
    parser.add_argument(
        "campaign", nargs="?", metavar="CAMPAIGN", help="a campaign's name, its file, or its state folder; default: all"
    )
    parser.add_argument("--state-dir", type=Path, default=Path(".state"), metavar="DIR", help="default: .state")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout: a list without CAMPAIGN")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    """The exit code: 0 however the campaigns are, 2 where there is no such campaign."""
    import socket

    from lem.cli.status_view import Eyes, render_status, render_statuses, status_document
    from lem.clock import utc_now
    from lem.orchestration.status import Onlooker, boot_time, find_folders, read_status

    onlooker = Onlooker(utc_now(), socket.gethostname(), boot_time())
    eyes = Eyes(onlooker.now, width=_width(out), is_colour=is_colour_wanted(out))
    if args.campaign is not None:
        status = _find(args.state_dir, args.campaign, onlooker)
        if args.json:
            write_json(out, status_document(status))
        else:
            out.write(render_status(status, eyes))
        return int(ExitCode.OK)
    statuses = [read_status(folder, onlooker) for folder in find_folders(args.state_dir)]
    if args.json:
        write_json(out, [status_document(item) for item in statuses])
    elif statuses:
        out.write(render_statuses(statuses, eyes))
    else:
        err.write(f"no campaigns in {args.state_dir}\n")
    return int(ExitCode.OK)


def _find(state_dir: Path, wanted: str, onlooker: Onlooker) -> CampaignStatus:
    """The status of the campaign that is meant.

    Raises:
        UserError: there is none.
    """
    from lem.config.campaign_config import slug_of
    from lem.config.problems import did_you_mean
    from lem.orchestration.status import find_folders, find_manifest, read_status

    given = Path(wanted)
    if given.suffix in (".yaml", ".yml") and given.is_file():
        return _of_file(given, onlooker)
    if given.is_dir() and find_manifest(given) is not None:
        return read_status(given, onlooker)
    folders = {folder.name: folder for folder in find_folders(state_dir)}
    try:
        slug = slug_of(wanted)
    except ValueError:
        slug = wanted
    folder = folders.get(wanted) or folders.get(slug)
    if folder is None:
        suggestion = did_you_mean(wanted, list(folders))
        there = f"there: {', '.join(folders)}" if folders else "nothing is there"
        raise UserError(
            f"no campaign {wanted!r} in {state_dir}{suggestion}", f"{there}; --state-dir names another folder"
        )
    return read_status(folder, onlooker)


def _of_file(path: Path, onlooker: Onlooker) -> CampaignStatus:
    from lem.config.yamlfile import load_campaign
    from lem.orchestration.status import read_status

    campaign = load_campaign(str(path)).config
    folder = Path(campaign.io.state_dir) / campaign.slug
    return read_status(folder, onlooker, folder / campaign.io.manifest_filename)


def _width(out: TextIO) -> int:
    if not out.isatty():
        return WIDTH
    return bounded_width(shutil.get_terminal_size().columns)
