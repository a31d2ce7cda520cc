"""Names of other tools: each leads to an option that exists, and none takes the place of an option of lem."""

from __future__ import annotations

import pytest

from lem.config.campaign_config import CampaignConfig
from lem.config.experiment import ExperimentConfig
from lem.config.kinds import Option
from lem.config.option import find_option
from lem.config.terms import _ADVICE, _NAMES, VALUES, find_term, squashed

ROOTS = (ExperimentConfig, CampaignConfig)


def found(key: str) -> list[Option]:
    return [item for root in ROOTS if (item := find_option(root, key)) is not None]


@pytest.mark.parametrize("key", sorted({*(" ".join(_NAMES).split()), *VALUES}))
def test_every_term_leads_to_an_option(key: str):
    assert found(key)


def test_a_name_means_one_thing():
    names = [squashed(name) for table in (_NAMES, _ADVICE) for names in table.values() for name in names.split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("key", VALUES)
def test_values_lead_to_values_and_are_none_themselves(key: str):
    (item,) = found(key)
    assert set(VALUES[key].values()) <= set(item.choices)
    assert not set(VALUES[key]) & set(item.choices)


@pytest.mark.parametrize("name", ["batch_size", "batchSize", "batch-size", "batchsize"])
def test_a_name_may_be_written_as_flags_and_variables_are(name: str):
    term = find_term(name)
    assert term is not None
    assert term.options == ("pytorch.batch_size", "vllm.max_num_seqs", "tensorrt.max_batch_size")


def test_a_name_can_depend_on_its_section():
    count, answers = find_term("n"), find_term("n", "vllm")
    assert count is not None
    assert "dataset.sample_size" in count.options
    assert answers is not None
    assert answers.options == ()
    assert "one answer" in answers.advice
