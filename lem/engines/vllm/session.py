"""An engine in memory and the experiments that run on it, one after another. Imports vLLM."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from lem.base.errors import EngineError, OptionRefused
from lem.base.variables import TOKEN_VARIABLE
from lem.config.experiment import ExperimentConfig
from lem.engines.checkpoints import identify
from lem.engines.common import TRIAL_TOKENS, EngineRaised, ServedSession, check_ids, check_same_engine, seconds_since
from lem.engines.protocol import Completion, EngineReport, OnProgress, RequestQueue, TokenRequest, say_nothing
from lem.engines.vllm.loading import (
    ENGINE_ERRORS,
    REQUEST_ERRORS,
    LoadedEngine,
    can_rewind,
    close_engine,
    compile_seconds,
    find_facts,
    find_versions,
    load_engine,
    visible_devices,
)
from lem.engines.vllm.options import (
    EngineFacts,
    describe_effective,
    idle_options,
    refuse_seeds,
    sampling_settings,
    section_of,
    seed_of,
)
from lem.engines.vllm.refusals import (
    OPTION_OF_PARAMETER,
    check_options,
    explain_load_failure,
    explain_request_failure,
    explain_run_failure,
)
from lem.engines.vllm.stepping import StepLoop

try:
    from vllm.inputs import tokens_input
except ImportError:  # older versions take what a person would write
    tokens_input = None


class Session(ServedSession):
    """A loaded engine with the experiment that is set up on it."""

    def __init__(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> None:
        """Load.

        Raises:
            OptionRefused, EngineError: as for `Engine`.
        """
        self._facts = find_facts()
        check_options(config, self._facts)
        check_sampling(config, self._facts)
        self._engine_key = config.engine_key()
        with visible_devices(config) as uuids:
            self._loaded = load_engine(config, self._facts, secrets.get(TOKEN_VARIABLE) or None)
        self._loaded.uuids = uuids
        began_ns = time.monotonic_ns()
        try:
            self._set_up(config)
            self._identity = identify(self._loaded.source, self._loaded.adapter)
        except BaseException:
            self.close()
            raise
        self._checks_s = seconds_since(began_ns)
        self._compile_s = compile_seconds(self._loaded)

    def configure(self, config: ExperimentConfig) -> None:
        """Set another experiment up on the same engine.

        Raises:
            OptionRefused: as for `Engine`.
        """
        check_same_engine(config, self._engine_key)
        check_options(config, self._facts)
        self._set_up(config)
        # Compiled with the load, for experiments of before as well.
        self._compile_s = None

    @property
    def report(self) -> EngineReport:
        """What is loaded and in effect."""
        loaded, identity = self._loaded, self._identity
        return EngineReport(
            engine_name="vllm",
            engine_version=self._facts.version,
            versions=find_versions(self._facts.device),
            device=self._facts.device,
            gpu_uuids=loaded.uuids,
            effective={
                **describe_effective(self._config, loaded.config, self._sampling, self._facts),
                "multiprocessing": loaded.is_concurrent,
            },
            model_revision=loaded.source.commit,
            weights_sha256=identity.weights_sha256,
            model_parameters=identity.parameters,
            embedding_parameters=identity.embedding_parameters,
            warnings=idle_options(self._config),
            compile_s=self._compile_s,
            checks_s=self._checks_s,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids as the tokenizer makes them, special ones included."""
        known = int(self._loaded.config.model_config.get_vocab_size())
        return check_ids(list(self._tokenizer.encode(text)), known)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special ones left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        """A completion for each request."""
        run = self._loop.run_alone if observe_tokens else self._loop.run_closed
        self._begin()
        with self._explained():
            return run(requests, on_progress)

    def serve(self, queue: RequestQueue) -> None:
        """Work the queue off; requests join the running batch as they arrive."""
        self._begin()
        with self._explained():
            self._loop.serve(queue, is_salted=self._is_forgetful)

    def close(self) -> None:
        """End the engine and its processes."""
        close_engine(self._loaded)

    @property
    def _tokenizer(self) -> Any:
        return self._loaded.engine.get_tokenizer()

    @property
    def _is_forgetful(self) -> bool:
        """Whether a prompt that comes again must be computed again.

        The set of prompts is repeated until a window is long enough. Served from the prefix cache the repeats would
        measure something else, unless the experiment asks for just that.
        """
        is_caching = bool(self._loaded.config.cache_config.enable_prefix_caching)
        return is_caching and section_of(self._config).enable_prefix_caching is not True

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raises what a failure of the engine means."""
        try:
            yield
        except EngineRaised as raised:
            raise self._run_failure(raised.error) from raised

    def _run_failure(self, error: BaseException) -> EngineError:
        return explain_run_failure(error, self._loaded.output.text, self._facts)

    def _begin(self) -> None:
        """Forget earlier prompts, where those that come again must be computed again.

        Raises:
            EngineError: the engine is gone, or failed.
        """
        if self._loaded.gone.is_set():
            raise EngineError(f"{self._facts}: the engine's process has ended, see the log")
        if not self._is_forgetful:
            return
        try:
            is_reset = self._loaded.engine.reset_prefix_cache()
        except ENGINE_ERRORS as error:
            raise self._run_failure(error) from error
        if is_reset is False:
            raise EngineError("vLLM could not empty its prefix cache, though it has no requests")

    def _set_up(self, config: ExperimentConfig) -> None:
        self._config = config
        forms = _Forms(config, self._loaded)
        self._sampling = check_sampling(config, self._facts)
        refuse_seeds(config, self._loaded.config, self._facts, can_rewind=can_rewind(self._facts.device))
        self._loop = StepLoop(self._loaded.engine, forms, answers=self._loaded.answers)
        if self._loaded.config.cache_config.enable_prefix_caching:
            # Not even what is measured with a cache starts with that of another experiment.
            self._loaded.engine.reset_prefix_cache()
        self._try_out(forms.longest)

    def _try_out(self, longest: int) -> None:
        """A few tokens for one request: what vLLM has against an option it says to a request.

        Raises:
            OptionRefused: it takes no request under these options.
            EngineError: the engine failed.
        """
        output_tok = min(TRIAL_TOKENS, longest - 1)
        if output_tok < 1:
            raise OptionRefused(f"vllm.max_model_len: {longest} leaves no room for prompt and output")
        try:
            (tried,) = self._loop.run_closed((TokenRequest(0, (1,), output_tok, output_tok),), say_nothing)
        except EngineRaised as raised:
            output = self._loaded.output.text
            raise explain_load_failure(raised.error, output, self._config, self._facts) from raised
        if tried.error is not None:
            raise explain_request_failure(tried.error, self._config, self._facts)


class _Forms:
    """Requests of one experiment in vLLM's own types."""

    rejections = REQUEST_ERRORS
    failures = ENGINE_ERRORS

    def __init__(self, config: ExperimentConfig, loaded: LoadedEngine) -> None:
        self._config = config
        self._settings = sampling_settings(config)
        self._made: dict[tuple[int, int, bool], SamplingParams] = {}
        self.longest = int(loaded.config.model_config.max_model_len)
        adapter = loaded.adapter
        self.adapter = None if adapter is None else LoRARequest("adapter", 1, str(adapter.folder))

    def prompt(self, token_ids: Sequence[int], salt: str | None) -> Any:
        """A prompt of ids."""
        if tokens_input is not None:
            return tokens_input(list(token_ids), cache_salt=salt)
        prompt = TokensPrompt(prompt_token_ids=list(token_ids))
        if salt is not None:
            prompt["cache_salt"] = salt
        return prompt

    def parameters(self, request: TokenRequest, *, is_observed: bool) -> SamplingParams:
        """Made once for all requests that share them, since vLLM copies them; a seed is a request's own."""
        seed = seed_of(self._config, request.index)
        if seed is not None:
            return self._make(request, seed, is_observed)
        key = (request.max_output_tokens, request.min_output_tokens, is_observed)
        if key not in self._made:
            self._made[key] = self._make(request, None, is_observed)
        return self._made[key]

    def _make(self, request: TokenRequest, seed: int | None, is_observed: bool) -> SamplingParams:
        return SamplingParams(
            **self._settings,
            max_tokens=request.max_output_tokens,
            min_tokens=request.min_output_tokens,
            seed=seed,
            output_kind=RequestOutputKind.DELTA if is_observed else RequestOutputKind.FINAL_ONLY,
        )


def check_sampling(config: ExperimentConfig, facts: EngineFacts) -> dict[str, Any]:
    """The fields of SamplingParams in effect.

    Raises:
        OptionRefused: vLLM does not take a value, or puts another in its place.
    """
    settings = sampling_settings(config)
    try:
        made = SamplingParams(**settings)
    except REQUEST_ERRORS as error:
        raise explain_request_failure(str(error), config, facts) from error
    for name, wanted in settings.items():
        found = getattr(made, name)
        is_all_tokens = name == "top_k" and {wanted, found} <= {-1, 0}
        if found != wanted and not is_all_tokens:
            raise OptionRefused(
                f"{facts} changed what was asked for: {OPTION_OF_PARAMETER.get(name, name)}: {wanted} became {found}"
            )
    names = (*settings, "top_k", "top_p", "min_p", "logit_bias", "presence_penalty", "frequency_penalty")
    return {name: getattr(made, name) for name in dict.fromkeys(names)}
