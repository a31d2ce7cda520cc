"""Commands for many hosts: parts of a plan, merge, bundle."""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from lem.base.clock import utc_now
from lem.base.doc import Column, columns, printable, terminal_width, write_json
from lem.base.errors import ExitCode, UserError
from lem.base.units import format_duration, parse_percentage, plural, some_of
from lem.cli.selection import add_json, add_repeated, checked, problem_documents, tell_problems
from lem.config.campaign_config import CampaignConfig
from lem.orchestration.fleet import (
    check_same,
    costs_of,
    make_fleet_plan,
    parse_shard,
    part_of_plan,
    replan,
    take_part,
)
from lem.orchestration.names import make_run_id
from lem.orchestration.plan import Plan
from lem.results.merge import (
    SHARD,
    AnchorCheck,
    FleetPlan,
    Gathered,
    Matrix,
    check_anchor,
    completeness,
    gather,
    read_plan,
    write_merged,
    write_plan,
)
from lem.results.store import Repository


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
    if args.plan is None:
        run_id = make_run_id(utc_now(), random.SystemRandom())
        fleet_plan = make_fleet_plan(
            plan, hosts, campaign, run_id, is_replicated=args.replicate, measured_by_config=measured_by_config
        )
    else:
        stored = read_plan(args.plan)
        check_same(plan, stored)
        scan = Repository(Path(campaign.io.results_dir), campaign.slug).scan(stored.run_id)
        identities = [item.record.identity for item in scan.results]
        present = {(identity.host, identity.experiment_id) for identity in identities}
        fleet_plan = replan(stored, hosts, present, costs_of(plan.configurations, measured_by_config))
    write_plan(args.write_plan, fleet_plan)
    if args.json:
        write_json(out, dataclasses.asdict(fleet_plan))
    else:
        out.write("\n".join(_described(fleet_plan)) + "\n")
    return int(ExitCode.OK)


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


_SHOWN = 10


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Copy the results of several hosts into one folder: identical ones once, conflicts refused. A host "
        "is a block, so nothing is pooled over hosts. Exit code 1 when planned results are lacking."
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="results folder of a host, or a folder that holds it"
    )
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="results folder to merge into")
    parser.add_argument("--campaign", metavar="NAME", help="which campaign, where the folders hold several")
    parser.add_argument("--plan", type=Path, metavar="PLAN", help="the stored plan: its run alone, and what is lacking")
    parser.add_argument(
        "--anchor-tolerance",
        type=partial(checked, parse_percentage),
        default=0.05,
        metavar="PERCENT%",
        help="how far apart hosts may be in the anchor of the plan (default: 5%%)",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    """The exit code: 1 when planned results are lacking."""
    plan = None if args.plan is None else read_plan(args.plan)
    # What was merged before is one more source: it is kept, and must not contradict what comes now.
    known = [args.output] if args.output.is_dir() else []
    gathered = gather([*known, *args.folders], campaign=args.campaign, plan=plan)
    if not gathered.results:
        raise UserError(
            f"no whole result of campaign {gathered.campaign} in these folders; nothing was merged",
            "lem results list --results-dir DIR shows what a folder holds",
        )
    anchor_hash = plan.anchor if plan is not None and plan.mode == SHARD else None
    anchor = check_anchor(gathered.results, anchor_hash, args.anchor_tolerance)
    matrix = completeness(gathered, plan)
    new = write_merged(gathered, args.output)
    if args.json:
        write_json(out, _document(gathered, matrix, anchor, new))
    else:
        lines = [*_table(matrix, terminal_width(out)), "", *_lines(gathered, matrix, anchor, new, args.output, plan)]
        out.write("\n".join(lines) + "\n")
        tell_problems(err, gathered.problems, lead="left out: ")
    return int(ExitCode.EXPERIMENT_FAILED if matrix.missing else ExitCode.OK)


def _document(gathered: Gathered, matrix: Matrix, anchor: AnchorCheck, new: int) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "campaign": gathered.campaign,
        "results": len(gathered.results),
        "new": new,
        "hosts": list(matrix.hosts),
        "configurations": {
            name: {
                host: dataclasses.asdict(cell)
                for host, cell in zip(matrix.hosts, cells, strict=True)
                if cell.planned or cell.present
            }
            for name, cells in matrix.rows.items()
        },
        "lacking": [{"host": host, "exp_id": exp_id} for host, exp_id in matrix.missing],
        "anchor": dataclasses.asdict(anchor),
        "problems": problem_documents(gathered.problems),
        "foreign_runs": list(gathered.foreign_runs),
    }


