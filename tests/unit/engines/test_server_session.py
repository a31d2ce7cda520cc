"""A served engine over replayed exchanges of each dialect: what is sent and counted, and how failures are explained."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lem.base import process
from lem.base.errors import EngineError
from lem.base.reasons import Reason
from lem.config.dialects import DIALECTS
from lem.config.experiment import ExperimentConfig
from lem.engines.common import load_engine
from lem.engines.protocol import Driven, Engine, TokenRequest
from lem.engines.server.running import Address, devices_of, option_words, read_metrics
from lem.engines.server.session import death_s
from lem.engines.server.tokens import Pieces, token_times
from lem.engines.traffic import TrafficPlan
from tests.processes import wait_for, wait_until_ended
from tests.scripted_server import DONE, Script, ScriptedServer, Talk, head, token, usage

DOUBLE = Path(__file__).parents[2] / "doubles/openai_server.py"
TOK = 4  # of every answer
IDS = (839, 830, 636, 65)
REQUESTS = [TokenRequest(index, (5, 6, 7, 8, 9, 10 + index), TOK) for index in range(3)]

Start = Callable[..., Engine]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Loads a served engine of a dialect; the bodies of its requests are in `tmp_path/bodies`."""
    engines: list[Engine] = []

    def load(dialect: str = "vllm", *words: str, secrets: Mapping[str, str] | None = None, **options: Any) -> Engine:
        engines.append(load_engine(experiment(tmp_path, dialect, *words, **options), secrets or {}))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


def experiment(folder: Path, dialect: str, *words: str, **options: Any) -> ExperimentConfig:
    command = [sys.executable, str(DOUBLE), "--dialect", dialect, "--port", "{port}", "--log", str(folder / "bodies")]
    server = {"engine": dialect, "command": [*command, *words], **options.pop("server", {})}
    # A folder without a tokenizer: transformers does not ask the hub.
    usual = {"model": str(folder), "max_output_tokens": TOK, "decoder": {"preset": "deterministic"}}
    return ExperimentConfig.from_dict({**usual, "backend": "server", "server": server, **options})


def bodies(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "bodies").read_text().splitlines()]


def observed(engine: Engine) -> dict[str, Any]:
    assert isinstance(engine, Driven)
    return dict(engine.observed().facts)


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_tokens_are_counted_by_ids_where_there_are_any_else_by_usage(start: Start, dialect: str, api: str) -> None:
    engine = start(dialect, server={"api": api}, save_outputs=True)
    texts = ("one and two", "three and four", "five and six")
    requests = [TokenRequest(index, tuple(engine.encode(text)), TOK) for index, text in enumerate(texts)]

    found = engine.generate(requests, observe_tokens=False)

    has_ids = api == "completions" and dialect in ("vllm", "llamacpp")
    assert [item.error for item in found] == [None] * 3
    assert {item.output_tok for item in found} == {TOK}
    assert {item.input_tok for item in found} == {6}
    assert {item.output_ids for item in found} == {IDS if has_ids else ()}
    assert {item.text for item in found} == {" pumpkin crate rule_"}
    assert all(len(item.token_times_ns or ()) == TOK for item in found)
    assert isinstance(engine, Driven)
    assert engine.observed().token_source == ("engine_ids" if has_ids else "usage")


@pytest.mark.parametrize(
    ("dialect", "engine_version", "longest_tok"),
    [
        ("vllm", "0.32.0", 64),
        ("llamacpp", "b11549-abc", 64),
        ("sglang", "0.5.6", 64),
        ("tensorrt", "1.2.0", None),
        ("tgi", "3.3.0", None),
        ("ollama", "0.13.0", None),
        ("openai", "unknown", None),
    ],
)
def test_a_server_says_its_version_and_length(
    start: Start, dialect: str, engine_version: str, longest_tok: int | None
) -> None:
    report = start(dialect).report
    assert (report.engine_name, report.engine_version, report.longest_tok) == (dialect, engine_version, longest_tok)


