"""Settings by their labels: shared once, differing in columns."""

from __future__ import annotations

import dataclasses

from lem.results.metrics import differing_settings, headline_settings, settings_of, shared_settings
from tests.records import make_gpu, make_record


def test_settings_are_those_of_the_heading_then_the_options_given() -> None:
    record = make_record(
        requested={
            "model": {"name": "m"},
            "backend": "pytorch",
            "fp_precision": "float16",
            "max_output_tokens": 32,
            "config_name": "x",
            "extra_metadata": {"note": "n"},
            "pytorch": {"batch_size": 1, "compile": {"enabled": True}, "devices": [0, 1], "none": None},
        }
    )
    assert settings_of(record) == {
        "backend": "pytorch",
        "model": "tiny-llama",
        "precision": "float16",
        "device": "cpu",
        "traffic": "closed batch",
        "engine": "transformers 5.23.0",
        "max_output_tokens": "32",
        "pytorch.batch_size": "1",
        "pytorch.compile.enabled": "true",
        "pytorch.devices": "0, 1",
        "pytorch.none": "null",
    }


def test_gpus_of_one_kind_are_counted() -> None:
    record = dataclasses.replace(make_record(), gpus=(make_gpu(), make_gpu()))
    assert settings_of(record)["GPU"] == "2 × H200"
    assert "GPU" not in settings_of(make_record())


def test_a_hub_model_keeps_its_organisation_and_a_folder_its_last_part() -> None:
    assert headline_settings(make_record(model="org/model"))["model"] == "org/model"
    assert headline_settings(make_record(model="./here/model"))["model"] == "model"


def test_what_all_have_is_shared_and_the_rest_differs() -> None:
    one, other = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"}
    assert shared_settings([one, other]) == {"a": "1"}
    assert differing_settings([one, other]) == {"b": ("2", "9"), "c": ("3", None), "d": (None, "4")}
    assert shared_settings([]) == {}
    assert differing_settings([]) == {}
