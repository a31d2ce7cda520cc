"""`lem campaign`: run a campaign file, or several experiment files as one campaign."""

from __future__ import annotations

import argparse
import bisect
import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from lem.base import log
from lem.base.dataclass import dataclass, field, replace
from lem.base.doc import Column, columns, terminal_width, wrapped, write_json
from lem.base.errors import UserError
from lem.base.log import WIDTH, paint
from lem.base.reasons import Reason
from lem.base.units import ABSENT, format_duration, hash_label, parse_duration, percent, plural, some_of
from lem.cli.config import add_flags, given_flags
from lem.cli.options import add_json, add_repeated, checked, typed_again
from lem.cli.prometheus import prometheus_path
from lem.config.campaign_config import GROUPED, CampaignConfig
from lem.config.load import Loaded, load_campaign, load_campaign_of_files
from lem.config.option import declared
from lem.config.sections import GpuConfig
from lem.orchestration.executor import EXECUTORS, ExecutorChoice, choose_executor
from lem.orchestration.host_meters import HostMeters
from lem.orchestration.plan import ExpectedDurations, Experiment, FleetPart, Plan, plan_campaign
from lem.orchestration.preflight import check_supported, foresee, gap_advice, lines_of
from lem.record import Record
from lem.results.aggregation import RUN_NOISE, Sensitivity, earlier_sensitivity, earlier_times
from lem.results.metrics import SHORT_NAMES, Metric
from lem.results.run import ENERGY, NO_INTERVAL, THROUGHPUT
from lem.results.stats import CONFIDENCE, Gate, parse_gates
from lem.results.stopping import StoppingRule, parse_target
from lem.results.store import Repository
from lem.results.student import MOST_CYCLES_PLANNED, POWER
from lem.results.trends import BLOCKS

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
    "io.compose_file": ("--compose-file", "compose file of the backends; may be repeated"),
    "io.env_file": ("--env-file", "environment file for compose"),
}

_REASONS_SHOWN = 10
_ORDER_SHOWN = 30


@dataclass(frozen=True)
class Job:
    campaign: CampaignConfig
    plan: Plan
    choice: ExecutorChoice
    rule: StoppingRule | None = None  # adds cycles
    part: FleetPart = field(default_factory=FleetPart)


def add_campaign_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run a campaign file, or several experiment files with --campaign-name."
    parser.add_argument("files", nargs="+", metavar="FILE", help="a campaign file, or experiment files")
    parser.add_argument("--campaign-name", metavar="NAME", help="run the experiment files as a campaign of this name")
    what = parser.add_argument_group("what to run (overrides the file)")
    add_flags(what, CampaignConfig, _WHAT)
    what.add_argument("--preset", metavar="NAME", help="preset that experiments start from (see lem presets)")
    add_repeated(what, "--set", "KEY=VALUE", "set any option, such as execution.cycles=5")
    where = parser.add_argument_group("where to run and write")
    add_flags(where, CampaignConfig, _RESULTS)
    where.add_argument("--executor", choices=EXECUTORS, default="auto", help="where experiments run")
    where.add_argument("--python", metavar="PROGRAM", help="Python interpreter with the engines, for --executor local")
    add_flags(where, CampaignConfig, _COMPOSE)
    _add_control(parser.add_argument_group("starting and stopping"))
    _add_fleet(parser.add_argument_group("several hosts"))
    add_json(parser, "print one JSON object per event, one per line")
    parser.set_defaults(run=run)