SAMPLED: dict[str, Any] = {"decoder": {"temperature": 0.5, "top_k": 7, "top_p": 0.9}, "random_seed": 3}
OPENAI = {"model": "m", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": TOK}
COOL = {"temperature": 0.5, "top_p": 0.9}
FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "openai": ({"decoder": {**SAMPLED["decoder"], "top_k": 0}, "random_seed": 3}, {**OPENAI, **COOL, "seed": 3}),
    "vllm": (
        {**SAMPLED, "ignore_eos": True},
        {
            **OPENAI,
            **COOL,
            "seed": 3,
            "top_k": 7,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "ignore_eos": True,
            "return_token_ids": True,
        },
    ),
    "llamacpp": (
        {**SAMPLED, "ignore_eos": True},
        {
            "model": "m",
            "stream": True,
            "n_predict": TOK,
            "return_tokens": True,
            "cache_prompt": False,
            **COOL,
            "seed": 3,
            "top_k": 7,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
            "ignore_eos": True,
        },
    ),
    "sglang": (
        {"decoder": {"preset": "deterministic"}, "min_output_tokens": 2},
        {
            **OPENAI,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "ignore_eos": False,
            "min_tokens": 2,
        },
    ),
}


@pytest.mark.parametrize("dialect", FIELDS)
def test_every_field_that_a_server_has_a_default_for_is_sent(start: Start, tmp_path: Path, dialect: str) -> None:
    options, expected = FIELDS[dialect]
    engine = start(dialect, **options)

    ids = tuple(engine.encode("five and six"))
    engine.generate([TokenRequest(0, ids, TOK, options.get("min_output_tokens", 0))], observe_tokens=False)

    (body,) = bodies(tmp_path)
    assert {name: value for name, value in body.items() if name not in ("prompt", "cache_salt")} == expected


def test_prompts_are_ids_where_the_server_takes_and_makes_them(start: Start, tmp_path: Path) -> None:
    engine = start("vllm")
    assert engine.encode("anything") == [5, 6, 7, 8, 9, 10]
    engine.generate(REQUESTS[:1], observe_tokens=False)
    assert bodies(tmp_path)[0]["prompt"] == [5, 6, 7, 8, 9, 10]
    assert (observed(engine)["prompts"], observed(engine)["tokenizer"]) == ("ids", "server")


def test_prompts_are_text_where_no_tokenizer_is_known(start: Start, tmp_path: Path) -> None:
    engine = start("ollama")
    ids = tuple(engine.encode("The quick brown fox"))
    engine.generate([TokenRequest(0, ids, TOK)], observe_tokens=False)
    assert bodies(tmp_path)[0]["prompt"] == "The quick brown fox"
    assert (observed(engine)["prompts"], observed(engine)["tokenizer"]) == ("text", "pieces")


def test_a_chat_is_sent_as_messages(start: Start, tmp_path: Path) -> None:
    engine = start("vllm", server={"api": "chat"})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    conversation = json.dumps({"messages": messages, "tools": [{"type": "function"}]})
    engine.generate([TokenRequest(0, (5,), TOK, 0, conversation)], observe_tokens=False)
    engine.generate(REQUESTS[:1], observe_tokens=False)  # other ids for the warm-up have no conversation
    first, second = bodies(tmp_path)
    assert (first["messages"], first["tools"]) == (messages, [{"type": "function"}])
    assert second["messages"] == [{"role": "user", "content": "#$%&'("}]


def test_a_repeated_prompt_has_a_salt_of_its_own_unless_the_cache_is_asked_for(start: Start, tmp_path: Path) -> None:
    engine = start("vllm")
    for _ in range(2):
        engine.generate(REQUESTS, observe_tokens=False)
    salts = [body["cache_salt"] for body in bodies(tmp_path)]
    assert len(set(salts)) == 2  # of each pass: prompts of one pass may share what they have in common
    (tmp_path / "bodies").unlink()
    plan = TrafficPlan("closed", 1.0, 1, 0, 0.0, 0.0)
    assert isinstance(engine, Driven)
    drive = engine.drive(REQUESTS[:1], plan, lambda _: None)
    salts = [body["cache_salt"] for body in bodies(tmp_path)]
    assert len(set(salts)) == len(salts) == len(drive.arrivals)


