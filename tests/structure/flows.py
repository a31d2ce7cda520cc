"""The three flows through lem/ that a reader has to keep in mind, as declared lists that are checked against a tree.

flows.yaml holds, for each tree, the steps of each flow: `module:name  what happens there`. A step follows the one
before it, or the one that `after` names; the two modules must be connected by an import in one direction or the other.
A step in another process says `process`, and a module that is loaded by its name says `by name`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.structure.imports import Graph, graph
from tests.structure.lines import assigned, definitions
from tests.structure.trees import Module, modules

FLOWS_FILE = Path(__file__).with_name("flows.yaml")
CURRENT = "current"
FLOWS = ("option", "joule", "ctrl_c")

_STEP = re.compile(
    r"(?P<module>[\w.]+):(?P<name>[\w.]+)(?: \[(?P<link>process|by name)?(?:(?:, )?after (?P<after>[\w.]+))?\])?"
    r"(?:  (?P<what>.+))?"
)


@dataclass(frozen=True)
class Step:
    """One module on a flow.

    Attributes:
        module: its name without the leading `lem.`.
        name: the function, class or constant in which it happens.
        link: `process` or `by name` where no import connects it with the step before; empty otherwise.
        after: the module that it follows; empty for the step before.
    """

    module: str
    name: str
    link: str
    after: str
    what: str

    @classmethod
    def parse(cls, text: str) -> Step:
        """The step that a line of flows.yaml declares.

        Raises:
            ValueError: the line has another form.
        """
        found = _STEP.fullmatch(text)
        if found is None:
            raise ValueError(f"expected `module:name [process|by name, after module]  what`, got {text!r}")
        return cls(**{name: value or "" for name, value in found.groupdict().items()})


def read_flows(file: Path = FLOWS_FILE) -> Mapping[str, Mapping[str, Sequence[Step]]]:
    """The steps by tree (a commit, or `current`) and flow."""
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {
        str(tree): {flow: [Step.parse(line) for line in lines] for flow, lines in flows.items()}
        for tree, flows in document.items()
    }


def crossed(steps: Sequence[Step]) -> int:
    """The number of different modules."""
    return len({step.module for step in steps})


def check_flows(flows: Mapping[str, Sequence[Step]], root: Path) -> dict[str, list[str]]:
    """What in the list of each flow is not so in the tree."""
    known = modules(root, "lem")
    imports = graph(known)
    return {flow: list(_problems(steps, known, imports)) for flow, steps in flows.items()}


def _problems(steps: Sequence[Step], known: Mapping[str, Module], imports: Graph) -> Iterator[str]:
    before: list[str] = []
    for step in steps:
        name = f"lem.{step.module}"
        if name not in known:
            yield f"{step.module}: no such module"
        elif step.name not in _names(known[name]):
            yield f"{step.module}: no {step.name} in it"
        elif step.after and step.after not in before:
            yield f"{step.module}: comes after {step.after}, which is not a step before it"
        elif before and not step.link:
            yield from _unconnected(name, f"lem.{step.after or before[-1]}", imports)
        elif before and step.link == "by name" and not _is_named(name, f"lem.{step.after or before[-1]}", known):
            yield f"{step.module}: neither it nor {step.after or before[-1]} contains the other's name"
        before.append(step.module)


def _unconnected(name: str, earlier: str, imports: Graph) -> Iterator[str]:
    if name != earlier and name not in imports.get(earlier, ()) and earlier not in imports[name]:
        yield f"{name.removeprefix('lem.')}: no import connects it with {earlier.removeprefix('lem.')}"


def _names(module: Module) -> set[str]:
    found = {name for name, _ in definitions(module.tree)}
    return found.union(*map(assigned, module.tree.body))


def _is_named(one: str, other: str, known: Mapping[str, Module]) -> bool:
    """Whether one of two modules has the other's name in a string: in full, or its package before a value."""
    return any(
        name in texts or f"{name.rpartition('.')[0]}." in texts
        for name, texts in ((one, _texts(known[other])), (other, _texts(known[one])))
    )


def _texts(module: Module) -> set[str]:
    constants = (node.value for node in ast.walk(module.tree) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}
