"""Commands for several hosts: merge, job scripts, received archives, bundle."""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from lem.base.dataclass import asdict
from lem.base.doc import Column, columns, printable, terminal_width, text_width, wrapped, write_json
from lem.base.errors import ExitCode, UserError
from lem.base.units import parse_percentage, plain, plural, some_of
from lem.cli import options, selection
from lem.results import merge

# Compiling the modules of plans, bundles and the report takes longer than the other commands here, so that they are
# imported where they are used.

_SHOWN = 10


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Merge the results of several hosts into one folder. Identical results are copied once; conflicts are "
        "errors. Each host is a block: nothing is pooled across hosts. Exit code 1 if a result is damaged, a planned "
        "one is missing, or a host was left out because its anchor differs from the median of the hosts."
    )
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="DIR", help="results folder of a host, or a folder that contains it")
    add("--output", type=Path, required=True, metavar="DIR", help="results folder to merge into")
    add("--campaign", metavar="NAME", help="the campaign, if the folders hold several")
    add("--plan", type=Path, metavar="PLAN", help="stored plan: merge only its run, and list what is missing")
    kind = partial(options.checked, parse_percentage)
    text = "largest difference of a host from the median of all hosts in the plan's anchor (default: 5%%)"
    add("--anchor-tolerance", type=kind, default=0.05, metavar="PERCENT%", help=text)
    add("--report", type=Path, metavar="FILE", help="also write the report of the merged campaign")
    options.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    plan = None if args.plan is None else merge.read_plan(args.plan)
    # Earlier merged results are one more source: they are kept, and must not conflict with the new ones.
    known = [args.output] if args.output.is_dir() else []
    gathered = merge.gather([*known, *args.folders], campaign=args.campaign, plan=plan)
    if not gathered.results:
        message = f"no complete result of campaign {gathered.campaign} in these folders; nothing was merged"
        raise UserError(message, "see `lem results list --results-dir DIR`")
    anchor_hash = plan.anchor if plan is not None and plan.mode == merge.SHARD else None
    anchor = merge.check_anchor(gathered.results, anchor_hash, args.anchor_tolerance)
    matrix = merge.completeness(gathered, plan).without(anchor.outliers)
    gathered = gathered.without(anchor.outliers)
    new = merge.write_merged(gathered, args.output)
    if args.report is not None:
        from lem.cli.report import make_report

        page = make_report(selection.resolve_run(args.output, gathered.campaign).read())
        options.write_file(args.report, page)
    if args.json:
        write_json(out, _document(gathered, matrix, anchor, new))
    else:
        width = terminal_width(out)
        lines = [*_matrix_table(matrix, width), ""]
        if plan is not None and plan.anchor is not None:
            lines += wrapped(_described_anchor(anchor), width)
        for host, ratio in anchor.outliers.items():
            text = f"left out: {host}, {100 * (ratio - 1):+.1f} % from the median in {anchor.metric} of the anchor"
            lines += wrapped(text, width)
        if gathered.foreign_runs:
            lines += wrapped(f"left out, not in the run of the plan: {', '.join(gathered.foreign_runs)}", width)
        if matrix.missing:
            missing = [f"{exp_id} ({host})" for host, exp_id in matrix.missing]
            lines += wrapped(f"missing: {some_of(missing, _SHOWN)}", width)
        counts = f"{plural(len(gathered.results), 'result')} of {plural(len(matrix.hosts), 'host')}"
        out.write("\n".join([*lines, f"{counts} in {args.output}, {new} of them new"]) + "\n")
        selection.list_problems(err, gathered.problems, lead="left out: ")
        args.next = ["check", gathered.campaign, *options.folder_options(args.output)]
    is_partial = matrix.missing or anchor.outliers or selection.damaged(gathered.problems)
    return ExitCode.EXPERIMENT_FAILED if is_partial else ExitCode.OK


