"""The pytorch backend on a real model: tokens are counted as generated, timed as seen, and equal to bare `generate`."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.base.clock import Clock
from lem.base.errors import EngineError, OptionRefused
from lem.engines.protocol import Engine, TokenRequest
from lem.engines.pytorch import load
from lem.meters.work import describe_work
from lem.worker.window import measure_batch
from tests.integration.engine_answers import (
    LENGTHS,
    SAMPLING,
    Arrivals,
    answers,
    configured,
    copy_model,
    experiment,
    loaded,
    outputs,
    prompts,
    served,
)

pytestmark = [pytest.mark.needs("torch"), pytest.mark.needs("transformers")]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    with loaded(experiment(tiny_model)) as there:
        yield there


def bare_generate(model: Path, requests: list[TokenRequest], **options: Any) -> list[tuple[int, ...]]:
    """What `generate` makes of each request alone, called as its manual says."""
    import torch
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for request in requests:
        ids = torch.tensor([request.token_ids])
        generated = bare.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_output_tokens,
            **{"do_sample": False, "pad_token_id": 0, **options},
        )
        found.append(tuple(generated[0, ids.shape[1] :].tolist()))
    return found


def end_after(engine: Engine, place: int) -> int:
    """A token that the first prompt's greedy output has at this place and not before."""
    output = outputs(engine, prompts())[0]
    assert output[place] not in output[:place]
    return output[place]


# Tokens


def test_greedy_tokens_are_those_of_bare_generate(engine: Engine, tiny_model: Path) -> None:
    engine.configure(experiment(tiny_model))
    assert outputs(engine, prompts()) == bare_generate(tiny_model, prompts())


@pytest.mark.parametrize("strategy", ["static", "sorted_static", "dynamic", "sorted_dynamic"])
def test_a_batch_of_different_lengths_gives_the_tokens_of_each_alone(
    engine: Engine, tiny_model: Path, strategy: str
) -> None:
    engine.configure(experiment(tiny_model))
    alone = outputs(engine, prompts())
    budget = 100 if strategy.endswith("dynamic") else None
    batches = {"batch_size": 4, "batching_strategy": strategy, "max_tokens_per_batch": budget}
    engine.configure(experiment(tiny_model, pytorch=batches))
    told: list[int] = []
    found = engine.generate(prompts(), observe_tokens=False, on_progress=told.append)
    assert [item.output_ids for item in sorted(found, key=lambda item: item.index)] == alone
    assert (told == sorted(set(told)), told[-1]) == (True, len(LENGTHS))


def test_the_id_that_padding_has_counts_where_a_prompt_holds_it(engine: Engine, tiny_model: Path) -> None:
    # Without a mask of its own `generate` takes every such id for padding.
    requests = [TokenRequest(0, (0, 7, 0, 0, 9), 16), TokenRequest(1, (8, 0), 16)]
    engine.configure(experiment(tiny_model))
    alone = outputs(engine, requests)
    engine.configure(experiment(tiny_model, pytorch={"batch_size": 2}))
    assert outputs(engine, requests) == alone
    assert alone[0] != outputs(engine, [TokenRequest(0, (0, 7, 9), 16)])[0]


def test_padding_is_counted_beside_the_input(engine: Engine, tiny_model: Path) -> None:
    engine.configure(experiment(tiny_model, pytorch={"batch_size": len(LENGTHS)}))
    padding = [completion.padding_tok for completion in answers(engine, prompts())]
    assert padding == [max(LENGTHS) - length for length in LENGTHS]
    engine.configure(experiment(tiny_model))
    assert {completion.padding_tok for completion in answers(engine, prompts())} == {0}