CACHING = [{"server": {"options": {"enable_prefix_caching": True}}}, "--enable-prefix-caching"]


@pytest.mark.parametrize("caching", CACHING, ids=["option", "command"])
def test_a_prefix_cache_that_is_asked_for_serves_the_repeats_of_one_experiment(
    start: Start, tmp_path: Path, caching: str | Mapping[str, Any]
) -> None:
    words, options = ((caching,), {}) if isinstance(caching, str) else ((), dict(caching))
    engine = start("vllm", *words, **options)
    for _ in range(2):
        engine.generate(REQUESTS[:1], observe_tokens=False)
    engine.configure(experiment(tmp_path, "vllm", *words, **options, min_output_tokens=1))
    engine.generate(REQUESTS[:1], observe_tokens=False)
    first, repeat, of_the_next = (body["cache_salt"] for body in bodies(tmp_path))
    assert first == repeat != of_the_next


@pytest.mark.parametrize("caching", [{"server": {"options": {"cache-prompt": True}}}, "--cache-prompt"])
def test_a_cache_without_salts_is_left_alone_where_it_is_asked_for(
    start: Start, tmp_path: Path, caching: str | Mapping[str, Any]
) -> None:
    engine = start("llamacpp", caching) if isinstance(caching, str) else start("llamacpp", **caching)
    engine.generate(REQUESTS[:1], observe_tokens=False)
    assert ["cache_prompt" in body for body in bodies(tmp_path)] == [False]


@pytest.mark.parametrize(
    ("dialect", "options", "is_shared"),
    [
        ("vllm", {}, True),
        ("vllm", {"enable_prefix_caching": True}, True),
        ("llamacpp", {}, True),
        ("llamacpp", {"cache-prompt": True}, False),
        ("sglang", {}, False),
    ],
)
def test_experiments_share_a_server_only_if_none_finds_the_prompts_of_another(
    tmp_path: Path, dialect: str, options: dict[str, Any], is_shared: bool
) -> None:
    one, other = (
        experiment(tmp_path, dialect, server={"options": options}, max_output_tokens=length).engine_key()
        for length in (4, 5)
    )
    assert (one == other) == is_shared


def test_traffic_is_driven_by_the_client(start: Start) -> None:
    engine = start("vllm")
    assert isinstance(engine, Driven)
    engine.begin_window()
    drive = engine.drive(REQUESTS, TrafficPlan("poisson", 50.0, 1, 7, 0.2, 0.2), lambda _: None)
    done = [item for item in drive.arrivals if item.completion is not None]
    assert drive.opened_ns < drive.closed_ns
    assert {item.prompt for item in done} == {0, 1, 2}
    assert all(item.completion.started_ns >= item.arrived_ns for item in done if item.completion is not None)
    facts = observed(engine)
    assert facts["counted"] == {"input_tok": 6 * len(done), "output_tok": TOK * len(done)}
    assert facts["reported"] == {"output_tok": TOK * len(done), "cached_tok": 0}
    assert facts["client"][0]["pid"] > 0


def test_requests_that_were_never_sent_have_no_outcome(start: Start) -> None:
    engine = start("llamacpp")  # a connection for each request
    assert isinstance(engine, Driven)
    engine.begin_window()
    drive = engine.drive(REQUESTS, TrafficPlan("constant", 5000.0, 1, 7, 0.05, 0.05), lambda _: None)
    sent = [item for item in drive.arrivals if item.completion is not None or item.error is not None]
    assert len(sent) < len(drive.arrivals)
    facts = observed(engine)
    assert sum(facts["outcomes"].values()) == len(sent)
    assert "chunks" not in facts["token_sources"]


