"""A row of a data set: its name in messages, its conversation, checked, and the error that says what is wrong."""

import re
from typing import Any

CONVERT = "`latent_trl.data.formats.convert_row`"
IMAGE_COLUMNS = ("images", "image")
# The place of an image in the texts of other formats.
PLACEHOLDER = "<image>"
# The same in the texts of many models, such as <|image_pad|>, <|image_1|>, <img> and [IMG].
PLACES = re.compile(r"<\|?(?:start_of_)?(?:image|img|vision)[\w ]*\|?>|\[IMG\]", re.IGNORECASE)
# Under which a row that could not be read keeps the reason, until it is used.
UNREADABLE = "_unreadable"
# Columns of what is not read. A row that has some would be learned without it.
OTHER_MEDIA = ("video", "videos", "audio", "audios")
# How formats say of a message that it is not to be learned: OpenAI's, ms-swift's, axolotl's.
LEARNED_KEYS = ("weight", "loss", "train")


class RowError(ValueError):
    """A row of a data set that cannot be used. Says which, what was found, and what works."""


def row_name(row: dict[str, Any]) -> str:
    """How messages call a row: by its number, where `_row` has it."""
    return f"Row {row['_row']}" if row.get("_row") is not None else "A row"


def is_data_url(value: Any) -> bool:
    """Whether a value is one, in whatever case its scheme is written."""
    return isinstance(value, str) and value[:5].lower() == "data:"


def short(value: Any, length: int = 80) -> str:
    """What a value is, in at most `length` characters: a message never prints a payload."""
    if is_data_url(value):
        return f"a data URL of {len(value)} characters"
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def said(error: Exception, length: int = 300) -> str:
    """The text of another's error, in at most `length` characters."""
    text = str(error)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def checked_messages(row: dict[str, Any], column: str) -> list[dict[str, Any]]:
    """
    `row[column]` as messages, each with a role and with text, or with parts that are text or images.

    Raises:
        RowError: With the message and the part that is something else.
    """
    value, name = row.get(column), f"{row_name(row)}: `{column}`"
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, dict) for message in value):
        raise RowError(f'{name} must be a list of {{"role": ..., "content": ...}}, got {short(value)}.')
    for i, message in enumerate(value):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise RowError(f"{name}: message {i} has the role {short(role)}; a name such as 'user' is needed.")
        if role == "assistant":
            unlearned = [key for key in LEARNED_KEYS if message.get(key) is not None and not message[key]]
            if unlearned:
                raise RowError(
                    f"{name}: message {i} is not to be learned, by its {unlearned}, which is not supported. Put such "
                    "messages into a `prompt`, and the one to be learned into `completion`."
                )
        if isinstance(content, str):
            continue
        if not isinstance(content, (list, tuple)) or not all(isinstance(part, dict) for part in content):
            raise RowError(f"{name}: the content of message {i} must be text or a list of parts, got {short(content)}.")
        for part in content:
            _check_part(part, role, f"{name}: message {i}")
    return list(value)


def _check_part(part: dict[str, Any], role: str, name: str) -> None:
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return
    if kind != "image":
        keys = sorted(k for k, v in part.items() if v is not None and k != "type")
        raise RowError(
            f"{name} has a part of type {short(kind, 40)} with {keys}; parts are text or images. OpenAI's and other "
            f"formats are converted by {CONVERT}."
        )
    if role == "assistant":
        raise RowError(f"{name}, the assistant's, holds an image. Images belong to other roles.")
    others = sorted(k for k, v in part.items() if v is not None and k not in ("type", "image", "text"))
    if others:
        raise RowError(f"{name} has an image part with {others}. The picture goes under `image`; {CONVERT} puts it so.")


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The content of a checked message as parts."""
    content = message["content"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    # Arrow fills the fields that a part does not have with None.
    return [{k: v for k, v in part.items() if v is not None} for part in content]


def said_of(message: dict[str, Any]) -> list[str]:
    """What the rendering of a checked message must hold: its texts, its reasoning, the names of what it calls."""
    reasoning = [message[key] for key in ("reasoning_content", "thinking") if isinstance(message.get(key), str)]
    calls = [call for call in message.get("tool_calls") or [] if isinstance(call, dict)]
    names = [(call.get("function") or call).get("name") for call in [*calls, message.get("function_call") or {}]]
    return [*texts_of(message), *reasoning, *(name for name in names if isinstance(name, str))]


def texts_of(message: dict[str, Any]) -> list[str]:
    """The texts of a checked message."""
    return [part["text"] for part in parts_of(message) if part["type"] == "text"]
