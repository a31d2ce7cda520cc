"""The prompt in a row of a file or data set, in each of the shapes that people have."""

from __future__ import annotations

import contextlib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lem.base.dataclass import dataclass, field, replace

# Of a conversation: `role` (system, user, assistant or tool) and `content`, which is text, or None beside `tool_calls`;
# `name` and `tool_call_id` where they are given. The arguments of a call are an object, as chat templates expect.
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    prompt: str  # of a conversation the texts of its messages, with blank lines between them
    input_tokens: int | None = None  # exact length in tokens to cut or extend it to; None leaves it as it is
    output_tokens: int | None = None  # bound on the tokens to generate for it; None takes the experiment's
    messages: tuple[Message, ...] = ()  # a conversation up to the turn to generate, for a chat template; () for a text
    tools: tuple[Mapping[str, Any], ...] = ()  # what the conversation may call, as the API of OpenAI writes it
    taken_from: str | None = field(default=None, compare=False)  # the column and the turns, for the record


def as_json(prompt: Prompt) -> dict[str, Any]:
    tools = {"tools": prompt.tools} if prompt.tools else {}
    contents = {"messages": prompt.messages, **tools} if prompt.messages else {"prompt": prompt.prompt}
    bounds = {"input_tokens": prompt.input_tokens, "output_tokens": prompt.output_tokens}
    return {**contents, **bounds, **({"taken_from": prompt.taken_from} if prompt.taken_from else {})}


# Looked for in this order when no column is named, and what completes the text of some of them.
TEXT_COLUMNS = (
    *("prompt", "messages", "conversations", "conversation", "turns", "instruction", "question", "text", "input"),
    *("query", "content"),
)
_COMPLETED_BY: Mapping[str, tuple[str, ...]] = {"instruction": ("input", "context"), "question": ("choices", "options")}
_ANSWERS = ("output", "response", "answer", "completion", "solution", "target")
ROWS_TO_LOOK_AT = 20  # to see which columns hold the answer
_LISTS = ("messages", "conversations", "conversation", "turns")
# The roles of messages, by the names that data sets give them.
_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "function": "tool",
}


def json_of(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def usable_columns(rows: Iterable[Any]) -> tuple[str, ...]:
    records = [row for row in rows if isinstance(row, Mapping)]

    def is_full(name: str, answer: str) -> bool:
        pairs = ((record.get(name), record.get(answer)) for record in records)
        texts = [(text.strip(), end.strip()) for text, end in pairs if isinstance(text, str) and isinstance(end, str)]
        ends = [text.endswith(end) for text, end in texts if text and end]
        return bool(ends) and all(ends)

    return tuple(name for name in TEXT_COLUMNS if not any(is_full(name, answer) for answer in _ANSWERS))


def prompt_of_record(record: Any, columns: Sequence[str] = (), usual: Sequence[str] = TEXT_COLUMNS) -> Prompt:
    """The prompt in a text, or in the named or usual columns of an object; ValueError says what was expected."""
    if isinstance(record, str):
        return Prompt(_some_text(record, "prompt"))
    if not isinstance(record, Mapping):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    body = record.get("body")
    if isinstance(body, Mapping) and "custom_id" in record:
        limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        return replace(prompt_of_record(body, columns, usual), output_tokens=bound_of(body, limit))
    column = next((name for name in columns[:1] or usual if record.get(name) is not None), None)
    if column is None:
        full = [] if columns else [name for name in TEXT_COLUMNS if record.get(name) is not None]
        got = [f"{name!r}{', which ends with the answer' if name in full else ''}" for name in record]
        raise ValueError(f"expected 'prompt', 'text' or 'messages', got {', '.join(got) or 'no keys'}")
    found = _prompt_of_value(column, record[column])
    if found.messages:
        return _with_tools(found, _list_of(record, "tools"))
    role = _ROLES.get(str(record.get("role")), "user")
    if role != "user":
        raise ValueError(f"a turn of the {role}, not a prompt")
    names = columns[1:] if columns else _COMPLETED_BY.get(column, ())
    added = {name: text for name in names if (text := _added_text(name, record.get(name)))}
    texts, places = (found.prompt, *added.values()), (found.taken_from or column, *added)
    return replace(found, prompt="\n\n".join(texts), taken_from=", ".join(places))


def _added_text(name: str, value: Any) -> str:
    labels: Sequence[Any] = string.ascii_uppercase
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label") or labels
    if isinstance(value, list):
        choices = [_some_text(item, f"item of {name}") for item in value]
        if len(labels) < len(choices):
            raise ValueError(f"{name}: {len(choices)} choices, {len(labels)} labels")
        return "\n".join(f"{label}. {item}" for label, item in zip(labels, choices, strict=False))
    return "" if value is None else _some_text(value, name, may_be_blank=True).strip()


def _with_tools(found: Prompt, tools: Sequence[Mapping[str, Any]]) -> Prompt:
    found = replace(found, tools=tuple(tools))
    line = as_json(found)
    try:
        json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"messages: not JSON in Unicode: {error}") from error
    return found


