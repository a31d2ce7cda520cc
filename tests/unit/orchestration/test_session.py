"""Secrets come from the environment or from systemd's credentials, and from nowhere else."""

import pytest

from lem.base.errors import UserError
from lem.orchestration.session import find_secrets


def test_a_credential_is_read_and_the_environment_wins(tmp_path):
    (tmp_path / "HF_TOKEN").write_text("from-systemd\n")
    folder = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert find_secrets(folder) == {"HF_TOKEN": "from-systemd"}
    assert find_secrets({**folder, "HF_TOKEN": "from-here"}) == {"HF_TOKEN": "from-here"}


def test_what_is_not_there_is_no_secret(tmp_path):
    assert find_secrets({}) == {}
    assert find_secrets({"CREDENTIALS_DIRECTORY": str(tmp_path), "HF_TOKEN": ""}) == {}


def test_a_credential_that_cannot_be_read_is_told_without_its_content(tmp_path):
    (tmp_path / "HF_TOKEN").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"credential .*HF_TOKEN: not UTF-8 text"):
        find_secrets({"CREDENTIALS_DIRECTORY": str(tmp_path)})