def test_other_counts_of_the_server_and_cached_prompts_are_named(start: Start) -> None:
    engine = start("vllm")
    engine.generate(REQUESTS, observe_tokens=False)
    assert isinstance(engine, Driven)
    engine.begin_window()  # what came before does not count
    engine.generate(REQUESTS[:1], observe_tokens=False)
    assert [reason.code for reason in engine.observed().warnings] == []

    engine = start("sglang", server={"api": "chat"})
    ids = tuple(engine.encode("one and two"))
    engine.generate([TokenRequest(index, ids, TOK) for index in range(3)], observe_tokens=False)
    assert isinstance(engine, Driven)
    cached = [reason for reason in engine.observed().warnings if reason.code == "prompts_cached"]
    assert [reason.data for reason in cached] == [{"cached": 6, "total": 18}]


def test_options_become_words_and_the_effective_ones_are_reported(start: Start, tmp_path: Path) -> None:
    engine = start("vllm", server={"options": {"max_num_seqs": 8}})
    assert engine.report.effective["server"]["options"] == {"max_num_seqs": "4"}  # as the server says
    options = {"a_b": True, "c": False, "d": None, "e": [1, "x"], "f": {"g": 1}, "h-i": 0.5}
    words = ["--a-b", "--no-c", "--e", "1", "--e", "x", "--f"]
    assert option_words(options) == [*words, '{"g": 1}', "--h-i", "0.5"]


@pytest.mark.parametrize(
    ("words", "options", "kind", "is_permanent", "said"),
    [
        (("--say", "torch.OutOfMemoryError: CUDA out of memory."), {}, "out_of_memory", True, "CUDA out of memory"),
        (("--say", "error: address already in use"), {}, "engine", False, "already in use"),
        (("--say", "vllm: error: unrecognized arguments: --x"), {}, "option", True, "--x"),
        (("--say", "OSError: m is not a valid model identifier"), {}, "model", True, "not a valid model"),
        (("--say", "something else"), {}, "engine", False, "ended with exit code 1: something else"),
        (("--signal", str(int(signal.SIGILL))), {}, "engine", True, "SIGILL"),
        (("--signal", str(int(signal.SIGKILL))), {}, "engine", False, "SIGKILL"),
        (("--missing", "/health"), {}, "option", True, "/health answers 404"),
        (("--key", "HOME"), {}, "option", True, "requires an API key"),
        ((), {"server": {"served_name": "n"}}, "model", True, "the server has m"),
        ((), {"server": {"api_key_env": "LEMTEST_NO_KEY"}}, "option", True, "LEMTEST_NO_KEY"),
        ((), {"model": {"name": "/nowhere/m", "tokenizer": "/nowhere/t"}}, "model", True, "/nowhere/t"),
    ],
)
def test_a_server_that_does_not_start_is_explained(
    start: Start, words: tuple[str, ...], options: dict[str, Any], kind: str, is_permanent: bool, said: str
) -> None:
    with pytest.raises(EngineError) as caught:
        start("vllm", *words, **options)
    assert (caught.value.kind, caught.value.is_permanent) == (kind, is_permanent)
    assert said in f"{caught.value.message}; {caught.value.hint}"


def test_a_command_that_is_missing_is_explained(tmp_path: Path) -> None:
    command = ["lem-no-such-server", "--port", "{port}"]
    with pytest.raises(EngineError, match="lem-no-such-server"):
        load_engine(experiment(tmp_path, "vllm", server={"command": command}), {})


def test_an_url_without_a_server_is_explained(tmp_path: Path) -> None:
    config = experiment(tmp_path, "vllm", server={"command": None, "url": "http://127.0.0.1:9"})
    with pytest.raises(EngineError, match=r"server\.url: no server answers at http://127\.0\.0\.1:9"):
        load_engine(config, {})