def test_output_ends_with_its_end_and_what_fills_the_row_up_is_not_counted(
    engine: Engine, tiny_model: Path, tmp_path: Path
) -> None:
    end = end_after(engine, 5)
    model = copy_model(tiny_model, tmp_path / "model", eos_token_id=[end, 2])
    with loaded(experiment(model, pytorch={"batch_size": len(LENGTHS)})) as ending:
        found = outputs(ending, prompts())
        assert configured(ending, experiment(model)).effective["eos_token_ids"] == [end, 2]
    assert found[0] == outputs(engine, prompts())[0][:6]
    assert found[0][-1] == end
    assert all(end not in output[:-1] for output in found)
    assert max(len(output) for output in found) == 16  # the others went on meanwhile


def test_an_end_does_not_end_before_the_least_length_nor_where_it_is_ignored(
    engine: Engine, tiny_model: Path, tmp_path: Path
) -> None:
    whole = outputs(engine, prompts())
    model = copy_model(tiny_model, tmp_path / "model", eos_token_id=end_after(engine, 3))
    with loaded(experiment(model)) as there:
        assert len(outputs(there, prompts(minimum=0))[0]) == 4
        assert len(outputs(there, prompts(minimum=10))[0]) >= 10
        there.configure(experiment(model, pytorch={"batch_size": len(LENGTHS)}, ignore_eos=True))
        assert outputs(there, prompts()) == whole


def test_rows_of_a_batch_keep_bounds_of_their_own(engine: Engine, tiny_model: Path, tmp_path: Path) -> None:
    whole = outputs(engine, prompts())
    end = end_after(engine, 3)
    model = copy_model(tiny_model, tmp_path / "model", eos_token_id=end)
    first = prompts()[0]
    requests = [
        TokenRequest(0, first.token_ids, 16),
        TokenRequest(1, first.token_ids, 2),
        TokenRequest(2, first.token_ids, 16, 16),
        TokenRequest(3, first.token_ids[:4], 9, 9),
    ]
    with loaded(experiment(model, pytorch={"batch_size": 4})) as there:
        batched = outputs(there, requests)
        there.configure(experiment(model))
        assert outputs(there, requests) == batched
    assert batched[0] == whole[0][:4]
    assert batched[1] == whole[0][:2]
    assert [len(output) for output in batched] == [4, 2, 16, 9]
    assert end not in batched[2]


def test_a_batch_is_done_when_every_row_is_at_its_own_end(engine: Engine, tiny_model: Path, tmp_path: Path) -> None:
    model = copy_model(tiny_model, tmp_path / "model", eos_token_id=end_after(engine, 3))
    # The row that may have 16 tokens ends after 4 and the other after 2: there is no fifth step.
    requests = [prompts()[0], TokenRequest(1, prompts()[1].token_ids, 2)]
    with loaded(experiment(model, pytorch={"batch_size": 2})) as there:
        assert [len(row) for row in there._runner._generate(requests, None)] == [4, 4]


def test_a_request_beyond_the_positions_of_the_model_fails_alone(engine: Engine, tiny_model: Path) -> None:
    engine.configure(experiment(tiny_model, pytorch={"batch_size": 3}))
    requests = [*prompts((5, 6)), TokenRequest(2, tuple([5] * 500), 16)]
    by_index = {item.index: item for item in engine.generate(requests, observe_tokens=False)}
    assert by_index[0].error is by_index[1].error is None
    assert "512 positions" in (by_index[2].error or "")
    assert by_index[2].output_ids == ()


def test_an_engine_that_fails_on_a_batch_fails_in_words(engine: Engine, tiny_model: Path) -> None:
    engine.configure(experiment(tiny_model))
    with pytest.raises(EngineError, match="generate failed: IndexError"):
        engine.generate([TokenRequest(0, (5, 1000), 4)], observe_tokens=False)  # ids of this model end at 999
    assert len(outputs(engine, prompts())) == len(LENGTHS)


def test_text_becomes_ids_and_ids_text(engine: Engine) -> None:
    ids = engine.encode("The harbour at first light")
    assert ids[0] == 1  # begin of sequence, as this tokenizer wants it
    assert engine.decode(ids) == "The harbour at first light"
    assert len(engine.encode("harbour " * 900)) > 512  # longer than the model, and not cut
    assert engine.decode([*engine.encode("Heat."), 2, 0, 0]) == "Heat."


