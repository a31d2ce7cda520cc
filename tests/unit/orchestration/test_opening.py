"""Nothing that was measured is thrown away without being asked about."""

import functools

import pytest

from lem.base.errors import UserError
from lem.orchestration.manifest import CampaignManifestEntry, ManifestManager
from lem.orchestration.resume import Opening, Wish, choose_opening


def _manager(tmp_path, *statuses):
    manager = ManifestManager(tmp_path / "campaign_manifest.json")
    if statuses:
        entries = [
            CampaignManifestEntry(f"e{index}", "n", "p", "h", "pytorch", None, 0, status)
            for index, status in enumerate(statuses)
        ]
        manager.save(manager.create_manifest("id", "demo", "hash", entries))
    return manager


def _choose(manager, wish=Wish.UNSAID, *, is_yes=False, ask=None):
    opening, manifest = choose_opening(manager, "id", wish, is_yes=is_yes, ask=ask)
    assert (manifest is not None) == (opening is Opening.RESUME)
    return opening


@pytest.mark.parametrize("wish", list(Wish))
def test_without_a_manifest_every_start_is_fresh(tmp_path, wish):
    assert _choose(_manager(tmp_path), wish) is Opening.FRESH


def test_a_complete_campaign_starts_afresh_unless_told_to_resume(tmp_path):
    manager = _manager(tmp_path, "completed", "skipped")
    assert _choose(manager, is_yes=True) is Opening.FRESH
    assert _choose(manager, Wish.RESUME) is Opening.RESUME


@pytest.mark.parametrize("status", ["pending", "running", "failed"])
def test_an_unfinished_campaign_is_resumed_with_yes_and_left_alone_without_anybody_to_ask(tmp_path, status):
    manager = _manager(tmp_path, "completed", status)
    assert _choose(manager, is_yes=True) is Opening.RESUME
    with pytest.raises(UserError) as caught:
        _choose(manager)
    assert "--resume" in caught.value.hint
    assert "--fresh" in caught.value.hint


@pytest.mark.parametrize(("answer", "opening"), [(True, Opening.RESUME), (False, Opening.FRESH)])
def test_a_person_is_asked(tmp_path, answer, opening):
    asked = []

    def ask(question):
        asked.append(question)
        return answer

    assert _choose(_manager(tmp_path, "completed", "running", "failed", "skipped"), ask=ask) is opening
    assert "2 remaining (1 completed, 1 failed)" in asked[0]


def test_an_unreadable_manifest_stops_everything_but_a_fresh_start(tmp_path):
    manager = _manager(tmp_path)
    manager.manifest_path.write_text('{"schema_version": 1, "campaign')
    for wish in (Wish.UNSAID, Wish.RESUME):
        with pytest.raises(UserError) as caught:
            _choose(manager, wish, is_yes=True)
        assert "campaign_manifest.json" in caught.value.message
        assert "--fresh" in caught.value.hint
    assert _choose(manager, Wish.FRESH) is Opening.FRESH


def test_another_campaigns_manifest_is_refused(tmp_path):
    manager = _manager(tmp_path, "completed")
    with pytest.raises(UserError, match="belongs to another campaign"):
        choose_opening(manager, "other", Wish.RESUME, is_yes=True, ask=None)


def test_a_planned_run_is_gone_on_with_and_another_one_set_aside(tmp_path):
    manager = _manager(tmp_path)
    manifest = manager.create_manifest("id", "demo", "hash", [])
    manifest.run_id = "planned"
    manager.save(manifest)
    choose = functools.partial(choose_opening, manager, "id", is_yes=True, ask=None)
    assert choose(Wish.UNSAID, run_id="planned")[0] is Opening.RESUME
    assert choose(Wish.UNSAID, run_id="another")[0] is Opening.FRESH
    with pytest.raises(UserError, match="is of run planned"):
        choose(Wish.RESUME, run_id="another")