def test_a_server_that_is_not_ready_is_waited_for(start: Start) -> None:
    assert start("vllm", "--ready-after", "3").report.engine_version == "0.32.0"


def test_a_server_that_dies_under_load_is_named(start: Start) -> None:
    engine = start("vllm", "--die-at", "2")
    with pytest.raises(EngineError, match="the server was killed by SIGKILL"):
        engine.generate(REQUESTS, observe_tokens=True)


def test_only_a_failure_of_a_server_that_may_be_dying_is_waited_for() -> None:
    alive = [
        None,
        Reason.of("server_refused", status=503, message=""),
        Reason.of("server_cut", found=1, most=2),
        Reason.of("server_hung", silence_s=300.0),
    ]
    assert death_s(alive) == 0
    assert death_s([*alive, Reason.of("server_closed", received=0)]) > 0
    assert death_s([Reason.of("server_reset", error="")]) > 0


def test_texts_are_kept_only_for_outputs(start: Start, tmp_path: Path) -> None:
    engine = start("vllm")
    request = TokenRequest(0, tuple(engine.encode("one and two")), TOK)
    assert [item.text for item in engine.generate([request], observe_tokens=False)] == [None]
    engine.configure(experiment(tmp_path, "vllm", save_outputs=True))
    assert [item.text for item in engine.generate([request], observe_tokens=False)] == [" pumpkin crate rule_"]


def test_without_a_good_answer_there_is_no_source_of_tokens(start: Start) -> None:
    engine = start("openai")
    assert isinstance(engine, Driven)
    assert engine.observed().token_source is None


def test_a_seed_that_is_not_sent_is_not_in_effect(start: Start) -> None:
    assert start("sglang").report.effective["random_seed"] is None
    assert start("openai").report.effective["random_seed"] == 42


def test_the_key_is_sent_and_is_in_no_command(start: Start, tmp_path: Path) -> None:
    secrets = {"LEMTEST_KEY": "key-of-this-test"}
    engine = start("vllm", "--key", "LEMTEST_KEY", server={"api_key_env": "LEMTEST_KEY"}, secrets=secrets)
    assert engine.generate(REQUESTS, observe_tokens=False)[0].error is None
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in process.descendants(os.getpid())]
    assert any(b"LEMTEST_KEY" in command for command in commands)
    assert not any(b"key-of-this-test" in command for command in commands)
    assert "key-of-this-test" not in json.dumps([bodies(tmp_path), engine.report.effective])


def test_closing_ends_everything_that_the_server_started(tmp_path: Path) -> None:
    config = experiment(tmp_path, "vllm", "--child")
    before = set(process.descendants(os.getpid()))
    engine = load_engine(config, {})
    started = set(process.descendants(os.getpid())) - before
    assert len(started) >= 4  # guardian, server, its child, client

    engine.close()

    for pid in started:
        assert wait_until_ended(pid, 20)


def test_a_running_server_has_one_load_for_as_long_as_it_runs(start: Start, tmp_path: Path) -> None:
    first = start("vllm")
    port = process_port(tmp_path)
    config = experiment(tmp_path, "vllm", server={"command": None, "url": f"http://127.0.0.1:{port}"})
    loads = []
    for _ in range(2):
        engine = load_engine(config, {})
        loads.append(engine.report.load_id)
        engine.close()
    assert loads[0] == loads[1] != ""
    assert first.report.load_id == ""


def process_port(folder: Path) -> int:
    """The port of the double that this test started."""

    def find() -> int | None:
        for pid in process.descendants(os.getpid()):
            words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
            if str(folder / "bodies").encode() in words and b"--program" not in words:
                return int(words[words.index(b"--port") + 1])
        return None

    found = wait_for(find)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("held", "tok", "expected"),
    [
        ([1, 1, 1], 3, (10, 20, 30)),
        ([2, 0, 1], 3, (10, 10, 30)),
        ([], 3, (10, 20, 30)),
        ([], 5, (10, 20, 30, 30, 30)),
        ([1, 1, 1], 4, (10, 20, 30, 30)),
        ([], 2, (10, 30)),
        ([], 1, (30,)),
        ([], 0, ()),
    ],
)
def test_a_token_has_the_time_of_its_chunk(held: list[int], tok: int, expected: tuple[int, ...]) -> None:
    assert token_times((10, 20, 30), held, tok) == expected
    assert token_times((), [], 2) is None


