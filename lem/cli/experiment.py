"""`lem experiment`: run one experiment, from a file or from options alone."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, TextIO

from lem.base import durable, log
from lem.base.doc import screen_of, write_json
from lem.base.errors import ExitCode, UserError
from lem.cli.campaign import render_findings
from lem.cli.config import add_flags, given_flags
from lem.cli.options import add_json, add_repeated, folder_options, typed_again
from lem.cli.progress import choose_progress
from lem.config.campaign_config import CampaignConfig, CampaignExecutionConfig, CampaignIOConfig, with_campaign_defaults
from lem.config.experiment import ExperimentConfig
from lem.config.load import ListedExperiment, Loaded, encode_config, load_experiment
from lem.meters.nvml import find_gpus
from lem.orchestration.campaign import CampaignRunner
from lem.orchestration.dispatch import LocalExecutor
from lem.orchestration.plan import Plan, build_plan
from lem.orchestration.preflight import check_supported
from lem.orchestration.schedule import CampaignOutcome, StopRequest
from lem.record import encode_record
from lem.results.detail import render_record
from lem.results.run import make_run
from lem.results.store import Repository
from lem.results.table import render_run

_MODEL = {
    "model": ("--model", "-m", "the model: a name on the hub, or a folder"),
    "dataset": ("--dataset", "-d", "the data set (see lem datasets)"),
}
_CYCLES = {
    "num_cycles": ("--cycles", "-c", "number of cycles (num_cycles)"),
    "warmup.min_prompts": ("--warmup-prompts", "minimum number of warm-up prompts"),
    "warmup.timeout_seconds": ("--warmup-timeout", "maximum warm-up time in seconds"),
}
_RESULTS = {"io.results_dir": ("--results-dir", "-o", "results folder")}


def add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="an experiment file; not needed with --model")
    parser.add_argument("--preset", metavar="NAME", help="preset to start from (see lem presets)")
    add_flags(parser, ExperimentConfig, _MODEL)
    parser.add_argument("--sample-size", "-n", type=int, metavar="N", help="number of prompts")
    add_flags(parser, ExperimentConfig, _CYCLES)
    add_repeated(parser, "--set", "KEY=VALUE", "set any option, such as pytorch.batch_size=8")
    add_flags(parser, ExperimentConfig, _RESULTS)
    parser.add_argument("--python", metavar="PROGRAM", help="Python interpreter with the engine")
    parser.add_argument("--dry-run", action="store_true", help="show what would run and exit; write nothing")
    text = "accepted for scripts that pass it, such as dispatch into containers; an experiment never asks"
    parser.add_argument("--yes", "-y", action="store_true", help=text)
    add_json(parser, "print one JSON document with the records")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    if args.file is None and not (args.model or any(text.startswith("model") for text in args.set)):
        raise UserError("expected an experiment file, or --model NAME", "for example: lem experiment --model gpt2")
    loaded = load_experiment(args.file, [*given_flags(args, {**_MODEL, **_CYCLES, **_RESULTS}), *args.set], args.preset)
    with durable.scratch_folder(Path(tempfile.gettempdir())) as state_dir:
        campaign, plan = _as_campaign(loaded, args, str(state_dir))
        if plan.warnings and not args.quiet:
            err.write(render_findings(plan, is_colour=log.is_colour_wanted(err)))
        executor = LocalExecutor(args.python)
        check_supported(plan, executor.name)
        if args.dry_run:
            _describe(plan, campaign, executor.python, args, out)
            args.next = typed_again(args, "--dry-run")
            return ExitCode.OK
        console, stop = log.Console(err), StopRequest()
        log.configure(console, verbosity=-1 if args.quiet else args.verbose)
        observe = choose_progress(console, err, is_json=False, is_quiet=args.quiet)
        runner = CampaignRunner(campaign, plan=plan, executor=executor, observe=observe, stop=stop)
        try:
            with stop.installed():
                outcome = runner.run()
        finally:
            console.close()
        _show(args, campaign, outcome, out)
        if outcome.manifest.completed_count:
            args.next = ["check", campaign.slug, *folder_options(Path(campaign.io.results_dir))]
        if outcome.error is not None:  # its hint is about resuming, which an experiment cannot do
            log.Console(err).error(outcome.error.message)
    if outcome.signum is not None:
        return 128 + outcome.signum
    return ExitCode.EXPERIMENT_FAILED if outcome.error or outcome.manifest.failed_count else ExitCode.OK


def _as_campaign(loaded: Loaded[ExperimentConfig], args: argparse.Namespace, state: str) -> tuple[CampaignConfig, Plan]:
    config, mapping = loaded.config, loaded.source.mapping
    file = None if args.file is None else Path(args.file)
    name = config.config_name or (Path(config.model.name).resolve().name or "experiment" if file is None else file.stem)
    what: dict[str, Any] = {"experiments": ({"inline": dict(mapping)},)} if file is None else {"configs": (str(file),)}
    campaign = CampaignConfig(
        campaign_name=name,
        **what,
        execution=CampaignExecutionConfig(cycles=config.num_cycles, config_gap_seconds=0, cycle_gap_seconds=0),
        io=CampaignIOConfig(results_dir=config.io.results_dir or "results", state_dir=state),
    )
    if args.sample_size is not None:
        chosen = CampaignConfig(campaign_name=name, **what, num_samples=args.sample_size)
        mapping = with_campaign_defaults(chosen, mapping, {"num_samples"})
    plan = build_plan(campaign, [ListedExperiment(mapping, loaded.source, file)], gpus=find_gpus() or None)
    if not plan.experiments:
        remedy = "correct the options" if file is None else "correct the experiment file"
        raise UserError("; ".join(reason for reason, _ in plan.filtered_by_reason), remedy)
    return campaign, plan


def _show(args: argparse.Namespace, campaign: CampaignConfig, outcome: CampaignOutcome, out: TextIO) -> None:
    run_id = str(outcome.manifest.run_id)
    results = Repository(Path(campaign.io.results_dir), campaign.slug).scan(run_id).results
    records = [result.record for result in results]
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


def _describe(plan: Plan, campaign: CampaignConfig, python: str, args: argparse.Namespace, out: TextIO) -> None:
    name, cycles, config = campaign.campaign_name, len(plan.experiments), plan.experiments[0].config.to_dict()
    results_dir = f"{campaign.io.results_dir}/{campaign.slug}"
    if args.json:
        document = {"name": name, "cycles": cycles, "python": python, "results_dir": results_dir, "config": config}
        write_json(out, document)
    else:
        out.write(f"{name}: {cycles} × in {python}, results in {results_dir}\n{encode_config(config)}")