def _matrix_table(matrix: merge.Matrix, width: int) -> list[str]:
    by_host = list(zip(*matrix.rows.values(), strict=True))
    hosts = [
        Column(printable(host), tuple(cell.text for cell in cells))
        for host, cells in zip(matrix.hosts, by_host, strict=True)
    ]
    lines = columns("configuration", list(matrix.rows), hosts, width)
    if max(map(text_width, lines)) <= width:
        return lines
    totals = [
        merge.Cell(sum(it.planned for it in cells), sum(it.present for it in cells), sum(it.valid for it in cells))
        for cells in by_host
    ]
    planned = [sum(cell.planned > 0 for cell in cells) for cells in by_host]
    others = [
        Column("configurations", tuple(map(str, planned))),
        Column("results", tuple(cell.text for cell in totals)),
    ]
    return columns("host", matrix.hosts, others, width)


def _document(gathered: merge.Gathered, matrix: merge.Matrix, anchor: merge.AnchorCheck, new: int) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "campaign": gathered.campaign,
        "results": len(gathered.results),
        "new": new,
        "hosts": list(matrix.hosts),
        "configurations": {
            name: {
                host: asdict(cell)
                for host, cell in zip(matrix.hosts, cells, strict=True)
                if cell.planned or cell.present
            }
            for name, cells in matrix.rows.items()
        },
        "lacking": [{"host": host, "exp_id": exp_id} for host, exp_id in matrix.missing],
        "anchor": asdict(anchor),
        "problems": selection.problem_documents(gathered.problems),
        "foreign_runs": list(gathered.foreign_runs),
    }


def _described_anchor(anchor: merge.AnchorCheck) -> str:
    if anchor.spread is None:
        return "anchor: fewer than two hosts have a valid result of it; hosts cannot be compared"
    kept = {host: value for host, value in anchor.by_host.items() if host not in anchor.outliers}
    values = some_of([f"{host} {plain(value, '.4g')} {anchor.unit}" for host, value in kept.items()], _SHOWN)
    spread = max(kept.values()) / min(kept.values()) - 1
    return f"anchor: hosts are within {100 * spread:.1f} % in {anchor.metric} ({values})"


_CONTAINERS = ("apptainer", "podman", "pyxis")


def add_fleet_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "`lem fleet`: run a stored plan on a cluster, and receive the results of hosts."
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    text = "print a job script: an array with a task for each part, and a merge that waits for it"
    slurm = actions.add_parser("slurm", help=text, description=f"{text[0].upper()}{text[1:]}.")
    add = slurm.add_argument
    add("plan", type=Path, metavar="PLAN", help="plan that `lem campaign --write-plan PLAN --parts N` stored")
    add("--partition", metavar="NAME", help="partition of the cluster")
    add("--gres", metavar="RESOURCES", help="resources of each task, such as gpu:1")
    add("--time", metavar="TIME", help="time limit of each task (default: twice the expected time, where it is known)")
    add("--python", default="python3", metavar="PROGRAM", help="Python interpreter with the engines (default: python3)")
    add("--container", choices=_CONTAINERS, help="run each part in a container of this runtime")
    add("--image", metavar="IMAGE", help="with --container: its image")
    options.add_repeated(slurm, "--sbatch", "OPTION", "another option of sbatch, such as --sbatch=--account=lab")
    slurm.set_defaults(run=_slurm)
    text = "check and unpack the archives of hosts: DIR/HOST/results.tar.gz to DIR/HOST/results"
    receiving = actions.add_parser("receive", help=text, description=f"{text[0].upper()}{text[1:]}.")
    receiving.add_argument("folder", type=Path, metavar="DIR", help="folder of the hosts")
    text = "their checksums on the hosts, as lines of sha256sum: SHA256  HOST/results.tar.gz (default: standard input)"
    receiving.add_argument("--sums", type=argparse.FileType("r"), default="-", metavar="FILE", help=text)
    options.add_json(receiving)
    receiving.set_defaults(run=_receive)


