"""Every option of the pytorch section does something that can be seen, or is refused.

A test names its options with `option`; the last test fails for an option without one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.base.errors import OptionRefused
from lem.config.backends import PyTorchConfig
from lem.config.kinds import ConfigProblems
from lem.config.option import walk
from lem.engines.protocol import Engine, EngineReport, TokenRequest
from lem.engines.pytorch import load
from tests.integration.engine_answers import (
    SAMPLING,
    answers,
    configured,
    copy_model,
    experiment,
    loaded,
    outputs,
    prompts,
)

pytestmark = [pytest.mark.needs("torch"), pytest.mark.needs("transformers")]


class Bench:
    """A loaded model on which sections are tried, with what the options' defaults give."""

    def __init__(self, engine: Engine, model: Path, scratch: Path) -> None:
        self.engine = engine
        self.model = model
        self.scratch = scratch

    def set_up(self, section: dict[str, Any], **options: Any) -> EngineReport:
        """Configure without a reload."""
        return configured(self.engine, experiment(self.model, pytorch=section, **options))

    def outputs(self, section: dict[str, Any], **options: Any) -> list[tuple[int, ...]]:
        """What is generated under a section."""
        self.set_up(section, **options)
        return outputs(self.engine, prompts())

    def starts(self, section: dict[str, Any]) -> list[int]:
        """How many requests ran together, batch by batch."""
        self.set_up(section)
        starts = [completion.started_ns for completion in answers(self.engine, prompts())]
        return [starts.count(start) for start in sorted(set(starts))]

    def refusal(self, section: dict[str, Any], **options: Any) -> str:
        """Why a load under a section is refused; it names the version."""
        with pytest.raises(OptionRefused) as caught:
            load(experiment(self.model, pytorch=section, **options), {})
        assert "transformers 5." in caught.value.message or "transformers 4." in caught.value.message
        return caught.value.message

    def complaint(self, section: dict[str, Any], **options: Any) -> str:
        """Why a section is no configuration at all."""
        with pytest.raises(ConfigProblems) as caught:
            experiment(self.model, pytorch=section, **options)
        return str(caught.value)