def _add_control(group: argparse._ArgumentGroup) -> None:
    add, beginning = group.add_argument, group.add_mutually_exclusive_group()
    text = "resume an unfinished campaign; --no-resume is the same as --fresh"
    beginning.add_argument("--resume", action=argparse.BooleanOptionalAction, default=None, help=text)
    beginning.add_argument("--fresh", action="store_true", help="set the previous manifest aside and start over")
    text = "resume even if the engine, driver or GPU changed"
    add("--allow-environment-change", action="store_true", help=text)
    text = (
        "add cycles, at least 5, until every ratio to the first configuration has an interval this narrow; "
        "each=2%%: until every configuration's own has; METRIC=3%%: until this gate has its verdicts"
    )
    add("--until", type=partial(checked, parse_target), metavar="ci=2%[:METRIC]", help=text)
    add("--max-cycles", type=int, metavar="N", help="with --until: maximum number of cycles (default: 20)")
    text = "start no experiment after this time; the running one finishes; exit code 124"
    add("--budget", type=partial(checked, parse_duration), metavar="8h", help=text)
    add("--dry-run", action="store_true", help="show the plan and exit; write nothing")
    text = "with --dry-run: also show how many cycles decide this gate of lem compare"
    add_repeated(group, "--gate", "METRIC=PERCENT%", text)
    add("--validate-only", action="store_true", help="validate and exit; write nothing")
    add("--yes", "-y", action="store_true", help="do not ask; resume an unfinished campaign")
    text = "keep this file current with state and results, for node_exporter; its name ends in .prom"
    add("--prometheus", type=partial(checked, prometheus_path), metavar="FILE", help=text)
    add("--fail-fast", action="store_true", help="stop after the first failed experiment")


