"""Requests: prompts as token ids, other ids of the same shapes for warm-up, and traffic.

Every engine gets ids, so that tokenising is never measured.

An arrival is a point in time, not an act. In the open loop the times follow from rate and seed alone, and a request is
there for the engine from its time on, whatever the engine is doing; latency counts from that time. No thread hands
requests over: it would share the interpreter with the engine, run late whenever the engine computes, and hide exactly
the waiting that is to be measured ("coordinated omission", Tene 2013). In the closed loop a request arrives when an
answer is handed in.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence

from lem.base.clock import Clock, seconds_between
from lem.base.dataclass import replace
from lem.base.errors import EngineError
from lem.base.reasons import Reason
from lem.config.experiment import ExperimentConfig
from lem.engines.protocol import Completion, Drive, Driven, Engine, TokenRequest
from lem.engines.traffic import TrafficPlan, WindowRule
from lem.meters.requestlog import Request
from lem.meters.work import load_warnings
from lem.worker.shapes import Prompt
from lem.worker.window import Answer, MeasuredWindow, as_request, check_completion

_prompts_error = functools.partial(EngineError, kind="prompts", is_permanent=True)


def encode_prompts(
    prompts: Sequence[Prompt], engine: Engine, config: ExperimentConfig, template: str | None = None
) -> tuple[tuple[TokenRequest, ...], tuple[Reason, ...]]:
    """The requests of an experiment in the order of its prompts, and warnings."""
    # Under a chat `template` a prompt is what it makes of the conversation, and a text is one turn of the user. A
    # prompt with `input_tokens` gets exactly that many ids: its text is cut or repeated, special tokens and the
    # template are not; where the template alone takes more, one token is left of the text. None gets more than
    # `max_input_tokens`. Raises EngineError: kind `prompts`, a prompt of which the tokenizer makes nothing, or that the
    # template refuses.
    requests: list[TokenRequest] = []
    cut = bounded = longer = 0
    total, limit = len(prompts), config.max_input_tokens
    for index, prompt in enumerate(prompts):
        try:
            if config.is_chat:
                ids, wanted_tok, conversation = _converse(prompt, engine, limit)
            else:
                (ids, wanted_tok), conversation = _encode(prompt, engine, limit, template), ""
        except EngineError as error:
            if error.kind != "prompts":
                raise
            raise _prompts_error(f"prompt {index + 1} of {total}: {error.message}", error.hint) from error
        cut += wanted_tok > limit
        longer += wanted_tok < len(ids)
        wanted = config.max_output_tokens if prompt.output_tokens is None else prompt.output_tokens
        bounded += wanted > config.max_output_tokens
        most = min(wanted, config.max_output_tokens)
        requests.append(TokenRequest(index, ids[:limit], most, min(config.min_output_tokens, most), conversation))
    warnings = []
    if cut:
        warnings.append(Reason.of("prompts_cut", cut=cut, total=total, limit=limit))
    if longer:
        warnings.append(Reason.of("template_longer", longer=longer, total=total))
    if bounded:
        warnings.append(Reason.of("outputs_bounded", bounded=bounded, total=total, limit=config.max_output_tokens))
    return tuple(requests), tuple(warnings)


def _encode(prompt: Prompt, engine: Engine, limit: int, template: str | None) -> tuple[tuple[int, ...], int]:
    parts = ("", prompt.prompt, "")
    if template is not None:
        messages = prompt.messages or ({"role": "user", "content": prompt.prompt},)
        parts = engine.render(messages, prompt.tools, template)
    ids = tuple(engine.encode("".join(parts), is_whole=template is None))
    if not ids:
        raise _without_tokens(prompt)
    wanted = len(ids) if prompt.input_tokens is None else prompt.input_tokens
    if prompt.input_tokens is None and (template is None or wanted <= limit):
        return ids, wanted
    head, body, tail = (tuple(engine.encode(part, is_whole=False)) for part in parts)
    if template is None:
        # What the tokenizer puts behind a text is left out: nothing would come after an end of sequence.
        head = next((ids[:start] for start in range(len(ids)) if ids[start : start + len(body)] == body), ())
    fixed_tok = len(head) + len(tail)
    if template is not None and fixed_tok >= limit:
        if prompt.input_tokens is None:
            return ids, wanted  # a long conversation, which loses its end
        what = f"max_input_tokens: {limit}: the chat template alone takes {fixed_tok} tokens"
        raise _prompts_error(what, f"set max_input_tokens to at least {fixed_tok + 1}")
    length = max(min(wanted, limit), 1 if template is None else fixed_tok + 1)
    text = itertools.islice(itertools.cycle(body), max(0, length - fixed_tok))
    return (*head, *text, *tail)[:length], wanted


def _converse(prompt: Prompt, engine: Engine, limit: int) -> tuple[tuple[int, ...], int, str]:
    """As `_encode`, of a chat: its texts without the template of the server, which is not counted; and its fields."""
    messages = [dict(item) for item in prompt.messages or ({"role": "user", "content": prompt.prompt},)]
    last = max(index for index, item in enumerate(messages) if item["role"] == "user")
    texts = [tuple(engine.encode(str(item["content"] or ""), is_whole=False)) for item in messages]
    body = texts[last]
    if not body:
        raise _without_tokens(prompt)
    fixed_tok = sum(map(len, texts)) - len(body)
    wanted = fixed_tok + len(body) if prompt.input_tokens is None else prompt.input_tokens
    room_tok = max(1, min(wanted, limit) - fixed_tok)
    if room_tok != len(body):
        texts[last] = tuple(itertools.islice(itertools.cycle(body), room_tok))
        messages[last]["content"] = engine.decode(texts[last])
    fields = {"messages": messages, **({"tools": [dict(tool) for tool in prompt.tools]} if prompt.tools else {})}
    return tuple(itertools.chain.from_iterable(texts)), wanted, json.dumps(fields)


def _without_tokens(prompt: Prompt) -> EngineError:
    hint = "remove it: the model's tokenizer gives no tokens for it"
    return _prompts_error(f"it has no tokens: {prompt.prompt[:60]!r}", hint)


def check_lengths(requests: Sequence[TokenRequest], longest_tok: int | None) -> None:
    """Raise EngineError, kind `prompts`, for requests that the engine has no room for: each would fail."""
    if longest_tok is None:
        return
    too_long = [item for item in requests if len(item.token_ids) + item.max_output_tokens > longest_tok]
    if too_long:
        first = max(too_long, key=lambda item: len(item.token_ids) + item.max_output_tokens)
        lengths = f"{len(first.token_ids)} tokens, and {first.max_output_tokens} of output"
        what = f"{len(too_long)} of {len(requests)} prompts are too long for the {longest_tok} positions of the model"
        hint = f"lower max_input_tokens or max_output_tokens: together at most {longest_tok}"
        raise _prompts_error(f"{what}: prompt {first.index + 1} has {lengths}", hint)


MAX_DRAWS = 8


class DisjointRequests:
    """Requests of the same shapes as given ones with other ids, for warm-up, without end."""

    # A shape is a length in tokens with the bounds on the output. The ids are drawn from all the given prompts, so that
    # the model knows them; a leading id that all prompts share is kept. They share no longer prefix than chance gives,
    # so warm-up leaves nothing in a prefix cache that the measured prompts would find.

    def __init__(self, requests: Sequence[TokenRequest], seed: int) -> None:
        self.is_disjoint = True  # every request made so far differs from every given one
        self._shapes = sorted(requests, key=_shape_of)
        self._in_turn = itertools.cycle(requests)
        self._rng = random.Random(seed)
        self._measured = frozenset(request.token_ids for request in requests)
        self._made: set[tuple[int, ...]] = set()
        self._indices = itertools.count()
        has_leader = len({request.token_ids[0] for request in requests}) == 1 and len(requests) > 1
        self._leader = 1 if has_leader and all(len(request.token_ids) > 1 for request in requests) else 0
        self._pool = [token for request in requests for token in request.token_ids[self._leader :]]

    def take(self, count: int) -> list[TokenRequest]:
        return [self._make(shape) for shape in itertools.islice(self._in_turn, count)]

    def take_typical(self, count: int) -> list[TokenRequest]:
        """Requests whose shapes are spread evenly over the given ones by length: the same shapes at every call."""
        return [self._make(shape) for shape in self._typical(count)]

    def is_typical(self, requests: Sequence[TokenRequest]) -> bool:
        """Whether requests have the shapes that `take_typical` gives for the same number."""
        return sorted(map(_shape_of, requests)) == [_shape_of(shape) for shape in self._typical(len(requests))]

    def _typical(self, count: int) -> list[TokenRequest]:
        return [self._shapes[(2 * step + 1) * len(self._shapes) // (2 * count)] for step in range(count)]

    def _make(self, shape: TokenRequest) -> TokenRequest:
        ids = drawn = shape.token_ids
        for _ in range(MAX_DRAWS):
            body = (self._pool[int(self._rng.random() * len(self._pool))] for _ in ids[self._leader :])
            drawn = (*ids[: self._leader], *body)
            if drawn not in self._measured and drawn not in self._made:
                break
        else:
            # Prompts of hardly any variety: any id up to the largest seen in the last place.
            choices = ((*ids[:-1], token) for token in range(max(self._pool) + 1))
            drawn = next((choice for choice in choices if choice not in self._measured), drawn)
        self.is_disjoint = self.is_disjoint and drawn not in self._measured
        self._made.add(drawn)
        return replace(shape, index=next(self._indices), token_ids=drawn, conversation="")


def _shape_of(request: TokenRequest) -> tuple[int, int, int]:
    return len(request.token_ids), request.max_output_tokens, request.min_output_tokens


# Traffic

# The longest single wait for an arrival, so that a change made meanwhile by another thread of the engine is seen.
MAX_WAIT_S = 0.5


def measure_traffic(
    engine: Engine, requests: Sequence[TokenRequest], plan: TrafficPlan, clock: Clock, report: Callable[[int], None]
) -> MeasuredWindow:
    """The window of steady traffic, opened and closed under load."""
    # Requests arrive from the start; the window opens once as many were completed as were ever there at the same time
    # (one turnover), at the latest after `ramp_limit_s`. It lasts `min_window_s` and as long as it takes to offer (open
    # loop) or answer (closed loop) as many requests as there are prompts. Then nothing more is handed out, and what the
    # engine is working on is finished. `report` gets the number of requests completed so far. Raises EngineError: the
    # engine failed, or answered a request twice, or one that it did not have.
    if isinstance(engine, Driven):
        return _driven_window(engine.drive(requests, plan, report), requests, plan)
    queue = TrafficQueue(requests, plan, clock, report)
    engine.serve(queue)
    engine.synchronize()
    return queue.close()


def serve_all(engine: Engine, requests: Sequence[TokenRequest]) -> list[Completion]:
    """The completions of requests that are all there from the start, served as traffic is."""
    queue = PreparedQueue(requests)
    engine.serve(queue)
    return queue.completions


def _driven_window(drive: Drive, requests: Sequence[TokenRequest], plan: TrafficPlan) -> MeasuredWindow:
    answered, unanswered = [], []
    for item in drive.arrivals:
        input_tok, completion = len(requests[item.prompt].token_ids), item.completion
        if completion is None:
            unanswered.append(Request(item.prompt, input_tok, arrived_ns=item.arrived_ns, error=item.error))
        else:
            check_completion(completion)
            found = as_request(item.prompt, input_tok, item.arrived_ns, completion)
            answered.append(Answer(found, completion.output_ids, completion.text))
    turned = () if drive.has_turned_over else (Reason.of("ramp_cut_short", ramp_s=plan.ramp_limit_s),)
    return _window(plan, (drive.opened_ns, drive.closed_ns), len(requests), answered, unanswered, turned)


def _window(
    plan: TrafficPlan,
    edges_ns: tuple[int, int],
    prompts: int,
    answered: Sequence[Answer],
    unanswered: Sequence[Request],
    warnings: Sequence[Reason],
) -> MeasuredWindow:
    is_untimed = any(
        it.request.is_good and it.request.output_tok and it.request.token_times_ns is None for it in answered
    )
    window = MeasuredWindow(
        traffic_mode=plan.mode,
        opened_ns=edges_ns[0],
        closed_ns=edges_ns[1],
        prompts=prompts,
        requests=(*(item.request for item in answered), *unanswered),
        burstiness=plan.burstiness if plan.mode == "poisson" else 1.0,
    )
    outputs = (item for item in answered if item.request.is_good)
    counting = tuple(item for item in outputs if window.is_inside(item.request.finished_ns))
    untimed = (Reason.of("tokens_untimed"),) if is_untimed else ()
    return replace(window, outputs=counting, warnings=(*warnings, *untimed, *load_warnings(window)))


class PreparedQueue:
    def __init__(self, requests: Sequence[TokenRequest]) -> None:
        self.completions: list[Completion] = []
        self._lock = threading.Lock()
        self._waiting = deque(requests)

    def take(self, limit: int) -> tuple[TokenRequest, ...]:
        with self._lock:
            return tuple(self._waiting.popleft() for _ in range(min(limit, len(self._waiting))))

    def complete(self, completion: Completion) -> None:
        with self._lock:
            self.completions.append(completion)


class TrafficQueue:
    def __init__(
        self, requests: Sequence[TokenRequest], plan: TrafficPlan, clock: Clock, report: Callable[[int], None]
    ) -> None:
        self._prompts = tuple(requests)
        self._plan = plan
        self._clock = clock
        self._report = report
        self._changed = threading.Condition()
        self._arrived_ns: list[int] = []  # by the index of the request
        self._waiting: deque[TokenRequest] = deque()
        self._in_flight: dict[int, TokenRequest] = {}
        self._answered: list[Answer] = []  # also before the opening and after the closing
        begin_ns = clock.monotonic_ns()
        self._rule = WindowRule(plan, len(self._prompts), begin_ns)
        if not plan.is_open:
            for _ in range(plan.concurrency):
                self._arrive(begin_ns)

    def take(self, limit: int) -> tuple[TokenRequest, ...]:
        """Up to `limit` requests that have arrived; waits for the first; () once the window has closed."""
        with self._changed:
            while True:
                now_ns = self._clock.monotonic_ns()
                self._advance(now_ns)
                if self._rule.is_over(now_ns):
                    return ()
                if self._waiting:
                    taken = [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
                    self._in_flight.update((request.index, request) for request in taken)
                    return tuple(taken)
                self._wait(now_ns)

    def complete(self, completion: Completion) -> None:
        """Take a finished or failed request back; EngineError for one that it does not have, or impossible times."""
        check_completion(completion)
        with self._changed:
            index = completion.index
            request = self._in_flight.pop(index, None)
            if request is None:
                raise EngineError(f"the backend answered request {index}, which it did not have")
            input_tok, arrived_ns = len(request.token_ids), self._arrived_ns[index]
            found = as_request(index % len(self._prompts), input_tok, arrived_ns, completion)
            self._answered.append(Answer(found, completion.output_ids))
            self._rule.answer(completion.finished_ns, is_good=completion.error is None)
            answered = len(self._answered)
            now_ns = self._clock.monotonic_ns()
            self._advance(now_ns)
            if not self._plan.is_open and not self._rule.is_over(now_ns):
                self._arrive(now_ns)
            self._changed.notify_all()
        self._report(answered)

    def close(self) -> MeasuredWindow:
        """The window, once the engine has stopped serving. Raises EngineError: it stopped while the window was open."""
        with self._changed:
            opened_ns, closed_ns = self._rule.opened_ns, self._rule.closed_ns
            if opened_ns is None or closed_ns is None or not self._rule.is_over(self._clock.monotonic_ns()):
                raise EngineError("the backend stopped serving before the window closed")
            return self._add_up(opened_ns, closed_ns)

    def _add_up(self, opened_ns: int, closed_ns: int) -> MeasuredWindow:
        unanswered = [
            self._unanswered(request, f"request {request.index}: the backend gave no answer")
            for request in self._in_flight.values()
        ]
        unanswered += [self._unanswered(request, None) for request in self._waiting]
        turned = [] if self._rule.has_turned_over else [Reason.of("ramp_cut_short", ramp_s=self._plan.ramp_limit_s)]
        return _window(self._plan, (opened_ns, closed_ns), len(self._prompts), self._answered, unanswered, turned)

    def _unanswered(self, request: TokenRequest, error: str | None) -> Request:
        arrived_ns, number = self._arrived_ns[request.index], request.index % len(self._prompts)
        return Request(number, len(request.token_ids), arrived_ns=arrived_ns, error=error)

    def _advance(self, now_ns: int) -> None:
        for arrived_ns in self._rule.arrivals(now_ns):
            self._arrive(arrived_ns)
        self._rule.advance(now_ns)

    def _arrive(self, arrived_ns: int) -> None:
        index = len(self._arrived_ns)
        self._arrived_ns.append(arrived_ns)
        self._waiting.append(replace(self._prompts[index % len(self._prompts)], index=index))
        self._rule.arrive(len(self._waiting) + len(self._in_flight))

    def _wait(self, now_ns: int) -> None:
        if not self._plan.is_open:
            self._changed.wait(MAX_WAIT_S)  # for a completion, which another thread of the engine hands in
            return
        self._changed.release()
        try:
            self._clock.sleep(min(seconds_between(now_ns, self._rule.next_ns), MAX_WAIT_S))
        finally:
            self._changed.acquire()
