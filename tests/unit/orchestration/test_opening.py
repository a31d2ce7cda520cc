"""Nothing that was measured is thrown away without being asked about."""

import pytest

from lem.base.errors import UserError
from lem.orchestration.manifest import CampaignManifestEntry, ManifestManager
from lem.orchestration.resume import RunOptions, choose_manifest


def _manager(tmp_path, *statuses):
    manager = ManifestManager(tmp_path / "campaign_manifest.json")
    if statuses:
        entries = [
            CampaignManifestEntry(f"e{index}", "n", "p", "h", "pytorch", None, 0, status)
            for index, status in enumerate(statuses)
        ]
        manager.save(manager.create_manifest("id", "demo", "hash", entries))
    return manager


def _choose(manager, **options):
    """Whether it goes on with the manifest."""
    return choose_manifest(manager, "id", RunOptions(**options)) is not None


@pytest.mark.parametrize("resume", [True, False, None])
def test_without_a_manifest_every_start_is_fresh(tmp_path, resume):
    assert not _choose(_manager(tmp_path), resume=resume)


def test_a_complete_campaign_starts_afresh_without_resume(tmp_path):
    manager = _manager(tmp_path, "completed", "skipped")
    assert not _choose(manager, is_yes=True)
    assert _choose(manager, resume=True)


@pytest.mark.parametrize("status", ["pending", "running", "failed"])
def test_an_unfinished_campaign_is_resumed_with_yes_and_left_alone_without_anybody_to_ask(tmp_path, status):
    manager = _manager(tmp_path, "completed", status)
    assert _choose(manager, is_yes=True)
    with pytest.raises(UserError) as caught:
        _choose(manager)
    assert "--resume" in caught.value.hint
    assert "--fresh" in caught.value.hint


@pytest.mark.parametrize("answer", [True, False])
def test_a_person_is_asked(tmp_path, answer):
    asked = []

    def ask(question):
        asked.append(question)
        return answer

    assert _choose(_manager(tmp_path, "completed", "running", "failed", "skipped"), ask=ask) is answer
    assert "2 remaining (1 completed, 1 failed)" in asked[0]


def test_an_unreadable_manifest_stops_everything_but_a_fresh_start(tmp_path):
    manager = _manager(tmp_path)
    manager.manifest_path.write_text('{"schema_version": 1, "campaign')
    for resume in (None, True):
        with pytest.raises(UserError) as caught:
            _choose(manager, resume=resume, is_yes=True)
        assert "campaign_manifest.json" in caught.value.message
        assert "--fresh" in caught.value.hint
    assert not _choose(manager, resume=False)


def test_another_campaigns_manifest_is_refused(tmp_path):
    manager = _manager(tmp_path, "completed")
    with pytest.raises(UserError, match="belongs to another campaign"):
        choose_manifest(manager, "other", RunOptions(resume=True))


def test_a_planned_run_is_gone_on_with_and_another_one_set_aside(tmp_path):
    manager = _manager(tmp_path)
    manifest = manager.create_manifest("id", "demo", "hash", [])
    manifest.run_id = "planned"
    manager.save(manifest)
    assert _choose(manager, run_id="planned")
    assert not _choose(manager, run_id="another")
    with pytest.raises(UserError, match="is of run planned"):
        _choose(manager, resume=True, run_id="another")
