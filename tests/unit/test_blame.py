"""A bug of lem is never told as somebody else's fault: what bugs raise is caught around calls of other code alone.

TypeError, KeyError, AttributeError and their like are what a bug raises. Where an engine raises them too, its call
stands in a `try` of its own; shapes of foreign data are checked, not tried. ruff looks after `except Exception`.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUGS = {"ArithmeticError", "AssertionError", "AttributeError", "IndexError", "KeyError", "LookupError", "NameError"}
BUGS |= {"RuntimeError", "TypeError", "ZeroDivisionError"}
# Context managers that catch what is raised within them, as `except` does, and where what they catch begins among their
# arguments.
CATCHERS = {"explained": 1, "suppress": 0}


NAMES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "lem").rglob("*.py")) if "_vendor" not in path.parts]


@functools.cache
def modules() -> dict[str, ast.Module]:
    return {name: ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in NAMES}


@functools.cache
def groups() -> dict[str, frozenset[str]]:
    """The tuples of exceptions that have names of their own, as far as they are written out."""
    found: dict[str, frozenset[str]] = {}
    for tree in modules().values():
        for node in tree.body:
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not isinstance(node.value, ast.Tuple):
                continue
            names = frozenset(item.id for item in ast.walk(node.value) if isinstance(item, ast.Name))
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update({target.id: names for target in targets if isinstance(target, ast.Name)})
    return found


def caught(kind: ast.expr | None) -> set[str]:
    """The names of the exceptions that a handler catches."""
    nodes = () if kind is None else tuple(ast.walk(kind))
    names = {item.id for item in nodes if isinstance(item, ast.Name)}
    names |= {item.attr for item in nodes if isinstance(item, ast.Attribute)}
    while more := {member for name in names for member in groups().get(name, ())} - names:
        names |= more
    return names


def own_names(tree: ast.Module) -> set[str]:
    """What lem's own code is called in a module: its functions, and what it imports from lem."""
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lem":
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def own_calls(tree: ast.Module, body: list[ast.stmt]) -> Iterator[ast.Call]:
    """The calls of lem's own code among statements, nested functions left out."""
    names = own_names(tree)
    for statement in body:
        for node in ast.walk(statement):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            is_own = isinstance(function, ast.Name) and function.id in names
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                is_own = function.value.id in {"self", "cls"} | names
            if is_own:
                yield node


def blocks(tree: ast.Module) -> Iterator[tuple[list[ast.stmt], set[str]]]:
    """The statements around which something is caught and not raised again as it is, with what is caught."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            kinds: set[str] = set()
            for handler in node.handlers:
                if not ends_with_bare_raise(handler):
                    kinds |= caught(handler.type)
            yield node.body, kinds
        elif isinstance(node, ast.With):
            for item in node.items:
                call = item.context_expr
                name = ast.unparse(call.func).rpartition(".")[2] if isinstance(call, ast.Call) else ""
                if isinstance(call, ast.Call) and name in CATCHERS:
                    kinds = {kind for argument in call.args[CATCHERS[name] :] for kind in caught(argument)}
                    yield node.body, kinds or {"AttributeError"}  # by default, `explained` catches all of them


def ends_with_bare_raise(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


@pytest.mark.parametrize("name", NAMES)
def test_what_bugs_raise_is_caught_around_calls_of_other_code_alone(name: str) -> None:
    tree = modules()[name]
    found = [
        f"{name}:{call.lineno}: {ast.unparse(call.func)} where {', '.join(sorted(kinds & BUGS))} is caught"
        for body, kinds in blocks(tree)
        if kinds & BUGS
        for call in own_calls(tree, body)
    ]
    assert found == []


def test_the_check_sees_what_it_is_for() -> None:
    tree = ast.parse(
        "from lem.base.units import plural\n"
        "try:\n    plural(1, 'x')\nexcept (ValueError, TypeError):\n    pass\n"
        "try:\n    json.loads(x)\nexcept TypeError:\n    pass\n"
        "with explained('x'):\n    plural(2, 'x')\n"
        "with contextlib.suppress(OSError, KeyError):\n    plural(3, 'x')\n"
        "with explained('x', OSError):\n    plural(4, 'x')\n"
    )
    found = [call.lineno for body, kinds in blocks(tree) if kinds & BUGS for call in own_calls(tree, body)]
    assert sorted(found) == [3, 11, 13]
