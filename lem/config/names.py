"""Names that are the same whether or not a configuration is at hand."""

from __future__ import annotations

MANIFEST_FILENAME = "campaign_manifest.json"

# The orders of experiments that `execution.structure` can ask for.
INTERLEAVED, SHUFFLED, GROUPED = STRUCTURES = ("interleaved", "shuffled", "grouped")
