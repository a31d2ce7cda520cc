"""`lem experiment`: run one experiment."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lem.base import log
from lem.base.doc import screen_of, write_json
from lem.base.errors import ExitCode, UserError
from lem.cli.config import add_flags, given_flags
from lem.cli.selection import add_json, add_repeated

if TYPE_CHECKING:
    from lem.config.campaign_config import CampaignConfig
    from lem.config.experiment import ExperimentConfig
    from lem.config.load import Loaded
    from lem.orchestration.campaign import CampaignOutcome
    from lem.orchestration.plan import Plan
    from lem.record import Record


_MODEL = {"model": ("--model", "-m", "override the model"), "dataset": ("--dataset", "-d", "override the data set")}
_CYCLES = {
    "num_cycles": ("--cycles", "-c", "number of cycles (num_cycles)"),
    "warmup.min_prompts": ("--warmup-prompts", "minimum number of warm-up prompts"),
    "warmup.timeout_seconds": ("--warmup-timeout", "maximum warm-up time in seconds"),
}
_RESULTS = {"io.results_dir": ("--results-dir", "-o", "results folder")}


def add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    from lem.config.experiment import ExperimentConfig

    parser.add_argument("file", metavar="FILE", help="an experiment file")
    parser.add_argument("--preset", metavar="NAME", help="preset to start from (see lem presets)")
    add_flags(parser, ExperimentConfig, _MODEL)
    parser.add_argument("--sample-size", "-n", type=int, metavar="N", help="number of prompts")
    add_flags(parser, ExperimentConfig, _CYCLES)
    add_repeated(parser, "--set", "KEY=VALUE", "set any option, such as pytorch.batch_size=8")
    add_flags(parser, ExperimentConfig, _RESULTS)
    parser.add_argument("--python", metavar="PROGRAM", help="Python interpreter with the engine")
    parser.add_argument("--dry-run", action="store_true", help="show what would run and exit; write nothing")
    parser.add_argument(
        "--yes",
        "-y",
        action="store_true",
        help="accepted for scripts that pass it, such as dispatch into containers; an experiment never asks",
    )
    add_json(parser, "print one JSON document with the records")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    import tempfile

    from lem.cli.plan_view import render_findings
    from lem.config.load import load_experiment

    sets = [*given_flags(args, {**_MODEL, **_CYCLES, **_RESULTS}), *args.set]
    loaded = load_experiment(args.file, sets, args.preset)
    with tempfile.TemporaryDirectory(prefix="lem-experiment-") as state_dir:
        campaign = _as_campaign(loaded, Path(args.file), state_dir)
        plan = _plan(campaign, loaded, Path(args.file), args)
        if plan.warnings and not getattr(args, "quiet", False):
            err.write(render_findings(plan, is_colour=log.is_colour_wanted(err)))
        if args.dry_run:
            _describe(plan, campaign, args, out)
            return int(ExitCode.OK)
        outcome = _measure(args, campaign, plan, err)
        _show(args, campaign, outcome, out)
        if outcome.error is not None:  # its hint is about resuming, which an experiment cannot do
            log.Console(err).error(outcome.error.message)
    if outcome.signum is not None:
        return 128 + outcome.signum
    return int(ExitCode.EXPERIMENT_FAILED if outcome.error or outcome.manifest.failed_count else ExitCode.OK)


def _as_campaign(loaded: Loaded[ExperimentConfig], file: Path, state_dir: str) -> CampaignConfig:
    """The experiment as a campaign of one configuration, without gaps and with a temporary manifest."""
    from lem.config.campaign_config import CampaignConfig, CampaignExecutionConfig, CampaignIOConfig

    config = loaded.config
    return CampaignConfig(
        campaign_name=config.config_name or file.stem,
        configs=(str(file),),
        execution=CampaignExecutionConfig(cycles=config.num_cycles, config_gap_seconds=0, cycle_gap_seconds=0),
        io=CampaignIOConfig(results_dir=config.io.results_dir or "results", state_dir=state_dir),
    )


def _plan(campaign: CampaignConfig, loaded: Loaded[ExperimentConfig], file: Path, args: argparse.Namespace) -> Plan:
    from lem.config.campaign_config import CampaignConfig, with_campaign_defaults
    from lem.config.load import ListedExperiment
    from lem.meters.nvml import find_gpus
    from lem.orchestration.plan import build_plan

    mapping = loaded.source.mapping
    if args.sample_size is not None:
        chosen = CampaignConfig(campaign_name="experiment", configs=(str(file),), num_samples=args.sample_size)
        mapping = with_campaign_defaults(chosen, mapping, {"num_samples"})
    plan = build_plan(campaign, [ListedExperiment(mapping, loaded.source, file)], gpus=find_gpus() or None)
    if not plan.experiments:
        raise UserError("; ".join(reason for reason, _ in plan.filtered_by_reason), "correct the experiment file")
    return plan


def _measure(args: argparse.Namespace, campaign: CampaignConfig, plan: Plan, err: TextIO) -> CampaignOutcome:
    from lem.cli.progress import choose_progress
    from lem.orchestration.campaign import CampaignRunner
    from lem.orchestration.schedule import StopRequest
    from lem.orchestration.session import LocalExecutor

    console = log.Console(err)
    is_quiet = getattr(args, "quiet", False)
    log.configure(console, verbosity=-1 if is_quiet else getattr(args, "verbose", 0))
    stop = StopRequest()
    runner = CampaignRunner(
        campaign,
        plan=plan,
        executor=LocalExecutor(args.python),
        observe=choose_progress(console, err, is_json=False, is_quiet=is_quiet),
        stop=stop,
    )
    try:
        with stop.installed():
            return runner.run()
    finally:
        console.close()


def _show(args: argparse.Namespace, campaign: CampaignConfig, outcome: CampaignOutcome, out: TextIO) -> None:
    from lem.record import encode_record
    from lem.results.run import make_run
    from lem.results.store import Repository
    from lem.results.table import render_record, render_run

    run_id = str(outcome.manifest.run_id)
    results = Repository(Path(campaign.io.results_dir), campaign.slug).scan(run_id).results
    records: list[Record] = [result.record for result in results]
    if args.json:
        errors = [entry.error for entry in outcome.manifest.experiments if entry.error]
        if outcome.error is not None and outcome.error.message not in errors:
            errors.append(outcome.error.message)
        documents = [{"path": str(item.path), "record": encode_record(item.record)} for item in results]
        write_json(out, {"run_id": run_id, "results": documents, "errors": errors})
        return
    if len(records) == 1:
        out.write(render_record(records[0], **screen_of(out)))
    elif records:
        found = make_run(records, campaign_name=campaign.campaign_name, run_id=run_id)
        out.write(render_run(found, **screen_of(out)))
    if results:
        out.write("\n" + "".join(f"{item.path}\n" for item in results))


def _describe(plan: Plan, campaign: CampaignConfig, args: argparse.Namespace, out: TextIO) -> None:
    from lem.orchestration.plan import encode_config
    from lem.orchestration.session import LocalExecutor

    name, cycles, config = campaign.campaign_name, len(plan.experiments), plan.experiments[0].config.to_dict()
    python, results_dir = LocalExecutor(args.python).python, f"{campaign.io.results_dir}/{campaign.slug}"
    if args.json:
        document = {"name": name, "cycles": cycles, "python": python, "results_dir": results_dir, "config": config}
        write_json(out, document)
    else:
        out.write(f"{name}: {cycles} × in {python}, results in {results_dir}\n{encode_config(config)}")
