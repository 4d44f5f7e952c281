"""Rows of data files as documents: plain text, or a conversation rendered with the model's chat template.

The fields are those that fine-tuning data sets use:

===================================== ============================================================================
``text``                              plain text
``messages``                          ``[{"role": ..., "content": ...}, ...]``
``conversations``                     the same, or ``[{"from": "human" | "gpt" | ..., "value": ...}, ...]``
``prompt`` with ``completion``        two strings, or two lists of messages; also ``response`` or ``chosen``
``instruction`` with ``output``       strings; ``input`` is appended to the instruction if it is not empty; also
                                      ``response``
``question`` with ``answer``          strings
===================================== ============================================================================

A calibrated model sees its users' conversations as its template renders them. Rejected: joining the messages' texts
without the template, which no model has seen in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowbit.data.files import Row
from lowbit.errors import LowbitError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Message = dict[str, Any]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant"}
ROLES |= {"bing": "assistant", "model": "assistant", "assistant": "assistant", "system": "system", "tool": "tool"}
PAIRS = (
    ("prompt", ("completion", "response", "chosen")),
    ("instruction", ("output", "response")),
    ("question", ("answer",)),
)
_IN_PAIRS = dict.fromkeys(name for first, seconds in PAIRS for name in (first, *seconds))
FIELDS = ("text", "messages", "conversations", "system", "input", "tools", *_IN_PAIRS)
ALLOWED = "a 'text', or a conversation: 'messages', 'conversations', " + ", ".join(
    f"'{first}' with '{seconds[0]}'" for first, seconds in PAIRS
)


@dataclass(frozen=True)
class Document:
    """A document of a data file; ``chat`` if it is a rendered conversation."""

    text: str
    chat: bool


def documents(rows: Iterator[Row], tokenizer: Tokenizer) -> Iterator[Document]:
    """The documents of rows; raises ``LowbitError`` with the place of a row that is none, or of another kind."""
    kind: bool | None = None
    for row in rows:
        document = _document(row, tokenizer)
        if kind is not None and document.chat != kind:
            raise LowbitError(f"{row.where}: text and conversations are mixed: give them as two files")
        kind = document.chat
        yield document


def _document(row: Row, tokenizer: Tokenizer) -> Document:
    content = row.content
    if not isinstance(content, Mapping):
        raise LowbitError(f"{row.where} is not a JSON object with {ALLOWED}: fix or remove it")
    if isinstance(content.get("text"), str):
        return Document(content["text"], False)
    messages = _messages(content, row.where)
    if messages is None:
        raise LowbitError(f"{row.where} is not a JSON object with {ALLOWED}: fix or remove it")
    return Document(render(messages, tokenizer, row.where, content.get("tools") or None), True)


def _messages(content: Mapping[str, Any], where: str) -> list[Message] | None:
    """The conversation in a row; ``None`` if it has none of the fields."""
    system: list[Message] = []
    if isinstance(content.get("system"), str) and content["system"].strip():
        system = [{"role": "system", "content": content["system"]}]
    for field in ("messages", "conversations"):
        if content.get(field) is not None:
            return system + _turns(content[field], f"{where}, '{field}'")
    for first, seconds in PAIRS:
        second = next((name for name in seconds if content.get(name) is not None), None)
        if content.get(first) is None or second is None:
            continue
        question, answer = content[first], content[second]
        extra = content.get("input") if first == "instruction" else None
        if isinstance(extra, str) and extra.strip() and isinstance(question, str):
            question = f"{question}\n\n{extra}"
        sides = (("user", question, first), ("assistant", answer, second))
        return system + [turn for role, side, name in sides for turn in _side(role, side, f"{where}, '{name}'")]
    return None


def _side(role: str, side: Any, where: str) -> list[Message]:
    """One side of a pair: a string, or a list of messages."""
    return [{"role": role, "content": side}] if isinstance(side, str) else _turns(side, where)


def _turns(turns: Any, where: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise LowbitError(f"{where} is not a list of messages: fix or remove the row")
    out: list[Message] = []
    for turn in turns:
        role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
        if not isinstance(role, str):
            raise LowbitError(f"{where}: a message is no object with 'role' and 'content': fix or remove the row")
        text = turn.get("content", turn.get("value"))
        message = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
        out.append({**message, "role": ROLES.get(role.lower(), role), "content": _text(text, where, turn)})
    return out


def _text(content: Any, where: str, turn: Mapping[str, Any]) -> str:
    """A message's text; a list of parts is joined, parts other than text are refused."""
    if isinstance(content, str):
        return content
    if content is None and turn.get("tool_calls"):
        return ""
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise LowbitError(f"{where}: a message's content is not text, which is all that is read: remove the row")
    return "".join(text for text in texts if text is not None)


# Templates that put today's date into the system message would give other tokens every day, and a run that goes on
# tomorrow other data: they get this one.
NO_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{%- if format == '%Y-%m-%d' -%}2024-07-26{%- else -%}26 Jul 2024{%- endif -%}"
    "{%- endmacro -%}"
)


def render(messages: list[Message], tokenizer: Tokenizer, where: str, tools: Any = None) -> str:
    """A conversation as the model's chat template renders it."""
    if not tokenizer.chat_template:
        raise LowbitError(
            f"{where} is a conversation, and the tokenizer has no chat template: add the model's "
            "chat_template.jinja to its folder, or give plain text"
        )
    apply: Callable[..., Any] = tokenizer.apply_chat_template
    try:
        template = tokenizer.get_chat_template(tools=tools)
        if "strftime_now" in template:
            template = NO_CLOCK + template
        return str(apply(messages, tools=tools, tokenize=False, chat_template=template))
    except Exception as error:  # templates are programs: they raise whatever they like
        reason = one_line(error)
        raise LowbitError(
            f"{where}: the chat template refuses this conversation ({reason}): remove the row"
        ) from error