def _table(matrix: Matrix, width: int) -> list[str]:
    hosts = [
        Column(printable(host), tuple(cells[index].text for cells in matrix.rows.values()))
        for index, host in enumerate(matrix.hosts)
    ]
    return columns("configuration", list(matrix.rows), hosts, width)


def _lines(
    gathered: Gathered, matrix: Matrix, anchor: AnchorCheck, new: int, output: Path, plan: FleetPlan | None
) -> list[str]:
    lines = []
    if plan is not None and plan.anchor is not None:
        values = ", ".join(f"{host} {value:.4g} {anchor.unit}" for host, value in anchor.by_host.items())
        lines.append(
            "anchor: fewer than two hosts have a valid result of it, so nobody knows whether the hosts are alike"
            if anchor.spread is None
            else f"anchor: hosts are within {100 * anchor.spread:.1f} % in {anchor.metric} ({values})"
        )
    if gathered.foreign_runs:
        lines.append(f"left out, since they are of other runs than the plan: {', '.join(gathered.foreign_runs)}")
    if matrix.missing:
        lacking = [f"{exp_id} ({host})" for host, exp_id in matrix.missing]
        lines.append(f"lacking: {some_of(lacking, _SHOWN)}")
    results, hosts = plural(len(gathered.results), "result"), plural(len(matrix.hosts), "host")
    return [*lines, f"{results} of {hosts} in {output}, {new} of them new"]


def add_bundle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "`lem bundle`: what a host without network needs, in one folder."
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    making = actions.add_parser("make", help="make a bundle: DIR/lem-airgap-VERSION")
    making.add_argument("folder", type=Path, metavar="DIR", help="where to make it")
    add_repeated(making, "--image", "NAME", "image of the Docker engine here")
    add_repeated(making, "--model", "DIR", "folder of a model", Path)
    add_repeated(making, "--deb", "FILE", "Debian package", Path)
    add_repeated(making, "--wheel", "FILE", "Python package", Path)
    making.add_argument("--sign-key", type=Path, metavar="KEY", help="private SSH key to sign with")
    making.set_defaults(run=_make)
    verifying = actions.add_parser("verify", help="check every byte of a bundle, and who signed it")
    verifying.add_argument("folder", type=Path, metavar="DIR", help="the bundle")
    verifying.add_argument("--allowed-signers", type=Path, metavar="FILE", help="keys to trust, as ssh-keygen has them")
    verifying.add_argument("--identity", metavar="NAME", help="who must have signed it")
    verifying.set_defaults(run=_verify)
    for action in (making, verifying):
        add_json(action)


def _make(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:  # noqa: ARG001
    from lem.orchestration.bundle import Contents, make_bundle

    contents = Contents(tuple(args.image), tuple(args.model), tuple(args.deb), tuple(args.wheel))
    path = make_bundle(args.folder, contents, sign_key=args.sign_key)
    signed = "signed" if args.sign_key is not None else "not signed"
    if args.json:
        write_json(out, {"path": str(path)})
    else:
        out.write(f"{path}, {signed}\n")
    return int(ExitCode.OK)


def _verify(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    from lem.orchestration.bundle import Signer, verify_bundle

    if (args.allowed_signers is None) != (args.identity is None):
        raise UserError("--allowed-signers and --identity belong together", "give both, or neither")
    signer = None if args.identity is None else Signer(args.allowed_signers, args.identity)
    manifest = verify_bundle(args.folder, signer)
    if args.json:
        write_json(out, manifest)
    elif signer is None:
        err.write("nobody's signature was checked: --allowed-signers FILE --identity NAME\n")
    if not args.json:
        out.write(f"{args.folder}: every byte is as it was made\n")
    return int(ExitCode.OK)
