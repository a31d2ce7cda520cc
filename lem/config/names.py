"""Names of files that are the same whether or not a configuration is at hand."""

from __future__ import annotations

__all__ = ["MANIFEST_FILENAME"]

MANIFEST_FILENAME = "campaign_manifest.json"