def _slurm(args: argparse.Namespace, out: TextIO, err: TextIO) -> None:
    from lem.orchestration.fleet import container_command, slurm_script

    plan = merge.read_plan(args.plan)
    if not plan.arguments:
        hint = "create it again with --write-plan; put ${VARIABLE} into the campaign file instead of a secret in --set"
        raise UserError(f"plan {args.plan}: the arguments of `lem campaign` are not in it", hint)
    if (args.container is None) != (args.image is None):
        raise UserError("--container and --image require each other", "add --container apptainer --image IMAGE")
    options = [(f"--{name}", getattr(args, name)) for name in ("partition", "gres", "time")]
    given = [f"{name}={value}" for name, value in options if value is not None]
    expected_s = max((host.expected_s or 0.0 for host in plan.hosts), default=0.0)
    if args.time is None and expected_s:
        given.append(f"--time={math.ceil(2 * expected_s / 60)}")
    elif args.time is None:
        err.write("no earlier results: no time limit is set (--time sets one)\n")
    program = Path(sys.argv[0]).resolve()
    if args.container is not None and not program.is_relative_to(Path.cwd()):
        raise UserError(
            f"{program} is not visible in the container", "copy lem.pyz to this folder, and run it from here"
        )
    lem = [args.python, *(["-m", "lem"] if program.name == "__main__.py" else [str(program)])]
    run = container_command(args.container, args.image) if args.container else []
    out.write(slurm_script(plan, args.plan, lem, run, [*given, *args.sbatch]))


def _receive(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    words = args.sums.read().split()
    names = [Path(name) for name in words[1::2]]
    if len(words) % 2 or any(name.name != merge.ARCHIVE for name in names):
        raise UserError(f"--sums: expected lines of SHA256  HOST/{merge.ARCHIVE}", "as sha256sum prints them")
    received = merge.receive(args.folder, dict(zip((str(name.parent) for name in names), words[::2], strict=True)))
    if args.json:
        write_json(out, asdict(received))
    else:
        out.write(f"{plural(len(names), 'host')}, {len(received.new)} with new results\n")
        err.writelines(printable(f"refused: {host}: {why}") + "\n" for host, why in received.refused.items())
    return ExitCode.EXPERIMENT_FAILED if received.refused else ExitCode.OK


def add_bundle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "`lem bundle`: everything that an offline host needs, in one folder."
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    making = actions.add_parser("make", help="make a bundle: DIR/lem-airgap-VERSION")
    making.add_argument("folder", type=Path, metavar="DIR", help="folder to make it in")
    options.add_repeated(making, "--image", "NAME", "image in the local Docker engine")
    options.add_repeated(making, "--model", "DIR", "model folder", Path)
    options.add_repeated(making, "--deb", "FILE", "Debian package", Path)
    options.add_repeated(making, "--wheel", "FILE", "Python wheel", Path)
    making.add_argument("--sign-key", type=Path, metavar="KEY", help="private SSH key that signs the bundle")
    making.set_defaults(run=_make)
    verifying = actions.add_parser("verify", help="verify the checksums and the signature of a bundle")
    verifying.add_argument("folder", type=Path, metavar="DIR", help="the bundle")
    text = "trusted keys, in the format of ssh-keygen"
    verifying.add_argument("--allowed-signers", type=Path, metavar="FILE", help=text)
    verifying.add_argument("--identity", metavar="NAME", help="expected signer")
    verifying.set_defaults(run=_verify)
    for action in (making, verifying):
        options.add_json(action)


def _make(args: argparse.Namespace, out: TextIO, _err: TextIO) -> None:
    from lem.orchestration.bundle import Contents, make_bundle

    contents = Contents(tuple(args.image), tuple(args.model), tuple(args.deb), tuple(args.wheel))
    path = make_bundle(args.folder, contents, sign_key=args.sign_key)
    if args.json:
        write_json(out, {"path": str(path)})
    else:
        out.write(f"{path}, {'signed' if args.sign_key is not None else 'not signed'}\n")
        args.next = ["bundle", "verify", path]


def _verify(args: argparse.Namespace, out: TextIO, err: TextIO) -> None:
    from lem.orchestration.bundle import Signer, verify_bundle

    if (args.allowed_signers is None) != (args.identity is None):
        raise UserError("--allowed-signers and --identity require each other", "give both or neither")
    signer = None if args.identity is None else Signer(args.allowed_signers, args.identity)
    manifest = verify_bundle(args.folder, signer)
    if args.json:
        write_json(out, manifest)
        return
    if signer is None:
        err.write("the signature was not checked; check it with --allowed-signers FILE --identity NAME\n")
    out.write(f"{args.folder}: all checksums match\n")
