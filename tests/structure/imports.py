"""Which module imports which, by ast: imports inside functions count, and are told apart from those of the module."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from tests.structure.trees import Module

Graph = Mapping[str, frozenset[str]]


def graph(modules: Mapping[str, Module], *, is_late_counted: bool = True) -> Graph:
    """The modules that each module imports.

    Args:
        is_late_counted: False leaves out what is imported in functions or under `if TYPE_CHECKING`.
    """
    return {
        name: frozenset(_imported(module, modules, is_late_counted=is_late_counted)) - {name}
        for name, module in modules.items()
    }


def _imported(module: Module, modules: Mapping[str, Module], *, is_late_counted: bool) -> Iterator[str]:
    for node in _statements(module.tree, is_late_counted=is_late_counted):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = _base(module, node)
            for alias in node.names:
                name = f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base
                if name in modules:
                    yield name


def _statements(node: ast.AST, *, is_late_counted: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        is_late = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        )
        if is_late_counted or not is_late:
            yield child
            yield from _statements(child, is_late_counted=is_late_counted)


def _base(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    folder = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*folder, *([node.module] if node.module else [])])


def cycles(imports: Graph) -> list[list[str]]:
    """The groups of modules that import each other in a circle (the strongly connected components, Tarjan 1972)."""
    found: list[list[str]] = []
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for target in sorted(imports[name]):
            if target not in order:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], order[target])
        if lowest[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(imports):
        if name not in order:
            visit(name)
    return sorted(found)


def importers(imports: Graph) -> Mapping[str, frozenset[str]]:
    """The modules that import each module."""
    return {name: frozenset(other for other, targets in imports.items() if name in targets) for name in imports}
