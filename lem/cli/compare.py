"""`lem compare`: compare two configurations of a run, all of them with a baseline, or two runs through an anchor."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from lem.base.doc import screen_of, write_json
from lem.base.errors import ExitCode, UserError
from lem.base.units import parse_percentage
from lem.cli import options, selection
from lem.results import compare
from lem.results.along import compare_along
from lem.results.comparison import comparison_document, render_markdown, render_text
from lem.results.configurations import Reading
from lem.results.metrics import parse_comparable
from lem.results.run import Configuration, Run
from lem.results.stats import parse_gates

_TARGET = """CAMPAIGN: all its configurations against the baseline; CAMPAIGN A B …: B and the others against A; two
campaigns or runs: the second against the first; CAMPAIGN/CONFIGURATION: one configuration"""
_EPILOG = f"""{selection.CONFIGURATION}. A campaign means its last run; name a run by its ID or a prefix of it.
Exit codes: 0 success, 2 a gate's metric was not measured, 3 a gate found a regression, 4 a gate is inconclusive."""
_DEFAULT_TOLERANCE = "5%"


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.epilog = _EPILOG
    parser.add_argument("targets", nargs="+", metavar="TARGET", help=_TARGET)
    text = "the configuration to compare with, or with --by the value of the axis (default: the first)"
    parser.add_argument("--baseline", metavar="NAME", help=text)
    text = "one verdict for each value of this axis, over the configurations that are otherwise equal"
    parser.add_argument("--by", metavar="AXIS", help=text)
    parser.add_argument("--anchor", default="", metavar="NAME", help="for two runs: the configuration common to both")
    text = "largest change of the anchor that still allows a verdict (default: 5%%)"
    parser.add_argument("--anchor-tolerance", default=_DEFAULT_TOLERANCE, metavar="PERCENT%", help=text)
    options.add_repeated(parser, "--metric", "NAME", "compare this metric")
    options.add_repeated(parser, "--gate", "METRIC=PERCENT%", "judge whether the metric changed by more than this")
    strictness = parser.add_mutually_exclusive_group()
    strictness.add_argument("--lenient", action="store_true", help="exit with 0 if a gate is inconclusive")
    strictness.add_argument("--strict", action="store_true", help="the default: exit with 4 if a gate is inconclusive")
    options.add_junit(parser, "the verdicts of the gates")
    options.add_budget(parser)
    selection.add_rates(parser)
    options.add_results_dir(parser)
    form = parser.add_mutually_exclusive_group()
    options.add_json(form)
    form.add_argument("--markdown", action="store_true", help="print Markdown, for a comment on a pull request")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    gates = parse_gates(args.gate)
    for flag in ("strict", "lenient", "junit"):
        if getattr(args, flag) and not gates:
            raise UserError(f"--{flag} requires --gate", "for example --gate energy=3%")
    metrics = [parse_comparable(text) for text in args.metric]
    comparison = _compare(args, {"metrics": metrics, "gates": gates, "is_whole": args.json})
    problems = [problem for read in comparison.runs for problem in read.problems]
    selection.list_problems(err, selection.damaged(problems))
    code = compare.gate_code(comparison, is_lenient=args.lenient)
    if args.junit is not None:
        from lem.results.junit import junit_of_gates

        options.write_file(args.junit, junit_of_gates(comparison, is_lenient=args.lenient), "--junit")
    if args.json:
        document = {**comparison_document(comparison), "problems": selection.problem_documents(problems)}
        write_json(out, {**document, "exit_code": int(code)})
    elif args.markdown:
        out.write(render_markdown(comparison))
    else:
        out.write(render_text(comparison, has_budget=args.budget, **screen_of(out)))
        if len(comparison.runs) == 1:
            args.next = ["report", comparison.runs[0].campaign_name, *options.folder_options(args.results_dir)]
    if code is ExitCode.USAGE:
        names = dict.fromkeys(row.metric.name for row in compare.unmeasured(comparison))
        raise UserError(f"gate on a metric that was not measured: {', '.join(names)}", "gate one that both sides have")
    return int(code)


class _Target(NamedTuple):
    where: selection.SelectedRun
    configuration: str | None = None  # None for the whole run


