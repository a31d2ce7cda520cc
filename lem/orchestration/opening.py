"""How a campaign begins: afresh, or where an earlier run of it stopped."""

from __future__ import annotations

import enum
from collections.abc import Callable

from lem.errors import UserError
from lem.orchestration.manifest import CampaignManifest, ManifestManager
from lem.orchestration.resume import resume_text

__all__ = ["Opening", "Wish", "choose_opening"]


class Wish(enum.Enum):
    """What the command line asked for."""

    RESUME = "--resume"
    FRESH = "--fresh"
    UNSAID = ""


class Opening(enum.Enum):
    """What is done."""

    FRESH = "fresh"
    RESUME = "resume"


def choose_opening(
    manager: ManifestManager,
    campaign_id: str,
    wish: Wish,
    *,
    is_yes: bool,
    ask: Callable[[str], bool] | None,
) -> tuple[Opening, CampaignManifest | None]:
    """How to begin, and the manifest to go on with.

    A campaign that is complete begins afresh; one that is not is never thrown away without being asked about.

    Args:
        is_yes: resume without asking.
        ask: puts a yes-or-no question to a person; None when nobody is there.

    Raises:
        UserError: the manifest cannot be used, or nobody is there to say what to do with an unfinished one.
    """
    if wish is Wish.FRESH:
        return Opening.FRESH, None
    manifest = manager.load_strict(campaign_id)
    if manifest is None:
        return Opening.FRESH, None
    if wish is Wish.RESUME:
        return Opening.RESUME, manifest
    if manifest.is_complete:
        return Opening.FRESH, None
    if is_yes:
        return Opening.RESUME, manifest
    found = f"campaign {manifest.campaign_name} is not finished ({resume_text(manifest)})"
    if ask is None:
        raise UserError(found, "say --resume to go on with it, or --fresh to set it aside and start anew")
    return (Opening.RESUME, manifest) if ask(f"{found}. Go on with it?") else (Opening.FRESH, None)