# What a model brings along


def test_the_models_own_generation_config_changes_nothing_and_is_recorded(
    engine: Engine, tiny_model: Path, tmp_path: Path
) -> None:
    own = {"do_sample": True, "temperature": 0.1, "max_length": 7, "num_beams": 3, "repetition_penalty": 9.0}
    model = copy_model(tiny_model, tmp_path / "model", **own, suppress_tokens=[5, 6], no_repeat_ngram_size=2)
    with loaded(experiment(model)) as there:
        effective = there.report.effective
        assert outputs(there, prompts()) == outputs(engine, prompts())
    assert effective["generation_left_out"] == {**own, "suppress_tokens": [5, 6], "no_repeat_ngram_size": 2}
    assert effective["generation"]["num_beams"] == 1
    assert "suppress_tokens" not in effective["generation"]


def test_transformers_warns_about_nothing(
    tiny_model: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    # A warning that was given once in this process would be swallowed.
    for name in ("warning_once", "warning_advice"):
        clear = getattr(getattr(logging.Logger, name, None), "cache_clear", None)
        if clear is not None:
            clear()
    logging.getLogger("transformers").addHandler(caplog.handler)  # its loggers do not propagate
    try:
        with loaded(experiment(tiny_model, pytorch={"batch_size": 3})) as there:
            answers(there, prompts())
            answers(there, prompts((3,), minimum=4), observe_tokens=True)
            there.configure(experiment(tiny_model, decoder=SAMPLING, ignore_eos=True))
            answers(there, prompts(minimum=16))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("transformers")] == []
    assert [str(warning.message) for warning in recwarn if "transformers" in warning.filename] == []


# Seeds


def test_equal_seeds_draw_equal_tokens_whatever_ran_before(engine: Engine, tiny_model: Path) -> None:
    config = experiment(tiny_model, decoder=SAMPLING, random_seed=7, pytorch={"batch_size": 2})
    engine.configure(config)
    first = outputs(engine, prompts())
    outputs(engine, prompts((4, 4)))
    assert outputs(engine, prompts()) == first
    with loaded(config) as again:
        assert outputs(again, prompts()) == first
    engine.configure(experiment(tiny_model, decoder=SAMPLING, random_seed=8, pytorch={"batch_size": 2}))
    assert outputs(engine, prompts()) != first
    # Requests that are run one by one do not all draw the same.
    same = [TokenRequest(index, prompts()[0].token_ids, 16) for index in range(2)]
    assert outputs(engine, same[:1]) != outputs(engine, same[1:])


def test_without_a_seed_each_run_draws_its_own(engine: Engine, tiny_model: Path) -> None:
    unseeded = experiment(tiny_model, decoder=SAMPLING, random_seed=None)
    found = []
    for _ in range(2):
        # The process starts where every process of PyTorch starts.
        import torch

        torch.manual_seed(0)
        engine.configure(unseeded)
        found.append(outputs(engine, prompts()))
    assert found[0] != found[1]


# Times


def test_every_token_of_a_request_alone_has_its_time(engine: Engine, tiny_model: Path) -> None:
    engine.configure(experiment(tiny_model, pytorch={"batch_size": 4}))
    completions = answers(engine, prompts(), observe_tokens=True)
    for completion in completions:
        times = completion.token_times_ns
        assert times is not None
        assert len(times) == len(completion.output_ids) == 16
        assert list(times) == sorted(set(times))  # each later than the one before
        assert completion.started_ns < times[0]
        assert completion.finished_ns == times[-1]
        assert completion.padding_tok == 0
    ordered = sorted(completions, key=lambda completion: completion.started_ns)
    assert all(one.finished_ns <= other.started_ns for one, other in itertools.pairwise(ordered))
    unobserved = answers(engine, prompts())
    assert {completion.token_times_ns for completion in unobserved} == {None}
    assert [item.output_ids for item in unobserved] == [item.output_ids for item in completions]


