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
    from lem.results.store import StoppingRule, Target


_WHAT = {
    "model": ("--model", "-m", "model for experiments that do not set one"),
    "dataset": ("--dataset", "-d", "data set for experiments without prompts"),
    "num_samples": ("--sample-size", "-n", "prompts per experiment"),
    "execution.cycles": ("--cycles", "-c", "cycles; each one runs every experiment once"),
    "execution.structure": ("--structure", "order of experiments"),
    "execution.seed": ("--seed", "seed for the shuffled order"),
    "execution.warmup_prompts": ("--warmup-prompts", "minimum number of warm-up prompts"),
    "execution.warmup_timeout_seconds": ("--warmup-timeout", "maximum warm-up time in seconds"),
    "execution.config_gap_seconds": ("--config-gap", "maximum gap between experiments in seconds"),
    "execution.cycle_gap_seconds": ("--cycle-gap", "maximum gap between cycles in seconds"),
    "cold_start.force_cold_start": ("--force-cold-start", "start a new worker for every experiment"),
}
_RESULTS = {"io.results_dir": ("--results-dir", "-o", "results folder")}
_COMPOSE = {
    "io.compose_file": ("--compose-file", "compose file of the backends"),
    "io.env_file": ("--env-file", "environment file for compose"),
}


def add_campaign_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run a campaign file, or several experiment files with --campaign-name."
    parser.allow_abbrev = False  # the resume command repeats the arguments as they were typed
    parser.add_argument("files", nargs="+", metavar="FILE", help="a campaign file, or experiment files")
    parser.add_argument("--campaign-name", metavar="NAME", help="run the experiment files as a campaign of this name")
    _add_overrides(parser.add_argument_group("what to run (overrides the file)"))
    _add_placement(parser.add_argument_group("where to run and write"))
    _add_control(parser.add_argument_group("starting and stopping"))
    _add_fleet(parser.add_argument_group("several hosts"))
    add_json(parser, "print one JSON object per event, one per line")
    parser.set_defaults(run=run)


def _add_overrides(group: argparse._ArgumentGroup) -> None:
    from lem.config.campaign_config import CampaignConfig

    add_flags(group, CampaignConfig, _WHAT)
    group.add_argument("--preset", metavar="NAME", help="preset that experiments start from (see lem presets)")
    add_repeated(group, "--set", "KEY=VALUE", "set any option, such as execution.cycles=5")


def _add_placement(group: argparse._ArgumentGroup) -> None:
    from lem.config.campaign_config import CampaignConfig

    add_flags(group, CampaignConfig, _RESULTS)
    group.add_argument("--executor", choices=("auto", "docker", "local"), default="auto", help="where experiments run")
    group.add_argument(
        "--python", metavar="PROGRAM", help="Python interpreter with the engines, for the local executor"
    )
    add_flags(group, CampaignConfig, _COMPOSE)


def _add_control(group: argparse._ArgumentGroup) -> None:
    beginning = group.add_mutually_exclusive_group()
    beginning.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="resume an unfinished campaign; --no-resume is the same as --fresh",
    )
    beginning.add_argument("--fresh", action="store_true", help="set the previous manifest aside and start over")
    group.add_argument(
        "--allow-environment-change", action="store_true", help="resume even if the engine, driver or GPU changed"
    )
    group.add_argument(
        "--until",
        type=_target,
        metavar="ci=2%[:METRIC]",
        help="add cycles, at least 5, until every configuration's interval is this narrow",
    )
    group.add_argument(
        "--max-cycles", type=int, metavar="N", help="with --until: maximum number of cycles (default: 20)"
    )
    group.add_argument(
        "--budget",
        type=partial(checked, parse_duration),
        metavar="8h",
        help="start no experiment after this time; the running one finishes; exit code 124",
    )
    group.add_argument("--dry-run", action="store_true", help="show the plan and exit; write nothing")
    group.add_argument("--validate-only", action="store_true", help="validate and exit; write nothing")
    group.add_argument("--yes", "-y", action="store_true", help="do not ask; resume an unfinished campaign")
    group.add_argument("--fail-fast", action="store_true", help="stop after the first failed experiment")


