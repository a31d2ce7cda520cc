"""Makes any Python that has this folder on PYTHONPATH run lem with the trivial engine, and with a fault if one is set.

Python imports `sitecustomize` at start-up, in every process of a run, so the program itself knows nothing of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

SERVED = frozenset({"lem.engines.pytorch", "lem.engines.vllm", "lem.engines.checkpoints"})


class _TrivialEngineFinder:
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in SERVED:
            return None
        return importlib.util.spec_from_file_location(name, Path(__file__).with_name("trivial_engine.py"))


sys.meta_path.insert(0, _TrivialEngineFinder())
importlib.import_module("fault_injector").install()
if "LEMTEST_WARM" in os.environ:
    importlib.import_module("warm_start").install()