def test_tokens_of_one_assisted_step_are_one_chunk(tiny_model: Path) -> None:
    """A model that drafts for itself has all drafts accepted: each step brings three of them and a token of its own."""
    config = experiment(tiny_model, pytorch={"assisted_generation": {"model": str(tiny_model), "num_tokens": 3}})
    with loaded(config) as engine:
        window = measure_batch(
            engine, prompts(), min_window_s=0.0, observe_tokens=True, clock=Clock(), report=lambda _: None
        )
    assert {tuple(tok for _, tok in item.chunks) for item in window.completed} == {(4, 4, 4, 4)}
    found = describe_work(window, config)
    assert found.latency.icl_s is not None
    assert found.latency.icl_s.n == 3 * len(window.completed)
    assert found.latency.icl_s.p50 > 0
    assert (found.throughput.tok_per_step, found.throughput.draft_accepted_ratio) == (4.0, 1.0)


# Traffic


def test_a_queue_is_worked_off_in_batches_of_what_has_arrived(engine: Engine, tiny_model: Path) -> None:
    engine.configure(experiment(tiny_model, pytorch={"batch_size": 3}))
    requests = prompts((9, 3, 14, 1, 6))
    queue = Arrivals(requests[:4], requests[4:])
    engine.serve(queue)
    assert queue.taken == [3, 1, 1]
    assert [completion.output_ids for completion in sorted(queue.completions, key=lambda item: item.index)] == outputs(
        engine, requests
    )


def test_rows_that_run_together_have_their_times_together(engine: Engine, tiny_model: Path) -> None:
    engine.configure(experiment(tiny_model, pytorch={"batch_size": 3}))
    long, short = served(engine, [prompts()[0], TokenRequest(1, prompts()[1].token_ids, 4)])
    assert long.token_times_ns is not None
    assert len(long.token_times_ns) == 16
    assert short.token_times_ns == long.token_times_ns[:4]
    assert short.finished_ns == long.token_times_ns[3]  # not when the batch was done


# What is reported


def test_the_report_says_what_was_loaded(tiny_model: Path) -> None:
    import torch
    import transformers

    with loaded(experiment(tiny_model)) as there:
        report = there.report
    assert (report.engine_name, report.engine_version) == ("transformers", transformers.__version__)
    assert (report.versions["torch"], report.device, report.gpu_uuids) == (torch.__version__, "cpu", ())
    # Llama: embeddings in and out, per layer attention (q, k, v, o), three matrices and two norms, one norm at the end.
    hidden, intermediate, vocabulary, key_value = 64, 128, 1000, 32
    layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * intermediate + 2 * hidden
    assert report.embedding_parameters == 2 * vocabulary * hidden
    assert report.model_parameters == report.embedding_parameters + 2 * layer + hidden
    assert (report.model_revision, report.compile_s, report.warnings) == (None, None, ())
    assert report.weights_sha256 is not None
    assert report.checks_s > 0
    json.dumps(report.effective, allow_nan=False)


def test_the_effective_options_have_the_shape_of_the_requested_ones(engine: Engine, tiny_model: Path) -> None:
    config = experiment(tiny_model, pytorch={"batch_size": 2})
    effective = configured(engine, config).effective
    assert effective["pytorch"].keys() == config.section.to_dict().keys()
    assert effective["decoder"].keys() <= config.decoder.to_dict().keys()
    assert effective["pytorch"]["batch_size"] == 2
    assert effective["pytorch"]["attn_implementation"] == "sdpa"  # the engine's own default
    assert effective["pytorch"]["cache_implementation"] == "dynamic"
    assert effective["fp_precision"] == "float32"
    assert effective["generation"]["max_new_tokens"] == 16


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_weights_have_the_precision_asked_for(tiny_model: Path, precision: str) -> None:
    with loaded(experiment(tiny_model, fp_precision=precision)) as there:
        assert there.report.effective["fp_precision"] == precision
        assert len(outputs(there, prompts())[0]) == 16
        there.reset_peak_memory()
        there.synchronize()
        assert there.peak_memory_b() is None  # on the CPU


