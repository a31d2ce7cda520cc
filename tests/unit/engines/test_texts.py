"""Special tokens and chat templates, on tokenizers of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from examples import make_demo_model
from lem.base.errors import EngineError
from lem.engines.texts import TextSession

pytestmark = [pytest.mark.needs("transformers"), pytest.mark.needs("torch")]

PAD, BEGIN, END = range(3)
CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}<{{ message.role }}>{{ message.content | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITH_TOOLS = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{% for message in messages %}"
    "<{{ message.role }}>{{ message.content or '' }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}<assistant>"
)
# As models that take images have it: contents are lists of parts.
IN_PARTS = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


class Texts(TextSession):
    def __init__(self, tokenizer: Any, known_ids: int | None = None) -> None:
        self._tokenizer, self._known_ids = tokenizer, known_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_demo_model.save_tokenizer(folder, make_demo_model.SHAPES["tiny"])
    return folder


def texts(folder: Path, *, around: str = "", template: str | None = None) -> Texts:
    """The tokenizer of the demo with another post-processor (`<s> $A </s>`), and a chat template."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    if around:
        specials = [(word, tokenizer.convert_tokens_to_ids(word)) for word in set(around.split()) - {"$A"}]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=specials)
    return Texts(tokenizer)


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * len(contents)
    made = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return made if system is None else [{"role": "system", "content": system}, *made]


def refusal(there: Texts, messages: Sequence[dict[str, Any]], template: str) -> EngineError:
    with pytest.raises(EngineError) as caught:
        there.render(messages, (), template)
    assert caught.value.is_permanent
    return caught.value


@pytest.mark.parametrize(
    ("around", "begin", "end"),
    [("", [BEGIN], []), ("$A", [], []), ("<s> $A </s>", [BEGIN], [END]), ("<pad> <s> $A", [PAD, BEGIN], [])],
)
def test_what_the_tokenizer_puts_in_front_of_a_text_is_there_once(
    folder: Path, around: str, begin: list[int], end: list[int]
) -> None:
    there = texts(folder, around=around)
    body = there.encode("The sea.", is_whole=False)
    assert not {PAD, BEGIN, END} & set(body)
    assert there.encode("The sea.") == [*begin, *body, *end]
    written = "".join(["<pad>", "<s>"][token] for token in begin)
    assert there.encode(f"{written}The sea.") == [*begin, *body, *end]
    assert there.encode(f"{written}The sea.", is_whole=False) == [*begin, *body]


def test_a_begin_of_sequence_within_a_text_stays(folder: Path) -> None:
    there = texts(folder)
    sea = there.encode("sea", is_whole=False)
    assert there.encode("<s>sea<s>sea") == [BEGIN, *sea, BEGIN, *sea]


def test_an_id_that_the_model_does_not_have_is_an_error_of_the_model(folder: Path) -> None:
    with pytest.raises(EngineError, match="only has ids below 3") as caught:
        Texts(texts(folder)._tokenizer, 3).encode("The sea.")
    assert caught.value.kind == "model"


def test_a_conversation_is_rendered_up_to_the_answer_and_begins_once(folder: Path) -> None:
    there = texts(folder, template=CHAT)
    template = there.chat_template(None, has_tools=False)
    assert template == CHAT
    parts = there.render(turns("hi", "yo", " go on "), (), template)
    assert parts == ("<s><user>hi\n<assistant>yo\n<user>", "go on", "\n<assistant>")
    assert there.encode("".join(parts), is_whole=False).count(BEGIN) == 1


def test_a_given_template_is_used_instead_of_the_models_own(folder: Path) -> None:
    there = texts(folder, template=CHAT)
    template = there.chat_template(WITH_TOOLS, has_tools=False)
    assert "".join(there.render(turns("hi", system="be kind"), (), template)) == "<system>be kind<user>hi<assistant>"


@pytest.mark.parametrize("turn", ["a", "user", "assistant", "\n", "bos"])
def test_a_turn_that_is_also_in_the_template_is_found(folder: Path, turn: str) -> None:
    there, question = texts(folder), f"why {turn}"
    assert there.render(turns(turn), (), WITH_TOOLS) == ("<user>", turn, "<assistant>")
    assert there.render(turns(question, "a", turn), (), IN_PARTS) == (f"<user>{question}<assistant>a<user>", turn, "")


def test_tools_and_calls_without_content_are_rendered(folder: Path) -> None:
    there = texts(folder)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Kiel"}}}
    asked = [
        *turns("Is it windy?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5 m/s"},
    ]
    assert "".join(there.render(asked, (TOOL,), WITH_TOOLS)) == (
        '[weather]<user>Is it windy?<assistant>{"town": "Kiel"}<tool>5 m/s<assistant>'
    )


def test_of_several_templates_the_one_for_tools_is_used_with_tools(folder: Path) -> None:
    there = texts(folder)
    there._tokenizer.chat_template = {"default": CHAT, "tool_use": WITH_TOOLS}
    assert there.chat_template(None, has_tools=False) == CHAT
    assert there.chat_template(None, has_tools=True) == WITH_TOOLS


def test_a_template_that_only_knows_parts_gets_the_text_as_a_part(folder: Path) -> None:
    there = texts(folder)
    assert "".join(there.render(turns("hi", system="be kind"), (), IN_PARTS)) == "<system>be kind<user>hi"


def test_a_template_that_writes_contents_as_json_keeps_the_turn(folder: Path) -> None:
    rendered = texts(folder).render(turns('say "hi"'), (), "{{ messages[0].content | tojson }}!")
    assert rendered == ('"', 'say \\"hi\\"', '"!')


@pytest.mark.parametrize(
    ("messages", "template", "words"),
    [
        (turns("hi", system="be kind"), CHAT, "System role not supported"),
        (turns("hi"), "{{ messages[0].missing.more }}", "has no attribute"),
        (turns("hi"), "{% for %}", "Expected an expression"),
        (turns("hi"), "always the same", "leaves out the last turn of the user"),
    ],
)
def test_a_template_that_refuses_is_an_error_with_its_own_words(
    folder: Path, messages: list[dict[str, Any]], template: str, words: str
) -> None:
    error = refusal(texts(folder), messages, template)
    assert error.kind == "prompts"
    assert words in error.message


def test_a_model_without_a_template_is_an_error_with_the_remedy(folder: Path) -> None:
    there = texts(folder)
    with pytest.raises(EngineError, match=r"has no chat template$") as caught:
        there.chat_template(None, has_tools=False)
    assert (caught.value.kind, caught.value.is_permanent) == ("model", True)
    there._tokenizer.chat_template = {"tool_use": WITH_TOOLS}
    with pytest.raises(EngineError, match=r"^chat_template: model: .*tool_use"):
        there.chat_template(None, has_tools=False)
    assert caught.value.hint == "set chat_template to a Jinja file, or to none"
