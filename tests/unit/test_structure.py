"""The tools that count a tree, compare coverage and plant bugs do so rightly on trees small enough to see through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.structure.counts import counts_of
from tests.structure.flows import CURRENT, FLOWS, Step, check_flows, read_flows
from tests.structure.planting import (
    CAUGHT,
    NOT_APPLICABLE,
    SURVIVED,
    Bug,
    Planted,
    Planter,
    find,
    read_bugs,
)
from tests.structure.trees import ROOT, commit_tree, modules


def make_tree(root: Path, files: Mapping[str, str]) -> Path:
    """A folder with these files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_cycles_importers_and_sizes_are_counted(tmp_path: Path) -> None:
    long_function = "def long(a, b, *, c, d, e, f, **g):\n" + "    a += 1\n" * 60
    root = make_tree(
        tmp_path,
        {
            "lem/a.py": "from lem import b\n\nclass A:\n    def m(self, x):\n        return x\n",
            "lem/b.py": "def late():\n    import lem.a\n",
            "lem/c.py": "from lem.d import D\nfrom . import d\n",
            "lem/d.py": "from .c import C\n" + long_function,
        },
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
        {
            "lem/a.py": "from lem import b\nNAMES = ['lem.d']\ndef f(): ...\n",
            "lem/b.py": "LIMIT = 1\ndef g(): ...\nclass C:\n    def m(self): ...\n",
            "lem/c.py": "def f(): ...\n",
            "lem/d.py": "def f(): ...\n",
        },
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


def bug(name: str, place: str, snippet: str, replacement: str, **more: Any) -> Bug:
    """A bug as planted.yaml declares it, of the package `cli`."""
    return Bug.of({"name": name, "package": "cli", "in": place, "old": snippet, "bug": replacement, **more})


COMPARING = """LIMIT = 3

class A:
    def f(self, x):
        return (x <
            LIMIT)

def f(x):
    return x < LIMIT
"""


def test_a_bug_is_found_by_its_function_wherever_that_has_moved(tmp_path: Path) -> None:
    root = make_tree(tmp_path, {"lem/new/place.py": COMPARING, "lem/old.py": "def g(x):\n    return x < 1\n"})
    known = modules(root, "lem")

    def planted(found: Planted | str) -> str:
        assert isinstance(found, Planted)
        assert found.sound == COMPARING
        return found.text

    assert planted(find(bug("", "A.f", "x < LIMIT", "x"), known)).count("return (x)") == 1
    assert planted(find(bug("", "f", "x < LIMIT", "x <= LIMIT"), known)).endswith("return x <= LIMIT\n")
    assert planted(find(bug("", "LIMIT", "3", "4"), known)).startswith("LIMIT = 4\n")
    moved = bug("", "old.py:f", "x < LIMIT", "True")
    assert planted(find(moved, known)).endswith("return True\n")
    renamed = bug("", "before", "x < 3", "x <= 3", new={"in": "f", "old": "x < LIMIT", "bug": "x <= LIMIT"})
    assert planted(find(renamed, known)).endswith("return x <= LIMIT\n")
    assert find(bug("", "f", "x > LIMIT", "x"), known) == "f has its snippet 0 times"
    assert find(bug("", "A", "x", "y"), known) == "A has its snippet 2 times"


SMALL = """def is_small(x):
    return x < 3

def is_large(x):
    return x > 9
"""
TEST_SMALL = """from lem.base import is_small, is_large

def test_small():
    assert is_small(2)
    assert not is_small({0})
"""


def test_bugs_are_planted_one_at_a_time_and_judged_by_their_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which take most of the time
    root = make_tree(
        tmp_path,
        {
            "lem/__init__.py": "",
            "lem/base.py": SMALL,
            "tests/unit/cli/test_edge.py": TEST_SMALL.format(3) + "    assert not is_large(9)\n",
            "tests/unit/test_middle.py": TEST_SMALL.format(5),
            "tests/unit/test_broken.py": TEST_SMALL.format(1),
        },
    )
    bugs = [
        bug("default", "is_small", "<", "<="),
        bug("weak", "is_small", "<", "<=", tests=["tests/unit/test_middle.py", "tests/unit/test_gone.py"]),
        bug("other", "is_large", ">", ">="),
        bug("gone", "is_huge", ">", ">="),
        bug("broken", "is_large", ">", ">=", tests=["tests/unit/test_broken.py"]),
    ]
    planter = Planter(root)
    found = {item.name: planter.outcome(item) for item in bugs}
    assert {name: result for name, (result, _) in found.items()} == {
        "default": CAUGHT,
        "weak": SURVIVED,
        "other": CAUGHT,
        "gone": NOT_APPLICABLE,
        "broken": NOT_APPLICABLE,
    }
    assert "tests/unit/cli/test_edge.py::test_small" in found["other"][1]
    assert "fails without the bug" in found["broken"][1]
    assert (root / "lem/base.py").read_text() == SMALL


@pytest.mark.needs("checkout")
def test_every_declared_bug_has_a_place_in_the_old_tree() -> None:
    bugs = read_bugs()
    assert len({item.name for item in bugs}) == len(bugs) == 100
    with commit_tree("524ec81") as root:
        known = modules(root, "lem")
        assert [found for item in bugs if isinstance(found := find(item, known), str)] == []
        assert [name for item in bugs for name in item.tests[:1] if not (root / name).exists()] == []
