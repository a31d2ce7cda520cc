"""`lem config`: check and show configuration files, and list all options."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping
from typing import Any, TextIO

from lem.base import log
from lem.base.doc import write_json
from lem.base.errors import ConfigurationError, ExitCode, did_you_mean
from lem.cli.options import add_json, add_repeated, typed_again
from lem.config import rules
from lem.config.backends import BACKENDS
from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import BoolKind, ChoiceKind, ListKind, NumberKind, Path, Problem, dotted
from lem.config.load import Loaded, Source, complete_campaign, kind_of, load_campaign, load_experiment
from lem.config.option import Section, find_option, is_secret, leaves, merge, nest
from lem.config.yamlfile import FileProblems
from lem.orchestration.plan import Plan, build_plan

KINDS = ("campaign", "experiment")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    validate = actions.add_parser("validate", help="check files and list every problem")
    validate.add_argument("files", nargs="+", metavar="FILE", help="campaign or experiment files")
    validate.set_defaults(run=_validate)
    show = actions.add_parser("show", help="show a file with all defaults, and where each value comes from")
    show.add_argument("file", metavar="FILE", help="a campaign or experiment file")
    show.set_defaults(run=_show)
    for action in (validate, show):
        action.add_argument("--preset", metavar="NAME", help="preset that experiments start from (see lem presets)")
        add_repeated(action, "--set", "KEY=VALUE", "set any option, such as execution.cycles=5")
    new = actions.add_parser("new", help="write a commented template to stdout")
    new.add_argument("--backend", default="pytorch", metavar="NAME", help="backend of the template")
    new.set_defaults(run=_new)
    schema = actions.add_parser("schema", help="print the JSON Schema, for editors that check YAML")
    schema.set_defaults(run=_schema)
    for action in (new, schema):
        action.add_argument("kind", nargs="?", choices=KINDS, default="campaign", help="default: campaign")
    fields = actions.add_parser("fields", help="list every option: type, default, bounds, description")
    fields.add_argument("kind", nargs="?", choices=KINDS, help="default: both")
    fields.add_argument("--backend", metavar="NAME", help="only the options that this backend honours")
    fields.add_argument("--markdown", action="store_true", help="print the page docs/configuration.md")
    fields.set_defaults(run=_fields)
    convert = actions.add_parser("convert", help="write a file or command line of another tool as a campaign")
    text = "a file of LLenergyMeasure, AIPerf, guidellm or vLLM bench, or a command line: vllm bench serve …"
    convert.add_argument("file", nargs=argparse.REMAINDER, metavar="FILE", help=text)
    convert.set_defaults(run=_convert)
    for action in (validate, show, fields):
        add_json(action)


# Options of a configuration that have a flag of their own: the names of the flag, then its help.
Flags = Mapping[str, tuple[str, ...]]


def add_flags(parser: argparse._ActionsContainer, section: type[Section], flags: Flags) -> None:
    for key, (*names, text) in flags.items():
        item = find_option(section, key)
        assert item is not None, key  # noqa: S101 - a typing error in a table
        kind = item.kind
        metavar = "DIR" if key.endswith("_dir") else "FILE" if key.endswith(("_file", "_csv")) else "NAME"
        how: dict[str, Any] = {"metavar": metavar}
        if isinstance(kind, NumberKind):
            letter = (
                "N" if kind.type is int else {"s": "S", "W": "W", "%": "PCT", "ms": "MS"}.get(item.unit or "", "NUMBER")
            )
            how = {"type": kind.type, "metavar": letter}
        elif isinstance(kind, ChoiceKind):
            how = {"choices": item.choices}
        elif isinstance(kind, BoolKind):
            how = {"action": argparse.BooleanOptionalAction, "default": None}
        elif isinstance(kind, ListKind):
            how = {"action": "append", "metavar": metavar}
        parser.add_argument(*names, dest=key, help=text, **how)


def given_flags(args: argparse.Namespace, flags: Flags) -> list[tuple[str, Any]]:
    given = ((key, getattr(args, key)) for key in flags)
    return [(key, value) for key, value in given if value is not None]


def _validate(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    reports = []
    for file in args.files:
        try:
            report = _report(file, args)
        except ConfigurationError as error:
            report = {"file": file, "valid": False, "problems": _problem_documents(error)}
            if not args.json:
                log.Console(err).error(error.message, error.hint)
        else:
            if not args.json:
                out.write(_as_text(report))
        reports.append(report)
    if args.json:
        write_json(out, reports)
    if not all(report["valid"] for report in reports):
        return ExitCode.USAGE
    if len(reports) == 1:
        args.next = [reports[0]["kind"], *typed_again(args)[args.typed.index("validate") + 1 :], "--dry-run"]
    return ExitCode.OK


def _report(file: str, args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {"file": file, "kind": kind_of(file), "valid": True}
    if report["kind"] == "experiment":
        experiment = load_experiment(file, args.set, args.preset).config
        source = experiment.dataset or experiment.prompts
        width = rules.width_warning(experiment, None if source is None else source.sample_size)
        found = (*rules.warnings(experiment), *filter(None, (width,)))
        return {**report, "name": experiment.name, "warnings": [str(item) for item in found]}
    loaded = load_campaign(file, args.set, args.preset)
    plan = build_plan(loaded.config, loaded.listed, preset=loaded.preset, source=loaded.source)
    filtered = [f"{reason} × {count}" for reason, count in plan.filtered_by_reason]
    if not plan.experiments:
        complaint = f"no valid experiment is left: {'; '.join(filtered)}"
        cause = _cause_of(plan, loaded.source)
        raise FileProblems(loaded.source.locate([Problem(cause, complaint, is_about_key=cause == ("grid",))]))
    return {
        **report,
        "name": loaded.config.campaign_name,
        "summary": plan.summary,
        "filtered": filtered,
        "warnings": [f"{reason} × {count}" for reason, count in plan.warnings_by_reason],
    }


def _cause_of(plan: Plan, source: Source) -> Path:
    why = plan.filtered[0].why[0]
    option = why.data["option"].split(".") if why.code == "at_option" else ["models"]
    places: list[Path] = [("grid", *section, *option) for section in (("shared",), ("backend_overrides",), ())]
    places += [("model",), ("grid",), ("experiments", 0), ("configs", 0)]
    return next((path for path in places if source.has(path)), ())


def _as_text(report: dict[str, Any]) -> str:
    lines = [f"{report['file']}: valid {report['kind']} {report['name']}"]
    if "summary" in report:
        lines.append(f"  {report['summary']}")
    lines += [f"  filtered: {reason}" for reason in report.get("filtered", ())]
    lines += [f"  warning: {warning}" for warning in report["warnings"]]
    return "".join(f"{line}\n" for line in lines)


def _problem_documents(error: ConfigurationError) -> list[dict[str, Any]]:
    if not isinstance(error, FileProblems):
        return [{"message": error.message, "hint": error.hint}]
    return [
        {
            "at": place.label,
            "line": None if place.mark is None else place.mark.line,
            "column": None if place.mark is None else place.mark.column,
            "key": dotted(problem.path),
            "message": problem.message,
            "suggestion": problem.suggestion,
        }
        for place, problem in error.located
    ]


def _show(args: argparse.Namespace, out: TextIO, _err: TextIO) -> None:
    from lem.config import introspection

    kind = kind_of(args.file)
    read: Any = load_campaign if kind == "campaign" else load_experiment
    loaded: Loaded[Any] = read(args.file, args.set, args.preset)
    tree, provenance = _without_secrets(loaded), loaded.provenance
    origins, comments = {}, {}
    for path, _ in leaves(tree):
        origin, at = provenance.get(dotted(path), "default"), None
        if loaded.source.layer_of(path) is not None:
            place = loaded.source.place(path)
            at = place.label if place.mark is None else f"{place.label}:{place.mark.line}"
        origins[dotted(path)] = {"from": origin, "at": at}
        if origin == "preset" and at is None:
            origin = f"decoder.preset {loaded.config.decoder.preset}"
        comments[tuple(map(str, path))] = origin if at is None or origin == "command line" else at
    if args.json:
        write_json(out, {"kind": kind, "config": tree, "provenance": origins})
    else:
        out.write(introspection.render_yaml(tree, comments))


def _without_secrets(loaded: Loaded[Any]) -> dict[str, Any]:
    section = type(loaded.config)
    tree: dict[str, Any] = loaded.config.to_dict()
    written = dict(leaves(loaded.source.unexpanded))
    for path, value in list(leaves(tree)):
        if value is not None and is_secret(section, path):
            shown = written.get(path)
            is_reference = isinstance(shown, str) and re.fullmatch(r"\$\{\w+\}", shown) is not None
            tree = merge(section, tree, nest([str(part) for part in path], shown if is_reference else "(hidden)"))
    return tree


def _new(args: argparse.Namespace, out: TextIO, _err: TextIO) -> None:
    from lem.config import introspection

    _check_backend(args.backend)
    out.write(introspection.template(args.kind, args.backend))


def _convert(args: argparse.Namespace, out: TextIO, _err: TextIO) -> None:
    from lem.config import introspection
    from lem.config.convert import convert

    words = args.file[1:] if args.file[:1] == ["--"] else args.file
    if not words:
        raise ConfigurationError("expected a file or a command line", "see `lem config convert --help`")
    tree, notes = convert(words)
    loaded = complete_campaign(CampaignConfig.from_dict(tree))
    plan = build_plan(loaded.config, loaded.listed, preset={}, source=loaded.source)
    if not plan.experiments:
        filtered = "; ".join(f"{reason} × {count}" for reason, count in plan.filtered_by_reason)
        raise ConfigurationError(f"{words[0]}: no valid experiment is left: {filtered}")
    head = [f"Converted from {shlex.join(words)}. Check it with: lem config validate FILE"]
    if notes:
        head += ["", "Left out:", *(f"  {note}" for note in notes)]
    out.write("".join(f"# {line}".rstrip() + "\n" for line in head) + "\n" + introspection.render_yaml(tree, {}))


def _schema(args: argparse.Namespace, out: TextIO, _err: TextIO) -> None:
    from lem.config.schema import document_schema

    section = CampaignConfig if args.kind == "campaign" else ExperimentConfig
    write_json(out, document_schema(section, args.kind))


def _fields(args: argparse.Namespace, out: TextIO, _err: TextIO) -> None:
    from lem.config import introspection

    if args.markdown:
        out.write(introspection.render_page())
        return
    if args.backend is not None:
        _check_backend(args.backend)
    kinds = (args.kind,) if args.kind else KINDS if args.backend is None else ("experiment",)
    params = {
        "campaign": introspection.get_campaign_params(),
        "experiment": introspection.get_experiment_params(args.backend),
    }
    if args.json:
        write_json(out, {kind: params[kind] for kind in kinds})
        return
    for kind in kinds:
        heading = f"{kind.upper()}\n\n" if len(kinds) > 1 else ""
        out.write(f"{heading}{introspection.render_text(params[kind])}\n")


def _check_backend(name: str) -> None:
    if name not in BACKENDS:
        message = f"--backend {name}: unknown backend{did_you_mean(name, BACKENDS)}"
        raise ConfigurationError(message, f"one of: {', '.join(BACKENDS)}")
