"""The tools that count a tree, compare coverage and plant bugs do so rightly on trees small enough to see through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.structure.counts import counts_of
from tests.structure.flows import CURRENT, FLOWS, Step, check_flows, read_flows
from tests.structure.lines import KINDS, kinds
from tests.structure.trees import ROOT, commit_tree

SOURCE = '''"""Two lines

of a docstring."""

from a import (
    # a comment
    b,
)

__all__ = [
    "f",
]

# a comment
LIMIT = 1  # beside code
"""What LIMIT is."""


def f(x: int) -> str:
    """Says so."""
    import late
    return """not
    a docstring"""; import c
'''


def make_tree(root: Path, **files: str) -> Path:
    """A folder with these modules, `lem__a` for lem/a.py."""
    for name, text in files.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_every_line_is_of_one_kind() -> None:
    found = kinds(SOURCE)
    assert len(found) == len(SOURCE.splitlines())
    assert found == [
        *["docstring"] * 3,
        "blank",
        *["import"] * 4,
        "blank",
        *["__all__"] * 3,
        "blank",
        "comment",
        "code",
        "docstring",
        *["blank"] * 2,
        "code",
        "docstring",
        "import",
        *["code"] * 2,
    ]
    assert set(found) <= set(KINDS)


def test_cycles_importers_and_sizes_are_counted(tmp_path: Path) -> None:
    long_function = "def long(a, b, *, c, d, e, f, **g):\n" + "    a += 1\n" * 60
    root = make_tree(
        tmp_path,
        lem__a="from lem import b\n\nclass A:\n    def m(self, x):\n        return x\n",
        lem__b="def late():\n    import lem.a\n",
        lem__c="from lem.d import D\nfrom . import d\n",
        lem__d="from .c import C\n" + long_function,
    )
    found = counts_of(root, "lem")
    assert found["files"] == 4
    assert found["import_cycles"]["of_modules"] == [["lem.c", "lem.d"]]
    assert found["import_cycles"]["with_imports_in_functions"] == [["lem.a", "lem.b"], ["lem.c", "lem.d"]]
    assert found["longest_function"] == {"lem.d:long": 61}
    assert found["functions_above_60_lines"] == {"lem.d:long": 61}
    assert found["functions_above_6_parameters"] == {"lem.d:long": 7}
    assert found["longest_module"] == {"lem.d": 62}
    assert found["modules_above_450_lines"] == {}
    assert found["modules_with_one_importer"] == 4
    assert len(found["of_these_below_80_lines"]) == 4


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        ("b:g  is called", ""),
        ("b:C.m  is called", ""),
        ("b:LIMIT  bounds it", ""),
        ("b:h  is called", "no h in it"),
        ("z:f  is called", "no such module"),
        ("c:f  is not imported", "no import connects it with a"),
        ("c:f [process]  runs elsewhere", ""),
        ("c:f [by name]  is loaded", "contains the other's name"),
        ("c:f [after b]  is not there yet", "not a step before it"),
        ("d:f [by name]  is loaded", ""),
    ],
)
def test_a_flow_is_checked_against_the_tree(tmp_path: Path, step: str, complaint: str) -> None:
    root = make_tree(
        tmp_path,
        lem__a="from lem import b\nNAMES = ['lem.d']\ndef f(): ...\n",
        lem__b="LIMIT = 1\ndef g(): ...\nclass C:\n    def m(self): ...\n",
        lem__c="def f(): ...\n",
        lem__d="def f(): ...\n",
    )
    found = check_flows({"option": [Step.parse("a:f  begins"), Step.parse(step)]}, root)["option"]
    assert len(found) == bool(complaint)
    assert all(complaint in text for text in found)


@pytest.fixture(params=read_flows())
def listed_tree(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    """Each tree that flows.yaml has lists for."""
    if request.param == CURRENT:
        yield request.param, ROOT
        return
    with commit_tree(request.param) as root:
        yield request.param, root


@pytest.mark.needs("checkout")
def test_every_declared_flow_is_one(listed_tree: tuple[str, Path]) -> None:
    name, root = listed_tree
    flows = read_flows()[name]
    assert set(flows) == set(FLOWS)
    assert check_flows(flows, root) == {flow: [] for flow in FLOWS}
