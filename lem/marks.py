"""The names of the marks that an experiment sets in its sample log, in the order in which they can occur."""

from __future__ import annotations

from typing import Final

__all__ = [
    "GUARD_AFTER",
    "GUARD_BEFORE",
    "IDLE_BARE",
    "IDLE_LOADED",
    "IDLE_POST",
    "LOAD",
    "PREFILL",
    "PREFILL_GUARD_AFTER",
    "PREFILL_GUARD_BEFORE",
    "WARMUP",
    "WINDOW",
]

IDLE_BARE: Final = "idle_bare"
LOAD: Final = "load"
IDLE_LOADED: Final = "idle_loaded"
WARMUP: Final = "warmup"
GUARD_BEFORE: Final = "guard_before"
WINDOW: Final = "window"
GUARD_AFTER: Final = "guard_after"
# A second window with prefill alone, for energy by phases.
PREFILL_GUARD_BEFORE: Final = "prefill_guard_before"
PREFILL: Final = "prefill"
PREFILL_GUARD_AFTER: Final = "prefill_guard_after"
IDLE_POST: Final = "idle_post"
