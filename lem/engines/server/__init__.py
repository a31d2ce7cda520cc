"""The server backend: any server that speaks the completions or chat API of OpenAI, driven by a load client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the load client is started often, and needs nothing of these
    from lem.config.experiment import ExperimentConfig
    from lem.engines.protocol import Engine


def load(config: ExperimentConfig, secrets: Mapping[str, str]) -> Engine:
    """See `Engine`."""
    from lem.engines.server.session import Session

    return Session(config, secrets)
