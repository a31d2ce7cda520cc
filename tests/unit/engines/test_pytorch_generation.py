"""What `generate` raises is a failure of the engine; what lem raises around it, or when it is called back, is a bug."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lem.base.errors import EngineError, OptionRefused
from lem.engines.common import EngineRaised
from lem.engines.protocol import TokenRequest

pytestmark = [pytest.mark.needs("torch"), pytest.mark.needs("transformers")]

REQUESTS = (TokenRequest(0, (5, 6), 2), TokenRequest(1, (7,), 2))
RAISED = [IndexError("an index"), TypeError("an argument"), AssertionError("a check"), KeyError("a key")]


class Model:
    """Answers every prompt with two tokens, by the steps that `generate` makes; `error` is raised instead."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def generate(self, *, input_ids: Any, **arguments: Any) -> Any:
        import torch

        if self._error is not None:
            raise self._error
        streamer = arguments.get("streamer")
        for step in range(3):
            if streamer is not None:
                streamer.put(input_ids if step == 0 else input_ids[:, 0])
        return torch.cat([input_ids, torch.full((input_ids.shape[0], 2), 9)], dim=1)


def runner(model: Any, **settings: Any) -> Any:
    import torch

    from lem.engines.pytorch.generation import BatchRunner
    from lem.engines.pytorch.options import SpecialTokens

    loaded: Any = SimpleNamespace(
        model=model, device=torch.device("cpu"), tokens=SpecialTokens(0, ()), positions=None, assistant=None
    )
    return BatchRunner(loaded, {"do_sample": False, "pad_token_id": 0, **settings})


@pytest.mark.parametrize("observe", [False, True])
def test_a_batch_is_answered(observe: bool) -> None:
    batch = REQUESTS[:1] if observe else REQUESTS
    found = runner(Model()).run(batch, observe=observe)
    assert [item.output_ids for item in found] == [(9, 9)] * len(batch)


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_what_generate_raises_is_the_engines(error: Exception) -> None:
    with pytest.raises(EngineError, match=f"generate failed: {type(error).__name__}") as caught:
        runner(Model(error)).run(REQUESTS, observe=False)
    assert isinstance(caught.value.__cause__, EngineRaised)
    assert caught.value.__cause__.error is error


def test_out_of_memory_fails_the_requests_of_the_batch() -> None:
    import torch

    found = runner(Model(torch.OutOfMemoryError("no room"))).run(REQUESTS, observe=False)
    assert [item.error for item in found] == ["out of memory in a batch of 2: no room"] * 2


def test_a_bug_in_what_lem_hands_over_is_not_the_engines() -> None:
    broken: Any = (TokenRequest(0, (5, None), 2), REQUESTS[1])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="NoneType"):
        runner(Model()).run(broken, observe=False)


def test_a_bug_in_what_generate_calls_back_is_not_the_engines() -> None:
    class Confused(Model):
        def generate(self, *, input_ids: Any, **arguments: Any) -> Any:
            return super().generate(input_ids=[5], **{**arguments, "streamer": Handing(arguments["streamer"])})

    class Handing:
        """Hands the clock what it cannot count."""

        def __init__(self, clock: Any) -> None:
            self._clock = clock

        def put(self, _value: Any) -> None:
            for _ in range(2):
                self._clock.put([5])

    with pytest.raises(AttributeError, match="numel"):
        runner(Confused()).run(REQUESTS[:1], observe=True)


def test_settings_that_transformers_refuses_are_the_users() -> None:
    from lem.config.backends import PyTorchConfig
    from lem.engines.pytorch.generation import try_out
    from lem.engines.pytorch.options import EngineFacts

    facts = EngineFacts({"transformers": "5.23.0", "torch": "2.13.0"}, "cpu", None, (), ())
    with pytest.raises(OptionRefused, match="cannot generate"):
        try_out(runner(Model(), early_stopping="perhaps"), PyTorchConfig(), facts)
    with pytest.raises(OptionRefused, match="IndexError"):
        try_out(runner(Model(IndexError("an index"))), PyTorchConfig(), facts)
