"""What each line of a module is, and how long its functions are."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.structure.trees import Module

KINDS = ("code", "docstring", "comment", "blank", "import", "__all__")

Function = ast.FunctionDef | ast.AsyncFunctionDef

_LAYOUT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


@dataclass(frozen=True)
class FunctionSize:
    """One function: where it is, its lines (decorators excluded) and its parameters (self and cls excluded)."""

    module: str
    name: str
    lines: int
    parameters: int

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"


def kinds(text: str, tree: ast.Module | None = None) -> list[str]:
    """The kind of each line.

    A line inside a docstring, an import or `__all__` is of that kind also when it is empty or a comment. A string that
    documents an attribute is a docstring. A line that holds more than one statement is code when any of them is.
    """
    count = len(text.splitlines())
    found = ["blank"] * (count + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and found[token.start[0]] == "blank":
            found[token.start[0]] = "comment"
        elif token.type not in _LAYOUT:
            for line in range(token.start[0], token.end[0] + 1):
                found[line] = "code"
    special: dict[int, set[str]] = {}
    for node in ast.walk(tree or ast.parse(text)):
        if isinstance(node, ast.stmt) and not isinstance(node, ast.Match) and not hasattr(node, "body"):
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                special.setdefault(line, set()).add(_kind(node))
    for line, of_line in special.items():
        if len(of_line) == 1 and of_line != {"code"}:
            found[line] = of_line.pop()
    return found[1:]


def _kind(node: ast.stmt) -> str:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return "import"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return "docstring"
    return "__all__" if "__all__" in assigned(node) else "code"


def count(modules: Iterable[Module]) -> Counter[str]:
    """The lines of each kind."""
    counter: Counter[str] = Counter()
    for module in modules:
        counter.update(kinds(module.text, module.tree))
    return counter


def functions(module: Module) -> Iterator[FunctionSize]:
    """The functions and methods of a module, also those inside others."""
    for name, node in definitions(module.tree):
        if isinstance(node, Function):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield FunctionSize(module.name, name, lines, _parameters(node))


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Classes and functions with their qualified names, `Curve.energy_j` for instance."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{prefix}{node.name}", node
            yield from definitions(node, f"{prefix}{node.name}.")
        else:
            yield from definitions(node, prefix)


def assigned(node: ast.stmt) -> set[str]:
    """The names that a statement gives a value."""
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _parameters(node: Function) -> int:
    arguments = node.args
    names = [item.arg for item in (*arguments.posonlyargs, *arguments.args)]
    rest = len(arguments.kwonlyargs) + (arguments.vararg is not None) + (arguments.kwarg is not None)
    return len(names) - (names[:1] in (["self"], ["cls"])) + rest