def _prompt_of_value(column: str, value: Any) -> Prompt:
    """Of ShareGPT's `conversations` the first human turn, of MT-Bench's `turns` the first, and messages as such."""
    if column in _LISTS[:-1]:
        value = _decoded(value)
        if isinstance(value, Mapping) and all(isinstance(item, list) for item in value.values()):
            # A `Sequence` of objects, which `datasets` gives as an object of lists.
            value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        if column in _LISTS:
            raise ValueError(f"{column}: expected a list, got {type(value).__name__}")
        return Prompt(_some_text(value, column), taken_from=column)
    if value and all(isinstance(item, str) for item in value) and column in _LISTS[1:]:
        return Prompt(_some_text(value[0], "first turn"), taken_from=f"{column}, first turn")
    if not value or not all(isinstance(item, Mapping) for item in value):
        raise ValueError(f"{column}: expected text, or a list of messages with role and content")
    if column != "conversations" and "from" not in value[0]:
        return prompt_of_messages(value, column)
    for turn in value:
        if turn.get("from", turn.get("role")) in ("human", "user"):
            text = _some_text(turn.get("value", turn.get("content")), "first human turn")
            return Prompt(text, taken_from=f"{column}, first human turn")
    raise ValueError(f"{column}: no human turn")


def prompt_of_messages(given: Sequence[Mapping[str, Any]], column: str = "messages") -> Prompt:
    """A conversation up to its last turn of the user or of a tool; ValueError without one of the user."""
    messages = [_message(item) for item in given]
    roles = [item["role"] for item in messages]
    if "user" not in roles:
        raise ValueError(f"{column}: no message with the role 'user'")
    end = max(index for index, role in enumerate(roles) if role in ("user", "tool"))
    text = "\n\n".join(item["content"] for item in messages[: end + 1] if item["content"])
    return Prompt(text, messages=tuple(messages[: end + 1]), taken_from=f"{column}, up to the last {roles[end]} turn")


def _message(given: Mapping[str, Any]) -> Message:
    role = _ROLES.get(str(given.get("role")))
    if role is None:
        raise ValueError(f"expected a role of {', '.join(_ROLES)}, got {given.get('role')!r}")
    calls = [_tool_call(item) for item in _list_of(given, "tool_calls")]
    content = given.get("content")
    if isinstance(content, list):
        content = "\n".join(map(_text_of_part, content))
    is_user = role == "user"
    if content is not None or not calls or is_user:
        content = _some_text(content, f"content of the {role} message", may_be_blank=not is_user)
    known = {name: given[name] for name in ("name", "tool_call_id") if given.get(name) is not None}
    return {"role": role, "content": content, **known, **({"tool_calls": calls} if calls else {})}


def _text_of_part(part: Any) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in ("text", "input_text"):
        raise ValueError(f"expected a content part of type text, got {kind}")
    return _some_text(part.get("text"), "content part", may_be_blank=True)


def _tool_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise ValueError("tool_calls: expected objects with 'function'")
    return {**call, "function": {**function, "arguments": _decoded(function.get("arguments"))}}


def _list_of(given: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    found = _decoded(given.get(name) or [])
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise ValueError(f"{name}: expected a list of objects")
    return found


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, str) and value.startswith(("[", "{")):
        with contextlib.suppress(ValueError):
            return json_of(value)
    return value


def bound_of(record: Mapping[str, Any], key: str) -> int | None:
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key}: expected an integer of at least 1, got {value!r}")
    return value


def _some_text(value: Any, what: str, *, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what}: expected text, got {type(value).__name__}")
    if not value.strip() and not may_be_blank:
        raise ValueError(f"the {what} is blank")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"the {what} contains half of a surrogate pair")
    return value
