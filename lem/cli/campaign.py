"""`lem campaign`: run a campaign file, or several experiment files as one campaign."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lem.base import log
from lem.base.doc import write_json
from lem.base.errors import ExitCode, UserError
from lem.base.units import parse_duration
from lem.cli.config import add_flags, given_flags
from lem.cli.selection import add_json, add_repeated, checked

if TYPE_CHECKING:
    from lem.cli.fleet import FleetPart
    from lem.config.campaign_config import CampaignConfig
    from lem.config.load import Loaded
    from lem.orchestration.plan import ExpectedDurations, Plan
    from lem.results.run import StoppingRule, Target


_WHAT = {
    "model": ("--model", "-m", "model of experiments that name none"),
    "dataset": ("--dataset", "-d", "dataset of experiments that have no prompts"),
    "num_samples": ("--sample-size", "-n", "prompts an experiment"),
    "execution.cycles": ("--cycles", "-c", "how often every experiment is run"),
    "execution.structure": ("--structure", "order of experiments"),
    "execution.seed": ("--seed", "seed of the shuffled order"),
    "execution.warmup_prompts": ("--warmup-prompts", "prompts of warm-up, at least"),
    "execution.warmup_timeout_seconds": ("--warmup-timeout", "seconds of warm-up, at most"),
    "execution.config_gap_seconds": ("--config-gap", "seconds between experiments, at most"),
    "execution.cycle_gap_seconds": ("--cycle-gap", "seconds between cycles, at most"),
    "cold_start.force_cold_start": ("--force-cold-start", "start a new worker for every experiment"),
}
_RESULTS = {"io.results_dir": ("--results-dir", "-o", "folder of the results")}
_COMPOSE = {
    "io.compose_file": ("--compose-file", "compose file of the backends"),
    "io.env_file": ("--env-file", "environment file for compose"),
}


def add_campaign_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run a campaign file, or several experiment files with --campaign-name."
    parser.allow_abbrev = False  # the resume command is made of the words as they were written
    parser.add_argument("files", nargs="+", metavar="FILE", help="a campaign file; or experiment files")
    parser.add_argument("--campaign-name", metavar="NAME", help="make a campaign of this name of experiment files")
    _add_overrides(parser.add_argument_group("what to run (wins over the file)"))
    _add_place(parser.add_argument_group("where to run and to write"))
    _add_course(parser.add_argument_group("how to begin and to end"))
    _add_fleet(parser.add_argument_group("on several hosts"))
    add_json(parser, "one JSON object a line on stdout for each event")
    parser.set_defaults(run=run)


def _add_overrides(group: argparse._ArgumentGroup) -> None:
    from lem.config.campaign_config import CampaignConfig

    add_flags(group, CampaignConfig, _WHAT)
    group.add_argument("--preset", metavar="NAME", help="values that experiments start from (lem presets)")
    add_repeated(group, "--set", "KEY=VALUE", "any option, as execution.cycles=5")


def _add_place(group: argparse._ArgumentGroup) -> None:
    from lem.config.campaign_config import CampaignConfig

    add_flags(group, CampaignConfig, _RESULTS)
    group.add_argument("--executor", choices=("auto", "docker", "local"), default="auto", help="where experiments run")
    group.add_argument("--python", metavar="PROGRAM", help="Python that has the engines, for the local executor")
    add_flags(group, CampaignConfig, _COMPOSE)


def _add_course(group: argparse._ArgumentGroup) -> None:
    beginning = group.add_mutually_exclusive_group()
    beginning.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="go on with an unfinished campaign; --no-resume: as --fresh",
    )
    beginning.add_argument("--fresh", action="store_true", help="set an earlier manifest aside and start anew")
    group.add_argument(
        "--allow-environment-change", action="store_true", help="resume although engine, driver or GPU changed"
    )
    group.add_argument(
        "--until",
        type=_target,
        metavar="ci=2%[:METRIC]",
        help="add whole cycles, 5 at least, until every configuration's interval is that narrow",
    )
    group.add_argument("--max-cycles", type=int, metavar="N", help="with --until: this many cycles at most (20)")
    group.add_argument(
        "--budget",
        type=partial(checked, parse_duration),
        metavar="8h",
        help="begin nothing after this time; what runs finishes; exit code 124",
    )
    group.add_argument("--dry-run", action="store_true", help="show the plan and end; nothing is written")
    group.add_argument("--validate-only", action="store_true", help="validate and end; nothing is written")
    group.add_argument("--yes", "-y", action="store_true", help="do not ask; an unfinished campaign is resumed")
    group.add_argument("--fail-fast", action="store_true", help="end after the first experiment that fails")


def _add_fleet(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--shard", metavar="I/N", help="run the part of host I of N alone")
    group.add_argument(
        "--plan",
        type=Path,
        metavar="PLAN",
        help="take the part from this stored plan; with --write-plan: divide what lacks of it in --results-dir",
    )
    group.add_argument("--write-plan", type=Path, metavar="PLAN", help="divide the campaign, store the plan, and end")
    group.add_argument("--hosts", metavar="A,B,…", help="names of the hosts, for --write-plan")
    group.add_argument("--replicate", action="store_true", help="with --write-plan: every host runs all of it")


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    from lem.cli.plan_view import expected_document, plan_document, render_findings, render_plan
    from lem.orchestration.executor import choose_executor
    from lem.orchestration.plan import prolong_plan
    from lem.orchestration.resume import with_cycles
    from lem.orchestration.session import check_supported, plan_campaign

    loaded = _load(args)
    campaign, rule = _with_rule(args, loaded.config)
    plan = plan_campaign(replace(loaded, config=campaign))
    if not getattr(args, "quiet", False):
        err.write(render_findings(plan, is_colour=log.is_colour_wanted(err)))
        err.flush()
    if not plan.experiments:
        raise UserError("no valid experiment is left", "lem campaign --dry-run lists each reason; nothing was run")
    if args.write_plan is not None:
        from lem.cli.fleet import store_plan

        return store_plan(args, campaign, plan, _prices(plan, campaign).measured_by_config, out)
    part: FleetPart | None = None
    if args.shard is not None or args.plan is not None or args.hosts is not None or args.replicate:
        from lem.cli.fleet import own_part

        plan, part = own_part(args, plan)
    if args.validate_only:
        if args.json:
            write_json(out, plan_document(plan))
        return int(ExitCode.OK)
    choice = choose_executor(args.executor, campaign, plan, python=args.python)
    check_supported(campaign, choice.name)
    if args.dry_run:
        prices = _prices(plan, campaign)
        if args.json:
            document = {**plan_document(plan), "expected_s": expected_document(plan, prices)}
            write_json(out, {**document, "executor": choice.name, "place": choice.describe()})
        else:
            longest = None if rule is None else prolong_plan(plan, with_cycles(campaign, rule.most_cycles))
            place = choice.describe()
            out.write(render_plan(plan, campaign, place, prices, rule=rule, longest=longest, budget_s=args.budget))
        return int(ExitCode.OK)
    from lem.cli.campaign_run import CampaignCommand

    return CampaignCommand(args, campaign, plan, choice, out, err, part).execute()


def _target(text: str) -> Target:
    from lem.results.run import parse_target

    return checked(parse_target, text)


def _with_rule(args: argparse.Namespace, campaign: CampaignConfig) -> tuple[CampaignConfig, StoppingRule | None]:
    """The campaign with at least as many cycles as a top-up begins with, and the rule of the top-up."""
    from lem.orchestration.resume import check_rule, make_rule, with_cycles

    if campaign.daemon is not None and campaign.daemon.enabled and args.budget is not None:
        raise UserError("--budget and a daemon exclude each other", "give the daemon a total_duration")
    if args.until is None:
        if args.max_cycles is not None:
            raise UserError("--max-cycles bounds --until, which is not given", "use --cycles for a fixed number")
        return campaign, None
    if args.shard is not None or args.plan is not None:
        raise UserError("--until looks at one host's results, and a part of a plan is not the campaign's")
    rule = make_rule(args.until, args.max_cycles)
    check_rule(campaign, rule)
    return with_cycles(campaign, rule.least_cycles), rule


def _load(args: argparse.Namespace) -> Loaded[CampaignConfig]:
    from lem.config.load import load_campaign, load_campaign_of_files

    # What stands behind --set is the most specific, so it comes last and wins.
    sets = [*given_flags(args, {**_WHAT, **_RESULTS, **_COMPOSE}), *args.set]
    if args.campaign_name is not None:
        return load_campaign_of_files(args.campaign_name, args.files, sets, args.preset)
    if len(args.files) > 1:
        raise UserError("several files make a campaign only with a name", "add --campaign-name NAME")
    return load_campaign(args.files[0], sets, args.preset)


def _prices(plan: Plan, campaign: CampaignConfig) -> ExpectedDurations:
    """What experiments of this plan, loads of its engines and gaps took before."""
    from lem.orchestration.plan import ExpectedDurations
    from lem.results.run import earlier_times
    from lem.results.store import Repository

    engines = {item.config_hash: item.engine_key for item in plan.configurations}
    scan = Repository(Path(campaign.io.results_dir), campaign.slug).scan()
    found = earlier_times(item.record for item in scan.results if item.record.identity.config_hash in engines)
    loads = {engines[digest]: load_s for digest, load_s in found.load.items()}
    return ExpectedDurations(found.measured, loads, found.gap)
