"""The tiny model that integration tests run, made once a session from the text in the repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaign_rig import CampaignRig
from tests.needs import missing


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[CampaignRig]:
    """A campaign in a folder of its own; no process of it is left behind when a test fails."""
    with CampaignRig(tmp_path).cleaned() as rig:
        yield rig


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of 0.2 M parameters and its tokenizer; not to be written to."""
    for name in ("torch", "transformers"):
        reason = missing(name)
        if reason is not None:
            pytest.skip(reason)
    import torch

    from examples.make_demo_model import main

    # A second thread saves a model this small nothing, and waits for a core that other work holds.
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    assert main([str(folder), "--size", "tiny"]) == 0
    return folder


@pytest.fixture(scope="session")
def wide_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads as wide as vLLM takes them on the CPU; not to be written to."""
    reason = missing("vllm")
    if reason is not None:
        pytest.skip(reason)
    from tests.lab.make_model import main

    folder = tmp_path_factory.mktemp("models") / "tiny"
    assert main(folder, "tiny") == 0
    return folder
