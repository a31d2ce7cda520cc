"""Differences between the old build and this tree that are meant to be, each with its reason.

An entry that matches nothing in its suite is stale and fails the harness: remove it.
"""

from __future__ import annotations

from tests.equivalence.comparing import Intended

# The column of the energy that counts; a table is as wide as its widest cell, so that every line of it may differ.
_TABLE = r"^\|"
_TDP = r"estimate from TDP"

INTENDED: tuple[Intended, ...] = (
    Intended("Records are written with schema version 2.", "results show", r"schema_version$", suite="recorded"),
    Intended("Reasons are codes with data beside their sentences.", "results show", r"_coded\b", suite="recorded"),
    Intended(
        "The energy that counts is shown whichever meter it comes from.",
        "results show",
        r"^energy |^ {12}|RAPL|virtual|machines and|modprobe",
        part="stdout",
        suite="recorded",
    ),
    Intended(
        "An export in Markdown has the columns of the energy that counts, not always the GPU's.",
        "results export",
        _TABLE,
        suite="recorded",
    ),
    Intended(
        "Estimates are labelled in one way, also in columns and where only some results are estimates.",
        "report (interrupted|demo)",
        _TDP + r"|>CPU packages, J<",
        suite="recorded",
    ),
    Intended("As above, in a comparison.", "synthetic-rough/compare", r"", part="stdout", suite="recorded"),
    Intended(
        "What ±5 % between cards means is said only where a board's sensor was read.",
        "report interrupted",
        r"between cards means",
        suite="recorded",
    ),
    Intended(
        "Slowdowns that overlap are one spell; running at the power limit is none.",
        "report demo",
        r"throttled in|not throttled",
        suite="recorded",
    ),
    Intended("The size of a page follows from its words.", "report .*--json", r"^\$\.bytes$", suite="recorded"),
    Intended(
        "Percentages are read in one place, and need their sign.",
        "--anchor-tolerance",
        r"expected a percentage|is no percentage",
        suite="recorded",
    ),
    Intended(
        "Percentages are read in one place, and need their sign.",
        "--until ci=2",
        r"expected a percentage|is no target",
    ),
    Intended("The help of --anchor-tolerance shows the sign.", "--help|completion", r"anchor-tolerance"),
    Intended(
        "lem experiment --yes is documented.",
        "experiment|completion",
        r"--yes|-l yes|an experiment never asks",
    ),
    Intended("Comments of the compose file are in plain English.", "lem compose", r"^ *#| #|^$"),
    Intended("A message names the choices before the value.", "config validate", r"message$", part="stdout"),
    Intended(
        "The description of health_check.enabled is more than one word.",
        "config (schema|fields)",
        r"health_check.*enabled\.description$",
    ),
)
