"""The pytorch backend: transformers' `generate` on CPU or CUDA. PyTorch is imported when a model is loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from lem.base.errors import EngineError
from lem.base.units import NS_PER_S
from lem.config.experiment import ExperimentConfig
from lem.engines.common import importing
from lem.engines.protocol import Engine


def load(config: ExperimentConfig, secrets: Mapping[str, str]) -> Engine:
    hint = "check that their versions are compatible and that the libraries they need are installed"
    with importing("pytorch", "PyTorch or transformers", hint):
        from lem.engines.pytorch.session import Session, free_memory
    try:
        return Session(config, secrets)
    except BaseException as error:
        free_memory(error)
        raise


_PULSES = 3
_SIZE = 4096  # of matrices whose product takes milliseconds, and power near the limit
_LAUNCHES = 4


def pulse(pulse_s: float) -> Iterator[tuple[int, int]]:
    """Work on the first GPU some times for `pulse_s`, after a rest of that length each and before a last one."""
    try:
        import torch

        factor = torch.ones(_SIZE, _SIZE, dtype=torch.float16, device="cuda")
        product = factor @ factor  # libraries are loaded before the first pulse
        torch.cuda.synchronize()
    except (AssertionError, ImportError, OSError, RuntimeError) as error:
        raise EngineError(str(error)) from error
    for _ in range(_PULSES):
        time.sleep(pulse_s)
        opened_ns = time.monotonic_ns()
        while time.monotonic_ns() < opened_ns + pulse_s * NS_PER_S:
            for _ in range(_LAUNCHES):
                torch.mm(factor, factor, out=product)
            torch.cuda.synchronize()
        yield opened_ns, time.monotonic_ns()
    time.sleep(pulse_s)