def test_counters_are_summed_over_their_labels() -> None:
    text = '# HELP a_total x\na_total{b="1"} 2.0\na_total{b="{}"} 3e1\nb_bucket{le="1"} 4\nc 5\nd_sum 0.25\n'
    assert read_metrics(text) == {"a_total": 32.0, "d_sum": 0.25}


def test_what_is_no_metric_is_passed_over() -> None:
    assert read_metrics("a_total 1.2.3\nb_total .\nc_total NaN\nd_total 1.\n") == {"d_total": 1.0}


@pytest.mark.parametrize("found", [b'{"tokens": 5}', b'{"tokens": null}', b'{"tokens": ["a"]}', b"{}", b"[1]"])
def test_a_tokenizer_that_answers_something_else_is_named(found: bytes, tmp_path: Path) -> None:
    def play(talk: Talk) -> None:
        body = found if talk.request.startswith(b"POST /tokenize") else b"{}"
        talk.send(head(Content_Length=str(len(body))) + body)

    with ScriptedServer(play) as server:
        section = {"command": None, "url": f"http://127.0.0.1:{server.port}"}
        engine = load_engine(experiment(tmp_path, "vllm", server=section), {})
        with pytest.raises(EngineError, match=r"token.* at /tokenize"):
            engine.encode("one")
        engine.close()


def test_all_that_is_asked_of_a_server_is_below_the_path_of_its_url(tmp_path: Path) -> None:
    with ScriptedServer(scripted(bytes)) as server:
        section = {"command": None, "url": f"http://127.0.0.1:{server.port}/gateway/v1"}
        engine = load_engine(experiment(tmp_path, "openai", server=section), {})
        ids = tuple(engine.encode("one and two"))
        engine.generate([TokenRequest(0, ids, TOK)], observe_tokens=False)
        engine.close()
    asked = {request.split(b" ")[1].rpartition(b"/v1/")[0] for request in server.requests}
    assert asked == {b"/gateway"}


def scripted(metrics: Callable[[], bytes]) -> Script:
    """A server of the dialect openai whose answers say nothing about caches."""

    def play(talk: Talk) -> None:
        if talk.request.startswith(b"POST"):
            return talk.answer(*map(token, " abcd"[:TOK]), usage(TOK), DONE)
        body = b'{"data": [{"id": "m", "meta": "x"}]}'
        status = "200 OK"
        if talk.request.startswith(b"GET /metrics"):
            body = metrics()
            status = "200 OK" if body else "500 Internal Server Error"
        return talk.send(head(status, Content_Length=str(len(body))) + body)

    return play


@pytest.fixture
def observe(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    """The facts and warnings of one request to a server whose metrics are these in turn."""

    def look(*texts: bytes, **server: str) -> tuple[dict[str, Any], list[str]]:
        left = iter(texts)
        with ScriptedServer(scripted(lambda: next(left))) as running:
            section = {"command": None, "url": f"http://127.0.0.1:{running.port}", **server}
            engine = load_engine(experiment(tmp_path, "openai", server=section), {})
            assert isinstance(engine, Driven)
            engine.begin_window()
            is_chat = server.get("api") == "chat"
            ids = (5,) if is_chat else tuple(engine.encode("one and two"))
            chat = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) if is_chat else ""
            engine.generate([TokenRequest(0, ids, TOK, 0, chat)], observe_tokens=False)
            found = engine.observed()
            engine.close()
        return dict(found.facts), [reason.code for reason in found.warnings]

    return look


