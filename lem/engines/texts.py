"""Text to token ids and back, by the tokenizer of a loaded model: special tokens, chat templates, and lengths."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.base import durable
from lem.base.errors import EngineError, OptionRefused
from lem.config.experiment import ExperimentConfig
from lem.config.sections import SyntheticPrompts
from lem.engines.common import engine_call, extra_of, model_error, raised_as, shortened

_MARK = "\ue000the last turn\ue000"
_OTHER_TEMPLATE = "set chat_template to a Jinja file, or to none"


class TextSession:
    """What every session has: see `Engine`."""

    _tokenizer: Any
    _known_ids: int | None  # the number of token ids of the model; None if it does not say

    def encode(self, text: str, *, is_whole: bool = True) -> list[int]:
        ids = list(self._tokenizer.encode(text, add_special_tokens=is_whole))
        begin = self._beginning if is_whole else []
        if begin and ids[: 2 * len(begin)] == 2 * begin:
            del ids[: len(begin)]  # the text begins with these tokens itself
        if self._known_ids is not None and ids and max(ids) >= self._known_ids:
            text = f"the tokenizer produced id {max(ids)}, but the model only has ids below {self._known_ids}"
            raise model_error(text, "set model.tokenizer to the tokenizer that the model was trained with")
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def chat_template(self, given: str | None, *, has_tools: bool) -> str:
        find = getattr(self._tokenizer, "get_chat_template", None)
        if given is not None:
            return given
        if find is None or not self._tokenizer.chat_template:
            raise model_error("chat_template: model: the tokenizer has no chat template", _OTHER_TEMPLATE)
        with raised_as(_no_template), engine_call(ValueError):
            return str(find(tools=[{}] if has_tools else None))

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], template: str
    ) -> tuple[str, str, str]:
        refusal = None
        last = max(index for index, item in enumerate(messages) if item["role"] == "user")
        asked = str(messages[last]["content"]).strip()
        # To find a turn such as `a`, which the template itself contains, too.
        marked = [{**item, "content": _MARK} if index == last else item for index, item in enumerate(messages)]
        # Templates of models that take images may only know contents in parts.
        for in_shape in (dict, _in_parts):
            try:
                with raised_as(_refused), engine_call(Exception):
                    text, other = (
                        str(
                            self._tokenizer.apply_chat_template(
                                [in_shape(message) for message in given],
                                tools=[dict(tool) for tool in tools] or None,
                                chat_template=template,
                                add_generation_prompt=True,
                                tokenize=False,
                            )
                        )
                        for given in (messages, marked)
                    )
            except EngineError as error:
                refusal = refusal or error
                continue
            head, found, tail = other.partition(_MARK)
            if found and len(head) + len(tail) < len(text) and text.startswith(head) and text.endswith(tail):
                return head, text[len(head) : len(text) - len(tail)], tail
            for form in (asked, json.dumps(asked, ensure_ascii=False)[1:-1]) if found else ():
                if form in text:  # in another place than the mark
                    return text.rpartition(form)
        raise refusal or _refused("it leaves out the last turn of the user")

    @functools.cached_property
    def _beginning(self) -> list[int]:
        """The tokens that the tokenizer puts in front of every text."""
        whole, bare = (list(self._tokenizer.encode("a", add_special_tokens=is_whole)) for is_whole in (True, False))
        ends = (end for end in range(len(whole)) if bare and whole[end : end + len(bare)] == bare)
        return whole[: next(ends, 0)]


def sure_lengths(config: ExperimentConfig) -> dict[str, int]:
    """The tokens that an engine needs room for in any case, by the options that ask for them."""
    prompts = config.prompts
    given = getattr(config.section, "max_model_len", None)
    if given is not None:
        return {"vllm.max_model_len": given}
    if config.backend == "vllm":
        return {"max_input_tokens": config.max_input_tokens, "max_output_tokens": config.max_output_tokens}
    if isinstance(prompts, SyntheticPrompts) and prompts.distribution == "fixed" and prompts.output_tokens is None:
        return {"prompts.input_tokens": prompts.input_tokens, "max_output_tokens": config.max_output_tokens}
    return {}


def allows_more(config: ExperimentConfig) -> bool:
    is_forced = os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "").strip().lower() in ("1", "true")
    return config.backend == "vllm" and (is_forced or "hf_overrides" in extra_of(config))


def check_lengths(config: ExperimentConfig, folder: Path) -> None:
    """Raise OptionRefused for lengths that the model has no positions for; an unreadable model shows at the load."""
    try:
        shape = durable.read_json(folder / "config.json")
    except (OSError, ValueError):
        return
    shape = shape if isinstance(shape, dict) else {}
    text = nested if isinstance(nested := shape.get("text_config"), dict) else shape
    # vLLM multiplies positions by the factor of the rope.
    ropes = (text.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    is_stretched = any("factor" in rope for rope in ropes if isinstance(rope, dict))
    positions = next((text[name] for name in ("max_position_embeddings", "n_positions") if name in text), None)
    if not isinstance(positions, int) or positions <= 0 or is_stretched or allows_more(config):
        return
    if sum(sure_lengths(config).values()) > positions:
        raise too_long(config, positions)


def too_long(config: ExperimentConfig, most: float) -> OptionRefused:
    asked = sure_lengths(config)
    listed = " and ".join(f"{name}: {value}" for name, value in asked.items())
    what = f"{listed}: {sum(asked.values())} tokens exceed the {most:g} positions of the model"
    return OptionRefused(what, f"lower {' or '.join(asked)}: together at most {most:g}")


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    text = message["content"]
    return {**message, "content": [] if text is None else [{"type": "text", "text": text}]}


def _no_template(error: BaseException) -> EngineError:
    """Of several templates, none is the default one."""
    return model_error(f"chat_template: model: {shortened(error)}", _OTHER_TEMPLATE)


def _refused(error: BaseException | str) -> EngineError:
    if isinstance(error, ImportError):
        return EngineError(f"chat_template: {shortened(error)}", "install the missing package", is_permanent=True)
    hint = "change the conversation, or the template: the reason is the template's own"
    return EngineError(f"the chat template refuses it: {shortened(error)}", hint, kind="prompts", is_permanent=True)
