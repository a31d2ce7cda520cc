"""The models of the lab, run by the Python of its pytorch environment: `python -m tests.lab.make_model FOLDER SIZE`.

They are those of examples/make_demo_model.py, with heads as wide as vLLM's attention on CPUs takes them (its smallest
is 32): as many weights, in fewer heads.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from examples import make_demo_model

NARROWEST_HEAD = 32


def widen(shape: make_demo_model.Shape) -> make_demo_model.Shape:
    """The shape with heads that are wide enough, queries sharing keys and values as before."""
    heads = min(shape.heads, shape.hidden // NARROWEST_HEAD)
    return replace(shape, heads=heads, key_value_heads=max(1, shape.key_value_heads * heads // shape.heads))


def main(folder: Path, size: str) -> int:
    """Exit code; the folder holds the model afterwards."""
    make_demo_model.SHAPES[size] = widen(make_demo_model.SHAPES[size])
    return make_demo_model.main([str(folder), "--size", size])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
