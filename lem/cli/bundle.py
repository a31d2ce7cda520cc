"""`lem bundle`: what a host without network needs, in one folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TextIO

from lem.cli.streams import write_json
from lem.errors import ExitCode, UserError

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `lem bundle` takes."""
    parser.description = __doc__
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    making = actions.add_parser("make", help="make a bundle: DIR/lem-airgap-VERSION")
    making.add_argument("folder", type=Path, metavar="DIR", help="where to make it")
    making.add_argument(
        "--image", action="append", default=[], metavar="NAME", help="image of the Docker engine here; may be repeated"
    )
    making.add_argument(
        "--model", action="append", default=[], type=Path, metavar="DIR", help="folder of a model; may be repeated"
    )
    making.add_argument(
        "--deb", action="append", default=[], type=Path, metavar="FILE", help="Debian package; may be repeated"
    )
    making.add_argument(
        "--wheel", action="append", default=[], type=Path, metavar="FILE", help="Python package; may be repeated"
    )
    making.add_argument("--sign-key", type=Path, metavar="KEY", help="private SSH key to sign with")
    making.set_defaults(run=_make)
    verifying = actions.add_parser("verify", help="check every byte of a bundle, and who signed it")
    verifying.add_argument("folder", type=Path, metavar="DIR", help="the bundle")
    verifying.add_argument("--allowed-signers", type=Path, metavar="FILE", help="keys to trust, as ssh-keygen has them")
    verifying.add_argument("--identity", metavar="NAME", help="who must have signed it")
    verifying.set_defaults(run=_verify)
    for action in (making, verifying):
        action.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _make(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:  # noqa: ARG001 - as every command is called
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
