"""Rows of other projects' formats, as TRL's: OpenAI's, ShareGPT's with and without images, ms-swift's and Alpaca's."""

import json
import re
from pathlib import Path
from typing import Any

from .rows import IMAGE_COLUMNS, PLACEHOLDER, RowError, row_name, short

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
# Under which transformers and others put the picture of a part.
PICTURES = ("image", "url", "path", "base64", "image_url", "source")
FOUND = "Formats that are read: TRL's, OpenAI's, ShareGPT's `conversations` (also with images), ms-swift's, Alpaca's."


def convert_row(row: dict[str, Any]) -> dict[str, Any]:
    """
    A row in TRL's conversational format, made from another project's. A row in TRL's format stays as it is; use it
    with `dataset.map(convert_row, remove_columns=dataset.column_names)`, or on a list of rows.

    | format | what it has | becomes |
    |---|---|---|
    | OpenAI | parts `{"type": "image_url", "image_url": {"url": ...}}` | parts `{"type": "image", "image": ...}` |
    | transformers | image parts with `url`, `path` or `base64` | the same |
    | ShareGPT | `conversations` of `from` and `value`, `<image>` in texts, `image` | `messages`, image parts |
    | ms-swift | `messages` with `<image>` in the text, `images` | image parts in their places |
    | Alpaca | `instruction`, `input`, `output`, `history` | `prompt` and `completion`, conversational |

    Every content becomes a list of parts, which Arrow takes, as it does not take texts in some rows and parts in
    others. Nothing is opened: a path or an address stays one, for [`~latent_trl.data.images.load_image`] to judge.

    Args:
        row (`dict`): A row; other columns stay.

    Raises:
        RowError: With the row and what was found, for what is none of these.
    """
    row = {k: v for k, v in row.items() if v is not None}
    name = row_name(row)
    if "conversations" in row and "messages" in row:
        raise RowError(f"{name}: has both `conversations` and `messages`. Keep one of them.")
    if "conversations" in row:
        row["messages"] = _from_sharegpt(row.pop("conversations"), row.pop("system", None), name)
    elif "instruction" in row and "output" in row:
        row = _from_alpaca(row, name)
    columns = [c for c in ("messages", "prompt", "completion") if c in row]
    if not columns:
        raise RowError(f"{name}: has the columns {sorted(k for k in row if not k.startswith('_'))}. {FOUND}")
    images = _images(row)
    if "objects" in row and any(mark in str([row[c] for c in columns]) for mark in ("<bbox>", "<ref-object>")):
        raise RowError(f"{name}: has marks of `objects` (<bbox>, <ref-object>). Write the objects into the texts.")
    for column in columns:
        if isinstance(row[column], (list, tuple)):
            where = f"{name}: `{column}`: message"
            row[column] = [_message(m, bool(images), f"{where} {i}") for i, m in enumerate(row[column])]
    placed = sum(_is_open(part) for c in columns if isinstance(row[c], list) for m in row[c] for part in _parts(m))
    if placed and placed != len(images):
        raise RowError(f"{name}: {placed} places for images ({PLACEHOLDER}), but {len(images)} images.")
    return row


def read_json_lines(path: str | Path):
    """
    A `Dataset` of a file with a JSON object a line, each converted by [`convert_row`]: unlike `load_dataset`, it takes
    texts in some rows and parts in others, and names the line of what it cannot take.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        RowError: With the line, for what is no JSON object or of no known format.
    """
    from datasets import Dataset

    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RowError(f"Line {number} of {path} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise RowError(f"Line {number} of {path} must hold an object, got {short(row)}.")
            try:
                rows.append(convert_row(row))
            except RowError as error:
                raise RowError(f"Line {number} of {path}: {error}") from error
    # The columns of a list are those of its first row.
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Dataset.from_list([{name: row.get(name) for name in names} for row in rows])


def _from_sharegpt(turns: Any, system: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(turns, (list, tuple)):
        raise RowError(f"{name}: `conversations` must be a list of turns, got {short(turns)}.")
    messages = [{"role": "system", "content": system}] if system else []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise RowError(f"{name}: turn {i} of `conversations` is {short(turn)}. {FOUND}")
        speaker = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if speaker not in ROLES or not isinstance(text, str):
            raise RowError(
                f"{name}: turn {i} of `conversations` has the speaker {short(speaker, 40)} and the keys "
                f"{sorted(turn)}; speakers are {sorted(ROLES)}, and `value` is text."
            )
        # Even without a picture its place must not be learned as a word.
        parts = _split(text) if ROLES[speaker] == "user" else [{"type": "text", "text": text}]
        messages.append({"role": ROLES[speaker], "content": parts})
    return messages


def _from_alpaca(row: dict[str, Any], name: str) -> dict[str, Any]:
    row = dict(row)
    texts = [row.pop("instruction"), row.pop("input", "") or "", row.pop("output")]
    if not all(isinstance(text, str) for text in texts):
        raise RowError(f"{name}: `instruction`, `input` and `output` must be texts. {FOUND}")
    instruction, given, output = texts
    asked = f"{instruction}\n\n{given}" if given.strip() else instruction
    system = row.pop("system", None)
    messages = [{"role": "system", "content": system}] if system else []
    for turn in row.pop("history", None) or []:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise RowError(f"{name}: `history` must hold pairs of texts, got {short(turn)}.")
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
    row["prompt"] = [*messages, {"role": "user", "content": asked}]
    row["completion"] = [{"role": "assistant", "content": output}]
    return row


def _message(message: Any, has_images: bool, where: str) -> Any:
    """A message with its content as parts, and images in the places of the marks; another thing as it is."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        return message
    marks = has_images and message.get("role") != "assistant"
    parts: list[Any] = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, dict):
            parts.append(part)
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            parts += _split(part["text"]) if marks else [{"type": "text", "text": part["text"]}]
        else:
            parts.append(_image_part(part, where))
    return {**message, "content": parts}


def _image_part(part: dict[str, Any], where: str) -> dict[str, Any]:
    """A part of an image with the picture, if it has one, under `image`."""
    part = {k: v for k, v in part.items() if v is not None}
    kind = part.get("type")
    if kind not in ("image", "image_url", "input_image"):
        return {"type": "text", "text": part["text"]} if kind == "input_text" and "text" in part else part
    held = [key for key in PICTURES if key in part]
    if len(held) > 1:
        raise RowError(f"{where} has an image part with {held}. One picture a part.")
    if not held:
        return {"type": "image"}
    picture = part[held[0]]
    if isinstance(picture, dict) and "url" in picture:
        picture = picture["url"]
    if held[0] == "base64" and isinstance(picture, str) and not picture.startswith("data:"):
        picture = f"data:image;base64,{picture}"
    if held[0] == "source" and isinstance(picture, dict):
        raise RowError(f"{where} has an image part with `source`, which is read in none of the formats. {FOUND}")
    return {"type": "image", "image": picture}


def _split(text: str) -> list[dict[str, Any]]:
    """Text with image parts in the places of the marks; the line break that sets a mark apart goes with it."""
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(re.split(rf"\n?{re.escape(PLACEHOLDER)}\n?", text)):
        parts += [{"type": "image"}] * bool(i) + [{"type": "text", "text": piece}] * bool(piece)
    return parts


def _images(row: dict[str, Any]) -> list[Any]:
    held: Any = next((row[c] for c in IMAGE_COLUMNS if row.get(c) is not None), [])
    return list(held) if isinstance(held, (list, tuple)) else [held]


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, list) else []


def _is_open(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image" and part.get("image") is None
