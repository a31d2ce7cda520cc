"""Every option of the vllm section does something that can be seen in a real engine, or is refused.

A test names its options with `option`; the last test fails for an option without one. Tests that need the same engine
stand together, since a load takes seconds; those of engines other than BASE run with `make test-long`.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lem.base.clock import Clock
from lem.base.errors import EngineError, OptionRefused
from lem.config.backends import VllmConfig
from lem.config.option import walk
from lem.engines.protocol import Engine, EngineReport, TokenRequest
from lem.engines.vllm import load
from lem.meters.work import describe_work
from lem.worker.window import measure_batch
from tests.integration.engine_answers import SAMPLING, answers, configured, outputs, prompts, vllm_experiment

pytestmark = [pytest.mark.needs("vllm"), pytest.mark.timeout(600)]

# Small steps and blocks, so that what the engine does shows with short prompts.
BASE = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "block_size": 32}
ASKED = {
    **BASE,
    "max_num_seqs": 2,
    "max_model_len": 90,
    "enable_prefix_caching": True,
    "distributed_backend": "mp",
    "kv_cache_dtype": "fp8",
    "attention": {"backend": "CPU_ATTN"},
}
DIFFERENT = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 96,
    "block_size": 64,
    "enable_prefix_caching": False,
    "enable_chunked_prefill": False,
}
LENGTHS = {"max_input_tokens": 80}
UNSEEDED = {"decoder": SAMPLING, "random_seed": None}
# Longer than two blocks of 32, so that two of them can be found again.
LONG = TokenRequest(0, tuple(range(100, 170)), 1, 1)

Test = Callable[..., None]


class Bench:
    """One engine at a time on which sections are tried."""

    def __init__(self, model: Path, scratch: Path) -> None:
        self.model = model
        self.scratch = scratch
        self._loaded: Engine | None = None
        self._engine_key = ""

    @property
    def engine(self) -> Any:
        assert self._loaded is not None
        return self._loaded

    def set_up(self, section: dict[str, Any], **options: Any) -> EngineReport:
        """Have an engine with a section: the one that is there, or another."""
        config = vllm_experiment(self.model, section, **{**LENGTHS, **options})
        if config.engine_key() == self._engine_key:
            return configured(self.engine, config)
        self.close()
        self._loaded = load(config, {})
        self._engine_key = config.engine_key()
        return self._loaded.report

    def close(self) -> None:
        loaded, self._loaded, self._engine_key = self._loaded, None, ""
        if loaded is not None:
            loaded.close()

    def reload(self, section: dict[str, Any], **options: Any) -> EngineReport:
        """Have an engine of its own, with the environment as it is now."""
        self.close()
        return self.set_up(section, **options)

    def outputs(self, section: dict[str, Any], **options: Any) -> list[tuple[int, ...]]:
        """What is generated under a section."""
        self.set_up(section, **options)
        return outputs(self.engine, prompts())

    def steps(self, *requests: TokenRequest) -> int:
        """How many steps the engine makes for some requests."""
        told: list[int] = []
        self.engine.generate(requests, observe_tokens=False, on_progress=told.append)
        return len(told)

    @functools.cached_property
    def expected(self) -> list[tuple[int, ...]]:
        """What is generated under the base, greedily."""
        return self.outputs(BASE)

    def refusal(self, section: dict[str, Any], *, is_early: bool = True, **options: Any) -> str:
        """Why a load under a section is refused; it names the version.

        Args:
            is_early: before the engine begins to load, so that the one that is there can stay.
        """
        if not is_early:
            self.close()
        with pytest.raises(OptionRefused) as caught:
            load(vllm_experiment(self.model, section, **{**LENGTHS, **options}), {})
        assert "vLLM 0." in caught.value.message
        return caught.value.message


CHECKED: set[str] = set()
# See tests/unit/engines/test_refusals.py.
REFUSED = {"cpu_offload_gb", "disable_custom_all_reduce", "attention.flash_version"}


def option(*names: str, is_long: bool = False) -> Callable[[Test], Test]:
    """Marks a test of these options."""
    CHECKED.update(names)
    return pytest.mark.long if is_long else lambda test: test


@pytest.fixture(scope="module")
def bench(wide_tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # Without a bound vLLM wants most of the memory there is.
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        there = Bench(wide_tiny_model, tmp_path_factory.mktemp("vllm"))
        yield there
        there.close()


# Without a load


@option("swap_space")
def test_gone_with_older_engines(bench: Bench) -> None:
    assert "no swap space" in bench.refusal({"swap_space": 1})


@option("tensor_parallel_size", "pipeline_parallel_size")
def test_several_workers_need_several_nodes(bench: Bench) -> None:
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        assert f"vllm.{name}: 2" in bench.refusal({name: 2}, gpus=None)


@option("quantization")
def test_quantization_is_judged_by_the_engine(bench: Bench) -> None:
    assert "vllm.quantization: awq" in bench.refusal({"quantization": "awq"})
    assert "vllm.quantization: nonsense" in bench.refusal({"quantization": "nonsense"})


@option("attention.disable_sliding_window", is_long=True)
def test_sliding_window_must_be_there(bench: Bench) -> None:
    assert "no sliding window" in bench.refusal({"attention": {"disable_sliding_window": True}}, is_early=False)


# One engine


@option("max_num_batched_tokens")
def test_max_num_batched_tokens_bounds_a_step(bench: Bench) -> None:
    report = bench.set_up(BASE)
    assert report.effective["vllm"]["max_num_batched_tokens"] == 16
    assert bench.steps(LONG) == 5  # 70 tokens, 16 at a time


@option("min_p")
def test_min_p_drops_the_unlikely(bench: Bench) -> None:
    # No token but the likeliest is as likely as the likeliest.
    assert bench.outputs({**BASE, "min_p": 1.0}, **UNSEEDED) == bench.expected
    assert bench.outputs(BASE, **UNSEEDED) != bench.expected
    assert bench.set_up({**BASE, "min_p": 0.5}).warnings[0].code == "min_p_unused"


@option("logprobs", is_long=True)
def test_logprobs_are_asked_of_the_engine(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.set_up({**BASE, "logprobs": 3}).effective["vllm"]["logprobs"] == 3
    seen: list[Any] = []
    engine = bench.engine._engine
    step = engine.step

    def watched() -> Any:
        seen.extend(found := step())
        return found

    monkeypatch.setattr(engine, "step", watched)
    answers(bench.engine, prompts())
    assert {len(place) >= 3 for output in seen for place in output.outputs[0].logprobs} == {True}


@option("logit_bias")
def test_logit_bias_pushes_a_token(bench: Bench) -> None:
    assert {*bench.outputs({**BASE, "logit_bias": {"5": 100}})[0]} == {5}
    assert bench.set_up({**BASE, "logit_bias": {"5": 100}}).effective["vllm"]["logit_bias"] == {"5": 100.0}
    with pytest.raises(OptionRefused, match=r"vllm\.logit_bias: .*out-of-vocab"):
        bench.set_up({**BASE, "logit_bias": {"5000": 1}})


@option("enforce_eager")
def test_eager_is_not_compiled(bench: Bench) -> None:
    effective = bench.set_up(BASE).effective
    assert effective["vllm"]["enforce_eager"] is True
    assert effective["engine"]["compilation_config"]["mode"] == "NONE"


def test_prompts_are_forgotten_between_repeats_otherwise(bench: Bench) -> None:
    report = bench.set_up(BASE)
    assert report.effective["vllm"]["enable_prefix_caching"] is True  # vLLM's own default
    assert [bench.steps(LONG) for _ in range(3)] == [5, 5, 5]


# Another


@option("max_num_seqs", is_long=True)
def test_max_num_seqs_bounds_what_runs_at_once(bench: Bench) -> None:
    def at_once(section: dict[str, Any]) -> int:
        bench.set_up(section)
        spans = [(item.started_ns, item.finished_ns) for item in answers(bench.engine, prompts())]
        return max(sum(start <= moment < end for start, end in spans) for moment, _end in spans)

    assert at_once(ASKED) == 2


@option("max_model_len", is_long=True)
def test_max_model_len_bounds_a_request(bench: Bench) -> None:
    assert bench.set_up(ASKED).effective["vllm"]["max_model_len"] == 90
    requests = [TokenRequest(index, LONG.token_ids, 20 + index) for index in range(2)]
    found = {item.index: item.error for item in bench.engine.generate(requests, observe_tokens=False)}
    assert found[0] is None
    assert "90" in str(found[1])


@option("enable_prefix_caching", is_long=True)
def test_prefix_caching_keeps_what_is_asked_to_be_kept(bench: Bench) -> None:
    bench.set_up(ASKED)
    assert [bench.steps(LONG) for _ in range(2)] == [5, 1]  # two blocks of 32 are found again
    assert [bench.steps(LONG) for _ in range(2)] == [1, 1]


@option("distributed_backend", is_long=True)
def test_distributed_backend_is_what_runs_the_worker(bench: Bench) -> None:
    assert bench.set_up(ASKED).effective["vllm"]["distributed_backend"] == "mp"
    assert any("Worker" in process.name for process in multiprocessing.active_children())
    bench.set_up(BASE)
    assert not any("Worker" in process.name for process in multiprocessing.active_children())
    assert "vllm.distributed_backend: ray" in bench.refusal({"distributed_backend": "ray"})


@option("kv_cache_dtype", "attention.backend", is_long=True)
def test_cache_type_and_attention_are_those_asked_for(bench: Bench) -> None:
    effective = bench.set_up(ASKED).effective["vllm"]
    assert (effective["kv_cache_dtype"], effective["attention"]["backend"]) == ("fp8", "CPU_ATTN")
    assert bench.outputs(ASKED) != bench.expected  # rounding
    assert "vllm.attention.backend" in bench.refusal({"attention": {"backend": "FLASH_ATTN"}})


# A third


@option("enable_chunked_prefill", is_long=True)
def test_chunked_prefill_splits_what_does_not_fit(bench: Bench) -> None:
    def is_split(section: dict[str, Any]) -> bool:
        """Whether the second of two prompts, too long together for one step, starts with the first."""
        bench.set_up(section)
        length = section["max_num_batched_tokens"] * 2 // 3
        first, second = answers(bench.engine, prompts((length, length), maximum=2))
        return first.started_ns == second.started_ns

    assert not is_split(DIFFERENT)
    assert is_split(BASE)


@option("load_format", is_long=True)
def test_load_format_decides_on_the_weights(bench: Bench) -> None:
    assert bench.outputs({**BASE, "load_format": "dummy"}) != bench.expected
    assert "vllm.load_format: zebra" in bench.refusal({"load_format": "zebra"}, is_early=False)


@option("gpu_memory_utilization", is_long=True)
def test_gpu_memory_utilization_is_what_the_engine_has(bench: Bench) -> None:
    with pytest.MonkeyPatch.context() as patch:
        assert "VLLM_CPU_KVCACHE_SPACE sets" in bench.refusal({"gpu_memory_utilization": 0.5})
        patch.delenv("VLLM_CPU_KVCACHE_SPACE")
        report = bench.reload({**BASE, "gpu_memory_utilization": 0.5})
        assert report.effective["vllm"]["gpu_memory_utilization"] == 0.5
        # More than the share is there for is refused by vLLM itself.
        with pytest.raises(EngineError) as caught:
            bench.reload({**BASE, "gpu_memory_utilization": 0.99})
        assert caught.value.kind == "out_of_memory"


@option("block_size", is_long=True)
def test_block_size_is_what_the_engine_has(bench: Bench) -> None:
    effective = bench.set_up(DIFFERENT).effective["vllm"]
    assert (effective["block_size"], effective["enable_prefix_caching"]) == (64, False)
    assert "vllm.block_size: 16" in bench.refusal({"block_size": 16}, is_early=False)


# Engines with partners


@option("speculative.model", "speculative.num_tokens", "speculative.draft_tp_size", is_long=True)
def test_a_drafting_model_drafts_the_tokens_asked_for(bench: Bench) -> None:
    speculative = {"model": str(bench.model), "num_tokens": 3, "method": "draft_model", "draft_tp_size": 1}
    expected = bench.expected
    report = bench.set_up({"speculative": speculative})
    assert {**report.effective["vllm"]["speculative"], **speculative} == report.effective["vllm"]["speculative"]
    found = answers(bench.engine, prompts(), observe_tokens=True)
    assert [completion.output_ids for completion in found] == expected
    # The model drafts for itself and is always right: three drafted tokens and one of its own a step.
    times = found[0].token_times_ns
    assert times is not None
    assert [times.count(moment) for moment in sorted(set(times))] == [1, 4, 4, 4, 3]
    window = measure_batch(
        bench.engine, prompts(), min_window_s=0.0, observe_tokens=True, clock=Clock(), report=lambda _: None
    )
    config = vllm_experiment(bench.model, {"speculative": speculative}, **LENGTHS)
    measured = describe_work(window, config)
    assert (measured.throughput.tok_per_step, measured.throughput.draft_accepted_ratio) == (3.75, 1.0)
    assert measured.latency.icl_s is not None
    assert measured.latency.icl_s.p50 > 0
    assert "vllm.speculative.draft_tp_size: 2" in bench.refusal({"speculative": {**speculative, "draft_tp_size": 2}})


@option("lora.enabled", is_long=True)
def test_an_adapter_changes_what_is_generated(bench: Bench) -> None:
    expected = bench.expected
    adapter = make_adapter(bench.model, bench.scratch / "adapter", rank=16)
    section = {"lora": {"enabled": True, "max_loras": 1, "max_rank": 16}}
    report = bench.set_up(section, model={"name": str(bench.model), "adapter": str(adapter)})
    assert report.effective["vllm"]["lora"] == {"enabled": True, "max_loras": 1, "max_rank": 16}
    assert outputs(bench.engine, prompts()) != expected


@option("lora.max_loras", "lora.max_rank", is_long=True)
def test_room_for_adapters_is_made_as_asked(bench: Bench) -> None:
    expected = bench.expected
    report = bench.set_up({"lora": {"enabled": True, "max_loras": 2, "max_rank": 8}})
    assert report.effective["vllm"]["lora"] == {"enabled": True, "max_loras": 2, "max_rank": 8}
    assert outputs(bench.engine, prompts()) == expected
    adapter = make_adapter(bench.model, bench.scratch / "large", rank=16)
    config = vllm_experiment(
        bench.model,
        {"lora": {"enabled": True, "max_rank": 8}},
        model={"name": str(bench.model), "adapter": str(adapter)},
    )
    bench.close()
    with pytest.raises(EngineError, match="rank"):
        load(config, {})


@option("extra", is_long=True)
def test_extra_arguments_reach_the_engine(bench: Bench) -> None:
    section = {"extra": {"stream_interval": 4}}
    report = bench.set_up(section)
    assert report.effective["engine"]["scheduler_config"]["stream_interval"] == 4
    # Tokens come four at a time, and are counted one by one.
    (found,) = answers(bench.engine, prompts((5,), maximum=10), observe_tokens=True)
    times = found.token_times_ns
    assert times is not None
    assert [times.count(moment) for moment in sorted(set(times))] == [1, 4, 4, 1]
    assert "did you mean 'stream_interval'" in bench.refusal({"extra": {"stream_intervall": 4}})
    assert "True became False" in bench.refusal({"extra": {"async_scheduling": True}}, is_early=False)


@option("speculative.method", "speculative.prompt_lookup_min", "speculative.prompt_lookup_max", is_long=True)
def test_ngrams_are_looked_up_in_the_prompt(bench: Bench) -> None:
    """In a process of its own, as by default: what vLLM compiles to look n-grams up disturbs a later load in this."""
    request = predictable_request(bench)
    expected = outputs(bench.engine, [request])
    speculative = {"method": "ngram", "num_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        report = bench.reload({"speculative": speculative})
    assert report.effective["multiprocessing"] is True
    effective = report.effective["vllm"]["speculative"]
    assert {name: effective[name] for name in speculative} == speculative
    (found,) = answers(bench.engine, [request], observe_tokens=True)
    assert [found.output_ids] == expected
    assert found.token_times_ns is not None
    assert len(set(found.token_times_ns)) < len(found.output_ids)


def predictable_request(bench: Bench) -> TokenRequest:
    """A request whose answer begins with what stands in the prompt behind its last token."""
    bench.set_up(BASE)
    plain = [TokenRequest(index, tuple(100 + index + 13 * place for place in range(6)), 3) for index in range(100)]
    candidates = [
        TokenRequest(request.index, (request.token_ids[-1], *answer, *request.token_ids), 8)
        for request, answer in zip(plain, outputs(bench.engine, plain), strict=True)
    ]
    found = zip(candidates, outputs(bench.engine, candidates), strict=True)
    return next(request for request, answer in found if answer[:2] == request.token_ids[1:3])


def make_adapter(model: Path, folder: Path, *, rank: int) -> Path:
    """A LoRA adapter for the tiny model that changes its answers."""
    import torch
    from safetensors.torch import save_file

    shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    random = torch.Generator().manual_seed(7)
    weights = {}
    for layer in range(shape["num_hidden_layers"]):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{stem}.lora_A.weight"] = torch.randn(rank, hidden, generator=random)
        weights[f"{stem}.lora_B.weight"] = torch.randn(heads, rank, generator=random)
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("decoder", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_sharpened_to_the_limit_is_greedy(bench: Bench, decoder: dict[str, Any]) -> None:
    assert bench.outputs(BASE, random_seed=None, decoder={**SAMPLING, **decoder}) == bench.expected


@pytest.mark.long
def test_a_low_temperature_is_nearly_greedy(bench: Bench) -> None:
    greedy = bench.outputs(DIFFERENT)

    def likeness(temperature: float) -> int:
        sampled = bench.outputs(DIFFERENT, decoder={**SAMPLING, "temperature": temperature})
        return sum(one[0] == other[0] for one, other in zip(sampled, greedy, strict=True))

    assert likeness(0.01) > likeness(2.0)


@pytest.mark.parametrize(
    ("decoder", "told"),
    [
        ({"temperature": 0.005}, "decoder.temperature: 0.005 became 0.01"),
        ({"top_p": 0.0}, "decoder.top_p"),
    ],
)
def test_a_sampling_value_that_vllm_does_not_take_is_refused(bench: Bench, decoder: dict[str, Any], told: str) -> None:
    assert told in bench.refusal(BASE, decoder=decoder)


def test_repetition_is_penalised(bench: Bench) -> None:
    decoder = {"preset": "deterministic", "repetition_penalty": 1.5}
    assert bench.outputs(BASE, decoder=decoder) != bench.expected
    effective = bench.set_up(BASE, decoder=decoder).effective
    assert effective["decoder"]["repetition_penalty"] == 1.5


def test_seeds_are_refused_where_they_would_end_the_engine(bench: Bench) -> None:
    bench.set_up(BASE)
    with pytest.raises(OptionRefused, match=r"random_seed: 42: vLLM .*splits a prompt") as caught:
        bench.set_up(BASE, decoder=SAMPLING)
    assert "null" in caught.value.hint


@pytest.mark.long
def test_a_seed_draws_the_same_again_in_whatever_company(bench: Bench) -> None:
    sampled = bench.outputs(DIFFERENT, decoder=SAMPLING)
    assert bench.outputs(DIFFERENT, decoder=SAMPLING) == sampled
    assert outputs(bench.engine, prompts()[:2]) == sampled[:2]
    assert bench.outputs(DIFFERENT, decoder=SAMPLING, random_seed=43) != sampled
    unseeded = bench.outputs(DIFFERENT, **UNSEEDED)
    assert bench.outputs(DIFFERENT, **UNSEEDED) != unseeded


def test_another_engine_key_needs_a_reload(bench: Bench) -> None:
    bench.set_up(BASE)
    with pytest.raises(EngineError, match="a different engine load"):
        bench.engine.configure(vllm_experiment(bench.model, {**BASE, "max_num_seqs": 3}, **LENGTHS))


def test_every_declared_option_is_checked_here_or_refused() -> None:
    assert {key for key, _item, _section in walk(VllmConfig)} == CHECKED | REFUSED
