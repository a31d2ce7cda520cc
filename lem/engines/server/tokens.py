"""Tokens of a served engine: whose tokenizer there is, and what a reply says about its tokens."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lem.base import durable
from lem.base.errors import EngineError, OptionRefused
from lem.base.variables import TOKEN_VARIABLE
from lem.config.experiment import ExperimentConfig
from lem.engines import common
from lem.engines.common import shortened
from lem.engines.protocol import Completion
from lem.engines.server.client import Reply
from lem.engines.server.running import Address
from lem.engines.server.stream import number_of

SERVER, TRANSFORMERS, PIECES = "server", "transformers", "pieces"


class ServerTokenizer:
    """The tokenizer of the server, asked for each text."""

    def __init__(self, address: Address, fields: tuple[str, str], model: str) -> None:
        self._address = address
        self._text, self._special = fields
        self._model = model

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        found = self._ask("/tokenize", "tokens", {self._text: text, self._special: add_special_tokens})
        if not isinstance(found, list) or not all(type(item) is int for item in found):
            raise EngineError("the server gives no list of token ids at /tokenize")
        return found

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:  # noqa: ARG002
        return str(self._ask("/detokenize", self._text, {"tokens": list(token_ids)})) if token_ids else ""

    def _ask(self, path: str, field: str, body: Mapping[str, Any]) -> Any:
        try:
            found = self._address.read(path, {"model": self._model, **body})
        except OSError as error:
            raise EngineError(f"the server does not answer at {path}: {shortened(error)}") from error
        if not isinstance(found, dict) or field not in found:
            raise EngineError(f"the server gives no {field} at {path}")
        return found[field]


class Pieces:
    """Words and parts of words in place of tokens, for a server that takes text and whose tokenizer is unknown."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._pieces: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:  # noqa: ARG002
        pieces = re.findall(r"\s?\S{1,5}|\s", text)
        for piece in pieces:
            if piece not in self._ids:
                self._ids[piece] = len(self._pieces)
                self._pieces.append(piece)
        return [self._ids[piece] for piece in pieces]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:  # noqa: ARG002
        return "".join(self._pieces[number] for number in token_ids)


def find_tokenizer(
    config: ExperimentConfig, address: Address, fields: tuple[str, str] | None, model: str, secrets: Mapping[str, str]
) -> tuple[str, Any]:
    """Whose tokenizer it is, and the tokenizer: the server's own, that of transformers, or pieces of text.

    Raises OptionRefused, EngineError: what the experiment asks for needs a tokenizer that is not there.
    """
    needs_template = config.is_templated and not config.is_chat
    if fields is not None and config.model.tokenizer is None and not needs_template:
        return SERVER, ServerTokenizer(address, fields, model)
    option = "model.tokenizer" if config.model.tokenizer is not None else "chat_template" if needs_template else None
    name = config.model.tokenizer or config.model.name
    if importlib.util.find_spec("transformers") is None:
        if option is not None:
            text = f"{option}: requires transformers in the Python of the worker"
            raise OptionRefused(text, "install it, or set server.api: chat")
        return PIECES, Pieces()
    from transformers import AutoTokenizer

    try:
        with common.engine_call(Exception):
            folder = os.fspath(durable.in_home(name))
            return TRANSFORMERS, AutoTokenizer.from_pretrained(folder, token=secrets.get(TOKEN_VARIABLE) or None)
    except common.EngineRaised as raised:
        if option is not None:
            text = f"{option}: no tokenizer of {name}: {shortened(raised.error)}"
            raise common.model_error(text, "set model.tokenizer") from raised
        return PIECES, Pieces()


def completion_of(index: int, reply: Reply, begin_ns: int) -> Completion:
    """What a reply says; a request that failed before it was sent failed at `begin_ns`."""
    sent_ns = begin_ns if reply.sent_ns is None else reply.sent_ns
    ids = tuple(number for chunk in reply.ids or () for number in chunk)
    tok = reply.output_tok
    return Completion(
        index,
        ids if len(ids) == tok else (),  # some of the ids are worth nothing
        sent_ns,
        max(sent_ns, reply.finished_ns or 0),
        token_times(reply.times_ns, [len(chunk) for chunk in reply.ids or ()], tok),
        None if reply.error is None else reply.error.text,
        input_tok=number_of(reply.usage, "prompt_tokens"),
        counted_tok=tok,
        text=None if reply.texts is None else "".join(reply.texts),
    )


def token_times(chunks_ns: Sequence[int], held_tok: Sequence[int], tok: int) -> tuple[int, ...] | None:
    """The time of each token: that of its chunk. Chunks that do not say what they hold have one, the last the rest."""
    if not tok or not chunks_ns:
        return None if tok else ()
    if sum(held_tok) != tok:
        count = min(len(chunks_ns), tok)
        chunks_ns = (*chunks_ns[: count - 1], chunks_ns[-1])
        held_tok = (*[1] * (count - 1), tok - count + 1)
    return tuple(at_ns for at_ns, held in zip(chunks_ns, held_tok, strict=True) for _ in range(held))
