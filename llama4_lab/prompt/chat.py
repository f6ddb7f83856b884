"""Chat messages to token ids in Llama 4's chat format.

A message is ``{"role": ..., "content": ...}``; its content a text, or a list of parts
``{"type": "text", "text": ...}`` and ``{"type": "image"}``. An assistant's message may call tools:
``"tool_calls": [{"function": {"name": ..., "arguments": {...}}}]``. Read
`llama4_lab.prompt.images` next.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from llama4_lab.prompt.tokenizer import (
    END_OF_MESSAGE,
    END_OF_TURN,
    HEADER_END,
    HEADER_START,
    Tokenizer,
)

ROLES = ("system", "user", "assistant", "ipython")  # ipython brings the result of a tool
PICTURE = -1  # stands among the ids where the tokens of a picture will be


class Encoded(NamedTuple):
    """Token ids, the message that each belongs to (-1 for none), and each message's role."""

    ids: list[int]
    message: list[int]
    roles: list[str]


def question(text: str, num_images: int = 0) -> list[dict[str, Any]]:
    """Return the messages of a chat in which a user asks something about so many pictures.

    >>> question("What is this?", 1)
    [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is this?'}]}]
    """
    parts = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Any],
    *,
    add_bos: bool = True,
    open_assistant: bool | None = None,
) -> Encoded:
    """Turn messages into ids; an open header at the end asks the assistant to speak.

    By default the header is written unless the last message is the assistant's own. Special tokens
    in a content are plain text. Ids equal those of transformers' template with three exceptions,
    where Meta's ``chat_format.py`` is followed: the line breaks after a header are tokens of their
    own, a tool call or result ends in ``<|eom|>``, and a tool's result is written without quotes.
    With Llama 3's tokenizer the names of the tokens are its own and the rules are these: nothing is
    trimmed that they do not trim, and no date is put in front, as its templates do.

    Raises:
        TypeError, ValueError: a message that the format cannot express, with its index.
    """
    encoded = Encoded([], [], [])

    def append(ids: list[int], message: int) -> None:
        encoded.ids.extend(ids)
        encoded.message.extend([message] * len(ids))

    if add_bos:
        append([tokenizer.bos_id], -1)
    for idx, message in enumerate(messages):
        role = _role(message, idx)
        encoded.roles.append(role)
        append(_encode_message(tokenizer, role, message, idx), idx)
    if open_assistant is None:
        open_assistant = encoded.roles[-1:] != ["assistant"]
    if open_assistant:
        encoded.roles.append("assistant")
        append(_header(tokenizer, "assistant"), len(messages))
    return encoded


def _role(message: Any, idx: int) -> str:
    is_known = isinstance(message, Mapping) and "role" in message
    if not is_known or not ("content" in message or message.get("tool_calls")):
        raise TypeError(f'message {idx} is {message!r:.80}: give {{"role": ..., "content": ...}}')
    role = "ipython" if message["role"] == "tool" else message["role"]
    if role not in ROLES:
        raise ValueError(
            f"message {idx} has the unknown role {role!r}: possible are {', '.join(ROLES)}"
        )
    return role


def _header(tokenizer: Tokenizer, role: str) -> list[int]:
    return [
        tokenizer.id_of(HEADER_START),
        *tokenizer.encode(role),
        tokenizer.id_of(HEADER_END),
        *tokenizer.encode("\n\n"),
    ]


def _encode_message(
    tokenizer: Tokenizer, role: str, message: Mapping[str, Any], idx: int
) -> list[int]:
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, list | tuple):
        raise ValueError(f"message {idx} has tool_calls {calls!r:.80}: give a list of calls")
    content_of = message.get("content")
    parts = _parts("" if calls and content_of is None else content_of, idx)
    if role == "system" and idx == 0:
        parts = [part and part.strip() for part in parts]
    content: list[int] = []
    for part in parts:
        content += [PICTURE] if part is None else tokenizer.encode(part)
    if calls:
        start, end = tokenizer.id_of("<|python_start|>"), tokenizer.id_of("<|python_end|>")
        content = [start, *content, end]
        content += tokenizer.encode("".join(_call_text(call, idx) for call in calls))
    last = END_OF_MESSAGE if calls or role == "ipython" else END_OF_TURN
    return [*_header(tokenizer, role), *content, tokenizer.id_of(last)]


def _parts(content: Any, idx: int) -> list[str | None]:
    """Split a content into texts and pictures (None); texts in a row are one, as in a template."""
    if isinstance(content, str):
        return [content]
    parts: list[str | None] = []
    for part in content if isinstance(content, list | tuple) else [content]:
        match part:
            case {"type": "image"}:
                parts.append(None)
            case {"type": "text", "text": str(text)}:
                before = parts.pop() if parts and parts[-1] is not None else ""
                parts.append(f"{before}{text}")
            case _:
                raise ValueError(
                    f"message {idx} has the unknown content {part!r:.80}: possible are a text, or "
                    'a list of {"type": "text", "text": ...} and {"type": "image"}'
                )
    return parts


def _call_text(call: Any, idx: int) -> str:
    match call:
        case {"function": {"name": str(name), "arguments": Mapping() as arguments}}:
            given = {"name": name, "parameters": arguments}
            with suppress(TypeError, ValueError):  # what is no JSON
                return json.dumps(given, ensure_ascii=False, allow_nan=False)
    raise ValueError(
        f"message {idx} has the tool call {call!r:.80}: "
        'give {"function": {"name": ..., "arguments": {...}}}, which JSON can write'
    )
