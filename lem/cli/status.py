"""`lem status`."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, TextIO

from lem.base import units
from lem.base.doc import NAME_WIDTH, Column, NameShortener, columns, paint, printable, wrapped, write_json
from lem.base.errors import ExitCode, UserError
from lem.base.log import WIDTH, bounded_width, is_colour_wanted
from lem.base.process import copyable
from lem.cli.selection import add_json
from lem.orchestration.manifest import COMPLETED, FAILED, RUNNING, SKIPPED, TOP_UP_NOTE, CampaignManifestEntry
from lem.orchestration.status import (
    Activity,
    CampaignStatus,
    State,
    Viewpoint,
    boot_time,
    find_folders,
    find_manifest,
    is_invalid,
    parse_utc,
    read_status,
)


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "`lem status`: show the state of campaigns from their files alone, running or crashed."
    parser.add_argument(
        "campaign", nargs="?", metavar="CAMPAIGN", help="a campaign's name, file or state folder (default: all)"
    )
    parser.add_argument(
        "--state-dir", type=Path, default=Path(".state"), metavar="DIR", help="state folder (default: .state)"
    )
    add_json(parser, "print one JSON document; without CAMPAIGN, a list")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    """Exit code 0 whatever the states are, 2 if there is no such campaign."""
    import socket

    from lem.base.clock import utc_now

    viewpoint = Viewpoint(utc_now(), socket.gethostname(), boot_time())
    width = bounded_width(shutil.get_terminal_size().columns) if out.isatty() else WIDTH
    viewer = Viewer(viewpoint.now, width=width, is_colour=is_colour_wanted(out))
    if args.campaign is not None:
        status = _find(args.state_dir, args.campaign, viewpoint)
        if args.json:
            write_json(out, status_document(status))
        else:
            out.write(render_status(status, viewer))
        return int(ExitCode.OK)
    statuses = [read_status(folder, viewpoint) for folder in find_folders(args.state_dir)]
    if args.json:
        write_json(out, [status_document(item) for item in statuses])
    elif statuses:
        out.write(render_statuses(statuses, viewer))
    else:
        err.write(f"no campaigns in {args.state_dir}\n")
    return int(ExitCode.OK)


def _find(state_dir: Path, wanted: str, viewpoint: Viewpoint) -> CampaignStatus:
    from lem.base.errors import did_you_mean
    from lem.config.campaign_config import slug_of

    given = Path(wanted)
    if given.suffix in (".yaml", ".yml") and given.is_file():
        from lem.config.load import load_campaign

        campaign = load_campaign(str(given)).config
        folder = Path(campaign.io.state_dir) / campaign.slug
        return read_status(folder, viewpoint, folder / campaign.io.manifest_filename)
    if given.is_dir() and find_manifest(given) is not None:
        return read_status(given, viewpoint)
    folders = {folder.name: folder for folder in find_folders(state_dir)}
    try:
        slug = slug_of(wanted)
    except ValueError:
        slug = wanted
    named = folders.get(wanted) or folders.get(slug)
    if named is None:
        suggestion = did_you_mean(wanted, list(folders))
        known = f"campaigns: {', '.join(folders)}" if folders else "there are no campaigns"
        raise UserError(
            f"no campaign {wanted!r} in {state_dir}{suggestion}", f"{known}; --state-dir sets another folder"
        )
    return read_status(named, viewpoint)


SCHEMA_VERSION = 1

_LEAD = 11
_SHOWN = 10
_STYLES = {
    State.RUNNING: "bold",
    State.CRASHED: "red",
    State.UNREADABLE: "red",
    State.FAILED: "red",
    State.STOPPED: "yellow",
}
_PHASE_NAMES = {
    "prepare": "preparing",
    "load": "loading the engine",
    "idle": "measuring idle power",
    "warmup": "warming up",
    "window": "measuring",
    "cooldown": "cooling down",
    "write": "writing",
}


@dataclasses.dataclass(frozen=True)
class Viewer:
    """The time, zone, width and colour of the output."""

    now: datetime
    zone: tzinfo | None = None
    width: int = WIDTH
    is_colour: bool = False

    def clock(self, moment: datetime | None) -> str:
        """`14:32`, or `07-15 14:32` on another day."""
        if moment is None:
            return "–"
        local, today = moment.astimezone(self.zone), self.now.astimezone(self.zone).date()
        return f"{local:%H:%M}" if local.date() == today else f"{local:%m-%d %H:%M}"

    def paint(self, text: str, style: str) -> str:
        return paint(text, style, is_colour=self.is_colour)


def render_statuses(statuses: Sequence[CampaignStatus], viewer: Viewer) -> str:
    """One line per campaign, and problems below."""
    table = [
        Column("state", tuple(item.state for item in statuses)),
        Column("done", tuple(str(item.count(COMPLETED)) for item in statuses)),
        Column("failed", tuple(str(item.count(FAILED)) for item in statuses)),
        Column("left", tuple(str(item.n_left) for item in statuses)),
        Column("ETA", tuple(_eta(item, viewer) for item in statuses)),
        Column("last update", tuple(viewer.clock(_last_update(item)) for item in statuses)),
    ]
    lines = columns("campaign", [item.name for item in statuses], table, viewer.width)
    lines[0] = viewer.paint(lines[0], "bold")
    for item in statuses:
        if item.reason and item.state in (State.CRASHED, State.UNREADABLE, State.RUNNING):
            lines += wrapped(item.reason, viewer.width, f"{printable(item.name)}: ")
    return "\n".join(lines) + "\n"


def render_status(status: CampaignStatus, viewer: Viewer) -> str:
    """One campaign: state, activity, failures, configurations, and the command that resumes it."""
    blocks = [
        _heading(status, viewer),
        _facts(status, viewer),
        _failed(status, viewer),
        _configurations(status, viewer),
    ]
    command = _resume_command(status)
    if command and status.state in (State.CRASHED, State.STOPPED, State.FAILED):
        blocks.append(["resume with:", f"  {command}"])
    return "\n".join("\n".join(block) + "\n" for block in blocks if block)


def _resume_command(status: CampaignStatus) -> str:
    """The shell command that resumes the campaign; empty if unknown or not needed."""
    activity = status.activity
    if activity is None or not activity.go_on or status.state in (State.RUNNING, State.WAITING, State.DONE):
        return ""
    return (copyable(["cd", activity.cwd]) + " && " if activity.cwd else "") + activity.go_on


def status_document(status: CampaignStatus) -> dict[str, Any]:
    """The status as JSON values; times are UTC labels."""
    manifest, activity, holder = status.manifest, status.activity, status.holder
    return {
        "schema_version": SCHEMA_VERSION,
        "campaign": status.name,
        "state": status.state,
        "reason": status.reason,
        "hint": status.hint,
        "state_folder": str(status.folder),
        "run_id": None if manifest is None else manifest.run_id,
        "updated_at": None if manifest is None else manifest.updated_at,
        "completed": status.count(COMPLETED),
        "invalid": status.n_invalid,
        "failed": status.count(FAILED),
        "left": status.n_left,
        "skipped": status.count(SKIPPED),
        "left_s": status.left_s,
        "holder": None if holder is None else dataclasses.asdict(holder),
        "activity": None if activity is None else dataclasses.asdict(activity),
        "go_on": _resume_command(status) or None,
        "experiments": [] if manifest is None else [_entry_document(entry) for entry in manifest.experiments],
        "notes": [] if manifest is None else manifest.notes,
    }


def _entry_document(entry: CampaignManifestEntry) -> dict[str, Any]:
    last = entry.attempts[-1] if entry.attempts else None
    return {
        "exp_id": entry.exp_id,
        "config_name": entry.config_name,
        "cycle": entry.cycle_index + 1,
        "status": entry.status,
        "is_invalid": is_invalid(entry),
        "attempts": len(entry.attempts),
        "started_at": None if last is None else last.started_at,
        "completed_at": entry.completed_at,
        "error": entry.error,
        "log": None if last is None else last.log_path,
        "result": entry.result_path,
    }


def _heading(status: CampaignStatus, viewer: Viewer) -> list[str]:
    since = f" since {viewer.clock(parse_utc(status.holder.since))}" if status.holder is not None else ""
    title = f"{status.name} · {status.state}{since}"
    lines = [viewer.paint(line, _STYLES.get(status.state, "bold")) for line in wrapped(title, viewer.width)]
    who = f"process {status.holder.pid} on {status.holder.host}" if status.holder is not None else ""
    run = f"run {status.manifest.run_id}" if status.manifest is not None else ""
    texts = [", ".join(filter(None, (run, who)))]
    texts += [_counts(status), _time_left(status, viewer)] if status.manifest is not None else []
    return [*lines, *(line for text in texts if text for line in wrapped(text, viewer.width))]


def _counts(status: CampaignStatus) -> str:
    parts = [f"{status.count(COMPLETED)} of {status.n_planned} done"]
    parts += [f"{status.n_invalid} of them invalid"] if status.n_invalid else []
    parts += [f"{status.count(FAILED)} failed", f"{status.n_left} left"]
    parts += [f"{status.count(SKIPPED)} skipped"] if status.count(SKIPPED) else []
    return ", ".join(parts)


def _time_left(status: CampaignStatus, viewer: Viewer) -> str:
    if not status.left_s or not status.n_left:
        return ""
    if status.state == State.RUNNING:
        return f"ETA {_eta(status, viewer)}, in {units.format_duration(status.left_s)}"
    return f"about {units.format_duration(status.left_s)} left"


def _facts(status: CampaignStatus, viewer: Viewer) -> list[str]:
    facts = list(_doing(status, viewer))
    facts += [("why", status.reason)] if status.reason else []
    facts += [("remedy", status.hint)] if status.hint else []
    for note in _notes(status):
        text = note.get("reason") or "; ".join(map(str, note.get("changes") or []))
        facts.append(("note", text if note.get("reason") else f"{str(note.get('kind')).replace('_', ' ')}: {text}"))
    return [line for name, text in facts for line in _fact(name, text, viewer)]


def _notes(status: CampaignStatus) -> list[dict[str, Any]]:
    """The notes of resumes, and only the last one about added cycles."""
    notes = status.manifest.notes if status.manifest is not None else []
    added = [note for note in notes if note.get("kind") == TOP_UP_NOTE]
    return [note for note in notes if note not in added[:-1]]


def _doing(status: CampaignStatus, viewer: Viewer) -> Iterable[tuple[str, str]]:
    """What is running, or ran last."""
    label = "now" if status.state == State.RUNNING else "last"
    activity = status.activity
    if activity is not None and activity.doing in ("starting", "gap"):
        yield label, _gap_text(activity, status, viewer) if activity.doing == "gap" else "starting"
        return
    for entry in status.manifest.get_by_status(RUNNING) if status.manifest is not None else []:
        yield label, f"{entry.config_name} · cycle {entry.cycle_index + 1} · {_phase_text(entry, status, viewer)}"


def _gap_text(activity: Activity, status: CampaignStatus, viewer: Viewer) -> str:
    left = activity.gap_ends_in_s
    if status.state != State.RUNNING or left is None:
        return f"gap between experiments, since {viewer.clock(parse_utc(activity.since))}"
    return f"gap between experiments, at most {units.format_duration(left)} more"


def _phase_text(entry: CampaignManifestEntry, status: CampaignStatus, viewer: Viewer) -> str:
    activity = status.activity
    if activity is None or activity.exp_id != entry.exp_id or activity.phase is None:
        started = entry.attempts[-1].started_at if entry.attempts else entry.started_at
        return f"phase unknown, {_since(started, status, viewer)}"
    total = "" if activity.phase_total is None else f" of {activity.phase_total}"
    progress = "" if activity.phase_done is None else f" {activity.phase_done}{total}"
    return f"{_PHASE_NAMES.get(activity.phase, activity.phase)}{progress}, {_since(activity.since, status, viewer)}"


def _since(label: str | None, status: CampaignStatus, viewer: Viewer) -> str:
    moment = parse_utc(label)
    if moment is None:
        return "start time unknown"
    lasts = f" ({units.format_duration((viewer.now - moment) / timedelta(seconds=1))})"
    return f"since {viewer.clock(moment)}{lasts if status.state == State.RUNNING else ''}"


def _failed(status: CampaignStatus, viewer: Viewer) -> list[str]:
    """Each failed experiment with its reason and its log."""
    lines: list[str] = []
    entries = [] if status.manifest is None else status.manifest.get_by_status(FAILED)
    for entry in entries[:_SHOWN]:
        where = f"{entry.config_name} · cycle {entry.cycle_index + 1}: {entry.error or 'reason not recorded'}"
        lines += _fact("failed", where, viewer, "red")
        log = entry.attempts[-1].log_path if entry.attempts else None
        lines += [f"{'':<{_LEAD}}{printable(log)}"] if log else []
    if len(entries) > _SHOWN:
        lines.append(f"and {len(entries) - _SHOWN} more failed: --json lists all")
    return lines


def _configurations(status: CampaignStatus, viewer: Viewer) -> list[str]:
    by_name: dict[str, list[CampaignManifestEntry]] = {}
    for entry in status.manifest.experiments if status.manifest is not None else []:
        if entry.status != SKIPPED:
            by_name.setdefault(entry.config_name, []).append(entry)
    if not by_name:
        return []
    groups = list(by_name.values())
    done = [[entry for entry in group if entry.status == COMPLETED] for group in groups]
    table = [
        Column("cycles", tuple(str(len(group)) for group in groups)),
        Column("done", tuple(str(len(group)) for group in done)),
        Column("invalid", tuple(str(sum(map(is_invalid, group))) for group in done)),
        Column("failed", tuple(str(sum(entry.status == FAILED for entry in group)) for group in groups)),
        Column("left", tuple(str(sum(entry.status not in (COMPLETED, FAILED) for entry in group)) for group in groups)),
    ]
    shortener = NameShortener(list(by_name), NAME_WIDTH)
    lines = columns("configuration", [shortener(name) for name in by_name], table, viewer.width)
    explanation = wrapped(shortener.explanation, viewer.width) if shortener.explanation else []
    return [viewer.paint(lines[0], "bold"), *lines[1:], *explanation]


def _fact(name: str, text: str, viewer: Viewer, style: str = "dim") -> list[str]:
    first, *rest = wrapped(text, viewer.width, f"{name:<{_LEAD}}")
    return [viewer.paint(first[: len(name)], style) + first[len(name) :], *rest]


def _eta(status: CampaignStatus, viewer: Viewer) -> str:
    if status.state != State.RUNNING or status.left_s is None:
        return "–"
    return viewer.clock(viewer.now + timedelta(seconds=status.left_s))


def _last_update(status: CampaignStatus) -> datetime | None:
    labels = [item.updated_at for item in (status.manifest, status.activity) if item is not None]
    return parse_utc(max(labels)) if labels else None