Test = Callable[[Bench], None]
CHECKED: set[str] = set()
# See tests/unit/engines/test_refusals.py and tests/unit/config/test_experiment.py.
REFUSED = {
    *("parallelism_strategy", "parallelism_degree", "max_memory", "load_in_4bit", "load_in_8bit"),
    *("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
}


def option(*names: str) -> Callable[[Test], Test]:
    """Marks a test of these options."""
    CHECKED.update(names)
    return lambda test: test


@pytest.fixture(scope="module")
def module_engine(tiny_model: Path) -> Iterator[Engine]:
    with loaded(experiment(tiny_model)) as there:
        yield there


@pytest.fixture
def bench(module_engine: Engine, tiny_model: Path, tmp_path: Path) -> Bench:
    return Bench(module_engine, tiny_model, tmp_path)


@option("batch_size")
def test_batch_size_puts_requests_together(bench: Bench) -> None:
    assert bench.starts({}) == [1, 1, 1, 1, 1]
    assert bench.starts({"batch_size": 2}) == [2, 2, 1]


@option("batching_strategy")
def test_batching_strategy_changes_what_runs_together(bench: Bench) -> None:
    padding = {}
    for strategy in ("static", "sorted_static"):
        bench.set_up({"batch_size": 2, "batching_strategy": strategy})
        padding[strategy] = sum(item.padding_tok or 0 for item in answers(bench.engine, prompts()))
    # Lengths 9 3 | 14 1 | 6 against 14 9 | 6 3 | 1.
    assert padding == {"static": 6 + 13, "sorted_static": 5 + 3}
    budget = {"batch_size": 5, "max_tokens_per_batch": 60}
    # Prompt and output of up to 25, 25, 30, 30, 22 positions: two rows of the longest fit.
    assert bench.starts({"batching_strategy": "dynamic", **budget}) == [2, 2, 1]
    # Longest first: 30, 25 | 22, 19 | 17 … three rows of 20 would be 60 as well.
    assert sum(bench.starts({"batching_strategy": "sorted_dynamic", **budget})) == 5


@option("max_tokens_per_batch")
def test_max_tokens_per_batch_holds(bench: Bench) -> None:
    options = {"batch_size": 5, "batching_strategy": "dynamic"}
    assert bench.starts({**options, "max_tokens_per_batch": 5 * 30}) == [5]
    assert bench.starts({**options, "max_tokens_per_batch": 5 * 30 - 1}) == [4, 1]


@option("attn_implementation")
def test_attn_implementation_is_what_the_model_uses(bench: Bench) -> None:
    for name in ("eager", "sdpa"):
        config = experiment(bench.model, pytorch={"attn_implementation": name})
        with loaded(config) as there:
            assert there._loaded.model.config._attn_implementation == name
            assert there.report.effective["pytorch"]["attn_implementation"] == name
    assert "pytorch.attn_implementation" in bench.refusal({"attn_implementation": "flash_attention_2"})


@option("torch_compile")
def test_torch_compile_compiles(bench: Bench) -> None:
    from torch._dynamo.utils import counters

    expected = bench.outputs({"batch_size": 2})
    config = experiment(
        bench.model, pytorch={"torch_compile": "default", "torch_compile_backend": "aot_eager", "batch_size": 2}
    )
    counters.clear()
    with loaded(config) as there:
        compiled = counters["stats"]["unique_graphs"]
        assert compiled > 0
        assert outputs(there, prompts()) == expected
        # The next experiment on the same load compiles for itself.
        report = configured(there, config)
        assert counters["stats"]["unique_graphs"] > compiled
        assert report.compile_s is not None
        assert report.compile_s > 0
        assert report.effective["pytorch"]["torch_compile"] == "default"


@option("torch_compile_backend")
def test_torch_compile_backend_is_the_one_asked(bench: Bench) -> None:
    config = experiment(bench.model, pytorch={"torch_compile": "default", "torch_compile_backend": "eager"})
    with loaded(config) as there:
        assert there.report.effective["pytorch"]["torch_compile_backend"] == "eager"
    assert "no effect without torch_compile" in bench.complaint({"torch_compile_backend": "eager"})


@option("use_cache")
def test_use_cache_switches_the_cache(bench: Bench) -> None:
    with_cache, without = bench.set_up({}), bench.set_up({"use_cache": False})
    assert (with_cache.effective["pytorch"]["use_cache"], without.effective["pytorch"]["use_cache"]) == (True, False)
    assert without.effective["pytorch"]["cache_implementation"] is None
    assert bench.outputs({"use_cache": False}) == bench.outputs({"use_cache": True})


@option("cache_implementation")
def test_cache_implementation_is_the_cache_in_use(bench: Bench) -> None:
    assert bench.set_up({}).effective["pytorch"]["cache_implementation"] == "dynamic"
    assert bench.set_up({"cache_implementation": "static"}).effective["pytorch"]["cache_implementation"] == "static"
    assert bench.outputs({"cache_implementation": "static", "batch_size": 3}) == bench.outputs({})
    assert "expected one of dynamic" in bench.refusal({"cache_implementation": "sliding_window"})


@option("low_cpu_mem_usage")
def test_low_cpu_mem_usage_is_how_weights_load(bench: Bench) -> None:
    config = experiment(bench.model, pytorch={"low_cpu_mem_usage": True})
    with loaded(config) as there:
        assert there.report.effective["pytorch"]["low_cpu_mem_usage"] is True
    assert "pytorch.low_cpu_mem_usage" in bench.refusal({"low_cpu_mem_usage": False})


@option("min_p")
def test_min_p_drops_the_unlikely(bench: Bench) -> None:
    # No token but the likeliest is as likely as the likeliest.
    assert bench.outputs({"min_p": 1.0}, decoder=SAMPLING) == bench.outputs({})
    assert bench.outputs({}, decoder=SAMPLING) != bench.outputs({})
    assert bench.set_up({"min_p": 0.5}).warnings[0].code == "min_p_unused"


@option("no_repeat_ngram_size")
def test_no_repeat_ngram_size_forbids_repeats(bench: Bench) -> None:
    # Token 5 is all but certain after itself.
    request = [TokenRequest(0, (5, 5, 5, 5), 16)]
    bench.set_up({"no_repeat_ngram_size": 1})
    output = outputs(bench.engine, request)[0]
    assert len(set(output)) == len(output)
    assert 5 not in output
    likeliest = bench.outputs({})[0]
    assert bench.outputs({"extra": {"sequence_bias": [[[likeliest[0]], 50.0]]}})[0].count(likeliest[0]) > 1
    biased = {"extra": {"sequence_bias": [[[likeliest[0]], 50.0]]}, "no_repeat_ngram_size": 1}
    assert bench.outputs(biased)[0].count(likeliest[0]) == 1


@option("beam_search.enabled", "beam_search.num_beams")
def test_beams_find_other_sequences(bench: Bench) -> None:
    beams = {"beam_search": {"enabled": True, "num_beams": 4}}
    report = bench.set_up(beams)
    assert report.effective["pytorch"]["beam_search"]["num_beams"] == 4
    assert bench.outputs(beams) != bench.outputs({})
    assert "conflicts with streaming" in bench.complaint(beams, streaming=True)


@option("beam_search.length_penalty", "beam_search.early_stopping")
def test_beam_settings_change_which_beam_wins(bench: Bench) -> None:
    """Ends that are likely make beams of different lengths, between which the settings decide."""
    likely_ends = list(range(3, 120))
    model = copy_model(bench.model, bench.scratch / "ending", eos_token_id=likely_ends)
    found = {}
    with loaded(experiment(model)) as there:
        for name, setting in {
            "short": {"length_penalty": -5.0},
            "long": {"length_penalty": 5.0},
            "first": {"length_penalty": 5.0, "early_stopping": True},
        }.items():
            beams = {"enabled": True, "num_beams": 4, **setting}
            there.configure(experiment(model, pytorch={"beam_search": beams}))
            found[name] = [len(output) for output in outputs(there, prompts(range(1, 20)))]
    assert sum(found["short"]) < sum(found["long"])
    assert found["first"] != found["long"]


@option("assisted_generation.model")
def test_an_assistant_drafts_the_tokens_asked_for(bench: Bench) -> None:
    section = {"assisted_generation": {"model": str(bench.model), "num_tokens": 3}}
    expected = bench.outputs({})
    config = experiment(bench.model, pytorch=section)
    with loaded(config) as there:
        completions = answers(there, prompts(), observe_tokens=True)
        effective = there.report.effective["pytorch"]
    assert [completion.output_ids for completion in completions] == expected
    for completion in completions:
        times = completion.token_times_ns
        assert times is not None
        # The model drafts for itself and is always right: three drafted tokens and one of its own a step.
        assert [times.count(moment) for moment in sorted(set(times))] == [4, 4, 4, 4]
    assert effective["assisted_generation"] == {"model": str(bench.model), "num_tokens": 3}


@option("assisted_generation.num_tokens")
def test_tokens_are_looked_up_in_the_prompt_without_an_assistant(bench: Bench) -> None:
    bench.set_up({})
    first = outputs(bench.engine, prompts())[0]
    # What comes next stands in the prompt already, so that a look-up finds it.
    request = [TokenRequest(0, (*prompts()[0].token_ids, *first, *prompts()[0].token_ids), 8)]
    report = bench.set_up({"assisted_generation": {"num_tokens": 4}})
    assert report.effective["generation"]["prompt_lookup_num_tokens"] == 4
    looked_up = answers(bench.engine, request, observe_tokens=True)[0]
    bench.set_up({})
    assert looked_up.output_ids == outputs(bench.engine, request)[0]


@option("extra")
def test_extra_arguments_reach_generate(bench: Bench) -> None:
    likeliest = bench.outputs({})[0][0]
    suppressed = bench.outputs({"extra": {"suppress_tokens": [likeliest]}})
    assert likeliest not in suppressed[0]
    assert "pytorch.extra.zebra" in bench.refusal({"extra": {"zebra": 1}})
    # What transformers itself says would do nothing, and what it cannot take.
    assert "typical_p" in bench.refusal({"extra": {"typical_p": 0.5}})
    assert "extra" in bench.refusal({"extra": {"watermarking_config": 5}})
    assert bench.outputs({"extra": {"typical_p": 0.2}}, decoder=SAMPLING) != bench.outputs({}, decoder=SAMPLING)


@pytest.mark.parametrize("decoder", [{"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_sharpened_to_the_limit_is_greedy(bench: Bench, decoder: dict[str, Any]) -> None:
    assert bench.outputs({}, decoder={**SAMPLING, **decoder}) == bench.outputs({})


def test_top_k_0_looks_at_all_tokens(bench: Bench) -> None:
    effective = bench.set_up({}, decoder=SAMPLING).effective
    assert effective["decoder"] == {"do_sample": True, "repetition_penalty": 1.0, **SAMPLING}
    assert effective["generation"]["top_k"] == 0


@pytest.mark.parametrize(
    ("section", "options"),
    [
        ({}, {"decoder": {"preset": "deterministic", "repetition_penalty": 1.5}}),
        ({"no_repeat_ngram_size": 2}, {}),
        ({"beam_search": {"enabled": True, "num_beams": 4}}, {}),
    ],
)
def test_a_padded_row_has_the_tokens_of_one_alone(bench: Bench, section: Any, options: Any) -> None:
    alone = bench.outputs(section, **options)
    assert alone != bench.outputs({})
    assert bench.outputs({**section, "batch_size": 5}, **options) == alone


@pytest.mark.long
def test_inductor_compiles_where_there_is_a_compiler(bench: Bench) -> None:
    import shutil

    config = experiment(bench.model, pytorch={"torch_compile": "default"})
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        assert "torch_compile: default" in bench.refusal({"torch_compile": "default"})
        return
    expected = bench.outputs({})[0]
    with loaded(config) as there:
        assert outputs(there, prompts()[:1]) == [expected]
        assert there.report.effective["pytorch"]["torch_compile_backend"] == "inductor"


def test_steps_that_transformers_compiles_give_the_tokens_of_the_others(bench: Bench) -> None:
    # As on a GPU under reduce-overhead, whose own mode means nothing on a CPU.
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    from lem.engines.pytorch.generation import BatchRunner, describe_effective

    expected = bench.outputs({"cache_implementation": "static", "batch_size": 2})
    session: Any = bench.engine
    runner = session._runner
    steps = CompileConfig(mode="default", backend="aot_eager")
    steps._compile_all_devices = True
    compiling = BatchRunner(runner.loaded, {**runner.settings, "compile_config": steps})
    counters.clear()
    pairs = [prompts()[first : first + 2] for first in range(0, len(prompts()), 2)]
    found = [completion for pair in pairs for completion in compiling.run(pair, observe=False)]
    assert [completion.output_ids for completion in found] == expected
    assert counters["stats"]["unique_graphs"] > 0
    effective = describe_effective(session._config, runner.loaded, compiling.settings, session._cache)
    assert json.dumps(effective)  # a record keeps it


def test_every_declared_option_is_checked_here_or_refused() -> None:
    assert {key for key, _item, _section in walk(PyTorchConfig)} == CHECKED | REFUSED
