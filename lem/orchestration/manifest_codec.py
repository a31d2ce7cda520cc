"""The manifest's file: JSON with one line an entry, so that a save encodes only the entries that changed.

Schema history:
    1: first version.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lem.jsontypes import typed_fields
from lem.orchestration.manifest_entries import Attempt, CampaignManifest, CampaignManifestEntry, encode_json

__all__ = ["SCHEMA_VERSION", "decode_manifest", "encode_manifest"]

SCHEMA_VERSION = 1

_HEAD_NAMES = tuple(item.name for item in dataclasses.fields(CampaignManifest) if item.name != "experiments")


def encode_manifest(manifest: CampaignManifest) -> bytes:
    """The manifest as JSON in UTF-8, schema version first and one line an entry."""
    head = {"schema_version": SCHEMA_VERSION, **{name: getattr(manifest, name) for name in _HEAD_NAMES}}
    lines = b"".join([b"  " + encode_json(name) + b": " + encode_json(value) + b",\n" for name, value in head.items()])
    entries = b",\n".join([b"    " + entry.encode() for entry in manifest.experiments])
    # In one join: of 10,000 entries every copy costs milliseconds.
    return b"".join([b"{\n", lines, b'  "experiments": [\n', entries, b"\n  ]\n}\n"])


def decode_manifest(document: Any) -> CampaignManifest:
    """The manifest in a JSON document.

    Raises:
        ValueError: not a whole manifest of this schema; says what is wrong with it.
    """
    version = document.get("schema_version") if isinstance(document, dict) else None
    if not isinstance(version, int):
        raise ValueError("it is not a manifest: it has no schema_version")
    if version != SCHEMA_VERSION:
        by = "a newer lem" if version > SCHEMA_VERSION else "another lem"
        raise ValueError(f"it was written by {by}: schema_version is {version}, this lem reads {SCHEMA_VERSION}")
    values = {name: value for name, value in document.items() if name != "schema_version"}
    manifest = CampaignManifest(**typed_fields(CampaignManifest, values, "manifest"))
    manifest.experiments = [
        _decode_entry(entry, f"experiments[{index}]") for index, entry in enumerate(manifest.experiments)
    ]
    if len({entry.exp_id for entry in manifest.experiments}) != len(manifest.experiments):
        raise ValueError("it names an experiment twice")
    return manifest


def _decode_entry(value: Any, where: str) -> CampaignManifestEntry:
    values = typed_fields(CampaignManifestEntry, value, where)
    values["attempts"] = [
        Attempt(**typed_fields(Attempt, attempt, f"{where}.attempts[{index}]"))
        for index, attempt in enumerate(values["attempts"])
    ]
    try:
        return CampaignManifestEntry(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
