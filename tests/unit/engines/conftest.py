"""TensorRT-LLM, played by the double in tests/doubles."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

DOUBLES = Path(__file__).parents[2] / "doubles"


@pytest.fixture
def tensorrt_llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The double, importable while a test runs; needs torch and transformers."""
    monkeypatch.syspath_prepend(str(DOUBLES))
    import tensorrt_llm

    yield tensorrt_llm
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]
    sys.modules.pop("lem.engines.tensorrt.session", None)