def _add_fleet(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--shard", metavar="I/N", help="run only the part of host I of N")
    text = "take the part from this stored plan; with --write-plan: divide its experiments without a result"
    add("--plan", type=Path, metavar="PLAN", help=text)
    add("--write-plan", type=Path, metavar="PLAN", help="divide the campaign, store the plan and exit")
    add("--hosts", metavar="A,B,…", help="host names, for --write-plan")
    add("--parts", type=int, metavar="N", help="instead of --hosts: N parts, part-1 to part-N, for a cluster")
    add("--replicate", action="store_true", help="with --write-plan: every host runs the whole campaign")


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int | None:
    if args.gate and not args.dry_run:
        remedy = "after the campaign, use `lem compare CAMPAIGN --gate METRIC=PERCENT%`"
        raise UserError("--gate requires --dry-run", remedy)
    gates = parse_gates(args.gate)
    plan, rule = _plan(args)
    campaign = plan.campaign
    gc.freeze()  # what a plan holds stays, and looking through it again and again takes as long as making it
    if not args.quiet:
        err.write(render_findings(plan, is_colour=log.is_colour_wanted(err)))
        err.flush()
    if not plan.experiments:
        raise UserError("no valid experiment is left", "`lem campaign --dry-run` lists each reason; nothing was run")
    if args.write_plan is not None:
        from lem.cli.parts import store_plan  # it and others below are imported where they are needed, for dry runs

        store_plan(args, campaign, plan, _expected_durations(plan, _earlier_results(plan)).measured_by_config, out)
        return None
    part = FleetPart()
    if any(it is not None for it in (args.shard, args.plan, args.hosts, args.parts)) or args.replicate:
        from lem.cli.parts import own_part

        plan, part = own_part(args, plan)
    if args.validate_only:
        if args.json:
            write_json(out, plan_document(plan))
        return None
    choice = choose_executor(args.executor, campaign, plan, python=args.python, part=part.folder)
    job = Job(campaign, plan, choice, rule, part)
    check_supported(plan, job.choice.name, rule)
    if not args.dry_run:
        from lem.cli.campaign_run import CampaignCommand

        if not args.quiet:
            facts = PlannedPower.of(plan, _earlier_results(plan)).facts()
            err.writelines(f"{line}\n" for line in _lines(facts, terminal_width(err)))
            err.flush()
        return CampaignCommand(args, job, out, err).execute()
    problems = foresee(plan, job.choice.name, args.python)
    earlier = _earlier_results(plan)
    durations, power = _expected_durations(plan, earlier), PlannedPower.of(plan, earlier, gates)
    if args.json:
        document = {**plan_document(plan), "expected_s": expected_document(plan, durations)}
        document |= {"executor": job.choice.name, "place": job.choice.describe(), "detectable": power.document()}
        document["problems"] = [vars(item) for item in problems]
        write_json(out, document)
    else:
        out.write(render_plan(job, durations, power, args.budget, terminal_width(out)))
        for item in problems:
            message, *hint = lines_of(item)
            err.write(f"problem: {message}\n" + "".join(f"  {line}\n" for line in hint))
    args.next = [] if problems else typed_again(args, "--dry-run", "--gate")
    return None


def _plan(args: argparse.Namespace) -> tuple[Plan, StoppingRule | None]:
    loaded = _load(args)
    rule = _rule(args, loaded.config)
    return plan_campaign(loaded).with_cycles(0 if rule is None else rule.least_cycles), rule


def _load(args: argparse.Namespace) -> Loaded[CampaignConfig]:
    # --set is the most specific, so it comes last and wins.
    sets = [*given_flags(args, {**_WHAT, **_RESULTS, **_COMPOSE}), *args.set]
    if args.campaign_name is not None:
        return load_campaign_of_files(args.campaign_name, args.files, sets, args.preset)
    if len(args.files) > 1:
        raise UserError("several files require a campaign name", "add --campaign-name NAME")
    return load_campaign(args.files[0], sets, args.preset)


def _rule(args: argparse.Namespace, campaign: CampaignConfig) -> StoppingRule | None:
    if campaign.daemon is not None and campaign.daemon.enabled and args.budget is not None:
        raise UserError("--budget cannot be combined with a daemon", "set the total_duration of the daemon")
    if args.until is None:
        if args.max_cycles is not None:
            raise UserError("--max-cycles requires --until", "use --cycles for a fixed number")
        return None
    if args.shard is not None or args.plan is not None:
        raise UserError("--until needs all results of the campaign and cannot be combined with --shard or --plan")
    from lem.orchestration.resume import check_rule, make_rule

    rule = make_rule(args.until, args.max_cycles)
    check_rule(campaign, rule)
    return rule


def _earlier_results(plan: Plan) -> list[Record]:
    hashes = {item.config_hash for item in plan.configurations}
    scan = Repository(Path(plan.campaign.io.results_dir), plan.campaign.slug).scan()
    return [item.record for item in scan.results if item.record.identity.config_hash in hashes]


def _expected_durations(plan: Plan, earlier: Sequence[Record]) -> ExpectedDurations:
    engines = {item.config_hash: item.engine_key for item in plan.configurations}
    found = earlier_times(earlier)
    loads = {engines[digest]: load_s for digest, load_s in found.load.items()}
    return ExpectedDurations(found.measured, loads, found.gap)


# --- the plan before it runs


def render_findings(plan: Plan, *, is_colour: bool = False) -> str:
    lines = [plan.summary]
    lines += _reasons(paint("filtered:", "red", is_colour=is_colour), plan.filtered_by_reason)
    lines += _reasons(paint("warning:", "yellow", is_colour=is_colour), plan.warnings_by_reason)
    return "\n".join(lines) + "\n"


def _reasons(label: str, reasons: Sequence[tuple[str, int]]) -> Iterator[str]:
    yield from (f"{label} {reason}" + f" × {count}" * (count > 1) for reason, count in reasons[:_REASONS_SHOWN])
    if len(reasons) > _REASONS_SHOWN:
        yield f"{label} and {len(reasons) - _REASONS_SHOWN} more reasons"


def render_plan(
    job: Job, durations: ExpectedDurations, power: PlannedPower, budget_s: float | None = None, width: int = WIDTH
) -> str:
    campaign, plan, rule = job.campaign, job.plan, job.rule
    cycles = plural(campaign.execution.cycles, "cycle")
    configurations = plural(len(plan.configurations), "configuration")
    order = campaign.execution.structure
    reuse = "none, cold start" if plan.is_cold else campaign.execution.reuse
    facts = {
        "campaign": f"{campaign.campaign_name} ({hash_label(campaign.campaign_id)})",
        "experiments": f"{configurations} × {cycles} = {len(plan.experiments)}",
        "order": order if plan.shuffle_seed is None else f"{order}, seed {plan.shuffle_seed}",
        "engine loads": f"{sum(plan.loads())} (reuse: {reuse})",
        "expected time": _expected(plan, durations),
    }
    if plan.enlarged_to is not None:
        facts["prompts"] = f"{plan.enlarged_to} where none are named: the widest configuration runs as many at once"
    if rule is not None:
        longest = _expected(plan.with_cycles(rule.most_cycles), durations, about="")
        facts["top-up"] = f"{rule.describe()}; at most {longest}"
    if (advice := gap_advice(plan, HostMeters.found().gpu_error)) is not None:
        facts["gaps"] = advice
    if settings := _gpu_settings(plan):
        facts["GPU settings"] = f"{settings}; after each experiment, what was set before is restored"
    if budget_s is not None:
        facts["budget"] = f"{format_duration(budget_s)}, {_fitting(plan, durations, budget_s)}"
    facts["runs on"] = job.choice.describe()
    if servers := dict.fromkeys(text for item in plan.experiments if (text := item.server) is not None):
        facts["servers"] = "; ".join(servers)
    facts["results in"] = f"{campaign.io.results_dir}/{campaign.slug}"
    if job.part.folder:
        facts["part"] = f"{job.part.folder}, a folder in that of the run"
    return "\n".join([*_lines({**facts, **power.facts()}, width), "", *_order(plan, width)]) + "\n"


def _gpu_settings(plan: Plan) -> str:
    found = []
    for name, item in declared(GpuConfig).items():
        values = {getattr(one.config.gpu, name) for one in plan.configurations} - {None}
        if values:
            found.append(f"{name} {', '.join(f'{value:g}' for value in sorted(values))} {item.unit}")
    return "; ".join(found)


def _lines(facts: Mapping[str, str], width: int) -> Iterator[str]:
    room = max(map(len, facts)) + 2
    for name, text in facts.items():
        yield from wrapped(text, width, f"{name + ':':<{room}}")


_DIFFERENCES = (0.01, 0.02, 0.03, 0.05)


@dataclass(frozen=True)
class PlannedPower:
    cycles: int
    n_comparisons: int  # that Holm adjusts together
    metrics: tuple[Sensitivity, ...]  # energy and throughput, or those of the gates
    gates: Mapping[Metric, float] = field(default_factory=dict)  # their thresholds
    reason: Reason | None = None  # why no difference can be detected

    @classmethod
    def of(cls, plan: Plan, earlier: Sequence[Record], gates: Sequence[Gate] = ()) -> PlannedPower:
        cycles, n_pairs = plan.execution.cycles, len(plan.configurations) - 1
        reason = Reason.of("one_cycle") if cycles == 1 else None
        is_shared = plan.execution.reuse == "campaign" or any(it.config.has_running_engine for it in plan.experiments)
        reason = NO_INTERVAL if is_shared and not plan.is_cold else reason
        reason = BLOCKS if plan.execution.structure == GROUPED else reason
        reason = reason if n_pairs else Reason.of("nothing_to_compare")
        thresholds = {gate.metric: gate.threshold for gate in gates}
        metrics = [*thresholds] or [ENERGY, THROUGHPUT]
        measured = {item.metric: item for it in metrics if (item := earlier_sensitivity(earlier, it)) is not None}
        is_load_shared = sum(plan.loads()) <= cycles
        found = [
            measured.get(metric) or Sensitivity.assumed(metric, is_load_shared=is_load_shared)
            for metric in metrics
            if metric in measured or gates or not measured
        ]
        return cls(cycles, n_pairs * len(found), tuple(found), thresholds, reason)

    def facts(self) -> dict[str, str]:
        if self.reason is not None:
            return {"detects": f"no difference: {self.reason}"}
        n, cycles, worst = self.n_comparisons, self.cycles, max(self.metrics, key=lambda item: item.spread)
        detects = _by_metric((_size(it.smallest(cycles, n)), "", it) for it in self.metrics)
        detects += f", with {percent(POWER)} power"
        if n > 1:
            alone = worst.smallest(cycles)
            left = percent(worst.power(cycles, alone, n))
            detects += f" in each of {n} comparisons (Holm); alone {_size(alone)}, for which {n} leave {left} power"
        needed = {percent(size): worst.needed(size, n) for size in _DIFFERENCES}
        if self.gates:
            gated = ((it, self.gates[it.metric]) for it in self.metrics)
            needed = {_gate_text(it.metric, size): it.needed(size, n, is_gate=True) for it, size in gated}
        counts = ", ".join(f"{count or f'over {MOST_CYCLES_PLANNED}'} for {what}" for what, count in needed.items())
        return {
            "detects": detects,
            "cycles needed": counts + (", if the configurations are equal" if self.gates else ""),
            "spread": _by_metric((percent(it.spread), f" ({_origin(it)})", it) for it in self.metrics),
        }

    def document(self) -> dict[str, Any]:
        return {
            "power": POWER,
            "confidence": CONFIDENCE,
            "cycles": self.cycles,
            "comparisons": self.n_comparisons,
            "reason": self.reason and self.reason.text,
            "metrics": [self._metric_document(item) for item in self.metrics],
        }

    def _metric_document(self, item: Sensitivity) -> dict[str, Any]:
        origin = {"metric": item.metric.name, "spread": item.spread, "pairs": item.n_pairs, "run_ids": [*item.run_ids]}
        if self.reason is not None:
            return origin
        n, cycles, gate = self.n_comparisons, self.cycles, self.gates.get(item.metric)
        alone = item.smallest(cycles)
        sizes = _DIFFERENCES if gate is None else (gate,)
        return {
            **origin,
            "smallest_difference": item.smallest(cycles, n),
            "smallest_difference_alone": alone,
            "power_for_smallest_alone": item.power(cycles, alone, n),
            "gate": gate,
            "cycles_needed": [
                {"difference": size, "cycles": item.needed(size, n, is_gate=gate is not None)} for size in sizes
            ],
        }


def _size(difference: float) -> str:
    return percent(difference) if difference < 1 else "over 100 %"


def _gate_text(metric: Metric, threshold: float) -> str:
    return f"gate {SHORT_NAMES.get(metric.name, metric.name)}={100 * threshold:g}%"


def _by_metric(items: Iterable[tuple[str, str, Sensitivity]]) -> str:
    found: dict[tuple[str, str], list[str]] = {}
    for size, more, item in items:
        found.setdefault((size, more), []).append(SHORT_NAMES.get(item.metric.name, item.metric.name))
    return ", ".join(f"{size} in {' and '.join(names)}{more}" for (size, more), names in found.items())


def _origin(item: Sensitivity) -> str:
    if not item.n_pairs:
        loads = f", loads {percent(item.load_noise)}" if item.load_noise else ""
        return f"assumed: runs {percent(RUN_NOISE)}{loads}"
    *others, last = item.run_ids
    runs = f"{len(item.run_ids)} runs, the last {last}" if others else f"run {last}"
    return f"from {plural(item.n_pairs, 'pair')} of cycles of {runs}"


def plan_document(plan: Plan) -> dict[str, Any]:
    gaps = [plan.gap_cap_s(kind) for kind in plan.gap_kinds()]
    return {
        "generated": plan.total_generated,
        "filtered": [{"reason": reason, "count": count} for reason, count in plan.filtered_by_reason],
        "warnings": [{"reason": reason, "count": count} for reason, count in plan.warnings_by_reason],
        "engine_loads": sum(plan.loads()),
        "shuffle_seed": plan.shuffle_seed,
        "experiments": [
            {
                "exp_id": item.exp_id,
                "config_name": item.config_name,
                "backend": item.backend,
                "cycle_index": item.cycle_index,
                "order_index": item.order_index,
                "loads_engine": is_load,
                "gap_cap_s": gap_s,
            }
            for item, is_load, gap_s in zip(plan.experiments, plan.loads(), gaps, strict=True)
        ],
    }


def expected_document(plan: Plan, durations: ExpectedDurations) -> dict[str, Any]:
    expected = plan.expected_time(durations)
    return {
        "total": expected.total_s,
        "measuring": expected.measured_s,
        "loading": expected.loading_s,
        "gaps": expected.gaps_s,
        "gaps_at_most": expected.most_gaps_s,
        "is_complete": expected.is_complete,
    }


def _expected(plan: Plan, durations: ExpectedDurations, about: str = "about ") -> str:
    expected = plan.expected_time(durations)
    early = f" {format_duration(expected.gaps_s)}," if expected.gaps_s < expected.most_gaps_s else ""
    gaps = f"gaps{early} at most {format_duration(expected.most_gaps_s)}" if expected.most_gaps_s else "no gaps"
    if expected.measured_s is None or expected.loading_s is None or expected.total_s is None:
        return f"unknown before the first run; {gaps}"
    guess = "" if expected.is_complete else ", partly estimated from other configurations"
    return (
        f"{about}{format_duration(expected.total_s)} (measuring {format_duration(expected.measured_s)}, "
        f"loading {format_duration(expected.loading_s)}, {gaps}{guess})"
    )


def _fitting(plan: Plan, durations: ExpectedDurations, budget_s: float) -> str:
    total = plan.expected_time(durations).total_s
    if total is None:
        return "how much of the plan fits is unknown before the first run"
    if total <= budget_s:
        return "enough for the whole plan"

    def time_before(place: int) -> float:
        return replace(plan, experiments=plan.experiments[:place]).expected_time(durations).total_s or 0.0

    started = bisect.bisect_left(range(len(plan.experiments)), budget_s, key=time_before)
    return f"enough to start about {started} of {len(plan.experiments)} experiments; --resume runs the rest"


def _load_text(item: Experiment, is_load: bool, _gap_s: float) -> str:
    return "running" if item.config.has_running_engine else "load" if is_load else "reuse"


def _order(plan: Plan, width: int) -> Iterator[str]:
    numbers = {item.config_hash: number for number, item in enumerate(plan.given, 1)}
    cycles: dict[int, list[tuple[Experiment, bool, float]]] = {}
    for step in zip(plan.experiments, plan.loads(), map(plan.gap_cap_s, plan.gap_kinds()), strict=True):
        cycles.setdefault(step[0].cycle_index, []).append(step)
    (first, steps), *others = cycles.items()
    shown = steps[:_ORDER_SHOWN]
    table = [
        Column("backend", tuple(item.backend for item, *_ in shown), is_text=True),
        Column("engine", tuple(_load_text(*step) for step in shown), is_text=True),
        Column("gap before", tuple(format_duration(gap_s) if gap_s else ABSENT for *_, gap_s in shown)),
    ]
    names = [f"{numbers[item.config_hash]} {item.config_name}" for item, *_ in shown]
    yield from columns(f"cycle {first + 1}", names, table, width)
    if len(steps) > len(shown):
        yield f"and {len(steps) - len(shown)} more"
    if others and plan.execution.structure == GROUPED:
        yield from wrapped(f"{len(cycles)} cycles: each experiment runs in all of them before the next one.", width)
        return
    orders = {cycle: [numbers[item.config_hash] for item, *_ in own] for cycle, own in cycles.items()}
    differences: dict[str, list[int]] = {}
    for cycle, own in others:
        named = some_of([*map(str, orders[cycle])], _ORDER_SHOWN, " ")
        parts = ["the same order" if orders[cycle] == orders[first] else f"order {named}"]
        parts += [f"after a gap of at most {format_duration(own[0][2])}"] if own[0][2] else []
        loads = sum(is_load for _, is_load, _ in own)
        parts += [plural(loads, "engine load")] if loads != sum(is_load for _, is_load, _ in steps) else []
        differences.setdefault(", ".join(parts), []).append(cycle + 1)
    for text, them in differences.items():
        which = f"{them[0]} to {them[-1]}" if len(them) == them[-1] - them[0] + 1 > 2 else ", ".join(map(str, them))
        yield from wrapped(text, width, f"cycle{'s' * (len(them) > 1)} {which}: ")
