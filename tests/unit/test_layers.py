"""Imports run downward only. Read with ast, so an import inside a function counts like one at the top."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from lem.engines.common import BACKEND_MODULES

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60

# The layers below each one; a layer is a folder of lem/, or a module in it. Every layer may import `lem` (the version).
BELOW: dict[str, frozenset[str]] = {
    "": frozenset({"base"}),
    "base": frozenset(),
    "config": frozenset({"base"}),
    "identities": frozenset({"base"}),
    "record": frozenset({"base", "identities"}),
    "meters": frozenset({"base", "config", "record"}),
    "engines": frozenset({"base", "config", "record"}),
    "worker": frozenset({"base", "config", "record", "meters", "engines"}),
    "results": frozenset({"base", "config", "record"}),
    "orchestration": frozenset({"base", "config", "record", "meters", "engines", "worker", "results"}),
}
BELOW["cli"] = BELOW["orchestration"] | {"orchestration"}
BELOW["__main__"] = BELOW["api"] = BELOW["cli"] | {"cli"}

# Third-party packages, and the modules that may import each (a pattern of names).
ENGINES = {
    r"lem\.engines\.pytorch(\.\w+)?": {
        *("accelerate", "bitsandbytes", "huggingface_hub", "peft"),
        *("safetensors", "tokenizers", "torch", "transformers"),
    },
    r"lem\.engines\.checkpoints": {"huggingface_hub", "safetensors", "torch", "transformers"},
    r"lem\.engines\.vllm(\.\w+)?": {"torch", "vllm"},
    r"lem\.engines\.tensorrt(\.\w+)?": {"tensorrt_llm", "torch"},
    r"lem\.engines\.server\.tokens": {"transformers"},
}
THIRD_PARTY = {
    **ENGINES,
    r"lem\.worker\.datasets": {"datasets"},
    r"lem\.worker\.datafiles": {"pyarrow"},
    r"lem\.config\.yamlfile": {"yaml"},
    r"lem\.meters\..*": {"pynvml"},
}
CONTAINER_SIDE = ("worker", "meters", "engines")


@dataclass(frozen=True)
class Import:
    """One import statement; `is_late` when it runs only with the function it stands in."""

    importer: str
    target: str
    line: int
    is_late: bool

    def __str__(self) -> str:
        return f"{self.importer} line {self.line} imports {self.target}"


def modules() -> dict[str, Path]:
    """Every module of lem by its dotted name."""
    found = {}
    for path in sorted((ROOT / "lem").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "_vendor" not in parts:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@functools.cache
def imports_of(name: str) -> tuple[Import, ...]:
    """The imports of a module of lem; `lem` itself only names what it exports from above, for type checkers."""
    found = imports_in(MODULES[name].read_text(encoding="utf-8"), name)
    return tuple(item for item in found if name != "lem" or not item.is_late)


def imports_in(source: str, importer: str) -> Iterator[Import]:
    """The imports of a source text: `from lem import durable` counts as one of lem.base.durable."""
    tree = ast.parse(source)
    late = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(outer)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [_target(node.module or f"relative to {importer}", alias.name) for alias in node.names]
        else:
            continue
        for target in targets:
            yield Import(importer, target, node.lineno, node in late)


def _target(module: str, name: str) -> str:
    """`from lem import durable` imports a module, `from lem.base.errors import UserError` a name from one."""
    dotted = f"{module}.{name}"
    return dotted if dotted in MODULES or module == "lem._vendor" else module


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def layer_of(name: str) -> str:
    """`config` for lem.config.option; empty for lem itself."""
    return name.removeprefix("lem").lstrip(".").split(".")[0]


def third_party_of(name: str) -> set[str]:
    """What a module may import beside the standard library and lem."""
    return {package for home, packages in THIRD_PARTY.items() if re.fullmatch(home, name) for package in packages}


def packages_of(item: Import) -> set[str]:
    """The third-party package of an import, vendored or not; empty for lem and the standard library."""
    parts = item.target.split(".")
    top = parts[2] if parts[:2] == ["lem", "_vendor"] and len(parts) > 2 else parts[0]
    return {top} - sys.stdlib_module_names - {"lem"}


def closure(name: str, *, is_late_counted: bool = True) -> set[str]:
    """Every module of lem that is imported with `name`, at once or later; or at once only."""
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in reached:
            continue
        reached.add(current)
        imports = [item for item in imports_of(current) if is_late_counted or not item.is_late]
        waiting += [item.target for item in imports if item.target in MODULES]
        if "." in current:
            waiting.append(current.rpartition(".")[0])
    return reached


def test_an_import_is_seen_wherever_it_stands() -> None:
    source = """
import os.path, json
from lem import __version__
from lem.base import durable
from lem._vendor import yaml
if TYPE_CHECKING:
    import torch
def f():
    try:
        from torch.nn import functional
    except ImportError:
        import lem.cli.main
