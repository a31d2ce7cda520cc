"""A campaign on several hosts, from the command line: storing a plan, and taking one host's part of it."""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from lem.cli.streams import write_json
from lem.clock import utc_now
from lem.config.campaign_config import CampaignConfig
from lem.errors import ExitCode, UserError
from lem.orchestration.identity import make_run_id
from lem.orchestration.plan import Plan
from lem.orchestration.shards import (
    check_same,
    costs_of,
    make_fleet_plan,
    parse_shard,
    part_of_plan,
    plan_anew,
    take_part,
)
from lem.results.fleet_plan import FleetPlan, read_plan, write_plan
from lem.results.repository import Repository
from lem.units import format_duration, plural

__all__ = ["FleetPart", "own_part", "store_plan"]


@dataclass(frozen=True)
class FleetPart:
    """What a host's results carry so that they belong to one run of all hosts; None where no plan is stored."""

    run_id: str | None = None
    host: str | None = None


def store_plan(
    args: argparse.Namespace, campaign: CampaignConfig, plan: Plan, measured_by_config: Mapping[str, float], out: TextIO
) -> int:
    """Divide the campaign over the hosts, store the plan and show it; the exit code.

    Raises:
        UserError: the hosts are not named well, or the plan cannot be stored.
    """
    if args.shard is not None:
        raise UserError("--write-plan makes a plan, --shard runs a part of one", "give one or the other")
    hosts = [name.strip() for name in (args.hosts or "").split(",") if name.strip()]
    if not hosts:
        raise UserError("--write-plan divides the campaign over hosts, and none is named", "add --hosts A,B,…")
    fleet_plan = (
        _new_plan(args, campaign, plan, hosts, measured_by_config)
        if args.plan is None
        else _plan_of_what_lacks(args, campaign, plan, hosts, measured_by_config)
    )
    write_plan(args.write_plan, fleet_plan)
    if args.json:
        write_json(out, dataclasses.asdict(fleet_plan))
    else:
        out.write("\n".join(_described(fleet_plan)) + "\n")
    return int(ExitCode.OK)


def _new_plan(
    args: argparse.Namespace, campaign: CampaignConfig, plan: Plan, hosts: list[str], measured: Mapping[str, float]
) -> FleetPlan:
    return make_fleet_plan(
        plan,
        hosts,
        campaign_id=campaign.campaign_id,
        campaign_name=campaign.campaign_name,
        run_id=make_run_id(utc_now(), random.SystemRandom()),
        is_replicated=args.replicate,
        measured_by_config=measured,
    )


def _plan_of_what_lacks(
    args: argparse.Namespace, campaign: CampaignConfig, plan: Plan, hosts: list[str], measured: Mapping[str, float]
) -> FleetPlan:
    """The plan of `--plan` with what lacks, by the merged results, divided over these hosts."""
    stored = read_plan(args.plan)
    check_same(plan, stored)
    scan = Repository(Path(campaign.io.results_dir), campaign.slug).scan(stored.run_id)
    identities = [item.record.identity for item in scan.results]
    present = {(identity.host, identity.experiment_id) for identity in identities}
    return plan_anew(stored, hosts, present, costs_of(plan.configurations, measured))


def _described(plan: FleetPlan) -> list[str]:
    experiments, hosts = plural(len(plan.experiments), "experiment"), plural(len(plan.hosts), "host")
    lines = [f"run {plan.run_id}, {plan.mode}, {experiments} on {hosts}"]
    anchors = {item.config_name for item in plan.experiments if item.config_hash == plan.anchor}
    lines += [f"anchor, on every host: {name}" for name in anchors]
    for number, host in enumerate(plan.hosts, start=1):
        expected = "" if host.expected_s is None else f", about {format_duration(host.expected_s)}"
        lines.append(f"{number}/{len(plan.hosts)} {host.name}: {plural(len(host.exp_ids), 'experiment')}{expected}")
    return lines


def own_part(args: argparse.Namespace, plan: Plan) -> tuple[Plan, FleetPart]:
    """The part of the plan that this host runs.

    Raises:
        UserError: the options contradict each other, or the stored plan is not of this campaign.
    """
    if args.hosts is not None or args.replicate:
        raise UserError("--hosts and --replicate are for --write-plan", "add --write-plan PLAN, or leave them out")
    if args.plan is not None and args.shard is None:
        raise UserError("--plan needs --shard I/N", "the plan names its hosts: the first of two is --shard 1/2")
    index, count = parse_shard(args.shard)
    if args.plan is None:
        return part_of_plan(plan, index, count), FleetPart()
    stored = read_plan(args.plan)
    return take_part(plan, stored, index, count), FleetPart(stored.run_id, stored.part(index).name)
