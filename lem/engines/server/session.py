"""A served engine: the experiments that run on a server one after another, through the load client."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets as random_source
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lem.base import process
from lem.base.clock import seconds_between
from lem.base.dataclass import asdict
from lem.base.errors import EngineError, OptionRefused, did_you_mean
from lem.base.reasons import Reason
from lem.base.variables import GPU_VARIABLE, SERVICE_VARIABLE
from lem.config import dialects
from lem.config.backends import ServerConfig, flag_name
from lem.config.experiment import ExperimentConfig
from lem.engines import common
from lem.engines.common import section_of
from lem.engines.protocol import (
    Arrival,
    Completion,
    Drive,
    EngineReport,
    Observed,
    OnProgress,
    RequestQueue,
    TokenRequest,
    say_nothing,
)
from lem.engines.server import running, tokens
from lem.engines.server.client import SALT, Call, LoadClient, LoadResult, Target
from lem.engines.server.running import LOCAL, Address, ServerProcess
from lem.engines.server.stream import number_of
from lem.engines.server.tokens import completion_of
from lem.engines.texts import TextSession
from lem.engines.traffic import TrafficPlan

_CHAT_PATH = "/v1/chat/completions"
# From the first of these failures of a server that dies until the guardian has ended the rest.
_DEATH_S = 1.0
_DYING = frozenset({"server_reset", "server_closed", "server_unreachable", "server_error_event"})
# Of its metrics, those that the record keeps: numbers of things, and times.
_KEPT = re.compile(r"(?!python|process|http).*(_total|(time|latency)\w*_(sum|count))")


class Session(common.ServedSession, TextSession):
    def __init__(self, config: ExperimentConfig, secrets: Mapping[str, str]) -> None:
        section = section_of(config, ServerConfig)
        self._dialect = section.dialect
        self._engine_key = config.engine_key()
        self._key = _find_key(section, secrets)
        self._server: ServerProcess | None = None
        self._client: LoadClient | None = None
        try:
            self._address = self._start(config, section)
            ready_path = section.ready_path or self._dialect.ready_path
            running.wait_until_ready(self._address, ready_path, self._server, self._dialect.server)
            self._model = self._find_model(config, section)
            self._info = self._read_json(self._dialect.info_path)
            self._tokenizer_source, self._tokenizer = tokens.find_tokenizer(
                config, self._address, self._dialect.tokenize, str(self._model["id"]), secrets
            )
            self._known_ids = None
            self._set_up(config)
            self.begin_window()
        except BaseException:
            self.close()
            raise

    # --- what is loaded

    def _start(self, config: ExperimentConfig, section: ServerConfig) -> Address:
        if section.url is not None:
            return Address(section.url, self._key)
        gpus = running.devices_of(config.gpus, os.environ)
        env = {**os.environ, GPU_VARIABLE: gpus, **section.env}
        if self._key is not None and section.api_key_env is not None:
            env[section.api_key_env] = self._key
        if section.command is not None:
            port = running.free_port()
            url, words = f"http://{LOCAL}:{port}", running.command_of(config, section, port, gpus)
        elif spec := os.environ.get(SERVICE_VARIABLE):
            service = json.loads(spec)
            options = running.option_words(section.options)
            names = (*section.env, *filter(None, (section.api_key_env,)))
            url, words = service["url"], [*service["command"], ",".join(names), *options]
        else:
            text = "server.service without a command requires containers"
            raise OptionRefused(text, "use lem campaign with --executor docker")
        self._server = ServerProcess(words, env)
        return Address(url, self._key)

    def _find_model(self, config: ExperimentConfig, section: ServerConfig) -> Mapping[str, Any]:
        """The entry of the served model in the list of models; just its name for a server without that list."""
        listed = self._read_json("/v1/models").get("data")
        entries = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
        found = {str(item.get("id")): item for item in entries}
        wanted = section.served_name or (config.model.name if len(found) != 1 else next(iter(found)))
        if found and wanted not in found:
            what = f"{'server.served_name' if section.served_name else 'model'}: {wanted} is not served"
            names = ", ".join(found)
            raise common.model_error(f"{what}{did_you_mean(wanted, list(found))}", f"the server has {names}")
        return {**found.get(wanted, {}), "id": wanted}

    @property
    def _longest_tok(self) -> int | None:
        """The most tokens of prompt and output together, if the server says so."""
        places = (("max_model_len",), ("meta", "n_ctx"))
        return next(filter(None, (number_of(self._model, *place) for place in places)), None)

    @property
    def report(self) -> EngineReport:
        version = self._version()
        return EngineReport(
            engine_name=self._config.section.engine if isinstance(self._config.section, ServerConfig) else "",
            engine_version=version,
            versions={self._dialect.server: version},
            device="cpu",  # the harness knows the GPUs that are measured
            effective=self._effective(),
            longest_tok=self._longest_tok,
            load_id=self._load_id(),
        )

    def _load_id(self) -> str:
        """Of a server that was running already."""
        url = section_of(self._config, ServerConfig).url
        if url is None:
            return ""
        processes = process.find_listeners(self._address.port) if process.is_here(self._address.host) else ()
        return hashlib.sha256(f"{url} {sorted(map(repr, processes))}".encode()).hexdigest()[:16]

    def _version(self) -> str:
        places = (self._info, self._read_json("/version") if self._dialect.info_path is None else {})
        found = (place.get(name) for place in places for name in self._dialect.version_fields)
        return next((str(value) for value in found if value), "unknown")

    def _effective(self) -> dict[str, Any]:
        """The settings that the server reports, under the names of the options, and the fields of each request."""
        section, decoder, fields = section_of(self._config, ServerConfig), self._config.decoder, self._fields
        settings = running.read_settings(self._metrics_text() or "")
        reported: dict[str, Any] = {**settings, **self._model, **self._info}
        options = {}
        for name, wanted in section.options.items():
            value = reported.get(self._dialect.settings.get(flag_name(name), name.replace("-", "_")))
            if value is not None and not isinstance(value, (dict, list)):
                options[name] = wanted if str(value).lower() == str(wanted).lower() else value
        return {
            "server": {"options": options, "api": section.api},
            "decoder": common.describe_decoder(
                decoder,
                {**fields, "repetition_penalty": decoder.repetition_penalty},
                is_sampling=not decoder.is_greedy,
            ),
            "random_seed": None if self._dialect.field_of("random_seed") is None else self._config.random_seed,
            "request_fields": fields,
            "model_entry": self._model,
            "settings": settings,
            "info": self._info,
        }

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        if self._server is not None:
            self._server.close()

    # --- experiments

    def _set_up(self, config: ExperimentConfig) -> None:
        section, dialect = section_of(config, ServerConfig), self._dialect
        self._config = config
        self._is_chat = config.is_chat
        self._sends_ids = dialect.takes_ids and not self._is_chat and self._tokenizer_source != tokens.PIECES
        path = _CHAT_PATH if self._is_chat else dialect.completion_path
        is_native = not path.startswith("/v1/")
        self._fields = self._make_fields(config, section, is_native=is_native)
        self._uncached = {} if section.wants_cache and section.keeps_prompts else dialect.uncached
        # A cache that is wanted serves the repeats of this experiment, and nothing of the one before it.
        self._salt = random_source.token_hex(8) if section.wants_cache else None
        target = Target(
            self._address.url(path),
            self._address.headers,
            warm_path=self._address.path(section.ready_path or dialect.ready_path),
            needs_done=not is_native,
            needs_usage=not is_native,
            keeps_alive=dialect.keeps_alive,
            keeps_texts=config.save_outputs,
        )
        if self._client is not None:
            self._client.close()
        self._client = LoadClient(target)

    def _make_fields(self, config: ExperimentConfig, section: ServerConfig, *, is_native: bool) -> dict[str, Any]:
        """The fields that all requests share; everything that a server has a default of its own for is sent."""
        dialect, decoder = self._dialect, config.decoder
        own = {
            "decoder.top_k": decoder.top_k if decoder.do_sample and decoder.top_k else dialect.no_top_k,
            "decoder.repetition_penalty": decoder.repetition_penalty,
            "min_p": 0.0,
            "ignore_eos": config.ignore_eos,
        }
        return {
            "model": self._model["id"],
            "stream": True,
            **({} if is_native else {"stream_options": {"include_usage": True}}),
            **dialect.ids,
            "temperature": decoder.temperature if decoder.do_sample else 0.0,
            "top_p": decoder.top_p if decoder.do_sample else 1.0,
            **{field: value for name, value in own.items() if (field := dialect.field_of(name)) is not None},
            **section.to_dict()["request"],
        }

    def _call(self, request: TokenRequest, salt: str) -> Call:
        body = dict(self._fields)
        if not self._is_chat:
            body["prompt"] = list(request.token_ids) if self._sends_ids else self.decode(request.token_ids)
        elif request.conversation:
            body |= json.loads(request.conversation)
        else:
            body["messages"] = [{"role": "user", "content": self.decode(request.token_ids)}]
        dialect, config = self._dialect, self._config
        body["max_tokens" if self._is_chat else dialect.length_field] = request.max_output_tokens
        least, seed = dialect.field_of("min_output_tokens"), dialect.field_of("random_seed")
        if least is not None and request.min_output_tokens:
            body[least] = request.min_output_tokens
        if seed is not None and config.random_seed is not None:
            body[seed] = config.random_seed + request.index
        body |= {name: salt if value == dialects.SALT else value for name, value in self._uncached.items()}
        promised = request.max_output_tokens if config.ignore_eos else request.min_output_tokens
        return Call(json.dumps(body, separators=(",", ":")), request.max_output_tokens, promised)

    def chat_template(self, given: str | None, *, has_tools: bool) -> str:
        if self._tokenizer_source != tokens.TRANSFORMERS:
            text = "chat_template: requires transformers in the Python of the worker"
            raise OptionRefused(text, "install it, or set server.api: chat")
        return super().chat_template(given, has_tools=has_tools)

    def generate(
        self, requests: Sequence[TokenRequest], *, observe_tokens: bool, on_progress: OnProgress = say_nothing
    ) -> list[Completion]:
        """See `Engine`; every token is observed in any case."""
        return self._run_all(requests, 1 if observe_tokens else len(requests), 0.0, on_progress)[0]

    def run_passes(
        self, requests: Sequence[TokenRequest], least_s: float, on_progress: OnProgress
    ) -> list[list[Completion]]:
        return self._run_all(requests, len(requests), least_s, on_progress)

    def _run_all(
        self, requests: Sequence[TokenRequest], concurrency: int, least_s: float, on_progress: OnProgress
    ) -> list[list[Completion]]:
        calls = self._calls(requests)
        result = self._observe(lambda client: client.run_all(calls, concurrency, on_progress, least_s))
        found = [completion_of(requests[reply.call].index, reply, result.opened_ns) for reply in result.replies]
        return [found[first : first + len(calls)] for first in range(0, len(found), len(calls))]

    def serve(self, queue: RequestQueue) -> None:
        """Answer what has arrived, then what arrived meanwhile; `drive` is for measuring."""
        while taken := queue.take(common.TAKE_LIMIT):
            for completion in self.generate(taken, observe_tokens=False):
                queue.complete(completion)

    def drive(self, requests: Sequence[TokenRequest], plan: TrafficPlan, on_progress: OnProgress) -> Drive:
        calls = self._calls(requests)
        result = self._observe(lambda client: client.run_traffic(calls, plan, on_progress))
        arrivals = []
        for number, reply in enumerate(result.replies):
            # In the closed loop, one that found no connection arrived no later than it failed.
            times_ns = (reply.scheduled_ns, reply.sent_ns, reply.ended_ns, result.opened_ns)
            arrived_ns = next(at_ns for at_ns in times_ns if at_ns is not None)
            is_answered = reply.sent_ns is not None and reply.finished_ns is not None
            completion = completion_of(number, reply, result.opened_ns) if is_answered else None
            error = None if reply.error is None else reply.error.text
            arrivals.append(Arrival(reply.call, arrived_ns, completion, error))
        return Drive(result.opened_ns, result.closed_ns, result.has_turned_over, tuple(arrivals))

    def _calls(self, requests: Sequence[TokenRequest]) -> list[Call]:
        # No other run has it; the client counts in its last digits how often it has sent the request.
        salt = self._salt or f"{random_source.token_hex(4)}{SALT}"
        return [self._call(request, salt) for request in requests]

    def _observe(self, run: Callable[[LoadClient], LoadResult]) -> LoadResult:
        """What the client saw; EngineError: it failed, or the server has ended."""
        if self._client is None:
            raise EngineError("the server is closed")
        try:
            result = run(self._client)
        except EngineError:
            self._check_alive(_DEATH_S)
            raise
        self._check_alive(death_s(reply.error for reply in result.replies))
        self._results.append(result)
        return result

    def _check_alive(self, patience_s: float) -> None:
        if self._server is not None and self._server.has_ended(patience_s):
            raise self._server.failure(is_loading=False)

    # --- what was observed

    def begin_window(self) -> None:
        self._results: list[LoadResult] = []
        self._before = self._read_counters()

    def observed(self) -> Observed:
        replies = [reply for result in self._results for reply in result.replies]
        # Nothing was sent for those that still waited for a connection when the window closed.
        replies = [reply for reply in replies if reply.error is not None or reply.sent_ns is not None]
        good = [reply for reply in replies if reply.error is None]
        sources = Counter(reply.token_source for reply in good)
        names = {"chunks": "chunks", "usage": "usage", "ids": "engine_ids"}  # the least certain first
        warnings = [reason for result in self._results for reason in result.warnings]
        bound = [result.bound for result in self._results if result.bound is not None]
        numbers: dict[str, list[int | None]] = {
            "input_tok": [number_of(reply.usage, "prompt_tokens") for reply in good],
            "output_tok": [reply.output_tok for reply in good],
            "cached_tok": [reply.cached_tok for reply in good],
        }
        # Left out is what answers do not say.
        counted = {name: sum(filter(None, found)) for name, found in numbers.items() if None not in found}
        edges = [self._before, self._read_counters()]
        (begun_ns, before), (ended_ns, after) = edges
        changes, read = {}, {}
        if before is not None and after is not None:
            changes = {name: now - before.get(name, 0.0) for name, now in sorted(after.items())}
            windows_ns = [at_ns for result in self._results for at_ns in (result.opened_ns, result.closed_ns)]
            first_ns, last_ns = min(windows_ns, default=begun_ns), max(windows_ns, default=ended_ns)
            before_s, after_s = seconds_between(begun_ns, first_ns), seconds_between(last_ns, ended_ns)
            read = {"before_opening_s": before_s, "after_closing_s": after_s}
        # Not every server has the path that is usual for its kind.
        elif (before, after) != (None, None) or section_of(self._config, ServerConfig).metrics_path:
            warnings.append(Reason.of("metrics_unread", path=self._metrics_path or ""))
        counters = self._dialect.counters.items()
        reported = {what: sum(changes[it] for it in names) for what, names in counters if changes.keys() >= {*names}}
        if differing := sum(any(note.code == "server_usage_differs" for note in reply.notes) for reply in good):
            warnings.append(Reason.of("ids_differ", count=differing, total=len(good)))
        if cached := counted.get("cached_tok", round(reported.get("cached_tok", 0))):
            warnings.append(Reason.of("prompts_cached", cached=cached, total=counted.get("input_tok", 0)))
        differing_codes = {"output_tok": "server_counts_otherwise", "input_tok": "server_prompts_otherwise"}
        for name, code in differing_codes.items():
            found_tok, made_tok = counted.get(name), reported.get(name)
            # A server counts what it made for failed requests, too.
            if len(good) == len(replies) and None not in (found_tok, made_tok) and found_tok != made_tok:
                warnings.append(Reason.of(code, counted=found_tok, reported=round(made_tok or 0)))
        facts = {
            "server": self._dialect.server,
            "api": "chat" if self._is_chat else "completions",
            "prompts": "ids" if self._sends_ids else "text",
            "tokenizer": self._tokenizer_source,
            "token_sources": dict(sources),
            "counted": counted,
            "reported": reported,
            "metrics_read": read,
            "metrics": {name: change for name, change in changes.items() if change and _KEPT.fullmatch(name)},
            "client": [asdict(result.check) for result in self._results],
            "outcomes": dict(Counter("ok" if reply.error is None else reply.error.code for reply in replies)),
        }
        source = next((name for kind, name in names.items() if kind in sources), None)
        return Observed(source, facts, tuple(dict.fromkeys(warnings)), tuple(dict.fromkeys(bound)))

    def _read_counters(self) -> tuple[int, Mapping[str, float] | None]:
        """When, and what the server had counted by then; None if it does not say."""
        text = self._metrics_text()
        return time.monotonic_ns(), None if text is None else running.read_metrics(text)

    @property
    def _metrics_path(self) -> str | None:
        return section_of(self._config, ServerConfig).metrics_path or self._dialect.metrics_path

    def _metrics_text(self) -> str | None:
        """None if the server does not give it."""
        if self._metrics_path is not None:
            with contextlib.suppress(OSError):
                status, text = self._address.ask(self._metrics_path)
                return text if status == running.OK else None
        return None

    def _read_json(self, path: str | None) -> Mapping[str, Any]:
        found = None
        with contextlib.suppress(OSError):
            found = None if path is None else self._address.read(path)
        return found if isinstance(found, dict) else {}


def death_s(errors: Iterable[Reason | None]) -> float:
    """How long to wait for the end of a server whose requests failed so: only if it may be about to end."""
    return _DEATH_S if any(error is not None and error.code in _DYING for error in errors) else 0.0


def _find_key(section: ServerConfig, secrets: Mapping[str, str]) -> str | None:
    name = section.api_key_env
    if name is None:
        return None
    key = secrets.get(name) or os.environ.get(name)
    if not key:
        raise OptionRefused(f"server.api_key_env: {name} is not set", "export it where lem runs")
    if not re.fullmatch("[!-~]+", key):
        text = f"server.api_key_env: {name} has characters that no HTTP header can have"
        raise OptionRefused(text, "export the key alone, in one line")
    return key