# Life


def test_unloading_frees_the_model(tiny_model: Path) -> None:
    engine: Any = load(experiment(tiny_model), {})
    model = weakref.ref(engine._loaded.model)
    answers(engine, prompts())
    engine.close()
    assert model() is None


def test_a_load_that_fails_late_leaves_nothing_behind(tiny_model: Path) -> None:
    from transformers import LlamaForCausalLM

    gc.collect()
    before = sum(type(item) is LlamaForCausalLM for item in gc.get_objects())
    # The quantized cache needs a package that is not here, which shows when the model is there already.
    with pytest.raises(OptionRefused) as caught:
        load(experiment(tiny_model, pytorch={"cache_implementation": "quantized"}), {})
    assert "cache_implementation: quantized" in caught.value.message
    assert sum(type(item) is LlamaForCausalLM for item in gc.get_objects()) == before


def test_a_cache_that_does_not_fit_is_out_of_memory_at_load(tiny_model: Path) -> None:
    options = {"cache_implementation": "static", "extra": {"max_cache_len": 10**12}}
    with pytest.raises(EngineError, match="out of memory") as caught:
        load(experiment(tiny_model, pytorch=options), {})
    assert caught.value.kind == "out_of_memory"
    assert caught.value.is_permanent


def test_an_experiment_after_refused_ones_runs(engine: Engine, tiny_model: Path) -> None:
    with pytest.raises(EngineError, match="a different engine load"):
        engine.configure(experiment(tiny_model, fp_precision="bfloat16"))
    with pytest.raises(OptionRefused):
        engine.configure(experiment(tiny_model, pytorch={"extra": {"zebra": 1}}))
    engine.configure(experiment(tiny_model))
    assert len(outputs(engine, prompts())) == len(LENGTHS)


def test_a_static_cache_is_as_long_as_its_own_experiment_needs(tiny_model: Path) -> None:
    long = experiment(tiny_model, pytorch={"cache_implementation": "static", "extra": {"max_cache_len": 400}})
    short = experiment(tiny_model, pytorch={"cache_implementation": "static"})
    with loaded(long) as there:
        model = there._loaded.model
        answers(there, prompts())
        assert model._previous_max_cache_length == 400
        there.configure(short)
        answers(there, prompts())
        assert model._previous_max_cache_length < 40


def test_the_engine_is_not_imported_before_a_load() -> None:
    code = (
        "import sys\n"
        "from lem.engines.pytorch import load\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# On a GPU


@pytest.mark.needs("cuda")
def test_a_gpu_is_used_named_and_measured(tiny_model: Path) -> None:
    import torch

    there = load(experiment(tiny_model, gpus=None), {})
    report = there.report
    assert report.device == "cuda"
    assert report.gpu_uuids[0].startswith("GPU-")
    there.reset_peak_memory()
    there.generate(prompts(), observe_tokens=False)
    there.synchronize()
    peak_b = there.peak_memory_b()
    assert peak_b is not None
    assert peak_b > 4 * (report.model_parameters or 0)
    there.close()
    # The weights are gone; what cuBLAS works in stays.
    assert torch.cuda.memory_allocated() < 2**26
    with loaded(experiment(tiny_model, gpus=list(report.gpu_uuids))) as again:
        assert again.report.gpu_uuids == report.gpu_uuids


@pytest.mark.needs("cuda")
def test_a_gpu_gives_the_tokens_of_the_cpu(engine: Engine, tiny_model: Path) -> None:
    engine.configure(experiment(tiny_model))
    with loaded(experiment(tiny_model, gpus=["0"], pytorch={"batch_size": 3})) as there:
        assert outputs(there, prompts()) == outputs(engine, prompts())
