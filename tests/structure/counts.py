"""`python -m tests.structure counts`: how large lem/ and tests/ are, and how they hang together."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.structure import lines
from tests.structure.flows import CURRENT, Step, check_flows, crossed, read_flows
from tests.structure.imports import cycles, graph, importers
from tests.structure.trees import ROOT, Module, commit_tree, modules

LONG_FUNCTION = 60
MANY_PARAMETERS = 6
LONG_MODULE = 450
SHORT_MODULE = 80


def counts_of(root: Path, top: str) -> dict[str, Any]:
    """The counts of `root/top`, as a document."""
    known = modules(root, top)
    kinds = lines.count(known.values())
    imports = graph(known)
    sizes = {name: len(module.text.splitlines()) for name, module in known.items()}
    functions = [function for module in known.values() for function in lines.functions(module)]
    longest = sorted(functions, key=lambda item: (-item.lines, str(item)))
    return {
        "files": len(known),
        "lines": {"all": sum(kinds.values()), **{kind: kinds[kind] for kind in lines.KINDS}},
        "import_cycles": {
            "of_modules": cycles(graph(known, is_late_counted=False)),
            "with_imports_in_functions": cycles(imports),
        },
        "longest_module": _first(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))),
        "longest_function": _first([(str(item), item.lines) for item in longest]),
        "functions_above_60_lines": {str(item): item.lines for item in longest if item.lines > LONG_FUNCTION},
        "functions_above_6_parameters": {
            str(item): item.parameters for item in functions if item.parameters > MANY_PARAMETERS
        },
        "modules_above_450_lines": {name: size for name, size in sizes.items() if size > LONG_MODULE},
        "modules_with_one_importer": sum(len(users) == 1 for users in importers(imports).values()),
        "of_these_below_80_lines": _lonely(known, sizes, importers(imports)),
    }


def _first(ordered: Sequence[tuple[str, int]]) -> dict[str, int]:
    return dict(ordered[:1])


def _lonely(
    known: Mapping[str, Module], sizes: Mapping[str, int], users_of: Mapping[str, frozenset[str]]
) -> dict[str, str]:
    return {
        name: f"{sizes[name]} lines, imported by {next(iter(users))}"
        for name, users in users_of.items()
        if len(users) == 1 and sizes[name] < SHORT_MODULE and not known[name].is_package
    }


def flows_of(root: Path, flows: Mapping[str, Sequence[Step]]) -> dict[str, Any]:
    """The modules that each flow crosses, and what in the lists does not fit the tree."""
    found = check_flows(flows, root)
    return {flow: {"modules": crossed(steps), "problems": found[flow]} for flow, steps in flows.items()}


def print_counts(commit: str | None, *, tree: Path = ROOT, is_json: bool = False) -> int:
    """1 when a declared flow does not fit the tree.

    Args:
        commit: count this commit in place of `tree`, a folder.
    """
    known = read_flows()
    with commit_tree(commit) if commit else contextlib.nullcontext(tree) as root:
        document = {top: counts_of(root, top) for top in ("lem", "tests")}
        flows = next((flows for name, flows in known.items() if commit and commit.startswith(name)), None)
        flows = flows or known.get(CURRENT) or list(known.values())[-1]
        document["flows"] = flows_of(root, flows)
    print(json.dumps(document, indent=2) if is_json else "\n".join(_rendered(document)))
    return int(any(flow["problems"] for flow in document["flows"].values()))


def _rendered(document: Mapping[str, Any]) -> Iterator[str]:
    for top in ("lem", "tests"):
        yield f"{top}/"
        for name, value in document[top].items():
            yield from _fact(name.replace("_", " "), value)
        yield ""
    yield "modules on each flow"
    for flow, found in document["flows"].items():
        yield f"  {flow:<36} {found['modules']}"
        yield from (f"    {text}" for text in found["problems"])


def _fact(name: str, value: Any, indent: str = "  ") -> Iterator[str]:
    if isinstance(value, dict) and name in ("lines", "import cycles", "longest module", "longest function"):
        yield f"{indent}{name}"
        for inner, item in value.items():
            yield from _fact(inner.replace("_", " ") if name == "import cycles" else inner, item, indent + "  ")
    elif isinstance(value, (dict, list)):
        yield f"{indent}{name:<{38 - len(indent)}} {len(value)}"
        items = value.items() if isinstance(value, dict) else [(" ↔ ".join(item), "") for item in value]
        yield from (f"{indent}  {inner}{f': {item}' if item != '' else ''}" for inner, item in items)
    else:
        yield f"{indent}{name:<{38 - len(indent)}} {value}"
