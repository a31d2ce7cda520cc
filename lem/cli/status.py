"""`lem status`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, TextIO

from lem.base.clock import describe_future, utc_now
from lem.base.dataclass import asdict, dataclass
from lem.base.doc import NAME_WIDTH, Column, Doc, NameShortener, Table, printable, terminal_width, write_json
from lem.base.errors import UserError, did_you_mean
from lem.base.log import WIDTH, is_colour_wanted
from lem.base.names import slug_of
from lem.base.units import format_duration, hash_label
from lem.cli.options import add_json, add_state_dir
from lem.orchestration.manifest import COMPLETED, FAILED, RUNNING, SKIPPED, TOP_UP_NOTE, CampaignManifestEntry
from lem.orchestration.status import (
    CampaignStatus,
    State,
    Viewpoint,
    boot_time,
    find_folders,
    find_manifest,
    is_invalid,
    parse_utc,
    read_status,
    remainder_of,
    state_folders,
)


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "`lem status`: show the state of campaigns from their files alone, running or crashed."
    text = "a campaign's name, file or state folder (default: all)"
    parser.add_argument("campaign", nargs="?", metavar="CAMPAIGN", help=text)
    add_state_dir(parser)
    add_json(parser, "print one JSON document; without CAMPAIGN, a list")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> None:
    viewpoint = Viewpoint(utc_now(), os.uname().nodename, boot_time())
    viewer = Viewer(viewpoint.now, width=terminal_width(out), is_colour=is_colour_wanted(out))
    if args.campaign is None:
        statuses = [read_status(folder, viewpoint) for folder in find_folders(args.state_dir)]
    else:
        statuses = _find(args.state_dir, args.campaign, viewpoint)
        if len(statuses) == 1:
            if args.json:
                write_json(out, status_document(statuses[0]))
            else:
                out.write(render_status(statuses[0], viewer))
            return
    if args.json:
        write_json(out, [status_document(item) for item in statuses])
    elif statuses:
        out.write(render_statuses(statuses, viewer))
    else:
        err.write(f"no campaigns in {args.state_dir}\n")


def _find(state_dir: Path, wanted: str, viewpoint: Viewpoint) -> list[CampaignStatus]:
    given = Path(wanted)
    if given.suffix in (".yaml", ".yml") and given.is_file():
        from lem.config.load import load_campaign  # and YAML

        campaign = load_campaign(str(given)).config
        folder = Path(campaign.io.state_dir) / campaign.slug
        parts = [part for part in state_folders(folder) if part != folder]
        own = read_status(folder, viewpoint, folder / campaign.io.manifest_filename)
        statuses = [own] * (own.manifest is not None or not parts) + [read_status(part, viewpoint) for part in parts]
        return [_checked(status, campaign.campaign_name) for status in statuses]
    if given.is_dir() and find_manifest(given) is not None:
        return [read_status(given, viewpoint)]
    folders = {folder.relative_to(state_dir).as_posix(): folder for folder in find_folders(state_dir)}
    found = [folder for name, folder in folders.items() if wanted in (name, name.partition("/")[0])]
    found = found or [folder for name, folder in folders.items() if name.partition("/")[0] == slug_of(wanted)]
    if not found:
        message = f"no campaign {wanted!r} in {state_dir}{did_you_mean(wanted, list(folders))}"
        known = f"campaigns: {', '.join(folders)}" if folders else "there are no campaigns"
        raise UserError(message, f"{known}; --state-dir sets another folder")
    statuses = [read_status(folder, viewpoint) for folder in found]
    is_exact = wanted in folders or (state_dir / wanted).is_dir()
    return statuses if is_exact else [_checked(status, wanted) for status in statuses]


def _checked(status: CampaignStatus, campaign_name: str) -> CampaignStatus:
    owner = None if status.manifest is None else status.manifest.campaign_name
    if owner is not None and owner.lower() != campaign_name.lower():
        message = f"no campaign {campaign_name!r}: {status.folder} belongs to campaign {owner!r}"
        raise UserError(message, f"see its status with `lem status {status.folder.name}`")
    return status


SCHEMA_VERSION = 1

_LEAD = 11
_SHOWN = 10
_STYLES = {State.CRASHED: "red", State.UNREADABLE: "red", State.FAILED: "red", State.STOPPED: "yellow"}
_PHASE_NAMES = {
    "prepare": "preparing",
    "load": "loading the engine",
    "idle": "measuring idle power",
    "warmup": "warming up",
    "window": "measuring",
    "cooldown": "cooling down",
    "write": "writing",
}


@dataclass(frozen=True)
class Viewer:
    now: datetime
    zone: tzinfo | None = None
    width: int = WIDTH
    is_colour: bool = False

    def clock(self, moment: datetime | None) -> str:
        if moment is None:
            return "–"
        local, today = moment.astimezone(self.zone), self.now.astimezone(self.zone).date()
        return f"{local:%H:%M}" if local.date() == today else f"{local:%m-%d %H:%M}"


def render_statuses(statuses: Sequence[CampaignStatus], viewer: Viewer) -> str:
    doc = Doc(viewer.width, is_colour=viewer.is_colour)
    cells: dict[str, list[str]] = {
        "state": [item.state for item in statuses],
        "done": [str(item.count(COMPLETED)) for item in statuses],
        "failed": [str(item.count(FAILED)) for item in statuses],
        "left": [str(item.n_left) for item in statuses],
        "ends at": [_eta(item, viewer) for item in statuses],
        "last update": [viewer.clock(_last_update(item)) for item in statuses],
    }
    table = tuple(Column(heading, tuple(texts)) for heading, texts in cells.items())
    doc.table(Table("campaign", tuple(item.label for item in statuses), table))
    for item in statuses:
        if item.reason and item.state in (State.CRASHED, State.UNREADABLE, State.RUNNING):
            doc.text(item.reason, lead=f"{printable(item.label)}: ")
    return doc.render()


def render_status(status: CampaignStatus, viewer: Viewer) -> str:
    doc = Doc(viewer.width, is_colour=viewer.is_colour)
    holder, manifest = status.holder, status.manifest
    since = f" since {viewer.clock(parse_utc(holder.since))}" if holder is not None else ""
    doc.text(f"{status.label} · {status.state}{since}", _STYLES.get(status.state, "bold"))
    where = [f"run {manifest.run_id}"] if manifest is not None else []
    where += [f"process {holder.pid} on {holder.host}"] if holder is not None else []
    for text in (", ".join(where), *(_counts(status, viewer) if manifest is not None else ())):
        if text:
            doc.text(text)
    doc.block()
    for name, text in _facts(status, viewer):
        doc.labelled(f"{name:<{_LEAD}}", text, "dim")
    doc.block()
    _add_failed(doc, status)
    doc.block()
    _add_configurations(doc, status)
    if status.resume_command and remainder_of(status).is_resumable:
        doc.block()
        doc.lines(["resume with:", f"  {status.resume_command}"])
    return doc.render()


def status_document(status: CampaignStatus) -> dict[str, Any]:
    manifest, activity, holder = status.manifest, status.activity, status.holder
    return {
        "schema_version": SCHEMA_VERSION,
        "campaign": status.name,
        "part": status.part or None,
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
        "holder": None if holder is None else asdict(holder),
        "activity": None if activity is None else asdict(activity),
        "go_on": (status.resume_command or None) if remainder_of(status).is_resumable else None,
        "experiments": [] if manifest is None else [_entry_document(entry) for entry in manifest.experiments],
        "notes": [] if manifest is None else manifest.notes,
    }


def _entry_document(entry: CampaignManifestEntry) -> dict[str, Any]:
    last = entry.attempts[-1] if entry.attempts else None
    return {
        "exp_id": entry.exp_id,
        "config_name": entry.config_name,
        "config_hash": hash_label(entry.config_hash),
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


def _counts(status: CampaignStatus, viewer: Viewer) -> Iterator[str]:
    parts = [f"{status.count(COMPLETED)} of {status.n_planned} done"]
    parts += [f"{status.n_invalid} of them invalid"] if status.n_invalid else []
    parts += [f"{status.count(FAILED)} failed", f"{status.n_left} left"]
    parts += [f"{status.count(SKIPPED)} skipped"] if status.count(SKIPPED) else []
    yield ", ".join(parts)
    if status.left_s and status.n_left:
        left = format_duration(status.left_s)
        yield f"ends at {_eta(status, viewer)}, in {left}" if status.state == State.RUNNING else f"about {left} left"


def _facts(status: CampaignStatus, viewer: Viewer) -> Iterator[tuple[str, str]]:
    label = "now" if status.state == State.RUNNING else "last"
    activity, manifest = status.activity, status.manifest
    if activity is not None and activity.doing in ("starting", "gap"):
        text = "starting"
        if activity.doing == "gap":
            left = activity.gap_ends_in_s if status.state == State.RUNNING else None
            since = f"since {viewer.clock(parse_utc(activity.since))}"
            text = "gap between experiments, " + (since if left is None else f"at most {format_duration(left)} more")
        yield label, text
    else:
        for entry in manifest.get_by_status(RUNNING) if manifest is not None else []:
            yield label, f"{_named(entry)} · {_phase_text(entry, status, viewer)}"
    if status.reason:
        yield "why", status.reason
    if status.hint:
        yield "remedy", status.hint
    if manifest is not None and (future := describe_future(str(manifest.run_id), viewer.now)):
        yield "note", future
    notes = manifest.notes if manifest is not None else []
    added = [note for note in notes if note.get("kind") == TOP_UP_NOTE]
    for note in (note for note in notes if note not in added[:-1]):  # of notes on added cycles only the last
        text = note.get("reason") or "; ".join(map(str, note.get("changes") or []))
        yield "note", text if note.get("reason") else f"{str(note.get('kind')).replace('_', ' ')}: {text}"


def _named(entry: CampaignManifestEntry) -> str:
    return f"{entry.config_name} · cycle {entry.cycle_index + 1}"


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
    lasts = f" ({format_duration((viewer.now - moment) / timedelta(seconds=1))})"
    return f"since {viewer.clock(moment)}{lasts if status.state == State.RUNNING else ''}"


def _add_failed(doc: Doc, status: CampaignStatus) -> None:
    entries = [] if status.manifest is None else status.manifest.get_by_status(FAILED)
    for entry in entries[:_SHOWN]:
        doc.labelled(f"{'failed':<{_LEAD}}", f"{_named(entry)}: {entry.error or 'reason not recorded'}", "red")
        log = entry.attempts[-1].log_path if entry.attempts else None
        doc.lines([f"{'':<{_LEAD}}{printable(log)}"] if log else [])
    if len(entries) > _SHOWN:
        doc.lines([f"and {len(entries) - _SHOWN} more failed: --json lists all"])


def _add_configurations(doc: Doc, status: CampaignStatus) -> None:
    by_name: dict[str, list[CampaignManifestEntry]] = {}
    for entry in status.manifest.experiments if status.manifest is not None else []:
        if entry.status != SKIPPED:
            by_name.setdefault(entry.config_name, []).append(entry)
    if not by_name:
        return
    counted: dict[str, Callable[[CampaignManifestEntry], bool]] = {
        "cycles": lambda _: True,
        "done": lambda entry: entry.status == COMPLETED,
        "invalid": lambda entry: entry.status == COMPLETED and is_invalid(entry),
        "failed": lambda entry: entry.status == FAILED,
        "left": lambda entry: entry.status not in (COMPLETED, FAILED),
    }
    table = tuple(
        Column(heading, tuple(str(sum(map(is_counted, group))) for group in by_name.values()))
        for heading, is_counted in counted.items()
    )
    shortener = NameShortener(list(by_name), NAME_WIDTH)
    doc.table(Table("configuration", tuple(map(shortener, by_name)), table))
    if shortener.explanation:
        doc.text(shortener.explanation)


def _eta(status: CampaignStatus, viewer: Viewer) -> str:
    if status.state != State.RUNNING or status.left_s is None:
        return "–"
    return viewer.clock(viewer.now + timedelta(seconds=status.left_s))


def _last_update(status: CampaignStatus) -> datetime | None:
    labels = [item.updated_at for item in (status.manifest, status.activity) if item is not None]
    return parse_utc(max(labels)) if labels else None