def _compare(args: argparse.Namespace, asked: Mapping[str, Any]) -> compare.Comparison:
    targets = _targets(args.results_dir, args.targets)
    runs = list(dict.fromkeys(target.where for target in targets))
    found = [_read(item, selection.reading_of(args)) for item in runs]
    if len(runs) == 1:
        if args.anchor or args.anchor_tolerance != _DEFAULT_TOLERANCE:
            raise UserError("--anchor requires two runs", "omit it: within one run, cycles are the pairs")
        if args.by is not None:
            if targets[0].configuration is not None:
                raise UserError("--by compares all configurations of a run", "name the campaign alone")
            return compare_along(found[0], args.by, args.baseline, **asked)
        baseline, others = _sides(found[0], [item.configuration for item in targets], args.baseline)
        return compare.compare_configurations(found[0], baseline, others, **asked)
    if args.baseline or args.by:
        what = "--baseline" if args.baseline else "--by"
        raise UserError(f"{what} requires a single run", "of two runs, the first is the baseline")
    before, after = found
    names = [item.configuration for item in targets]
    chosen = (before.select(names[0]), after.select(names[1])) if names[0] and names[1] else None
    anchor = compare.Anchor(args.anchor, _tolerance(args.anchor_tolerance))
    return compare.compare_runs(before, after, chosen=chosen, anchor=anchor, **asked)


def _targets(results_dir: Path, words: Sequence[str]) -> list[_Target]:
    runs = selection.list_runs(results_dir)
    first, *others = targets = [_target(runs, word) for word in words]
    if first is None and others and all(item is None for item in others):
        where = _run_with(runs, words, results_dir)
        return [_Target(where, word) for word in words]
    if first is not None and first.configuration is None and others and others[0] is None:  # CAMPAIGN A B …
        return [_Target(first.where, word) for word in words[1:]]
    found = [item for item in targets if item is not None]
    if len(found) < len(targets):
        raise selection.no_such_name(words[targets.index(None)], runs, results_dir)
    if len(found) == 1:
        return found
    are_runs = {item.configuration is None for item in found}
    n_runs = len({item.where for item in found})
    if len(are_runs) > 1:
        raise UserError("a run cannot be compared with a configuration", "name two runs, or two RUN/CONFIGURATION")
    if True in are_runs and n_runs < len(found):
        raise UserError("both name the same run", "name the other one by its ID; see `lem results list`")
    if n_runs > 2 or (n_runs == 2 and len(found) > 2):
        raise UserError(f"expected at most two configurations of different runs, got {len(found)} of {n_runs} runs")
    return found


def _target(runs: Sequence[selection.SelectedRun], word: str) -> _Target | None:
    where = selection.find_run(runs, word)
    if where is not None:
        return _Target(where)
    place, slash, configuration = word.partition("/")
    where = selection.find_run(runs, place) if slash and configuration else None
    return _Target(where, configuration) if where is not None else None


def _run_with(runs: Sequence[selection.SelectedRun], names: Sequence[str], results_dir: Path) -> selection.SelectedRun:
    last = {item.campaign: item for item in runs}
    measured = ((run, {it.record.identity.config_name for it in run.scan().results}) for run in last.values())
    found = [item for item, known in measured if set(names) <= known]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(map(repr, names))
    if not found:
        message = f"{listed}: no such campaigns, and no campaign with these configurations, in {results_dir}"
        raise UserError(message, "see `lem results list`")
    campaigns = ", ".join(item.campaign for item in found[:5])
    raise UserError(f"{listed} are configurations of {campaigns}", "name the campaign first: lem compare CAMPAIGN A B")


def _read(item: selection.SelectedRun, reading: Reading) -> Run:
    found = item.read(reading=reading)
    if not found.records:
        raise UserError(f"run {item.run_id} of {item.campaign}: no complete result", f"see `lem check {item.run_id}`")
    return found


def _sides(
    found: Run, names: Sequence[str | None], baseline_name: str | None
) -> tuple[Configuration, list[Configuration]]:
    named = [found.select(name) for name in names if name is not None]
    if baseline_name is not None:
        baseline = found.select(baseline_name)
    else:
        baseline = named.pop(0) if len(named) > 1 else found.with_results[0]
    others = [item for item in named or found.with_results if item is not baseline]
    if not others:
        raise UserError(f"{found.campaign_name}: nothing to compare {baseline.name} with")
    return baseline, others


def _tolerance(text: str) -> float:
    try:
        tolerance = parse_percentage(text)
    except ValueError as error:
        raise UserError(f"--anchor-tolerance: {error}", "for example --anchor-tolerance 5%") from error
    if not 0 < tolerance <= 1:
        raise UserError(f"--anchor-tolerance: expected more than 0% and at most 100%, got {text!r}")
    return tolerance