def test_counters_that_were_not_read_before_the_window_have_no_difference(observe: Any) -> None:
    facts, warnings = observe(b"", b"", b"a_total 70\n", metrics_path="/metrics")
    assert facts["metrics"] == {}
    assert "metrics_unread" in warnings


def test_counters_have_their_difference(observe: Any) -> None:
    facts, warnings = observe(b"a_total 1\n", b"a_total 1\n", b"a_total 7\n", metrics_path="/metrics")
    assert facts["metrics"] == {"a_total": 6.0}
    assert "metrics_unread" not in warnings
    assert facts["metrics_read"].keys() == {"before_opening_s", "after_closing_s"}
    assert min(facts["metrics_read"].values()) > 0


@pytest.mark.parametrize(("computed_tok", "differs"), [(2, False), (4, True)])
def test_the_prompts_of_llama_cpp_are_those_it_computed_and_those_it_had(
    observe: Any, computed_tok: int, differs: bool
) -> None:
    name = "llamacpp:prompt_tokens"
    texts = [
        f"{name}_total {10 + tok}\n{name}_cached_total {more}\n" for tok, more in ((0, 0), (0, 0), (computed_tok, 3))
    ]
    facts, warnings = observe(*(text.encode() for text in texts), engine="llamacpp", api="chat")
    assert facts["counted"]["input_tok"] == 5
    assert facts["reported"] == {"input_tok": computed_tok + 3, "cached_tok": 3}
    assert ("server_prompts_otherwise" in warnings) == differs
    assert "prompts_cached" in warnings


def test_what_answers_do_not_say_is_not_counted_as_zero(observe: Any) -> None:
    facts, _ = observe()
    assert facts["counted"] == {"input_tok": 5, "output_tok": TOK}


@pytest.mark.parametrize("key", ["two\nlines", "k\u20acy", " ", "key-of-a-file\n"])
def test_a_key_that_no_header_can_have_is_refused_without_being_shown(tmp_path: Path, key: str) -> None:
    config = experiment(tmp_path, "vllm", server={"api_key_env": "LEMTEST_KEY"})
    with pytest.raises(EngineError, match="LEMTEST_KEY has characters") as caught:
        load_engine(config, {"LEMTEST_KEY": key})
    assert key not in str(caught.value) or not key.strip()


def test_text_in_pieces_is_given_back() -> None:
    pieces = Pieces()
    text = "  The quick,\n\tbrown   fox\u2014\u0436\u0430\u0440\u00a0x "
    ids = pieces.encode(text, add_special_tokens=True)
    assert pieces.decode(ids) == text
    assert pieces.encode(text, add_special_tokens=False) == ids


@pytest.mark.parametrize(
    ("names", "environ", "expected"),
    [
        (None, {}, "0"),
        ((), {}, ""),
        (("1", "GPU-a"), {}, "1,GPU-a"),
        (("1",), {"CUDA_VISIBLE_DEVICES": "4,5"}, "5"),
        (None, {"CUDA_VISIBLE_DEVICES": "GPU-b"}, "GPU-b"),
    ],
)
def test_gpus_count_those_that_the_worker_sees(names: Any, environ: dict[str, str], expected: str) -> None:
    assert devices_of(names, environ) == expected


@pytest.mark.parametrize("url", ["http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_an_address_may_name_the_version_of_the_api(url: str) -> None:
    assert Address(url).url("/v1/models") == "http://h:1/v1/models"
    assert Address("http://[::1]:8000/base/v1").url("/health") == "http://[::1]:8000/base/health"


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_server_whose_answer_does_not_end_is_not_waited_for(begin: bytes) -> None:
    def drip(talk: Talk) -> None:
        talk.send(begin)
        while talk.is_idle(0.01):
            talk.send(b"line")

    with ScriptedServer(drip) as server:
        address = Address(f"http://127.0.0.1:{server.port}", patience_s=0.3)
        with pytest.raises(TimeoutError, match=r"no whole answer within 0\.3 s"):
            address.ask("/metrics")