def _add_fleet(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--shard", metavar="I/N", help="run only the part of host I of N")
    group.add_argument(
        "--plan",
        type=Path,
        metavar="PLAN",
        help="take the part from this stored plan; with --write-plan: divide its experiments without a result",
    )
    group.add_argument("--write-plan", type=Path, metavar="PLAN", help="divide the campaign, store the plan and exit")
    group.add_argument("--hosts", metavar="A,B,…", help="host names, for --write-plan")
    group.add_argument("--replicate", action="store_true", help="with --write-plan: every host runs the whole campaign")


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
        raise UserError("no valid experiment is left", "`lem campaign --dry-run` lists each reason; nothing was run")
    if args.write_plan is not None:
        from lem.cli.fleet import store_plan

        return store_plan(args, campaign, plan, _expected_durations(plan, campaign).measured_by_config, out)
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
        durations = _expected_durations(plan, campaign)
        if args.json:
            document = {**plan_document(plan), "expected_s": expected_document(plan, durations)}
            write_json(out, {**document, "executor": choice.name, "place": choice.describe()})
        else:
            longest = None if rule is None else prolong_plan(plan, with_cycles(campaign, rule.most_cycles))
            place = choice.describe()
            out.write(render_plan(plan, campaign, place, durations, rule=rule, longest=longest, budget_s=args.budget))
        return int(ExitCode.OK)
    from lem.cli.campaign_run import CampaignCommand

    return CampaignCommand(args, campaign, plan, choice, out, err, part).execute()


def _target(text: str) -> Target:
    from lem.results.aggregation import parse_target

    return checked(parse_target, text)


def _with_rule(args: argparse.Namespace, campaign: CampaignConfig) -> tuple[CampaignConfig, StoppingRule | None]:
    """The campaign with at least the first cycles of a top-up, and the stopping rule."""
    from lem.orchestration.resume import check_rule, make_rule, with_cycles

    if campaign.daemon is not None and campaign.daemon.enabled and args.budget is not None:
        raise UserError("--budget cannot be combined with a daemon", "set the total_duration of the daemon")
    if args.until is None:
        if args.max_cycles is not None:
            raise UserError("--max-cycles requires --until", "use --cycles for a fixed number")
        return campaign, None
    if args.shard is not None or args.plan is not None:
        raise UserError("--until needs all results of the campaign and cannot be combined with --shard or --plan")
    rule = make_rule(args.until, args.max_cycles)
    check_rule(campaign, rule)
    return with_cycles(campaign, rule.least_cycles), rule


def _load(args: argparse.Namespace) -> Loaded[CampaignConfig]:
    from lem.config.load import load_campaign, load_campaign_of_files

    # --set is the most specific, so it comes last and wins.
    sets = [*given_flags(args, {**_WHAT, **_RESULTS, **_COMPOSE}), *args.set]
    if args.campaign_name is not None:
        return load_campaign_of_files(args.campaign_name, args.files, sets, args.preset)
    if len(args.files) > 1:
        raise UserError("several files require a campaign name", "add --campaign-name NAME")
    return load_campaign(args.files[0], sets, args.preset)


def _expected_durations(plan: Plan, campaign: CampaignConfig) -> ExpectedDurations:
    """How long this plan's experiments, engine loads and gaps took in earlier runs."""
    from lem.orchestration.plan import ExpectedDurations
    from lem.results.aggregation import earlier_times
    from lem.results.store import Repository

    engines = {item.config_hash: item.engine_key for item in plan.configurations}
    scan = Repository(Path(campaign.io.results_dir), campaign.slug).scan()
    found = earlier_times(item.record for item in scan.results if item.record.identity.config_hash in engines)
    loads = {engines[digest]: load_s for digest, load_s in found.load.items()}
    return ExpectedDurations(found.measured, loads, found.gap)
