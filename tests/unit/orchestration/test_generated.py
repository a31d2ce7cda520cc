from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import UserError
from lem.config.campaign_config import CampaignConfig
from lem.config.load import complete_campaign, load_campaign, load_experiment
from lem.orchestration.plan import Plan, build_plan, encode_config, write_configs


def plan(folder: Path, **options: Any) -> Plan:
    campaign = CampaignConfig.from_dict(
        {
            "campaign_name": "demo",
            "model": "gpt2",
            "num_samples": 3,
            "grid": {
                "backends": ["pytorch", "vllm"],
                "shared": {"decoder.temperature": [0.5, 1.0], "gpus": [[0, "GPU-1"]]},
                "backend_overrides": {"pytorch": {"max_memory": {"0": "10GiB"}}, "vllm": {"extra.x": [[1, 2], None]}},
            },
            "io": {"configs_dir": str(folder / "configs")},
            **options,
        }
    )
    loaded = complete_campaign(campaign)
    return build_plan(loaded.config, loaded.listed)


def test_every_file_gives_its_experiment_again(tmp_path: Path) -> None:
    single_gpu = {"backends": ["pytorch"], "shared": {"gpus": [[], [0]], "decoder.temperature": [1e-05, 1.0]}}
    for found in (plan(tmp_path), plan(tmp_path, campaign_name="single", grid=single_gpu)):
        configurations = found.configurations
        assert write_configs(configurations) == len(configurations) > 0
        for item in configurations:
            again = load_experiment(item.config_path).config
            assert again.identity() == item.config.identity()
            assert again.name == item.config_name


def test_a_second_time_nothing_is_written(tmp_path: Path) -> None:
    configurations = plan(tmp_path).configurations
    write_configs(configurations)
    before = {path: path.stat().st_ino for path in (tmp_path / "configs" / "demo").iterdir()}
    assert write_configs(configurations) == 0
    assert {path: path.stat().st_ino for path in (tmp_path / "configs" / "demo").iterdir()} == before


def test_a_broken_file_is_written_again(tmp_path: Path) -> None:
    configurations = plan(tmp_path).configurations
    write_configs(configurations)
    Path(configurations[0].config_path).write_text("half a")
    assert write_configs(configurations) == 1


def test_a_file_of_the_user_is_never_written(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("# mine\nmax_output_tokens: 3\n")
    assert write_configs(plan(tmp_path, grid=None, configs=[str(mine)]).configurations) == 0
    assert mine.read_text().startswith("# mine")


def test_a_variable_stays_a_variable_and_its_value_stays_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", "home-of-somebody")
    monkeypatch.setenv("TOKEN", "secret")
    monkeypatch.setenv("TOKENS", "12")
    file = tmp_path / "campaign.yaml"
    file.write_text(
        "campaign_name: demo\n"
        "experiments:\n"
        "  - model: /${FOLDER}/small\n"
        "    max_output_tokens: ${TOKENS}\n"
        '    pytorch: {extra: {key: "${TOKEN}"}}\n'
        "  - model: other\n"
        '    extra_metadata: {literal: "$${TOKEN}"}\n'
        f"io: {{configs_dir: {tmp_path}/configs}}\n"
    )
    loaded = load_campaign(file)
    one, two = build_plan(loaded.config, loaded.listed).configurations
    write_configs([one, two])
    written = one.config_path + Path(one.config_path).read_text()
    assert "secret" not in written
    assert "home-of-somebody" not in written
    again = load_experiment(one.config_path).config
    assert again.identity() == one.config.identity()
    assert again.model.name == "/home-of-somebody/small"
    assert again.max_output_tokens == 12
    assert load_experiment(two.config_path).config.extra_metadata == {"literal": "${TOKEN}"}


def test_a_value_that_is_no_utf8_is_written(tmp_path: Path) -> None:
    campaign = CampaignConfig.from_dict(
        {
            "campaign_name": "demo",
            "model": os.fsdecode(b"m-\xff"),
            "grid": {"backends": ["pytorch"]},
            "io": {"configs_dir": str(tmp_path)},
        }
    )
    configurations = build_plan(campaign).configurations
    assert [write_configs(configurations), write_configs(configurations)] == [1, 0]
    assert '"m-\\udcff"' in Path(configurations[0].config_path).read_text(encoding="utf-8")


def test_text_that_looks_like_a_variable_is_not_one() -> None:
    assert "$${HOME}" in encode_config({"model": "${HOME}"})


def test_a_folder_that_cannot_be_made_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "configs").write_text("a file")
    with pytest.raises(UserError, match="configs") as error:
        write_configs(plan(tmp_path).configurations)
    assert "io.configs_dir" in error.value.hint