"""
    seen = {(item.target, item.is_late) for item in imports_in(source, "lem.example")}
    early = {"os.path", "json", "lem", "lem.base.durable", "lem._vendor.yaml"}
    late = {"torch", "torch.nn", "lem.cli.main"}
    assert seen == {(name, False) for name in early} | {(name, True) for name in late}


def test_every_module_belongs_to_a_layer() -> None:
    assert {layer_of(name) for name in MODULES} - {""} <= set(BELOW)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downward(name: str) -> None:
    layer = layer_of(name)
    allowed = BELOW.get(layer, frozenset()) | {layer, "", "_vendor"}
    own = [item for item in imports_of(name) if item.target.split(".")[0] == "lem"]
    upward = [str(item) for item in own if layer_of(item.target) not in allowed]
    assert not upward


@pytest.mark.parametrize("name", MODULES)
def test_third_party_code_is_imported_only_where_it_is_at_home(name: str) -> None:
    assert not [str(item) for item in imports_of(name) if packages_of(item) - third_party_of(name)]


def imports_an_engine(name: str) -> bool:
    """Whether importing a module, and nothing more, imports an engine."""
    engines = set().union(*ENGINES.values())
    reached = (item for module in closure(name, is_late_counted=False) for item in imports_of(module))
    return any(packages_of(item) & engines for item in reached if not item.is_late)


def test_engines_are_imported_when_a_backend_loads() -> None:
    """Helpers of a backend may stand on its engine; the backend, which the registry names, and all others may not."""
    early = {name for name in MODULES if imports_an_engine(name)}
    assert early
    assert all(any(re.fullmatch(home, name) for home in ENGINES) for name in early)
    assert not early & set(BACKEND_MODULES.values())


def test_only_process_imports_subprocess() -> None:
    importers = {item.importer for name in MODULES for item in imports_of(name) if item.target == "subprocess"}
    assert importers == {"lem.base.process"}


@pytest.mark.parametrize("layer", CONTAINER_SIDE)
def test_container_side_reads_no_yaml_not_even_through_others(layer: str) -> None:
    for name in MODULES:
        if layer_of(name) == layer:
            readers = [item for module in closure(name) for item in imports_of(module) if "yaml" in item.target]
            assert not readers, f"{name} leads to {readers[0]}"


def test_container_side_starts_with_the_standard_library_alone() -> None:
    names = [name for name in MODULES if layer_of(name) in CONTAINER_SIDE and not imports_an_engine(name)]
    assert set(BACKEND_MODULES.values()) <= set(names)
    loaded = loaded_after(f"import importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert set(names) <= loaded
    assert not {name for name in loaded if "yaml" in name.split(".")}


def test_help_imports_no_engine_and_nothing_that_measures() -> None:
    loaded = loaded_after("import io, lem.cli.main\nlem.cli.main.main(['--help'], io.StringIO(), io.StringIO())")
    assert "lem.cli.main" in loaded
    assert not {name for name in loaded if layer_of(name) in CONTAINER_SIDE and name.startswith("lem.")}
    assert not {
        name for name in loaded if name.split(".")[0] in {"numpy", "torch", "transformers"} or "yaml" in name.split(".")
    }


# What a command does not import before it knows that it needs it: most of a short command's time is imports.
NOT_IMPORTED = {
    "--help": {"dataclasses", "json", "logging", "pathlib", "typing", "traceback", "lem.base.doc", "lem.cli.options"},
    "status": {
        *("lem.config", "lem.results", "lem.meters", "lem.engines", "lem.worker", "lem._vendor", "yaml"),
        *("socket", "statistics", "tempfile", "subprocess"),
    },
    "compare nothing": {
        *("lem.config.load", "lem.config.yamlfile", "lem.meters", "lem.worker", "lem.engines", "yaml"),
        *("lem.orchestration.plan", "lem.results.report", "lem.results.junit", "html", "socket", "tempfile"),
    },
    "config validate demo.yaml": {
        *("lem.meters.nvml", "lem.meters.samples", "lem.worker.datasets", "lem.engines"),
        *("lem.results.run", "lem.config.introspection", "socket", "subprocess"),
    },
    "report nothing": {"lem.config.load", "lem.config.yamlfile", "lem.worker", "lem.engines", "yaml"},
}


@pytest.mark.parametrize("words", NOT_IMPORTED)
def test_a_command_imports_only_what_it_needs(words: str, tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_bytes((ROOT / "examples" / "demo.yaml").read_bytes())
    program = f"import os, io, lem.cli.main\nos.chdir({str(tmp_path)!r})\n"
    program += f"sys.path.append({str(Path(yaml.__file__).parents[1])!r})\n"
    program += f"code = lem.cli.main.main({words.split()!r}, io.StringIO(), io.StringIO())\n"
    program += f"assert code == {2 if 'nothing' in words else 0}, code"
    loaded = loaded_after(program)
    assert "lem.cli.main" in loaded
    assert NOT_IMPORTED[words] & loaded == set()


def test_merge_and_fleet_receive_import_neither_plans_nor_the_report() -> None:
    loaded = loaded_after("import lem.cli.main\nlem.cli.main.make_parser(['merge', 'fleet', 'bundle'])")
    assert "lem.results.merge" in loaded
    heavy = (
        "lem.orchestration.plan",
        "lem.orchestration.bundle",
        "lem.results.report",
        "lem.config.load",
        "lem._vendor",
    )
    assert not {name for name in loaded if name.startswith(heavy)}


def loaded_after(program: str) -> set[str]:
    """The modules that a Python without site-packages has loaded after running a program."""
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{program}\nprint(*sys.modules, sep='\\n')"
    finished = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return set(finished.stdout.split())
