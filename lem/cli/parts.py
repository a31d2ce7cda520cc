"""The parts of a campaign that several hosts run: `lem campaign` with --write-plan, --plan and --shard."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from lem.base.clock import utc_now
from lem.base.dataclass import asdict, replace
from lem.base.doc import write_json
from lem.base.errors import UserError
from lem.base.units import format_duration, plural
from lem.cli import options
from lem.config.campaign_config import CampaignConfig
from lem.orchestration import fleet
from lem.orchestration.manifest import SKIPPED, ManifestManager
from lem.orchestration.plan import FleetPart, Plan
from lem.orchestration.resume import new_run_id
from lem.results import merge
from lem.results.store import Repository


def store_plan(
    args: argparse.Namespace, campaign: CampaignConfig, plan: Plan, measured_by_config: Mapping[str, float], out: TextIO
) -> None:
    for option in ("--shard", "--dry-run", "--validate-only"):
        if getattr(args, option[2:].replace("-", "_")):
            hint = "--write-plan only stores a plan; --shard I/N runs a part of it"
            raise UserError(f"--write-plan and {option} cannot be combined", hint)
    hosts = _named_hosts(args)
    repository = Repository(Path(campaign.io.results_dir), campaign.slug)
    if args.plan is None:
        state_folder = Path(campaign.io.state_dir) / campaign.slug
        run_id = new_run_id(repository, state_folder / campaign.io.manifest_filename, utc_now())
        made = fleet.make_fleet_plan(
            plan, hosts, run_id, is_replicated=args.replicate, measured_by_config=measured_by_config
        )
    else:
        stored = merge.read_plan(args.plan)
        plan = fleet.matching(plan, stored)
        scan = repository.scan(stored.run_id)
        identities = [item.record.identity for item in scan.results]
        present = {(identity.host, identity.experiment_id) for identity in identities}
        made = fleet.replan(stored, hosts, present, fleet.costs_of(plan.configurations, measured_by_config))
    words = options.typed_again(args, *_PLAN_OPTIONS)
    words = words[words.index("campaign") + 1 :]
    arguments = () if any(options.HIDDEN in word for word in words) else tuple(words)
    made = replace(made, arguments=arguments, results_dir=campaign.io.results_dir)
    merge.write_plan(args.write_plan, made)
    if args.json:
        write_json(out, asdict(made))
    else:
        out.write("\n".join(_described(made)) + "\n")
        if args.parts is None:
            args.next = ["campaign", *words, "--plan", args.write_plan, "--shard", f"1/{len(made.hosts)}"]
        else:
            args.next = ["fleet", "slurm", args.write_plan]


# A part that is started again continues, so how the plan was begun is not repeated.
_BEGINNING = ("--fresh", "--resume", "--no-resume")
_PLAN_OPTIONS = ("--write-plan", "--plan", "--hosts", "--parts", "--replicate", "--json", *_BEGINNING)
_MOST_PARTS = 1000  # the default MaxArraySize of Slurm is 1001


def _named_hosts(args: argparse.Namespace) -> list[str]:
    hosts = [name.strip() for name in (args.hosts or "").split(",") if name.strip()]
    if args.parts is None:
        if not hosts:
            raise UserError("--write-plan requires --hosts or --parts", "add --hosts A,B,… or --parts N")
        return hosts
    if args.hosts is not None:
        raise UserError("--hosts and --parts cannot be combined", "name the hosts, or give the number of parts")
    if not 1 <= args.parts <= _MOST_PARTS:
        raise UserError(f"--parts: expected 1 to {_MOST_PARTS}, got {args.parts}")
    return [f"part-{number}" for number in range(1, args.parts + 1)]


def _described(plan: merge.FleetPlan) -> list[str]:
    experiments, hosts = plural(len(plan.experiments), "experiment"), plural(len(plan.hosts), "host")
    lines = [f"run {plan.run_id}, {plan.mode}, {experiments} on {hosts}"]
    anchors = {item.config_name for item in plan.experiments if item.config_hash == plan.anchor}
    lines += [f"anchor, on every host: {name}" for name in anchors]
    for number, host in enumerate(plan.hosts, start=1):
        expected = "" if host.expected_s is None else f", about {format_duration(host.expected_s)}"
        lines.append(f"{number}/{len(plan.hosts)} {host.name}: {plural(len(host.exp_ids), 'experiment')}{expected}")
    return lines


def own_part(args: argparse.Namespace, plan: Plan) -> tuple[Plan, FleetPart]:
    if args.hosts is not None or args.parts is not None or args.replicate:
        text = "--hosts, --parts and --replicate require --write-plan"
        raise UserError(text, "add --write-plan PLAN, or omit them")
    if args.plan is not None and args.shard is None:
        raise UserError("--plan requires --shard I/N", "the first of two hosts is --shard 1/2")
    index, count = fleet.parse_shard(args.shard)
    stored = None if args.plan is None else merge.read_plan(args.plan)
    part = fleet.part_of_plan(plan, index, count, stored)
    if stored is None:
        own = FleetPart(folder=f"part-{index}-of-{count}")
    else:
        host = stored.part(index).name
        own = FleetPart(stored.run_id, host, host)
    return part, own if not _began_without_folder(part, own) else replace(own, folder="")


def _began_without_folder(plan: Plan, part: FleetPart) -> bool:
    io = plan.campaign.io
    path = Path(io.state_dir) / plan.campaign.slug / io.manifest_filename
    if not path.is_file() or (path.parent / part.folder).exists():
        return False
    manifest = ManifestManager(path).load(plan.campaign.campaign_id)
    if manifest is None or part.run_id not in (None, manifest.run_id):
        return False
    known = {entry.exp_id for entry in manifest.experiments if entry.status != SKIPPED}
    hosts = {entry.host for entry in manifest.experiments}
    return known == {item.exp_id for item in plan.experiments} and hosts <= {part.host or socket.gethostname()}
