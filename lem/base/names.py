"""What names of campaigns become: ids, and names of folders, files, units and projects."""

from __future__ import annotations

import re

from lem.base.durable import utf8

MANIFEST_FILENAME = "campaign_manifest.json"
_MAX_SLUG = 64


def generate_campaign_id(name: str) -> str:
    """The first 8 hex digits of the MD5 of a campaign's name."""
    import hashlib  # OpenSSL, which not every process of lem needs

    return hashlib.md5(utf8(name), usedforsecurity=False).hexdigest()[:8]


def slug_of(name: str) -> str:
    """The name in `[a-z0-9][a-z0-9_-]*`, for files, units and projects; its campaign id if empty or too long."""
    slug = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")
    if not slug:
        return f"campaign-{generate_campaign_id(name)}"
    if len(slug) > _MAX_SLUG:
        return f"{slug[: _MAX_SLUG - 9].rstrip('-_')}-{generate_campaign_id(name)}"
    return slug
