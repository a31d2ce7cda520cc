"""`lem presets`: named starting points for an experiment."""

from __future__ import annotations

import argparse
from typing import TextIO

from lem.cli.streams import write_json
from lem.errors import ExitCode
from lem.log import WIDTH

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `lem presets` takes."""
    parser.description = "List presets (--preset NAME), or show one."
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this one's values")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:  # noqa: ARG001
    """The exit code; 2 for a preset that there is not."""
    import textwrap

    from lem.config.presets import PRESETS, find_preset
    from lem.config.template import render_yaml

    chosen = PRESETS.values() if args.name is None else (find_preset(args.name),)
    if args.json:
        found = {item.name: {"description": item.description, "values": dict(item.values)} for item in chosen}
        write_json(out, found)
    elif args.name is not None:
        preset = find_preset(args.name)
        out.write(f"# {preset.name}: {preset.description}\n{render_yaml(preset.values, {})}")
    else:
        width = max(len(name) for name in PRESETS) + 2
        for preset in PRESETS.values():
            tokens = f"{preset.values['max_input_tokens']}/{preset.values['max_output_tokens']}"
            text = f"{tokens:<10}{preset.description}"
            indent = " " * (width + 10)
            out.write(textwrap.fill(f"{preset.name:<{width}}{text}", WIDTH, subsequent_indent=indent) + "\n")
        out.write("\nTokens: input/output at most. All decode greedily. lem presets NAME shows one.\n")
    return int(ExitCode.OK)
