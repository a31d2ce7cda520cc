"""`lem compare`: two configurations of one run, all of them against a baseline, or two runs over an anchor."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lem.base.doc import screen_of, write_json
from lem.base.errors import UserError
from lem.base.units import parse_percentage
from lem.cli.selection import (
    SelectedRun,
    add_json,
    add_results_dir,
    ambiguous,
    find_run,
    list_runs,
    nothing_called,
    problem_documents,
    tell_problems,
)

if TYPE_CHECKING:
    from lem.results.aggregation import Configuration
    from lem.results.compare import Comparison
    from lem.results.metrics import Metric
    from lem.results.run import Run
    from lem.results.stats import Gate
    from lem.results.store import Problem


_THING = """CAMPAIGN: all its configurations against the baseline; CAMPAIGN A B …: B and more against A; two campaigns
or runs: the second against the first; a configuration alone is CAMPAIGN/CONFIGURATION"""
_EPILOG = """A campaign means its last run; a run is named by its ID or the beginning of it. Exit codes: 0 fine,
3 a gate found a regression, 4 a gate is inconclusive under --strict."""
_DEFAULT_TOLERANCE = "5%"


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.epilog = _EPILOG
    parser.add_argument("things", nargs="+", metavar="THING", help=_THING)
    parser.add_argument("--baseline", metavar="NAME", help="the configuration to compare with (default: the first)")
    parser.add_argument("--anchor", default="", metavar="NAME", help="of two runs: what both measured unchanged")
    parser.add_argument(
        "--anchor-tolerance",
        default=_DEFAULT_TOLERANCE,
        metavar="PERCENT%",
        help="the largest change of the anchor itself that a verdict may stand on (default: 5%%)",
    )
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="compare this one; can be given several times"
    )
    parser.add_argument(
        "--gate", action="append", default=[], metavar="METRIC=PERCENT%", help="judge a change by more than that"
    )
    parser.add_argument("--strict", action="store_true", help="exit 4 when a gate is inconclusive")
    add_results_dir(parser, "-o")
    form = parser.add_mutually_exclusive_group()
    add_json(form)
    form.add_argument("--markdown", action="store_true", help="for a comment on a pull request")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    """The exit code: of the gates, and 0 without one."""
    from lem.results.compare import gate_code
    from lem.results.comparison import comparison_document, render_markdown, render_text
    from lem.results.metrics import parse_metric
    from lem.results.stats import parse_gate

    gates = [parse_gate(text) for text in args.gate]
    if len({gate.metric for gate in gates}) < len(gates):
        raise UserError("two gates watch the same metric", "give each metric one --gate")
    if args.strict and not gates:
        raise UserError("--strict is about gates, and there is none", "add for example --gate energy=3%")
    metrics = [parse_metric(text) for text in args.metric]
    problems: list[Problem] = []
    comparison = _compare(args, problems, metrics, gates)
    # An attempt without a result is counted in the comparison.
    tell_problems(err, [problem for problem in problems if problem.kind != "missing"])
    code = gate_code(comparison, is_strict=args.strict)
    if args.json:
        document = {**comparison_document(comparison), "problems": problem_documents(problems)}
        write_json(out, {**document, "exit_code": int(code)})
    elif args.markdown:
        out.write(render_markdown(comparison))
    else:
        out.write(render_text(comparison, **screen_of(out)))
    return int(code)


@dataclass(frozen=True)
class _Thing:
    """What a word means: a run, and a configuration in it; None for the whole run."""

    where: SelectedRun
    configuration: str | None = None


def _compare(
    args: argparse.Namespace, problems: list[Problem], metrics: Sequence[Metric], gates: Sequence[Gate]
) -> Comparison:
    from lem.results.compare import compare_configurations, compare_runs

    things = _things(args.results_dir, args.things)
    runs = list(dict.fromkeys(thing.where for thing in things))
    found = [_read(item) for item in runs]
    problems += [problem for run in found for problem in run.problems]
    if len(runs) == 1:
        if args.anchor or args.anchor_tolerance != _DEFAULT_TOLERANCE:
            raise UserError("--anchor is for two runs", "within one run, cycles are the pairs: leave it out")
        baseline, others = _sides(found[0], [item.configuration for item in things], args.baseline)
        return compare_configurations(found[0], baseline, others, metrics=metrics, gates=gates)
    if args.baseline:
        raise UserError("--baseline is for configurations of one run", "of two runs the first is the baseline")
    named = [
        _subject(result, item.configuration) for result, item in zip(found, things, strict=True) if item.configuration
    ]
    return compare_runs(
        *found,
        chosen=(named[0], named[1]) if named else None,
        anchor=args.anchor,
        tolerance=_tolerance(args.anchor_tolerance),
        metrics=metrics,
        gates=gates,
    )


def _things(results_dir: Path, words: Sequence[str]) -> list[_Thing]:
    """What the words mean.

    Raises:
        UserError: one of them means nothing, or together they are no comparison.
    """
    runs = list_runs(results_dir)
    things = [_thing(runs, word) for word in words]
    first, *others = things
    if first is None and others and all(item is None for item in others):
        where = _run_with(runs, words, results_dir)
        return [_Thing(where, word) for word in words]
    if first is None:
        raise nothing_called(words[0], runs, results_dir)
    if first.configuration is None and others and others[0] is None:  # CAMPAIGN A B …
        return [_Thing(first.where, word) for word in words[1:]]
    if any(item is None for item in others):
        word = next(word for word, item in zip(words, things, strict=True) if item is None)
        raise nothing_called(word, runs, results_dir)
    found = [item for item in things if item is not None]
    return _checked(found)


def _checked(things: list[_Thing]) -> list[_Thing]:
    if len(things) == 1:
        return things
    are_runs = {item.configuration is None for item in things}
    n_runs = len({item.where for item in things})
    if len(are_runs) > 1:
        raise UserError("a run cannot be compared with a configuration", "name two runs, or two RUN/CONFIGURATION")
    if True in are_runs and n_runs < len(things):
        raise UserError("both name the same run", "name another one by its ID; lem results list shows them")
    if n_runs > 2 or (n_runs == 2 and len(things) > 2):
        raise UserError(f"{len(things)} things of {n_runs} runs: at most two can be compared across runs")
    return things


def _thing(runs: Sequence[SelectedRun], word: str) -> _Thing | None:
    where = find_run(runs, word)
    if where is not None:
        return _Thing(where)
    place, slash, configuration = word.partition("/")
    where = find_run(runs, place) if slash and configuration else None
    return _Thing(where, configuration) if where is not None else None


def _run_with(runs: Sequence[SelectedRun], names: Sequence[str], results_dir: Path) -> SelectedRun:
    """The campaign whose last run has all these configurations."""
    last = {item.campaign: item for item in runs}
    found = [
        item
        for item in last.values()
        if set(names) <= {result.record.identity.config_name for result in item.scan().results}
    ]
    if len(found) == 1:
        return found[0]
    said = ", ".join(map(repr, names))
    if not found:
        raise UserError(
            f"{said}: neither campaigns nor configurations of one in {results_dir}",
            "lem results list shows what is there",
        )
    campaigns = ", ".join(item.campaign for item in found[:5])
    raise UserError(f"{said} are configurations of {campaigns}", "put the campaign first: lem compare CAMPAIGN A B")


def _read(where: SelectedRun) -> Run:
    found = where.read()
    if not found.records:
        raise UserError(
            f"run {where.run_id} of {where.campaign} has no whole result", f"lem check {where.run_id} says why"
        )
    return found


def _sides(
    found: Run, names: Sequence[str | None], baseline_name: str | None
) -> tuple[Configuration, tuple[Configuration, ...]]:
    """Baseline and others: as named, first the baseline; else all against it."""
    named = [_subject(found, name) for name in names if name is not None]
    if baseline_name is not None:
        baseline = _subject(found, baseline_name)
    else:
        baseline = named.pop(0) if len(named) > 1 else found.with_results[0]
    others = tuple(item for item in named or found.with_results if item is not baseline)
    if not others:
        raise UserError(f"{found.campaign_name}: {baseline.name} has nothing to be compared with but itself")
    return baseline, others


def _subject(found: Run, wanted: str) -> Configuration:
    """The configuration of that name, or the one whose name or hash begins so.

    Raises:
        UserError: there is none, or several.
    """
    from lem.config.problems import did_you_mean

    tests: tuple[Callable[[Configuration], bool], ...] = (
        lambda item: item.name == wanted,
        lambda item: item.name.startswith(wanted) or item.config_hash.startswith(wanted),
    )
    for is_meant in tests:
        matching = [item for item in found.with_results if is_meant(item)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            raise ambiguous(wanted, [item.name for item in matching])
    names = [item.name for item in found.with_results]
    raise UserError(
        f"run {found.run_id} has no configuration {wanted!r}{did_you_mean(wanted, names)}", f"it has {', '.join(names)}"
    )


def _tolerance(text: str) -> float:
    try:
        tolerance = parse_percentage(text)
    except ValueError as error:
        raise UserError(f"--anchor-tolerance: {error}", "for example --anchor-tolerance 5%") from error
    if not 0 < tolerance <= 1:
        raise UserError(f"--anchor-tolerance: expected more than 0% and at most 100%, got {text!r}")
    return tolerance
